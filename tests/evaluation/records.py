"""Records as a comparison writes them, made up."""

from __future__ import annotations

import itertools

FULL_BYTES = 4_194_304
ACCURACY = {"full": 0.96, "random": 0.22, "streaming_llm": 0.2, "snapkv": 0.4, "int4": 0.95, "int8": 0.96, "int2": 0.1}
RATIO = {"full": 1.03, "random": 0.28, "streaming_llm": 0.28, "snapkv": 0.28, "int4": 0.282, "int8": 0.53, "int2": 0.16}
TASKS = ("needle", "kv", "vt")


def record(method: str, task: str = "kv", seed: int = 0, *, context: int = 1024, **values) -> dict:
    """A record as a comparison writes it; the score is `ACCURACY` exactly."""
    size = round(FULL_BYTES * RATIO.get(method, 0.4))
    return {
        "method": method,
        "task": task,
        "context": context,
        "seed": seed,
        "score": ACCURACY.get(method, 0.5),
        "examples": 100,
        "perplexity": None,
        "kl": 0.25,
        "cache_bytes": size,
        "effective_bytes": size - 64,
        "bytes_per_token": size / context,
        "ratio": size / FULL_BYTES,
        "prefill_ms": 12.5,
        "decode_ms_per_token": 2.25,
        "layer_bytes": [size // 4] * 4,
        "note": "",
    } | values


def sweep(methods=tuple(ACCURACY), tasks=TASKS, context: int = 1024) -> list[dict]:
    return [record(m, t, s, context=context) for m, t, s in itertools.product(methods, tasks, range(3))]
