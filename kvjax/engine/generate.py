"""`generate`: text from prompts, or from questions about a context that is already cached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from kvjax.cache.method import CacheMethod
from kvjax.engine import prefill as engine_prefill
from kvjax.engine.calibrated import Calibrated
from kvjax.engine.decode import DecodeState, decode
from kvjax.engine.prefill import Context, bucket, extend, pad
from kvjax.engine.request import SEEDS, Prompt, as_count, as_method, as_rows, as_stop_ids, check_kind
from kvjax.engine.sampling import Sampler
from kvjax.errors import CacheFullError, UsageError
from kvjax.models.language_model import LanguageModel
from kvjax.models.tokenizer import Tokenizer

STEPS = 16
LOADED = 'kvjax.load("reference")'


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
      tokens: the ids of each row, up to and with its stop token.
      context: the cache as it stands after generation; it can be continued.
      tokenizer: of the model.
      stop_ids: the tokens that end a row.
    """

    tokens: list[list[int]]
    context: Context = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    stop_ids: tuple[int, ...] = dataclasses.field(repr=False)

    @property
    def texts(self) -> list[str]:
        """Each row's text, without special tokens and without its stop token."""
        return [self.tokenizer.decode([t for t in row if t not in self.stop_ids]) for row in self.tokens]

    @property
    def text(self) -> str:
        """The first row's text."""
        return self.texts[0]


def prefill(
    model: LanguageModel,
    prompt: Prompt | Sequence[Prompt],
    method: str | CacheMethod | Calibrated = "full",
    *,
    reserve: int = 256,
    dtype: str = "bfloat16",
    draws: int | Sequence[int] = 0,
) -> Context:
    """Caches one prompt or a batch of them, to be asked about with `generate(model, question, cache=context.fork())`.

    Args:
      prompt: text, token ids, or a list of either.
      method: a `CacheMethod` or its name ("snapkv:tokens=256+int4"), or a calibrated one or the path of its file.
      reserve: tokens that each row can append later.
      dtype: of tokens that are stored exactly.
      draws: which draw of the embeddings each row has, where the model draws them; a number n means n, n + 1, …

    Raises:
      UsageError: an unknown method, an empty prompt, or a context beyond the model's limit.
    """
    check_kind("model", model, LanguageModel, LOADED)
    rows = as_rows(model, prompt, special=True)
    return engine_prefill.prefill(model, rows, as_method(method), reserve=reserve, dtype=dtype, draws=draws)


def generate(
    model: LanguageModel,
    prompt: Prompt | Sequence[Prompt],
    method: str | CacheMethod | Calibrated = "full",
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
      method: how the cache is kept, as in `prefill`; ignored with `cache`, which already is of a method.
      cache: a context from `prefill`. It is consumed; pass `context.fork()` to ask again.
      max_new_tokens: the most tokens per row.
      stop: token ids that end a row; default are the tokenizer's end tokens.
      seed: of the sampler, and the first row's draw where the model draws its embeddings; the same seed gives the
        same text.
      dtype: of tokens that are stored exactly.
      on_tokens: called with int32 [B, n] after each run of steps (-1 after a row's end), for streaming output.

    Raises:
      UsageError: as in `prefill`.
      CacheFullError: the context has no room for the question and the answer; nothing has been written.
    """
    check_kind("model", model, LanguageModel, LOADED)
    check_kind("sampler", sampler, Sampler, "kvjax.Sampler(temperature=0.8, top_p=0.9)")
    stop_ids, steps = as_stop_ids(model, stop), as_count("max_new_tokens", max_new_tokens)
    key = jax.random.key(as_count("seed", seed, below=SEEDS))
    rows = as_rows(model, prompt, special=cache is None)
    if cache is None:
        context = engine_prefill.prefill(model, rows, as_method(method), reserve=steps, dtype=dtype, draws=seed)
    else:
        context = append(model, cache, rows, then=steps)
    state = DecodeState(context.cache, context.logits, model.place_rows(np.zeros(len(context.logits), bool)))
    pieces = [np.zeros((len(context.logits), 0), np.int32)]
    for start in range(0, steps, STEPS):
        count = min(STEPS, steps - start)
        state, tokens = decode(model.module, sampler, stop_ids, STEPS, model.params, state, key, start, count)
        pieces.append(np.asarray(tokens)[:, :count])
        if on_tokens is not None:
            on_tokens(pieces[-1])
        if np.asarray(state.done).all():
            break
    kept = [[int(t) for t in row if t >= 0] for row in np.concatenate(pieces, axis=1)]
    return Generation(kept, Context(state.cache, state.logits), model.tokenizer, stop_ids)


def append(model: LanguageModel, context: Context, rows: Sequence[Sequence[int]], then: int = 0) -> Context:
    """Appends token ids to every row of a context (one list serves all rows); `then` more must fit. Consumes it.

    Raises:
      CacheFullError: no room; nothing has been written.
      UsageError: another number of rows, or beyond the model's positions.
    """
    _check_context(context)
    batch = context.logits.shape[0]
    if len(rows) == 1:
        rows = list(rows) * batch
    if len(rows) != batch:
        raise UsageError(f"{len(rows)} prompts for a context of {batch} rows; give one prompt, or one per row")
    counts = np.array([len(ids) for ids in rows])
    try:
        context.cache.check_room([int(n) + then for n in counts])
    except CacheFullError as error:
        needed = int(counts.max()) + then
        raise CacheFullError(f"{error} With kvjax.prefill: reserve={needed} or more.") from None
    engine_prefill.check_positions(model, int((np.asarray(context.cache.lengths) + counts).max()) + then)
    if not counts.any():
        return context
    tokens, lengths = pad(rows, bucket(int(counts.max())))
    return extend(model, context, tokens, lengths)


def _check_context(context: Context) -> None:
    """Raises UsageError for what is no context, and for one that was consumed."""
    if not isinstance(context, Context):
        raise UsageError(
            f"cache is a context, as kvjax.prefill returns it; got a {type(context).__name__}. A cache alone does not "
            "know which token comes next: keep, save and load the whole context."
        )
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(context)):
        raise UsageError(
            "this context was consumed: an earlier call continued it and took over its buffers. Go on with what that "
            "call returned (its .context), or give context.fork() whenever a context is to be used again."
        )
