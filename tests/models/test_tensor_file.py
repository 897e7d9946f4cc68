"""The safetensors reader and writer against the `safetensors` library, and against damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from kvjax.errors import CorruptDataError
from kvjax.models.huggingface import tensor_file
from kvjax.models.huggingface.tensor_file import DTYPES, TensorFile, write

BITS = np.random.default_rng(0).integers(0, 256, 24, dtype=np.uint8)


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_every_dtype_survives_bit_for_bit(tmp_path: Path, code: str) -> None:
    dtype = DTYPES[code]
    x = (BITS % 2 if code == "BOOL" else BITS).view(dtype).reshape(3, -1)
    write(tmp_path / "x.safetensors", {"x": (dtype, x.shape)}, [x])
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as theirs:
        assert theirs.metadata() == {"format": "pt"}
        assert theirs.get_slice("x").get_dtype() == code and theirs.get_slice("x").get_shape() == list(x.shape)
    again = TensorFile(tmp_path / "x.safetensors").read("x")
    assert again.dtype == dtype and again.tobytes() == x.tobytes()


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    tensors = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.float16([[1.5]]),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "note": "ü"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert set(file.entries) == set(tensors)
    for name, expected in tensors.items():
        np.testing.assert_array_equal(file.read(name), expected)


def test_files_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = {"b": np.arange(5, dtype=np.int16), "a": np.ones((2, 2), np.float32).T, "e": np.zeros((3, 0), np.float32)}
    write(tmp_path / "x.safetensors", {name: (x.dtype, x.shape) for name, x in tensors.items()}, iter(tensors.values()))
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        np.testing.assert_array_equal(found[name], expected)


@pytest.mark.parametrize("piece_bytes", [1, 7, 40, 1000])
def test_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", piece_bytes)
    tensors = {"x": np.arange(7 * 3 * 2, dtype=np.float32).reshape(7, 3, 2), "s": np.array(3.0, np.float32)}
    tensors["t"] = tensors["x"].T
    write(tmp_path / "x.safetensors", {name: (x.dtype, x.shape) for name, x in tensors.items()}, tensors.values())
    theirs, ours = safetensors.numpy.load_file(tmp_path / "x.safetensors"), TensorFile(tmp_path / "x.safetensors")
    for name, expected in tensors.items():
        np.testing.assert_array_equal(theirs[name], expected)
        np.testing.assert_array_equal(ours.read(name), expected)
    assert all(piece.nbytes <= max(piece_bytes, 24) for _, piece in ours.pieces("x"))


@pytest.mark.parametrize("x", [np.ones(3, np.float32), np.ones(4, np.float64)], ids=["shape", "dtype"])
def test_a_tensor_that_breaks_its_announcement_leaves_no_file(tmp_path: Path, x: np.ndarray) -> None:
    with pytest.raises(ValueError, match="was announced"):
        write(tmp_path / "x.safetensors", {"x": (np.dtype(np.float32), (4,))}, [x])
    assert not list(tmp_path.iterdir())


def small_file(tmp_path: Path) -> bytes:
    tensors = {"w": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3), "b": np.ones(3, np.float32)}
    write(tmp_path / "ok.safetensors", {name: (x.dtype, x.shape) for name, x in tensors.items()}, tensors.values())
    return (tmp_path / "ok.safetensors").read_bytes()


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = small_file(tmp_path)
    for length in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(CorruptDataError, match=r"cut\.safetensors is damaged, truncated"):
            TensorFile(tmp_path / "cut.safetensors")


def with_header(header: Any, data: bytes = b"\0" * 12) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (3,), offsets: Any = (0, 12)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_header({"x": entry()}, b"\0" * 13), "end at byte .* but the file has"),
        (with_header({"x": entry(shape=(4,))}), r"'x' has 12 bytes, but F32 \[4\] takes 16"),
        (with_header({"x": entry(dtype="F33")}), "header of tensor 'x' cannot be read"),
        (with_header({"x": entry(shape=(-3, -1))}), "'x' has 12 bytes"),
        (with_header({"x": entry(offsets=(4, 16))}), "'x' starts at byte"),
        (with_header({"x": entry(), "y": entry()}), "'y' starts at byte|'x' starts at byte"),
        (with_header({"x": 3}), "header of tensor 'x' cannot be read"),
        (with_header([]), "not a JSON object"),
        (with_header(b"\xff\xfe{"), "not JSON"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "header should be"),
        (b"", "header should be"),
    ],
)
def test_damaged_headers_say_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CorruptDataError, match=message):
        TensorFile(tmp_path / "x.safetensors")


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path: Path) -> None:
    whole = small_file(tmp_path)
    file = TensorFile(tmp_path / "ok.safetensors")
    (tmp_path / "ok.safetensors").write_bytes(whole[:-1])
    with pytest.raises(CorruptDataError, match="'b' ends before its 12 bytes"):
        file.read("b")


@given(data=st.data())
def test_any_flipped_header_byte_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Never another exception, and never a read outside the file."""
    folder = tmp_path_factory.mktemp("flip")
    content = bytearray(small_file(folder))
    header = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    (folder / "x.safetensors").write_bytes(content)
    try:
        file = TensorFile(folder / "x.safetensors")
    except CorruptDataError:
        return
    for name, found in file.entries.items():
        assert file.read(name).nbytes == found.nbytes
