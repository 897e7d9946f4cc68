"""The family "kvjax": models that no family of transformers computes, such as those with other kinds of attention.

config.json holds the fields of `TransformerConfig` under "model", each part by its class name (`kvjax.describe`), and
the tensors are the parameter tree: paths joined by dots, axes and dtypes as they are. A file can name what this kvjax
has, and nothing else; nothing in it is executed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kvjax import attention, describe
from kvjax.attention import rope
from kvjax.errors import CorruptDataError, UsageError, nearest
from kvjax.models.config import TransformerConfig
from kvjax.models.embedding import DrawnEmbedding
from kvjax.models.huggingface.checkpoint import Checkpoint
from kvjax.models.huggingface.families import HARMLESS, Json
from kvjax.models.huggingface.params import check_tensor, read_tensor
from kvjax.models.huggingface.weights import Numpy, Path, Weight, flatten, in_order
from kvjax.models.transformer import Transformer
from kvjax.typing import PyTree

Part = TypeVar("Part")
MODEL_TYPE, FORMAT = "kvjax", 1
_MODEL = "model"
_FIELDS = frozenset({"model_type", "format", _MODEL}) | HARMLESS


def _exported() -> dict[str, type]:
    """The config and what it can be made of: all that `kvjax.attention` exports, and rules of rotary embedding."""
    members = [*(getattr(attention, name) for name in attention.__all__), *vars(rope).values()]
    parts = (x for x in members if isinstance(x, type) and dataclasses.is_dataclass(x) and not inspect.isabstract(x))
    plain = (x for x in parts if not issubclass(x, nn.Module) and x.__module__.startswith("kvjax.attention."))
    return {cls.__name__: cls for cls in (TransformerConfig, DrawnEmbedding, *plain)}


PARTS: dict[str, type] = _exported()


def register(cls: type[Part]) -> type[Part]:
    """Makes a kind of attention of your own (a frozen dataclass) one that folders can name; usable as a decorator.

    Raises:
      UsageError: another class has the name.
    """
    return describe.register(cls, PARTS)


@dataclasses.dataclass(frozen=True)
class OwnWeight(Weight):
    """One parameter, stored as it is."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape

    def as_stored(self, value: Numpy) -> Numpy:
        return value


@functools.lru_cache(maxsize=8)
def _shapes(config: TransformerConfig) -> dict[Path, jax.ShapeDtypeStruct]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    draws = None if config.embedding is None else jax.ShapeDtypeStruct((1,), jnp.uint32)
    return flatten(jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, draws=draws)["params"])


def own_weights(config: TransformerConfig) -> Sequence[Weight]:
    """All parameters of the model, embedding first, head last."""
    return in_order(OwnWeight(path, ".".join(path), struct.shape, None) for path, struct in _shapes(config).items())


def write_own_config(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """The config.json.

    Raises:
      UsageError: a kind of attention that is not registered.
    """
    described = describe.to_json(config, PARTS, "kvjax.models.huggingface.register")
    return {"model_type": MODEL_TYPE, "format": FORMAT, _MODEL: described, "torch_dtype": dtype, "dtype": dtype}


def read_own_config(json: Json, *, assume_harmless: Collection[str] = ()) -> TransformerConfig:
    """The model that a config.json of this family describes.

    Raises:
      UsageError: another format, a kind of attention or a field that this kvjax does not know.
    """
    if json.get("format") != FORMAT:
        raise UsageError(
            f"config.json: format {json.get('format')!r} of model_type {MODEL_TYPE!r} is not {FORMAT}, the one that "
            "this kvjax reads; read the folder with the version that wrote it."
        )
    if odd := [name for name in json if name not in _FIELDS and name not in assume_harmless]:
        raise UsageError(
            f"config.json: model_type {MODEL_TYPE!r} has no field {odd[0]!r}. {nearest(odd[0], _FIELDS - HARMLESS)} "
            f"If it does not change the logits, load with assume_harmless=[{odd[0]!r}]."
        )
    try:
        return describe.from_json(json.get(_MODEL), TransformerConfig, PARTS)
    except UsageError as error:
        raise UsageError(
            f"config.json: {_MODEL}: {error}. A kind of attention of your own has to be registered before its folders "
            "are read: kvjax.models.huggingface.register."
        ) from None


def read_own_params(config: TransformerConfig, checkpoint: Checkpoint, dtype: np.dtype[Any] | None) -> PyTree:
    """The parameter tree, one tensor at a time.

    Args:
      dtype: of parameters that are not whole numbers; None keeps the file's.

    Raises:
      CorruptDataError: a missing, unexpected or mis-shaped tensor, or numbers of another kind.
    """
    wanted = own_weights(config)
    surplus = sorted(set(checkpoint) - {weight.name for weight in wanted})
    for weight in wanted:
        whole = not jnp.issubdtype(_shapes(config)[weight.path].dtype, jnp.floating)
        check_tensor(weight, weight.name, checkpoint, whole=whole)
    if surplus:
        raise CorruptDataError(
            f"{checkpoint.files[surplus[0]].path}: the tensor {surplus[0]!r} has no place in the model of config.json; "
            "the two do not belong together."
        )
    dtypes = {weight.path: _dtype(weight.name, checkpoint, dtype) for weight in wanted}
    params = {weight.path: read_tensor(weight, weight.name, checkpoint, dtypes[weight.path]) for weight in wanted}
    return flax.traverse_util.unflatten_dict(params)


def _dtype(name: str, checkpoint: Checkpoint, wanted: np.dtype[Any] | None) -> np.dtype[Any]:
    """What a parameter is held in: what is wanted, where it is no whole number, or the file's own."""
    stored = checkpoint.entry(name).dtype
    if wanted is not None and stored.kind not in "iub":
        return wanted
    if jax.dtypes.canonicalize_dtype(stored) != stored:
        raise CorruptDataError(
            f"{checkpoint.files[name].path}: the tensor {name!r} is {stored}, which jax would shorten; kvjax writes no "
            "such parameters. Load with dtype=float32, or store it as that."
        )
    return stored
