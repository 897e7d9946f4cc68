"""The training loop: curriculum, log, checkpoints, exact resume."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import optax

from kvjax.training import checkpoint
from kvjax.training.data import FAMILIES, KV, Source, reader
from kvjax.training.loss import Forward, Loss, NextToken
from kvjax.training.schedule import Gate, Stage
from kvjax.training.step import Metrics, make_step, on_device
from kvjax.typing import PyTree

DEFAULT_GATE = Gate()
NEXT_TOKEN = NextToken()


@dataclasses.dataclass(frozen=True)
class Loop:
    """How a run goes on.

    Attributes:
      folder: log.jsonl (one record per step) and checkpoints/ go here.
      steps: where the run ends.
      save_every: steps between checkpoints.
      gate: when the curriculum advances.
      seconds: wall time after which the run saves and stops, or None.
    """

    folder: Path
    steps: int
    save_every: int = 100
    gate: Gate = DEFAULT_GATE
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where training stands: all that decides what comes next."""

    step: int
    stage: int
    recent: tuple[float, ...]
    entered: int

    def advance(self, accuracy: float, gate: Gate, stages: Sequence[Stage]) -> Progress:
        """After a step: recent retrieval accuracies, and the next stage when they pass the gate in time."""
        step = self.step + 1
        recent = (*self.recent, accuracy)[-gate.window :] if np.isfinite(accuracy) else self.recent
        passed = len(recent) == gate.window and float(np.mean(recent)) > gate.accuracy
        if passed and self.stage + 1 < len(stages) and step - self.entered >= stages[self.stage].least:
            return Progress(step, self.stage + 1, (), step)
        return Progress(step, self.stage, recent, self.entered)


def train(
    loop: Loop,
    forward: Forward,
    params: PyTree,
    tx: optax.GradientTransformation,
    batches: Source,
    stages: Sequence[Stage],
    on_record: Callable[[dict[str, object]], None] = lambda record: None,
    loss: Loss = NEXT_TOKEN,
) -> PyTree:
    """Trains from the newest checkpoint in `loop.folder`, or from `params`; returns the final parameters.

    A run that was killed and started again logs the same losses, bit for bit, as one that was not.
    `on_record` sees every log record. Raises CorruptDataError on a damaged checkpoint.
    """
    progress, params, opt_state = _restore(loop, params, tx.init(params))
    step = make_step(forward, tx, loss)
    loop.folder.mkdir(parents=True, exist_ok=True)
    _truncate(loop.folder / "log.jsonl", progress.step)
    started = time.monotonic()
    stage, source = -1, None
    with (loop.folder / "log.jsonl").open("a", buffering=1) as log:
        while progress.step < loop.steps:
            if stage != progress.stage:
                if source is not None:
                    source.close()
                stage, source = progress.stage, reader(batches, progress.step, stages[progress.stage])
            assert source is not None
            batch = next(source)
            params, opt_state, metrics = step(params, opt_state, on_device(batch), np.int32(progress.step))
            record = _record(progress, batch.tokens.shape, metrics, time.monotonic() - started)
            log.write(json.dumps(record) + "\n")
            on_record(record)
            progress = progress.advance(_accuracy(metrics, KV), loop.gate, stages)
            late = loop.seconds is not None and time.monotonic() - started > loop.seconds
            if progress.step % loop.save_every == 0 or progress.step == loop.steps or late:
                checkpoint.save(loop.folder / "checkpoints", progress.step, _state(loop, progress, params, opt_state))
            if late:
                break
    if source is not None:
        source.close()
    return params


def _state(loop: Loop, progress: Progress, params: PyTree, opt_state: PyTree) -> dict[str, PyTree]:
    recent = np.full(loop.gate.window, np.nan)
    recent[: len(progress.recent)] = progress.recent
    stage, entered = (np.asarray(value, np.int32) for value in (progress.stage, progress.entered))
    return {"params": params, "opt_state": opt_state, "stage": stage, "entered": entered, "recent": recent}


def _restore(loop: Loop, params: PyTree, opt_state: PyTree) -> tuple[Progress, PyTree, PyTree]:
    like = _state(loop, Progress(0, 0, (), 0), params, opt_state)
    found = checkpoint.load(loop.folder / "checkpoints", like)
    if found is None:
        return Progress(0, 0, (), 0), params, opt_state
    step, state = found
    recent = tuple(float(value) for value in state["recent"] if np.isfinite(value))
    params, opt_state = jax.device_put((state["params"], state["opt_state"]))
    return Progress(step, int(state["stage"]), recent, int(state["entered"])), params, opt_state


def _truncate(log: Path, step: int) -> None:
    """Drops the records of steps that will be done again, and a line that was cut off."""
    if not log.exists():
        return
    lines = log.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
    partial = log.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(log)


def _accuracy(metrics: Metrics, family: int) -> float:
    answers = float(metrics.answers[family])
    return float(metrics.correct[family]) / answers if answers else float("nan")


def _record(progress: Progress, shape: tuple[int, ...], metrics: Metrics, seconds: float) -> dict[str, object]:
    accuracy = {name: _accuracy(metrics, i) for i, name in enumerate(FAMILIES)}
    return {
        "step": progress.step,
        "stage": progress.stage,
        "length": shape[1] - 1,
        "tokens": shape[0] * (shape[1] - 1),
        "loss": float(metrics.loss),
        "answer_loss": float(metrics.answer_loss),
        "text_loss": float(metrics.text_loss),
        "grad_norm": float(metrics.grad_norm),
        "accuracy": {name: round(value, 4) for name, value in accuracy.items() if np.isfinite(value)},
        "seconds": round(seconds, 2),
    }
