"""A run that is killed with SIGKILL and started again logs the losses of a run that was left alone, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from experiments.tokenizer import bytes_of
from kvjax.assets import REFERENCE, heldout_text
from kvjax.tasks import Vocabulary
from kvjax.training.shards import Shards

STEPS = 40
OPTIONS = f"""--steps {STEPS} --save-every 6 --batch-tokens 128 --layers 2 --embed-dim 32 --heads 2 --kv-heads 1
--head-dim 8 --mlp-dim 16 --context 64 --decay-from 20 --eval-count 0 --seed 4""".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Small shards. What text they hold does not matter here."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))
    tokens = np.asarray(tokenizer.encode(heldout_text()[:60_000]).ids, np.uint16)
    Shards(tokens, tokens[:3000], bytes_of(tokenizer), Vocabulary.of(tokenizer)).save(folder)
    return folder


def start(out: Path, corpus: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "experiments", "pretrain", "--out", str(out), "--corpus", str(corpus), *OPTIONS]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors.decode()[-2000:]


def losses(out: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def wait_for_lines(log: Path, count: int) -> None:
    deadline = time.monotonic() + 400
    while not log.exists() or lines(log) < count:
        assert time.monotonic() < deadline, "the run wrote no log"
        time.sleep(0.01)


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n")


@pytest.mark.slow
def test_kill_and_resume_changes_nothing(tmp_path, corpus):
    alone = start(tmp_path / "alone", corpus)
    killed = start(tmp_path / "killed", corpus)
    wait_for_lines(tmp_path / "killed" / "log.jsonl", int(np.random.default_rng().integers(8, 30)))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert 8 <= lines(tmp_path / "killed" / "log.jsonl") < STEPS
    finish(start(tmp_path / "killed", corpus))
    finish(alone)
    expected = losses(tmp_path / "alone")
    assert [step for step, _, _ in expected] == list(range(STEPS))
    assert losses(tmp_path / "killed") == expected
