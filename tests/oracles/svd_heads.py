"""Fewer kv heads by the principal directions of keys and values (algorithms.md, section 6), slowly, for one sequence.

Written from the specification: directions come from the singular vectors of the stacked vectors themselves, nothing is
absorbed into weights, and the queries' projection is that of a vector that is zero but for the head's own slot.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Numpy = np.ndarray[Any, Any]


def rotated(x: Numpy, position: int, theta: float) -> Numpy:
    """[H]: channel i turned against channel i + H/2 by position / theta**(2i / H)."""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        c, s = np.cos(angle), np.sin(angle)
        out[i] = c * x[i] - s * x[i + half]
        out[i + half] = s * x[i] + c * x[i + half]
    return out


def top(rows: Numpy, rank: int) -> Numpy:
    """[rank, n]: the first right singular vectors of rows [m, n]."""
    return np.linalg.svd(rows, full_matrices=False)[2][:rank]


def attend(logits: Numpy, values: Numpy) -> Numpy:
    weights = np.exp(logits - logits.max())
    return weights @ values / weights.sum()


def converted(
    q: Numpy, k: Numpy, v: Numpy, reads: list[int], scale: float, omegas: Numpy, psi: Numpy, *, joint: bool
) -> Numpy:
    """What query heads read after the conversion, back in the channels of the original heads: [T, N, H].

    Args:
      q: [T, N, H]; k: [T, K, H], both rotated where the model rotates. v: [T, K, H].
      omegas: [K', H, tH], the directions of the values of each group.
      psi: those of keys: [R, K·H] of all heads together where `joint`, else [K', H, tH] of each group.
    """
    tokens, n, h = q.shape
    t = k.shape[1] // len(omegas)
    out = np.zeros((tokens, n, h))
    for head in range(n):
        group, place = divmod(reads[head], t)
        slot = slice(place * h, (place + 1) * h)
        mine = slice(group * t, (group + 1) * t)
        for now in range(tokens):
            if joint:
                wide = np.zeros(k.shape[1] * h)
                wide[reads[head] * h : (reads[head] + 1) * h] = q[now, head]
                keys = [psi @ k[s].reshape(-1) for s in range(now + 1)]
                query = psi @ wide
            else:
                keys = [psi[group] @ k[s, mine].reshape(-1) for s in range(now + 1)]
                query = psi[group][:, slot] @ q[now, head]
            values = np.stack([omegas[group] @ v[s, mine].reshape(-1) for s in range(now + 1)])
            read = attend(scale * np.stack(keys) @ query, values)
            out[now, head] = omegas[group][:, slot].T @ read
    return out


def plain(q: Numpy, k: Numpy, v: Numpy, reads: list[int], scale: float) -> Numpy:
    """Ordinary attention: [T, N, H]."""
    out = np.zeros_like(q)
    for head, kv in enumerate(reads):
        for now in range(len(q)):
            out[now, head] = attend(scale * k[: now + 1, kv] @ q[now, head], v[: now + 1, kv])
    return out


class Decoder:
    """One layer, tied embeddings, rotary embedding where `theta` is given; params as the model's, float64."""

    def __init__(self, params: Any, theta: float | None, eps: float) -> None:
        self.embedding = params["embed"]["embedding"]
        self.layer, self.final = params["layers_0"], params["final_norm"]["scale"]
        self.theta, self.eps = theta, eps

    def norm(self, x: Numpy, scale: Numpy) -> Numpy:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * scale

    def project(self, x: Numpy, name: str) -> Numpy:
        part = self.layer["attention"][name]
        return np.einsum("td,dnh->tnh", x, part["kernel"]) + part.get("bias", 0)

    def turned(self, x: Numpy) -> Numpy:
        if self.theta is None:
            return x
        return np.stack([[rotated(head, t, self.theta) for head in row] for t, row in enumerate(x)])

    def qkv(self, tokens: Numpy) -> tuple[Numpy, Numpy, Numpy]:
        x = self.norm(self.embedding[tokens], self.layer["attention_norm"]["scale"])
        q, k, v = (self.project(x, name) for name in "qkv")
        return self.turned(q), self.turned(k), v

    def logits(self, tokens: Numpy, read: Numpy) -> Numpy:
        """[T, V], given what the query heads have read [T, N, H]."""
        o, mlp = self.layer["attention"]["o"], self.layer["mlp"]
        x = self.embedding[tokens] + np.einsum("tnh,nhd->td", read, o["kernel"]) + o.get("bias", 0)
        y = self.norm(x, self.layer["mlp_norm"]["scale"])
        gate = y @ mlp["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
        return self.norm(x, self.final) @ self.embedding.T
