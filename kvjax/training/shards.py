"""An encoded corpus on disk, with all that a trainer needs of the tokenizer, so that it needs no tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from kvjax.errors import UsageError
from kvjax.tasks import Vocabulary


@dataclasses.dataclass(frozen=True)
class Shards:
    """Training text and words.

    Attributes:
      tokens: uint16 or int32 [n], the training text, files joined by the vocabulary's prefix.
      heldout: the same for the held-out text, without any prefix.
      bytes_of: int32 [V], UTF-8 bytes of each token (0 for markers).
      vocabulary: the words and markers of the recall tasks.
    """

    tokens: np.ndarray
    heldout: np.ndarray
    bytes_of: np.ndarray
    vocabulary: Vocabulary

    def save(self, folder: Path) -> None:
        """Writes shards.npz."""
        folder.mkdir(parents=True, exist_ok=True)
        words = {name: np.asarray(value) for name, value in dataclasses.asdict(self.vocabulary).items()}
        arrays = {"tokens": self.tokens, "heldout": self.heldout, "bytes_of": self.bytes_of, **words}
        np.savez_compressed(folder / "shards.npz", allow_pickle=False, **arrays)

    @classmethod
    def load(cls, folder: Path) -> Shards:
        """Reads shards.npz; raises UsageError where there is none."""
        path = folder / "shards.npz"
        if not path.exists():
            raise UsageError(f"{path} does not exist. Build it: python -m experiments.tokenizer --out {folder}")
        with np.load(path, allow_pickle=False) as archive:
            words = {name: archive[name] for name in ("prefix", "frame", "ask", "keys", "values")}
            vocabulary = Vocabulary(size=int(archive["size"]), **words)
            return cls(archive["tokens"], archive["heldout"], archive["bytes_of"], vocabulary)
