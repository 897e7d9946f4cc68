"""Methods that ask the model to repeat its prompt, before anybody asks about it."""

from __future__ import annotations

from collections.abc import Callable

from kvjax.cache.budget import AdaptiveHeads, Uniform
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods.size import size
from kvjax.cache.policy import Given, Repetition


def kvzip(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    chunk: int = 2048,
    tail: int = 8,
    sinks: int = 4,
    recent: int | float = 1,
    together: bool = True,
) -> CacheMethod:
    """What the model looks at when it repeats the prompt; the heads of a layer share their places by need.

    Paper: Kim et al., 2025, "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction" (arXiv
    2505.23416). Cached: keys after rotary embedding and values, exact, in one packed pool (32 bits per pair of elements
    in bf16). A token's score is the largest probability that a query of the repetition pays it, over the group's query
    heads, in a softmax over the sinks, its chunk and the repetition. Chunks of 2,048 tokens, 4 sinks and the last 8
    tokens of the chunk before are kvpress' (the release has chunks of 2,000 and the system prompt for sinks).
    `together=false` gives each head of a layer the same number, as the release's uniform level does.

    The paper ranks the tokens of all layers together, here those of one layer; layers have equal budgets, for slots are
    allocated before a prompt is seen. Chunks are at most an eighth of the model's positions, so that the repetition
    goes little beyond them: on the reference model this makes the difference. The instruction is not wrapped in a chat
    template, probabilities are float32, and the prompt's newest token is kept. It costs two to three times the prefill,
    and until it is done the prompts of all layers are held whole; what a cache holds does not depend on any question.
    Decoded tokens are kept.
    """
    budget = size(tokens, share, bytes)
    return CacheMethod(
        name="kvzip",
        budget=AdaptiveHeads(**budget, floor=0.0) if together else Uniform(**budget),
        policy=Given(Repetition(chunk=chunk, tail=tail, sinks=sinks)),
        sinks=sinks,
        recent=recent,
    )


NAMED: dict[str, Callable[..., CacheMethod]] = {"kvzip": kvzip}
