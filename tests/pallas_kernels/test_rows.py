"""Folded rows hold the same slots as plain ones, wherever they are written, cut or read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rows import LANES, Rows, fold, fold_for, tile, unfold

FOLDS = pytest.mark.parametrize("parts", [1, 2, 8])


def numbers(slots: int, width: int = 16) -> np.ndarray:
    return np.random.default_rng(slots).integers(0, 256, (2, 3, slots, width)).astype(np.uint8)


@FOLDS
def test_natural_order_survives(parts: int) -> None:
    x = numbers(2048)
    rows = Rows.of(jnp.asarray(x), parts)
    assert rows.data.shape == (2, 3, 2048 // parts, 16 * parts) and (rows.slots, rows.fold) == (2048, parts)
    np.testing.assert_array_equal(rows.natural(), x)
    for other in (1, 2, 4):
        np.testing.assert_array_equal(rows.folded(other).natural(), x)


def test_where_a_slot_lies() -> None:
    """Slot j · 128 + r of a tile is part j of the tile's row r."""
    x = numbers(1024)
    data = np.asarray(Rows.of(jnp.asarray(x), 4).data)
    for slot in (0, 127, 128, 511, 512, 700, 1023):
        tiles, within = divmod(slot, 4 * LANES)
        part, row = divmod(within, LANES)
        np.testing.assert_array_equal(data[:, :, tiles * LANES + row, part * 16 : (part + 1) * 16], x[:, :, slot])


@FOLDS
def test_put_and_prefix(parts: int) -> None:
    x, fresh = numbers(2048), numbers(40)
    rng = np.random.default_rng(0)
    slot = np.stack([rng.permutation(2048)[:40] for _ in range(6)]).reshape(2, 3, 40).astype(np.int32)
    slot[1, 1, ::2] += 4096  # beyond the last: left out
    want = x.copy()
    for b, k, i in np.ndindex(2, 3, 40):
        if slot[b, k, i] < 2048:
            want[b, k, slot[b, k, i]] = fresh[b, k, i]
    rows = Rows.of(jnp.asarray(x), parts)
    np.testing.assert_array_equal(jax.jit(Rows.put)(rows, slot, fresh).natural(), want)

    first = np.asarray(jax.jit(Rows.prefix)(rows, fresh).natural())
    np.testing.assert_array_equal(first[:, :, :40], fresh)
    rest = -(-40 // tile(parts)) * tile(parts)
    assert not first[:, :, 40:rest].any()
    np.testing.assert_array_equal(first[:, :, rest:], x[:, :, rest:])


@FOLDS
def test_whole_tiles_are_cut_along_the_rows(parts: int) -> None:
    x = numbers(4096)
    rows, size = Rows.of(jnp.asarray(x), parts), tile(8)
    cut = Rows(rows.data[:, :, size // parts : 3 * size // parts], 16)
    np.testing.assert_array_equal(cut.natural(), x[:, :, size : 3 * size])


def test_folds_fill_lanes_or_stay_plain() -> None:
    assert [fold_for(width, 4096, "tpu") for width in (16, 64, 128, 256, 96)] == [8, 2, 1, 1, 1]
    assert fold_for(64, 4096 + 128, "tpu") == 1 and fold_for(64, 4096, "cpu") == fold_for(64, 4096, "gpu") == 1
    tree = {"codes": Rows.of(jnp.asarray(numbers(1024))), "scale": jnp.ones((2, 3, 1024))}
    folded = fold(tree, "tpu")
    assert folded["codes"].fold == 8
    again = unfold(folded)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
