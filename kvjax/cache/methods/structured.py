"""Methods that treat layers or heads differently, or keep something of what they evict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from kvjax.cache.budget import AdaptiveHeads, Full, HeadTable, LayerTable, Prefix, Uniform
from kvjax.cache.codec import Balanced, Integer
from kvjax.cache.fate import Compensate, Demote, Merge, Represent
from kvjax.cache.fate.represent import Anchor
from kvjax.cache.method import CacheMethod, Prefill
from kvjax.cache.methods.size import size, uniform
from kvjax.cache.policy import AttentionMass, FixedPlace, Observation, OverHeads, Policy, Recency
from kvjax.cache.selector import ProbedPages, TopPages, TopValues
from kvjax.cache.selector.probed_pages import Cutoff, Probe
from kvjax.cache.selector.top_values import Renormalise


def adakv(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    window: int = 32,
    kernel: int = 7,
    floor: float = 0.2,
) -> CacheMethod:
    """SnapKV's scores, but the heads of a layer share its tokens: the best go first, whichever head they belong to.

    Paper: Feng et al., 2024, "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation" (arXiv 2407.11550),
    algorithm 1. Window, kernel (max pool) and floor are the release's. What the heads keep lies in one packed pool, so
    bytes fall with the budget. Under head sharding the heads of a shard share their tokens. The release compares
    budgets that are blended with the floor and rounded; here each head's floor is kept first and the rest is chosen
    jointly, as in kvpress.
    """
    return CacheMethod(
        name="adakv",
        budget=AdaptiveHeads(**size(tokens, share, bytes), floor=floor),
        policy=Observation(window=window, kernel=kernel, pool="max"),
        recent=window,
    )


def mikv(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    bits: int = 2,
    balance: bool = True,
) -> CacheMethod:
    """H2O's heavy hitters and recent tokens exactly, and every other token in 2 bits instead of nothing.

    Paper: Yang et al., 2024, "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision
    Quantization" (arXiv 2402.18096). There is no release. A fifth of the tokens is exact, half of them recent ones.
    The others have `bits` and a scale and zero point per half of a head's channels; keys are balanced first by
    sqrt(max |q| / max |k|) of the prompt, per row and channel (equation 2), which is folded into the queries.
    """
    codec = Integer(bits=bits, group=0.5)
    return CacheMethod(
        name="mikv",
        budget=Uniform(**size(tokens, share, bytes, default=0.2)),
        policy=AttentionMass(),
        fate=Demote(keys=Balanced(codec) if balance else codec, values=codec),
        recent=0.5,
        every=1,
    )


def cam(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    following: int = 32,
    recent: float = 0.5,
    seed: int = 0,
) -> CacheMethod:
    """H2O, but the value of an evicted token may live on, merged into those of the tokens that follow it.

    Paper: Zhang et al., 2024, "CaM: Cache Merging for Memory-efficient LLMs Inference" (ICML 2024). Cached: keys after
    rotary embedding and values, 16 bits per element, and the attention that each token has received. With probability
    min(1, its attention / the mean attention of the next `following` kept tokens) its value, divided by their number,
    is added to each of theirs; its key is forgotten. 32 is the release's. Not verified against the paper: the mean over
    the tokens that are merged into is that of a later public implementation; the release takes the one over sinks and
    recent window, and merges a token when it leaves that window, for each query head. Here the loser is H2O's, and what
    is merged at the end of a prompt goes to tokens that stay, at once. Goes on top of other policies that sum
    attention, and at the end of a prompt of any: CacheMethod(..., fate=Merge()).
    """
    return CacheMethod(
        name="cam",
        budget=uniform(tokens, share, bytes),
        policy=AttentionMass(),
        fate=Merge(following=following, seed=seed),
        recent=recent,
        every=1,
    )


def kvcrush(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    representatives: float = 0.25,
    anchor: Anchor = "alternating",
    window: int = 64,
) -> CacheMethod:
    """SnapKV, but a quarter of the places goes to representatives of the tokens that it would evict.

    Paper: Jha et al., 2025, "KVCrush: Key value cache size-reduction using similarity in head-behaviour" (arXiv
    2503.00022); a reconstruction from its description, see `kvjax.cache.fate.Represent`. It goes on top of any policy:
    CacheMethod(..., fate=Represent()).
    """
    return CacheMethod(
        name="kvcrush",
        budget=uniform(tokens, share, bytes),
        policy=Observation(window=window),
        fate=Represent(share=representatives, anchor=anchor),
        recent=window,
    )


def prefixkv(
    tokens: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    shares: tuple[float, ...] = (1.0,),
    sinks: int = 4,
    decoded: Literal["kept", "importance", "positional"] = "kept",
    distance: int = 25,
) -> CacheMethod:
    """A budget per layer, such that every layer keeps the same part of its attention; the layer's heads keep the same.

    Paper: Wang et al., 2024, "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for
    Efficient Generation" (arXiv 2412.03409). `shares` are found by calibration; without one all layers get the same.
    Importance is summed over all queries and heads. `decoded` says what becomes of tokens after the prompt: all are
    kept; or for each a token goes, that of the least importance so far, or as in the release the one with `distance`
    newer ones. Cached: keys after rotary embedding and values, exact, positions once per layer. Sinks and distance
    are the release's. The release's budget grows with the text; here it stays that of the prompt.
    """
    importance: Policy = OverHeads(AttentionMass())
    return CacheMethod(
        name="prefixkv",
        budget=Prefix(**size(tokens, share, bytes), shares=shares),
        policy=FixedPlace(importance, distance - 1) if decoded == "positional" else importance,
        sinks=sinks,
        recent=1,
        every=None if decoded == "kept" else 1,
    )


def razor(
    local: int = 256,
    sinks: int = 4,
    table: tuple[tuple[int, ...], ...] = ((1,),),
    weighted: bool = True,
) -> CacheMethod:
    """Retrieval heads keep everything; the others sinks, a local window, and one token for all that they dropped.

    Paper: Tang et al., 2024, "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads" (arXiv
    2407.15891). `table` says per layer and kv head which it is (0: retrieval, 1: local); calibration finds it from echo
    and induction scores. The paper's window is max(4000, N / 5); the release's configuration has 256.
    """
    return CacheMethod(
        name="razor",
        budget=HeadTable(budgets=(Full(), Uniform(tokens_kept=sinks + local)), table=table),
        policy=Recency(),
        fate=Compensate(weighted=weighted),
        sinks=sinks,
        recent=local,
        every=1,
    )


def duo_attention(recent: int = 256, sinks: int = 128, table: tuple[tuple[int, ...], ...] = ((1,),)) -> CacheMethod:
    """Full heads keep everything; streaming heads sinks and a recent window.

    Paper: Xiao et al., 2024, "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads"
    (arXiv 2410.10819). `table` says per layer and kv head which it is (0: full, 1: streaming); training gates finds it.
    Positions are the original ones.
    """
    return CacheMethod(
        name="duo_attention",
        budget=HeadTable(budgets=(Full(), Uniform(tokens_kept=sinks + recent)), table=table),
        policy=Recency(),
        sinks=sinks,
        recent=recent,
        every=1,
    )


def simlayerkv(recent: int = 1024, sinks: int = 4, table: tuple[int, ...] = (1,)) -> CacheMethod:
    """Lazy layers keep sinks and a recent window; the others everything.

    Paper: Zhang et al., 2024, "SimLayerKV: A Simple Framework for Layer-Level KV Cache Reduction" (arXiv 2410.13846).
    `table` says per layer which it is (0: whole, 1: lazy). The paper decides by the last query's attention to sinks
    and recent window for every prompt; here slots are allocated before a prompt is seen, so calibration decides.
    """
    return CacheMethod(
        name="simlayerkv",
        budget=LayerTable(budgets=(Full(), Uniform(tokens_kept=sinks + recent)), table=table),
        policy=Recency(),
        sinks=sinks,
        recent=recent,
        every=1,
    )


def quest(tokens: int = 1024, page: int = 16) -> CacheMethod:
    """Everything is kept, and a decoded token reads the pages that may matter to it.

    Paper: Tang et al., 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference" (arXiv 2406.10774).
    Reads `tokens` slots, in pages of 16, by bounds of their keys' channels, which take 1/16 more memory than the keys.
    The paper reads everything in the first two layers.
    """
    return CacheMethod(name="quest", selector=TopPages(tokens=tokens, size=page))


def actqkv(
    tokens: int = 2048,
    page: int = 128,
    probe: Probe = "norm",
    cutoff: Cutoff = "density",
    recent: int = 512,
    sinks: int = 4,
    prefill: Prefill = "streaming",
) -> CacheMethod:
    """Everything is kept, and a window of tokens reads the pages that its probe query finds, fewer in dense layers.

    Paper: Xiao et al., 2025, "Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs
    Inference" (arXiv 2502.13542); a reconstruction from its abstract and summaries, see `kvjax.cache.selector.
    ProbedPages`: no code is public, and the equations are not verified. Cached: all keys after rotary embedding and
    all values, 16 bits per element, and the sum of the keys of each page in float32 (2 / page of the keys' bytes). What
    is saved is reading, not memory: sinks, recent window and, on average over layers, `tokens` slots. 2048 is the
    budget of the summaries; pages, window and sinks are this library's choice (pages as in InfLLM). A window is a
    chunk of a streaming prefill, a question, or a decoded token (which is its own probe); with prefill='exact' the
    prompt attends to all of itself. `probe=mean` is the mean-pooled query, `cutoff=uniform` the same number in all
    layers.
    """
    selector = ProbedPages(tokens=tokens, size=page, probe=probe, cutoff=cutoff)
    return CacheMethod(name="actqkv", selector=selector, recent=recent, sinks=sinks, prefill=prefill)


def top_values(count: int = 100, renormalise: Renormalise = "loaded") -> CacheMethod:
    """Everything is kept, and a decoded token reads all keys but the values of the tokens that matter most to it.

    Paper: Lin et al., 2025, "Sigma: Differential Rescaling of Query, Key and Value for Efficient Language Models"
    (arXiv 2501.13629), which loads the values of the 100 best tokens of each query head. Cached: all keys after rotary
    embedding and all values, 16 bits per element; what is saved is reading, at most half of it. Prompts, chunks and
    questions of several tokens read everything. Whether the weights of what is loaded sum to one is open in the paper:
    renormalise=loaded (they do) or all. Goes on top of other methods: `h2o:tokens=512+top_values`.
    """
    return CacheMethod(name="top_values", selector=TopValues(count=count, renormalise=renormalise))


NAMED: dict[str, Callable[..., CacheMethod]] = {
    "adakv": adakv,
    "mikv": mikv,
    "cam": cam,
    "kvcrush": kvcrush,
    "prefixkv": prefixkv,
    "razor": razor,
    "duo_attention": duo_attention,
    "simlayerkv": simlayerkv,
    "quest": quest,
    "actqkv": actqkv,
    "top_values": top_values,
}
