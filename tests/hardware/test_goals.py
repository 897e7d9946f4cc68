"""What the kernels promise of their compiled form, held by the committed table."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from experiments.hardware_table import golden, report
from experiments.hardware_table.cell import cells, workload
from experiments.hardware_table.golden import Key

COMPILED = {key: row for key, row in golden.load().rows.items() if row["status"] == "ok"}
DECODING = {key: row for key, row in COMPILED.items() if key[0] in ("decode_attention", "decode_step")}

#: Most cycles per block, copies issued, in terms of the cycles that HBM needs for its bytes.
RATIO = {("v5e", "int8"): 0.5, ("v5e", "int4"): 0.8, ("v6e", "int8"): 0.7, ("v6e", "int4"): 1.0}


def rows(chosen: dict[Key, Any]) -> Any:
    return pytest.mark.parametrize("key", chosen, ids=" ".join)


def spec_of(key: Key) -> Any:
    op, spec, target = key
    return workload(next(cells((op,), (spec,), (target,)))).spec


def head_bytes(key: Key) -> int:
    """What keys or values of one head take when they are decoded to 16 bits."""
    spec = spec_of(key)
    return 2 * spec.slots * spec.head_dim


def partial_bytes(key: Key) -> int:
    """What results of parts of the slots may take: on a GPU eight for each of 132 cores, of eight queries each; and
    those of the pages of a pool, one for each query that reads them."""
    spec = spec_of(key)
    parts = 8 * 132 * 8 if key[2] == "h100" else 0
    pool = spec.cache().pool if key[0] == "decode_step" else None
    if pool is not None:
        parts = max(parts, pool.owner.size * spec.dims.query_heads // spec.dims.kv_heads)
    return 4 * parts * spec.head_dim


def chunk_bytes(key: Key) -> int:
    """What XLA decodes at once where no kernel is chosen by itself: an eighth of the slots of all heads, to 32 bits."""
    if key[0] != "decode_step" or key[2] != "h100":
        return 0
    spec = spec_of(key)
    return spec.dims.batch * spec.dims.kv_heads * 4 * spec.slots * spec.head_dim // 8 + 1


def small_bytes(key: Key) -> int:
    """What arrays of a few numbers may take: on chips of two cores six pages of 16 KiB for each."""
    return 2 * 6 * 16_384 if key[2] in ("v5p", "tpu7x") else 0


def gathered_bytes(key: Key) -> int:
    """What the scales and zeros of pages take, which are gathered: a page of them is smaller than a tile."""
    spec = spec_of(key)
    if getattr(spec, "page", None) is None:
        return 0
    leaves = [x for loader in spec.abstract()[0][1:] for x in jax.tree.leaves(loader.slots) if x.ndim == 3]
    return sum(spec.batch * spec.kv_heads * spec.slots * x.dtype.itemsize for x in leaves)


def lone_bytes(key: Key) -> int:
    """What arguments of 16 bits and a single row take, which a TPU keeps in pairs of rows."""
    leaves = jax.tree.leaves(spec_of(key).abstract())
    arrays = [x for x in leaves if getattr(x, "ndim", 0) > 1 and x.dtype.itemsize == 2 and x.shape[-2] == 1]
    return 0 if key[2] == "h100" else sum(2 * x.size for x in arrays)


@rows(COMPILED)
def test_what_is_packed_is_stored_packed(key: Key) -> None:
    """The chip's layout adds no more than the tiles of small arguments, and the second row of lone ones."""
    row = COMPILED[key]
    assert row["array_bytes"] <= row["argument_bytes"] <= 1.01 * row["array_bytes"] + lone_bytes(key)


@rows(DECODING)
def test_decoding_allocates_partial_results_and_little_else(key: Key) -> None:
    row = DECODING[key]
    known = partial_bytes(key) + small_bytes(key) + gathered_bytes(key) + 2 * row["output_bytes"]
    assert row["temporary_bytes"] <= known + 0.02 * row["argument_bytes"]


@rows(DECODING)
def test_no_array_holds_a_decoded_head(key: Key) -> None:
    largest = DECODING[key]["intermediate_bytes"]
    assert largest < max(head_bytes(key), chunk_bytes(key)) or largest <= partial_bytes(key)


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize(("target", "store"), RATIO)
def test_decoding_is_bound_by_memory(target: str, store: str, group: int) -> None:
    ratio = report.ratio(COMPILED["decode_attention", f"{store}_g{group}", target])
    assert ratio is not None and ratio <= RATIO[target, store]


@rows({key: row for key, row in COMPILED.items() if "registers" in row})
def test_kernels_for_a_gpu_copy_in_the_background_and_spill_nothing(key: Key) -> None:
    row = COMPILED[key]
    assert row["spill_bytes"] == 0
    assert row["bulk_copies"] > 0 and row["barriers"] >= 2
