"""The class-incremental study: its stream, its measures, its encoders, and a run that is far too small."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bottleneck as command
from experiments.continual import encoders, measure, patches, report
from experiments.continual.heads import Contender, Hidden, KeySettings, Linear, bottleneck, find_keys
from experiments.continual.stream import Outcome, Stream, batches, choose, class_means, learn_jointly, learn_stream
from kvjax.errors import UsageError
from kvjax.models.bottleneck import BottleneckConfig
from kvjax.models.vit import VisionTransformer
from kvjax.tasks.images import image_batch

TINY = command.Size(seeds=2, train=8, test=4, passes=1, encoder_steps=2, patch_images=8, patch_entries=5)
CLASSES, WIDTH = 4, 6


@pytest.fixture(scope="module")
def stream() -> Stream:
    """Four clusters far apart, two tasks."""
    rng = np.random.default_rng(0)
    centres = 4 * rng.standard_normal((CLASSES, WIDTH)).astype(np.float32)

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(CLASSES, dtype=np.int32), count)
        return centres[labels] + 0.3 * rng.standard_normal((len(labels), WIDTH), np.float32), labels

    return Stream(drawn(24), drawn(8), ((0, 1), (2, 3)), batch=8, passes=4)


def keyed(stream: Stream) -> Contender:
    keys = find_keys(jax.random.key(0), jnp.asarray(stream.train[0]), KeySettings(8, 8, 3, 2, 32))
    return bottleneck("bottleneck", BottleneckConfig(CLASSES, 8, 8), keys)


def test_forgetting_is_what_was_best_less_what_is_left() -> None:
    nan = np.nan
    found = Outcome(np.array([[0.9, nan, nan], [0.95, 0.8, nan], [0.5, 0.7, 1.0]]), joint=0.9)
    assert found.forgetting == pytest.approx(((0.95 - 0.5) + (0.8 - 0.7)) / 2)
    assert found.seen == pytest.approx([0.9, 0.875, 2.2 / 3]) and found.final == pytest.approx(2.2 / 3)


def test_a_pass_shows_every_image_of_the_task_once(stream: Stream) -> None:
    rows = np.arange(5, 29)
    order = batches(rows, stream, np.random.default_rng(0))
    assert order.shape == (12, 8)
    for one_pass in order.reshape(4, -1):
        np.testing.assert_array_equal(np.sort(one_pass), rows)
    assert (order[:3] != order[3:6]).any(), "in another order each time"


def test_a_task_moves_nothing_by_images_of_another(stream: Stream) -> None:
    """After the first task a head knows its classes only, and answers with them for everything."""
    found = learn_stream(Contender("probe", Linear(WIDTH, CLASSES), (0.1,)), stream, 0, 0.1)
    assert np.isnan(found[0, 1]) and found[0, 0] == 1
    changed = (stream.train[0].copy(), stream.train[1])
    changed[0][np.isin(stream.train[1], (2, 3))] = 1e6
    again = learn_stream(
        Contender("probe", Linear(WIDTH, CLASSES), (0.1,)), dataclasses.replace(stream, train=changed), 0, 0.1
    )
    assert again[0, 0] == found[0, 0]


def test_a_bottleneck_keeps_what_a_linear_probe_forgets_where_clusters_are_apart(stream: Stream) -> None:
    probe = learn_stream(Contender("probe", Linear(WIDTH, CLASSES), (1.0,)), stream, 0, 1.0)
    kept = learn_stream(keyed(stream), stream, 0, 8.0)
    assert kept[1, 0] == 1 and kept[1, 1] == 1
    assert Outcome(kept, 1.0).forgetting <= Outcome(probe, 1.0).forgetting
    assert learn_jointly(Contender("MLP", Hidden(WIDTH, 16, CLASSES), (0.1,)), stream, 0, 0.1) == 1


def test_rates_are_chosen_for_each_way_of_training(stream: Stream) -> None:
    contender = Contender("probe", Linear(WIDTH, CLASSES), (0.0, 0.1))
    assert choose(contender, stream, 0) == (0.1, 0.1), "without steps all classes are the first"


def test_class_means_equal_a_search_over_known_classes(stream: Stream) -> None:
    found = class_means(stream)
    (features, labels), (tested, wanted) = stream.train, stream.test
    for at, known in enumerate(((0, 1), (0, 1, 2, 3))):
        means = {label: features[labels == label].mean(0) for label in known}
        answers = np.array([min(known, key=lambda c: ((x - means[c]) ** 2).sum()) for x in tested])
        for before in range(at + 1):
            mine = np.isin(wanted, stream.tasks[before])
            assert found.accuracy[at, before] == (answers == wanted)[mine].mean()
    assert np.isnan(found.accuracy[0, 1])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> command.Config:
    monkeypatch.setattr(command, "QUICK", TINY)
    return command.Config(quick=True, encoder="patches", codebooks=4, pairs=4, key_dim=2, hidden=5, batch=4)


@pytest.mark.parametrize("encoder", ["patches", pytest.param("vit", marks=pytest.mark.slow)])
def test_a_tiny_run_writes_a_table_and_all_its_numbers(encoder, tiny, tmp_path: Path, capsys) -> None:
    config = dataclasses.replace(tiny, encoder=encoder, out=tmp_path / "run")
    command.main(config)
    text = (config.out / "results.md").read_text()
    assert text.strip() in capsys.readouterr().out
    record = json.loads((config.out / "results.json").read_text())
    assert set(record["heads"]) == {line.split(" | ")[0][2:] for line in text.splitlines() if " ±" in line}
    assert len(record["heads"]) == 6 and str(tmp_path) not in json.dumps(record)
    for head in record["heads"].values():
        assert len(head["seeds"]) == 2
        for seed in head["seeds"]:
            assert [[x is None for x in row] for row in seed["accuracy"]] == np.triu(np.ones((3, 3), bool), 1).tolist()


def test_a_stream_is_what_the_encoder_has_not_seen_in_an_order_of_its_own(tiny: command.Config) -> None:
    def ours(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1)

    raw = encoders.Encoder(ours, np.zeros(1, np.float32), np.ones(1, np.float32), "pixels")
    first, again, other = (measure.draw(tiny, tiny.stream_classes(), raw, seed) for seed in (0, 0, 1))
    assert first.tasks == ((0, 1), (2, 3), (4, 5)) and first.classes == 6
    np.testing.assert_array_equal(first.train[0], again.train[0])
    assert (first.train[0] != other.train[0]).any() and (first.train[0][:4] != first.test[0][:4]).any()
    order = np.random.default_rng(0).permutation(tiny.stream_classes())
    expected = image_batch([0, measure.TRAIN, int(order[2])], 8, (int(order[2]),), encoders.STYLES["clean"])[0]
    np.testing.assert_array_equal(first.train[0][first.train[1] == 2], ours(expected))


def test_features_of_the_vision_transformer_are_what_its_classifier_reads(tiny, monkeypatch) -> None:
    """The features times the head that was taken off are the logits."""
    seen = []
    real = encoders._trained

    def keep(*arguments):
        seen.append((arguments[0], real(*arguments)))
        return seen[0][1]

    monkeypatch.setattr(encoders, "_trained", keep)
    raw, note = encoders.vision_transformer(tiny, encoders.STYLES["clean"])
    model, params = seen[0]
    images, labels = encoders._batch(tiny, encoders.STYLES["clean"], 5, 9)
    expected = VisionTransformer(model.config).apply({"params": params}, jnp.asarray(images))[0]
    features = raw(images)
    assert features.shape == (5, encoders.WIDTH)
    found = features @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    drawn = image_batch([encoders.SEED, 9], 5, tiny.encoder_classes, encoders.STYLES["clean"])[1]
    np.testing.assert_array_equal(np.asarray(tiny.encoder_classes)[labels], drawn)
    assert "% of new images" in note


def test_patch_statistics_do_not_depend_on_brightness_sign_or_scale() -> None:
    images, _ = image_batch(3, 6)
    dictionary = patches.learn_dictionary(images, 7, 0)
    np.testing.assert_allclose(np.linalg.norm(dictionary, axis=1), 1, atol=1e-5)
    found = patches.statistics(images, dictionary)
    assert found.shape == (6, 14) and np.ptp(found, axis=0).max() > 1e-3
    np.testing.assert_allclose(patches.statistics(0.1 - 0.5 * images, dictionary), found, atol=1e-4)
    assert np.isfinite(patches.statistics(np.zeros((2, 32, 32, 3), np.float32), dictionary)).all()


def test_a_table_has_students_intervals() -> None:
    assert report.percent([0.5, 0.6]) == "55.0 ±63.5"  # 12.706 * 0.0707 / sqrt(2)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"seeds": 1}, "at least 2"),
        ({"encoder_classes": (0,)}, "at least two of the classes"),
        ({"encoder_classes": (0, 10)}, "at least two of the classes"),
        ({"per_task": 4}, "not two or more tasks of 4"),
        ({"per_task": 6}, "not two or more tasks of 6"),
    ],
)
def test_what_makes_no_stream_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        command.main(command.Config(**fields))  # pyright: ignore[reportArgumentType]
