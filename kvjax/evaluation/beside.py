"""Several models in one comparison: the rows of each stand beside those of the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kvjax.cache.method import CacheMethod
from kvjax.cache.plan import full_bytes
from kvjax.engine.calibrated import Calibrated
from kvjax.errors import UsageError
from kvjax.evaluation.plan import Options, Plan, Record
from kvjax.models.language_model import LanguageModel
from kvjax.progress import Track, silent

PROBE = "The key of 7 is amber; the key of 19 is cobalt.\n"


@dataclasses.dataclass(frozen=True)
class Beside:
    """The plan of one model, whose records are those of `plan.run` with two changes.

    Methods are called "name/method", and `ratio` is of the full bf16 cache of the first model, so that a model whose
    cache is small to begin with shows it. Divergence and attention errors stay those from the model's own full cache.
    A model that keeps no keys and values has one row, "name/full".

    Attributes:
      name: of the model; "" leaves the names of methods as they are (the first model).
      whole: bytes of a row's full bf16 cache of the first model, by context.
    """

    plan: Plan
    name: str
    whole: Mapping[int, int]

    def run(self, done: Iterable[Record] = (), track: Track = silent) -> Iterator[Record]:
        """As `Plan.run`; `done` may hold records of other models."""
        mine = [{**record, "method": self._own(record["method"])} for record in done if self._is_mine(record["method"])]
        for record in self.plan.run(mine, track):
            ratio = record["cache_bytes"] / self.whole[record["context"]]
            yield {**record, "method": self.called(record["method"]), "ratio": ratio}

    def called(self, method: str) -> str:
        """What a method of this model is called."""
        return f"{self.name}/{method}" if self.name else method

    def _own(self, called: str) -> str:
        return called.removeprefix(f"{self.name}/") if self.name else called

    def _is_mine(self, called: str) -> bool:
        return called in map(self.called, (contender.name for contender in self.plan.contenders))


def plans(
    models: Sequence[LanguageModel],
    methods: Sequence[str | CacheMethod | Calibrated],
    tasks: Sequence[str],
    options: Options,
) -> list[Beside]:
    """The plans of all models, checked before any of them runs.

    Raises:
      UsageError: as `Plan.make`; models of one name; or a model whose tokenizer is not that of the first, so that
        tasks and perplexities would not be the same.
    """
    first, *others = models
    if len({model.name for model in models}) < len(models):
        raise UsageError(
            f"two of the models have the same name ({', '.join(model.name for model in models)}), so that their rows "
            "could not be told apart; a folder's name is the model's: rename one."
        )
    for model in others:
        if model.tokenizer.encode(PROBE) != first.tokenizer.encode(PROBE):
            raise UsageError(
                f"model {model.name!r} has another tokenizer than {first.name!r}, so the same context is another text "
                "and perplexities per token cannot be compared; compare models of one tokenizer."
            )
    made = [Plan.make(model, methods, tasks, options) for model in models]
    whole = {
        setting.context: full_bytes([dataclasses.replace(dims, batch=1) for dims in setting.dims(first)])
        for setting in made[0].fitted
    }
    if not all(setting.has_keys(first) for setting in made[0].fitted):
        raise UsageError(
            f"model {first.name!r} keeps no keys and values, so no size can be a share of its full cache; compare "
            f"another model, and name this one as one `beside` it."
        )
    return [Beside(plan, "" if plan is made[0] else plan.model.name, whole) for plan in made]


def config_of(planned: Sequence[Beside]) -> dict[str, Any]:
    """What is compared, as `Plan.config`, with all models and all names of methods."""
    names = [one.called(contender.name) for one in planned for contender in one.plan.contenders]
    budgeted = [one.called(name) for one in planned for name in one.plan.config["budgeted"]]
    models = ", ".join(one.plan.model.name for one in planned)
    return {**planned[0].plan.config, "model": models, "methods": names, "budgeted": budgeted}
