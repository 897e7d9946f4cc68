"""The pass in which the model repeats its prompts, piece by piece, to find what it looks at (KVzip).

Kim et al., 2025, "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction" (arXiv 2505.23416): what a
model needs to say its context again is what any question may need. Each piece is one pass over an instruction and the
piece itself, behind the whole prompt; it costs about as much as the prompt's own pass for all pieces, and nothing of
it stays in the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.policy import Repetition
from kvjax.cache.recorder import RecordedPrompt
from kvjax.cache.repeat import Repeating, repeating
from kvjax.models.language_model import LanguageModel
from kvjax.models.tokenizer import Tokenizer
from kvjax.models.transformer import Transformer
from kvjax.typing import Array, PyTree

FROM_START = "\n\nRepeat the previous context exactly."
FROM_TAIL = "\n\nRepeat the part of the previous context exactly, starting with"
ANSWER = "\n"
MOST_OF_POSITIONS = 8
"""A piece takes at most this part of the positions that the model was made for: behind a prompt that fills them the
repetition goes beyond, and far beyond them attention no longer finds what it repeats."""


class Piece(NamedTuple):
    """Of each row: tokens int32 [B, Q] of which the first `counts` [B] exist, and which of its prompt they repeat."""

    tokens: NDArray[np.int32]
    counts: NDArray[np.int32]
    start: NDArray[np.int32]
    stop: NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Token ids in front of what is repeated: the first piece's, and later ones' around the tokens before the piece."""

    from_start: tuple[int, ...] = ()
    from_tail: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Instruction:
        """In the words of the release; without a tokenizer there are none, and the tail alone says where to start."""
        if tokenizer.backend is None:
            return cls()
        return cls(*(tuple(tokenizer.encode(text)) for text in (FROM_START, FROM_TAIL, ANSWER)))

    def before(self, prompt: Sequence[int] | NDArray[np.int32], start: int, tail: int) -> list[int]:
        """What is said before the piece of `prompt` that begins at `start`."""
        if start == 0:
            return [*self.from_start, *self.answer]
        return [*self.from_tail, *prompt[max(start - tail, 0) : start], *self.answer]

    def size(self, later: bool, tail: int) -> int:
        """The most tokens that `before` gives."""
        after = len(self.from_tail) + tail if later else 0
        return max(len(self.from_start), after) + len(self.answer)


def pieces(
    tokens: NDArray[np.int32], lengths: NDArray[np.int32], repetition: Repetition, instruction: Instruction
) -> Iterator[Piece]:
    """Cuts prompts int32 [B, P] into what is repeated at once; shapes depend on P alone."""
    padded = tokens.shape[1]
    chunk, tail = min(repetition.chunk, padded), repetition.tail
    size = instruction.size(padded > chunk, tail) + chunk
    for start in range(0, int(lengths.max()), chunk):
        stop = np.minimum(start + chunk, lengths)
        rows = [
            [*instruction.before(row, start, tail), *row[start:end]] if end > start else []
            for row, end in zip(tokens, stop, strict=True)
        ]
        said = np.zeros((len(rows), size), np.int32)
        for to, ids in zip(said, rows, strict=True):
            to[: len(ids)] = ids
        counts = np.array([len(ids) for ids in rows], np.int32)
        begin = np.minimum(start, stop).astype(np.int32)
        yield Piece(said, counts, begin, stop.astype(np.int32))


def repeat(
    model: LanguageModel,
    prompt: tuple[RecordedPrompt, ...],
    tokens: NDArray[np.int32],
    lengths: NDArray[np.int32],
    repetition: Repetition,
    draws: Array | None = None,
) -> tuple[Array, ...]:
    """Of every layer, the scores f32 [B, K, P] of the tokens of its recorded prompt; 1 for the first, always seen ones.

    The repetition's positions follow those of the prompt, as in the release. Pieces are at most an eighth of the
    positions that the model was made for, whatever the prompt's length.

    Args:
      tokens: the prompts, int32 [B, P], of which the first `lengths` [B] of each row exist.
      draws: uint32 [B], where the model draws its embeddings.
    """
    chunk = max(1, min(repetition.chunk, model.config.max_positions // MOST_OF_POSITIONS))
    repetition, size = dataclasses.replace(repetition, chunk=chunk), min(chunk, tokens.shape[1])
    layers = tuple(repeating(recorded.step, repetition, size) for recorded in prompt)
    for piece in pieces(tokens, lengths, repetition, Instruction.of(model.tokenizer)):
        scores = _repeat_piece(model.module, model.params, layers, draws, *piece)
        layers = tuple(dataclasses.replace(layer, scores=new) for layer, new in zip(layers, scores, strict=True))
    always = jnp.arange(tokens.shape[1]) < repetition.sinks
    return tuple(jnp.where(always, 1.0, layer.scores) for layer in layers)


@jax.jit(static_argnames=("module",))
def _repeat_piece(
    module: Transformer,
    params: PyTree,
    layers: tuple[Repeating, ...],
    draws: Array | None,
    tokens: Array,
    counts: Array,
    start: Array,
    stop: Array,
) -> tuple[Array, ...]:
    cache = tuple(dataclasses.replace(layer, start=start, stop=stop) for layer in layers)
    valid = jnp.arange(tokens.shape[1]) < counts[:, None]
    nowhere = jnp.zeros_like(counts)
    arguments: Any = {"cache": cache, "valid": valid, "logits_at": nowhere, "draws": draws}
    after: Any = module.apply({"params": params}, tokens, **arguments)[1]
    return tuple(layer.scores for layer in after)
