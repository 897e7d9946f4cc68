"""The TPU kernels of `attention_mass`, interpreted on the CPU: numbers, which tiles they skip, what they decline."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention_mass
from pallas_kernels.attention_mass import GumbelNoise, reference, specs
from pallas_kernels.attention_mass.api import OP
from pallas_kernels.attention_mass.specs import MassSpec
from pallas_kernels.attention_mass.tiles import HIDDEN, IDLE, Summary, Tiles
from pallas_kernels.compat import RaceError, interpreted
from pallas_kernels.testing import assert_close
from tests.pallas_kernels.interpret import cover, heated, jitted, on_tpu, poisoned, sizes_of, small_tiles
from tests.thin import thinned


def covering(name: str, sizes: tuple[int, int, int], groups: int, ragged: bool, **rest: Any) -> MassSpec:
    tokens, slots, offset = sizes
    return MassSpec(name, **sizes_of(groups, slots, ragged), tokens=tokens, slots=slots, offset=offset, **rest)


COVER = [
    covering(f"cover{i}", **choice)
    for i, choice in enumerate(
        cover(
            sizes=((1, 1, 0), (300, 300, 0), (37, 200, 37)),
            head_dim=(64, 256),
            groups=(1, 3, 16),
            reduce=("sum", "mean", "max"),
            over=("sum", "max"),
            temperature=(None, "head"),
            dtype=("float32", "bfloat16"),
            window=(None, 50),
            softcap=(None, 5.0),
            ragged=(False, True),
            noise=(False, True),
            own=(False, True),
        )
    )
]


@pytest.mark.parametrize("spec", thinned(COVER), ids=lambda spec: spec.name)
def test_equals_the_reference(spec: MassSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    assert_close(*poisoned_pair(*spec.arguments()))


@pytest.mark.slow
@pytest.mark.parametrize("spec", specs.SPECS, ids=lambda spec: spec.name)
def test_equals_the_reference_everywhere(spec: MassSpec) -> None:
    assert_close(*poisoned_pair(*spec.arguments()))


def test_slots_may_be_in_any_order_and_have_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a cache that has given up tokens and filled their slots again."""
    small_tiles(monkeypatch)
    args, kwargs = MassSpec("holes", 2, 2, 2, 140, 300, 64, window=130, own=True).arguments()
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(300) for _ in range(2)])
    holes = {"key_positions": jnp.asarray(order, jnp.int32), "key_valid": jnp.asarray(rng.random((2, 300)) < 0.7)}
    assert_close(*poisoned_pair(args, kwargs | holes))


def poisoned_pair(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """What the kernel makes of inputs that are NaN where they are not valid, and the reference of clean ones."""
    (q, k, lse), valid = args, kwargs["query_valid"]
    bad = (poisoned(q, valid, 3), poisoned(k, kwargs["key_valid"], 2), None if lse is None else poisoned(lse, valid, 3))
    return on_tpu(OP, *bad, **heated(kwargs, valid)), jitted(reference.run, *args, **kwargs)


@pytest.mark.parametrize("method", ["live", "clear"])
def test_a_kernel_with_an_error_is_found_out(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: tiles that are partly seen, left out or computed without a mask."""
    small_tiles(monkeypatch)
    other = {"live": Tiles.clear, "clear": Tiles.live}[method]
    monkeypatch.setattr(Tiles, method, other)
    with pytest.raises(AssertionError):
        assert_close(*poisoned_pair(*MassSpec("mutant", 1, 1, 1, 200, 200, 64).arguments()))


@given(st.integers(0, 2**31 - 1), st.sampled_from([None, 1, 30]), st.booleans())
def test_a_tile_is_skipped_only_where_nothing_is_seen(seed: int, window: int | None, ordered: bool) -> None:
    """And is computed without a mask only where all is seen; of positions in order, exactly there."""
    rng, size = np.random.default_rng(seed), 8
    at = {"query": 20 + np.sort(rng.permutation(60)[:24]), "key": np.sort(rng.permutation(80)[:40])}
    if not ordered:
        at = {name: rng.permutation(x) for name, x in at.items()}
    ok = {name: rng.random(x.size) < rng.choice([0.1, 0.9, 1.0]) for name, x in at.items()}
    distance = at["query"][:, None] - at["key"]
    seen = (distance >= 0) & (distance < (window or 100)) & ok["query"][:, None] & ok["key"]
    seen = seen.reshape(24 // size, size, 40 // size, size)

    tiles = Tiles(1, 64, size, size, window, 1.0, None, "sum")
    query = Summary.of(jnp.asarray(np.where(ok["query"], at["query"], IDLE))[None], size)
    key = Summary.of(jnp.asarray(np.where(ok["key"], at["key"], HIDDEN))[None], size)
    query, key = Summary(*(x[0][:, None] for x in query)), Summary(*(x[0][None] for x in key))
    live, clear = (np.asarray(tiles.live(query, key)), np.asarray(tiles.clear(query, key)))
    assert (live >= seen.any((1, 3))).all() and (clear <= seen.all((1, 3))).all()
    if ordered and all(x.all() for x in ok.values()):
        np.testing.assert_array_equal(clear, seen.all((1, 3)))
        assert window is not None or (live == seen.any((1, 3))).all()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (MassSpec("half", 1, 1, 1, 8, 8, 64, dtype="float16"), "not float16"),
        (MassSpec("many", 1, 1, 32, 8, 8, 64), "32 query heads"),
    ],
)
def test_it_says_what_it_does_not_take(spec: MassSpec, reason: str) -> None:
    args, kwargs = spec.arguments()
    with pytest.raises(NotImplementedError, match=reason):
        OP(*args, **kwargs, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", jnp.ones((2, 5)), "temperature must be"),
        ("noise", GumbelNoise(jnp.zeros(2, jnp.uint32), jnp.arange(3)), "head_index must be"),
        ("return_lse", True, "return_lse"),
        ("reduce", "min", "reduce must be one of"),
        ("over", "mean", "over must be one of"),
        ("key_valid", jnp.ones((1, 5), bool), "key_valid must be"),
    ],
)
def test_wrong_requests_are_refused_by_name(name: str, value: Any, message: str) -> None:
    args, kwargs = MassSpec("small", 1, 2, 1, 6, 6, 4).arguments()
    with pytest.raises(ValueError, match=message):
        attention_mass(*args, **(kwargs | {name: value}))


def test_a_race_is_found_in_whichever_kernel_has_it() -> None:
    """The harness itself: a kernel that reads before its copy has arrived, run before one that waits."""

    def copy(wait: bool) -> Any:
        def kernel(source: Any, target: Any, buffer: Any, semaphore: Any) -> None:
            transfer = pltpu.make_async_copy(source, buffer, semaphore)
            transfer.start()
            if wait:
                transfer.wait()
            target[...] = buffer[...]
            if not wait:
                transfer.wait()

        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        )

    x = jnp.ones((8, 128))
    with interpreted():
        np.testing.assert_array_equal(jax.jit(copy(True))(x), x)
    with pytest.raises(RaceError), interpreted():
        jax.block_until_ready(jax.jit(lambda x: copy(True)(copy(False)(x)))(x))
    with interpreted():
        np.testing.assert_array_equal(jax.jit(copy(True))(x), x)
