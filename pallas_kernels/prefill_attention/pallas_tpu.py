"""`prefill_attention` for TPU as Pallas kernels, with a recomputing backward pass.

Products run in the dtype of the inputs (float32 inputs at full precision; with bfloat16 inputs probabilities are
rounded to bfloat16 before they meet values) and accumulate in float32; exponentials are base 2.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.prefill_attention import xla
from pallas_kernels.prefill_attention.pallas_tpu_backward import backward
from pallas_kernels.prefill_attention.pallas_tpu_forward import forward
from pallas_kernels.prefill_attention.walk import Tiles

MAX_DIM = 256
MAX_STEPS = 3 << 16
"""Tiles per head in the list that steers the copies: an int32 each, in 1 MiB of scalar memory."""


def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    valid: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None,
    temperature: jax.Array | None = None,
    selection: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
    """See `api.prefill_attention`.

    Raises:
      NotImplementedError: a dtype other than float32 and bfloat16, or mixed ones; H or C above 256; so many tokens that
        the list of tiles outgrows scalar memory.
    """
    width, read = max(k.shape[-1], v.shape[-1]), v.shape[-1]
    if k.shape[-1] != v.shape[-1]:  # zeros change no logit, and what they add to the output is cut off
        q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) for x in (q, k, v))
    tiles = Tiles.of(q, window, scale, softcap)
    _check(tiles, q, k, v, *(selection or ()))
    if temperature is not None:
        factors = temperature[:, None, None] if temperature.ndim == 2 else temperature
        temperature = jnp.broadcast_to(factors.astype(jnp.float32), q.shape[:4])
    if selection is None:
        out, *rest = _attend(tiles, q, k, v, temperature, valid)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        out, *rest = _select(tiles, q, k, v, temperature, valid, selection)  # pyright: ignore[reportGeneralTypeIssues]
    return out[..., :read], *rest


def _check(tiles: Tiles, *arrays: jax.Array) -> None:
    dtypes = {str(x.dtype) for x in arrays}
    if dtypes not in ({"float32"}, {"bfloat16"}):
        raise NotImplementedError(f"takes float32 or bfloat16 throughout, not {', '.join(sorted(dtypes))}")
    width = max(x.shape[-1] for x in arrays)
    if width > MAX_DIM:
        raise NotImplementedError(f"{width} channels are above {MAX_DIM}")
    steps = len(tiles.backward.walk("key"))
    if steps > MAX_STEPS:
        raise NotImplementedError(f"{tiles.tokens} tokens need {steps} tiles per head; at most {MAX_STEPS}")


def _heads(tiles: Tiles, x: Any) -> Any:
    """[B, K, G, T, ...] -> [B, N, groups, T, ...]; None stays."""
    return None if x is None else x.reshape(x.shape[0], -1, tiles.groups, *x.shape[3:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    tiles: Tiles, q: jax.Array, k: jax.Array, v: jax.Array, temperature: jax.Array | None, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
    out, lse = forward(tiles, _heads(tiles, q), k, v, _heads(tiles, temperature), lengths)
    return out.reshape(q.shape), lse.reshape(q.shape[:4])


def _attend_forward(tiles: Tiles, *args: Any):
    out, lse = _attend(tiles, *args)  # pyright: ignore
    return (out, lse), (*args, out, lse)


def _attend_backward(tiles: Tiles, saved: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]):
    q, k, v, temperature, valid, out, lse = saved
    dout, dlse = cotangents
    lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
    shift = dlse - jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    split = [_heads(tiles, x) for x in (q, temperature, lse, shift, dout)]
    dq, dk, dv, dtemperature = backward(tiles, split[0], k, v, split[1], lengths, *split[2:])
    if dtemperature is not None:
        dtemperature = dtemperature.reshape(temperature.shape)
    return dq.reshape(q.shape), dk, dv, dtemperature, None


_attend.defvjp(_attend_forward, _attend_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _select(
    tiles: Tiles,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    temperature: jax.Array | None,
    valid: jax.Array,
    selection: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
    out, lse, hidden = forward(tiles, _heads(tiles, q), k, v, _heads(tiles, temperature), lengths, selection)
    share = hidden.shape[1] // selection[0].shape[1]
    return out.reshape(q.shape), lse.reshape(q.shape[:4]), hidden[:, ::share]


def _select_forward(tiles: Tiles, *args: Any):
    return _select(tiles, *args), args  # pyright: ignore[reportGeneralTypeIssues]


def _select_backward(tiles: Tiles, args: tuple[Any, ...], cotangents: tuple[jax.Array, ...]):
    """What a token hides depends on all tokens behind it; the XLA form has that recurrence, in reverse, already."""
    *arrays, valid, selection = args
    static = {"window": tiles.window, "scale": tiles.scale, "softcap": tiles.softcap}

    def form(q: jax.Array, k: jax.Array, v: jax.Array, temperature: Any, selection: Any) -> tuple[jax.Array, ...]:
        return xla.run(q, k, v, valid=valid, temperature=temperature, selection=selection, **static)

    *grads, dselection = jax.vjp(form, *arrays, selection)[1](cotangents)
    return *grads, None, dselection


_select.defvjp(_select_forward, _select_backward)
