"""`Sharing`: one layer's cache while several layers read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kvjax.cache.prompt import attend_prompt
from kvjax.cache.step import Step
from kvjax.errors import UsageError
from kvjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Stands where a layer's cache does, for the layer that owns the keys and values and for those that read them too.

    New tokens are stored when all have read (`close`): a cache that is still to be read cannot be written in place.
    Statistics of a policy are those of the owner's queries.

    Attributes:
      cache: as before these tokens, or None where there is none.
      step_of_owner: its step, once it has made it.
      store: what stores the tokens, given something that depends on all that has been read.
      outputs: what has been read so far.
    """

    cache: Any
    step_of_owner: Step | None = None
    store: Callable[[Array], Any] | None = None
    outputs: tuple[Array, ...] = ()

    def step(self, step: Step) -> tuple[Array, Sharing]:
        """The owner's turn: as `LayerCache.step`, nothing stored yet."""
        if self.cache is None:
            output, store = attend_prompt(step)[0], None
        else:
            output, store = _reading(self.cache)(step)
        return output, Sharing(self.cache, step, store, (output,))

    def read(self, queries: Array) -> tuple[Array, Sharing]:
        """The output [B, T, N, H] of another layer's queries [B, T, N, H] (not rotated)."""
        assert self.step_of_owner is not None
        step = dataclasses.replace(self.step_of_owner, queries=queries, output_projection=None)
        output = attend_prompt(step)[0] if self.cache is None else _reading(self.cache)(step)[0]
        return output, dataclasses.replace(self, outputs=(*self.outputs, output))

    def close(self) -> Any:
        """The cache with the tokens in it."""
        if self.store is None:
            return None
        return self.store(jnp.stack([output.astype(jnp.float32).sum() for output in self.outputs]))


def _reading(cache: Any) -> Callable[[Step], tuple[Array, Callable[[Array], Any]]]:
    """`LayerCache.read` of a cache that has it.

    Raises:
      UsageError: it can only read and store at once.
    """
    if not hasattr(cache, "read"):
        raise UsageError(
            f"layers of this model share keys and values, and a {type(cache).__name__} can only be read and written at "
            "once. Use the model without a mesh, and methods that need no pass of their own over the model."
        )
    return cache.read
