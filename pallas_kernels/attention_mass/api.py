"""The public op and the order in which its implementations are tried."""

from __future__ import annotations

import jax

from pallas_kernels.attention_mass import reference, specs, xla
from pallas_kernels.dispatch import Implementation, Op

OP = Op(
    name="attention_mass",
    implementations=(Implementation("xla", xla.run), Implementation("reference", reference.run)),
    example=specs.SPECS[0].abstract,
)
REDUCTIONS = ("sum", "mean", "max")


def attention_mass(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    *,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_valid: jax.Array,
    key_valid: jax.Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    reduce: str = "sum",
    implementation: str | None = None,
) -> jax.Array:
    """Per key the sum over queries of its softmax probability exp(logit - lse), without a T x S array.

    What score-based eviction needs (H2O, SnapKV, TOVA) and flash attention does not give.

    Args:
      q: [B, K, G, T, H], rotated. k: [B, K, S, H], rotated.
      lse: f32 [B, K, G, T], log-sum-exp of each query's whole softmax (also over keys that are not in `k`).
      query_positions: int32 [B, T]. key_positions: int32 [B, S]; a query sees keys at most at its own position.
      query_valid: bool [B, T]. key_valid: bool [B, S]. What lies in invalid places, NaN included, changes nothing.
      window: sliding window in tokens, or None. scale, softcap: as in `prefill_attention`.
      reduce: 'sum', 'mean' or 'max' over the G query heads, before the sum over queries.
      implementation: 'xla' or 'reference'; None picks.

    Returns:
      f32 [B, K, S].

    Raises:
      ValueError: shapes do not agree, or an unknown reduction.
    """
    if q.ndim != 5 or k.ndim != 4 or k.shape[:2] != q.shape[:2] or lse.shape != q.shape[:4]:
        raise ValueError(
            f"attention_mass needs q [B, K, G, T, H], k [B, K, S, H], lse [B, K, G, T]; got {q.shape}, {k.shape}, {lse.shape}"
        )
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is one of {', '.join(REDUCTIONS)}; got {reduce!r}")
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
