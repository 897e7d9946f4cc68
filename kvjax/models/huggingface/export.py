"""`export`: a `LanguageModel` as a Hugging Face folder, one that transformers loads wherever it has such a model."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax.errors import UsageError, writing
from kvjax.models.huggingface import tensor_file
from kvjax.models.huggingface.checkpoint import INDEX, SINGLE
from kvjax.models.huggingface.config import write_config
from kvjax.models.huggingface.own import own_weights, write_own_config
from kvjax.models.huggingface.weights import Path as ParamPath
from kvjax.models.huggingface.weights import Weight, flatten, weights
from kvjax.models.language_model import LanguageModel
from kvjax.models.tokenizer import Tokenizer, save_tokenizer, write_json
from kvjax.typing import Array

Params = dict[ParamPath, Array]
Parts = tuple[Weight, ...]  # the parameters that share a tensor


def export(model: LanguageModel, folder: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> Path:
    """Writes config.json, the weights, the tokenizer and generation_config.json, completely or not at all.

    A model that one of the families of transformers computes is written as that family; any other (a variant of
    attention, layers that share keys and values) as model_type "kvjax", which kvjax alone loads.

    Args:
      model: any.
      folder: must not exist, or be empty, so that nothing stale stays beside the new files.
      max_shard_bytes: weights beyond this size are split into several files with an index.

    Returns:
      The folder.

    Raises:
      UsageError: the folder is not empty, the kind of attention is not registered, a parameter has the wrong shape, or
        the folder cannot be written.
    """
    path = as_empty_folder(folder)
    config, wanted = _described(model)
    params = flatten(model.params)
    _check_params(wanted, params)
    special = _special_ids(model.tokenizer)
    with writing(path), _nothing_or_all(path):
        write_json(path / "generation_config.json", {"_from_model_config": True} | special)
        save_tokenizer(model.tokenizer, path)
        _write_weights(path, wanted, params, max_shard_bytes)
        write_json(path / "config.json", config | special)  # last: without it nothing is a model's folder
    return path


def as_empty_folder(folder: str | Path) -> Path:
    """The folder as a path. Raises UsageError unless it is empty or missing."""
    path = Path(folder).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} is not an empty folder; choose another, or empty it first.")
    return path


def _described(model: LanguageModel) -> tuple[dict[str, Any], Sequence[Weight]]:
    """config.json and the tensors, of a family of transformers where one computes the same."""
    dtype = np.dtype(model.dtype).name
    with contextlib.suppress(UsageError):  # no family computes it
        return write_config(model.config, dtype), weights(model.config)
    return write_own_config(model.config, dtype), own_weights(model.config)


@contextlib.contextmanager
def _nothing_or_all(path: Path) -> Iterator[None]:
    """An empty folder, made where there is none; what was written is removed again if something fails."""
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for file in path.iterdir():
            file.unlink()
        if made:
            shutil.rmtree(path, ignore_errors=True)
        raise


def _check_params(wanted: Sequence[Weight], params: Params) -> None:
    surplus = params.keys() - {weight.path for weight in wanted}
    if surplus:
        raise UsageError(f"the parameters {sorted('/'.join(path) for path in surplus)} are not in the config's model.")
    for weight in wanted:
        shape = params[weight.path].shape if weight.path in params else None
        if shape != weight.shape:
            raise UsageError(
                f"the parameter {'/'.join(weight.path)} has the shape {shape}, the config asks for {weight.shape}."
            )


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """bos, eos and pad for config.json, as far as they are known."""
    stop = list(tokenizer.stop_ids)
    found: dict[str, Any] = {"eos_token_id": stop[0] if len(stop) == 1 else stop or None}
    if tokenizer.backend is not None:
        found |= {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    return {key: found.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _write_weights(folder: Path, wanted: Sequence[Weight], params: Params, max_shard_bytes: int) -> None:
    shards = list(_shards(wanted, params, max_shard_bytes))
    total = len(shards)
    names = (
        [f"model-{index:05d}-of-{total:05d}.safetensors" for index in range(1, total + 1)] if total > 1 else [SINGLE]
    )
    for name, shard in zip(names, shards, strict=True):
        headers = {parts[0].name: (params[parts[0].path].dtype, parts[0].stored_shape) for parts in shard}
        tensor_file.write(folder / name, headers, _tensors(shard, params))
    if total > 1:
        weight_map = {parts[0].name: name for name, shard in zip(names, shards, strict=True) for parts in shard}
        size = sum(_nbytes(weight, params) for weight in wanted)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _tensors(shard: Sequence[Parts], params: Params) -> Iterator[np.ndarray[Any, Any]]:
    for parts in shard:
        tensor = None
        for weight in parts:
            tensor = weight.give(np.asarray(jax.device_get(params[weight.path])), tensor)
        assert tensor is not None
        yield tensor


def _shards(wanted: Sequence[Weight], params: Params, max_shard_bytes: int) -> Iterator[Sequence[Parts]]:
    """Consecutive tensors whose bytes stay below the limit; a single larger one is a shard of its own."""
    shard: list[Parts] = []
    size = 0
    for _, found in itertools.groupby(wanted, key=lambda weight: weight.name):
        parts = tuple(found)
        nbytes = sum(_nbytes(weight, params) for weight in parts)
        if shard and size + nbytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(parts)
        size += nbytes
    yield shard


def _nbytes(weight: Weight, params: Params) -> int:
    return math.prod(weight.shape) * params[weight.path].dtype.itemsize
