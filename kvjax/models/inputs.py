"""What `Transformer` accepts, checked while it is traced: the compiled program holds nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from kvjax.errors import UsageError

_KINDS: dict[Any, str] = {jnp.integer: "int32", jnp.unsignedinteger: "uint32", jnp.bool_: "bool"}


def check_inputs(layers: int, tokens: Any, positions: Any, cache: Any, valid: Any, logits_at: Any) -> None:
    """Checks shapes and dtypes of the arguments of `Transformer.__call__`, whose docstring states them.

    Raises:
      UsageError: naming the argument, what it should be, what it is, and what to do.
    """
    _check(tokens, "tokens", jnp.integer, "[B, T]", None, "give token ids; one prompt is a batch of one: tokens[None]")
    batch, length = tokens.shape
    if batch < 1 or length < 1:
        raise UsageError(f"tokens is int32 [B, T] with at least one row and one token; got {list(tokens.shape)}.")
    same = (batch, length)
    if positions is not None:
        _check(positions, "positions", jnp.integer, "[B, T]", same, "leave it out to count on from the cache")
    if valid is not None:
        _check(valid, "valid", jnp.bool_, "[B, T]", same, "it is False on the padding behind a row's tokens")
    if logits_at is not None:
        _check(logits_at, "logits_at", jnp.integer, "[B]", (batch,), "give one index per row")
    if cache is not None:
        _check_cache(cache, layers, batch)


def check_draws(needed: bool, tokens: Any, draws: Any) -> None:
    """Raises UsageError unless each row names its draw where the model draws its embeddings, and only there."""
    if needed and draws is None:
        raise UsageError(
            "this model draws the embeddings of each row: draws is uint32 [B]; got None. Fix: give them, or use "
            "kvjax.prefill and kvjax.generate, whose caches carry them; what brings caches of its own cannot run it."
        )
    if draws is not None and not needed:
        raise UsageError("draws were given, but this model's embeddings are learnt. Fix: leave them out.")
    if needed:
        _check(draws, "draws", jnp.unsignedinteger, "[B]", (tokens.shape[0],), "give one uint32 number per row")


def _check(x: Any, name: str, kind: type[jnp.generic], axes: str, shape: tuple[int, ...] | None, fix: str) -> None:
    """Raises UsageError unless x is an array of this kind of dtype and of this shape (None: of as many axes)."""
    wanted = f"{name} is {_KINDS[kind]} {axes}" + (f" = {list(shape)}, for these tokens" if shape else "")
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise UsageError(f"{wanted}; got {x!r:.60} of type {type(x).__name__}. Fix: make an array of it: jnp.array(x).")
    fits = x.shape == shape if shape else len(x.shape) == axes.count(",") + 1
    if not fits or not jnp.issubdtype(x.dtype, kind):
        raise UsageError(f"{wanted}; got {x.dtype} {list(x.shape)}. Fix: {fix}.")


def _check_cache(cache: Sequence[Any], layers: int, batch: int) -> None:
    """Raises UsageError unless there is one layer cache per layer, each with as many rows as the tokens have."""
    if not hasattr(cache, "__len__") or len(cache) != layers:
        found = f"{len(cache)}" if hasattr(cache, "__len__") else f"a {type(cache).__name__}"
        raise UsageError(
            f"cache holds one layer cache for each of the model's {layers} layers; got {found}. "
            "Fix: give the layers of a ModelCache of this model, such as context.cache.layers."
        )
    rows = {layer.length.shape[0] for layer in cache if hasattr(layer, "length")}
    if rows - {batch}:
        raise UsageError(
            f"the cache has {' and '.join(map(str, sorted(rows)))} rows, but tokens has {batch}. "
            "Fix: give every row of the cache its tokens; valid=False leaves a row as it is."
        )
