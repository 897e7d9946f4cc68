"""Training one variant, and what is measured of it."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from experiments.variant.rows import SYMBOLS, TOLD_AGAIN, TOLD_ONCE, Rows
from kvjax.assets import REFERENCE, heldout_text
from kvjax.cache.methods import parse
from kvjax.cache.plan import layer_bytes
from kvjax.engine.prefill import cache_dims
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.tokenizer import load_tokenizer
from kvjax.models.transformer import Transformer
from kvjax.progress import Track
from kvjax.training.data import FAMILIES
from kvjax.training.loop import Loop, train
from kvjax.training.loss import NextToken
from kvjax.training.schedule import LearningRate, Stage, optimizer
from kvjax.training.step import on_device
from kvjax.typing import Array, PyTree

UNSEEN = 1 << 20
"""Added to the seed of the batches that nothing was trained on."""
HELD_OUT = 0.1
"""Share of the text, its end, that no variant is trained on."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How every variant is trained and measured: on as many tokens, the same ones.

    Attributes:
      steps, batch_tokens: of training. length: tokens of a sequence.
      peak: learning rate. eval_batches: of unseen rows that are measured.
    """

    steps: int
    batch_tokens: int
    length: int
    peak: float
    eval_batches: int

    @property
    def stage(self) -> Stage:
        """As long as training goes on; what sequences hold is for `Rows` to say."""
        return Stage(length=self.length, pairs=1, repeat=0.0, text=0.0, filler=0.0, tasks=0.0)


@dataclasses.dataclass(frozen=True)
class Data:
    """The held-out text of the package in the tokens of its tokenizer, in two parts; the tokens of records follow.

    Attributes:
      words: how many tokens the tokenizer has. prefix: tokens before every row.
      seen, unseen: int32 [n].
    """

    words: int
    prefix: tuple[int, ...]
    seen: NDArray[np.int32]
    unseen: NDArray[np.int32]

    @classmethod
    def load(cls) -> Data:
        backend = load_tokenizer(REFERENCE).backend
        assert backend is not None
        text = np.asarray(backend.encode(heldout_text(), add_special_tokens=False).ids, np.int32)
        cut = int(len(text) * (1 - HELD_OUT))
        return cls(backend.get_vocab_size(), tuple(backend.encode("").ids), text[:cut], text[cut:])

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return self.words + SYMBOLS

    def rows(self, corpus: NDArray[np.int32], seed: int, batch_tokens: int) -> Rows:
        """Batches of some of the text."""
        return Rows(corpus, self.prefix, self.words, seed, batch_tokens)


def trained(
    config: TransformerConfig, training: Training, data: Data, seed: int, folder: Path, track: Track
) -> LanguageModel:
    """A variant after its training; goes on where a run in the folder stopped."""
    module = Transformer(config)
    params = module.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"]
    rate = LearningRate(training.peak, training.steps // 20 + 1, training.steps // 2, training.steps)
    batches = data.rows(data.seen, seed, training.batch_tokens)
    loop = Loop(folder, training.steps, save_every=max(1, training.steps // 4))
    with track(folder.name, training.steps) as advance:
        done = 0

        def show(record: dict[str, Any]) -> None:
            nonlocal done
            advance(record["step"] + 1 - done, f"loss {record['loss']:.3f}")
            done = record["step"] + 1

        params = train(loop, partial(_forward, module), params, optimizer(rate), batches, (training.stage,), show)
    return LanguageModel(config, params, load_tokenizer(REFERENCE), folder.name)


def measured(model: LanguageModel, training: Training, data: Data) -> dict[str, float]:
    """Unseen rows: nats per token of text, the share of right answers of each kind, and how many were asked for."""
    batches = data.rows(data.unseen, UNSEEN, training.batch_tokens)
    run = jax.jit(lambda params, batch: NextToken()(partial(_forward, model.module), params, batch, 0)[1])
    text, correct, asked = [], np.zeros(len(FAMILIES)), np.zeros(len(FAMILIES))
    for index in range(training.eval_batches):
        _, nats, hits, answers = run(model.params, on_device(batches.batch(index, training.stage)))
        text.append(float(nats))
        correct, asked = correct + np.asarray(hits), asked + np.asarray(answers)
    share = correct / np.maximum(asked, 1.0)
    return {
        "text": float(np.mean(text)),
        "told once": float(share[TOLD_ONCE]),
        "told again": float(share[TOLD_AGAIN]),
        "asked": float(asked.sum()),
    }


def bytes_per_token(config: TransformerConfig, method: str = "full", tokens: int = 4096) -> float:
    """Of a row's cache, allocated for `tokens` tokens, all layers together."""
    dims = cache_dims(LanguageModel(config, {}), 1, tokens, tokens)
    return sum(layer_bytes(parse(method), one) for one in dims) / tokens


def _forward(module: Transformer, params: PyTree, tokens: Array) -> Array:
    return module.apply({"params": params}, tokens)[0]
