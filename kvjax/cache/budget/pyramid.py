"""More tokens for the first layers than for the last."""

from __future__ import annotations

import dataclasses

import numpy as np

from kvjax.cache.budget.base import Layered
from kvjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Pyramid(Layered):
    """PyramidKV (Cai et al., 2024, arXiv:2406.02069): linear over layers, from 2 - 1/beta of the mean to 1/beta of it.

    The release clamps the first layers to the prompt's length and gives what they cannot use to the last ones. Here
    slots are allocated before lengths are known: what a short row does not use stays empty, and a row gives the same
    result in any batch.

    Attributes:
      beta: the mean over the last layer's budget, at least 1; 1 is `Uniform`. 20 in the release.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise UsageError(f"Pyramid needs beta >= 1; got {self.beta}")

    def weights(self) -> np.ndarray:
        least = 1 / self.beta
        return np.linspace(2 - least, least, self.layers) if self.layers > 1 else np.ones(1)
