"""What calibrated parts are given in tests: arrays of the right shapes, the same for every run."""

from __future__ import annotations

import jax
import numpy as np

from kvjax.cache.layer_cache import LayerData
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.typing import PyTree
from tests.cache.parameters import learnt


def data_of(method: CacheMethod, dims: CacheDims) -> LayerData:
    """The data of one layer for the parts of a method that are calibrated."""
    here = method.for_layer(dims)
    policy = drawn(here.policy.parameter_shapes(dims)) if here.policy.calibrated and here.budget.evicts else None
    return LayerData(keys=learnt(here.keys, dims, 1), values=learnt(here.values, dims, 2), policy=policy)


def drawn(shapes: PyTree) -> PyTree:
    """Normal numbers, divided by the root of the last axis like the weights of a network."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, x.dtype) * max(x.shape[-1], 1) ** -0.5, shapes)
