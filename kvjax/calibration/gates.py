"""Which heads can do with a window: gates that are trained between full and streaming attention (DuoAttention)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.budget import HeadTable
from kvjax.cache.fate import Compensate
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.prompt import attend_prompt, group_queries, logits_of, rotate, ungroup, widened
from kvjax.cache.step import Step
from kvjax.calibration.finder import Found, Task
from kvjax.calibration.parts import head_table, spelled_heads
from kvjax.convert.descend import descend
from kvjax.errors import UsageError
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from kvjax.tasks import Retrieval, Vocabulary, examples
from kvjax.typing import Array, PyTree

FAR = -1e30
PASSKEYS = Retrieval(pairs=16, asked=4)


@dataclasses.dataclass(frozen=True)
class Gates:
    """A gate per kv head, α in [0, 1], mixes full and streaming attention: α · full + (1 - α) · streaming.

    DuoAttention (Xiao et al., 2024, arXiv:2410.10819). Only gates are trained, from 1 on, to give the hidden states of
    the full model behind the last norm where answers are predicted, in contexts that hide words to be recalled, while
    their mean is pressed down. Heads whose gates stay up are full. The contexts are 16 records in sample text of which
    4 are asked for (the paper: 10 passkeys in books).

    Attributes:
      full_share: of the heads; None is a half, or a quarter where query heads share kv heads.
      steps: of training; 2,000 in the release.
      rate: of Adam. pressure: the weight of the gates' mean in the loss. Both as in the release.
      sinks, recent: tokens that a streaming head sees in training; None are those of the method.
    """

    full_share: float | None = None
    steps: int = 200
    rate: float = 0.02
    pressure: float = 0.05
    sinks: int | None = None
    recent: int | None = None

    @property
    def reads(self) -> bool:
        return True

    def fits(self, method: CacheMethod, dims: tuple[CacheDims, ...]) -> bool:
        return isinstance(method.budget, HeadTable) and not isinstance(method.fate, Compensate)

    def find(self, task: Task) -> Found:
        gates = self.train(task)
        config = task.model.config
        grouped = config.num_heads > config.num_kv_heads
        chosen = full_heads(gates, (0.25 if grouped else 0.5) if self.full_share is None else self.full_share)
        spelled = "; ".join(" ".join(f"{gate:.2f}" for gate in row) for row in gates)
        notes = (f"full heads, {spelled_heads(chosen)}", f"gates, by layer: {spelled}")
        return Found(head_table(task.method, chosen), (), notes)

    def train(self, task: Task) -> NDArray[np.float32]:
        """The gates after training, f32 [L, K]."""
        model, method = task.model, task.method
        recent = method.recent if self.recent is None else self.recent
        sinks = method.sinks if self.sinks is None else self.sinks
        if not isinstance(recent, int) or task.given.length <= sinks + recent:
            raise UsageError(
                f"method {method.name!r}: a streaming head sees {sinks} sinks and {recent} recent tokens, and samples "
                f"of {task.given.length} tokens are no longer. Give longer samples, or a smaller window."
            )
        config, module = model.config, model.module

        def loss(gates: Array, batch: tuple[PyTree, Array, Array]) -> Array:
            params, tokens, asked = batch
            caches = tuple(Gated(jnp.zeros(len(tokens), jnp.int32), gate, sinks, recent) for gate in gates)
            distance = hidden_states(module, params, tokens, caches) - hidden_states(module, params, tokens, None)
            each = jnp.mean(distance.astype(jnp.float32) ** 2, axis=-1)
            return jnp.sum(jnp.where(asked, each, 0.0)) / asked.sum() + self.pressure * jnp.abs(gates).mean()

        start = jnp.ones((config.num_layers, config.num_kv_heads), jnp.float32)
        with task.track("gates", self.steps) as advance:
            done = lambda value: advance(note=f"loss {value:.4f}")  # noqa: E731
            data = contexts(model, task, self.steps)
            gates = descend(loss, start, data, self.steps, self.rate, within=(0.0, 1.0), done=done)
        return np.asarray(gates)


def contexts(model: LanguageModel, task: Task, steps: int) -> Iterator[tuple[PyTree, Array, Array]]:
    """Batches of what gates are trained on: the parameters, tokens int32 [B, T], and whether what follows a token is
    part of an answer, bool [B, T]."""
    samples, backend = task.given, model.tokenizer.backend
    if backend is None:
        raise UsageError(f"model {model.name!r} has no tokenizer, and gates are trained on words")
    filler = samples.tokens[np.arange(samples.length) < samples.lengths[:, None]]
    drawn = examples(
        PASSKEYS, Vocabulary.of(backend), filler, length=samples.length, count=steps * task.batch, seed=task.seed
    )
    for _ in range(steps):
        rows = [next(drawn) for _ in range(task.batch)]
        tokens = np.stack([np.concatenate([row.context, row.question, row.answer]) for row in rows]).astype(np.int32)
        asked = np.zeros(tokens.shape, bool)
        for row, place in zip(rows, asked, strict=True):
            place[-len(row.answer) - 1 : -1] = True
        yield model.params, model.place_rows(tokens), model.place_rows(asked)


def full_heads(gates: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """bool [L, K]: those whose gates are not below the quantile 1 - share of all."""
    return gates >= np.quantile(gates, 1 - share)


def hidden_states(module: Transformer, params: PyTree, tokens: Array, caches: tuple[Gated, ...] | None) -> Array:
    """What leaves the last norm, [B, T, D]."""
    _, state = module.apply(
        {"params": params},
        tokens,
        cache=caches,
        mutable=["intermediates"],
        capture_intermediates=lambda part, _: part.name == "final_norm",
    )
    return state["intermediates"]["final_norm"]["__call__"][0]  # pyright: ignore[reportReturnType]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated:
    """A layer cache that keeps nothing: exact attention, mixed with that to sinks and a recent window.

    Attributes:
      length: int32 [B], zeros. gates: f32 [K]. sinks, recent: static.
    """

    length: Array
    gates: Array
    sinks: int = dataclasses.field(metadata={"static": True})
    recent: int = dataclasses.field(metadata={"static": True})

    def step(self, step: Step) -> tuple[Array, None]:
        full, _ = attend_prompt(step)
        streaming = stream(step, self.sinks, self.recent)
        heads, kv_heads = step.queries.shape[2], step.keys.shape[2]
        reads = step.kv_head_of_query or tuple(n * kv_heads // heads for n in range(heads))
        gate = self.gates[jnp.asarray(reads)][:, None].astype(full.dtype)
        return gate * full + (1 - gate) * streaming, None


def stream(step: Step, sinks: int, recent: int) -> Array:
    """Attention [B, T, N, H] of each token to the first `sinks` and its `recent` newest tokens, itself among them."""
    step = widened(step)
    window = recent if step.window is None else min(recent, step.window)
    near, near_lse = attend_prompt(dataclasses.replace(step, window=window))
    queries = rotate(step, group_queries(step))
    keys = rotate(step, step.keys.swapaxes(1, 2))[:, :, :sinks]
    logits = logits_of(step, queries, keys)
    distance = step.positions[:, :, None] - step.positions[:, None, :sinks]
    beyond = (distance >= window) & step.valid[:, None, :sinks]
    beyond = beyond if step.window is None else beyond & (distance < step.window)
    logits = jnp.where(beyond[:, None, None], logits, FAR)
    far_lse = jax.nn.logsumexp(logits, axis=-1)
    far = jnp.einsum(
        "bkgts,bksh->bkgth", jnp.exp(logits - far_lse[..., None]), step.values.swapaxes(1, 2)[:, :, :sinks]
    )
    near_lse = jnp.where(jnp.isfinite(near_lse), near_lse, 0.0)
    share = jax.nn.sigmoid(near_lse - far_lse)
    near = near.astype(jnp.float32)
    return (near + ungroup(step, 1 - share[..., None]) * (ungroup(step, far) - near)).astype(step.queries.dtype)
