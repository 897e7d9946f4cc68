"""Arrays on disk: one zarr 3 array (tensorstore, crc32c) per name, and a digest per file.

A folder of arrays is described by an *index*: name -> {"shape", "dtype", "files": {path: SHA-256}}. What is read is
first compared with the index, file by file, and the index with what the caller expects, so that nothing is allocated
for a claim that the bytes on disk do not back.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from kvjax.errors import CorruptDataError

CHUNK_BYTES = 64 << 20
_CHECKSUM_BYTES = 4
_HEADER_LIMIT = 1 << 16
Shape = tuple[int, ...]
Index = dict[str, dict[str, Any]]


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> Index:
    """Writes every array below `folder` (which must not hold them yet) and returns the index.

    Names become folder names: give plain ones.
    """
    opened = {name: ts.open(_spec(folder / name, x.shape, str(x.dtype)), create=True) for name, x in arrays.items()}
    written = [opened[name].result().write(x) for name, x in arrays.items()]
    for future in written:
        future.result()
    return {
        name: {
            "shape": list(x.shape),
            "dtype": str(x.dtype),
            "files": {file: _digest(folder / name / file) for file in _file_sizes(x.shape, str(x.dtype))},
        }
        for name, x in arrays.items()
    }


def read_arrays(
    folder: Path, index: Mapping[str, Any], expected: Mapping[str, tuple[Shape, str]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the arrays `expected` (name -> shape, dtype) of a folder that `write_arrays` filled, one by one.

    Raises:
      CorruptDataError: the index, the files or their contents are not exactly what they must be; nothing has been
        allocated unless all of them are.
    """
    _compare_names("the index", index.keys(), expected.keys(), folder)
    for name, (shape, dtype) in expected.items():
        _check_entry(folder, name, index[name], shape, dtype)
    _check_files(folder, expected)
    for name, entry in index.items():
        for file, digest in entry["files"].items():
            if _digest(folder / name / file) != digest:
                raise CorruptDataError(
                    f"{folder / name / file}: the bytes are not those that were written (SHA-256 differs), so array "
                    f"{name!r} is damaged. Restore the folder from a copy, or make the cache again."
                )
    for name, (shape, dtype) in expected.items():
        yield name, _read(folder / name, shape, dtype)


def _read(folder: Path, shape: Shape, dtype: str) -> np.ndarray:
    try:
        return np.asarray(ts.open(_spec(folder, shape, dtype), open=True).result().read().result())
    except ValueError as error:
        raise CorruptDataError(f"{folder}: array {folder.name!r} cannot be read: {error}") from error


def _check_entry(folder: Path, name: str, entry: Any, shape: Shape, dtype: str) -> None:
    """Compares what the index says of one array with what it must be."""
    if not isinstance(entry, Mapping) or entry.keys() != {"shape", "dtype", "files"}:
        raise CorruptDataError(f"{folder}: the index entry of array {name!r} is malformed")
    if entry["shape"] != list(shape) or entry["dtype"] != dtype:
        raise CorruptDataError(
            f"{folder / name}: array {name!r} is declared as {str(entry['dtype'])[:40]} {str(entry['shape'])[:80]}, "
            f"but this method allocates {dtype} {list(shape)}. Another version wrote the folder, or it is damaged."
        )
    files = entry["files"]
    if not isinstance(files, Mapping) or len(files) != _file_count(shape, dtype):
        raise CorruptDataError(f"{folder / name}: array {name!r} lists other files than its shape {list(shape)} has")
    _compare_names(f"array {name!r}", files.keys(), _file_sizes(shape, dtype).keys(), folder / name)


def _check_files(folder: Path, expected: Mapping[str, tuple[Shape, str]]) -> None:
    """The folder holds exactly the files of the arrays, each of its exact size, and no link or other special file."""
    wanted = {f"{name}/{file}": (name, size) for name, x in expected.items() for file, size in _file_sizes(*x).items()}
    found = dict(_walk(folder))
    _compare_names("the folder", found.keys(), wanted.keys(), folder)
    for file, (name, size) in wanted.items():
        if found[file] > _HEADER_LIMIT if size is None else found[file] != size:
            raise CorruptDataError(
                f"{folder / file}: {found[file]} bytes instead of {size or 'a few hundred'}, so array {name!r} is "
                f"truncated or overwritten. Restore the folder from a copy, or make the cache again."
            )


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    """Relative path and size of every file; links are not followed."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            mode = path.lstat()
            if stat.S_ISREG(mode.st_mode):
                yield path.relative_to(folder).as_posix(), mode.st_size
            elif not stat.S_ISDIR(mode.st_mode):
                raise CorruptDataError(f"{path}: neither a file nor a folder; a saved cache holds no links")


def _compare_names(what: str, found: Any, wanted: Any, folder: Path) -> None:
    if missing := sorted(wanted - found):
        raise CorruptDataError(f"{folder}: {what} lacks {missing[0]!r}; the cache is incomplete")
    if extra := sorted(found - wanted):
        raise CorruptDataError(f"{folder}: {what} holds {extra[0][:80]!r}, which does not belong to this cache")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _chunk_shape(shape: Shape, dtype: str) -> Shape:
    """At most CHUNK_BYTES: leading axes are cut first, so that a chunk stays one run of memory."""
    chunk = [max(1, n) for n in shape]
    for axis, n in enumerate(chunk):
        size = math.prod(chunk) * jnp.dtype(dtype).itemsize
        chunk[axis] = max(1, n * CHUNK_BYTES // size) if size > CHUNK_BYTES else n
    return tuple(chunk)


def _grid(shape: Shape, dtype: str) -> Shape:
    return tuple(-(-n // c) for n, c in zip(shape, _chunk_shape(shape, dtype), strict=True))


def _file_count(shape: Shape, dtype: str) -> int:
    return 1 + math.prod(_grid(shape, dtype))


def _file_sizes(shape: Shape, dtype: str) -> dict[str, int | None]:
    """Every file of an array, relative to its folder, and its size in bytes (None for the header)."""
    chunk = math.prod(_chunk_shape(shape, dtype)) * jnp.dtype(dtype).itemsize + _CHECKSUM_BYTES
    places = itertools.product(*map(range, _grid(shape, dtype)))
    return {"zarr.json": None} | {"/".join(("c", *map(str, place))): chunk for place in places}


def _metadata(shape: Shape, dtype: str) -> dict[str, Any]:
    """What zarr.json must say; opening fails where it says anything else."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(_chunk_shape(shape, dtype))}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }


def _spec(folder: Path, shape: Shape, dtype: str) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(folder)},
        "metadata": _metadata(shape, dtype),
        "store_data_equal_to_fill_value": True,
    }
