"""Methods that choose once, at the end of the prompt, by what its queries look at; decoded tokens are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from kvjax.cache.budget import Pyramid
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods.size import size, uniform
from kvjax.cache.policy import Chunks, Critical, ExpectedAttention, Observation, OverHeads

Pool = Literal["mean", "max"]


def snapkv(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    window: int = 64,
    kernel: int = 5,
    pool: Pool = "mean",
) -> CacheMethod:
    """What the prompt's last queries attend to, pooled over neighbours; once, at the end of the prompt.

    Paper: Li et al., 2024, "SnapKV" (arXiv 2404.14469), section 4. Decoded tokens are kept.
    """
    return CacheMethod(
        name="snapkv",
        budget=uniform(tokens, share, bytes),
        policy=Observation(window=window, kernel=kernel, pool=pool),
        recent=window,
    )


def pyramidkv(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    beta: float = 20.0,
    window: int = 64,
    kernel: int = 5,
    pool: Pool = "mean",
) -> CacheMethod:
    """SnapKV with more tokens for the first layers than for the last, the same number in all.

    Paper: Cai et al., 2024, "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling" (arXiv
    2406.02069). Cached: keys after rotary embedding and values, exact. The budget is a layer's on average; besides the
    window, layers keep from 2 - 1/beta of it down to 1/beta, linearly; beta = 20 as in the release. Its roundings lose
    up to a token per layer, here they sum up exactly. Widespread code falls back to equal layers where the last one
    would get fewer than `window` tokens; here it does not.
    """
    return CacheMethod(
        name="pyramidkv",
        budget=Pyramid(**size(tokens, share, bytes), beta=beta),
        policy=Observation(window=window, kernel=kernel, pool=pool),
        recent=window,
    )


def chunkkv(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    size: int = 20,
    window: int = 64,
    kernel: int = 5,
    together: bool = True,
) -> CacheMethod:
    """Whole chunks of neighbouring tokens, by the mean of SnapKV's scores over the chunk.

    Paper: Liu et al., 2025, "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM
    Inference" (arXiv 2502.00299). Cached: keys after rotary embedding and values, exact. Chunks of 20 and SnapKV as the
    base are those of the widespread release, as is that all heads of a layer keep the same chunks (`together=false`:
    each its own). The release keeps a whole number of chunks; here what is left of the budget goes to the beginning of
    the next one, and the window is kept in any case.
    """
    base = Observation(window=window, kernel=kernel)
    return CacheMethod(
        name="chunkkv",
        budget=uniform(tokens, share, bytes),
        policy=Chunks(OverHeads(base) if together else base, size=size),
        recent=window,
    )


def criticalkv(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    window: int = 64,
    kernel: int = 5,
    pool: Pool = "mean",
    first: float = 0.5,
    epsilon: float = 1e-4,
) -> CacheMethod:
    """SnapKV in two stages: half the places by attention, half by attention times what a value adds to the output.

    Paper: Feng et al., 2025, "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective"
    (arXiv 2502.03805). Cached: keys after rotary embedding and values, exact. `first` and `epsilon` are the paper's.
    The places are those besides the window; the release counts the window's tokens, which always win, into the first
    stage.
    """
    return CacheMethod(
        name="criticalkv",
        budget=uniform(tokens, share, bytes),
        policy=Critical(Observation(window=window, kernel=kernel, pool=pool), share=first, epsilon=epsilon),
        recent=window,
    )


def expected_attention(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    sinks: int = 4,
    ahead: int = 512,
    epsilon: float = 0.0,
    recent: int | float = 1,
) -> CacheMethod:
    """The attention that the next queries are expected to pay, from mean and covariance of the prompt's, times |v|.

    Paper: Devoto et al., 2025, "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution" (arXiv 2510.00636). Cached: keys after rotary embedding and values, exact. Defaults are the release's:
    4 sinks, the rotations of the next 512 positions averaged, epsilon 0 (1e-2 on its leaderboard). The release has no
    window; the prompt's newest token is kept here.
    """
    return CacheMethod(
        name="expected_attention",
        budget=uniform(tokens, share, bytes),
        policy=ExpectedAttention(ahead=ahead, sinks=sinks, epsilon=epsilon),
        sinks=sinks,
        recent=recent,
    )


NAMED: dict[str, Callable[..., CacheMethod]] = {
    "snapkv": snapkv,
    "pyramidkv": pyramidkv,
    "chunkkv": chunkkv,
    "criticalkv": criticalkv,
    "expected_attention": expected_attention,
}
