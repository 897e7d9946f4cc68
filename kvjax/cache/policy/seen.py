"""What a cache shows its policy: a prompt, new tokens, or the slots that compete. Unused parts vanish under jit."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kvjax.cache.prompt import all_keys, check_whole, group_queries, rotate
from kvjax.cache.step import Step
from kvjax.typing import Array, PyTree
from pallas_kernels import attention_mass

if TYPE_CHECKING:
    from kvjax.cache.policy.base import GroupReduce, Perturbed


def ranks(x: Array) -> Array:
    """int32 [..., T]: the place of each element when the last axis is sorted, equal ones in their order."""
    return jnp.argsort(jnp.argsort(x, axis=-1, stable=True), axis=-1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """T new tokens of a layer.

    Attributes:
      step: all that attention handed over (unrotated queries and keys, values, positions, layer input, output
        projection, rotary table, scale, window, softcap).
      head_index: int32 [K], one number per (layer, head) of the whole model.
      state: the policy's state before these tokens, leaves [B, K, ...], or None.
      data: what the policy was calibrated to (leaves [1, K or 1, ...]), or None.
      decoding: whether they follow the prompt; False for a prompt and for the chunks of a streaming prefill.
    """

    step: Step
    head_index: Array
    state: PyTree = None
    data: PyTree = None
    decoding: bool = dataclasses.field(default=False, metadata={"static": True}, kw_only=True)

    @property
    def valid(self) -> Array:
        """bool [B, T]; right padding is False."""
        return self.step.valid

    @property
    def positions(self) -> Array:
        """int32 [B, T], original."""
        return self.step.positions

    @property
    def queries(self) -> Array:
        """[B, K, G, T, H], rotated."""
        return rotate(self.step, group_queries(self.step))

    @property
    def keys(self) -> Array:
        """[B, K, T, H], rotated, as queries meet them: behind the latent, where there is one."""
        return rotate(self.step, all_keys(self.step))

    @property
    def unrotated_queries(self) -> Array:
        """[B, K, G, T, H]."""
        return group_queries(self.step)

    @property
    def unrotated_keys(self) -> Array:
        """[B, K, T, H], as `keys`."""
        return all_keys(self.step)

    def stored_keys(self, unrotated: bool) -> Array:
        """[B, K, T, H] for a store of keys: without the latent, which the values are."""
        keys = self.step.keys.swapaxes(1, 2)
        return keys if unrotated else rotate(self.step, keys)

    @property
    def values(self) -> Array:
        """[B, K, T, H]."""
        return self.step.values.swapaxes(1, 2)

    @property
    def count(self) -> Array:
        """int32 [B], how many of them exist."""
        return self.valid.sum(-1, dtype=jnp.int32)

    def last(self, number: int) -> tuple[Array, Array, Array]:
        """Each row's last tokens: queries [B, K, G, number, H] and keys [B, K, number, H], rotated; their places.

        Places int32 [B, number] count from the first of these tokens; where one is negative there is no such token.
        Gathered before they are rotated: what is not asked for is not computed.
        """
        places = self.count[:, None] - number + jnp.arange(number, dtype=jnp.int32)
        index = jnp.maximum(places, 0)

        def take(x: Array) -> Array:
            return jnp.take_along_axis(x, index.reshape(index.shape[0], number, *(1,) * (x.ndim - 2)), axis=1)

        step = self.step
        latent = step.latent
        step = dataclasses.replace(
            step,
            queries=take(step.queries),
            keys=take(step.keys),
            values=take(step.values),
            positions=take(step.positions),
            latent=None if latent is None else dataclasses.replace(latent, queries=take(latent.queries)),
        )
        return rotate(step, group_queries(step)), rotate(step, all_keys(step)), places


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt(Tokens):
    """One layer's whole prompt after its exact prefill.

    Attributes:
      log_sum_exp: f32 [B, K, G, T] of each query's softmax.
      scores: f32 [B, K, T] that a pass over the model of its own has found (KVzip), or None.
      competing: bool [B, 1, T], the tokens that compete for a place: no sinks, nothing of the recent window.
      places: int32 [B], how many of them each head may keep.
    """

    log_sum_exp: Array = None  # pyright: ignore[reportAssignmentType]
    scores: Array | None = None
    competing: Array = None  # pyright: ignore[reportAssignmentType]
    places: Array = None  # pyright: ignore[reportAssignmentType]

    @property
    def lengths(self) -> Array:
        """int32 [B]."""
        return self.count

    def last_queries(self, count: int) -> tuple[Array, Array, Array]:
        """Each row's last `count` queries, rotated [B, K, G, count, H]; their positions; whether they exist."""
        queries, _, places = self.last(count)
        return queries, places, places >= 0

    def mass(self, reduce: GroupReduce, last: int | None = None, perturbed: Perturbed | None = None) -> Array:
        """Attention that every key receives: f32 [B, K, T], summed over all queries or over each row's `last` ones.

        Raises:
          UsageError: see `kvjax.cache.prompt.check_whole`.
        """
        check_whole(self.step)
        queries, lse, query_positions, query_valid = self.queries, self.log_sum_exp, self.positions, self.valid
        if last is not None:
            queries, query_positions, query_valid = self.last_queries(last)
            lse = jnp.take_along_axis(lse, jnp.maximum(query_positions, 0)[:, None, None], axis=3)
        masses = attention_mass(
            queries,
            self.keys,
            lse if perturbed is None else None,
            query_positions=query_positions,
            key_positions=self.positions,
            query_valid=query_valid,
            key_valid=self.valid,
            scale=self.step.scale,
            window=self.step.window,
            softcap=self.step.softcap,
            noise=None if perturbed is None else perturbed.noise,
            temperature=None if perturbed is None else perturbed.factor,
            reduce=reduce,
        )
        assert isinstance(masses, jax.Array)
        return masses


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Tokens that compete for a place after the prompt: those in the body, or the block that leaves the ring.

    Attributes:
      positions: int32 [B, K or 1, S]; -1 marks an empty slot.
      stats: the policy's statistics, f32 [B, K, S], or None.
      seen: int32 [B], tokens of the row whose queries the statistics hold.
      head_index: int32 [K].
      keys, values: f32 [B, K, S, H], decoded, as they are stored (rotated, unless the method stores them unrotated).
      state, data: as in `Tokens`; the state has seen all `seen` tokens.
      hiding: f32 [B, K or 1, S], by how much logits are lowered at each token (selective attention), or None.
    """

    positions: Array
    stats: Array | None
    seen: Array
    head_index: Array
    keys: Array = None  # pyright: ignore[reportAssignmentType]
    values: Array = None  # pyright: ignore[reportAssignmentType]
    state: PyTree = None
    data: PyTree = None
    hiding: Array | None = None
