"""Windows that retrieve pages by a probe query read what the transcription reads, layer by layer (ActQKV)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.method import CacheMethod
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.selector import ProbedPages
from kvjax.cache.selector.probed_pages import Probed
from kvjax.typing import Array
from tests.cache.driver import QUICK, Inputs, Setup, dims_of, draw, run, step_of
from tests.cache.faithful import GROUPED, TOLERANCE
from tests.oracles.actqkv import activation_bias, block_keys, block_scores, cutoffs, entropy, probe, retrieved
from tests.oracles.attention import contiguous
from tests.oracles.row import Row

SINKS, RECENT, PAGE, CHUNK = 2, 6, 4, 8
BIASES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "norm": functools.partial(activation_bias, kind="norm"),
    "channels": functools.partial(activation_bias, kind="z-score"),
    "mean": lambda queries: np.zeros(len(queries)),
}


def method_of(selector: ProbedPages, prefill: str = "streaming") -> CacheMethod:
    return CacheMethod(selector=selector, sinks=SINKS, recent=RECENT, prefill=prefill)


def page_scores(row: Row, window: range, kind: str) -> list[np.ndarray]:
    """Per kv head [M], of the pages that the body holds before the window: keys and queries before rotary embedding."""
    body = slice(SINKS, max(window.start - RECENT, SINKS))
    reads = contiguous(row.q.shape[1], row.kv_heads)
    found: list[np.ndarray] = []
    for head in range(row.kv_heads):
        if body.start == body.stop:
            found.append(np.zeros(0))
            continue
        pages = block_keys(row.k[body, head], PAGE)
        group = [n for n, k in enumerate(reads) if k == head]
        queries = [row.q[window.start : window.stop, n] for n in group]
        bias = [BIASES[kind](q) if len(q) > 1 else np.zeros(1) for q in queries]
        probes = [probe(q, a, anchors=None) for q, a in zip(queries, bias, strict=True)]
        found.append(np.max([block_scores(p, pages) for p in probes], axis=0) * row.q.shape[-1] ** -0.5)
    return found


def outputs_of(row: Row, window: range, scores: list[np.ndarray], places: int) -> np.ndarray:
    """[m, N, H]: what the window's tokens attend to, if each head reads that many pages."""
    held = []
    for mine in scores:
        chosen, gap = retrieved(mine, places) if places < len(mine) else (range(len(mine)), np.inf)
        assert gap > 1e-6
        pages = {SINKS + m * PAGE + i for m in chosen for i in range(PAGE)}
        pages = {p for p in pages if p < window.start - RECENT}
        recent = range(max(SINKS, window.start - RECENT), window.start)
        held.append(sorted(pages | set(recent) | set(range(min(SINKS, window.start)))))
    return np.stack([row.attend_held(t, [[*h, *range(window.start, t + 1)] for h in held])[0] for t in window])


def windows(prompt: int, tokens: int) -> Iterator[range]:
    """Chunks of the prompt, then decoded tokens."""
    yield from (range(start, min(start + CHUNK, prompt)) for start in range(0, prompt, CHUNK))
    yield from (range(t, t + 1) for t in range(prompt, tokens))


@GROUPED
@pytest.mark.parametrize("kind", ["norm", *(pytest.param(x, marks=pytest.mark.slow) for x in ("channels", "mean"))])
def test_a_window_reads_the_pages_of_its_probe(kind: str, query_heads: int) -> None:
    inputs = draw(7, (40, 21), padded=40, decoded=8, query_heads=query_heads)
    selector = ProbedPages(tokens=8, size=PAGE, probe=kind, cutoff="uniform")
    setup = Setup(method_of(selector), dims_of(inputs), chunk=CHUNK)
    result = run(setup, inputs)
    for b, prompt in enumerate(inputs.lengths):
        row = inputs.row(b, setup)
        for window in windows(prompt, row.tokens):
            expected = outputs_of(row, window, page_scores(row, window, kind), places=2)
            decoded = window.start >= prompt
            ours = result.outputs[[window.start - prompt], b] if decoded else result.prompt_output[b, list(window)]
            np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0, err_msg=f"row {b}, {window}")


def test_a_question_after_an_exact_prompt_is_a_window() -> None:
    """Its probe is made of all its queries; the prompt itself has read everything."""
    inputs = draw(8, (40, 21), padded=40, decoded=8, query_heads=4)
    setup = Setup(method_of(ProbedPages(tokens=8, size=PAGE), "exact"), dims_of(inputs), together=8)
    result = run(setup, inputs)
    for b, prompt in enumerate(inputs.lengths):
        row, window = inputs.row(b, setup), range(prompt, prompt + 8)
        np.testing.assert_allclose(result.prompt_output[b, :prompt], row.attention(prompt)[0], atol=TOLERANCE, rtol=0)
        expected = outputs_of(row, window, page_scores(row, window, "norm"), places=2)
        np.testing.assert_allclose(result.outputs[:, b], expected, atol=TOLERANCE, rtol=0)


def layers_of(query_heads: int) -> list[Inputs]:
    """Three layers whose attention is spread very differently."""
    layers = []
    for seed, sharpness in ((1, 0.5), (2, 4.0), (3, 8.0)):
        inputs = draw(seed, (40, 21), padded=40, decoded=8, query_heads=query_heads)
        layers.append(dataclasses.replace(inputs, q=sharpness * inputs.q))
    return layers


@GROUPED
def test_layers_share_out_what_they_read_by_the_window_before(query_heads: int) -> None:
    layers = layers_of(query_heads)
    method = method_of(ProbedPages(tokens=8, size=PAGE, most=8.0))
    dims = [dataclasses.replace(dims_of(inputs), layer=i, layers=3) for i, inputs in enumerate(layers)]
    setups = [Setup(method, d) for d in dims]
    lengths = np.array(layers[0].lengths, np.int32)
    cache = ModelCache.init(method, dims, jnp.asarray(lengths))
    rows = [[inputs.row(b, setup) for inputs, setup in zip(layers, setups, strict=True)] for b in range(2)]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def advance(cache: ModelCache, arrays: list[tuple[Array, ...]], valid: Array) -> tuple[ModelCache, list[Array]]:
        done = [
            layer.step(step_of(setup, mine, layer.length, valid))
            for layer, setup, mine in zip(cache, setups, arrays, strict=True)
        ]
        return cache.stepped([layer for _, layer in done]), [output for output, _ in done]

    places = np.full((2, 3), 2)
    counts = set()
    for start in range(0, 40, CHUNK):
        valid = start + np.arange(CHUNK) < lengths[:, None]
        arrays = [tuple(x[:, start : start + CHUNK] for x in inputs.prompt()) for inputs in layers]
        cache, outputs = advance(cache, arrays, valid)
        for b in np.flatnonzero(valid.any(1)):
            window = range(start, min(start + CHUNK, int(lengths[b])))
            scores = [page_scores(row, window, "norm") for row in rows[b]]
            for row, mine, output, number in zip(rows[b], scores, outputs, places[b], strict=True):
                expected = outputs_of(row, window, mine, number)
                np.testing.assert_allclose(output[b, : len(window)], expected, atol=TOLERANCE, rtol=0)
            if len(scores[0][0]):
                spread = np.array([np.mean([entropy(head) for head in mine]) for mine in scores])
                places[b] = cutoffs(spread, total=6)
            counts.add(tuple(places[b]))
        for layer, index in enumerate(one.index for one in cache):
            np.testing.assert_array_equal(index.places, np.repeat(places[:, [layer]], 2, axis=1))
    assert len(counts) > 1, "layers come to read different numbers"


def test_no_layer_reads_more_than_is_allocated_and_nothing_is_wasted() -> None:
    """What one layer may not have goes to the others; without any spread all get the same."""
    selector = ProbedPages(tokens=16, size=4, most=1.5)

    def settle(*spread: float) -> list[int]:
        made = [Probed(jnp.zeros((1, 2, 32, 8)), jnp.full((1, 2), x), jnp.full((1, 2), 4)) for x in spread]
        return [int(index.places[0, 1]) for index in selector.settled(made)]

    assert settle(0.0, 0.0, 0.0) == [4, 4, 4]
    assert settle(1.0, 1.0, 10.0) == [3, 3, 6]
    assert settle(0.0, 10.0, 10.0) == [0, 6, 6]
    assert settle(1.0, 2.0, 3.0) == [2, 4, 6]
    assert settle(1.0, 1.0, 2.0) == [3, 3, 6]
