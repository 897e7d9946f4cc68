"""`calibrate`: what finders find on a tiny model, and what it says where there is nothing to find."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from experiments import calibrate as command
from kvjax.cache.codec import ByLayer, Identity, Integer, LowRank
from kvjax.cache.codec.kmeans import fit_non_uniform
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.policy.predicted import predict
from kvjax.calibration.codebooks import Codebooks, collect
from kvjax.calibration.factors import LowRankFactors, projection
from kvjax.calibration.finder import Task
from kvjax.calibration.gates import Gates
from kvjax.calibration.importance import Importance, _inputs_and_targets
from kvjax.calibration.layer_bits import BITS, PAIRS, LayerBits, Losses
from kvjax.calibration.observe import Pair, _Shifted, observe, sensitivities
from kvjax.calibration.retrieval_heads import RetrievalHeads
from kvjax.calibration.samples import Samples
from kvjax.convert.low_rank import principal_factors, singular_factors
from kvjax.convert.reconstruction import reconstruction_error, train_factors
from kvjax.errors import UsageError
from kvjax.progress import silent
from tests.thin import thinned

LENGTH = 128


@pytest.fixture(scope="module")
def samples(model, text) -> Samples:
    return Samples.of(model, text, 3, LENGTH)


def calibrate(model, method, text, **options):
    return kvjax.calibrate(model, method, text, samples=3, length=LENGTH, progress=None, **options)


def test_windows_are_spread_over_the_text_and_start_as_texts_do(model, text, samples):
    ids, prefix = model.tokenizer.encode(text), model.tokenizer.encode("", special=True)
    assert len(samples) == 3 and (samples.lengths == LENGTH).all()
    size = LENGTH - len(prefix)
    starts = [
        next(i for i in range(0, len(ids), size) if ids[i : i + size] == row[len(prefix) :])
        for row in samples.tokens.tolist()
    ]
    assert starts[0] == 0 and starts[-1] > len(ids) - 2 * size and len(set(starts)) == 3
    assert [row[: len(prefix)] for row in samples.tokens.tolist()] == [prefix] * 3
    short = Samples.of(model, [ids[:40], ids[:64], ids[:5]], 8, 64)
    np.testing.assert_array_equal(short.lengths, [40, 64])
    with pytest.raises(UsageError, match="fewer than"):
        Samples.of(model, "x", 2, 64)
    with pytest.raises(UsageError, match="positions"):
        Samples.of(model, text, 2, 4096)


def test_gradients_are_those_of_the_loss(model, samples):
    """Along a random direction they are the loss's difference quotient; padding and other rows do not matter."""
    tokens, lengths = samples.tokens[:2, :32], np.array([32, 20], np.int32)
    seen, gradients = sensitivities(model, tokens, lengths)
    valid = np.arange(32) < lengths[:, None]
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda g: jnp.asarray(rng.standard_normal(g.shape), jnp.float32), gradients)

    @jax.jit
    def loss(size):
        caches = [_Shifted(jnp.zeros(2, jnp.int32), size * d.keys, size * d.values) for d in direction]
        logits, _ = model.apply(jnp.asarray(tokens), None, caches, jnp.asarray(valid))
        surprisal = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
        return sum(surprisal[row, : n - 1].mean() for row, n in enumerate(lengths))

    slope = sum(float(jnp.vdot(a, b)) for a, b in zip(*map(jax.tree.leaves, (gradients, direction)), strict=True))
    step = 3e-3
    np.testing.assert_allclose((float(loss(step)) - float(loss(-step))) / (2 * step), slope, rtol=2e-2)
    assert all(not np.asarray(g)[1, 20:].any() for g in jax.tree.leaves(gradients))
    exact = observe(model, _stored, tokens, lengths)
    for a, b in zip(jax.tree.leaves(seen), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(np.asarray(a)[valid], np.asarray(b)[valid], atol=1e-5)


def _stored(prompt):
    return Pair(prompt.step.keys, prompt.step.values)


def test_codebooks(model, text, samples):
    """They are the fit to every token but the first of each sample, with squared gradients as weights."""
    method = parse("kvquant-3")
    numbers, fisher = collect(Task(model, method, samples, 1, 0, silent))
    assert numbers[0].keys.shape == (3 * (LENGTH - 1), 2, 16)
    seen, gradients = sensitivities(model, samples.tokens[:1], samples.lengths[:1])
    np.testing.assert_allclose(numbers[1].values[: LENGTH - 1], np.asarray(seen[1].values)[0, 1:], atol=1e-5)
    np.testing.assert_allclose(fisher[1].keys[: LENGTH - 1], np.asarray(gradients[1].keys)[0, 1:] ** 2, rtol=1e-3)
    found = calibrate(model, "kvquant-3", text, finders=[Codebooks(weighting="plain", match_moments=True)])
    expected = fit_non_uniform(
        method.values,
        numbers[1].values,
        fisher[1].values,
        weighting="plain",
        match_moments=True,  # type: ignore[arg-type]
    )
    for name, array in expected.items():
        np.testing.assert_allclose(found.layers[1].values[name], array, rtol=1e-4)
    ids = kvjax.generate(model, text[:200], found, max_new_tokens=4).tokens[0]
    assert ids and all(0 <= token < 1024 for token in ids)


def test_factors_rebuild_keys_best_from_principal_directions(model, samples):
    """Training from other factors comes closer, and never past the best; coded latents gain by training."""
    finder = LowRankFactors()
    task = Task(model, parse("cskv"), samples, 1, 0, silent)
    numbers, magnitudes = finder._collect(task)
    x = numbers[1].keys
    hidden = np.abs(np.asarray(observe(model, _hidden, samples.tokens, samples.lengths)[1])).mean((0, 1))
    np.testing.assert_allclose(magnitudes[1], hidden, rtol=1e-4)
    exact = LowRank(Identity(), 0.5, 4)
    best = principal_factors(np.einsum("tkh,tlj->khlj", x, x) / len(x), 16)
    first = singular_factors(projection(task, 1, "k"), 16)
    trained = train_factors(exact, first, x, steps=60, rate=1e-2)
    errors = [reconstruction_error(exact, factors, x) for factors in (first, trained, best)]
    assert errors[0] > 1.02 * errors[1] and errors[1] >= errors[2] * (1 - 1e-5)
    left = np.linalg.eigvalsh(
        np.cov(x.reshape(len(x), -1).T, bias=True) + np.outer(*[x.reshape(len(x), -1).mean(0)] * 2)
    )
    flat = x[: len(x) // 4 * 4]
    np.testing.assert_allclose(errors[2], left[:16].sum() * len(x) / (flat**2).sum(), rtol=0.05)


def test_training_with_codes_in_the_loop():
    """The best factors for exact latents are not the best for coded ones."""
    rng = np.random.default_rng(0)
    spread, turn = np.geomspace(4, 0.1, 32), np.linalg.qr(rng.standard_normal((32, 32)))[0]
    x = ((rng.standard_normal((1024, 32)) * spread) @ turn).reshape(-1, 2, 16).astype(np.float32)
    best = principal_factors(np.einsum("tkh,tlj->khlj", x, x) / len(x), 16)
    coded = LowRank(Integer(4, "token"), 0.5, 4)
    aware = train_factors(coded, best, x, steps=150, rate=1e-2)
    assert reconstruction_error(coded, aware, x) < 0.97 * reconstruction_error(coded, best, x)


def _hidden(prompt):
    return prompt.step.hidden


def test_start_of_factors(model, text):
    with pytest.raises(UsageError, match="start of the factors"):
        LowRankFactors(start="random")  # type: ignore[arg-type]
    biased = dataclasses.replace(model, config=dataclasses.replace(model.config, qkv_bias=True))
    with pytest.raises(UsageError, match="start from 'principal'"):
        projection(SimpleNamespace(model=biased), 0, "k")  # type: ignore[arg-type]
    found = calibrate(model, "cskv", text, finders=[LowRankFactors(start="asvd")])
    assert found.layers[0].keys["encoder"].shape == (1, 1, 32, 8)


@pytest.mark.parametrize("hidden", thinned([8, 0]))
def test_the_network_predicts_attention_of_texts_it_has_seen(model, text, samples, hidden):
    method = f"kvzap:tokens=64,recent=8,hidden={hidden}"
    found = calibrate(model, method, text, finders=[Importance(steps=300, rate=1e-2, behind=30)])
    for layer, (x, y) in zip(
        found.layers, observe(model, _inputs_and_targets, samples.tokens, samples.lengths), strict=True
    ):
        got = np.asarray(predict(layer.policy, x)).swapaxes(1, 2)[:, :-30]
        rest, spread = got - np.asarray(y)[:, :-30], np.asarray(y)[:, :-30]
        assert rest.var() < 0.9 * spread.var() and abs(rest.mean()) < 0.1 * spread.std()


TABLES = ["razor:local=16", "simlayerkv:recent=16", "prefixkv:share=50%", "duo_attention:recent=16,sinks=4"]


@pytest.mark.parametrize("spec", thinned(TABLES))
def test_tables_and_shares(model, text, spec):
    finders = [RetrievalHeads(induction_share=0.5), Gates(steps=3)]
    found = calibrate(model, spec, text, finders=finders)
    before, budget = parse(spec), found.method.budget
    assert dataclasses.replace(found.method, budget=before.budget) == before
    assert budget != before.budget and found.notes
    assert not jax.tree.leaves(found.layers)
    if "razor" in spec:
        chosen = np.array(budget.table) == 0
        assert chosen.shape == (2, 2) and 2 <= chosen.sum() <= 3
    if "duo" in spec:
        assert np.shape(budget.table) == (2, 2) and (np.array(budget.table) == 0).any()
    if "prefix" in spec:
        assert len(budget.shares) == 2 and sum(budget.shares) == pytest.approx(1, abs=1e-5)
    assert kvjax.generate(model, text[:300], found, max_new_tokens=3).tokens[0]


BY_CHANNEL = CacheMethod(
    name="by channel",
    keys=ByLayer((Integer(8, "channel", 16), Integer(4, "channel", 16))),
    values=ByLayer((Integer(4, "token", 8), Integer(2, "token", 8))),
    recent=16,
)


def bits_of(found):
    """(bits of keys, bits of values) of every layer of a calibration."""
    return [tuple(codec.bits for codec in pair) for pair in zip(*(c.codecs for c in found.method.codecs), strict=True)]


@pytest.mark.parametrize(
    "method", thinned([parse("kvtuner:table=k8v4-k4v2,mode=token"), BY_CHANNEL]), ids=["token", "channel"]
)
def test_bits_of_each_layer_are_the_best_for_what_they_take(model, text, samples, method, tmp_path):
    """The errors are those of the samples' outputs; the table found loses no more than any other of its bits."""
    found = calibrate(model, method, text)
    bits = bits_of(found)
    assert len(bits) == 2 and np.mean(bits) <= 4.5
    assert dataclasses.replace(found.method, keys=method.keys, values=method.values) == method
    kinds = {(codec.axis, codec.group) for codec in found.method.keys.codecs}
    assert kinds == {(codec.axis, codec.group) for codec in method.keys.codecs}
    look = Losses(*(tuple(dataclasses.replace(c.codecs[0], bits=b) for b in BITS) for c in method.codecs))
    sums = [np.asarray(layer).sum(0) for layer in observe(model, look, samples.tokens, samples.lengths)]
    errors = [np.sqrt(layer[1:] / layer[0]).reshape(3, 3) for layer in sums]

    def lost(table):
        return sum(e[BITS.index(k), BITS.index(v)] for e, (k, v) in zip(errors, table, strict=True))

    def best(limit):
        return min(lost(pair) for pair in itertools.product(PAIRS, repeat=2) if np.mean(pair) <= limit)

    assert lost(bits) <= best(4.5) * (1 + 1e-5) < lost([(8, 4), (4, 2)]) * (1 + 1e-5)
    fewer = bits_of(calibrate(model, method, text, finders=[LayerBits(mean_bits=2.5)]))
    assert sorted(map(sum, fewer)) == [4, 6] and lost(fewer) <= best(2.5) * (1 + 1e-5), "keys and values differ"
    found.save(tmp_path / "bits.safetensors")
    assert kvjax.load_calibration(tmp_path / "bits.safetensors").method == found.method
    assert kvjax.generate(model, text[:300], found, max_new_tokens=3).tokens[0]


def test_errors_of_a_layer_know_no_padding_and_no_other_rows(model, samples):
    """A shorter row changes the same alone, and no more than its own tokens do."""
    keys, values = (Integer(2, "channel", 32),), (Integer(2, "token", 8),)
    lengths = np.array([LENGTH, 50], np.int32)
    both = observe(model, Losses(keys, values), samples.tokens[:2], lengths)[1]
    other = np.where(np.arange(64) < 50, samples.tokens[1:2, :64], 7)
    alone = observe(model, Losses(keys, values), other, lengths[1:])[1]
    np.testing.assert_allclose(both[1], alone[0], rtol=1e-4)
    assert both[0, 1] > 0


def test_gates_fall_where_they_cost_nothing(model, samples):
    """A head whose window holds everything is the same with and without its gate: only the pressure acts."""
    task = Task(model, parse("duo_attention:recent=16,sinks=4"), samples, 1, 0, silent)
    gates = Gates(steps=12, rate=0.1, recent=LENGTH - 5).train(task)
    assert gates.shape == (2, 2) and (gates < 0.3).all() and (gates >= 0).all()
    held = Gates(steps=12, rate=0.1, pressure=0.0).train(task)
    assert held.max() > gates.max(), "answers need what a short window does not hold"


def test_batches_do_not_change_what_is_found(model, text):
    one, two = (calibrate(model, "kvquant-2", text, batch=n) for n in (1, 2))
    for a, b in zip(jax.tree.leaves(one.layers), jax.tree.leaves(two.layers), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_parts_are_calibrated_together(model, text):
    found = calibrate(model, "duo_attention:recent=16,sinks=4+kvquant-4:span=head", text, finders=[Gates(steps=3)])
    assert np.shape(found.method.budget.table) == (2, 2) and found.layers[0].keys["scale"].shape == (1, 2, 16)


def test_what_cannot_be_calibrated(model, text):
    with pytest.raises(UsageError, match="nothing to calibrate"):
        calibrate(model, "int4", text)
    with pytest.raises(UsageError, match="none was given"):
        calibrate(model, "kvquant-4", None)
    with pytest.raises(UsageError, match="would seem lazy"):
        calibrate(model, "simlayerkv", text)
    with pytest.raises(UsageError, match="nothing to share"):
        calibrate(model, "prefixkv:tokens=512", text)
    with pytest.raises(UsageError, match="no longer"):
        calibrate(model, "duo_attention", text)
    with pytest.raises(UsageError, match="the limit is 1"):
        calibrate(model, BY_CHANNEL, text, finders=[LayerBits(mean_bits=1.0)])
    with pytest.raises(UsageError, match="not divisible by group 32"):
        calibrate(model, "kvtuner", text)
    mixed = CacheMethod(keys=ByLayer((Integer(8), Integer(4, group=8))), values=ByLayer((Integer(4),)))
    with pytest.raises(UsageError, match="differ between layers in nothing else"):
        calibrate(model, mixed, text)


def test_the_command(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kvjax, "load", lambda name: model)
    out = tmp_path / "razor.safetensors"
    command.main(command.Config("razor:local=16", out=out, induction_share=0.5))
    assert "retrieval heads" in capsys.readouterr().out
    assert kvjax.load_calibration(out).method.name == "razor:local=16"
    with pytest.raises(UsageError, match="ends with"):
        command.main(command.Config("razor", out=tmp_path / "razor.json"))
    with pytest.raises(UsageError, match="cannot read the text"):
        command.read(str(tmp_path / "none.txt"))
    assert command.file_name("cskv:bits=4/x") == "cskv-bits=4-x"
