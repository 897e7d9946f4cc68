"""KVTuner (Li et al. 2025, arXiv 2502.04420): bits for the keys and the values of each layer, chosen offline.

Errors of the attention output per layer and pair (key bits, value bits), pairs that lose to another dropped, then one
pair per layer within a limit of average bits. The paper searches for task accuracy with Optuna over clusters of
layers; here the search is over the sum of the layers' errors, exhaustive or by dynamic programming, and which layers
share a pair is an argument. So this transcribes the sensitivity and the pruning, and replaces the search.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from tests.oracles.coded_attention import decode_over
from tests.oracles.kivi_released import kivi_released
from tests.oracles.quantised import encode
from tests.oracles.row import Row

Pair = tuple[int, int]
"""(key bits, value bits)."""


def relative_error(exact: np.ndarray, other: np.ndarray) -> float:
    """‖exact - other‖ / ‖exact‖, Euclidean, over all entries (which norm is not in the description)."""
    return float(np.sqrt(((exact - other) ** 2).sum() / (exact**2).sum()))


def layer_errors(row: Row, pairs: Sequence[Pair], *, group: int | None, residual: int) -> list[float]:
    """The relative error of the decoded tokens' attention output for each pair, the queries being exact.

    group and residual: KIVI mode (the paper: 32, 32), as in `kivi_released`. group None: per-token mode, one group of
    H channels per token and head for keys and values, nothing kept exact, not even the token itself.
    """
    exact = row.attention(row.tokens)[0][row.prompt :]
    errors = []
    for key_bits, value_bits in pairs:
        if group is None:
            outputs = _per_token(row, key_bits, value_bits)
        else:
            form = {"key_bits": key_bits, "value_bits": value_bits, "group": group, "residual": residual}
            outputs = kivi_released(row, **form).outputs
        errors.append(relative_error(exact, np.stack(outputs)))
    return errors


def _per_token(row: Row, key_bits: int, value_bits: int) -> list[np.ndarray]:
    k, dim = row.rotated[1], row.v.shape[-1]
    keys = [encode(k[:, h], key_bits, dim, 1).decoded for h in range(row.kv_heads)]
    values = [encode(row.v[:, h], value_bits, dim, 1).decoded for h in range(row.kv_heads)]
    counts = [t + 1 for t in range(row.prompt, row.tokens)]
    return decode_over(row, np.stack(keys, axis=1), np.stack(values, axis=1), counts, counts)


def pareto(pairs: Sequence[Pair], errors: Sequence[float]) -> list[int]:
    """The pairs (by index, fewest bits first) to which no other is at least equal in bits and error, and better in one.

    Bits of a pair: key bits + value bits. Of pairs equal in both, all stay.
    """
    kept = []
    for i, pair in enumerate(pairs):
        beaten = False
        for j, other in enumerate(pairs):
            no_worse = sum(other) <= sum(pair) and errors[j] <= errors[i]
            better = sum(other) < sum(pair) or errors[j] < errors[i]
            beaten = beaten or (no_worse and better)
        if not beaten:
            kept.append(i)
    return sorted(kept, key=lambda i: (sum(pairs[i]), errors[i]))


def same_choices(kept: Sequence[Sequence[int]]) -> list[list[int]]:
    """Layers grouped by equal lists of pairs that survived `pareto`: a stand-in for the paper's clustering.

    That also looks at the size of the errors, by an algorithm that the description does not give.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, indices in enumerate(kept):
        groups.setdefault(tuple(sorted(indices)), []).append(layer)
    return list(groups.values())


def _options(
    errors: Sequence[Sequence[float]], pairs: Sequence[Pair], kept: Sequence[Sequence[int]], group: Sequence[int]
) -> list[tuple[int, int, float]]:
    """(index of the pair, bits, error) summed over the layers of a group, for pairs that survived in all of them."""
    shared = [i for i in kept[group[0]] if all(i in kept[layer] for layer in group)]
    return [(i, sum(pairs[i]) * len(group), sum(errors[layer][i] for layer in group)) for i in shared]


def choose_exhaustively(
    errors: Sequence[Sequence[float]],
    pairs: Sequence[Pair],
    kept: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    *,
    limit: float,
) -> tuple[list[int], float]:
    """errors [L][pairs], kept[l] from `pareto` -> the pair's index for each layer, and the gap to the next best.

    The smallest sum of errors whose average bits, Σ (key bits + value bits) / 2L, do not exceed `limit`; of equal ones
    the one with fewer bits. Layers of a group share a pair.
    """
    layers = sum(len(group) for group in groups)
    found = []
    for choice in itertools.product(*(_options(errors, pairs, kept, group) for group in groups)):
        bits = sum(option[1] for option in choice)
        if bits <= limit * 2 * layers + 1e-9:
            found.append((sum(option[2] for option in choice), bits, [option[0] for option in choice]))
    found.sort(key=lambda entry: entry[:2])
    gap = (found[1][0] - found[0][0]) / max(found[1][0], 1e-300) if len(found) > 1 else np.inf
    return _spread(found[0][2], groups, layers), float(gap)


def choose_dynamically(
    errors: Sequence[Sequence[float]],
    pairs: Sequence[Pair],
    kept: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    *,
    limit: float,
) -> list[int]:
    """The same by dynamic programming over the bits used so far: for each number of them the smallest sum of errors."""
    layers = sum(len(group) for group in groups)
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for group in groups:
        longer: dict[int, tuple[float, list[int]]] = {}
        for used, (error, chosen) in best.items():
            for index, bits, more in _options(errors, pairs, kept, group):
                total = error + more
                if used + bits not in longer or total < longer[used + bits][0]:
                    longer[used + bits] = (total, [*chosen, index])
        best = longer
    affordable = [(error, bits, chosen) for bits, (error, chosen) in best.items() if bits <= limit * 2 * layers + 1e-9]
    return _spread(min(affordable, key=lambda entry: entry[:2])[2], groups, layers)


def _spread(chosen: Sequence[int], groups: Sequence[Sequence[int]], layers: int) -> list[int]:
    out = [-1] * layers
    for index, group in zip(chosen, groups, strict=True):
        for layer in group:
            out[layer] = index
    return out
