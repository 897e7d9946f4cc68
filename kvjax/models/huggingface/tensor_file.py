"""The safetensors format, read and written one tensor at a time.

Layout: u64 little-endian length of the header; the header, a JSON object name -> {dtype, shape, data_offsets};
the data. Offsets count from the end of the header. Specification: the safetensors repository of Hugging Face.
Tensors are read into fresh memory, not mapped: mapped pages would count as the process's memory until the file closes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from kvjax.errors import CorruptDataError

Numpy = np.ndarray[Any, Any]

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "I64": np.dtype(np.int64),
        "I32": np.dtype(np.int32),
        "I16": np.dtype(np.int16),
        "I8": np.dtype(np.int8),
        "U64": np.dtype(np.uint64),
        "U32": np.dtype(np.uint32),
        "U16": np.dtype(np.uint16),
        "U8": np.dtype(np.uint8),
        "BOOL": np.dtype(np.bool_),
    }
)
_CODES = {dtype: code for code, dtype in DTYPES.items()}
PIECE_BYTES = 1 << 24  # read or written at once
_MAX_HEADER = 100_000_000  # the limit of the reference implementation


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies: dtype, shape, first byte in the file, number of bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFile:
    """A safetensors file whose header has been checked against the size of the file.

    Attributes:
      path: the file.
      entries: name -> `Entry`.

    Raises:
      CorruptDataError: truncated, or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = self._header(file, size)
        entries = {name: self._entry(name, info, start) for name, info in header.items() if name != "__metadata__"}
        self.entries: Mapping[str, Entry] = MappingProxyType(entries)
        self._check_layout(start, size)

    def _header(self, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise self._corrupt(f"its header should be {length} bytes, but the file has {size}")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self._corrupt(f"its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._corrupt("its header is not a JSON object")
        return header, 8 + length

    def _entry(self, name: str, info: Any, start: int) -> Entry:
        try:
            dtype = DTYPES[info["dtype"]]
            shape = tuple(int(size) for size in info["shape"])
            first, last = (int(offset) for offset in info["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._corrupt(f"the header of tensor {name!r} cannot be read ({error!r}): {info!r}") from None
        nbytes = math.prod(shape) * dtype.itemsize
        if min((first, *shape)) < 0 or last - first != nbytes:
            raise self._corrupt(
                f"tensor {name!r} has {last - first} bytes, but {info['dtype']} {list(shape)} takes {nbytes}"
            )
        return Entry(dtype, shape, start + first, nbytes)

    def _check_layout(self, start: int, size: int) -> None:
        """The tensors must fill the rest of the file without gap or overlap, as the specification asks."""
        end = start
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if entry.start != end:
                raise self._corrupt(f"tensor {name!r} starts at byte {entry.start}, the one before it ends at {end}")
            end += entry.nbytes
        if end != size:
            raise self._corrupt(f"its tensors end at byte {end}, but the file has {size}")

    def read(self, name: str) -> Numpy:
        """The tensor in its own dtype and shape, in fresh memory."""
        entry = self.entries[name]
        tensor = np.empty(entry.shape or (1,), entry.dtype)
        for start, piece in self.pieces(name):
            tensor[start : start + len(piece)] = piece
        return tensor.reshape(entry.shape)

    def pieces(self, name: str) -> Iterator[tuple[int, Numpy]]:
        """The tensor in slices of its first axis, each with its first index; a scalar is one slice of length 1.

        Only one slice lives at a time, in the same memory: use it before taking the next.
        """
        entry = self.entries[name]
        rows, *rest = entry.shape or (1,)
        row_bytes = math.prod(rest) * entry.dtype.itemsize
        count = _rows_at_once(row_bytes)
        memory = np.empty(min(count, rows) * row_bytes, np.uint8)
        with self.path.open("rb") as file:
            file.seek(entry.start)
            for start in range(0, rows, count):
                length = min(count, rows - start)
                part = memory[: length * row_bytes]
                if file.readinto(part.data) != part.nbytes:
                    raise self._corrupt(f"tensor {name!r} ends before its {entry.nbytes} bytes")
                yield start, part.view(entry.dtype).reshape(length, *rest)

    def _corrupt(self, why: str) -> CorruptDataError:
        return CorruptDataError(
            f"{self.path} is damaged, truncated or not a safetensors file: {why}. Download or export it again."
        )


def write(
    path: Path,
    headers: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    tensors: Iterable[Numpy],
) -> None:
    """Writes a safetensors file through a temporary one, so that `path` is never half a file.

    Args:
      path: the file; replaced if it exists.
      headers: name -> (dtype, shape), in the order of `tensors`.
      tensors: consumed one at a time; each must have the dtype and shape of its header.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            header = _encode_header(headers)
            file.write(len(header).to_bytes(8, "little") + header)
            for (name, (dtype, shape)), tensor in zip(headers.items(), tensors, strict=True):
                if tensor.dtype != dtype or tensor.shape != shape:
                    raise ValueError(f"{name}: {tensor.dtype} {tensor.shape} where {dtype} {shape} was announced")
                for piece in _pieces(tensor):
                    file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode_header(headers: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in headers.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return encoded + b" " * (-len(encoded) % 8)


def _pieces(tensor: Numpy) -> Iterator[memoryview]:
    """The bytes of a tensor of any strides, a few rows at a time."""
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    count = _rows_at_once(rows[:1].nbytes)
    for start in range(0, len(rows), count):
        yield np.ascontiguousarray(rows[start : start + count]).reshape(-1).view(np.uint8).data


def _rows_at_once(row_bytes: int) -> int:
    return max(1, PIECE_BYTES // max(row_bytes, 1))
