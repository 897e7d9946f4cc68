"""Train the reference model from scratch: text and recall tasks, a curriculum, exact resume.

Goes on from the newest checkpoint in --out; stop it whenever you like. The first run builds the tokenizer's
shards from the Python standard library; a machine that has the shards needs only jax, flax, optax and numpy.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvjax.assets import REFERENCE

if TYPE_CHECKING:
    from kvjax.models.config import TransformerConfig
    from kvjax.training.loss import Forward


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are the shipped model's recipe, tidied; its model card tells how the run went.

    Attributes:
      out: run folder: log.jsonl, checkpoints/, scores.json and model/ (a Hugging Face folder).
      corpus: folder with the encoded corpus; built when it is missing.
      tokenizer: folder with the tokenizer.json to build it with and to export.
      seed: of the parameters and of the data.
      steps: of `batch_tokens` tokens each.
      seconds: stop (and save) after this wall time, or never.
      batch_tokens: tokens per step, whatever the sequence length of the stage.
      save_every: steps between checkpoints.
      layers, embed_dim, heads, kv_heads, head_dim, mlp_dim, context: sizes of the model.
      rope_theta: base wavelength of the rotary embedding; a large one leaves more channels that match by content.
      planted: begin with a rough induction circuit (`kvjax.training.initial`) instead of noise alone.
      peak, warmup, decay_from, floor: learning rate; see `kvjax.training.schedule.LearningRate`.
      eval_count: generated examples per task for the final scores; 0 leaves the scores out.
    """

    out: Path = Path("runs/pretrain")
    corpus: Path = Path("runs/corpus")
    tokenizer: Path = REFERENCE
    seed: int = 0
    steps: int = 2000
    seconds: float | None = None
    batch_tokens: int = 8192
    save_every: int = 50
    layers: int = 3
    embed_dim: int = 160
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    mlp_dim: int = 448
    context: int = 1024
    rope_theta: float = 500_000.0
    planted: bool = True
    peak: float = 2e-3
    warmup: int = 50
    decay_from: int = 1300
    floor: float = 0.02
    eval_count: int = 200


def model_config(config: Config, vocab_size: int) -> TransformerConfig:
    """A Llama with a tied head."""
    from kvjax.models.config import RopeConfig, TransformerConfig

    return TransformerConfig(
        vocab_size=vocab_size,
        embed_dim=config.embed_dim,
        num_layers=config.layers,
        num_heads=config.heads,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        mlp_dim=config.mlp_dim,
        max_positions=config.context,
        rope=RopeConfig(theta=config.rope_theta),
        norm_eps=1e-5,
        tied_embeddings=True,
    )


def main(config: Config) -> None:
    """Trains, scores and exports. Raises UsageError and CorruptDataError as the parts do."""
    import jax
    import jax.numpy as jnp

    from kvjax.models.transformer import Transformer
    from kvjax.progress import track
    from kvjax.training.data import Batches
    from kvjax.training.initial import planted
    from kvjax.training.loop import Loop, train
    from kvjax.training.schedule import CURRICULUM, LearningRate, optimizer
    from kvjax.training.shards import Shards

    if not (config.corpus / "shards.npz").exists():
        from experiments import tokenizer

        tokenizer.main(tokenizer.Config(out=config.corpus, tokenizer=config.tokenizer))
    shards = Shards.load(config.corpus)
    architecture = model_config(config, shards.vocabulary.size)
    model = Transformer(architecture)
    params = model.init(jax.random.key(config.seed), jnp.zeros((1, 8), jnp.int32))["params"]
    params = planted(params, architecture, config.seed) if config.planted else params

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens)[0]

    rate = LearningRate(config.peak, config.warmup, config.decay_from, config.steps, config.floor)
    batches = Batches(shards.vocabulary, shards.tokens, config.seed, config.batch_tokens)
    loop = Loop(config.out, config.steps, config.save_every, seconds=config.seconds)
    stages = tuple(stage for stage in CURRICULUM if stage.length <= config.context)
    with track("pretrain", config.steps) as advance:
        done = 0

        def show(record: dict[str, Any]) -> None:
            nonlocal done
            advance(record["step"] + 1 - done, f"stage {record['stage']} loss {record['loss']:.3f}")
            done = record["step"] + 1

        params = train(loop, forward, params, optimizer(rate), batches, stages, show)
    if config.eval_count:
        report = scores(forward, params, shards, config.context, config.eval_count)
        (config.out / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report, indent=2))
    try:
        print(f"exported to {export(config, architecture, params)}")
    except ImportError as error:
        print(f"no model/ written: {error.name} is missing here; run this again where it is installed")


def scores(forward: Forward, params: Any, shards: Any, context: int, count: int) -> dict[str, Any]:
    """Exact match of every task at `context` tokens with held-out filler, and bits per byte of the held-out text."""
    from kvjax.progress import track
    from kvjax.tasks import TASKS, examples
    from kvjax.training import scores as measure

    report: dict[str, Any] = {"context": context}
    with track("scores", len(TASKS) + 1) as advance:
        for name in TASKS:
            drawn = list(examples(name, shards.vocabulary, shards.heldout, length=context, count=count, seed=2026))
            report[name] = measure.summary(drawn, measure.greedy(forward, params, drawn))
            advance(1, name)
        report["bits_per_byte"] = measure.bits_per_byte(
            forward, params, shards.heldout, shards.bytes_of, context, shards.vocabulary.prefix
        )
        advance(1, "text")
    return report


def export(config: Config, architecture: TransformerConfig, params: Any) -> Path:
    """Writes out/model, which `kvjax.load` and transformers read, in place of an earlier one; returns the folder."""
    import shutil

    import kvjax
    from kvjax.models.tokenizer import load_tokenizer

    folder = config.out / "model"
    shutil.rmtree(folder, ignore_errors=True)
    model = kvjax.LanguageModel(architecture, params, load_tokenizer(config.tokenizer), "reference")
    return kvjax.export(model, folder)
