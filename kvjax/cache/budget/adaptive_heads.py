"""Heads of a layer share its tokens by need."""

from __future__ import annotations

import dataclasses

from kvjax.cache.budget.base import Uniform
from kvjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class AdaptiveHeads(Uniform):
    """Ada-KV (Feng et al., 2024, arXiv:2407.11550): the best tokens of all heads of a layer together.

    A layer keeps as many (head, token) pairs as a uniform budget would, those with the largest scores, whichever head
    they belong to, in a packed pool; a head may keep much more than another. Heads compete once, at the end of the
    prompt. Where kv heads are sharded, they compete within their shard.

    Attributes:
      floor: every head first keeps this share of the uniform budget of its own best tokens (0.2 in the paper).
    """

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise UsageError(f"AdaptiveHeads: floor is a share, from 0 to 1; got {self.floor}")

    @property
    def pooled(self) -> bool:
        return True

    @property
    def least_share(self) -> float:
        return self.floor
