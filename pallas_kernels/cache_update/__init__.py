"""Encoding tokens and writing them over slots of a store, in place."""

from pallas_kernels.cache_update.api import cache_update

__all__ = ["cache_update"]
