"""`compare`: methods against each other on one model, with the same tasks, contexts, examples and budget."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType

from kvjax.cache.method import CacheMethod
from kvjax.engine.calibrated import Calibrated
from kvjax.errors import writing
from kvjax.evaluation import defaults, report
from kvjax.evaluation.beside import config_of, plans
from kvjax.evaluation.finding import findings
from kvjax.evaluation.plan import Options, Record
from kvjax.evaluation.summary import Row, summarise
from kvjax.evaluation.table import tables
from kvjax.models.language_model import LanguageModel
from kvjax.progress import Track, silent, track


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Records, one per method, task, context and seed; printing it gives the table.

    Attributes:
      records: see `compare`. config: what was asked.
    """

    records: list[Record]
    config: Mapping[str, Any]

    @property
    def rows(self) -> list[Row]:
        """One row per method and context, over all tasks and seeds, with 95 % intervals."""
        return summarise(self.records)

    @property
    def findings(self) -> list[str]:
        """What the comparison shows, in sentences that its intervals bear."""
        return findings(self.rows, self.config)

    def write_report(self, folder: Path, run: Mapping[str, Any] | None = None) -> Path:
        """Writes report.html into a folder that exists; `run` says on what it ran (see `report.html`)."""
        return report.write(folder, self.records, config=self.config, run=run or {})

    def __rich__(self) -> RenderableType:
        return Group(*tables(self.rows))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100).print(self)
        return text.getvalue().rstrip()


def compare(
    model: LanguageModel,
    methods: Sequence[str | CacheMethod | Calibrated] = defaults.METHODS,
    tasks: Sequence[str] = defaults.TASKS,
    *,
    context: int | Sequence[int] | None = None,
    seeds: int = defaults.SEEDS,
    examples: int = defaults.EXAMPLES,
    batch: int = defaults.BATCH,
    budget: str | None = None,
    query_aware: bool = False,
    dtype: str = defaults.DTYPE,
    chunk: int = defaults.CHUNK,
    attention_errors: bool = True,
    beside: Sequence[LanguageModel] = (),
    out: str | Path | None = None,
    progress: Track | None = track,
) -> Comparison:
    """Measures what cache methods cost and what they lose.

    Args:
      methods: names ("snapkv:tokens=256+int4"), `CacheMethod`s, what `kvjax.calibrate` returns or the paths of its
        files (these keep their own budget); full, random and streaming_llm are always added.
      tasks: names of recall tasks, `perplexity-prefill`, `perplexity-stream`, or `perplexity` for both.
      context: tokens of a row, or several; default is 1,024, or the model's limit where that is less.
      seeds: 0 to seeds - 1, each with other examples.
      examples: per task and seed.
      batch: rows at a time.
      budget: for every method that evicts and whose name says no budget: "256" tokens, "25%" of the prompt, "64KiB" of
        a row's bytes, or a method's name ("int4": that method's own allocated bytes). Without it, such methods keep
        their default share.
      query_aware: show the question while the cache is compressed; by default it is hidden.
      dtype: of tokens that a cache stores exactly.
      chunk: tokens per step of methods that read a prompt in pieces.
      attention_errors: measure them too, which takes one more compiled program per method.
      beside: other models of the same tokenizer, such as one whose attention has a smaller cache: their rows are called
        "name/method", and their `ratio` is of the first model's full bf16 cache.
      out: a folder for report.html, made if need be.
      progress: what shows it; by default a bar on stderr, or plain lines where that is no terminal. None is silent.

    Returns:
      Records with the fields method, task, context, seed, examples, score (share of right answers, in [0, 1]; None for
      text), perplexity and bits_per_byte (None for recall), kl (nats per token, from the full cache's next-token
      distribution), attention_error (relative, against the full cache on the same inputs; None where it is not asked
      for), cache_bytes, effective_bytes, layer_bytes (of one row), bytes_per_token, bits_per_element, ratio (to the
      full bf16 cache), tokens_held, prefill_ms and decode_ms_per_token (of a batch of `batch` rows, medians),
      prefill_ms_quartiles, decode_ms_quartiles, batch, budget, query_aware and note.

    Raises:
      UsageError: before anything runs: an unknown method or task, a context beyond the model's limit or too short for a
        task, a budget too small for what a method always keeps, a folder that cannot be made.
      KvjaxError: a cache's live buffers are not what its method declares.
      NumericsError: a measurement is not a finite number.
    """
    options = Options(context, seeds, examples, batch, budget, query_aware, dtype, chunk, attention_errors)
    planned = plans([model, *beside], methods, tasks, options)
    if out is not None:
        with writing(out):
            Path(out).mkdir(parents=True, exist_ok=True)
    records = [record for one in planned for record in one.run(track=progress or silent)]
    comparison = Comparison(records, config_of(planned))
    if out is not None:
        comparison.write_report(Path(out))
    return comparison
