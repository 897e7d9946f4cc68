"""The study of allotted query heads runs from end to end, goes on where it stopped, and its table adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import vit_allocation, vit_training
from experiments.vit_allocation import Config, table
from experiments.vit_training import VARIANTS, batches, evaluate
from kvjax.errors import UsageError


def cells(**correct: tuple[int, int, int]) -> list[dict[str, object]]:
    return [
        {"seed": seed, "name": name, "correct": n, "test": 100, "moved": 0.25 if name == "kdgqa" else None}
        for name, counts in correct.items()
        for seed, n in enumerate(counts)
    ]


def test_the_table_has_paired_differences_and_intervals() -> None:
    lines = table(cells(gqa=(80, 82, 84), kdgqa=(79, 80, 81))).splitlines()
    assert lines[2].startswith("| gqa | 82.0 (77.") and lines[2].endswith("|  |  |")
    # Differences -1, -2, -3: mean -2, standard deviation 1, t(2) = 4.303, half = 4.303 / sqrt(3) = 2.48.
    assert lines[3].startswith("| kdgqa | 80.0 (") and lines[3].endswith("| -2.0 ± 2.5 | 25 |")


@pytest.mark.parametrize(
    "chosen", [("gqa", "kdgqa", "dgqa-ema"), pytest.param(tuple(VARIANTS), marks=pytest.mark.slow)]
)
def test_a_quick_run_measures_every_variant_and_is_not_repeated(
    chosen: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vit_training, "VARIANTS", {name: VARIANTS[name] for name in chosen})
    config = Config(out=tmp_path / "run", quick=True, steps=2, uptrain=2, test=10, batch=8)
    vit_allocation.main(config)
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    names = {cell["name"] for cell in record["cells"]}
    assert {"mha", "gqa, not trained on", *chosen} < names
    assert all(f"| {name} |" in printed for name in names)
    moved = {cell["name"]: cell["moved"] for cell in record["cells"]}
    assert moved["gqa"] is None and moved["kdgqa"] is not None and moved["dgqa-ema"] is not None
    assert len(record["cells"]) == 2 * len(names)
    monkeypatch.setattr(vit_allocation, "measured", None)
    vit_allocation.main(config)
    assert capsys.readouterr().out == printed
    with pytest.raises(UsageError, match="other settings"):
        vit_allocation.main(Config(out=tmp_path / "run", quick=True, steps=3))


def test_one_seed_is_too_few() -> None:
    with pytest.raises(UsageError, match="2 to 10"):
        vit_allocation.main(Config(seeds=1))


def test_heads_that_moved_are_counted() -> None:
    import jax

    from kvjax.models.vit import VisionTransformer

    model = vit_allocation.model_config(Config(quick=True))
    data = batches([0], 1, 6)
    params = VisionTransformer(model).init(jax.random.key(0), data[0][0])["params"]
    correct, moved = evaluate(model, params, None, data)
    assert 0 <= correct <= 6 and moved is None
