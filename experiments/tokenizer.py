"""Corpus and tokenizer of the reference model: the Python standard library's source, whole modules held out.

Writes tokenizer.json and tokenizer_config.json, the held-out text (once), and the token shards on which
`kvjax pretrain` trains. Training itself needs only the shards.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kvjax.assets import HELDOUT, REFERENCE, heldout_text
from kvjax.errors import UsageError
from kvjax.progress import track
from kvjax.tasks import Vocabulary
from kvjax.training.shards import Shards

#: Generated tables, tests (their text is unlike the rest) and the corpus of pydoc; never trained on.
SKIPPED = frozenset({"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"})
HELD_OUT_MODULES = (
    "argparse calendar csv datetime difflib doctest fractions heapq http json queue random sched statistics "
    "string tarfile textwrap threading zipfile"
).split()
SPECIAL = ("<bos>", "<eos>", "<pad>", "<q>")


@dataclasses.dataclass(frozen=True)
class Config:
    """Build the corpus, the tokenizer and the token shards.

    Attributes:
      out: folder for shards.npz and corpus.json.
      tokenizer: folder for tokenizer.json; an existing one is used, not replaced.
      vocab_size: tokens, the 256 bytes and the special tokens among them.
    """

    out: Path = Path("runs/corpus")
    tokenizer: Path = REFERENCE
    vocab_size: int = 1024


def modules(stdlib: Path) -> Iterator[tuple[str, str]]:
    """(relative path, text) of every Python file of the standard library that is not in SKIPPED, sorted."""
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        if SKIPPED.isdisjoint(name.parts) and "lib-dynload" not in name.parts and "sysconfigdata" not in path.name:
            yield name.as_posix(), path.read_text("utf-8")


def held_out(name: str) -> bool:
    """Whether the file at this path below the standard library belongs to a held-out module."""
    return Path(name).parts[0].removesuffix(".py") in HELD_OUT_MODULES


def lines_of(text: str) -> set[str]:
    """The text's lines that say something of their own: at least 24 characters without indentation."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 24}


def training_files(files: list[tuple[str, str]], heldout: str, most_shared: float = 0.1) -> list[tuple[str, str]]:
    """`files` without held-out modules and without near-duplicates, of whose lines a share is held out too."""
    known = lines_of(heldout)

    def near_duplicate(text: str) -> bool:
        lines = lines_of(text)
        return bool(lines) and len(lines & known) > most_shared * len(lines)

    return [(name, text) for name, text in files if not held_out(name) and not near_duplicate(text)]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; a sequence encoded with special tokens begins with `<bos>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def bytes_of(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [V]: UTF-8 bytes of each token of a byte-level tokenizer, whose alphabet has one letter per byte."""
    sizes = np.zeros(tokenizer.get_vocab_size(), np.int32)
    for token, index in tokenizer.get_vocab().items():
        sizes[index] = 0 if token in SPECIAL else len(token)
    return sizes


def write_heldout(files: list[tuple[str, str]], licence: str) -> None:
    """Writes the held-out text, each module behind a line with its path, and the licence it is under."""
    text = "".join(f"# ==== {name}\n{text}\n" for name, text in files if held_out(name))
    HELDOUT.parent.mkdir(parents=True, exist_ok=True)
    HELDOUT.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    (HELDOUT.parent / "LICENSE").write_text(licence)


def main(config: Config) -> Path:
    """Returns the folder with the shards. Raises UsageError when Python was installed without its source."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = list(modules(stdlib))
    if sum(len(text) for _, text in files) < 5_000_000:
        raise UsageError(
            f"{stdlib} has little Python source: use a Python that was installed with its library's source"
        )
    if not HELDOUT.exists():
        write_heldout(files, (stdlib / "LICENSE.txt").read_text())
    kept = training_files(files, heldout_text())
    if not (config.tokenizer / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer([text for _, text in kept], config.vocab_size), config.tokenizer)
    tokenizer = Tokenizer.from_file(str(config.tokenizer / "tokenizer.json"))
    tokens = []
    with track("corpus", len(kept)) as advance:
        for name, text in kept:
            tokens.append(np.asarray(tokenizer.encode(text).ids, np.uint16))
            advance(1, name)
    heldout = np.asarray(tokenizer.encode(heldout_text(), add_special_tokens=False).ids, np.uint16)
    shards = Shards(np.concatenate(tokens), heldout, bytes_of(tokenizer), Vocabulary.of(tokenizer))
    shards.save(config.out)
    report = {
        "python": sys.version.split()[0],
        "files": len(kept),
        "bytes": sum(len(text.encode()) for _, text in kept),
        "tokens": sum(map(len, tokens)),
        "left_out_as_near_duplicates": sorted({n for n, _ in files if not held_out(n)} - {n for n, _ in kept}),
    }
    (config.out / "corpus.json").write_text(json.dumps(report, indent=2) + "\n")
    return config.out
