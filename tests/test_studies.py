"""Studies: what decides a verdict, what is planted, what the page says, and that a run goes on."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest

import kvjax
from experiments import study as command
from experiments.studies import claim as claims
from experiments.studies import measure, page, planted
from experiments.studies.study import Claim, Condition, Entry, Study, at, sized
from kvjax.assets import heldout_text
from kvjax.cache.budget import Prefix
from kvjax.cache.policy import Prompt
from kvjax.calibration.observe import observe
from kvjax.calibration.retrieval_heads import RetrievalHeads
from kvjax.engine.calibrated import Calibrated, load_calibration
from kvjax.errors import UsageError
from kvjax.evaluation.setting import Setting
from kvjax.evaluation.summary import Estimate
from kvjax.models.language_model import LanguageModel
from tests.evaluation.records import record
from tests.evaluation.tiny import tiny

#: Student's t, 97.5 %, as printed in tables.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 15: 2.131, 30: 2.042, 120: 1.980}
CLAIM = Claim("a is better", "1 against 2", "here", "perplexity", "a", "b", "lower")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny(sharpness=3.0)


@pytest.fixture(scope="module")
def tokens(model) -> np.ndarray:
    drawn = np.random.default_rng(0).integers(4, model.config.vocab_size, (2, 48)).astype(np.int32)
    drawn[:, 0] = 0  # <bos>
    return drawn


@pytest.mark.parametrize(("freedom", "printed"), TABLE.items())
def test_quantiles_are_those_of_printed_tables(freedom, printed):
    assert claims.quantile(freedom) == pytest.approx(printed, abs=6e-4)


def test_students_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.3, 2.0, (4000, 5))
    half = TABLE[4] * draws.std(axis=1, ddof=1) / np.sqrt(5)
    found = [claims.student(row.tolist()) for row in draws]
    np.testing.assert_allclose([e.high - e.mean for e in found], half, rtol=3e-4)
    np.testing.assert_allclose([e.mean for e in found], draws.mean(1), atol=1e-12)
    assert np.mean([e.low < 0.3 < e.high for e in found]) == pytest.approx(0.95, abs=0.012)


def test_texts_are_compared_pair_by_pair():
    """Seeds differ a hundred times more than methods do, which pairing takes away; the order of records is free."""
    rng = np.random.default_rng(1)
    level = rng.normal(3.0, 1.0, 5)
    apart = -0.02 + 0.004 * rng.normal(size=5)
    records = [
        record(name, "perplexity-stream", seed, score=None, perplexity=float(np.exp(level[seed] + delta[seed])))
        for name, delta in (("a", apart), ("b", np.zeros(5)), ("c", np.ones(5)))
        for seed in range(5)
    ]
    found = claims.find(CLAIM, [records[i] for i in rng.permutation(len(records))])
    half = TABLE[4] * apart.std(ddof=1) / np.sqrt(5)
    assert found.verdict == "held"
    assert found.difference.mean == pytest.approx(apart.mean(), abs=1e-9)
    assert found.difference.high == pytest.approx(apart.mean() + half, abs=1e-5)
    assert found.against == pytest.approx(np.exp(level.mean()))
    assert claims.spelled(CLAIM, found).startswith(f"{found.method:.2f} against {found.against:.2f}: −")


def test_scores_pool_the_seeds_and_average_the_tasks():
    claim = dataclasses.replace(CLAIM, measure="score", predicted="higher", tasks=("kv", "vt"))
    scores = {"a": {"kv": (1.0, 0.5), "vt": (0.5, 0.5), "copy": (0.0, 0.0)}}
    scores["b"] = {"kv": (0.25, 0.25), "vt": (0.0, 0.0), "copy": (1.0, 1.0)}
    records = [
        record(name, task, seed, score=score, examples=20)
        for name, tasks in scores.items()
        for task, pair in tasks.items()
        for seed, score in enumerate(pair)
    ]
    found = claims.find(claim, records)
    assert (found.method, found.against) == (pytest.approx(0.625), pytest.approx(0.125))

    def limits(p: float, n: int, z: float = 1.959964) -> np.ndarray:
        """Wilson's limits as the two roots of (p - x)² = z² x (1 - x) / n."""
        return np.sort(np.roots([1 + z**2 / n, -(2 * p + z**2 / n), p**2])).real

    def mean(ps: tuple[float, ...]) -> tuple[float, float]:
        """Distances of the limits of a mean from it."""
        away = np.array([np.abs(limits(p, 40) - p) for p in ps])
        return tuple(np.sqrt((away**2).sum(0)) / len(ps))

    (low_a, high_a), (low_b, high_b) = mean((0.75, 0.5)), mean((0.25, 0.0))
    assert found.difference.low == pytest.approx(0.5 - np.hypot(low_a, high_b), abs=1e-6)
    assert found.difference.high == pytest.approx(0.5 + np.hypot(high_a, low_b), abs=1e-6)
    assert claims.spelled(claim, found).startswith("62 % against 12 %: +50 points (+")


@pytest.mark.parametrize(
    ("predicted", "margin", "low", "high", "verdict"),
    [
        ("lower", 0.0, -2, -1, "held"),
        ("lower", 0.0, 1, 2, "did not hold"),
        ("lower", 0.0, -1, 1, "cannot be shown here"),
        ("higher", 0.0, 1, 2, "held"),
        ("higher", 0.0, -2, -1, "did not hold"),
        ("higher", 3.0, -2, -1, "held"),
        ("higher", 1.5, -2, -1, "cannot be shown here"),
        ("lower", 0.5, 1, 2, "did not hold"),
        ("lower", 3.0, 1, 2, "held"),
    ],
)
def test_the_whole_interval_decides(predicted, margin, low, high, verdict):
    claim = dataclasses.replace(CLAIM, predicted=predicted, margin=margin)
    assert claims.verdict(claim, Estimate((low + high) / 2, low, high)) == verdict


def test_what_was_not_measured_decides_nothing():
    with pytest.raises(UsageError, match="'b' has no perplexity"):
        claims.find(CLAIM, [record("a", perplexity=2.0), record("b", perplexity=None)])


def test_planted_outliers_change_keys_and_no_logit(model, tokens):
    made = planted.outlier_channels(model)
    np.testing.assert_array_equal(made.apply(tokens)[0], model.apply(tokens)[0])
    before, after = (np.abs(observe(m, _keys, tokens, np.full(2, 48, np.int32))[1]).max((0, 1)) for m in (model, made))
    assert sorted(np.flatnonzero((after != before).all(0))) == [7, 15, 23, 31], "both channels of two rotary pairs"
    np.testing.assert_array_equal(after[:, [7, 15, 23, 31]], 16 * before[:, [7, 15, 23, 31]])


def test_unshared_heads_compute_the_same_in_wider_keys(model, tokens):
    made = planted.unshared_heads(model)
    np.testing.assert_allclose(made.apply(tokens)[0], model.apply(tokens)[0], atol=2e-5)
    keys = np.asarray(observe(made, _keys, tokens, np.full(2, 48, np.int32))[0])
    assert keys.shape[2] == made.config.num_kv_heads == 4
    np.testing.assert_array_equal(keys[:, :, :2], keys[:, :, [0, 0]])
    assert np.abs(keys[:, :, 1] - keys[:, :, 2]).max() > 0.1


def test_lazy_layers_attend_to_the_first_token_and_add_nothing(model, tokens):
    made = planted.lazy_layers(model)
    assert made.config.num_layers == 4
    np.testing.assert_array_equal(made.apply(tokens)[0], model.apply(tokens)[0])
    mass = [np.asarray(layer) for layer in observe(made, _mass, tokens, np.full(2, 48, np.int32))]
    assert min(layer[..., 0].min() for layer in mass[2:]) > 0.95 * 48 > max(layer[..., 0].max() for layer in mass[:2])


def test_a_model_with_normalised_keys_is_refused(model):
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, qk_norm=True))
    with pytest.raises(UsageError, match="normalised"):
        planted.outlier_channels(other)


def _keys(prompt: Prompt):
    return prompt.step.keys


def _mass(prompt: Prompt):
    return prompt.mass("mean")


@pytest.fixture(scope="module")
def reference() -> LanguageModel:
    return kvjax.load("reference")


@pytest.mark.parametrize("name", command.STUDIES)
def test_every_method_of_a_study_can_have_its_size(name, reference, tmp_path, monkeypatch):
    """What needs no text is sized to the reference model's caches; heads are drawn. A study says what it claims."""
    draws = np.random.default_rng(0)
    monkeypatch.setattr(
        RetrievalHeads,
        "scores",
        lambda _, m, seed: draws.random((2, m.config.num_layers, m.config.num_kv_heads)).astype(np.float32),
    )
    how = measure.How(1, 1, 1, 1, str, None, tmp_path, kvjax.progress.silent)
    for condition in page.load(name).conditions:
        changed = condition.model(reference)
        dims = Setting(condition.context, 32, 16, condition.query_aware).dims(changed)
        for entry in condition.entries:
            try:
                made = measure.build(entry, changed, dims, how)
            except UsageError as error:
                assert "sample" in str(error) or "text" in str(error), "only a calibration without text is refused"
                continue
            assert not isinstance(made, str), made
    assert page.load(name).claims and (page._module(name).__doc__ or "").startswith("Claim: ")


@pytest.fixture
def fake(monkeypatch) -> Study:
    """A study of a tiny model in place of the first one; it has a method that cannot have its size."""
    entries = (Entry("int4"), *sized("prefixkv", 0.5, method="prefixkv:share=0.5"), *sized("snapkv", 0.01))
    made = Study(
        "A paper",
        (Condition("as it is", entries, ("kv",), context=128),),
        (
            Claim("4 bits are near", "near", "as it is", "divergence", "int4", at("prefixkv", 0.5), "lower"),
            Claim("one per cent is enough", "is", "as it is", "score", at("snapkv", 0.01), "full", "higher"),
        ),
    )
    module = types.ModuleType("experiments.studies.kvquant", "Claim: this is fake.\n\nIt says why.")
    module.__dict__["STUDY"] = made
    monkeypatch.setitem(sys.modules, "experiments.studies.kvquant", module)
    return made


@pytest.mark.slow
def test_the_command_measures_once_and_says_what_it_could_not(fake, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kvjax, "load", lambda name: model)
    monkeypatch.setattr("kvjax.evaluation.profile.REPEATS", 2)
    config = command.Config(("kvquant",), seeds=2, examples=2, batch=2, samples=2, out=tmp_path / "run")
    assert command.main(config) == 1, "one method could not be run"
    results = config.out / "kvquant" / "as-it-is" / "results.jsonl"
    lines = results.read_text().splitlines()
    assert sorted({json.loads(line)["method"] for line in lines}) == ["full", "int4", "prefixkv at 50 %"]
    said = capsys.readouterr()
    assert "no snapkv at 1 %: even its smallest budget" in said.err and "cannot be shown" in said.out
    (path,) = (config.out / "calibrations").iterdir()
    made = load_calibration(path)
    made.check(model)
    assert isinstance(made.method.budget, Prefix) and len(made.method.budget.shares) == 2

    monkeypatch.setattr(kvjax, "calibrate", None)
    monkeypatch.setattr(command, "DOCS", tmp_path / "docs")
    again = dataclasses.replace(config, update=True)
    assert command.main(again) == 1 and results.read_text().splitlines() == lines, "nothing was measured again"
    text = (tmp_path / "docs" / page.TEXT).read_text()
    assert text == (config.out / page.TEXT).read_text()
    assert "It says why." in text and "4 examples per task, 2 seeds; questions are seen" in text
    first, second = json.loads((config.out / page.DATA).read_text())["kvquant"]["claims"]
    kl = {m: [r["kl"] for r in map(json.loads, lines) if r["method"] == m] for m in ("int4", "prefixkv at 50 %")}
    assert first["difference"][0] == pytest.approx(np.mean(kl["int4"]) - np.mean(kl["prefixkv at 50 %"]))
    assert second["verdict"] == "cannot be shown here" and "not measured" in second["ours"]


def test_calibrations_of_other_weights_are_passed_over(model, tmp_path, monkeypatch):
    entry = Entry("prefixkv:share=0.5")
    how = measure.How(
        2, 2, 2, 2, lambda: "def f(x): return x\n" * 99, tmp_path, tmp_path / "own", kvjax.progress.silent
    )
    other = kvjax.calibrate(tiny(), entry.label, how.text(), samples=2, length=96, progress=None)
    given = tmp_path / "prefixkv-share=0.5.safetensors"
    other.save(given)
    made = measure.calibrated(entry, model, 96, how)
    assert isinstance(made, Calibrated)
    assert made.model_digest != other.model_digest and [p.name[9:] for p in how.made.iterdir()] == [given.name]
    given.unlink()
    made.save(given)
    monkeypatch.setattr(kvjax, "calibrate", None)
    here = dataclasses.replace(how, made=tmp_path / "none")
    again = measure.calibrated(entry, model, 96, here)
    assert isinstance(again, Calibrated) and again.method == made.method


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    def made(title: str) -> dict:
        info = {"versions": {"jax": "1"}, "start": "2026-11-23T10:00:00", "system": "", "cpu_count": 2}
        claim = {"says": "a | b", "predicted": "lower", "paper": "1", "ours": "2", "verdict": "held"}
        return {"title": title, "model": "m", "command": "c", "info": info, "conditions": [], "claims": [claim]}

    page.write(tmp_path, "razor", made("second"))
    page.write(tmp_path, "kvquant", made("first"))
    page.write(tmp_path, "razor", made("third"))
    text = (tmp_path / page.TEXT).read_text()
    assert "second" not in text and text.index("## kvquant") < text.index("## razor") < text.index("*third.*")
    assert "| [first](#kvquant) | 1 | 0 | 0 |" in text and "a / b" in text


def test_the_committed_page_is_what_the_record_and_the_modules_say():
    outcomes = page.read(command.DOCS / page.DATA)
    assert tuple(outcomes) == command.STUDIES
    assert (command.DOCS / page.TEXT).read_text(encoding="utf-8") == page.markdown(outcomes)
    for name, made in outcomes.items():
        claimed = [(c.says, c.paper, claims.prediction(c)) for c in page.load(name).claims]
        assert claimed == [(c["says"], c["paper"], c["predicted"]) for c in made["claims"]], "none was dropped"


def test_names_are_checked_before_anything_is_loaded():
    assert command.select(("razor", "kvquant")) == ("kvquant", "razor")
    assert command.select(("all",)) == command.STUDIES
    with pytest.raises(UsageError, match="kvquant"):
        command.select(("kvqant",))
    with pytest.raises(UsageError, match="name a study"):
        command.select(())
    with pytest.raises(UsageError, match="at least 2"):
        command.main(command.Config(("all",), seeds=1))


def test_the_text_to_calibrate_on_is_not_the_text_that_is_measured():
    text = command.text(None)
    assert 0.5 * command.TEXT_BYTES < len(text) < 3 * command.TEXT_BYTES and text == command.text(None)
    held_out = {line for line in heldout_text().splitlines() if len(line) >= 40}
    lines = [line for line in text.splitlines() if len(line) >= 40]
    assert sum(line in held_out for line in lines) < 0.01 * len(lines)


def test_the_command_line_is_shown_without_the_paths_of_one_machine(tmp_path):
    config = command.Config(("all",), model=str(tmp_path / "llama"), quick=True, seeds=3, out=tmp_path)
    assert command.command("razor", config) == "kvjax study razor --model llama --quick --seeds 3"
    assert command.command("razor", command.Config(("all",))) == "kvjax study razor"


def test_digests_tell_planted_models_apart(model):
    digests = {measure.weights_digest(m) for m in (model, planted.outlier_channels(model), tiny())}
    assert len(digests) == 3
    assert jax.tree.structure(planted.outlier_channels(model).params) == jax.tree.structure(model.params)
