"""The public op and the order in which its implementations are tried."""

from __future__ import annotations

from typing import Literal, get_args

import jax

from pallas_kernels.attention_mass import pallas_tpu, reference, specs, xla
from pallas_kernels.attention_mass.noise import GumbelNoise
from pallas_kernels.dispatch import Implementation, Op

OP = Op(
    name="attention_mass",
    implementations=(
        Implementation("pallas_tpu", pallas_tpu.run, platforms=("tpu",)),
        Implementation("xla", xla.run),
        Implementation("reference", reference.run),
    ),
    example=specs.SPECS[0].abstract,
)

Reduce = Literal["sum", "mean", "max"]
Over = Literal["sum", "max"]


def attention_mass(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array | None,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_valid: jax.Array,
    key_valid: jax.Array,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
    temperature: jax.Array | None = None,
    noise: GumbelNoise | None = None,
    reduce: Reduce = "sum",
    over: Over = "sum",
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The softmax probability that each key gets, over all queries; never holds a T x S array.

    The probability of a key for one query is exp(logit - lse). A query sees the valid keys at its own position or
    before, less than `window` before. With the `lse` of attention over exactly those keys, the masses of one query
    sum to 1; with an `lse` over more keys they are these keys' share. Invalid queries and keys count nothing. To count
    some queries only (the last w of a prompt), pass those.

    Keyformer (Adnan et al., 2024, arXiv:2403.09054) scores keys by a softmax of its own, softmax((logit + noise) / tau)
    over all keys: `noise`, `temperature` = 1 / tau, and no `lse`, because attention's is that of other logits.

    Args:
      q: [B, K, G, T, H], rotated.
      k: [B, K, S, H], rotated.
      lse: f32 [B, K, G, T], as attention returned it; None computes it from these logits and keys.
      query_positions: int32 [B, T].
      key_positions: int32 [B, S].
      query_valid: bool [B, T].
      key_valid: bool [B, S].
      window: sliding window in tokens, or None.
      scale: multiplies q·k.
      softcap: logits become softcap * tanh(logits / softcap), or None.
      temperature: f32 [B, T] or [B, K, G, T], multiplies each query's logits, noise included; or None.
      noise: is added to the (capped) logits; or None.
      reduce: how each query's G heads are joined, before the queries are (so that sums over time can be added up).
      over: how queries are joined: their sum, or the largest of them (KVzip: Kim et al., 2025, arXiv:2505.23416).
      return_lse: also return the lse that was computed; it merges with those of other keys, for a second call.
      implementation: 'pallas_tpu', 'xla' or 'reference'; None picks.

    Returns:
      f32 [B, K, S]; with `return_lse` also f32 [B, K, G, T], -inf where a query is invalid or sees no key.

    Raises:
      ValueError: shapes do not agree, `reduce` or `over` is unknown, or `return_lse` with an `lse`.
      NotImplementedError: the named implementation cannot do this.
    """
    if q.ndim != 5 or k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[4]:
        raise ValueError(f"attention_mass needs q [B, K, G, T, H] and k [B, K, S, H]; got q {q.shape}, k {k.shape}")
    if lse is not None and lse.shape != q.shape[:4]:
        raise ValueError(f"lse must be [B, K, G, T] = {q.shape[:4]}; got {lse.shape}")
    if lse is not None and return_lse:
        raise ValueError("return_lse returns what is computed where no lse is given; this call gives one")
    queries, keys = (q.shape[0], q.shape[3]), (q.shape[0], k.shape[2])
    for name, x, shape in (
        ("query_positions", query_positions, queries),
        ("query_valid", query_valid, queries),
        ("key_positions", key_positions, keys),
        ("key_valid", key_valid, keys),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} must be {shape}; got {x.shape}")
    if temperature is not None and temperature.shape not in (queries, q.shape[:4]):
        raise ValueError(
            f"temperature must be [B, T] = {queries} or [B, K, G, T] = {q.shape[:4]}; got {temperature.shape}"
        )
    if noise is not None and noise.head_index.shape != q.shape[1:2]:
        raise ValueError(f"noise.head_index must be [K] = {q.shape[1:2]}; got {noise.head_index.shape}")
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce must be one of {', '.join(get_args(Reduce))}; got {reduce!r}")
    if over not in get_args(Over):
        raise ValueError(f"over must be one of {', '.join(get_args(Over))}; got {over!r}")
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
        temperature=temperature,
        noise=noise,
        reduce=reduce,
        over=over,
        return_lse=return_lse,
        implementation=implementation,
    )
