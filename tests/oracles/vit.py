"""A vision transformer in float64, image by image and head by head, from arXiv 2010.11929 (equations 1 to 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracles.attention import attend_one

_erf = np.vectorize(math.erf)


def _norm(x: np.ndarray, params: Mapping[str, np.ndarray], eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * params["scale"] + params["bias"]


def _project(x: np.ndarray, params: Mapping[str, np.ndarray], axes: int = 1) -> np.ndarray:
    return np.tensordot(x, params["kernel"], axes) + params.get("bias", 0)


def classify(params: Mapping[str, Any], image: np.ndarray, patch: int, layers: int, eps: float) -> np.ndarray:
    """Logits of one image [S, S, C]."""
    corners = range(0, len(image), patch)
    squares = [image[y : y + patch, x : x + patch].reshape(-1) for y in corners for x in corners]
    x = _project(np.stack(squares), params["patches"])
    if "class_token" in params:
        x = np.concatenate([params["class_token"][None], x])
    x = x + params["positions"]
    for layer in range(layers):
        own = params[f"layers_{layer}"]
        inputs, attention = _norm(x, own["attention_norm"], eps), own["attention"]
        q, k, v = (_project(inputs, attention[name]) for name in "qkv")
        group = q.shape[1] // k.shape[1]
        heads = [
            [attend_one(q[t, n], k[:, n // group], v[:, n // group])[0] for n in range(q.shape[1])]
            for t in range(len(x))
        ]
        x = x + _project(np.array(heads), attention["o"], 2)
        up = _project(_norm(x, own["mlp_norm"], eps), own["mlp"]["up"])
        x = x + _project(up * 0.5 * (1 + _erf(up / math.sqrt(2))), own["mlp"]["down"])
    x = _norm(x, params["final_norm"], eps)
    return _project(x[0] if "class_token" in params else x.mean(0), params["head"])
