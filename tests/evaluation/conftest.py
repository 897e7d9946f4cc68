"""A tiny random model with the shipped tokenizer: accuracies are meaningless, everything else is real."""

from __future__ import annotations

import pytest

from kvjax.evaluation import contender, profile
from kvjax.evaluation.setting import Setting
from kvjax.evaluation.workload import Source
from kvjax.models.language_model import LanguageModel
from tests.evaluation.tiny import tiny


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return tiny(sharpness=3.0)  # so that attention is peaked and methods differ


@pytest.fixture(scope="session")
def source(model: LanguageModel) -> Source:
    return Source(model)


@pytest.fixture(scope="session")
def setting() -> Setting:
    """The shapes of nearly all tests here, so that they share compiled programs."""
    return Setting(context=128, room=32, batch=2)


@pytest.fixture
def lone(monkeypatch) -> None:
    """No baselines besides the full cache."""
    monkeypatch.setattr(contender, "BASELINES", ("full",))


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch) -> None:
    monkeypatch.setattr(profile, "REPEATS", 2)
