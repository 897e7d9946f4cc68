"""What a cache costs, measured: bytes of the live buffers, and the time of prefill and decode when warm."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kvjax.cache.codec import Identity
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.pool import Part
from kvjax.errors import KvjaxError
from kvjax.evaluation.batch import Batch, Piece, feed

REPEATS = 5
STEPS = 8


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median and quartiles of several runs, in milliseconds."""

    median: float
    low: float
    high: float

    def after(self, other: Timing) -> Timing:
        """This work behind the other."""
        return Timing(self.median + other.median, self.low + other.low, self.high + other.high)

    def scaled(self, factor: float) -> Timing:
        """The same in another unit of work."""
        return Timing(self.median * factor, self.low * factor, self.high * factor)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one method's cache costs. Bytes are those of one row, over all layers.

    Attributes:
      layer_bytes: allocated, per layer. cache_bytes: their sum. effective_bytes: the part whose slots hold a token.
      bytes_per_token: cache_bytes over the tokens of the context.
      bits_per_element: bits of the stored keys and values, scales counted, per stored number.
      ratio: cache_bytes over those of a bf16 cache of every token's keys and values. None, both, where there are none.
      tokens_held: tokens that a row holds after its prompt, mean over layers and heads.
      prefill: one exact pass over the prompts (the same for all methods that compress at the prompt's end), the pass in
        which the model repeats them (where a method asks for it), and the compression of every layer; of the whole
        batch.
      decode: one decode step of the whole batch.
      note: that nothing was compressed where the method should; else empty.
    """

    layer_bytes: tuple[int, ...]
    effective_bytes: int
    bytes_per_token: float
    bits_per_element: float | None
    ratio: float | None
    tokens_held: float
    prefill: Timing
    decode: Timing
    note: str

    @property
    def cache_bytes(self) -> int:
        return sum(self.layer_bytes)


def time_pass(batch: Batch) -> Timing:
    """The exact pass over a batch's prompts, which all methods share that compress at the prompt's end, if any do."""
    return timed(batch.record) if batch.records else Timing(0.0, 0.0, 0.0)


def measure(batch: Batch, method: CacheMethod, one_pass: Timing) -> Cost:
    """Profiles `method` (budget in tokens) on a batch that has prompts. Compiles what it needs before it measures.

    Raises:
      KvjaxError: the live buffers are not what the method declares.
    """
    cache = batch.start(method).cache
    check_bytes(cache)
    rows = batch.setting.batch
    prefill, repetition = timed(lambda: batch.start(method)), method.repetition
    if method.prefill == "exact":
        prefill = prefill.after(one_pass)
    if repetition is not None:
        prefill = prefill.after(timed(lambda: batch.repeat(repetition)))
    return Cost(
        layer_bytes=tuple(round(size / rows) for size in cache.layer_bytes),
        effective_bytes=round(cache.effective_bytes / rows),
        bytes_per_token=cache.nbytes / rows / batch.setting.context,
        bits_per_element=_bits_per_element(cache),
        ratio=cache.nbytes / cache.full_bytes if batch.records else None,
        tokens_held=_held(cache),
        prefill=prefill,
        decode=_time_decode(batch, method),
        note=no_op(cache, method),
    )


def check_bytes(cache: ModelCache) -> None:
    """Raises KvjaxError where the buffers of a layer do not add up to what its method declares."""
    for layer, (live, planned) in enumerate(zip(cache.layer_bytes, cache.planned_bytes, strict=True)):
        if live != planned:
            raise KvjaxError(
                f"method {cache.method.name!r} declares {planned} bytes for layer {layer}, but its live buffers hold "
                f"{live}. Its costs cannot be trusted; the error is in the method's plan or in its codecs' `bits`."
            )


def no_op(cache: ModelCache, method: CacheMethod) -> str:
    """Says so where a method that evicts holds every token, one that codes none in its code, or there are no tokens."""
    if not any(layer.segments for layer in cache):
        return "keeps no keys and values"
    codes = method.codes
    evicted = method.budget.evicts and _held(cache) < float(np.mean(np.asarray(cache.lengths)))
    coded = codes and _held(cache, _is_coded) > 0
    if evicted or coded or not (method.budget.evicts or codes):
        forgets = method.budget.evicts and not method.fate.codecs
        return "evicts nothing" if coded and forgets and not evicted else ""
    return "no-op: nothing to compress"


def timed(call: Callable[..., Any], prepare: Callable[[], Any] | None = None) -> Timing:
    """Runs `call` once to warm up and then REPEATS times, blocked until ready.

    `prepare`, if given, makes the argument of each call outside of the measured time.
    """
    spans = []
    for _ in range(REPEATS + 1):
        arguments = [] if prepare is None else [jax.block_until_ready(prepare())]
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        spans.append(1e3 * (time.perf_counter() - start))
    low, median, high = statistics.quantiles(spans[1:], n=4, method="inclusive")
    return Timing(median, low, high)


def _time_decode(batch: Batch, method: CacheMethod) -> Timing:
    steps = min(STEPS, batch.setting.room)
    shape = (batch.setting.batch, batch.setting.room)
    piece = Piece(np.ones(shape, np.int32), np.full(shape[:1], steps, np.int32), np.zeros(shape, bool))
    context = batch.start(method)
    return timed(lambda c: feed(batch.model, c, piece), prepare=context.fork).scaled(1 / steps)


def _bits_per_element(cache: ModelCache) -> float | None:
    stored = [(s, part.dims) for layer in cache for part in layer.parts for s in part.segments]
    size = sum(leaf.nbytes for s, _ in stored for leaf in jax.tree.leaves(s.stores))
    if not stored:
        return None
    return 8 * size / sum(_channels(d) * d.batch * d.kv_heads * s.per_head(d.kv_heads)[1] for s, d in stored)


def _channels(dims: CacheDims) -> int:
    """Of a key and a value together."""
    return dims.head_dim + dims.of_values.head_dim


def _held(cache: ModelCache, of: Callable[[Part], bool] = lambda _: True) -> float:
    """Tokens in the segments that `of` selects: per row, mean over layers and heads."""
    held = [(s, part, layer) for layer in cache for part in layer.parts for s in part.segments if of(s)]
    counts = [
        np.mean(np.asarray(s.per_head(part.dims.kv_heads)[0])) * part.dims.kv_heads / layer.dims.kv_heads
        for s, part, layer in held
    ]
    return float(sum(counts)) / len(cache)


def _is_coded(segment: Part) -> bool:
    return segment.codecs != (Identity(), Identity())
