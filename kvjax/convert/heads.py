"""Heads of one layer, put in another order, pooled, or turned into fewer along principal directions.

`Attention` is a layer's parameters as `GroupedQueryAttention` has them (q, k, v, o, each with a kernel and perhaps a
bias), as NumPy arrays. `reads` is for each query head the kv head that it reads. Moments are sums of outer products
over all heads of a token, float64 [K, H, K, H]. The equations are those of section 3 of "Effectively Compress KV Heads
for LLM" (Yu et al., 2024, arXiv 2406.07056).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]
Attention = dict[str, dict[str, Floats]]


def principal(moments: Floats, rank: int) -> Floats:
    """[rank, n]: the orthonormal directions with the largest moments [n, n], largest first."""
    _, vectors = np.linalg.eigh(moments)
    return vectors[:, ::-1][:, :rank].T


def group_bases(moments: Floats, heads: int) -> Floats:
    """[K', H, tH]: of each of K' groups of t heads in a row, the top H directions of what its heads hold (Ω_i, Ψ_i)."""
    k, h = moments.shape[:2]
    t = k // heads
    groups = (moments[i * t : (i + 1) * t, :, i * t : (i + 1) * t].reshape(t * h, t * h) for i in range(heads))
    return np.stack([principal(group, h) for group in groups])


def layer_basis(moments: Floats, heads: int) -> Floats:
    """[K, H, R], R = K'·H: the top directions of all heads together, transposed, as `ProjectedKeys` has them."""
    k, h = moments.shape[:2]
    return principal(moments.reshape(k * h, k * h), heads * h).T.reshape(k, h, heads * h)


def pooled(projection: Mapping[str, Floats], heads: int) -> dict[str, Floats]:
    """The mean of each group of heads in a row: kernel [D, K, H] to [D, K', H], bias [K, H] to [K', H]."""

    def pool(x: Floats) -> Floats:
        return x.reshape(*x.shape[:-2], heads, -1, x.shape[-1]).mean(-2)

    return {name: pool(x) for name, x in projection.items()}


def projected(projection: Mapping[str, Floats], bases: Floats) -> dict[str, Floats]:
    """Each group of heads along its own directions [K', H, tH]: kernel [D, K, H] to [D, K', H] (W' = W Ωᵀ)."""
    groups = len(bases)

    def project(x: Floats) -> Floats:
        return np.einsum("...gx,ghx->...gh", x.reshape(*x.shape[:-2], groups, -1), bases)

    return {name: project(x) for name, x in projection.items()}


def absorbed_values(attention: Attention, bases: Floats, reads: Sequence[int]) -> Attention:
    """Values along `bases`, and the output projection of each query head behind its part of them."""
    own = _blocks(bases, reads)
    kernel = np.einsum("nch,nhd->ncd", own, attention["o"]["kernel"])
    return attention | {"v": projected(attention["v"], bases), "o": attention["o"] | {"kernel": kernel}}


def absorbed_keys(attention: Attention, bases: Floats, reads: Sequence[int]) -> Attention:
    """Keys along `bases`, and queries that meet them; only where nothing stands between projection and product."""
    own = _blocks(bases, reads)
    queries = {name: np.einsum("...nh,nch->...nc", x, own) for name, x in attention["q"].items()}
    return attention | {"k": projected(attention["k"], bases), "q": queries}


def _blocks(bases: Floats, reads: Sequence[int]) -> Floats:
    """[N, H, H]: of each query head's group, the columns that belong to the kv head it reads."""
    groups, h, width = bases.shape
    by_head = bases.reshape(groups, h, width // h, h).swapaxes(1, 2).reshape(-1, h, h)
    return by_head[np.array(reads)]


def ordered(attention: Attention, order: Sequence[int]) -> Attention:
    """The same attention with its kv heads in another order, each with the query heads that read it (all as many)."""
    size = attention["q"]["kernel"].shape[1] // len(order)
    queries = [head * size + i for head in order for i in range(size)]
    of = {"q": queries, "k": list(order), "v": list(order)}
    moved = {part: {name: x[..., heads, :] for name, x in attention[part].items()} for part, heads in of.items()}
    kernel = attention["o"]["kernel"][queries]
    return attention | moved | {"o": attention["o"] | {"kernel": kernel}}


def reordered(moments: Floats, order: Sequence[int]) -> Floats:
    """Moments [K, H, K, H] of the heads in another order."""
    return moments[list(order)][:, :, list(order)]


def cosine(moments: Floats) -> Floats:
    """[K, K]: how alike two heads are as they stand, channel by channel; 1 is the same up to a positive factor."""
    power = np.einsum("khkh->k", moments)
    return np.einsum("khjh->kj", moments) / _positive(np.sqrt(np.outer(power, power)))


def alignment(moments: Floats) -> Floats:
    """[K, K]: how alike two heads are up to a rotation of their channels, in [0, 1].

    Centred kernel alignment without the centring (Kornblith et al., 2019, arXiv 1905.00414): |M_ab|² / (|M_aa| |M_bb|).
    """
    squares = np.einsum("khjc,khjc->kj", moments, moments)
    return squares / _positive(np.sqrt(np.outer(np.diag(squares), np.diag(squares))))


def group_alike(likeness: Floats, heads: int) -> tuple[int, ...]:
    """An order of K heads in which each t = K / `heads` in a row are alike, from their likeness [K, K].

    Greedy: the most alike pair of those left starts a group, which takes the head most alike its members on average
    until it is full. Groups come in the order of their first heads.
    """
    left, size = list(range(len(likeness))), len(likeness) // heads
    groups = []
    while left:
        group = list(_most_alike(likeness, left)) if size > 1 else [left[0]]
        while len(group) < size:
            rest = [head for head in left if head not in group]
            group.append(max(rest, key=lambda head: (likeness[head, group].mean(), -head)))
        left = [head for head in left if head not in group]
        groups.append(sorted(group))
    return tuple(head for group in sorted(groups) for head in group)


def _most_alike(likeness: Floats, among: Sequence[int]) -> tuple[int, int]:
    pairs = [(a, b) for i, a in enumerate(among) for b in among[i + 1 :]]
    return max(pairs, key=lambda pair: (likeness[pair], -pair[0], -pair[1]))


def _positive(x: Floats) -> Floats:
    return np.where(x > 0, x, 1.0)
