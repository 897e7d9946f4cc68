"""The public op and the order in which its implementations are tried."""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.prefill_attention import reference, specs, xla

OP = Op(
    name="prefill_attention",
    implementations=(Implementation("xla", xla.run), Implementation("reference", reference.run)),
    example=specs.SPECS[0].abstract,
)


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    valid: jax.Array,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal grouped-query attention by index; computes in float32 and never holds a T x T array when T is large.

    The query at index t sees the valid keys at index s with 0 <= t - s < window. What lies in invalid slots, NaN
    included, changes nothing. Reverse-mode differentiable in q, k and v, also through `lse`.

    Args:
      q: [B, K, G, T, H], rotated.
      k: [B, K, T, H], rotated.
      v: [B, K, T, H].
      valid: bool [B, T]; False marks right padding.
      window: sliding window in tokens, or None.
      scale: multiplies q·k.
      softcap: logits become softcap * tanh(logits / softcap), or None.
      implementation: 'xla' or 'reference'; None picks.

    Returns:
      out [B, K, G, T, H] in the dtype of q and lse f32 [B, K, G, T]. Where a query is invalid or sees no key, out is 0
      and lse is -inf.

    Raises:
      ValueError: shapes do not agree.
      NotImplementedError: the named implementation cannot do this.
    """
    if q.ndim != 5 or k.shape != (*q.shape[:2], *q.shape[3:]) or v.shape != k.shape:
        raise ValueError(
            "prefill_attention needs q [B, K, G, T, H] and k, v [B, K, T, H]; got "
            f"q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if valid.shape != (q.shape[0], q.shape[3]):
        raise ValueError(f"valid must be [B, T] = {(q.shape[0], q.shape[3])}; got {valid.shape}")
    return OP(q, k, v, valid=valid, window=window, scale=scale, softcap=softcap, implementation=implementation)
