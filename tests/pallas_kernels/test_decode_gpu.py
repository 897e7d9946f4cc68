"""`decode_attention` for Hopper: its numbers in the interpreter, its bit tricks, what it declines, that it compiles.

The interpreter runs grids, copies, barriers and arithmetic. What it does not know (layouts in registers, operands of
the matrix unit) is only compiled here; that it computes the same needs a device.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.hardware_table import gpu, process
from kvjax.errors import KvjaxError
from pallas_kernels import compat
from pallas_kernels.decode_attention import pallas_gpu, reference
from pallas_kernels.decode_attention.pallas_gpu import plan
from pallas_kernels.decode_attention.specs import DecodeSpec, Format
from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.pages import valid_slots
from pallas_kernels.testing import assert_close
from tests.thin import thinned

mosaic = pytest.importorskip("pallas_kernels.decode_attention.pallas_gpu.kernel", exc_type=ImportError)
keys = pytest.importorskip("pallas_kernels.decode_attention.pallas_gpu.keys", exc_type=ImportError)

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiling is most of the time here."""

PAIRS = (
    DecodeSpec("bf16_shared_tail", 2, 2, 12, 200, 64, Format(16), Format(16, shared=True), lengths=(200, 77)),
    DecodeSpec("int8_symmetric", 1, 2, 4, 256, 64, Format(8, symmetric=True), Format(8, symmetric=True)),
    DecodeSpec("int4", 1, 1, 4, 328, 128, Format(4), Format(4)),
    DecodeSpec("int2", 1, 1, 1, 64, 64, Format(2, symmetric=True), Format(2)),
    DecodeSpec(
        "groups_window_cap_bias", 2, 2, 3, 328, 64, Format(4, group=32), Format(2, group=32), window=100, softcap=5.0,
        bias=True, lengths=(300, 0), masks_per_head=True, holes=0.3,
    ),
    DecodeSpec("kivi4", 2, 1, 8, 384, 128, Format(4, block=32), Format(4, group=32), lengths=(384, 100)),
    DecodeSpec("pool", 2, 2, 4, 256, 64, Format(8), Format(16), page=128, pool="joint", lengths=(200, 256)),
    DecodeSpec("chosen_pages", 1, 2, 4, 256, 64, Format(4, block=32), Format(4), page=64),
    DecodeSpec("long_blocks", 1, 1, 9, 384, 64, Format(8, block=128, symmetric=True), Format(8)),
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps per block, so that the stages of the pipeline are used again."""
    monkeypatch.setattr(plan, "RESIDENT", 2)


def workload(spec: DecodeSpec) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as implementations get them."""
    args, kwargs = spec.arguments()
    lengths = kwargs["lengths"]
    return args, {**kwargs, "lengths": None if lengths is None else lengths.reshape(len(lengths), -1)}


def interpreted(args: tuple, kwargs: dict[str, Any]) -> Any:
    arrays = {k: v for k, v in kwargs.items() if _is_array(v)}
    static = {k: v for k, v in kwargs.items() if k not in arrays}
    with compat.interpreted_gpu():
        run = jax.jit(lambda args, arrays: pallas_gpu.run(*args, **arrays, **static), compiler_options=QUICK)
        return jax.block_until_ready(run(args, arrays))


def _is_array(x: Any) -> bool:
    return any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(x))


@pytest.mark.parametrize(
    "spec",
    [*thinned(PAIRS[:7], 3), *(pytest.param(spec, marks=pytest.mark.slow) for spec in PAIRS[7:])],
    ids=lambda s: s.name,
)
def test_equals_the_reference(spec: DecodeSpec) -> None:
    args, kwargs = workload(spec)
    assert_close(interpreted(args, kwargs), reference.run(*args, **kwargs))


@pytest.mark.parametrize("spec", [PAIRS[0], PAIRS[5]], ids=lambda s: s.name)
def test_poisoned_empty_slots_change_nothing(spec: DecodeSpec) -> None:
    (q, k, v), kwargs = workload(spec)
    seen = valid_slots(q.shape[0], k.count, kwargs["lengths"], kwargs["valid"])

    def poisoned(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        entries = seen.reshape(*seen.shape[:2], x.shape[2], -1).any(-1)  # a block with one token has a real scale
        return jnp.where(entries.reshape(*entries.shape, *(1,) * (x.ndim - 3)), x, jnp.asarray(jnp.nan, x.dtype))

    bad = [loader.with_slots(jax.tree.map(poisoned, loader.slots)) for loader in (k, v)]
    assert any(jnp.isnan(leaf.astype(jnp.float32)).any() for leaf in jax.tree.leaves(bad))
    assert_close(interpreted((q, *bad), kwargs), reference.run(q, k, v, **kwargs))


def test_a_kernel_that_does_not_wait_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    args, kwargs = workload(PAIRS[3])
    wait = mosaic.plgpu.barrier_wait
    waits = []

    def careless(barrier: Any) -> None:
        waits.append(barrier)
        if len(waits) != 3:  # the queries, a tile of keys, and then a tile of values
            wait(barrier)

    monkeypatch.setattr(mosaic.plgpu, "barrier_wait", careless)
    with pytest.raises(compat.RaceError):
        interpreted(args, kwargs)
    assert len(waits) == 3


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("as_in_the_interpreter", [True, False])
def test_planes_decode_every_byte_without_shifts(
    bits: int, as_in_the_interpreter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys.machine, "is_interpreted_gpu", lambda: as_in_the_interpreter)
    stored = plan.Stored(bits, 64, 64 * 8 // bits, 1)
    packed = np.arange(256, dtype=np.uint8).reshape(4, 64)
    codes = np.concatenate([packed >> (bits * i) & (2**bits - 1) for i in range(8 // bits)], axis=-1)
    decoded = np.concatenate([np.asarray(x, np.float32) for x in keys.decoded_planes(jnp.asarray(packed), bits)], -1)
    np.testing.assert_array_equal(decoded, codes * np.asarray(stored.unit()) - np.asarray(stored.offset()))


def test_terms_add_up_to_float32() -> None:
    x = jax.random.normal(jax.random.key(0), (64, 8)) * 1000
    terms = keys.machine.split_exactly(x, keys.TERMS)
    assert all(term.dtype == jnp.bfloat16 for term in terms)
    np.testing.assert_allclose(sum(np.asarray(term, np.float64) for term in terms), x, rtol=2.0**-24)


DECLINED = {
    "at most 16 queries": DecodeSpec("q", 1, 1, 17, 64, 64, Format(16), Format(16)),
    "at least 64 slots": DecodeSpec("s", 1, 1, 4, 63, 64, Format(16), Format(16)),
    "64, 128, 192 or 256 channels": DecodeSpec("d", 1, 1, 4, 64, 96, Format(16), Format(16)),
    "uncoded slots are bfloat16": DecodeSpec("f", 1, 1, 4, 64, 64),
    "values: scales per block": DecodeSpec("v", 1, 1, 4, 64, 64, Format(8), Format(8, block=32)),
    "RotatedLoader": DecodeSpec("r", 1, 1, 4, 64, 64, Format(8, rotated=True), Format(8)),
    "slots a row": DecodeSpec("o", 1, 1, 4, 256, 64, Format(8, fold=2), Format(8)),
    "multiple of 16 bytes": DecodeSpec("a", 1, 1, 4, 65, 64, Format(8), Format(8)),
    "pages: of a multiple of 64": DecodeSpec("p", 1, 1, 4, 64, 64, Format(16), Format(16), page=32),
    "do not fit into registers": DecodeSpec("e", 1, 1, 16, 64, 128, Format(4, group=32), Format(4, group=32)),
    "do not meet": DecodeSpec("g", 1, 1, 4, 64, 64, Format(4, group=8), Format(8)),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_declines_before_it_computes(reason: str) -> None:
    args, kwargs = DECLINED[reason].abstract()
    arrays = {k: v for k, v in kwargs.items() if _is_array(v)}
    static = {k: v for k, v in kwargs.items() if k not in arrays}
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda args, arrays: pallas_gpu.run(*args, **arrays, **static), args, arrays)


def test_what_is_unproven_runs_only_when_it_is_named() -> None:
    unproven = Implementation("kernel", lambda x: x + 1, ("cpu",), unproven="numerics unproven: never run on a device")
    op = Op("op", (unproven, Implementation("xla", lambda x: x)), lambda: ((1,), {}))
    assert (op(1), op(1, implementation="kernel")) == (1, 2)
    assert [row.reason for row in op.support("cpu")] == ["numerics unproven: never run on a device", ""]
    assert unproven.declines("gpu") == "made for cpu; this process computes on gpu"


COMPILE = """
import jax
from jax.sharding import SingleDeviceSharding
from experiments.hardware_table import gpu
from pallas_kernels.decode_attention import pallas_gpu
from pallas_kernels.decode_attention.pallas_gpu import plan
from pallas_kernels.decode_attention.specs import DecodeSpec, Format
args, kwargs = {spec}.abstract()
arrays = {{k: v for k, v in kwargs.items() if any(hasattr(x, "shape") for x in jax.tree.leaves(v))}}
static = {{k: v for k, v in kwargs.items() if k not in arrays}}
on = SingleDeviceSharding(gpu.device("h100"))
given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), (args, arrays))
run = jax.jit(lambda args, arrays: pallas_gpu.run(*args, **arrays, **static))
memory = run.trace(*given).lower(lowering_platforms=("cuda",)).compile().memory_analysis()
packed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args[1:]))
made = pallas_gpu.plan.decide(*args, None, None, None)
partial = 4 * made.batch * made.heads * made.splits * made.queries * (64 * len(made.sums) + made.statistics)
assert memory.temp_size_in_bytes <= 1.1 * partial + 0.02 * packed, (memory, partial, packed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "int8", "int4_groups", "int2", "kivi4"])
def test_compiles_for_an_h100(name: str, tmp_path: Path) -> None:
    """Without spills, with bulk copies into at least two buffers for keys and for values."""
    try:
        gpu.TOOLCHAIN.versions()
    except KvjaxError as error:
        pytest.skip(str(error))
    pair = {
        "bf16": (Format(16), Format(16)),
        "int8": (Format(8), Format(8)),
        "int4_groups": (Format(4, group=32), Format(4, group=32)),
        "int2": (Format(2), Format(2)),
        "kivi4": (Format(4, block=32), Format(4, group=32)),
    }[name]
    spec = DecodeSpec(name, 4, 8, 4, 4096, 128, *pair)
    ended = process.run(
        [sys.executable, "-c", COMPILE.format(spec=spec)], tmp_path, gpu.variables(tmp_path, cycles=False), 300.0
    )
    assert ended.code == 0, ended.reason
    made = gpu.code(tmp_path)
    assert made["spill_bytes"] == 0 and made["registers"] <= 255
    assert made["bulk_copies"] >= 4 and made["barriers"] >= 5
    assert "wgmma.mma_async" in (tmp_path / "stdout").read_text()
