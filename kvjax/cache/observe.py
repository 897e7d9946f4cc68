"""Statistics of slots: what the attention of new tokens adds to them, and what new tokens bring along."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kvjax.cache.policy import Perturbed, Tokens
from kvjax.cache.pool import Part
from kvjax.typing import Array
from pallas_kernels import attention_mass

if TYPE_CHECKING:
    from kvjax.cache.layer_cache import LayerCache


def needs_logits(cache: LayerCache, segment: Part) -> bool:
    """Whether reading a segment has to return its logits. A perturbed softmax needs those of every slot there is."""
    method = cache.method
    if not method.keeps_statistics or method.policy.arrives_scored:
        return False
    return segment.stats is not None or method.policy.perturbs


def observe(
    cache: LayerCache,
    tokens: Tokens,
    queries: Array,
    own_keys: Array,
    logits: Sequence[Array | None],
    log_sum_exp: Array,
) -> tuple[LayerCache, Array | None]:
    """The cache with its statistics brought up to date, and the new tokens' own, f32 [B, K, T] or None.

    Args:
      queries: [B, K, G, T, H]; own_keys: [B, K, T, H]; both rotated as attention saw them.
      logits: per segment f32 [B, K, G · T, S], or None.
      log_sum_exp: f32 [B, K, G, T] over all slots and the new tokens.
    """
    policy, step = cache.method.policy, tokens.step
    if not cache.method.keeps_statistics:
        return cache, None
    if policy.arrives_scored:
        return cache, policy.arrival(tokens)
    reduce = policy.mass_reduce
    assert reduce is not None
    looks = _last(step.valid) if policy.forgets else step.valid
    perturbed = policy.perturbed(tokens)

    def own(lse: Array | None, return_lse: bool) -> Array | tuple[Array, Array]:
        return attention_mass(
            queries,
            own_keys,
            lse,
            query_positions=step.positions,
            key_positions=step.positions,
            query_valid=step.valid if return_lse else looks,
            key_valid=step.valid,
            scale=step.scale,
            window=step.window,
            softcap=step.softcap,
            noise=None if perturbed is None else perturbed.noise,
            temperature=None if perturbed is None else perturbed.factor,
            reduce=reduce,
            return_lse=return_lse,
        )

    grouped = [None if x is None else x.reshape(*queries.shape[:4], -1) for x in logits]
    if perturbed is not None:
        grouped = [_perturb(perturbed, step.positions, s, x) for s, x in zip(cache.segments, grouped, strict=True)]
        _, own_lse = own(None, True)
        parts = [own_lse, *(jax.nn.logsumexp(x, axis=-1) for x in grouped if x is not None)]
        log_sum_exp = jax.nn.logsumexp(jnp.stack(parts), axis=0)
    own_mass = own(log_sum_exp, False)
    assert isinstance(own_mass, jax.Array)
    return _add(cache, grouped, log_sum_exp, looks), own_mass


def _last(valid: Array) -> Array:
    """bool [B, T]: each row's last token that exists."""
    return valid & (jnp.cumsum(valid[:, ::-1], axis=-1)[:, ::-1] == 1)


def _perturb(perturbed: Perturbed, query_positions: Array, segment: Part, logits: Array | None) -> Array | None:
    """Logits [B, K, G, T, S] as the policy's own softmax takes them."""
    if logits is None:
        return None
    if perturbed.noise is not None:
        logits = logits + perturbed.noise.at(query_positions, segment.positions, logits.shape[2])
    return logits if perturbed.factor is None else logits * perturbed.factor[:, None, None, :, None]


def _add(cache: LayerCache, logits: Sequence[Array | None], lse: Array, looks: Array) -> LayerCache:
    """Adds the attention that each slot has just received to its statistic, or replaces it where a policy forgets."""
    policy, finite = cache.method.policy, jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]

    def seen(segment: Part, slot_logits: Array | None) -> Part:
        if segment.stats is None or slot_logits is None:
            return segment
        p = jnp.where(looks[:, None, None, :, None], jnp.exp(slot_logits - finite), 0.0)
        mass = getattr(p, policy.mass_reduce or "sum")(axis=2).sum(axis=2)
        kept = jnp.where(looks.any(-1)[:, None, None], 0.0, segment.stats) if policy.forgets else segment.stats
        return dataclasses.replace(segment, stats=kept + mass)

    return cache.with_segments([seen(s, x) for s, x in zip(cache.segments, logits, strict=True)])
