"""Methods that keep every token as codes equal slow NumPy transcriptions of their descriptions: codes and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.codec import QJL, LloydMax, NonUniform, PolarPairs, Sketched
from kvjax.cache.codec.lloyd_max import normal_codebook
from kvjax.cache.codec.polar import angle_codebook
from kvjax.cache.codec.rotation import rotation, sketch
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from tests.cache.driver import Inputs, Run, Setup, dims_of, draw, run
from tests.cache.faithful import GROUPED, TOLERANCE
from tests.cache.parameters import learnt
from tests.oracles import kvquant, lloyd_max, polarquant, qjl, static_scale, turboquant
from tests.oracles.coded_attention import decode_over
from tests.oracles.quantised import encode
from tests.oracles.rotary import rotate_each
from tests.oracles.rounding import as_is, bfloat16_nearest
from tests.oracles.row import Row

LENGTHS = (40, 17, 1)


def inputs_of(query_heads: int, seed: int) -> Inputs:
    """Few numbers, so that a seed exists with which none is close to the border between two codes."""
    return draw(seed, LENGTHS, padded=40, decoded=6, query_heads=query_heads)


def stored(result: Run, b: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [tokens, K, H] of the body in the order of their positions, as they are read (unrotated)."""
    body = result.cache.body
    assert body is not None
    order = np.asarray(body.positions[b, 0])
    slots = [int(np.flatnonzero(order == p)[0]) for p in range(int(order[order >= 0].min()), tokens)]
    return tuple(np.moveaxis(np.asarray(x)[b][:, slots], 0, 1) for x in (body.decoded_keys, body.decoded_values))  # type: ignore[return-value]


def assert_close(actual: Any, expected: np.ndarray, atol: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, atol=atol, rtol=0)


def assert_clear(*margins: np.ndarray) -> None:
    assert min(m.min(initial=1.0) for m in margins) > 2e-6, "the drawn numbers are between two codes: another seed"


def compare(spec: str, query_heads: int, seed: int, transcribe: Callable[[Row, Setup], Any]) -> None:
    """Outputs of all rows; transcribe gives an object with `prompt_output` and `outputs`."""
    inputs = inputs_of(query_heads, seed)
    setup = Setup(parse(spec), dims_of(inputs))
    result = run(setup, inputs)
    for b in range(len(LENGTHS)):
        trace = transcribe(inputs.row(b, setup), setup)
        assert_close(result.prompt_output[b, : LENGTHS[b]], trace.prompt_output)
        assert_close(result.outputs[:, b], np.stack(trace.outputs))


def coded_trace(row: Row, keys: list[np.ndarray], values: list[np.ndarray]) -> kvquant.KvquantTrace:
    """Every token but the one that is decoded is read from keys[h] and values[h] [T, H]."""
    counts = range(row.prompt, row.tokens)
    outputs = decode_over(row, np.stack(keys, axis=1), np.stack(values, axis=1), counts, counts)
    return kvquant.KvquantTrace(row.attention(row.prompt)[0], outputs, None, None)  # type: ignore[arg-type]


@GROUPED
@pytest.mark.parametrize("span", ["layer", "head"])
def test_kvquant(query_heads: int, span: str) -> None:
    """A vector is a token's channels of all heads or, with span=head, each head is a layer of its own."""
    inputs = inputs_of(query_heads, seed=1)
    setup = Setup(parse(f"kvquant-3:outliers=0.05,span={span}"), dims_of(inputs))
    result = run(setup, inputs)
    for b in range(len(LENGTHS)):
        row = inputs.row(b, setup)
        held = stored(result, b, row.tokens)
        for heads in ([0, 1],) if span == "layer" else ([0], [1]):
            check_kvquant(row, setup, heads, *(x[:, heads].reshape(len(x), -1) for x in held))
        keys, values = (np.concatenate([x[:1], y]) for x, y in zip((row.k, row.v), held, strict=True))
        counts = range(row.prompt, row.tokens)
        rotated = rotate_each(keys, np.arange(row.tokens), row.theta)
        assert_close(result.outputs[:, b], np.stack(decode_over(row, rotated, values, counts, counts)))


def check_kvquant(row: Row, setup: Setup, heads: list[int], keys: np.ndarray, values: np.ndarray) -> None:
    """keys, values [T - 1, W] of some heads, as they are read, against the transcription of a layer of these heads."""
    codec = setup.method.keys
    assert isinstance(codec, NonUniform)
    data = [learnt(part, setup.dims, seed) for seed, part in ((1, codec), (2, setup.method.values))]
    forms = [
        kvquant.Form(
            *(x[name][0, 0].astype(np.float64) for name in ("codebook", "levels")), codec.capacity(width), 1, 1, as_is
        )
        for x, width in zip(data, (keys.shape[1], values.shape[1]), strict=True)
    ]
    trace = kvquant.kvquant(
        Row(row.q[:, : len(heads)], row.k[:, heads], row.v[:, heads], row.prompt),
        keys=forms[0],
        key_zero=data[0]["offset"][0, heads].reshape(-1).astype(np.float64),
        key_reach=data[0]["scale"][0, heads].reshape(-1).astype(np.float64),
        values=forms[1],
        value_outlier=lambda values: kvquant.value_outliers(values, outliers=0.05),
        value_affine=kvquant.covering_affine,
        exact_first=1,
        own_coded=False,
    )
    assert trace.keys.gap > 1e-6 and not trace.values.overflow.any()
    assert_clear(trace.keys.margin[1:], trace.values.margin[1:])
    for got, expected in ((keys, trace.keys), (values, trace.values)):
        assert expected.kept[1:].any()
        kept, exact = expected.kept[1:], expected.decoded[1:]
        assert_close(np.where(kept, 0, got), np.where(kept, 0, exact))
        # An outlier is stored as what it adds to its code, in bfloat16: its own size bounds the error of that.
        assert (np.abs(got - exact)[kept] <= 2**-8 * (np.abs(exact[kept]) + 4)).all()


def test_lloyd_max_codebooks() -> None:
    for bits, error in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        density = lloyd_max.normal_density(1)
        expected = lloyd_max.lloyd_max(*density, 2**bits, iterations=300 if bits > 2 else 100)
        np.testing.assert_allclose(normal_codebook(bits), expected, atol=2e-3 if bits > 2 else 1e-6)
        assert lloyd_max.mean_squared_error(*density, normal_codebook(bits)) == pytest.approx(error, rel=1e-3)
    for level in (2, 3, 4):
        expected = polarquant.angle_codebook(level, 2, iterations=300)
        np.testing.assert_allclose(angle_codebook(level, 2), expected, atol=1e-3)


@GROUPED
@pytest.mark.parametrize("bits", [4, 2])
def test_turboquant(query_heads: int, bits: int) -> None:
    def transcribe(row: Row, setup: Setup) -> Any:
        matrix, table = rotation(32, 0).astype(np.float64), normal_codebook(bits) / np.sqrt(32)
        k, parts = row.rotated[1], []
        for x in (k, row.v):
            coded = [turboquant.encode_mse(x[:, h], matrix, table, stored=root_stored) for h in range(2)]
            assert_clear(*(c.margin for c in coded))
            parts.append([c.decoded for c in coded])
        return coded_trace(row, *parts)

    compare(f"turboquant-{bits}", query_heads, 5 if bits == 4 else 1, transcribe)


def root_stored(norm: np.ndarray) -> np.ndarray:
    """The norm over the root of the head size is what is stored."""
    return bfloat16_nearest(norm / np.sqrt(32)) * np.sqrt(32)


@GROUPED
def test_turboquant_for_products(query_heads: int) -> None:
    def transcribe(row: Row, setup: Setup) -> Any:
        matrix, signs = rotation(32, 0).astype(np.float64), sketch(32, 32, 1).astype(np.float64)
        low, high = (normal_codebook(bits) / np.sqrt(32) for bits in (2, 3))
        k, keys, values = row.rotated[1], [], []
        for h in range(2):
            base = turboquant.encode_mse(k[:, h], matrix, low, stored=root_stored)
            rest = k[:, h] - base.decoded
            assert_clear(base.margin, np.abs(rest @ signs.T))
            norms = bfloat16_nearest(np.sqrt((rest**2).sum(axis=1)))
            keys.append(base.decoded + qjl.decode(qjl.signs(rest, signs), norms, signs))
            value = turboquant.encode_mse(row.v[:, h], matrix, high, stored=root_stored)
            assert_clear(value.margin)
            values.append(value.decoded)
        return coded_trace(row, keys, values)

    compare("turboquant_prod-3", query_heads, 1, transcribe)


def keys_of(inputs: Inputs, b: int) -> np.ndarray:
    """Rotated keys [T, K, H] of a row, as many as are whole groups of 8."""
    row = inputs.row(b, Setup(CacheMethod(), dims_of(inputs)))
    return row.rotated[1][: row.tokens // 8 * 8]


def decoded(codec: Any, k: np.ndarray) -> np.ndarray:
    """[T, K, H] as a codec stores k [T, K, H]."""
    x = jnp.asarray(np.moveaxis(k, 1, 0)[None], jnp.float32)
    return np.moveaxis(np.asarray(codec.decode(codec.encode(x)))[0], 0, 1)


@pytest.mark.parametrize("outliers", [0, 4])
def test_qjl_keys(outliers: int) -> None:
    codec = QJL(bits=2, outliers=outliers, outlier_bits=0.5, group=8, seed=3)
    directions, own = sketch(64, 32, 3).astype(np.float64), sketch(16, 32, 4).astype(np.float64)
    k = keys_of(inputs_of(2, seed=6), 0) * np.where(np.arange(32) % 11, 1, 6)
    got = decoded(codec, k)
    for h in range(2):
        expected = qjl.encode_keys(k[:, h], directions, own, group=8, outliers=outliers, stored=bfloat16_nearest)
        used = np.abs(expected.outlier_products) if outliers else np.ones(1)
        assert_clear(np.abs(expected.products), used)
        assert_close(got[:, h], expected.decoded, atol=1e-4)


@GROUPED
def test_qjl(query_heads: int) -> None:
    """Integers for values; a token leaves the window of 16 with its group of 8, keys and values together."""
    inputs = inputs_of(query_heads, seed=3)
    setup = Setup(parse("qjl:bits=2,first_layers=0,group=8,outliers=4,residual=16"), dims_of(inputs))
    result = run(setup, inputs)
    directions, own = sketch(64, 32, 0).astype(np.float64), sketch(16, 32, 1).astype(np.float64)
    for b, prompt in enumerate(LENGTHS):
        row = inputs.row(b, setup)
        counts = [max(0, -(-(t - 24) // 8) * 8) for t in range(prompt, row.tokens)]
        keys, values = row.rotated[1].copy(), row.v.copy()
        for h in range(2):
            old = slice(0, counts[-1])
            coded = qjl.encode_keys(keys[old, h], directions, own, group=8, outliers=4, stored=bfloat16_nearest)
            assert_clear(np.abs(coded.products), np.abs(coded.outlier_products))
            keys[old, h], values[old, h] = coded.decoded, encode(row.v[old, h], 2, 8, 1).decoded
        assert_close(result.outputs[:, b], np.stack(decode_over(row, keys, values, counts, counts)), atol=2e-5)


@GROUPED
def test_polarquant(query_heads: int) -> None:
    def transcribe(row: Row, setup: Setup) -> Any:
        books = [polarquant.angle_codebook(1, 4), *(angle_codebook(level, 2) for level in (2, 3, 4))]
        k, parts = row.rotated[1], []
        for x in (k, row.v):
            coded = [
                polarquant.encode_recursive(x[:, h], rotation(32, 0).astype(np.float64), books, stored=bfloat16_nearest)
                for h in range(2)
            ]
            assert_clear(*(margin for c in coded for margin in c.margins))
            parts.append([c.decoded for c in coded])
        return coded_trace(row, *parts)

    compare("polarquant", query_heads, 2, transcribe)


@pytest.mark.parametrize("angles", ["group", "circle"])
def test_polar_pairs(angles: Any) -> None:
    k = keys_of(inputs_of(2, seed=4), 0)
    got = decoded(PolarPairs(radius_bits=4, angle_bits=2, group=8, angles=angles), k)
    for h in range(2):
        fitted = angles == "group"
        expected = polarquant.encode_pairs(
            k[:, h], radius_bits=4, angle_bits=2, group=8, fitted_angles=fitted, bfloat16=True
        )
        for cells in (expected.radius, expected.angle):
            inner = (cells.exact > 1e-5) & (cells.exact < cells.codes.max() + 1 - 1e-5)
            assert_clear(np.abs(cells.exact - np.round(cells.exact))[inner])
        assert_close(got[:, h], expected.decoded)


@GROUPED
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_static_scales(query_heads: int, kind: str) -> None:
    numbers = None if kind == "int8" else static_scale.float8_numbers(4, 3, infinite=False)

    def transcribe(row: Row, setup: Setup) -> Any:
        return static_scale.static_scale(row, numbers=numbers, lowest=-127, stored=as_is, empty=1.0, own_coded=False)

    compare(f"{kind}_channel", query_heads, 1, transcribe)


def test_products_with_sketches_are_those_of_the_transcription() -> None:
    """A query meets signs, not vectors that were made of them."""
    rng = np.random.default_rng(8)
    x, q = rng.normal(size=(1, 1, 12, 32)), rng.normal(size=(1, 1, 3, 32))
    codec = QJL(bits=3, outliers=0)
    directions = sketch(96, 32, 0).astype(np.float64)
    got = codec.loader(codec.encode(jnp.asarray(x, jnp.float32))).dot(jnp.asarray(q, jnp.float32))
    bits = qjl.signs(x[0, 0], directions)
    norms = bfloat16_nearest(np.sqrt((x[0, 0] ** 2).sum(axis=1)))
    for r in range(3):
        assert_close(got[0, 0, r], qjl.estimate(q[0, 0, r], bits, norms, directions), atol=1e-4)


def test_a_sketch_of_nothing_is_nothing() -> None:
    """Where the inner format is exact, the product form adds zeros."""
    x = jnp.zeros((1, 1, 4, 32))
    assert not np.asarray(decoded(Sketched(LloydMax(2)), np.moveaxis(np.asarray(x)[0], 0, 1))).any()
