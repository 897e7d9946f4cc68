"""The public op and the order in which its implementations are tried."""

from __future__ import annotations

from typing import Literal, get_args

import jax

from pallas_kernels.attention_mass import reference, specs, xla
from pallas_kernels.dispatch import Implementation, Op

OP = Op(
    name="attention_mass",
    implementations=(Implementation("xla", xla.run), Implementation("reference", reference.run)),
    example=specs.SPECS[0].abstract,
)

Reduce = Literal["sum", "mean", "max"]


def attention_mass(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_valid: jax.Array,
    key_valid: jax.Array,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
    reduce: Reduce = "sum",
    implementation: str | None = None,
) -> jax.Array:
    """The softmax probability that each key gets, summed over queries; never holds a T x S array.

    The probability of a key for one query is exp(logit - lse). A query sees the valid keys at its own position or
    before, less than `window` before. With the `lse` of attention over exactly those keys, the masses of one query
    sum to 1; with an `lse` over more keys they are these keys' share. Invalid queries and keys count nothing.

    Args:
      q: [B, K, G, T, H], rotated.
      k: [B, K, S, H], rotated.
      lse: f32 [B, K, G, T], as attention returned it.
      query_positions: int32 [B, T].
      key_positions: int32 [B, S].
      query_valid: bool [B, T].
      key_valid: bool [B, S].
      window: sliding window in tokens, or None.
      scale: multiplies q·k.
      softcap: logits become softcap * tanh(logits / softcap), or None.
      reduce: how each query's G heads are joined, before the sum over queries (so that sums over time can be added up).
      implementation: 'xla' or 'reference'; None picks.

    Returns:
      f32 [B, K, S].

    Raises:
      ValueError: shapes do not agree, or `reduce` is unknown.
      NotImplementedError: the named implementation cannot do this.
    """
    if q.ndim != 5 or k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[4]:
        raise ValueError(f"attention_mass needs q [B, K, G, T, H] and k [B, K, S, H]; got q {q.shape}, k {k.shape}")
    if lse.shape != q.shape[:4]:
        raise ValueError(f"lse must be [B, K, G, T] = {q.shape[:4]}; got {lse.shape}")
    queries, keys = (q.shape[0], q.shape[3]), (q.shape[0], k.shape[2])
    for name, x, shape in (
        ("query_positions", query_positions, queries),
        ("query_valid", query_valid, queries),
        ("key_positions", key_positions, keys),
        ("key_valid", key_valid, keys),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} must be {shape}; got {x.shape}")
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce must be one of {', '.join(get_args(Reduce))}; got {reduce!r}")
    return OP(
        q,
        k,
        lse,
        query_positions=query_positions,
        key_positions=key_positions,
        query_valid=query_valid,
        key_valid=key_valid,
        window=window,
        scale=scale,
        softcap=softcap,
        reduce=reduce,
        implementation=implementation,
    )
