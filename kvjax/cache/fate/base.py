"""What a fate is, and the simplest one."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import jax

from kvjax.cache.codec import Codec
from kvjax.cache.layout import CacheDims, Layout
from kvjax.cache.segment import Segment
from kvjax.typing import Array

if TYPE_CHECKING:
    from kvjax.cache.policy import Prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lost:
    """A token that loses its place.

    Attributes:
      values: [B, K, 1, H]. positions: int32 [B, K or 1, 1]. mass: f32 [B, K, 1], the attention it has received.
      present: bool [B, K or 1], where there is one. head_index: int32 [K].
    """

    values: Array
    positions: Array
    mass: Array
    present: Array
    head_index: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """Tokens that stay: values [B, K, S, H], positions int32 [B, K or 1, S] (-1: none), attention received f32."""

    values: Array
    positions: Array
    mass: Array


class Fate(abc.ABC):
    """What happens to tokens that have lost the competition for the body.

    A fate may keep a segment of its own, `aside`, which attention reads like the others; or it `merges` values into
    those of tokens that stay. It may also have a say in who loses (`rescore`).

    Class attributes:
      scope: what its say looks at: "head", or "layer" (one exchange at a prompt's end where heads are sharded).
    """

    scope: ClassVar[Literal["head", "layer"]] = "head"

    @property
    @abc.abstractmethod
    def summary(self) -> str:
        """A few words for tables."""

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """Those of the segment aside, of keys and of values: tokens are evicted in blocks that suit them too."""
        return ()

    @property
    def needs_rotated(self) -> bool:
        """Whether keys have to be stored rotated, at their original positions."""
        return False

    @property
    def merges(self) -> bool:
        """Whether values of tokens that stay change (`carried`, `bequeath`); then values are stored exactly."""
        return False

    def aside(self, dims: CacheDims, layout: Layout, per_head: bool) -> Segment | None:
        """The empty segment that this fate keeps, or None."""
        return None

    def rescore(self, scores: Array, eligible: Array, take: Array, prompt: Prompt) -> Array:
        """Scores of a prompt's tokens by which the body is filled, f32 [B, K or 1, T].

        Args:
          scores: the policy's. eligible: bool [B, 1, T], tokens that compete.
          take: int32 [B, 1, 1], how many of them get a place.
        """
        return scores

    def carried(self, kept: Array, lost: Array, mass: Array, most: int, prompt: Prompt) -> Array:
        """The values of a prompt's tokens as they are stored, [B, K, T, H].

        Args:
          kept, lost: bool [B, K or 1, T]; neither holds for sinks and padding. mass: f32 [B, K, T], attention received.
          most: no head keeps more tokens.
        """
        return prompt.values

    def bequeath(self, lost: Lost, kept: Sequence[Kept]) -> list[Array]:
        """The values of the tokens that stay after one has lost its place."""
        return [part.values for part in kept]

    def settle(self, aside: Segment, keys: Array, values: Array, lost: Array, prompt: Prompt) -> Segment:
        """The segment after a prompt, of whose tokens (keys as stored, values [B, K, T, H]) some are lost.

        lost: bool [B, K or 1, T].
        """
        return aside

    def receive(self, aside: Segment, keys: Array, values: Array, positions: Array, lost: Array) -> Segment:
        """The segment after one more block has lost its place, where `lost` bool [B, K or 1] says so.

        keys, values [B, K, block, H]; positions int32 [B, K or 1, block].
        """
        return aside


@dataclasses.dataclass(frozen=True)
class Drop(Fate):
    """The token is forgotten; its slot is free."""

    @property
    def summary(self) -> str:
        return "drop"
