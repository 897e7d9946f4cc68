"""What a user asks of the engine, checked on the host before anything is compiled."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import methods
from kvjax.cache.method import CacheMethod
from kvjax.engine.calibrated import SUFFIX, Calibrated, load_calibration
from kvjax.errors import UsageError
from kvjax.models.language_model import LanguageModel

Prompt = str | Sequence[int] | np.ndarray | jax.Array

STORED_DTYPES = ("bfloat16", "float16", "float32")
SEEDS = 2**32


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Raises UsageError unless `value` is a `kind`; `example` says how to get one."""
    if not isinstance(value, kind):
        raise UsageError(f"{name} is a {kind.__name__}, such as {example}; got {shown(value)}.")


def as_method(method: str | CacheMethod | Calibrated) -> CacheMethod | Calibrated:
    """A method, or the one of this name, or the one that was calibrated into this file (*.safetensors).

    Raises:
      UsageError: an unknown name, no such file, or none of these.
    """
    if isinstance(method, str):
        return load_calibration(method) if method.endswith(SUFFIX) else methods.parse(method)
    if not isinstance(method, CacheMethod | Calibrated):
        raise UsageError(
            "method is a CacheMethod or a name, such as kvjax.methods.kivi(bits=2) or 'kivi-2', or what "
            f"kvjax.calibrate returns, or the path of its file; got {shown(method)}."
        )
    return method


def as_rows(model: LanguageModel, prompt: Prompt | Sequence[Prompt], *, special: bool) -> list[list[int]]:
    """The token ids of each row, for one prompt or several; `special` as in `Tokenizer.encode`.

    Raises:
      UsageError: neither text nor token ids, or an id outside the vocabulary.
    """
    if not isinstance(prompt, Sequence | np.ndarray | jax.Array):
        raise UsageError(f"a prompt is text or token ids, or a list of such prompts; got {shown(prompt)}.")
    one = isinstance(prompt, str) or (len(prompt) > 0 and not isinstance(prompt[0], str) and np.ndim(prompt[0]) == 0)
    return [_row(model, row, ids, special) for row, ids in enumerate([prompt] if one else prompt)]


def _row(model: LanguageModel, row: int, prompt: Any, special: bool) -> list[int]:
    try:
        ids = np.asarray(model.tokenizer.encode(prompt, special=special) if isinstance(prompt, str) else prompt)
    except ValueError:  # NumPy on a list of lists of different lengths
        ids = np.array(None)
    if ids.size == 0:
        return []
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UsageError(f"prompt {row} is neither text nor a list of token ids (whole numbers): {prompt!r:.80}")
    size = model.config.vocab_size
    if (outside := ids[(ids < 0) | (ids >= size)]).size:
        raise UsageError(
            f"prompt {row} holds token id {outside[0]}, but model {model.name!r} has the ids 0 to {size - 1}. "
            "Encode the text with this model's tokenizer: model.tokenizer.encode(text)."
        )
    return ids.tolist()


def as_stop_ids(model: LanguageModel, stop: Sequence[int] | None) -> tuple[int, ...]:
    """Token ids that end a row; those of the tokenizer where none are given."""
    try:
        return model.tokenizer.stop_ids if stop is None else tuple(operator.index(token) for token in stop)
    except TypeError:
        raise UsageError(
            f"stop is a list of token ids, such as [model.tokenizer.token_id('<eos>')]; got {stop!r:.80}."
        ) from None


def as_count(name: str, value: int, below: int | None = None) -> int:
    """A whole number of at least 0 (and less than `below`)."""
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if count < 0 or (below is not None and count >= below):
        upper = "" if below is None else f" and less than {below}"
        raise UsageError(f"{name} is a whole number of at least 0{upper}; got {value!r:.80}.")
    return count


def as_stored_dtype(dtype: Any) -> str:
    """The name of the dtype in which a cache keeps tokens exactly."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in STORED_DTYPES:
        raise UsageError(
            f"dtype is how a cache stores exact tokens: one of {', '.join(STORED_DTYPES)}; got {dtype!r:.80}. To store "
            "them in fewer bits, compose the method with a codec: 'full+int8'."
        )
    return name


def shown(x: Any) -> str:
    """A value and its type, short enough for a message."""
    return f"{getattr(x, '__name__', None) or repr(x):.60}, of type {type(x).__name__}"
