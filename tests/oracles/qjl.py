"""QJL (Zandieh et al. 2024, arXiv 2406.03482): one sign per row of a random matrix, and the norm of the key.

⟨q, k⟩ ≈ sqrt(π / 2) / m · ‖k‖ · ⟨S q, sign(S k)⟩, unbiased over Gaussian S [m, H]. The query is not reduced to signs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.oracles.coded_attention import decode_over, flushed, slid
from tests.oracles.quantised import Coded, encode
from tests.oracles.rounding import Stored
from tests.oracles.row import Row


def orthogonal_sketch(gaussian: np.ndarray) -> np.ndarray:
    """gaussian [m, H] -> S [m, H]: every H rows (the last block may have fewer) made orthogonal, of length √H."""
    rows, dim = gaussian.shape
    blocks = [np.linalg.qr(gaussian[start : start + dim].T)[0].T for start in range(0, rows, dim)]
    return np.concatenate(blocks) * np.sqrt(dim)


def signs(k: np.ndarray, sketch: np.ndarray) -> np.ndarray:
    """k [S, H], sketch [m, H] -> [S, m] of +1 (S k > 0) and -1."""
    return np.where(k @ sketch.T > 0, 1.0, -1.0)


def estimate(query: np.ndarray, bits: np.ndarray, norms: np.ndarray, sketch: np.ndarray) -> np.ndarray:
    """query [H], bits [S, m], norms [S], sketch [m, H] -> estimates [S] of the inner products."""
    return np.sqrt(np.pi / 2) / len(sketch) * norms * (bits @ (sketch @ query))


def decode(bits: np.ndarray, norms: np.ndarray, sketch: np.ndarray) -> np.ndarray:
    """The vectors [S, H] whose inner products with a query are the estimates."""
    return np.sqrt(np.pi / 2) / len(sketch) * norms[:, None] * (bits @ sketch)


def outlier_channels(k: np.ndarray, *, group: int, count: int) -> np.ndarray:
    """k [S, H] -> bool [S, H]: in every `group` tokens the `count` channels with the largest norm over these tokens."""
    out = np.zeros(k.shape, bool)
    for start in range(0, len(k), group):
        norms = np.sqrt((k[start : start + group] ** 2).sum(axis=0))
        out[start : start + group, np.argsort(-norms, kind="stable")[:count]] = True
    return out


@dataclasses.dataclass(frozen=True)
class Sketched:
    """One head's keys. products [S, m]: S k, of which bits are the signs; norms [S]. outlier: bool [S, H], and the
    same three of the part of the key in those channels, whose rows are `outlier_sketch`'s. decoded [S, H].
    """

    products: np.ndarray
    bits: np.ndarray
    norms: np.ndarray
    outlier: np.ndarray
    outlier_products: np.ndarray
    outlier_bits: np.ndarray
    outlier_norms: np.ndarray
    decoded: np.ndarray


def encode_keys(
    k: np.ndarray, sketch: np.ndarray, outlier_sketch: np.ndarray, *, group: int, outliers: int, stored: Stored
) -> Sketched:
    """k [S, H], sketch [m, H]. outliers: channels of each group that are sketched on their own; 0 is the plain form.

    outlier_sketch [m', H]: the release takes the first m' rows of `sketch`. Key and query are sums of
    two parts, each zero in the other's channels; the estimates of the two parts add up. `stored`: how norms are. The
    release stores ‖k‖ and the outliers' norm, and the rest's is the root of the difference of their squares: here each
    part has its norm.
    """
    outlier = outlier_channels(k, group=group, count=outliers)
    decoded, parts = np.zeros(k.shape), []
    for part, mask, matrix in ((k * ~outlier, ~outlier, sketch), (k * outlier, outlier, outlier_sketch)):
        bits, norms = signs(part, matrix), stored(np.sqrt((part**2).sum(axis=1)))
        parts.append((part @ matrix.T, bits, norms))
        decoded += decode(bits, norms, matrix) * mask
    (products, bits, norms), (outlier_products, outlier_bits, outlier_norms) = parts
    return Sketched(products, bits, norms, outlier, outlier_products, outlier_bits, outlier_norms, decoded)


@dataclasses.dataclass
class QjlTrace:
    """As `KiviTrace`, with the sketches of kv head h in keys[h]."""

    prompt_output: np.ndarray
    outputs: list[np.ndarray]
    coded_keys: list[int]
    coded_values: list[int]
    keys: list[Sketched]
    values: list[Coded]


def qjl(
    row: Row,
    *,
    sketch: np.ndarray,
    outlier_sketch: np.ndarray,
    group: int,
    outliers: int,
    residual: int,
    value_bits: int,
    value_group: int,
    stored: Stored,
) -> QjlTrace:
    """Rotated keys are sketched by the block of `residual` tokens, values coded per token behind a sliding window of
    exactly `residual` tokens (as in `kivi_released`). One sketch matrix for all kv heads. Logits are estimates / √H.
    """
    assert residual % group == 0
    counts = range(row.prompt, row.tokens + 1)
    coded_keys = [flushed(tokens, residual) for tokens in counts]
    coded_values = [slid(tokens, residual) for tokens in counts]
    heads, k = range(row.kv_heads), row.rotated[1][: coded_keys[-1]]
    form = {"group": group, "outliers": outliers, "stored": stored}
    keys = [encode_keys(k[:, h], sketch, outlier_sketch, **form) for h in heads]
    values = [encode(row.v[: coded_values[-1], h], value_bits, value_group, 1) for h in heads]
    held_keys, held_values = (np.stack([c.decoded for c in coded], axis=1) for coded in (keys, values))
    outputs = decode_over(row, held_keys, held_values, coded_keys, coded_values)
    return QjlTrace(row.attention(row.prompt)[0], outputs, coded_keys, coded_values, keys, values)
