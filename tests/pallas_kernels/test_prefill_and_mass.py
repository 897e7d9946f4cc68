"""`prefill_attention` and `attention_mass`: the TPU kernels interpreted on the CPU, and what the newer arguments mean.

Interpreted, memory that nobody wrote is NaN, a read out of bounds is an error and a race is found. Rows are poisoned
behind their end for the kernel and clean for the reference.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention_mass import reference as mass_reference
from pallas_kernels.attention_mass import specs as mass_specs
from pallas_kernels.attention_mass import tiles as mass_tiles
from pallas_kernels.attention_mass.api import OP as MASS
from pallas_kernels.attention_mass.specs import MassSpec
from pallas_kernels.compat import interpreted
from pallas_kernels.prefill_attention import reference, specs, walk
from pallas_kernels.prefill_attention.api import OP as PREFILL
from pallas_kernels.prefill_attention.specs import PrefillSpec
from pallas_kernels.testing import assert_close

QUICK = {"xla_backend_optimization_level": 0}
"""Each program runs once: compiling it well takes longer than it saves."""


def cover(**axes: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """A small list of choices in which every two values of every two axes meet; greedy and deterministic."""
    names, draw = list(axes), random.Random(0)
    open_pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }

    def pairs(choice: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, choice[a], b, choice[b]) for a, b in itertools.combinations(names, 2)}

    while open_pairs:
        a, i, b, j = min(open_pairs)
        tries = [{name: draw.randrange(len(axes[name])) for name in names} | {a: i, b: j} for _ in range(200)]
        best = max(tries, key=lambda choice: len(pairs(choice) & open_pairs))
        open_pairs -= pairs(best)
        yield {name: axes[name][at] for name, at in best.items()}


def prefill_spec(name: str, tokens: int, ragged: bool, **rest: Any) -> PrefillSpec:
    return PrefillSpec(name, 2, 2, tokens=tokens, lengths=(tokens, tokens // 3) if ragged else None, **rest)


def mass_spec(name: str, sizes: tuple[int, int, int], ragged: bool, **rest: Any) -> MassSpec:
    tokens, slots, offset = sizes
    return MassSpec(
        name, 2, 2, tokens=tokens, slots=slots, offset=offset, lengths=(slots, slots // 3) if ragged else None, **rest
    )


PREFILL_COVER = [
    prefill_spec(f"cover{i}", **choice)
    for i, choice in enumerate(
        cover(
            tokens=(1, 130, 300),
            head_dim=(64, 96, 256),
            groups=(1, 3, 16),
            temperature=(None, "token", "head"),
            dtype=("float32", "bfloat16"),
            window=(None, 50),
            softcap=(None, 5.0),
            ragged=(False, True),
            selection=(0, 1),
        )
    )
]
MASS_COVER = [
    mass_spec(f"cover{i}", **choice)
    for i, choice in enumerate(
        cover(
            sizes=((1, 1, 0), (300, 300, 0), (37, 200, 37)),
            head_dim=(64, 128, 256),
            groups=(1, 3, 16),
            reduce=("sum", "mean", "max"),
            temperature=(None, "token", "head"),
            dtype=("float32", "bfloat16"),
            window=(None, 50),
            softcap=(None, 5.0),
            ragged=(False, True),
            noise=(False, True),
            own=(False, True),
        )
    )
]


@pytest.fixture
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


def poisoned_prefill(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs, valid = dict(kwargs), kwargs["valid"]
    if "selection" in kwargs:
        kwargs["selection"] = tuple(poisoned(x, valid, 2) for x in kwargs["selection"])
    if "temperature" in kwargs:
        kwargs["temperature"] = poisoned(kwargs["temperature"], valid, kwargs["temperature"].ndim - 1)
    return tuple(poisoned(x, valid, x.ndim - 2) for x in args), kwargs


def poisoned_mass(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (q, k, lse), kwargs, valid = args, dict(kwargs), kwargs["query_valid"]
    if "temperature" in kwargs:
        kwargs["temperature"] = poisoned(kwargs["temperature"], valid, kwargs["temperature"].ndim - 1)
    lse = None if lse is None else poisoned(lse, valid, 3)
    return (poisoned(q, valid, 3), poisoned(k, kwargs["key_valid"], 2), lse), kwargs


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("spec", PREFILL_COVER, ids=lambda spec: spec.name)
def test_prefill_kernel_equals_the_reference(spec: PrefillSpec) -> None:
    args, kwargs = spec.arguments()
    bad_args, bad_kwargs = poisoned_prefill(args, kwargs)
    assert_close(on_tpu(PREFILL, *bad_args, **bad_kwargs), jitted(reference.run, *args, **kwargs))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("spec", MASS_COVER, ids=lambda spec: spec.name)
def test_mass_kernel_equals_the_reference(spec: MassSpec) -> None:
    args, kwargs = spec.arguments()
    bad_args, bad_kwargs = poisoned_mass(args, kwargs)
    assert_close(on_tpu(MASS, *bad_args, **bad_kwargs), jitted(mass_reference.run, *args, **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("spec", specs.SPECS, ids=lambda spec: spec.name)
def test_prefill_kernel_equals_the_reference_everywhere(spec: PrefillSpec) -> None:
    args, kwargs = spec.arguments()
    assert_close(on_tpu(PREFILL, *args, **kwargs), jitted(reference.run, *args, **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("spec", mass_specs.SPECS, ids=lambda spec: spec.name)
def test_mass_kernel_equals_the_reference_everywhere(spec: MassSpec) -> None:
    args, kwargs = spec.arguments()
    assert_close(on_tpu(MASS, *args, **kwargs), jitted(mass_reference.run, *args, **kwargs))
