"""Policies: which tokens keep a place, as a score per token (higher = keep)."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Literal, final, get_args

from kvjax.cache.calibrated import as_calibrated
from kvjax.cache.layout import CacheDims
from kvjax.cache.policy.seen import Prompt, Slots, Tokens
from kvjax.errors import UsageError
from kvjax.typing import Array, PyTree
from pallas_kernels.attention_mass import GumbelNoise

GroupReduce = Literal["sum", "mean", "max"]


def check_word(part: object, field: str, words: Any) -> None:
    """Raises UsageError where a field is none of the words of its Literal."""
    value = getattr(part, field)
    if value not in get_args(words):
        raise UsageError(f"{type(part).__name__}: {field} is one of {', '.join(get_args(words))}; got {value!r}")


@dataclasses.dataclass(frozen=True)
class Perturbed:
    """How a policy changes logits before it sums its own softmax of them (Keyformer); attention itself is not changed.

    y = (x + noise) * factor. noise: Gumbel draws, or None. factor: f32 [B, T], one per query, or None.
    """

    noise: GumbelNoise | None = None
    factor: Array | None = None


@dataclasses.dataclass(frozen=True)
class Repetition:
    """A pass over the model after the prompt's own, in which it is asked to repeat the prompt, piece by piece.

    The text is fed, not generated. A token's score is the largest attention probability that a query of its piece's
    repetition pays it, over the queries of its kv head's group.

    Attributes:
      chunk: the most tokens of a piece, and no more than an eighth of the model's positions.
      tail: how many of the tokens before a piece say where it starts.
      sinks: the first tokens. With the piece and the repetition they are what probabilities are shared by.
    """

    chunk: int = 2048
    tail: int = 8
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.tail < 0 or self.sinks < 0:
            raise UsageError(f"Repetition: chunk is at least 1, tail and sinks at least 0; got {self}")


@dataclasses.dataclass(frozen=True)
class Policy(abc.ABC):
    """A score per token. Subclasses are final; a new one is one file.

    What a policy may keep, all of it optional: a *statistic* per slot, f32, that moves with the slot (the attention
    that it has received, or a number that a token brings along), and a *state* per row and head. What it has learnt
    beforehand is its *data*, arrays [1, K or 1, ...] that prompt, tokens and slots carry.

    Class attributes:
      per_head: whether heads of one layer may keep different tokens.
      online: whether scores exist after the prompt, so that tokens can compete in streaming prefill and decode.
      streams: whether an online policy can do without the whole prompt, so that a streaming prefill may use it.
      scope: what a score looks at: "head", or "layer" (one exchange where heads are sharded).
      arrives_scored: whether a token brings its statistic along (`arrival`); then attention does not change it.
      forgets: whether the attention statistic holds each row's newest query's attention alone, not the sum over all.
      perturbs: whether attention is summed of another softmax than attention's own (`perturbed`).
      calibrated: whether its data are learnt beforehand, by `kvjax calibrate`.
      needs_hiding: whether scores are made of what tokens hide, which only selective attention knows.
      repetition: the pass over the model that `Prompt.scores` come from, where the policy needs them; else None.
    """

    per_head: ClassVar[bool] = True
    online: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    scope: ClassVar[Literal["head", "layer"]] = "head"
    arrives_scored: ClassVar[bool] = False
    forgets: ClassVar[bool] = False
    perturbs: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    needs_hiding: ClassVar[bool] = False
    repetition: ClassVar[Repetition | None] = None

    @property
    def mass_reduce(self) -> GroupReduce | None:
        """How attention is reduced over the G query heads where the statistic is attention; None: it is not."""
        return None

    @property
    def least_recent(self) -> int:
        """The smallest recent window that the policy makes sense with."""
        return 1

    @abc.abstractmethod
    def prompt_scores(self, prompt: Prompt) -> Array:
        """f32 [B, K or 1, T] for the tokens of a prompt."""

    @abc.abstractmethod
    def slot_scores(self, slots: Slots) -> Array:
        """f32 [B, K or 1, S] for cached tokens; the value at empty slots is not used."""

    def prompt_statistics(self, prompt: Prompt) -> Array:
        """f32 [B, K, T]: the statistics of a prompt's tokens."""
        if self.arrives_scored:
            return self.arrival(prompt)
        assert self.mass_reduce is not None
        return prompt.mass(self.mass_reduce, 1 if self.forgets else None, self.perturbed(prompt))

    def arrival(self, tokens: Tokens) -> Array:
        """f32 [B, K, T]: the statistics of new tokens, where `arrives_scored`."""
        raise NotImplementedError(f"{type(self).__name__} gives tokens no statistic on arrival")

    def initial_state(self, dims: CacheDims) -> PyTree:
        """Leaves [B, K, ...] for an empty cache; None where there is no state."""
        return None

    def next_state(self, state: PyTree, tokens: Tokens) -> PyTree:
        """The state after T more tokens (a whole prompt, a chunk, a decoded token)."""
        return state

    def perturbed(self, tokens: Tokens) -> Perturbed | None:
        """The policy's own softmax, where it `perturbs`."""
        return None

    def parameter_shapes(self, dims: CacheDims) -> PyTree:
        """ShapeDtypeStructs [1, K or 1, ...] of the data, where `calibrated`; None where there are none."""
        return None

    @final
    def parameters(self, dims: CacheDims, data: PyTree = None) -> PyTree:
        """The data of one layer's cache: those of the calibration, checked.

        Raises:
          UsageError: data is missing, or has other shapes.
        """
        return as_calibrated(self, self.parameter_shapes(dims), data, dims) if self.calibrated else None
