"""Methods whose tokens go on competing while the model decodes."""

from __future__ import annotations

from collections.abc import Callable

from kvjax.cache.method import CacheMethod
from kvjax.cache.methods.size import uniform
from kvjax.cache.policy import AttentionMass, Frozen, Hidden, Keyformer, LastAttention, OverHeads, Predicted, Redundancy


def h2o(
    tokens: int | None = None, share: float | None = None, bytes: int | None = None, recent: float = 0.5
) -> CacheMethod:
    """Half the budget for recent tokens, half for those with the most accumulated attention, at every step.

    Paper: Zhang et al., 2023, "H2O: Heavy-Hitter Oracle" (arXiv 2306.14048), algorithm 1. Attention is summed over all
    queries and over the query heads of a kv head.
    """
    return CacheMethod(name="h2o", budget=uniform(tokens, share, bytes), policy=AttentionMass(), recent=recent, every=1)


def tova(tokens: int | None = None, share: float | None = None, bytes: int | None = None) -> CacheMethod:
    """What the newest query attends to, on average over all heads of the layer, at every step.

    Paper: Oren et al., 2024, "Transformers are Multi-State RNNs" (arXiv 2401.06104). Cached: keys after rotary
    embedding and values, exact, positions once per layer, one float32 per slot and head. All heads keep the same
    tokens; the newest one is always kept, as in the widespread release. Where heads are sharded, a mean over them is
    exchanged per step.
    """
    return CacheMethod(
        name="tova", budget=uniform(tokens, share, bytes), policy=OverHeads(LastAttention()), recent=1, every=1
    )


def keyformer(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    recent: float = 0.3,
    start: float = 1.0,
    end: float = 2.0,
    steps: int = 256,
    seed: int = 0,
) -> CacheMethod:
    """Heavy hitters of a softmax with Gumbel noise and a temperature that rises as tokens are decoded, at every step.

    Paper: Adnan et al., 2024, "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative
    Inference" (arXiv 2403.09054), as described there. Cached: keys after rotary embedding and values, exact, one
    float32 per slot and head. 30 % of the budget are recent tokens, the temperature goes from 1 to 2 within `steps`
    decoded tokens (the length of the answer in the paper, which a cache does not know). The paper keeps 50 to 70 % of
    the prompt. The release sums scores over the batch; here each row has its own, and noise is a function of the seed
    and of positions, so that a run can be repeated.
    """
    return CacheMethod(
        name="keyformer",
        budget=uniform(tokens, share, bytes),
        policy=Keyformer(start=start, end=end, steps=steps, seed=seed),
        recent=recent,
        every=1,
    )


def keyformer_released(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    recent: float = 0.3,
    start: float = 1.0,
    seed: int = 0,
) -> CacheMethod:
    """Keyformer as its released code behaves: the key tokens are frozen at the end of the prompt.

    Paper: Adnan et al., 2024, "Keyformer" (arXiv 2403.09054); this is the behaviour of the code, not of the paper. Its
    mask is longer by one than the scores, so that the newest token outside the recent window is in neither set, and
    masks are multiplied into each other: every token that leaves the recent window after the prompt is lost. The
    temperature after the prompt has no effect then. Cached: keys after rotary embedding and values, exact (the released
    code masks them only and saves no memory). The release counts the token that is being decoded into its window and
    budget.
    """
    return CacheMethod(
        name="keyformer_released",
        budget=uniform(tokens, share, bytes),
        policy=Frozen(Keyformer(start=start, seed=seed)),
        recent=recent,
        every=1,
    )


def rkv(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    every: int = 128,
    window: int = 8,
    mix: float = 0.1,
    kernel: int = 7,
) -> CacheMethod:
    """What the last queries attend to and what is not repeated later, each time 128 tokens have been decoded.

    Paper: Cai et al., 2025, "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models" (arXiv 2505.24133).
    Cached: keys after rotary embedding and values, exact; up to `every` - 1 tokens more than the budget; the last 8
    queries and keys. `mix` is the paper's lambda of 0.1 (0.07 is the default in the code of the release), the others
    are the release's. There is one difference to its code: a key that resembles no other does not make the first token
    of the cache look less redundant. A prompt that is longer than the budget is compressed by the same score.
    """
    return CacheMethod(
        name="rkv",
        budget=uniform(tokens, share, bytes),
        policy=Redundancy(window=window, mix=mix, kernel=kernel),
        recent=window,
        every=every,
    )


def kvzap(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    hidden: int = 0,
    sinks: int = 0,
    recent: int | float = 128,
) -> CacheMethod:
    """What a small network predicts to matter from the input of the layer, when a token arrives.

    Paper: Jegou and Jeblick, 2026, "KVzap" (arXiv 2601.07891), with a budget instead of its threshold. Cached: keys
    after rotary embedding and values, exact, one float32 per slot and head. The network is calibrated: linear, or one
    layer of `hidden` units (512 in the paper). The window of 128 tokens is the paper's; it matters (without it the
    paper's LongBench score for code falls from 62.5 to 28.4).
    """
    return CacheMethod(
        name="kvzap",
        budget=uniform(tokens, share, bytes),
        policy=Predicted(hidden=hidden),
        sinks=sinks,
        recent=recent,
        every=1,
    )


def selective(
    tokens: int | None = None, share: float | None = None, bytes: int | None = None, every: int | None = 1
) -> CacheMethod:
    """The tokens that others have hidden least, at every step; for models with selective attention.

    Paper: Leviathan et al., 2024, "Selective Attention Improves Transformer" (arXiv 2410.02703). Cached: keys after
    rotary embedding and values, exact, positions once per layer, and one float32 per token seen, by which the model's
    attention lowers its logits and this method chooses; all heads keep the same tokens. The first token is never
    hidden and the newest not yet, so both stay. A prompt attends to itself exactly and is compressed at its end. The
    paper's budgets differ between layers (a `LayerTable` of your own); here each layer has the same.
    """
    return CacheMethod(name="selective", budget=uniform(tokens, share, bytes), policy=Hidden(), recent=1, every=every)


NAMED: dict[str, Callable[..., CacheMethod]] = {
    "h2o": h2o,
    "tova": tova,
    "keyformer": keyformer,
    "keyformer_released": keyformer_released,
    "rkv": rkv,
    "kvzap": kvzap,
    "selective": selective,
}
