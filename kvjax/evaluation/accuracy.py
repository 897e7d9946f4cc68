"""What a method loses: free-running answers, perplexity, and fidelity to the full cache, mostly from one pass.

Greedy free-running decoding gives exactly the answer if and only if, fed with the answer's tokens, the model's
likeliest next token is the right one each time: up to the first mistake both have seen the same tokens, in the same
cache. So one teacher-forced run, a token at a time as decoding does it, yields the exact-match score together with
the logits that are compared with the full cache's. Where an answer's parts may come in any order, more than one answer
is right, and a second run feeds the model what it says itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.method import CacheMethod
from kvjax.engine.prefill import Context
from kvjax.evaluation import program
from kvjax.evaluation.batch import Batch, Piece, feed
from kvjax.evaluation.profile import check_bytes
from kvjax.evaluation.tally import Tally
from kvjax.tasks import score
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
    expected = batch.start(reference)
    for piece in pieces:
        last = piece is pieces[-1]
        recorded = _record(batch, expected, piece) if errors and batch.records and last else None
        expected, predicted = feed(batch.model, expected, piece)
        for name, method in methods.items():
            context = contexts.pop(name, None) or batch.start(method)
            check_bytes(context.cache)
            if recorded is not None:
                layers = program.attention_errors(context.cache, recorded, piece.steps)
                tallies[name].attention_errors.append(float(layers.mean()))
            fork = context.fork() if batch.unordered else None
            context, ours = feed(batch.model, context, piece)
            _grade(piece, ours, predicted, tallies[name])
            if not last:
                contexts[name] = context
                continue
            answers = ours if fork is None else feed(batch.model, fork, piece, forced=False)[1]
            tallies[name].add_rows(_right(batch, piece, answers), batch.items)
            yield name


def warm(batch: Batch, reference: CacheMethod, methods: Mapping[str, CacheMethod], errors: bool) -> Iterator[str]:
    """Compiles what `run` needs, the methods side by side, for XLA uses little more than one core per program.

    Yields each name when its programs are ready.
    """
    piece = batch.pieces()[0]
    context = batch.start(reference)
    recorded = _record(batch, context, piece) if errors and batch.records else None
    predicted = feed(batch.model, context, piece)[1]
    _grade(piece, predicted, predicted, Tally())
    _right(batch, piece, predicted)

    def touch(name: str) -> str:
        context = batch.start(methods[name])
        if recorded is not None:
            jax.block_until_ready(program.attention_errors(context.cache, recorded, piece.steps))
        jax.block_until_ready(feed(batch.model, context, piece))
        return name

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in as_completed([pool.submit(touch, name) for name in methods]):
            yield done.result()


def _record(batch: Batch, context: Context, piece: Piece) -> tuple[program.LayerRecording, ...]:
    model = batch.model
    return program.record_steps(model.module, model.params, context.cache, piece.tokens, piece.fed, piece.steps)


def _grade(piece: Piece, predicted: Array, reference: Array, tally: Tally) -> None:
    """Adds a piece's tokens to the tally."""
    surprisal, divergence = program.grade(predicted, reference, piece.tokens, piece.graded)
    tally.add_tokens(piece.graded, np.asarray(surprisal), np.asarray(divergence))


def _right(batch: Batch, piece: Piece, predicted: Array) -> NDArray[np.bool_]:
    """Which rows answer right, bool [rows]; text has no answer. An answer lies within one piece."""
    said = np.asarray(program.said(predicted))
    rows = zip(batch.items, said, piece.graded, strict=False)
    return np.array([i.example is not None and score(i.example, tokens[at]) == 1 for i, tokens, at in rows])
