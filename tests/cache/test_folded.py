"""Where several slots share a row of a store, as on TPUs, a cache does what it does elsewhere."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kvjax.cache.layer_cache import LayerCache
from kvjax.cache.methods import parse
from kvjax.cache.plan import layer_bytes
from pallas_kernels import rows
from tests.cache.driver import Setup, dims_of, draw, run


@pytest.mark.parametrize("name", ["kivi-2:residual=32", pytest.param("h2o:tokens=24+int4", marks=pytest.mark.slow)])
def test_outputs_do_not_depend_on_the_fold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = parse(name)
    inputs = draw(5, (64, 45, 17), padded=64, decoded=6, query_heads=8)
    plain = run(Setup(method, dims_of(inputs)), inputs)
    monkeypatch.setattr(rows, "here", lambda: "tpu")
    jax.clear_caches()
    try:
        folded = run(Setup(method, dims_of(inputs)), inputs)
        dims = dims_of(inputs)
        cache = jax.eval_shape(lambda: LayerCache.init(method, dims))
        assert layer_bytes(method, dims) == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        assert any(x.fold > 1 for x in jax.tree.leaves(cache, is_leaf=rows.is_rows) if rows.is_rows(x))
    finally:
        jax.clear_caches()
    np.testing.assert_allclose(folded.outputs, plain.outputs, rtol=1e-5, atol=1e-5)
