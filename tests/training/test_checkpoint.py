"""A checkpoint comes back bit for bit, or says which leaf does not."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.errors import CorruptDataError
from kvjax.training import checkpoint


@pytest.fixture(params=["orbax", "numpy"])
def backend(request, monkeypatch):
    if request.param == "orbax":
        pytest.importorskip("orbax.checkpoint")
    else:
        monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
        monkeypatch.setitem(sys.modules, "orbax", None)
    return request.param


def state(value: float = 0.0):
    params = {"a": jnp.linspace(0, 1, 7) + value, "b": {"c": jnp.arange(6, dtype=jnp.int32).reshape(2, 3)}}
    return {
        "params": params,
        "recent": np.asarray([0.5, np.nan]),
        "stage": np.asarray(2, np.int32),
        "opt": (jnp.ones(()),),
    }


def test_round_trip_keeps_the_newest(tmp_path, backend):
    assert checkpoint.load(tmp_path, state()) is None
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert checkpoint.steps(tmp_path) == [20, 30]
    found = checkpoint.load(tmp_path, state())
    assert found is not None and found[0] == 30
    assert jax.tree.structure(found[1]) == jax.tree.structure(state())
    for loaded, saved in zip(jax.tree.leaves(found[1]), jax.tree.leaves(state(30)), strict=True):
        assert loaded.dtype == saved.dtype and np.array_equal(loaded, saved, equal_nan=True)


def test_an_unfinished_checkpoint_is_not_one(tmp_path, backend):
    checkpoint.save(tmp_path, 10, state(1))
    (tmp_path / "step-00000020.partial").mkdir()
    found = checkpoint.load(tmp_path, state())
    assert found is not None and found[0] == 10


def test_another_models_checkpoint_is_refused(tmp_path, backend):
    checkpoint.save(tmp_path, 10, state())
    like = state()
    like["params"]["new"] = jnp.zeros(2)
    with pytest.raises(CorruptDataError, match=r"params.new is in only one of them"):
        checkpoint.load(tmp_path, like)


def test_a_flipped_bit_is_noticed_and_named(tmp_path, backend, monkeypatch):
    """Storage that silently returns other bits, as orbax does for a damaged file."""
    checkpoint.save(tmp_path, 10, state())
    read = checkpoint._read

    def damaged(*args):
        leaves = read(*args)
        bits = leaves["params.a"].copy().view(np.uint32)
        bits[3] ^= 1
        return leaves | {"params.a": bits.view(np.float32)}

    monkeypatch.setattr(checkpoint, "_read", damaged)
    with pytest.raises(CorruptDataError, match=r"leaf params\.a is not what was written"):
        checkpoint.load(tmp_path, state())


def test_a_damaged_file_never_loads_as_something_else(tmp_path, backend):
    """Flips one bit at a time in the data files: either an error that says what to do, or the same values."""
    checkpoint.save(tmp_path, 10, state())
    folder = tmp_path / "step-00000010"
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "digests.json" and p.stat().st_size]
    rng = np.random.default_rng(0)
    errors = 0
    for file in files[:12]:
        good = file.read_bytes()
        bad = bytearray(good)
        bad[int(rng.integers(len(bad)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(bad))
        try:
            found = checkpoint.load(tmp_path, state())
            assert found is not None
            for loaded, saved in zip(jax.tree.leaves(found[1]), jax.tree.leaves(state()), strict=True):
                assert np.array_equal(loaded, saved, equal_nan=True)
        except CorruptDataError as error:
            assert "delete" in str(error)
            errors += 1
        file.write_bytes(good)
    assert errors or backend == "orbax"


def test_damaged_digests_are_an_error(tmp_path, backend):
    path = checkpoint.save(tmp_path, 10, state()) / "digests.json"
    digests = json.loads(path.read_text())
    path.write_text(json.dumps(digests)[:-9])
    with pytest.raises(CorruptDataError, match=r"digests\.json"):
        checkpoint.load(tmp_path, state())
