"""Policies: which tokens keep a place, as a score per token (higher = keep)."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels import attention_mass

GroupReduce = Literal["sum", "mean", "max"]


def check_word(part: object, field: str, words: Any) -> None:
    """Raises UsageError where a field is none of the words of its Literal."""
    value = getattr(part, field)
    if value not in get_args(words):
        raise UsageError(f"{type(part).__name__}: {field} is one of {', '.join(get_args(words))}; got {value!r}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """One layer's whole prompt, as a policy sees it after the exact prefill. Unused parts vanish under jit.

    Attributes:
      queries: [B, K, G, T, H], rotated. keys, values: [B, K, T, H], keys rotated.
      log_sum_exp: f32 [B, K, G, T] of each query's softmax.
      valid: bool [B, T]; right padding is False.
      head_index: int32 [K], one number per (layer, head) of the whole model.
      scale, window, softcap: as in `Step`.
    """

    queries: Array
    keys: Array
    values: Array
    log_sum_exp: Array
    valid: Array
    head_index: Array
    scale: float = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(metadata={"static": True})

    @property
    def lengths(self) -> Array:
        """int32 [B]."""
        return self.valid.sum(-1, dtype=jnp.int32)

    @property
    def positions(self) -> Array:
        """int32 [B, T]."""
        return jnp.broadcast_to(jnp.arange(self.valid.shape[1], dtype=jnp.int32), self.valid.shape)

    def mass(self, reduce: GroupReduce, last: int | None = None) -> Array:
        """Attention that every key receives: f32 [B, K, T], summed over all queries or over each row's `last` ones."""
        queries, lse, query_positions, query_valid = self.queries, self.log_sum_exp, self.positions, self.valid
        if last is not None:
            query_positions = self.lengths[:, None] - last + jnp.arange(last, dtype=jnp.int32)
            query_valid = query_positions >= 0
            index = jnp.maximum(query_positions, 0)[:, None, None]
            queries = jnp.take_along_axis(queries, index[..., None], axis=3)
            lse = jnp.take_along_axis(lse, index, axis=3)
        masses = attention_mass(
            queries,
            self.keys,
            lse,
            query_positions=query_positions,
            key_positions=self.positions,
            query_valid=query_valid,
            key_valid=self.valid,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            reduce=reduce,
        )
        assert isinstance(masses, jax.Array)
        return masses


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Tokens that compete for a place after the prompt: those in the body and the block that leaves the ring.

    Attributes:
      positions: int32 [B, K or 1, S]; -1 marks an empty slot.
      stats: the policy's statistics, f32 [B, K, S], or None.
      seen: int32 [B], tokens of the row whose queries the statistics hold.
      head_index: int32 [K].
    """

    positions: Array
    stats: Array | None
    seen: Array
    head_index: Array


@dataclasses.dataclass(frozen=True)
class Policy(abc.ABC):
    """A score per token. Subclasses are final; a new one is one file.

    Class attributes:
      per_head: whether heads of one layer may keep different tokens.
      online: whether scores exist after the prompt, so that tokens can compete in streaming prefill and decode.
      mass_reduce: how attention is reduced over the G query heads where the policy keeps the attention that each
        slot receives as a statistic; None keeps none.
      scope: "head" (no exchange between heads).
    """

    per_head: ClassVar[bool] = True
    online: ClassVar[bool] = True
    scope: ClassVar[str] = "head"

    @property
    def mass_reduce(self) -> GroupReduce | None:
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
