"""The public op and the order in which its implementations are tried."""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.prefill_attention import pallas_tpu, reference, specs, xla

OP = Op(
    name="prefill_attention",
    implementations=(
        Implementation("pallas_tpu", pallas_tpu.run, platforms=("tpu",)),
        Implementation("xla", xla.run),
        Implementation("reference", reference.run),
    ),
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
    temperature: jax.Array | None = None,
    selection: tuple[jax.Array, jax.Array] | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Causal grouped-query attention by index; computes in float32 and never holds a T x T array when T is large.

    The query at index t sees the valid keys at index s with 0 <= t - s < window. What lies in invalid slots, NaN
    included, changes nothing. Reverse-mode differentiable in all floating arguments, also through `lse`.

    With `selection`, tokens hide others from all later queries (selective attention: Leviathan et al., 2024,
    arXiv:2410.02703): chosen[t, s] = max(0, scale * sq[t]·sk[s]) for the keys s < t that t sees, and the logits of
    query t are lowered by hidden[t, s] = sum of chosen[t', s] over t' < t. The paper takes head 0's rotated queries and
    keys as sq and sk, and protects the first token: a zero in sk does that.

    Args:
      q: [B, K, G, T, H], rotated.
      k: [B, K, T, H], rotated.
      v: [B, K, T, H'].
      valid: bool [B, T], True for a prefix of each row; False marks right padding.
      window: sliding window in tokens, or None.
      scale: multiplies q·k.
      softcap: logits become softcap * tanh(logits / softcap), or None.
      temperature: f32 [B, T] or [B, K, G, T], multiplies each query's (capped) logits, or None (selective
        self-attention: Zhang et al., 2024, arXiv:2411.12892). An inverse temperature, to be exact.
      selection: (sq, sk), both [B, J, T, C], J being K or 1 (one for all heads), or None.
      implementation: 'pallas_tpu', 'xla' or 'reference'; None picks.

    Returns:
      out [B, K, G, T, H'] in the dtype of q and lse f32 [B, K, G, T]. Where a query is invalid or sees no key, out is 0
      and lse is -inf. With `selection` also hidden f32 [B, J, T]: by how much the logits of a query behind the last
      valid one would be lowered; a cache carries it on, and may give up the keys that have most.

    Raises:
      ValueError: shapes do not agree.
      NotImplementedError: the named implementation cannot do this.
    """
    batch, heads, _, tokens, dim = q.shape if q.ndim == 5 else (0,) * 5
    if q.ndim != 5 or k.shape != (batch, heads, tokens, dim) or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            "prefill_attention needs q [B, K, G, T, H], k [B, K, T, H] and v [B, K, T, H']; got "
            f"q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if valid.shape != (batch, tokens):
        raise ValueError(f"valid must be [B, T] = {(batch, tokens)}; got {valid.shape}")
    if temperature is not None and temperature.shape not in (valid.shape, q.shape[:4]):
        raise ValueError(
            f"temperature must be [B, T] = {valid.shape} or [B, K, G, T] = {q.shape[:4]}; got {temperature.shape}"
        )
    if selection is not None:
        queries, keys = selection
        allowed = [(batch, j, tokens) for j in (1, heads)]
        if queries.shape != keys.shape or queries.ndim != 4 or queries.shape[:3] not in allowed:
            raise ValueError(
                f"selection must be two arrays [B, J, T, C] with J = 1 or {heads}, B, T = {batch}, {tokens}; got "
                f"{queries.shape} and {keys.shape}"
            )
    return OP(
        q,
        k,
        v,
        valid=valid,
        window=window,
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        selection=selection,
        implementation=implementation,
    )
