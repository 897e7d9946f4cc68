"""Which tensor of a Hugging Face checkpoint each parameter is, and how its axes are laid out there.

Hugging Face stores a linear map as [outputs, inputs] with heads flattened; `Projection` keeps [inputs, outputs]
with heads as axes of their own. Everything else has the same shape on both sides. Latent attention also shares tensors
among parameters and has rows in another order (`latent.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kvjax.models.config import TransformerConfig
from kvjax.models.huggingface.latent import layout
from kvjax.models.transformer import Transformer
from kvjax.typing import PyTree

Numpy = np.ndarray[Any, Any]
Path = tuple[str, ...]

_TOP: Mapping[Path, str] = {
    ("embed", "embedding"): "model.embed_tokens.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("head", "kernel"): "lm_head.weight",
}
_IN_LAYER = {
    "attention": "self_attn",
    "mlp": "mlp",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
}
_PRE_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
      path: in the parameter tree.
      name: of the tensor in a checkpoint.
      shape: of the parameter.
      inputs: how many leading axes a kernel contracts; None where the layout is the same on both sides.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    inputs: int | None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape in the checkpoint."""
        if self.inputs is None:
            return (math.prod(self.shape),) if self.path[-1] == "bias" else self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

    def as_stored(self, value: Numpy) -> Numpy:
        """A view of the parameter [*inputs, *outputs] in the checkpoint's layout [outputs, inputs]."""
        if self.inputs is None:
            return value.reshape(self.stored_shape)
        return value.reshape(self.stored_shape[::-1]).T

    def put(self, value: Numpy, start: int, piece: Numpy) -> Numpy:
        """Writes rows of the tensor, from `start` on, into the parameter; gives what now stands there."""
        stored = self.as_stored(value)
        target = stored.reshape(stored.shape or (1,))[start : start + len(piece)]
        target[...] = piece
        return target

    def give(self, value: Numpy, tensor: Numpy | None) -> Numpy:
        """The tensor with this parameter in it, where parameters that share it have left it as `tensor`."""
        assert tensor is None, f"{self.name} is the tensor of one parameter"
        return self.as_stored(value)


@dataclasses.dataclass(frozen=True)
class PartWeight(Weight):
    """A parameter that has some rows of a tensor, or all of them in another order.

    Its outputs are its axes behind the first, or the first and the last where heads lead (`up_keys` [N, R, H]).

    Attributes:
      rows: for each output, the row of the tensor. total: how many rows that has.
    """

    rows: tuple[int, ...] = ()
    total: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if self.path[-1] == "bias":
            return (self.total,)
        return self.total, math.prod(self.shape) // len(self.rows)

    def put(self, value: Numpy, start: int, piece: Numpy) -> Numpy:
        rows = np.array(self.rows)
        (own,) = np.nonzero((rows >= start) & (rows < start + len(piece)))
        view = self._by_output(value)
        index = np.unravel_index(own, view.shape[:-1])
        view[index] = piece.reshape(len(piece), -1)[rows[own] - start]
        return view[index]

    def give(self, value: Numpy, tensor: Numpy | None) -> Numpy:
        tensor = np.empty(self.stored_shape, value.dtype) if tensor is None else tensor
        view = self._by_output(value)
        tensor.reshape(self.total, -1)[np.array(self.rows)] = view.reshape(len(self.rows), -1)
        return tensor

    def _by_output(self, value: Numpy) -> Numpy:
        """A view [*outputs, inputs]."""
        if self.path[-1] == "bias":
            return value[..., None]
        return np.moveaxis(value, 0 if self.path[-1] == "kernel" else 1, -1)


def flatten(tree: PyTree) -> dict[Path, Any]:
    """A nested dictionary of parameters as path -> leaf."""
    return dict(flax.traverse_util.flatten_dict(tree))  # pyright: ignore[reportReturnType]


@functools.lru_cache(maxsize=8)
def weights(config: TransformerConfig) -> tuple[Weight, ...]:
    """All parameters of the model in checkpoint order: embedding, layers, final norm, head."""
    norms = _SANDWICH_NORMS if config.sandwich_norm else _PRE_NORMS

    def name(path: Path) -> str:
        if path in _TOP:
            return _TOP[path]
        parts = [norms.get(part) or _IN_LAYER[part] for part in path[1:]]
        return ".".join(["model.layers", path[0].removeprefix("layers_"), *parts])

    def inputs(path: Path) -> int | None:
        if path[-1] != "kernel":
            return None
        return 2 if path[-2] == "o" else 1

    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = flatten(jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"])
    attention = layout(config)

    def weight(path: Path, shape: tuple[int, ...]) -> Weight:
        part = attention.get(path[2:]) if path[1:2] == ("attention",) else None
        if part is None:
            return Weight(path, name(path), shape, inputs(path))
        stored = f"model.layers.{path[0].removeprefix('layers_')}.self_attn.{part.name}"
        if part.rows is None:
            return Weight(path, stored, shape, inputs(path))
        return PartWeight(path, stored, shape, None, part.rows, part.total)

    return in_order(weight(path, struct.shape) for path, struct in shapes.items())


def in_order(found: Iterable[Weight]) -> tuple[Weight, ...]:
    """Weights as checkpoints list them: embedding, layers, final norm, head."""
    return tuple(sorted(found, key=_order))


def _order(weight: Weight) -> tuple[int, int, str]:
    top = {"embed": 0, "final_norm": 2, "head": 3}.get(weight.path[0], 1)
    layer = int(weight.path[0].removeprefix("layers_")) if top == 1 else 0
    return top, layer, weight.name
