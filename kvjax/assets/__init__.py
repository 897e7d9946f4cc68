"""What ships with the package: the reference model and the held-out text."""

from __future__ import annotations

import gzip
from pathlib import Path

REFERENCE = Path(__file__).parent / "reference"
HELDOUT = Path(__file__).parent / "heldout" / "stdlib.txt.gz"


def heldout_text() -> str:
    """About 1 MB of the Python 3.11 standard library's source that no part of the reference model's training saw."""
    return gzip.decompress(HELDOUT.read_bytes()).decode()
