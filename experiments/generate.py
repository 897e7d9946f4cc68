"""Continue a prompt with the cache kept by any method; the text appears as it is made."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING

from kvjax.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from kvjax.engine.generate import Generation
    from kvjax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Config:
    """Continue a prompt.

    Attributes:
      prompt: the text to continue; "-" reads it from standard input.
      model: a Hugging Face folder, or "reference" for the model that comes with kvjax.
      method: how the cache is kept, as `kvjax methods` lists them: "snapkv:tokens=256+int4"; or the file that `kvjax
        calibrate` made.
      max_new_tokens: the most tokens to make.
      temperature: 0 takes the likeliest token each time; higher is more varied.
      top_k: draw from the k likeliest tokens only.
      top_p: draw from the smallest set of tokens with this probability only.
      seed: the same seed gives the same text.
    """

    prompt: str = "def "
    model: str = "reference"
    method: str = "full"
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


def main(config: Config) -> None:
    """Writes the prompt and its continuation to stdout, and what the cache took to stderr."""
    from rich.console import Console

    import kvjax
    from experiments import compile_cache

    sampler = kvjax.Sampler(config.temperature, config.top_k, config.top_p)
    prompt = read_stdin() if config.prompt == "-" else config.prompt
    compile_cache.enable()
    console = Console(stderr=True)
    with contextlib.ExitStack() as waiting:
        if console.is_terminal:
            waiting.enter_context(console.status("loading the model and compiling"))
        model = kvjax.load(config.model)
        stream = Stream(model, before=prompt)

        def show(tokens: np.ndarray) -> None:
            waiting.close()
            stream(tokens)

        made = kvjax.generate(
            model,
            prompt,
            config.method,
            max_new_tokens=config.max_new_tokens,
            sampler=sampler,
            seed=config.seed,
            on_tokens=show,
        )
    stream.close()
    print(summary(made), file=sys.stderr)


def read_stdin() -> str:
    """Standard input as text. Raises UsageError where it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start}. Convert "
            "it, for example with iconv --to-code=utf-8."
        ) from error


def summary(made: Generation) -> str:
    """What was made and what its cache took, in one line."""
    cache = made.context.cache
    text = (
        f"{len(made.tokens[0])} tokens; the cache took {cache.nbytes:,} bytes, "
        f"{100 * cache.nbytes / cache.full_bytes:.0f} % of a full one in bfloat16"
    )
    if cache.nbytes > cache.full_bytes and cache.method.name != "full":
        text += " (so short a text fits into what the method keeps exactly)"
    return text


class Stream:
    """Prints tokens as text while they come; a character whose bytes are not all there yet waits for the rest.

    `before` is printed with the first of them, so that what fails earlier leaves no half a line.
    """

    def __init__(self, model: LanguageModel, before: str = "") -> None:
        self._model, self._before, self._ids, self._shown = model, before, [], 0

    def __call__(self, tokens: np.ndarray) -> None:
        """tokens int32 [1, n]; -1 and stop tokens are not shown."""
        self._ids += [int(t) for t in tokens[0] if t >= 0 and t not in self._model.tokenizer.stop_ids]
        self._write(self._text().rstrip("\ufffd"))

    def close(self) -> None:
        """Prints what is left, and ends the line."""
        self._write(self._text())
        print(flush=True)

    def _text(self) -> str:
        return self._model.tokenizer.decode(self._ids)

    def _write(self, text: str) -> None:
        print(self._before + text[self._shown :], end="", flush=True)
        self._before, self._shown = "", max(self._shown, len(text))
