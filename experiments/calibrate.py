"""Find what a method must know of a model (codebooks, factors, networks, tables), and keep it in one file."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.generate import read_stdin
from kvjax.errors import UsageError

if TYPE_CHECKING:
    from kvjax.calibration.finder import Finder


@dataclasses.dataclass(frozen=True)
class Config:
    """Calibrate a method to a model.

    Attributes:
      method: as `kvjax methods` lists them, with the options that it is to be used with: "prefixkv:share=25%".
      model: a Hugging Face folder, or "reference" for the model that comes with kvjax.
      text: a file of sample text, some ten thousand words; "-" reads standard input. razor needs none.
      out: the file to write; its name ends with .safetensors. Default: the method's name.
      samples: windows of the text that are run, at most.
      length: tokens of a window; default is 2048, or the model's limit where that is less.
      batch: windows at a time.
      seed: of random draws.
      weighting: kvquant: weigh numbers by gradients and the width of their ranges, or plainly by gradients.
      match_moments: kvquant: map each codebook so that what it decodes keeps mean and spread (Q-Norm).
      factors: cskv: first factors from the samples, or from the weights (svd, asvd).
      steps: cskv, duo_attention, kvzap with a hidden layer: steps of training, in place of each one's own.
      echo_share: razor: the share of heads that is chosen for looking at earlier copies of a token.
      induction_share: razor: the share that is chosen for looking at what came after such copies.
      full_share: duo_attention: the share of heads that keep everything.
      mean_bits: kvtuner: bits, the mean over layers, keys and values; default is what the method's table spends.
      threshold: simlayerkv: a layer with more attention than this on sinks and recent window is lazy.
    """

    method: str = "kvquant-3"
    model: str = "reference"
    text: str | None = None
    out: Path | None = None
    samples: int = 16
    length: int | None = None
    batch: int = 1
    seed: int = 0
    weighting: Literal["range", "plain"] = "range"
    match_moments: bool = False
    factors: Literal["principal", "svd", "asvd"] = "principal"
    steps: int | None = None
    echo_share: float = 0.01
    induction_share: float = 0.14
    full_share: float | None = None
    mean_bits: float | None = None
    threshold: float = 0.9


def main(config: Config) -> None:
    """Writes the file; prints what was found and how to use it."""
    import kvjax
    from experiments import compile_cache
    from kvjax.engine.calibrated import SUFFIX

    compile_cache.enable()
    out = Path(f"{file_name(config.method)}{SUFFIX}") if config.out is None else config.out
    if out.suffix != SUFFIX:
        raise UsageError(f"--out is a file whose name ends with {SUFFIX}; got {out.name!r}")
    made = kvjax.calibrate(
        kvjax.load(config.model),
        config.method,
        None if config.text is None else read(config.text),
        samples=config.samples,
        length=config.length,
        batch=config.batch,
        seed=config.seed,
        finders=finders(config),
    )
    made.save(out)
    for note in made.notes:
        print(note)
    print(f"{out}: {out.stat().st_size:,} bytes")
    print(f"use it in place of a method: kvjax compare --methods {out}", file=sys.stderr)


def finders(config: Config) -> list[Finder]:
    """The finders with the choices that a config makes."""
    from kvjax.calibration.codebooks import Codebooks
    from kvjax.calibration.factors import LowRankFactors
    from kvjax.calibration.gates import Gates
    from kvjax.calibration.importance import Importance
    from kvjax.calibration.layer_bits import LayerBits
    from kvjax.calibration.lazy_layers import LazyLayers
    from kvjax.calibration.retrieval_heads import RetrievalHeads

    steps: dict[str, Any] = {} if config.steps is None else {"steps": config.steps}
    return [
        RetrievalHeads(echo_share=config.echo_share, induction_share=config.induction_share),
        Gates(full_share=config.full_share, **steps),
        LazyLayers(threshold=config.threshold),
        LayerBits(mean_bits=config.mean_bits),
        Codebooks(weighting=config.weighting, match_moments=config.match_moments),
        LowRankFactors(start=config.factors, **steps),
        Importance(**steps),
    ]


def file_name(method: str) -> str:
    """A method's name as the name of a file: "cskv:bits=4" -> "cskv-bits=4"."""
    return "".join(letter if letter.isalnum() or letter in "-_=.%" else "-" for letter in method)


def read(text: str) -> str:
    """The sample text. Raises UsageError where there is none."""
    if text == "-":
        return read_stdin()
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {text}: {error}. Give a file of UTF-8 text.") from error
