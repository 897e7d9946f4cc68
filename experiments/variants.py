"""Variants of attention at equal parameters and equal tokens: what each one learns, and what its cache takes.

Small decoders are trained from scratch on the same sequences: a quarter of them text, the others records (a key and
its value, one token each) followed by questions, as "told once" or as "told again", where the last value of a key
holds. Parameters are made equal by the width of the MLPs.

Finding (docs/results.md; 1,000 steps, three seeds): at this size the cache's bytes do not decide. MQA, a cache shared
by two layers and MLA hold half of GQA's bytes and answer as much; half-width keys are the one saving that costs
recall (87.6 % of keys told again against GQA's 96.1) and text. Selective attention has the best text in every seed,
and one seed of three the best recall, but two had not yet learnt the lookup when training ended, nor had one of
SSA's. So its rows measure how early the lookup is learnt as much as how well. KDGQA gains nothing over equal groups.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from kvjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Config:
    """Train variants of attention at equal parameters and tokens, and compare loss, recall and cache bytes.

    Attributes:
      out: folder with a model (a Hugging Face folder) and a log for each variant and seed, results.jsonl and table.md;
        the folder of a run that was stopped goes on.
      variants: names; all by default.
      seeds: how many; each has other initial weights and other sequences, the same for all variants.
      steps, batch_tokens: of training. length: tokens of a sequence. peak: learning rate.
      embed_dim, layers: of all variants, whose heads have 16 channels: a multiple of 64, and an even number.
      eval_batches: of unseen rows that are measured.
    """

    out: Path = Path("runs/variants")
    variants: tuple[str, ...] = ()
    seeds: int = 3
    steps: int = 1000
    batch_tokens: int = 4096
    length: int = 128
    peak: float = 3e-3
    embed_dim: int = 64
    layers: int = 2
    eval_batches: int = 8


def main(config: Config) -> None:
    """Trains what is not yet in the folder, then prints and writes the table.

    Raises:
      UsageError: an unknown variant, or sizes that do not go with it; before anything is trained.
    """
    from experiments import compile_cache
    from experiments.variant import models
    from experiments.variant.measure import Data, Training, bytes_per_token, measured, trained
    from kvjax.models.huggingface import export
    from kvjax.progress import track

    if min(config.seeds, config.steps, config.eval_batches) < 1:
        raise UsageError("--seeds, --steps and --eval-batches are at least 1")
    if config.embed_dim % 64 or config.layers % 2 or min(config.embed_dim, config.layers) < 1:
        raise UsageError(
            f"--embed-dim is a multiple of 64 and --layers is even; got {config.embed_dim} and {config.layers}"
        )
    compile_cache.enable()
    data = Data.load()
    start = models.base(data.size, config.embed_dim, config.layers, config.length)
    chosen = {name: models.variant(name, start) for name in config.variants or models.CHANGES}
    training = Training(config.steps, config.batch_tokens, config.length, config.peak, config.eval_batches)
    config.out.mkdir(parents=True, exist_ok=True)
    for seed in range(config.seeds):
        for name, one in chosen.items():
            if any(r["variant"] == name and r["seed"] == seed for r in records(config.out)):
                continue
            folder = config.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            model = trained(one, training, data, seed, folder, track)
            export(model, folder / "model")
            sizes = {"parameters": models.parameters(one), "mlp_dim": one.mlp_dim}
            sizes |= {f"bytes {method}": bytes_per_token(one, method) for method in ("full", "int8")}
            record = {"variant": name, "seed": seed, **sizes, **measured(model, training, data)}
            with (config.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
    table = markdown(records(config.out))
    (config.out / "table.md").write_text(table)
    print(table)


def records(folder: Path) -> list[dict[str, Any]]:
    """What has been measured."""
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def markdown(found: list[dict[str, Any]]) -> str:
    """A row per variant: means over seeds, with the range of the seeds."""
    lines = [
        "| variant | parameters | bytes/token | int8 | text, nats/token | told once, % | told again, % | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(record["variant"] for record in found):
        mine = [record for record in found if record["variant"] == name]
        first = mine[0]
        lines.append(
            f"| {name} | {first['parameters']:,} | {first['bytes full']:,.0f} | {first['bytes int8']:,.0f} | "
            f"{_range([r['text'] for r in mine], 3)} | {_range([100 * r['told once'] for r in mine], 1)} | "
            f"{_range([100 * r['told again'] for r in mine], 1)} | {len(mine)} |"
        )
    return "\n".join(lines) + "\n"


def _range(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


if __name__ == "__main__":
    import sys

    from experiments.__main__ import main as command

    sys.exit(command(["variants", *sys.argv[1:]]))
