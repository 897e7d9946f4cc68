"""`ModelCache`: the caches of all layers, what they hold, and how much room is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.convolution_state import ConvolutionState
from kvjax.cache.head_split import AnyLayer, empty_layer
from kvjax.cache.layer_cache import NO_DATA, LayerCache, LayerData
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.plan import full_bytes, layer_bytes, resolve
from kvjax.cache.pool import Part
from kvjax.errors import CacheFullError
from kvjax.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelCache:
    """One layer's cache per layer, the length of each row's prompt (int32 [B]), and the method of all.

    draws: uint32 [B], each row's draw of the embeddings where the model has none of its own; else None.
    """

    layers: tuple[AnyLayer | ConvolutionState, ...]
    prompt_lengths: Array
    method: CacheMethod = dataclasses.field(metadata={"static": True})
    draws: Array | None = None

    @classmethod
    def init(
        cls,
        method: CacheMethod,
        layers: Sequence[CacheDims],
        prompt_lengths: Array | None = None,
        data: Sequence[LayerData] | None = None,
    ) -> ModelCache:
        """An empty cache; a budget in bytes is resolved to tokens here. data: per layer, what calibration has found.

        Raises:
          UsageError: the method does not fit the dimensions.
        """
        method = resolve(method, layers)
        if prompt_lengths is None:
            prompt_lengths = jnp.full((layers[0].batch,), layers[0].prompt_length, jnp.int32)
        found = [NO_DATA] * len(layers) if data is None else data
        made = (_empty(method, d, prompt_lengths, one) for d, one in zip(layers, found, strict=True))
        return cls(tuple(made), prompt_lengths, method)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> AnyLayer | ConvolutionState:
        return self.layers[layer]

    def __iter__(self) -> Iterator[AnyLayer | ConvolutionState]:
        return iter(self.layers)

    @property
    def lengths(self) -> Array:
        """int32 [B], tokens each row has seen."""
        return self.layers[0].length

    def fork(self) -> ModelCache:
        """A copy with buffers of its own, so that both can be continued (steps donate their cache)."""
        return jax.tree.map(jnp.copy, self)

    def stepped(self, layers: Any) -> ModelCache:
        """This cache after a step that has left it these layers (a sequence, as the model returns it).

        Where the method has a selector, layers settle here what the next step reads.
        """
        selector = self.method.selector
        if selector.page is None:
            return dataclasses.replace(self, layers=tuple(layers))
        nodes, tree = jax.tree.flatten(tuple(layers), is_leaf=_is_layer)
        places = [i for i, x in enumerate(nodes) if _is_layer(x) and x.method.selector == selector]
        for i, index in zip(places, selector.settled([nodes[i].index for i in places]), strict=True):
            nodes[i] = dataclasses.replace(nodes[i], index=index)
        return dataclasses.replace(self, layers=jax.tree.unflatten(tree, nodes))

    def end_prompt(self) -> ModelCache:
        """Marks the end of a streaming prefill."""
        return dataclasses.replace(self, layers=tuple(layer.end_prompt() for layer in self.layers))

    @property
    def layer_bytes(self) -> list[int]:
        """Allocated bytes of every layer: the sum of its buffers."""
        return [sum(leaf.nbytes for leaf in jax.tree.leaves(layer)) for layer in self.layers]

    @property
    def planned_bytes(self) -> list[int]:
        """What the method declares for every layer."""
        return [layer_bytes(layer.method, layer.dims) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Allocated bytes of all layers."""
        return sum(self.layer_bytes)

    @property
    def effective_bytes(self) -> int:
        """The part of the segments' bytes whose slots hold a token; the states of convolutions have no empty places."""
        states = sum(layer.nbytes for layer in self.layers if isinstance(layer, ConvolutionState))
        return round(states + sum(_used_bytes(s) for layer in self.layers for s in layer.segments))

    @property
    def full_bytes(self) -> int:
        """`kvjax.cache.plan.full_bytes` of its layers."""
        return full_bytes(layer.dims for layer in self.layers)

    def room(self) -> NDArray[np.int64]:
        """Tokens that each row can still append, int64 [B]."""
        dims, method = self.layers[0].dims, self.method
        lengths = np.asarray(self.lengths, np.int64)
        room = dims.max_length - lengths
        if method.budget.evicts and method.every is None:
            room = np.minimum(room, dims.max_length - dims.prompt_length - (lengths - np.asarray(self.prompt_lengths)))
        return room

    def check_room(self, tokens: Sequence[int] | int) -> None:
        """Raises CacheFullError, before anything is written, where a row cannot append its number of tokens."""
        room = self.room()
        needed = np.broadcast_to(np.asarray(tokens), room.shape)
        if (row := int(np.argmax(needed - room))) is not None and needed[row] > room[row]:
            length = int(self.lengths[row])
            raise CacheFullError(
                f"cache full: row {row} holds {length} tokens and is to append {int(needed[row])}, but was made with "
                f"room for {length + int(room[row])} (max_length {self.layers[0].dims.max_length}, prompt "
                f"{self.layers[0].dims.prompt_length}). Make it with a larger max_length, or append less."
            )


def _empty(method: CacheMethod, dims: CacheDims, prompt_lengths: Array, data: LayerData) -> AnyLayer | ConvolutionState:
    if dims.convolved is None:
        return empty_layer(method, dims, prompt_lengths, data)
    method.check(dims)
    return ConvolutionState.empty(dims)


def _is_layer(x: object) -> bool:
    """Whether x caches all that it has in segments of its own."""
    return isinstance(x, LayerCache)


def _used_bytes(segment: Part) -> float:
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(segment))
    return total * float(jnp.mean(segment.valid))
