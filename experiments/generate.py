"""Continue a prompt with the cache kept by any method; the text appears as it is made."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from kvjax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Config:
    """Continue a prompt.

    Attributes:
      prompt: the text to continue; "-" reads it from standard input.
      model: a Hugging Face folder, or "reference" for the model that comes with kvjax.
      method: how the cache is kept, as `kvjax methods` lists them: "snapkv:tokens=256+int4".
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
    import kvjax
    from experiments import compile_cache
    from kvjax.engine.generate import generate
    from kvjax.engine.sampling import Sampler

    sampler = Sampler(config.temperature, config.top_k, config.top_p)
    compile_cache.enable()
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    model = kvjax.load(config.model)
    stream = Stream(model)
    sys.stdout.write(prompt)
    sys.stdout.flush()
    made = generate(
        model,
        prompt,
        config.method,
        max_new_tokens=config.max_new_tokens,
        sampler=sampler,
        seed=config.seed,
        on_tokens=stream,
    )
    stream.close()
    cache = made.context.cache
    print(
        f"{len(made.tokens[0])} tokens; the cache took {cache.nbytes:,} bytes, "
        f"{100 * cache.nbytes / cache.full_bytes:.0f} % of a full one in bfloat16",
        file=sys.stderr,
    )


class Stream:
    """Prints tokens as text while they come; a character whose bytes are not all there yet waits for the rest."""

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._ids, self._shown = model, [], 0

    def __call__(self, tokens: np.ndarray) -> None:
        """tokens int32 [1, n]; -1 and stop tokens are not shown."""
        self._ids += [int(t) for t in tokens[0] if t >= 0 and t not in self._model.tokenizer.stop_ids]
        text = self._model.tokenizer.decode(self._ids)
        whole = text.rstrip("\ufffd")
        sys.stdout.write(whole[self._shown :])
        sys.stdout.flush()
        self._shown = max(self._shown, len(whole))

    def close(self) -> None:
        """Prints what is left, and ends the line."""
        sys.stdout.write(self._model.tokenizer.decode(self._ids)[self._shown :] + "\n")
        sys.stdout.flush()
