"""`ModelCache`: room, forks, and what its bytes are."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.layout import CacheDims
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.errors import CacheFullError, UsageError
from tests.cache.driver import Setup, step_of

DIMS = CacheDims(batch=3, kv_heads=2, query_heads=4, head_dim=32, max_length=88, prompt_length=64, dtype="float32")
LENGTHS = (64, 45, 9)


def layers(count: int = 2, **changes: object) -> list[CacheDims]:
    return [dataclasses.replace(DIMS, layer=layer, **changes) for layer in range(count)]


def appended(cache: ModelCache, lengths: tuple[int, ...], tokens: int, seed: int = 0) -> ModelCache:
    """Every row appends its number of at most `tokens` tokens, in every layer."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((3, tokens, n, 32), np.float32) for n in (4, 2, 2)]
    valid = jnp.arange(tokens) < jnp.array(lengths)[:, None]
    done = [_append(Setup(layer.method, layer.dims), layer, arrays, valid) for layer in cache]
    return dataclasses.replace(cache, layers=tuple(done))


@jax.jit(static_argnums=0)
def _append(setup, layer, arrays, valid):
    return layer.step(step_of(setup, arrays, layer.length, valid))[1]


def filled(spec: str, **changes: object) -> ModelCache:
    cache = ModelCache.init(parse(spec), layers(**changes), jnp.array(LENGTHS, jnp.int32))
    return appended(cache, LENGTHS, 64)


@pytest.mark.parametrize(
    ("spec", "room"),
    [
        ("full", [24, 43, 79]),
        ("kivi-2:group=16,residual=16", [24, 43, 79]),
        ("snapkv:tokens=24,window=8", [24, 24, 24]),
    ],
)
def test_room(spec: str, room: list[int]) -> None:
    """A full cache has max_length for every row; where decoded tokens are kept beside a budget, what was reserved."""
    cache = filled(spec)
    assert cache.room().tolist() == room
    assert cache.lengths.tolist() == list(LENGTHS)
    cache.check_room(room)
    assert appended(cache, (1, 0, 1), 1).room().tolist() == [room[0] - 1, room[1], room[2] - 1]


def test_everything_that_fits_in_the_room_is_kept() -> None:
    """`room` is exact: a row that fills it loses nothing."""
    for spec in ("full", "snapkv:tokens=24,window=8"):
        cache = filled(spec)
        kept = [int((layer.body.positions[0, 0] >= 0).sum() + _ring(layer)) for layer in cache]
        for i in range(24):
            cache = appended(cache, (1, 1, 1), 1, seed=i)
        for before, layer in zip(kept, cache, strict=True):
            assert int((layer.body.positions[0, 0] >= 0).sum() + _ring(layer)) == before + 24
        assert cache.room()[0] == 0


def _ring(layer) -> int:
    return 0 if layer.recent is None else int((layer.recent.positions[0, 0] >= 0).sum())


def test_a_full_cache_says_which_row_and_how_much() -> None:
    cache = filled("snapkv:tokens=24,window=8")
    with pytest.raises(CacheFullError) as caught:
        cache.check_room([24, 24, 25])
    message = str(caught.value)
    for fact in ("row 2", "holds 9", "append 25", "room for 33", "max_length"):
        assert fact in message
    with pytest.raises(CacheFullError, match="row 0"):
        cache.check_room(25)
    cache.check_room(24)


def test_an_online_method_decodes_up_to_max_length() -> None:
    assert filled("h2o:tokens=24").room().tolist() == [24, 43, 79]


@pytest.mark.parametrize("spec", ["full", "h2o:tokens=24+int4"])
def test_forks_do_not_share(spec: str) -> None:
    """Two continuations of one context are those of two separate caches; the first is untouched."""
    cache = filled(spec)
    before = jax.tree.map(np.asarray, cache)
    left, right = cache.fork(), cache.fork()
    pointers = [leaf.unsafe_buffer_pointer() for tree in (cache, left, right) for leaf in jax.tree.leaves(tree)]
    assert len(set(pointers)) == len(pointers)
    left, right = appended(left, (1, 1, 1), 1, seed=1), appended(right, (1, 1, 1), 1, seed=2)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), before, jax.tree.map(np.asarray, cache)))
    again = appended(filled(spec), (1, 1, 1), 1, seed=1)
    for ours, theirs in zip(jax.tree.leaves(left), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(left[0].segments[-1].keys, right[0].segments[-1].keys)


def test_effective_bytes_count_slots_in_use() -> None:
    """Of a full cache of 88 slots, 64, 45 and 9 are in use."""
    cache = filled("full")
    slot_bytes = 2 * 2 * 32 * 4 + 4
    assert cache.effective_bytes == 2 * sum(LENGTHS) * slot_bytes
    assert cache.nbytes == 2 * (3 * 88 * slot_bytes + 3 * 3 * 4 + 2 * 4)  # and three counters per row, one per head
    assert cache.full_bytes == 2 * 3 * 88 * 2 * 2 * 32 * 2
    empty = ModelCache.init(parse("full"), layers())
    assert empty.effective_bytes == 0 and empty.nbytes == cache.nbytes


@pytest.mark.parametrize("spec", ["full", "h2o:tokens=24+int4", "kivi-2:group=16,residual=16"])
def test_layers_with_a_window_are_smaller(spec: str) -> None:
    dims = [layers()[0], dataclasses.replace(layers()[1], window=16)]
    cache = ModelCache.init(parse(spec), dims)
    assert cache.layer_bytes == cache.planned_bytes and len(cache) == 2
    if not parse(spec).budget.evicts:
        assert cache.layer_bytes[1] < cache.layer_bytes[0]


def test_room_of_a_model_whose_first_layer_has_a_window() -> None:
    """What a window layer forgets does not change how far the model may go."""
    dims = [dataclasses.replace(layers()[0], window=16), layers()[1]]
    cache = ModelCache.init(parse("snapkv:tokens=24,window=8"), dims, jnp.array(LENGTHS, jnp.int32))
    assert appended(cache, LENGTHS, 64).room().tolist() == [24, 24, 24]
    cache = ModelCache.init(parse("full"), dims, jnp.array(LENGTHS, jnp.int32))
    assert appended(cache, LENGTHS, 64).room().tolist() == [24, 43, 79]


@pytest.mark.parametrize(
    ("spec", "changes", "reason"),
    [
        ("int4:group=24", {}, "24"),
        ("kivi-2:group=48", {}, "48"),
        ("snapkv:tokens=24", {}, "65 tokens or more"),
        ("h2o:tokens=1", {}, "budget"),
    ],
)
def test_a_method_that_does_not_fit_the_model_is_refused(spec: str, changes: dict, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        ModelCache.init(parse(spec), layers(**changes))
