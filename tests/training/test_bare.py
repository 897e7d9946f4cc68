"""On a bare accelerator machine there is only jax, flax, optax and numpy: training must need nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pathlib import Path

for name in ("tokenizers", "safetensors", "grain", "orbax.checkpoint", "tyro", "matplotlib"):
    sys.modules[name] = None

import jax
import jax.numpy as jnp
import numpy as np
from kvjax.models.config import TransformerConfig
from kvjax.models.transformer import Transformer
from kvjax.tasks import Vocabulary
from kvjax.training.data import Batches
from kvjax.training.initial import planted
from kvjax.training.loop import Loop, train
from kvjax.training.schedule import LearningRate, Stage, optimizer

def ids(*values):
    return np.asarray(values, np.int32)

words = Vocabulary(64, ids(0), ids(1), ids(2), np.arange(3, 30, dtype=np.int32), np.arange(30, 60, dtype=np.int32))
config = TransformerConfig(64, 32, 2, 2, 1, 8, 16, 64, tied_embeddings=True)
model = Transformer(config)
params = planted(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"], config, 0)
losses = []
train(
    Loop(Path(sys.argv[1]), steps=25, save_every=20),
    lambda params, tokens: model.apply({"params": params}, tokens)[0],
    params,
    optimizer(LearningRate(peak=1e-2, warmup=5, decay_from=20, steps=25)),
    Batches(words, np.arange(5000) % 64, seed=0, batch_tokens=1024),
    [Stage(64, 4, repeat=0.0, text=0.9, filler=0.0, tasks=0.0)],
    lambda record: losses.append(record["loss"]),
)
assert len(losses) == 25 and np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5, losses
"""


@pytest.mark.slow
def test_training_without_the_other_packages(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "checkpoints" / "step-00000025" / "state.npz").exists()
