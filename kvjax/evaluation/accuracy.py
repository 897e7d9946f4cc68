"""What a method loses: free-running answers, perplexity, and fidelity to the full cache, from one pass over the answer.

Greedy free-running decoding gives exactly the answer if and only if, fed with the answer's tokens, the model's
likeliest next token is the right one each time: up to the first mistake both have seen the same tokens, in the same
cache. So one teacher-forced run, a token at a time as decoding does it, yields the exact-match score together with
the logits that are compared with the full cache's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax
import numpy as np

from kvjax.cache.method import CacheMethod
from kvjax.engine.prefill import Context
from kvjax.evaluation import program
from kvjax.evaluation.batch import Batch, Piece, feed
from kvjax.evaluation.profile import check_bytes
from kvjax.evaluation.tally import Tally
from kvjax.typing import Array


def run(
    batch: Batch, reference: CacheMethod, methods: Mapping[str, CacheMethod], tallies: Mapping[str, Tally], errors: bool
) -> Iterator[str]:
    """Runs a batch with every method and adds to its tally; yields each name when it is done.

    Args:
      reference: what fidelity refers to, the full cache.
      methods: by name, budgets in tokens.
      errors: whether the error of the attention output is measured too.

    Raises:
      KvjaxError: a cache's live buffers are not what its method declares.
    """
    pieces = batch.pieces()
    contexts: dict[str, Context] = {}
    right = {name: np.ones(len(batch.items), bool) for name in methods}
    expected = batch.start(reference)
    for piece in pieces:
        last = piece is pieces[-1]
        recorded = _record(batch, expected, piece) if errors and last else None
        expected, predicted = feed(batch.model, expected, piece)
        for name, method in methods.items():
            context = contexts.pop(name, None) or batch.start(method)
            check_bytes(context.cache)
            if recorded is not None:
                layers = program.attention_errors(context.cache, recorded, piece.steps)
                tallies[name].attention_errors.append(float(layers.mean()))
            context, ours = feed(batch.model, context, piece)
            right[name] &= _grade(piece, ours, predicted, tallies[name])[: len(batch.items)]
            if last:
                tallies[name].add_rows(right[name], list(batch.items))
                yield name
            else:
                contexts[name] = context


def warm(batch: Batch, reference: CacheMethod, methods: Mapping[str, CacheMethod]) -> Iterator[str]:
    """Compiles what `run` needs, the methods side by side, for XLA uses little more than one core per program.

    Yields each name when its programs are ready.
    """
    piece = batch.pieces()[0]
    context = batch.start(reference)
    recorded = _record(batch, context, piece)
    predicted = feed(batch.model, context, piece)[1]
    _grade(piece, predicted, predicted, Tally())

    def touch(name: str) -> str:
        context = batch.start(methods[name])
        jax.block_until_ready(program.attention_errors(context.cache, recorded, piece.steps))
        jax.block_until_ready(feed(batch.model, context, piece))
        return name

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in as_completed([pool.submit(touch, name) for name in methods]):
            yield done.result()


def _record(batch: Batch, context: Context, piece: Piece) -> tuple[program.LayerRecording, ...]:
    model = batch.model
    return program.record_steps(model.module, model.params, context.cache, piece.tokens, piece.fed, piece.steps)


def _grade(piece: Piece, predicted: Array, reference: Array, tally: Tally) -> np.ndarray:
    """Adds a piece's tokens to the tally; returns for each row whether all that are graded were predicted, bool [B]."""
    hits, surprisal, divergence = program.grade(predicted, reference, piece.tokens, piece.graded)
    tally.add_tokens(piece.graded, np.asarray(surprisal), np.asarray(divergence))
    return np.all(np.asarray(hits) | ~piece.graded, axis=1)
