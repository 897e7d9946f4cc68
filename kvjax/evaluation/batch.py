"""`Batch`: rows of one workload on the device, and caches of any method at the point where their follow-up begins."""

from __future__ import annotations

import dataclasses
import threading
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvjax.cache.method import CacheMethod
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.policy import Repetition
from kvjax.cache.recorder import RecordedPrompt
from kvjax.engine.calibrated import Calibrated, own_buffers
from kvjax.engine.prefill import Context, pad
from kvjax.engine.prefill import prefill as engine_prefill
from kvjax.engine.recorded import compress, record_prompt
from kvjax.engine.repetition import repeat
from kvjax.errors import UsageError
from kvjax.evaluation import program
from kvjax.evaluation.setting import Setting
from kvjax.evaluation.workload import Item
from kvjax.models.language_model import LanguageModel
from kvjax.typing import Array


class Batch:
    """At most `setting.batch` items; missing rows repeat the last item and are not counted.

    All items have a prompt, or none has, and all have as many unread tokens. `calibrated`: where methods come
    from that have learnt something of the model, by name.
    """

    def __init__(
        self,
        model: LanguageModel,
        setting: Setting,
        items: Sequence[Item],
        calibrated: Mapping[str, Calibrated] = MappingProxyType({}),
    ) -> None:
        self.model, self.setting, self.items, self._calibrated = model, setting, items, calibrated
        self._rows = [*items, *[items[-1]] * (setting.batch - len(items))]
        self._scores: dict[Repetition, tuple[Array, ...]] = {}
        self._scoring = threading.Lock()

    @property
    def streamed(self) -> bool:
        """Whether there is no prompt."""
        return len(self.items[0].prompt) == 0

    @property
    def unordered(self) -> bool:
        """Whether the parts of some answer may come in any order."""
        return any(item.example is not None and not item.example.ordered for item in self.items)

    @cached_property
    def records(self) -> bool:
        """Whether prompts can be recorded for many methods; only keys and values can."""
        return self.setting.has_keys(self.model)

    def record(self) -> tuple[Array, tuple[RecordedPrompt, ...], Array]:
        """One exact pass over the prompts: logits f32 [B, V], every layer's prompt, lengths int32 [B]."""
        tokens, lengths = self._prompts
        logits, prompt = record_prompt(self.model.module, self.model.params, tokens, lengths, self._draws)
        return logits, prompt, jnp.asarray(lengths)

    @cached_property
    def recorded(self) -> tuple[Array, tuple[RecordedPrompt, ...], Array]:
        """`record`, once."""
        return self.record()

    def repeat(self, repetition: Repetition) -> tuple[Array, ...]:
        """A pass in which the model repeats the prompts that `recorded` holds: each layer's scores f32 [B, K, P]."""
        return repeat(self.model, self.recorded[1], *self._prompts, repetition, self._draws)

    def repeated(self, repetition: Repetition) -> tuple[Array, ...]:
        """`repeat`, once for all methods that ask for the same."""
        with self._scoring:
            if repetition not in self._scores:
                self._scores[repetition] = self.repeat(repetition)
            return self._scores[repetition]

    @cached_property
    def _prompts(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return pad([item.prompt for item in self._rows], self.setting.prompt)

    @cached_property
    def _draws(self) -> Array | None:
        """uint32 [B]: a row's draw of the embeddings, where the model draws them, follows from its tokens alone."""
        if self.model.config.embedding is None:
            return None
        seen = [np.concatenate([item.prompt, item.follow]).astype("<i4").tobytes() for item in self._rows]
        return jnp.array([zlib.crc32(row) for row in seen], jnp.uint32)

    def start(self, method: CacheMethod) -> Context:
        """The prompts in a cache of `method` (budget in tokens), with buffers of its own.

        Without prompts: an empty cache whose tokens compete from the first one on. Prompts of a method that compresses
        at the prompt's end all come from `recorded`; a streaming method runs its own prefill.

        Raises:
          UsageError: there are no prompts, and the policy needs one to score.
        """
        dims, calibrated = self.setting.dims(self.model), self._calibrated.get(method.name)
        data = None if calibrated is None else calibrated.layers
        if self.streamed:
            method = streamed(method)
            empty = ModelCache.init(method, dims, data=own_buffers(data))
            empty = empty if data is None else empty.fork()
            layers = tuple(layer.in_phase("prompt") for layer in empty.layers)
            logits = jnp.zeros((self.setting.batch, self.model.config.vocab_size), jnp.float32)
            return Context(dataclasses.replace(empty, layers=layers, draws=jax.tree.map(jnp.copy, self._draws)), logits)
        if method.prefill == "exact" and self.records:
            logits, prompt, lengths = self.recorded
            scores = None if method.repetition is None else self.repeated(method.repetition)
            unread = self.items[0].unread
            return Context(
                compress(method, dims, prompt, lengths, unread=unread, data=data, scores=scores, draws=self._draws),
                logits,
            )
        prompts = [item.prompt[: len(item.prompt) - item.unread].tolist() for item in self._rows]
        setting = self.setting
        whole = method if calibrated is None else dataclasses.replace(calibrated, method=method)
        return engine_prefill(
            self.model,
            prompts,
            whole,
            reserve=setting.room,
            dtype=setting.dtype,
            length=setting.prompt,
            chunk=setting.chunk,
            draws=0 if self._draws is None else self._draws.tolist(),
        )

    def pieces(self) -> list[Piece]:
        """What follows the prompts, cut to the room of a setting: one piece, or many where there is no prompt."""
        size = self.setting.room
        longest = max(len(item.follow) for item in self._rows)
        return [self._piece(start, size) for start in range(0, longest, size)]

    def _piece(self, start: int, size: int) -> Piece:
        tokens, lengths = pad([item.follow[start : start + size] for item in self._rows], size)
        graded = np.zeros(tokens.shape, bool)
        for row, item in zip(graded, self.items, strict=False):
            places = np.arange(start, start + size)
            row[:] = (places >= len(item.follow) - item.graded) & (places < len(item.follow))
        total = np.array([len(item.follow) for item in self._rows])
        # Nothing is predicted from a row's last token, so it need not be fed.
        fed = np.clip(total - 1 - start, 0, lengths)
        return Piece(tokens, fed.astype(np.int32), graded)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens to feed: int32 [B, F], how many of each row int32 [B], and which of them are graded, bool [B, F]."""

    tokens: NDArray[np.int32]
    fed: NDArray[np.int32]
    graded: NDArray[np.bool_]

    @property
    def steps(self) -> NDArray[np.int32]:
        """How many tokens the longest row feeds, an int32 scalar."""
        return np.asarray(self.fed.max(), np.int32)


def streamed(method: CacheMethod) -> CacheMethod:
    """The method as it works when its tokens compete from the first one on.

    Raises:
      UsageError: its policy scores whole prompts only.
    """
    return dataclasses.replace(method, prefill="streaming")


def can_stream(method: CacheMethod) -> bool:
    """Whether the method works without a whole prompt."""
    try:
        streamed(method)
    except UsageError:
        return False
    return True


def feed(model: LanguageModel, context: Context, piece: Piece, *, forced: bool = True) -> tuple[Context, Array]:
    """Appends a piece token by token. Consumes the context; returns it, and the predictions f32 [B, F + 1, V].

    Args:
      forced: feed the graded tokens too; otherwise what the model says in their place (greedy decoding).
    """
    free = np.zeros_like(piece.graded) if forced else piece.graded
    cache, predicted = program.feed(
        model.module, model.params, context.cache, context.logits, piece.tokens, piece.fed, piece.steps, free
    )
    last = jnp.take_along_axis(predicted, jnp.asarray(piece.fed)[:, None, None], axis=1)[:, 0]
    return Context(cache, last), predicted
