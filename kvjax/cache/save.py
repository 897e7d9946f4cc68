"""A `ModelCache` on disk: a folder with `cache.json` and one zarr 3 array per leaf.

    path/cache.json                what the cache is: format, method, dimensions, and the digest of every file
    path/arrays-<16 hex digits>/   <leaf>/zarr.json and <leaf>/c/...

`cache.json` names the folder of arrays that belongs to it, so replacing that one file replaces the whole cache: at
every moment the path holds the old cache or the new one. A folder of arrays that it does not name is what an
interrupted overwrite has left; it is ignored, and removed by the next one. The leaves are not described by the file:
they follow from the method and the dimensions, and the file has to agree.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import __version__
from kvjax.cache.array_folder import Shape, read_arrays, write_arrays
from kvjax.cache.describe import from_json, to_json
from kvjax.cache.layer_cache import Phase, blank_data
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.model_cache import ModelCache
from kvjax.errors import CorruptDataError, KvjaxError, UsageError
from kvjax.typing import Array
from pallas_kernels import rows

FORMAT, VERSION = "kvjax.cache", 2
DOCUMENT = "cache.json"
_DOCUMENT_LIMIT = 64 << 20
_EXTRA = re.compile(r"extras\.[a-z_]{1,40}")
_ARRAYS = re.compile(r"arrays-[0-9a-f]{16}")
_DTYPES = frozenset("bool int8 int16 int32 uint8 uint16 uint32 float16 bfloat16 float32".split())


def save(
    cache: ModelCache, path: str | Path, *, extras: Mapping[str, Array] | None = None, overwrite: bool = False
) -> None:
    """Writes `cache` to the folder `path`, completely or not at all.

    Args:
      extras: arrays to keep beside the cache, by name (lower-case letters and _).
      overwrite: replaces a saved cache at `path`; it stays readable until the new one is complete.

    Raises:
      UsageError: `path` exists (and is not a saved cache, or overwrite is False), the method has a part that is not
        registered, or the buffers were donated to a step.
    """
    path = Path(path)
    _check_target(path, overwrite)
    described = _describe(cache)
    leaves = _named_leaves(rows.unfold(cache)) | {f"extras.{name}": x for name, x in (extras or {}).items()}
    arrays = {name: _to_host(name, leaf) for name, leaf in leaves.items()}
    scratch = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
    scratch.mkdir(parents=True)
    try:
        folder = f"arrays-{secrets.token_hex(8)}"
        (scratch / folder).mkdir()
        index = write_arrays(scratch / folder, arrays)
        _write_document(scratch / DOCUMENT, {**described, "arrays": folder, "leaves": index})
        _publish(scratch, path, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load(path: str | Path) -> tuple[ModelCache, dict[str, Array]]:
    """Reads what `save` wrote: the cache and the extras, bit for bit.

    Raises:
      UsageError: no saved cache is there, or it needs a part or a version that this kvjax does not know.
      CorruptDataError: anything differs from what was written; names the file and the leaf.
    """
    path = Path(path)
    if not (path / DOCUMENT).is_file():
        raise UsageError(f"{path} is not a saved cache (it holds no {DOCUMENT}); give a folder that save_cache wrote")
    document = _read_document(path / DOCUMENT)
    folder, index = _contents(path, document)
    template = jax.eval_shape(rows.unfold, _template(path / DOCUMENT, document))
    expected = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in _named_leaves(template).items()}
    extras = {name: _extra_shape(path / DOCUMENT, name, index[name]) for name in index if name.startswith("extras.")}
    arrays = {name: jnp.array(x) for name, x in read_arrays(path / folder, index, expected | extras)}
    cache = jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in expected])
    return rows.fold(cache), {name.removeprefix("extras."): arrays[name] for name in extras}


def _describe(cache: ModelCache) -> dict[str, Any]:
    """All of a cache that is not an array, as JSON."""
    described = {
        "format": FORMAT,
        "version": VERSION,
        "kvjax": __version__,
        "method": to_json(cache.method),
        "layers": [to_json(layer.dims) for layer in cache.layers],
        "phase": cache.layers[0].phase,
    }
    made = _make(cache.method, [layer.dims for layer in cache.layers], cache.layers[0].phase)
    same = jax.tree.structure(made) == jax.tree.structure(cache)
    if not same or any(
        (a.shape, a.dtype) != (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(cache), strict=True)
    ):
        raise UsageError(
            "only a whole cache as ModelCache.init makes it can be saved; this one has other layers, shapes or dtypes "
            "(a sharded cache: kvjax.sharding.unshard_cache gives the whole one)"
        )
    return described


def _make(method: CacheMethod, dims: list[CacheDims], phase: Any) -> ModelCache:
    """The cache of these properties with shapes in place of arrays."""
    cache = jax.eval_shape(lambda: ModelCache.init(method, dims, data=[blank_data(method, d) for d in dims]))
    return dataclasses.replace(cache, layers=tuple(layer.in_phase(phase) for layer in cache.layers))


def _template(file: Path, document: Mapping[str, Any]) -> ModelCache:
    """What the document's method allocates for the document's dimensions."""
    try:
        method = from_json(document.get("method"), CacheMethod)
        layers = document.get("layers")
        dims = [from_json(layer, CacheDims) for layer in layers] if isinstance(layers, list) else []
    except UsageError as error:
        raise UsageError(f"{file}: {error} (written by kvjax {document.get('kvjax')!s:.20})") from error
    phase = document.get("phase")
    if phase not in get_args(Phase) or not dims or not all(_plausible(d) for d in dims):
        raise CorruptDataError(f"{file}: the phase or the dimensions of the layers are not those of a cache")
    try:
        return _make(method, dims, phase)
    except (KvjaxError, ValueError, TypeError, ArithmeticError) as error:
        raise CorruptDataError(f"{file}: its method cannot have these dimensions: {error}") from error


def _plausible(dims: CacheDims) -> bool:
    sizes = [dims.batch, dims.query_heads, dims.max_length, dims.prompt_length]
    sizes += [dims.kv_heads, dims.head_dim] if dims.convolved is None else [dims.convolved + 1, dims.width]
    return all(0 < n < 2**31 for n in sizes) and 0 <= dims.layer < 2**15 and dims.dtype in _DTYPES


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their path, such as "layers.0.body.keys.codes"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _signature(tree: Any) -> tuple[Any, list[tuple[Shape, str]]]:
    return jax.tree.structure(tree), [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree)]


def _to_host(name: str, leaf: Array) -> np.ndarray:
    if leaf.is_deleted():
        raise UsageError(
            f"the buffer of leaf {name!r} was donated to a step, so there is nothing left to save; save the cache that "
            "the step returned, or fork() it before"
        )
    if str(leaf.dtype) not in _DTYPES or not (_EXTRA.fullmatch(name) or not name.startswith("extras.")):
        raise UsageError(f"leaf {name!r} of dtype {leaf.dtype} cannot be saved (dtypes: {', '.join(sorted(_DTYPES))})")
    return np.asarray(leaf)


def _extra_shape(file: Path, name: str, entry: Any) -> tuple[Shape, str]:
    shape, dtype = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, Mapping) else (None, None)
    sizes = shape if isinstance(shape, list) and len(shape) <= 8 else [-1]
    if not all(type(n) is int and 0 <= n < 2**31 for n in sizes) or dtype not in _DTYPES or not _EXTRA.fullmatch(name):
        raise CorruptDataError(f"{file}: the entry of leaf {name[:60]!r} is malformed")
    return tuple(sizes), dtype


def _canonical(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _write_document(file: Path, document: dict[str, Any]) -> None:
    digest = hashlib.sha256(_canonical(document).encode()).hexdigest()
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(_canonical({**document, "digest": digest}))
        stream.flush()
        os.fsync(stream.fileno())


def _read_document(file: Path) -> dict[str, Any]:
    """The JSON object, known to be byte for byte what was written."""
    if file.stat().st_size > _DOCUMENT_LIMIT:
        raise CorruptDataError(f"{file}: {file.stat().st_size} bytes are too many for the description of a cache")
    try:
        text = file.read_bytes().decode()
        document = json.loads(text)
        intact = isinstance(document, dict) and _canonical(document) == text
        digest = document.pop("digest", None) if intact else None
        intact = intact and digest == hashlib.sha256(_canonical(document).encode()).hexdigest()
    except (ValueError, RecursionError):
        intact, document = False, {}
    if not intact:
        raise CorruptDataError(f"{file}: damaged (its digest does not match). Restore it, or make the cache again.")
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        raise UsageError(
            f"{file} is {str(document.get('format'))[:40]!r} version {str(document.get('version'))[:20]}, written by "
            f"kvjax {document.get('kvjax')!s:.20}; kvjax {__version__} reads {FORMAT!r} version {VERSION}. "
            "Use the version that wrote it, or make the cache again."
        )
    return document


def _contents(path: Path, document: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the folder of arrays, and the index of what it holds."""
    folder, index = document.get("arrays"), document.get("leaves")
    if not isinstance(folder, str) or not _ARRAYS.fullmatch(folder) or not isinstance(index, dict):
        raise CorruptDataError(f"{path / DOCUMENT}: the names of the arrays are malformed")
    for entry in path.iterdir():
        if entry.name != DOCUMENT and not (_ARRAYS.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink()):
            raise CorruptDataError(f"{entry}: does not belong to a saved cache; remove it")
    if not (path / folder).is_dir():
        raise CorruptDataError(f"{path / folder}: missing, and with it every leaf of the cache")
    return folder, index


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / DOCUMENT).is_file():
        raise UsageError(f"{path} exists and is not a saved cache; give a path of its own")
    if not overwrite:
        raise UsageError(f"{path} holds a saved cache; pass overwrite=True to replace it, or give another path")


def _publish(scratch: Path, path: Path, folder: str) -> None:
    """Moves a complete cache to its place: by one rename, or by replacing the one file that names the arrays."""
    if not (path / DOCUMENT).exists():
        try:
            scratch.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise UsageError(f"{path} was written by someone else in the meantime; give another path") from error
        _sync(path.parent)
        return
    (scratch / folder).rename(path / folder)
    _sync(path)
    (scratch / DOCUMENT).replace(path / DOCUMENT)
    _sync(path)
    for other in path.iterdir():
        if _ARRAYS.fullmatch(other.name) and other.name != folder:
            shutil.rmtree(other, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Makes the folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
