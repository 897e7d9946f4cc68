"""Running the TPU kernels of `prefill_attention` and `attention_mass` on the CPU, on workloads that cover all pairs.

Interpreted, memory that nobody wrote is NaN, a read out of bounds is an error and a race is found. What a kernel must
not look at is poisoned for it, and clean for the reference.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention_mass import tiles as mass_tiles
from pallas_kernels.compat import interpreted
from pallas_kernels.prefill_attention import walk

QUICK = {"xla_backend_optimization_level": 0}
"""Each program runs once: compiling it well takes longer than it saves."""


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128 tokens, so that a few hundred tokens have tiles of every kind, and heads are split."""
    monkeypatch.setattr(walk, "ROWS", 256)
    monkeypatch.setattr(walk, "PART", 128)
    monkeypatch.setattr(mass_tiles, "TOKENS", 128)


def jitted(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`run(*args, **kwargs)` in one program; only arrays are its arguments."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = [isinstance(leaf, jax.Array) for leaf in leaves]

    def call(arrays: list[jax.Array]) -> Any:
        rest = iter(arrays)
        args, kwargs = jax.tree.unflatten(
            structure, [next(rest) if t else x for x, t in zip(leaves, traced, strict=True)]
        )
        return run(*args, **kwargs)

    arrays = [leaf for leaf, t in zip(leaves, traced, strict=True) if t]
    return jax.block_until_ready(jax.jit(call, compiler_options=QUICK)(arrays))


def on_tpu(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The op's TPU kernel, interpreted."""
    with interpreted():
        return jitted(lambda *a, **k: op(*a, **k, implementation="pallas_tpu"), *args, **kwargs)


def poisoned(x: jax.Array, valid: jax.Array, axis: int) -> jax.Array:
    """NaN where `valid` [B, n] is False along `axis`."""
    mask = valid.reshape(valid.shape[0], *(1,) * (axis - 1), valid.shape[1], *(1,) * (x.ndim - axis - 1))
    return jnp.where(mask, x, jnp.nan)


def heated(kwargs: dict[str, Any], valid: jax.Array) -> dict[str, Any]:
    """`kwargs` with the temperature, if there is one, poisoned where its query is not valid."""
    if "temperature" not in kwargs:
        return kwargs
    return kwargs | {"temperature": poisoned(kwargs["temperature"], valid, kwargs["temperature"].ndim - 1)}


def cover(**axes: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """A small list of choices in which every two values of every two axes meet; greedy and deterministic."""
    values = [(name, at) for name in axes for at in range(len(axes[name]))]
    unmet = {frozenset(pair) for pair in itertools.combinations(values, 2) if pair[0][0] != pair[1][0]}
    draw = random.Random(4)  # of some seeds, the one with the shortest lists in use

    def met(choice: dict[str, int]) -> set[frozenset[tuple[str, int]]]:
        return {frozenset(pair) for pair in itertools.combinations(choice.items(), 2)} & unmet

    def grown(start: list[tuple[str, int]]) -> dict[str, int]:
        choice = dict(start)
        for name in draw.sample(list(axes), len(axes)):
            options = range(len(axes[name])) if name not in choice else [choice[name]]
            choice[name] = max(options, key=lambda at: (len(met(choice | {name: at})), draw.random()))
        return choice

    while unmet:
        start = draw.choice(sorted(map(sorted, unmet)))
        best = max((grown(start) for _ in range(10)), key=lambda choice: len(met(choice)))
        unmet -= met(best)
        yield {name: axes[name][best[name]] for name in axes}


def sizes_of(groups: int, tokens: int, ragged: bool) -> dict[str, Any]:
    """Rows and kv heads, few where there is much else; a ragged batch has a full row and a short or empty one."""
    return {
        "batch": 2 if ragged else 1,
        "kv_heads": 1 if groups == 16 else 2,
        "groups": groups,
        "lengths": (tokens, tokens // 3) if ragged else None,
    }
