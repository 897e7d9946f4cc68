"""From the tensors of a checkpoint to the parameter tree, with every disagreement found before anything is read."""

from __future__ import annotations

import math
import re
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from kvjax.errors import CorruptDataError, UsageError, nearest
from kvjax.models.config import TransformerConfig
from kvjax.models.huggingface.checkpoint import Checkpoint
from kvjax.models.huggingface.weights import Weight, weights
from kvjax.typing import Array, PyTree

_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"
# Where the text model sits among the tensors: on its own, or inside a multimodal checkpoint of transformers 4 or 5.
_BODIES = {
    "model.": "lm_head.",
    "language_model.model.": "language_model.lm_head.",
    "model.language_model.": "lm_head.",
}
# Buffers of old checkpoints that can be computed, and the vision half of multimodal ones.
_UNREAD = re.compile(r"(.*\.rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector)\..*)")


def read_params(config: TransformerConfig, checkpoint: Checkpoint, dtype: np.dtype[Any]) -> PyTree:
    """The parameter tree of `Transformer(config)`, one tensor at a time.

    Beside the parameters, host memory holds one piece of one tensor (and a second copy of one, on an accelerator).

    Raises:
      CorruptDataError: a missing, unexpected, mis-shaped or quantised tensor.
      UsageError: a value that `dtype` cannot hold.
    """
    body = _find_body(checkpoint)
    names = {weight.path: _stored_name(weight.name, body) for weight in weights(config)}
    for weight in weights(config):
        check_tensor(weight, names[weight.path], checkpoint)
    _check_surplus(set(names.values()), body, checkpoint, config)
    params = {weight.path: read_tensor(weight, names[weight.path], checkpoint, dtype) for weight in weights(config)}
    return flax.traverse_util.unflatten_dict(params)


def _find_body(checkpoint: Checkpoint) -> str:
    """The prefix under which the embedding is found, and with it the rest of the text model."""
    for body in _BODIES:
        if body + _EMBEDDING in checkpoint:
            return body
    wanted = f"model.{_EMBEDDING}"
    raise CorruptDataError(f"{checkpoint.folder}: the tensor {wanted!r} is missing. {nearest(wanted, checkpoint)}")


def _stored_name(name: str, body: str) -> str:
    if name == _HEAD:
        return f"{_BODIES[body]}weight"
    return body + name.removeprefix("model.")


def check_tensor(weight: Weight, name: str, checkpoint: Checkpoint, *, whole: bool = False) -> None:
    """The tensor is there, with the right shape, and holds numbers: whole ones, or ones with a point.

    Raises:
      CorruptDataError: it is not, naming the tensor.
    """
    shape = list(weight.stored_shape)
    if name not in checkpoint:
        fix = "the checkpoint is incomplete, or config.json belongs to another model"
        if weight.name == _HEAD:
            fix = "set tie_word_embeddings to true if the embedding is the head"
        raise CorruptDataError(f"{checkpoint.folder}: the tensor {name!r} {shape} is missing; {fix}.")
    path, entry = checkpoint.files[name].path, checkpoint.entry(name)
    if list(entry.shape) != shape:
        raise CorruptDataError(
            f"{path}: the tensor {name!r} has the shape {list(entry.shape)}, but config.json asks for {shape}; "
            "correct config.json, or use the weights that belong to it."
        )
    if whole and entry.dtype.kind not in "iub":
        raise CorruptDataError(
            f"{path}: the tensor {name!r} holds {entry.dtype}, but the model has whole numbers there."
        )
    if not whole and entry.dtype.kind in "iub":
        raise CorruptDataError(
            f"{path}: the tensor {name!r} holds {entry.dtype} codes; quantised checkpoints are not read. "
            "Use the unquantised one."
        )


def _check_surplus(wanted: set[str], body: str, checkpoint: Checkpoint, config: TransformerConfig) -> None:
    """Nothing is left over that the model would have used."""
    head = _stored_name(_HEAD, body)
    for name in checkpoint:
        if name in wanted or _UNREAD.fullmatch(name):
            continue
        if name == head and config.tied_embeddings:
            _check_tied(head, body + _EMBEDDING, checkpoint)
            continue
        raise CorruptDataError(
            f"{checkpoint.files[name].path}: the tensor {name!r} {list(checkpoint.entry(name).shape)} has no place "
            "in the model of config.json, so the logits would be wrong; correct config.json."
        )


def _check_tied(head: str, embedding: str, checkpoint: Checkpoint) -> None:
    """A stored head is accepted beside tied embeddings only where both are the same numbers."""
    if not np.array_equal(checkpoint.files[head].read(head), checkpoint.files[embedding].read(embedding)):
        raise CorruptDataError(
            f"{checkpoint.files[head].path}: {head!r} differs from {embedding!r}, but config.json ties them; "
            "set tie_word_embeddings to false."
        )


def read_tensor(weight: Weight, name: str, checkpoint: Checkpoint, dtype: np.dtype[Any]) -> Array:
    """One parameter, read and laid out piece by piece in the memory that the device array then takes over."""
    value = _aligned(weight.shape, dtype)
    for start, piece in checkpoint.files[name].pieces(name):
        with np.errstate(over="ignore"):  # an overflow is an error with a name, just below
            target = weight.put(value, start, piece)
        if dtype == np.float16 and not np.isfinite(target).all() and np.isfinite(piece).all():
            raise UsageError(f"{name!r} holds values beyond float16's 65504; load with dtype=bfloat16 or float32.")
    # Waiting keeps at most one tensor on its way: transfers are asynchronous and hold their source until they end.
    return jax.block_until_ready(jax.device_put(value))


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Uninitialised memory at a multiple of 64 bytes, which a CPU device uses as it is instead of copying it."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)
