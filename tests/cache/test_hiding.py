"""What tokens hide, carried by a cache: the same numbers whatever way the tokens came, and evicting by them."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.budget import AdaptiveHeads, HeadTable, Uniform
from kvjax.cache.codec import Integer
from kvjax.cache.describe import from_json, to_json
from kvjax.cache.hiding import of_prompt, over_prompt
from kvjax.cache.layer_cache import LayerCache
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.plan import layer_bytes
from kvjax.cache.policy import AttentionMass, Given, Hidden, KeyNorm
from kvjax.cache.save import load, save
from kvjax.cache.selector import TopPages
from kvjax.cache.step import Step
from kvjax.errors import UsageError
from pallas_kernels.rope import Rope
from tests.oracles.rotary import rotate_each
from tests.oracles.selective import accumulated, attend, evicted

B, T, LATER, N, K, H, THETA = 3, 20, 6, 4, 2, 16, 100.0
LENGTHS = (20, 13, 1)
SCALE = 0.3
#: Query head 0 reads kv head 1: the one that says what is hidden is not the first.
MAPS = {"in order": None, "crossed": (1, 0, 0, 1)}
INT8 = Integer(bits=8, axis="token", group=None, symmetric=False)
METHODS = {
    "full": CacheMethod(),
    "ring": CacheMethod(sinks=2, recent=5),
    "streaming": CacheMethod(prefill="streaming", recent=3),
    "unrotated": CacheMethod(rotate="read", recent=2),
    "int8": CacheMethod(keys=INT8, values=INT8, recent=4),
    "streaming-int8": CacheMethod(keys=INT8, values=INT8, recent=4, prefill="streaming"),
    "kivi": parse("kivi-4:residual=8,group=8"),
}


@functools.cache
def arrays() -> tuple[np.ndarray, ...]:
    """q [B, T + LATER, N, H], k and v [B, T + LATER, K, H], not rotated."""
    rng = np.random.default_rng(3)
    return tuple(rng.standard_normal((B, T + LATER, heads, H)).astype(np.float32) for heads in (N, K, K))


def rope() -> Rope:
    return Rope(jnp.asarray(THETA ** (-np.arange(0, H, 2) / H), jnp.float32), jnp.float32(1.0))


def step_of(parts: tuple[jax.Array, ...], start: jax.Array, valid: jax.Array, **fields: object) -> Step:
    positions = start[:, None] + jnp.arange(valid.shape[1], dtype=jnp.int32)
    q, k, v = parts
    step = Step(q, k, v, positions, valid, rope(), scale=SCALE, selective=True)
    return dataclasses.replace(step, **fields)


def dims(**fields: object) -> CacheDims:
    return CacheDims(B, K, N, H, T + LATER, T, "float32", **({"selective": True} | fields))  # pyright: ignore[reportArgumentType]


def in_order(reads: tuple[int, ...] | None) -> tuple[int, ...]:
    return tuple(n * K // N for n in range(N)) if reads is None else reads


@functools.partial(jax.jit, static_argnames=("method", "window", "reads", "chunk", "together"))
def run(
    method: CacheMethod, window: int | None, reads: tuple[int, ...] | None, together: int = 1, chunk: int = 5
) -> tuple[jax.Array, jax.Array, LayerCache, LayerCache]:
    """Outputs of the padded prompts [B, T, N, H] and of what follows [B, LATER, N, H], the cache after either."""
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    cache = LayerCache.init(method, dims(window=window), lengths)
    fields = {"window": window, "kv_head_of_query": reads}
    whole = tuple(jnp.asarray(x) for x in arrays())
    size = T if method.prefill == "exact" else chunk

    def advance(cache: LayerCache, start: jax.Array, size: int, rows: jax.Array) -> tuple[LayerCache, jax.Array]:
        """Tokens start .. start + size of rows whose tokens go up to `rows` int32 [B, 1]; padding is the row's last."""
        at = jnp.minimum(start[:, None] + jnp.arange(size), rows - 1)
        parts = tuple(jnp.take_along_axis(x, at[:, :, None, None], axis=1) for x in whole)
        valid = start[:, None] + jnp.arange(size) < rows
        out, cache = cache.step(step_of(parts, cache.length, valid, **fields))
        return cache, out

    def several(cache: LayerCache, starts: jax.Array, size: int, rows: jax.Array) -> tuple[LayerCache, jax.Array]:
        """starts int32 [n, B]."""
        cache, outs = jax.lax.scan(lambda c, start: advance(c, start, size, rows), cache, starts)
        return cache, jnp.moveaxis(outs, 0, 1).reshape(B, -1, N, H)

    starts = jnp.broadcast_to(jnp.arange(0, T, size, dtype=jnp.int32)[:, None], (T // size, B))
    middle, prompt = advance(cache, starts[0], size, lengths[:, None])
    if len(starts) > 1:
        middle, more = several(middle, starts[1:], size, lengths[:, None])
        prompt = jnp.concatenate([prompt, more], axis=1)
    starts = lengths + jnp.arange(0, LATER, together, dtype=jnp.int32)[:, None]
    cache, later = several(middle.end_prompt(), starts, together, lengths[:, None] + LATER)
    return prompt, later, middle, cache


def row(b: int, tokens: int) -> tuple[np.ndarray, ...]:
    """q, k, v of the first tokens of a row, rotated, float64."""
    q, k, v = (x[b, :tokens].astype(np.float64) for x in arrays())
    return rotate_each(q, np.arange(tokens), THETA), rotate_each(k, np.arange(tokens), THETA), v


@pytest.mark.parametrize(
    ("name", "window", "together", "reads"),
    [
        ("full", None, 1, MAPS["crossed"]),
        ("ring", None, 3, None),
        ("streaming", None, 1, None),
        ("streaming", 6, 2, MAPS["crossed"]),
        pytest.param("unrotated", None, 1, None, marks=pytest.mark.slow),
    ],
)
def test_prompts_chunks_and_decoded_tokens_hide_the_same(
    name: str, window: int | None, together: int, reads: tuple[int, ...] | None
) -> None:
    """Exact prefill, streaming prefill, decoding and questions, ragged rows: F, and with it the outputs."""
    prompt, later, middle, cache = run(METHODS[name], window, reads, together)
    head = in_order(reads)
    for b, length in enumerate(LENGTHS):
        q, k, v = row(b, length + LATER)
        hidden = accumulated(q[:, 0], k[:, head[0]], SCALE, window)
        assert middle.hiding is not None and cache.hiding is not None
        np.testing.assert_allclose(middle.hiding[b, :length], hidden[length, :length], atol=2e-5)
        np.testing.assert_allclose(cache.hiding[b, : length + LATER], hidden[-1], atol=2e-5)
        np.testing.assert_array_equal(cache.hiding[b, length + LATER :], 0)
        expected = attend(q, k, v, SCALE, reads=head, window=window)
        np.testing.assert_allclose(prompt[b, :length], expected[:length], atol=1e-5)
        np.testing.assert_allclose(later[b], expected[length:], atol=1e-5)
        if length > 5:
            assert hidden[-1].max() > 1 > np.abs(hidden[0]).max(), "nothing is hidden, so nothing is tested"


def test_a_window_of_a_full_cache_hides_only_what_it_sees() -> None:
    """The cache of a windowed layer drops what no query sees any more; its numbers stop growing there."""
    prompt, later, _, cache = run(METHODS["full"], 6, None)
    for b, length in enumerate(LENGTHS):
        q, k, v = row(b, length + LATER)
        expected = attend(q, k, v, SCALE, reads=in_order(None), window=6)
        np.testing.assert_allclose(later[b], expected[length:], atol=1e-5)
        np.testing.assert_allclose(prompt[b, :length], expected[:length], atol=1e-5)
        assert cache.hiding is not None
        hidden = accumulated(q[:, 0], k[:, 0], SCALE, 6)[-1]
        np.testing.assert_allclose(cache.hiding[b, : length + LATER], hidden, atol=2e-5)


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.05), ("streaming-int8", 0.05), ("kivi", 0.8)])
def test_coded_keys_hide_nearly_the_same(name: str, bound: float) -> None:
    _, _, _, cache = run(METHODS[name], None, None)
    for b, length in enumerate(LENGTHS):
        q, k, _ = row(b, length + LATER)
        assert cache.hiding is not None
        np.testing.assert_allclose(
            cache.hiding[b, : length + LATER], accumulated(q[:, 0], k[:, 0], SCALE)[-1], atol=bound
        )


@pytest.mark.parametrize("reads", MAPS.values(), ids=MAPS.keys())
def test_the_most_hidden_tokens_lose_their_places(reads: tuple[int, ...] | None) -> None:
    budget = 7
    method = parse(f"selective:tokens={budget}")
    _, later, middle, cache = run(method, None, reads)
    head = in_order(reads)
    for b, length in enumerate(LENGTHS):
        q, k, v = row(b, length + LATER)
        moments, hidden = evicted(q[:, 0], k[:, head[0]], SCALE, length, budget)
        for held, expected in ((middle, moments[length]), (cache, moments[-1])):
            found = [int(p) for s in held.segments for p in np.asarray(s.positions[b, 0]) if p >= 0]
            assert sorted(found) == sorted(expected)
            assert {s.positions.shape[1] for s in held.segments} == {1}, "positions are those of all heads"
        assert cache.hiding is not None
        np.testing.assert_allclose(cache.hiding[b, : length + LATER], hidden, atol=2e-5)
        for t in range(length, length + LATER):
            seen = sorted(moments[t] | {t})
            lowered = np.array([_at(q, k, head[0], moments, length, t, s) for s in seen])
            for n in range(N):
                logits = SCALE * k[seen, head[n]] @ q[t, n] - lowered
                weights = np.exp(logits - logits.max())
                expected_out = weights / weights.sum() @ v[seen, head[n]]
                np.testing.assert_allclose(later[b, t - length, n], expected_out, atol=1e-5)


def _at(q: np.ndarray, k: np.ndarray, head: int, moments: list[set[int]], length: int, t: int, s: int) -> float:
    """F[t, s] of a token that is still there: what the prompt's queries asked, and decoded ones that still had it."""
    asked = [max(0.0, SCALE * float(q[i, 0] @ k[s, head])) for i in range(s + 1, t) if s and s in moments[i]]
    return sum(asked)


def test_a_streaming_prompt_evicts_as_it_goes() -> None:
    method = dataclasses.replace(parse("selective:tokens=7"), prefill="streaming")
    _, _, middle, cache = run(method, None, None)
    for held, more in ((middle, 0), (cache, LATER)):
        for b, length in enumerate(LENGTHS):
            found = {int(p) for s in held.segments for p in np.asarray(s.positions[b, 0]) if p >= 0}
            assert len(found) == min(7, length + more) and {0, length + more - 1} <= found


def test_numbers_of_a_prompt_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tuple(jnp.asarray(x[:, :T]) for x in arrays())
    valid = jnp.arange(T) < jnp.asarray(LENGTHS)[:, None]
    spoiled = tuple(jnp.where(valid[..., None, None], x, jnp.nan) for x in parts)
    step = step_of(spoiled, jnp.zeros(B, jnp.int32), valid)
    whole, looked = over_prompt(step, lambda hidden, sees: jnp.where(sees, hidden, 0.0).sum(-1))
    monkeypatch.setattr("kvjax.cache.hiding.CACHE_BYTES", 4 * B * T * 3)
    np.testing.assert_allclose(of_prompt(step), whole, atol=1e-5)
    assert looked is not None
    for b, length in enumerate(LENGTHS):
        q, k, _ = row(b, length)
        hidden = accumulated(q[:, 0], k[:, 0], SCALE)
        np.testing.assert_allclose(whole[b, :length], hidden[-1], atol=1e-5)
        met = np.tril(hidden[:-1]).sum(-1)
        np.testing.assert_allclose(looked[b, :length], met, atol=1e-4)


@pytest.mark.parametrize("spec", ["full", "selective:tokens=7", "int4:group=8"])
def test_bytes_are_those_of_the_plan(spec: str) -> None:
    method, sizes = parse(spec), dims()
    cache = LayerCache.init(method, sizes)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert held == layer_bytes(method, sizes)
    if spec == "full":
        plain = sum(leaf.nbytes for leaf in jax.tree.leaves(LayerCache.init(method, dims(selective=False))))
        assert held - plain == 4 * B * (T + LATER)


def test_a_saved_cache_comes_back(tmp_path) -> None:
    method = parse("selective:tokens=7")
    assert from_json(json.loads(json.dumps(to_json(method))), CacheMethod) == method
    _, _, middle, _ = run(method, None, None)
    cache = ModelCache((middle,), jnp.asarray(LENGTHS, jnp.int32), method)
    save(cache, tmp_path / "cache")
    again, _ = load(tmp_path / "cache")
    jax.tree.map(np.testing.assert_array_equal, cache, again)
    assert np.asarray(middle.hiding).max() > 0


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (CacheMethod(budget=AdaptiveHeads(tokens_kept=8), policy=KeyNorm(), recent=1), "caches of their own size"),
        (
            CacheMethod(budget=HeadTable((Uniform(tokens_kept=8), Uniform(tokens_kept=9)), table=((0, 1),)), recent=1),
            "caches of their own size",
        ),
        (CacheMethod(selector=TopPages(tokens=8, size=4)), "each query may hide"),
        (CacheMethod(budget=Uniform(tokens_kept=8), policy=Given(), recent=1), "repetition"),
    ],
)
def test_what_does_not_go_with_it_is_refused(method: CacheMethod, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LayerCache.init(method, dims())


def test_errors_say_what_is_missing() -> None:
    with pytest.raises(UsageError, match="no selective attention"):
        LayerCache.init(parse("selective:tokens=7"), dims(selective=False))
    parts = tuple(jnp.asarray(x[:, :T]) for x in arrays())
    start, valid = jnp.zeros(B, jnp.int32), jnp.ones((B, T), bool)
    with pytest.raises(UsageError, match="plain attention"):
        LayerCache.init(CacheMethod(), dims(selective=False)).step(step_of(parts, start, valid))
    with pytest.raises(UsageError, match="selective attention"):
        LayerCache.init(CacheMethod(), dims()).step(step_of(parts, start, valid, selective=False))
    with pytest.raises(UsageError, match="softcap"):
        LayerCache.init(CacheMethod(), dims()).step(step_of(parts, start, valid, softcap=5.0))
    mass = CacheMethod(budget=Uniform(tokens_kept=8), policy=AttentionMass(), recent=1, every=1)
    with pytest.raises(UsageError, match="lowers their logits"):
        LayerCache.init(mass, dims()).step(step_of(parts, start, valid))
    assert Hidden().per_head is False
