"""`generate`: text from prompts, or from questions about a context that is already cached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import methods
from kvjax.cache.method import CacheMethod
from kvjax.engine import prefill as engine_prefill
from kvjax.engine.decode import DecodeState, decode
from kvjax.engine.prefill import Context, bucket, extend, pad
from kvjax.engine.sampling import Sampler
from kvjax.errors import UsageError
from kvjax.models.language_model import LanguageModel

Prompt = str | Sequence[int]
STEPS = 16


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
      texts: one per row, without special tokens.
      tokens: the ids of each row, up to and with its stop token.
      context: the cache as it stands after generation; it can be continued.
    """

    texts: list[str]
    tokens: list[list[int]]
    context: Context

    @property
    def text(self) -> str:
        """The first row's text."""
        return self.texts[0]


def prefill(
    model: LanguageModel,
    prompt: Prompt | Sequence[Prompt],
    method: str | CacheMethod = "full",
    *,
    reserve: int = 256,
    dtype: str = "bfloat16",
) -> Context:
    """Caches one prompt or a batch of them, to be asked about with `generate(model, question, cache=context.fork())`.

    Args:
      prompt: text, token ids, or a list of either.
      method: a `CacheMethod` or its name ("snapkv:tokens=256+int4").
      reserve: tokens that each row can append later.
      dtype: of tokens that are stored exactly.

    Raises:
      UsageError: an unknown method, an empty prompt, or a context beyond the model's limit.
    """
    rows = _encode(model, prompt, special=True)
    return engine_prefill.prefill(model, rows, _method(method), reserve=reserve, dtype=dtype)


def generate(
    model: LanguageModel,
    prompt: Prompt | Sequence[Prompt],
    method: str | CacheMethod = "full",
    *,
    cache: Context | None = None,
    max_new_tokens: int = 128,
    sampler: Sampler = Sampler(),
    stop: Sequence[int] | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    on_tokens: Callable[[np.ndarray], None] | None = None,
) -> Generation:
    """Continues one prompt or a batch of prompts of different lengths.

    Args:
      prompt: text, token ids, or a list of either. With `cache`: what is appended to each row (one prompt serves all).
      method: how the cache is kept; ignored with `cache`, which already is of a method.
      cache: a context from `prefill`. It is consumed; pass `context.fork()` to ask again.
      max_new_tokens: the most tokens per row.
      stop: token ids that end a row; default are the tokenizer's end tokens.
      seed: of the sampler; the same seed gives the same text.
      dtype: of tokens that are stored exactly.
      on_tokens: called with int32 [B, n] after each run of steps (-1 after a row's end), for streaming output.

    Raises:
      UsageError: as in `prefill`.
      CacheFullError: the context has no room for the question and the answer; nothing has been written.
    """
    rows = _encode(model, prompt, special=cache is None)
    if cache is None:
        context = engine_prefill.prefill(model, rows, _method(method), reserve=max_new_tokens, dtype=dtype)
    else:
        context = append(model, cache, rows, then=max_new_tokens)
    stop_ids = tuple(model.tokenizer.stop_ids if stop is None else stop)
    state = DecodeState(
        cache=context.cache,
        logits=context.logits,
        done=jnp.zeros(context.logits.shape[0], bool),
        key=jax.random.key(seed),
        steps=jnp.int32(0),
    )
    pieces = []
    while (left := max_new_tokens - sum(p.shape[1] for p in pieces)) > 0:
        state, tokens = decode(model.module, sampler, stop_ids, min(STEPS, left), model.params, state)
        pieces.append(np.asarray(tokens))
        if on_tokens is not None:
            on_tokens(pieces[-1])
        if bool(np.asarray(state.done).all()):
            break
    ids = np.concatenate(pieces, axis=1) if pieces else np.zeros((len(rows), 0), np.int32)
    kept = [[int(t) for t in row if t >= 0] for row in ids]
    texts = [model.tokenizer.decode([t for t in row if t not in stop_ids]) for row in kept]
    return Generation(texts, kept, Context(state.cache, state.logits))


def append(model: LanguageModel, context: Context, rows: Sequence[Sequence[int]], then: int = 0) -> Context:
    """Appends token ids to every row of a context (one list serves all rows); `then` more must fit. Consumes it.

    Raises:
      CacheFullError: no room; nothing has been written.
      UsageError: another number of rows, or beyond the model's positions.
    """
    batch = context.logits.shape[0]
    if len(rows) == 1:
        rows = list(rows) * batch
    if len(rows) != batch:
        raise UsageError(f"{len(rows)} prompts for a context of {batch} rows; give one prompt, or one per row")
    counts = np.array([len(ids) for ids in rows])
    context.cache.check_room([int(n) + then for n in counts])
    engine_prefill.check_context(model, int((np.asarray(context.cache.lengths) + counts).max()) + then)
    if not counts.any():
        return context
    tokens, lengths = pad(rows, bucket(int(counts.max())))
    logits, cache = extend(model.module, model.params, context.cache, context.logits, tokens, lengths)
    return Context(cache, logits)


def _method(method: str | CacheMethod) -> CacheMethod:
    return methods.parse(method) if isinstance(method, str) else method


def _encode(model: LanguageModel, prompt: Prompt | Sequence[Prompt], special: bool) -> list[list[int]]:
    one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], (int, np.integer)))
    prompts = cast(Sequence[Prompt], [prompt] if one else prompt)
    return [model.tokenizer.encode(p, special=special) if isinstance(p, str) else [int(t) for t in p] for p in prompts]
