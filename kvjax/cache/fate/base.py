"""What a fate is, and the simplest one."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from kvjax.cache.codec import Codec
from kvjax.cache.layout import CacheDims, Layout
from kvjax.cache.segment import Segment
from kvjax.typing import Array

if TYPE_CHECKING:
    from kvjax.cache.policy import Prompt


class Fate(abc.ABC):
    """What happens to tokens that have lost the competition for the body.

    A fate may keep a segment of its own, `aside`, which attention reads like the others. It may also have a say in who
    loses (`rescore`).

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
        """Those of the segment aside: tokens are evicted in blocks that suit them too."""
        return ()

    @property
    def needs_rotated(self) -> bool:
        """Whether keys have to be stored rotated, at their original positions."""
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
