"""`Calibrated`: a method with what it has learnt of one model, as a value and as a file.

The file is one safetensors file: the arrays of each layer, and in its metadata the method (JSON), the digest of the
weights that it belongs to, and a digest of the file's own content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import secrets
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from kvjax.cache.describe import from_json, to_json
from kvjax.cache.layer_cache import LayerData
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.errors import CorruptDataError, UsageError, writing
from kvjax.models.language_model import LanguageModel

FORMAT, VERSION = "kvjax.calibration", "1"
SUFFIX = ".safetensors"
PARTS = ("keys", "values", "policy")
Data = tuple[LayerData, ...]
"""Of each layer: what a compiled program takes as an argument."""

_NAME = re.compile(rf"layers\.(\d{{1,5}})\.({'|'.join(PARTS)})\.([a-z_]{{1,40}})")
_digests: weakref.WeakKeyDictionary[LanguageModel, str] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class Calibrated:
    """Stands wherever a method does, for the model that it was made with.

    Attributes:
      method: with the tables and shares that were found.
      layers: per layer the arrays that codecs and policy have learnt: dicts of f32 arrays [1, K or 1, ...], or None.
      model_digest: `weights_digest` of the model.
      notes: what was found, in words.
    """

    method: CacheMethod
    layers: tuple[LayerData, ...]
    model_digest: str
    notes: tuple[str, ...] = ()

    def check(self, model: LanguageModel) -> None:
        """Raises UsageError where `model` has other weights."""
        found = weights_digest(model)
        if found != self.model_digest:
            raise UsageError(
                f"method {self.method.name!r} was calibrated to other weights (digest {self.model_digest[:12]}) than "
                f"those of model {model.name!r} ({found[:12]}). Calibrate it to this model: kvjax calibrate. (The same "
                "weights in another dtype are other weights: load the model as it was loaded for calibration.)"
            )

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, completely or not at all. A calibration that is there is replaced.

        Raises:
          UsageError: the name does not end with .safetensors, another file is there, or it cannot be written.
        """
        path = Path(path)
        if path.suffix != SUFFIX:
            raise UsageError(f"a calibration is a file whose name ends with {SUFFIX}; got {path.name!r}")
        arrays = {
            f"layers.{index}.{part}.{name}": np.ascontiguousarray(array)
            for index, layer in enumerate(self.layers)
            for part in PARTS
            for name, array in (getattr(layer, part) or {}).items()
        }
        described = {"method": to_json(self.method), "layers": len(self.layers), "notes": self.notes}
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "calibration": json.dumps(described),
            "model": self.model_digest,
        }
        metadata["content"] = _content_digest(metadata, arrays)
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        with writing(path):
            if path.exists() and not _is_calibration(path):
                raise UsageError(f"{path} is there and is no calibration, so it is left alone; choose another name")
            try:
                scratch.write_bytes(safetensors.numpy.save(arrays, metadata))
                scratch.replace(path)
            finally:
                scratch.unlink(missing_ok=True)


def load_calibration(path: str | Path) -> Calibrated:
    """What `Calibrated.save` wrote, bit for bit.

    Raises:
      UsageError: there is no such file, it is no calibration, or of a version that this kvjax does not know.
      CorruptDataError: its content is not what was written.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no file {path}; `kvjax calibrate --out {path}` makes one")
    metadata, arrays = _read(path)
    if metadata.get("format") != FORMAT:
        raise UsageError(f"{path} is a safetensors file, but no calibration; `kvjax calibrate` makes one")
    if metadata.get("version") != VERSION:
        raise UsageError(f"{path} has version {metadata.get('version')!r:.20}; this kvjax reads version {VERSION}")
    if metadata.pop("content", None) != _content_digest(metadata, arrays):
        raise CorruptDataError(f"{path} is damaged: its content is not what was written. Calibrate again.")
    try:
        described = json.loads(metadata["calibration"])
        layers: list[dict[str, dict[str, NDArray[Any]]]] = [{} for _ in range(int(described["layers"]))]
        for name, array in arrays.items():
            index, part, leaf = _parse(name)
            layers[index].setdefault(part, {})[leaf] = array
        method, notes = from_json(described["method"], CacheMethod), tuple(map(str, described["notes"]))
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise CorruptDataError(f"{path} does not hold what a calibration does: {error}") from error
    return Calibrated(method, tuple(LayerData(**layer) for layer in layers), metadata["model"], notes)


def weights_digest(model: LanguageModel) -> str:
    """SHA-256 of the parameters' names, dtypes, shapes and bytes, in hex; where they lie does not matter."""
    if model not in _digests:
        digest = hashlib.sha256()
        leaves, _ = jax.tree.flatten_with_path(model.params)
        for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
            _add(digest, path, np.asarray(leaf))
        _digests[model] = digest.hexdigest()
    return _digests[model]


def unpack(
    method: CacheMethod | Calibrated, model: LanguageModel, dims: tuple[CacheDims, ...]
) -> tuple[CacheMethod, Data | None]:
    """The method, and the data that its caches are made with.

    Raises:
      UsageError: it was calibrated to other weights, or would have to be calibrated and is not.
    """
    if isinstance(method, Calibrated):
        method.check(model)
        return method.method, method.layers
    if any(method.for_layer(layer).calibrated for layer in dims):
        raise UsageError(
            f"method {method.name!r} has to be calibrated to the model first: kvjax calibrate --method {method.name} "
            f"--text FILE --out NAME{SUFFIX}, or kvjax.calibrate(model, {method.name!r}, text). Then give the file's "
            "path, or what kvjax.calibrate returned, in place of the method's name."
        )
    return method, None


def own_buffers(data: Data | None) -> Data | None:
    """The data in buffers of their own, for caches are donated to the steps that follow."""
    return jax.tree.map(jnp.copy, data)


def _read(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CorruptDataError(f"{path} is no safetensors file, or a damaged one: {error}") from error


def _is_calibration(path: Path) -> bool:
    try:
        return _read(path)[0].get("format") == FORMAT
    except CorruptDataError:
        return False


def _parse(name: str) -> tuple[int, str, str]:
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"an array is called {name!r:.60}")
    return int(found[1]), found[2], found[3]


def _content_digest(metadata: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(arrays):
        _add(digest, name, arrays[name])
    return digest.hexdigest()


def _add(digest: Any, name: str, array: NDArray[Any]) -> None:
    digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
