"""Which heads look at earlier copies of what they read, and at what came after these (RazorAttention)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.budget import HeadTable
from kvjax.cache.fate import Compensate
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.policy import Prompt
from kvjax.cache.prompt import probabilities
from kvjax.calibration.finder import Found, Task
from kvjax.calibration.observe import observe
from kvjax.calibration.parts import head_table, spelled_heads
from kvjax.errors import UsageError
from kvjax.models.language_model import LanguageModel
from kvjax.typing import Array

MOST = 1 << 24
"""Probabilities held at a time."""


@dataclasses.dataclass(frozen=True)
class RetrievalHeads:
    """A text of random tokens, repeated, is read once; heads with the largest echo and induction scores keep all.

    RazorAttention (Tang et al., 2024, arXiv:2407.15891). Echo is the attention of a token to earlier copies of itself,
    induction that to the tokens behind those copies, mean over queries; a kv head has the largest score of the query
    heads that read it. The tokens are all of the vocabulary's (the release takes the ids 10,000 to 12,500).

    Attributes:
      echo_share, induction_share: of all kv heads of the model, how many are chosen by either; at least one. 1 % and
        14 % in the paper.
      period: tokens before they repeat, 2,500 in the paper; less where the model has fewer positions.
      repeats: how often they stand there.
    """

    echo_share: float = 0.01
    induction_share: float = 0.14
    period: int = 2500
    repeats: int = 4

    def __post_init__(self) -> None:
        if not (0 <= self.echo_share <= 1 and 0 <= self.induction_share <= 1):
            raise UsageError(f"shares of heads are 0 to 1; got {self.echo_share} and {self.induction_share}")
        if self.period < 2 or self.repeats < 2:
            raise UsageError(f"at least 2 tokens repeat at least twice; got {self.period} and {self.repeats}")

    @property
    def reads(self) -> bool:
        return False

    def fits(self, method: CacheMethod, dims: tuple[CacheDims, ...]) -> bool:
        return isinstance(method.budget, HeadTable) and isinstance(method.fate, Compensate)

    def find(self, task: Task) -> Found:
        with task.track("echo and induction", 1) as advance:
            echo, induction = self.scores(task.model, task.seed)
            advance()
        chosen = choose_heads(echo, induction, self.echo_share, self.induction_share)
        return Found(head_table(task.method, chosen), (), (f"retrieval heads, {spelled_heads(chosen)}",))

    def scores(self, model: LanguageModel, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Echo and induction scores of every kv head, f32 [L, K] each."""
        tokens, first = self.text(model, seed)
        look = Echoes((tokens.shape[1] - first) // self.repeats, first)
        seen = observe(model, look, tokens, np.full(1, tokens.shape[1], np.int32))
        scores = np.stack([np.asarray(layer) for layer in seen])
        return scores[:, 0], scores[:, 1]

    def text(self, model: LanguageModel, seed: int) -> tuple[NDArray[np.int32], int]:
        """The repeated tokens int32 [1, T] behind what stands before every text, and how many tokens that is."""
        backend = model.tokenizer.backend
        prefix = model.tokenizer.encode("", special=True) if backend is not None else []
        period = min(self.period, (model.config.max_positions - len(prefix)) // self.repeats)
        if period < 2:
            raise UsageError(f"model {model.name!r} has too few positions for tokens that repeat {self.repeats} times")
        special = {*prefix, *model.tokenizer.stop_ids}
        words = np.array([token for token in range(model.config.vocab_size) if token not in special], np.int32)
        cycle = np.random.default_rng(seed).choice(words, period, replace=period > len(words))
        return np.concatenate([np.asarray(prefix, np.int32), np.tile(cycle, self.repeats)])[None], len(prefix)


@dataclasses.dataclass(frozen=True)
class Echoes:
    """A look: f32 [2, K], echo and induction scores of the kv heads, for one row whose tokens repeat.

    Queries are taken a block at a time: never are all probabilities there at once.

    Attributes:
      period: after how many tokens. first: the position of the first token that is repeated.
    """

    period: int
    first: int

    def __call__(self, prompt: Prompt) -> Array:
        queries, keys, lse, step = prompt.queries[0], prompt.keys[0], prompt.log_sum_exp[0], prompt.step
        heads, group, tokens, dim = queries.shape
        size = int(np.clip(MOST // (heads * group * tokens), 1, tokens))
        spare = -tokens % size
        queries = jnp.pad(queries, ((0, 0), (0, 0), (0, spare), (0, 0))).reshape(heads, group, -1, size, dim)
        lse = jnp.pad(lse, ((0, 0), (0, 0), (0, spare)), constant_values=jnp.inf).reshape(heads, group, -1, size)
        column = jnp.arange(tokens, dtype=jnp.int32)

        def block(args: tuple[Array, Array, Array]) -> Array:
            q, log_total, start = args
            row = start + jnp.arange(size, dtype=jnp.int32)
            p = probabilities(step, q, keys, log_total, row, column)
            row = row[:, None]
            # Columns that hold a copy of the row's token, and columns behind such ones.
            copies = [(row > c) & ((row - c) % self.period == 0) & (c >= self.first) for c in (column, column - 1)]
            return jnp.stack([jnp.where(copy, p, 0.0).sum((2, 3)) for copy in copies])

        starts = jnp.arange(queries.shape[2], dtype=jnp.int32) * size
        sums = jax.lax.map(block, (jnp.moveaxis(queries, 2, 0), jnp.moveaxis(lse, 2, 0), starts))
        return sums.sum(0).max(-1) / tokens


def choose_heads(
    echo: NDArray[np.float32], induction: NDArray[np.float32], echo_share: float, induction_share: float
) -> NDArray[np.bool_]:
    """bool [L, K]: those among the best by either score, each share rounded, but at least one head if it is not 0."""
    chosen = np.zeros(echo.size, bool)
    for scores, share in ((echo, echo_share), (induction, induction_share)):
        count = max(round(share * scores.size), 1) if share else 0
        chosen[np.argsort(-scores.reshape(-1), kind="stable")[:count]] = True
    return chosen.reshape(echo.shape)
