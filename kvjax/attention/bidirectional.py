"""Attention of all tokens to all tokens, for encoders: what stands where a decoder's layers have their cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.attention.base import LayerCacheProtocol
from kvjax.cache.prompt import all_keys, allocated, group_queries, rotate, ungroup, widened
from kvjax.cache.step import Step
from kvjax.errors import UsageError
from kvjax.typing import Array
from pallas_kernels import decode_attention
from pallas_kernels.loader import DenseLoader


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bidirectional(LayerCacheProtocol):
    """Every token sees every valid one of its row. Nothing is stored; differentiable."""

    def step(self, step: Step) -> tuple[Array, Bidirectional]:
        """(out [B, T, N, H'] in the dtype of the queries, this).

        Raises:
          UsageError: attention that looks back only, by a window or by what earlier tokens hide.
        """
        if step.window is not None or step.selective:
            raise UsageError(
                "a window, or tokens that hide others from later ones, need an order; leave them out here."
            )
        wide = widened(allocated(step))
        queries, keys = rotate(wide, group_queries(wide)), rotate(wide, all_keys(wide))
        batch, heads, group, tokens, _ = queries.shape
        out, _ = decode_attention(
            queries.reshape(batch, heads, group * tokens, -1),
            DenseLoader(keys),
            DenseLoader(jnp.moveaxis(wide.values, 1, 2)),
            valid=step.valid[:, None],
            scale=step.scale,
            softcap=step.softcap,
        )
        return ungroup(wide, out.reshape(batch, heads, group, tokens, -1).astype(queries.dtype)), self
