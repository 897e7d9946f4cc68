"""Convert the attention of a trained model into one whose cache is smaller, and train it to recover if asked to."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvjax.errors import UsageError

if TYPE_CHECKING:
    from kvjax.calibration.samples import Samples
    from kvjax.models.language_model import LanguageModel

HELD = 10
"""One in so many windows of the text, those at its end, are kept for the perplexities."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Convert a model; the perplexity before, after, and after recovery is printed.

    Attributes:
      model: a Hugging Face folder, or "reference" for the model that comes with kvjax.
      to: fewer kv heads (gqa), or one latent per token for all heads (latent).
      heads: gqa: how many kv heads there are to be, a divisor of the model's.
      by: gqa: pool heads by their mean, or keep the principal directions of weights or of a text's keys and values.
      groups: gqa: which heads become one: neighbours, or those that are most alike.
      latent_dim: latent: channels of the latent.
      rotary_heads: latent: channels of the rotary key beside it, in heads of the model.
      text: a file of sample text; "-" reads standard input. The last tenth of it is kept for the perplexities.
      out: the folder to write; it must not exist, or be empty.
      samples: windows of the text that conversion looks at, at most.
      length: tokens of a window; default is 512, or the model's limit where that is less.
      batch: windows at a time, also in training.
      recover: train on the text afterwards: low-rank changes that are merged (lora), all weights, or nothing.
      steps: of recovery, AdamW.
      rate: the highest learning rate of recovery.
      rank: of the low-rank changes.
      seed: of random draws.
    """

    model: str = "reference"
    to: Literal["gqa", "latent"] = "gqa"
    heads: int | None = None
    by: Literal["mean", "svd-weights", "svd-activations"] = "svd-activations"
    groups: Literal["adjacent", "alike"] = "adjacent"
    latent_dim: int | None = None
    rotary_heads: int = 1
    text: str | None = None
    out: Path | None = None
    samples: int = 128
    length: int | None = None
    batch: int = 8
    recover: Literal["none", "lora", "all"] = "none"
    steps: int = 200
    rate: float = 1e-3
    rank: int = 16
    seed: int = 0


def main(config: Config) -> None:
    """Writes the folder when everything has worked; prints what changed.

    Raises:
      UsageError: an option is missing, or does not fit the model.
    """
    import kvjax
    from experiments import compile_cache
    from experiments.calibrate import read
    from kvjax.evaluation.text import Surprisal, perplexity, ratio, read_windows
    from kvjax.models.huggingface.export import as_empty_folder

    out, text = _required(config)
    as_empty_folder(out)
    compile_cache.enable()
    model = kvjax.load(config.model)
    seen, held = windows(model, read(text), config)
    first = read_windows(model, held.batches(config.batch))

    def show(name: str, read: Surprisal) -> None:
        now, change = perplexity(read), 100 * (ratio(read, first).mean - 1)
        print(f"{name:<10} {now.mean:8.3f}  ({now.low:.3f} to {now.high:.3f})  {change:+.1f} %")

    print(f"perplexity of {len(held)} windows of {held.length} tokens that nothing is learnt from")
    show("before", first)
    made = converted(model, config, seen)
    show("converted", read_windows(made, held.batches(config.batch)))
    if config.recover != "none":
        made = recovered(made, config, seen)
        show("recovered", read_windows(made, held.batches(config.batch)))
    before, after = (bytes_per_token(one) for one in (model, made))
    print(f"cache      {before:,} to {after:,} bytes per token, in bfloat16")
    print(f"parameters {model.num_params:,} to {made.num_params:,}")
    kvjax.export(made, out)
    print(f"{out}: written")
    print(f"use it in place of a model: kvjax compare --model {out}", file=sys.stderr)


def windows(model: LanguageModel, text: str, config: Config) -> tuple[Samples, Samples]:
    """The windows that are learnt from, and those at the end of the text that are only measured."""
    from kvjax.calibration.samples import Samples

    length = min(512, model.config.max_positions) if config.length is None else config.length
    every = Samples.of(model, text, sys.maxsize, length)
    held = max(1, len(every) // HELD)
    if len(every) < 2:
        raise UsageError(f"the text is a single window of {length} tokens; give more, or a shorter --length.")
    parts = slice(None, -held), slice(-held, None)
    seen, held = (Samples(every.tokens[part], every.lengths[part]) for part in parts)
    return seen, held


def converted(model: LanguageModel, config: Config, seen: Samples) -> LanguageModel:
    """The model after the conversion that is asked for."""
    import numpy as np

    from kvjax.calibration.samples import Samples
    from kvjax.convert.mha_to_gqa import mha_to_gqa
    from kvjax.convert.to_latent import to_latent

    chosen = np.linspace(0, len(seen) - 1, min(config.samples, len(seen))).round().astype(int)
    text = Samples(seen.tokens[chosen], seen.lengths[chosen]).batches(config.batch)
    if config.to == "latent":
        if config.latent_dim is None:
            raise UsageError("--to latent needs --latent-dim, the channels of the latent.")
        return to_latent(model, config.latent_dim, rotary_heads=config.rotary_heads, text=text)
    if config.heads is None:
        raise UsageError(f"--to gqa needs --heads, a divisor of the model's {model.config.num_kv_heads} kv heads.")
    return mha_to_gqa(model, config.heads, config.by, groups=config.groups, text=text)


def recovered(model: LanguageModel, config: Config, seen: Samples) -> LanguageModel:
    """The model after training on the windows."""
    from kvjax.convert.recover import Recovery, recover
    from kvjax.progress import track

    assert config.recover != "none"
    how = Recovery(config.recover, config.steps, config.rate, config.batch, config.rank, seed=config.seed)
    with track("recover", how.steps) as advance:
        return recover(model, seen.tokens, seen.lengths, how, lambda loss: advance(1, f"{loss:.3f} nats"))


def bytes_per_token(model: LanguageModel) -> int:
    """What a full cache of 16-bit numbers holds of one token, over all layers."""
    shapes = (model.config.cache_shape(layer) for layer in model.config.owners)
    return 2 * sum(shape.kv_heads * (shape.head_dim + shape.value_width) for shape in shapes)


def _required(config: Config) -> tuple[Path, str]:
    if config.out is None:
        raise UsageError("give the folder to write: --out FOLDER")
    if config.text is None:
        raise UsageError("give a file of sample text, some ten thousand words: --text FILE")
    if min(config.samples, config.batch) < 1:
        raise UsageError(f"--samples and --batch are at least 1; got {config.samples} and {config.batch}.")
    return config.out, config.text
