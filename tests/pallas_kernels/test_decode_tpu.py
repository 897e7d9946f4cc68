"""The TPU kernel of decode attention, interpreted on the CPU: memory that nobody wrote is NaN, races are errors."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decode_attention
from pallas_kernels.compat import RaceError, TpuCore, interpreted
from pallas_kernels.decode_attention import pallas_tpu, reference, specs
from pallas_kernels.decode_attention.api import OP
from pallas_kernels.decode_attention.pallas_tpu import blocks, unit
from pallas_kernels.decode_attention.specs import DecodeSpec, Format
from pallas_kernels.loader import DenseLoader
from pallas_kernels.pages import Pages
from pallas_kernels.testing import assert_close
from tests.thin import thinned

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Each program runs once: compiling it well takes longer than it saves."""

INTEGERS, FLOATS = TpuCore(), TpuCore(multiplies_int8=False, vector_memory=1 << 24)
"""The two kinds of core: with and without int8 in the matrix unit."""

INT8, INT4, INT2 = Format(8), Format(4, fold=2), Format(2, fold=4)
SYMMETRIC = Format(8, symmetric=True)

FAST = (
    (INTEGERS, False, DecodeSpec("int8", 1, 2, 4, 384, 128, INT8, SYMMETRIC, lengths=(300,))),
    (FLOATS, True, DecodeSpec("int4_as_floats", 2, 1, 8, 256, 128, INT4, INT4, lengths=(130, 0))),
    (INTEGERS, True, DecodeSpec("int4_groups", 1, 1, 3, 256, 128, INT4, Format(4, group=32, fold=2), softcap=5.0)),
    (INTEGERS, False, DecodeSpec("refolded", 1, 1, 8, 512, 128, INT2, Format(4, symmetric=True, fold=2), bias=True)),
    (INTEGERS, False, DecodeSpec("kivi2", 1, 1, 4, 512, 128, Format(2, block=32, fold=4), INT2, lengths=(400,))),
    (INTEGERS, False, DecodeSpec("rotated", 1, 2, 2, 256, 128, Format(4, fold=2, rotated=True), Format(16))),
    (INTEGERS, True, DecodeSpec("bf16", 2, 2, 1, 133, 96, Format(16), Format(16), window=64, lengths=(133, 90))),
    (INTEGERS, False, DecodeSpec("f32_holes", 1, 2, 16, 200, 64, holes=0.4, masks_per_head=True)),
    (INTEGERS, False, DecodeSpec("one_joint_head", 2, 4, 2, 256, 256, Format(8, shared=True), Format(8, shared=True))),
    (INTEGERS, False, DecodeSpec("one_slot", 1, 1, 1, 1, 64)),
    (
        INTEGERS,
        False,
        DecodeSpec("packed_pool", 2, 2, 4, 256, 128, INT8, INT8, page=128, pool="joint", lengths=(200, 0)),
    ),
    (INTEGERS, False, DecodeSpec("chosen_pages", 1, 2, 4, 512, 128, INT4, INT4, page=256, lengths=(300,))),
)
"""A pairwise cover of core, logits asked for, bits, fold, groups, H, queries, masks, pages and lengths."""


def attend(spec: DecodeSpec, core: TpuCore = INTEGERS, logits: bool = False, change: Any = None) -> Any:
    """(result of the interpreted kernel, result of the reference); `change` maps the kernel's (args, options)."""
    args, options = spec.arguments()
    options["return_logits"] = logits
    arrays = {name: x for name, x in options.items() if jax.tree.leaves(x) and hasattr(jax.tree.leaves(x)[0], "shape")}
    static = {name: x for name, x in options.items() if name not in arrays}
    kernel = functools.partial(pallas_tpu.forward, **static, core=core)

    def jitted(run: Any) -> Any:
        return jax.jit(lambda args, arrays: run(*args, **arrays), compiler_options=QUICK)

    want = jitted(functools.partial(reference.run, **static))(args, arrays)
    if change is not None:
        args, arrays = change(args, arrays)
    with interpreted():
        got = jax.block_until_ready(jitted(kernel)(args, arrays))
    return got, want


@pytest.mark.parametrize(("core", "logits", "spec"), thinned([pytest.param(*case, id=case[2].name) for case in FAST]))
def test_equals_the_reference(core: TpuCore, logits: bool, spec: DecodeSpec) -> None:
    assert_close(*attend(spec, core, logits))


@pytest.mark.slow
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("core", [INTEGERS, FLOATS], ids=["integers", "floats"])
@pytest.mark.parametrize("spec", specs.SPECS, ids=lambda spec: spec.name)
def test_equals_the_reference_everywhere(spec: DecodeSpec, core: TpuCore, logits: bool) -> None:
    try:
        pair = attend(spec, core, logits)
    except NotImplementedError as error:
        assert str(error)
    else:
        assert_close(*pair)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 2, 3, 5, 8, 12, 16])
@pytest.mark.parametrize("stored", [Format(16), INT8, INT4, INT2], ids=lambda f: f"{f.bits}")
def test_any_number_of_queries(stored: Format, queries: int) -> None:
    assert_close(*attend(DecodeSpec("queries", 2, 2, queries, 1024, 128, stored, stored, lengths=(1000, 17))))


@pytest.mark.parametrize("bad", [float("nan"), 1e30])
@pytest.mark.parametrize(
    "spec",
    [
        DecodeSpec("bf16", 1, 2, 4, 200, 128, Format(16), Format(16), holes=0.5, bias=True, lengths=(150,)),
        DecodeSpec("int8", 1, 1, 8, 256, 128, INT8, INT8, holes=0.5, lengths=(200,)),
    ],
    ids=lambda spec: spec.name,
)
def test_poisoned_slots_that_are_not_valid_change_nothing(spec: DecodeSpec, bad: float) -> None:
    def poisoned(args: Any, arrays: Any) -> Any:
        unused = ~(arrays["valid"] & (jnp.arange(spec.slots) < arrays["lengths"][..., None]))

        def leaf(x: jax.Array) -> jax.Array:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            where = jnp.broadcast_to(unused, x.shape[:3])
            return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - 3)), jnp.asarray(bad, x.dtype), x)

        q, *loaders = args
        arrays = {name: leaf(x) if name == "bias" else x for name, x in arrays.items()}
        return (q, *(x.with_slots(jax.tree.map(leaf, x.slots)) for x in loaders)), arrays

    assert_close(*attend(spec, change=poisoned))


def test_pages_without_a_valid_slot_may_have_any_number() -> None:
    spec = DecodeSpec("pages", 2, 1, 8, 512, 128, INT8, INT8, page=128, lengths=(200, 0))

    def scrambled(args: Any, arrays: Any) -> Any:
        pages = arrays["pages"]
        empty = jnp.arange(4) * pages.size >= arrays["lengths"][..., None]
        return args, arrays | {"pages": Pages(jnp.where(empty, 2**30, pages.table), pages.size)}

    assert_close(*attend(spec, change=scrambled))


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_gradients_equal_autodiff_of_the_reference(implementation: str) -> None:
    spec = DecodeSpec("gradient", 2, 1, 2, 100, 64, softcap=4.0, bias=True, lengths=(100, 0))
    (q, keys, values), options = spec.arguments()
    weights = jax.random.normal(jax.random.key(9), q.shape)

    def gradient(name: str) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
            named = options | {"bias": bias, "implementation": name}
            out, lse = decode_attention(q, DenseLoader(k), DenseLoader(v), **named)
            return (out * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), compiler_options=QUICK)
        return run(q, keys.x, values.x, options["bias"])

    want = gradient("reference")
    with interpreted():
        got = jax.block_until_ready(gradient(implementation))
    assert_close(got, want)


@given(st.integers(0, 2**31 - 1), st.sampled_from([1, 37]), st.sampled_from([3, 8, 64]), st.booleans(), st.booleans())
def test_blocks_that_nobody_sees_are_neither_fetched_nor_computed(
    seed: int, slots: int, block: int, holes: bool, windowed: bool
) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, slots + 1, (3, 2))
    valid = rng.random((3, 2, slots)) < 0.5 if holes else np.ones((3, 2, slots), bool)
    positions = np.sort(rng.permutation(100)[:slots])[None, None].repeat(3, 0)
    now, window = rng.integers(100, 110, (3, 4)), 30 if windowed else None
    seen = (valid & (np.arange(slots) < lengths[..., None]))[:, :, None] & np.ones((4, 1), bool)
    if windowed:
        seen &= (now[:, :, None] - positions < 30)[:, None]
    count = -(-slots // block)
    seen = np.pad(seen, ((0, 0),) * 3 + ((0, count * block - slots),)).reshape(3, 8, count, block)
    hidden = jnp.asarray(valid) if holes else None
    times = (jnp.asarray(positions), jnp.asarray(now)) if windowed else (None, None)
    state = blocks.states(slots, block, jnp.asarray(lengths), hidden, *times, window)
    expected = np.where(seen.all((1, 3)), blocks.WHOLE, np.where(seen.any((1, 3)), blocks.PARTIAL, blocks.DEAD))
    np.testing.assert_array_equal(state, expected)

    fetched = np.asarray(blocks.fetched(state))
    for row in range(3):
        live = set(np.flatnonzero(expected[row]))
        np.testing.assert_array_equal(fetched[row][sorted(live)], sorted(live))
        assert set(fetched[row]) <= (live or {0}) and (np.diff(fetched[row]) >= 0).all()


def test_a_row_is_computed_with_its_neighbours() -> None:
    state = jnp.asarray([[2, 2, 0], [2, 1, 0], [0, 0, 0], [2, 0, 0]])
    np.testing.assert_array_equal(blocks.together(state, 2), [[2, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("seed", range(3))
def test_queries_in_signed_bytes_lose_nothing_against_float32(seed: int) -> None:
    """Channels that differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    q = (rng.standard_normal((2, 4, 8)) * 10.0 ** rng.integers(-3, 3, (2, 1, 8))).astype(np.float32)
    terms, factor = unit.query_terms(jnp.asarray(q), jnp.int8)
    assert all(np.abs(t).max() <= 128 and (np.asarray(t) == np.rint(t)).all() for t in terms)
    joined = (65536.0 * np.float64(terms[0]) + 256.0 * np.float64(terms[1]) + np.float64(terms[2])) * np.float64(factor)
    peak = np.abs(q).max((1, 2), keepdims=True)
    assert (np.abs(joined - q) <= peak * (0.5 / unit.QUERY_TOP + 2.0**-23)).all()


def test_weights_in_signed_bytes_keep_a_long_tail() -> None:
    """Weights as those of a sink and of many slots a billion times lighter."""
    x = (unit.WEIGHT_TOP * 10.0 ** np.random.default_rng(0).uniform(-9, 0, (8, 128))).astype(np.float32)
    x[0, 0], x[1, 0] = unit.WEIGHT_TOP, 0.0

    def kernel(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = unit.weight_operand(x_ref[...], jnp.int8)

    with interpreted():
        rows = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((32, 128), jnp.int8))(x)
    digits = np.asarray(rows, np.float64).reshape(8, 4, 128)
    np.testing.assert_allclose(np.einsum("rkn,k->rn", digits, 256.0 ** np.arange(4)), x, rtol=0, atol=1.0)


def test_a_missing_wait_is_a_race() -> None:
    """Pages of a pool copied by their numbers, with and without waiting for the copy."""

    def kernel(wait: bool, table: Any, pool: Any, out: Any, page: Any, arrived: Any) -> None:
        copy = pltpu.make_async_copy(pool.at[table[1]], page, arrived)
        copy.start()
        if wait:
            copy.wait()
        out[...] = page[...]
        if not wait:
            copy.wait()

    def run(wait: bool) -> jax.Array:
        pool = jnp.arange(4 * 8 * 128, dtype=jnp.float32).reshape(4, 8, 128)
        return pl.pallas_call(
            functools.partial(kernel, wait),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(1,),
                in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
                out_specs=pl.BlockSpec((8, 128), lambda *_: (0, 0)),
                scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
            ),
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        )(jnp.asarray([0, 2]), pool)

    with interpreted():
        np.testing.assert_array_equal(run(True)[0, :2], [2048, 2049])
    with pytest.raises(RaceError), interpreted():
        jax.block_until_ready(run(False))


def test_what_it_declines_has_a_reason() -> None:
    support = {row.implementation: row for row in OP.support("cpu")}
    assert "tpu" in support["pallas_tpu"].reason
    assert {row.implementation: row for row in OP.support("tpu")}["pallas_tpu"].runs
    for spec, reason in (
        (DecodeSpec("unfolded", 1, 1, 4, 256, 128, Format(4), Format(4)), "fold them"),
        (DecodeSpec("pages", 1, 1, 4, 256, 128, INT8, INT8, page=64), "pages of 64 slots"),
        (DecodeSpec("chunk", 1, 1, 512, 256, 128, INT8, INT8), "too many"),
    ):
        args, options = spec.arguments()
        with pytest.raises(NotImplementedError, match=reason):
            decode_attention(*args, **options, implementation="pallas_tpu")


def test_every_block_of_a_schedule_is_that_of_the_kernel() -> None:
    spec = dataclasses.replace(next(s for s in specs.HARDWARE if s.name == "int4_g8"), slots=2048)
    for copies in (False, True):
        schedule = pallas_tpu.static_schedule(spec, steps=3, copies=copies)
        assert schedule.slots == 8 * 2048
        assert schedule.packed_bytes == 2 * schedule.slots * (64 + 4)
        outs = jax.eval_shape(schedule.run, *schedule.arguments)
        assert outs[0].shape == (1, 8, 8, 128)
        stored = sum(x.size * x.dtype.itemsize for x in schedule.arguments[1:])
        assert stored == (3 * schedule.packed_bytes if copies else 0)
