"""Which parts of a method do not go together, and why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvjax.cache.codec import Identity
from kvjax.cache.layout import CacheDims
from kvjax.errors import UsageError

if TYPE_CHECKING:
    from kvjax.cache.method import CacheMethod

EXACT = Identity()


def refusal(method: CacheMethod) -> str | None:
    """The reason why a method cannot work and what would, or None."""
    checks = (_wrong_field, _wrong_flush, _wrong_codecs, _wrong_selector, _wrong_budget)
    return next((reason for check in checks if (reason := check(method))), None)


def check_layer(method: CacheMethod, dims: CacheDims) -> None:
    """Raises UsageError where a method does not go with the attention of a layer; method: as the layer uses it."""
    checks = (_wrong_state, _wrong_latent, _wrong_hiding, _wrong_map)
    if problem := next((reason for check in checks if (reason := check(method, dims))), None):
        raise UsageError(f"method {method.name!r}: {problem}")


def _wrong_state(method: CacheMethod, dims: CacheDims) -> str | None:
    if dims.convolved is None or not (method.budget.evicts or method.codes or method.selector.page is not None):
        return None
    return "this model keeps no keys and values, so a cache method has nothing to evict, code or select; use 'full'"


def _wrong_latent(method: CacheMethod, dims: CacheDims) -> str | None:
    if not dims.latent:
        return None
    if method.budget.evicts and method.fate.merges:
        return f"{type(method.fate).__name__} adds to values, but these are latents of which keys are made too"
    if method.selector.page is not None:
        return "a selector's index is of whole keys, but part of these is made of latents, which are stored as values"
    if method.selector.values is not None:
        return "a selector reads all keys and few values, but the values are latents of which the keys are made"
    if any(codec.fits_prompt for codec in method.every_codec):
        return "a codec compares keys with the queries that meet them, but part of these keys is stored as values"
    return None


def _wrong_hiding(method: CacheMethod, dims: CacheDims) -> str | None:
    if not dims.selective:
        if method.budget.evicts and method.policy.needs_hiding:
            return (
                f"{type(method.policy).__name__} scores tokens by what others hide, but this model has no selective "
                "attention; use another policy, or a model whose attention is SelectiveAttention()"
            )
        return None
    if method.budget.pooled or method.by_head(dims):
        return "heads have caches of their own size, but with selective attention one head hides tokens from all"
    if method.selector.page is not None:
        return "a selector reads some tokens only, but with selective attention each query may hide any of them"
    if method.selector.values is not None:
        return "a selector reads few values of a decoded token alone, but with selective attention all come one by one"
    if method.repetition is not None:
        return "a repetition would hide tokens of the prompt, which selective attention does not take back"
    return None


def _wrong_map(method: CacheMethod, dims: CacheDims) -> str | None:
    if not dims.mapped:
        return None
    if method.by_head(dims) or method.repetition is not None:
        return "the map of query heads is data, so what each kv head is read by is not known beforehand"
    return None


def _wrong_field(method: CacheMethod) -> str | None:
    if method.sinks < 0 or method.recent < 0:
        return f"sinks and recent must not be negative; got {method.sinks} and {method.recent}"
    if isinstance(method.recent, float) and not (method.budget.evicts and method.recent < 1):
        return f"recent={method.recent} as a share needs a budget that evicts and a value below 1"
    return None


def _wrong_flush(method: CacheMethod) -> str | None:
    if method.flush == "together":
        return None
    if method.budget.evicts:
        return "keys that are coded before their tokens leave the recent window cannot compete; use flush='together'"
    unit = math.lcm(method.keys.block, method.values.block)
    if not isinstance(method.recent, int) or method.recent == 0 or method.recent % unit:
        return f"keys are coded in whole recent windows: recent={method.recent} must be a multiple of {unit} tokens"
    return None


def _wrong_codecs(method: CacheMethod) -> str | None:
    codecs = method.every_codec
    fits = any(codec.fits_prompt for codec in codecs)
    if method.prefill == "streaming" and fits:
        return "a codec takes its parameters from the whole prompt, which a streaming prefill never has at once"
    if method.stores_unrotated and (method.keys.fits_prompt or any(c.fits_prompt for c in method.fate.codecs)):
        return "a codec of keys takes its parameters from the prompt's rotated keys; use rotate='write'"
    if method.budget.evicts and method.policy.per_head and method.joint:
        return "a codec stores all heads of a token together, so heads cannot keep different tokens"
    if method.budget.pooled and any(codec.fits_prompt or codec.calibrated or codec.joint for codec in codecs):
        return "a codec has parameters for each head, but the pages of a pool belong to changing heads"
    return None


def _wrong_selector(method: CacheMethod) -> str | None:
    page = method.selector.page
    if method.selector.values is not None and (problem := _wrong_values(method)):
        return problem
    if page is None:
        return None
    if method.every is not None or (method.budget.evicts and method.prefill == "streaming"):
        return (
            "a selector's index of a page cannot forget a token that loses its place; use every=None and an exact "
            "prefill, or a budget that does not evict"
        )
    if method.positions == "renumbered":
        return "a selector compares queries and keys at their original positions; use positions='original'"
    if method.budget.pooled:
        return "the pages of a packed pool belong to changing heads, so a selector has no index of them"
    if page % (block := math.lcm(*(codec.block for codec in method.every_codec))):
        return f"a selector's pages of {page} slots must be a multiple of the codecs' block of {block}"
    return None


def _wrong_values(method: CacheMethod) -> str | None:
    if method.budget.pooled:
        return "a selector compares the slots of a head, but in a packed pool they lie in pages of many heads"
    if (block := math.lcm(*(codec.read_block for codec in (method.values, *method.fate.codecs[1::2])))) > 1:
        return f"a selector reads single values, but a codec stores {block} of them as one block; use one per token"
    return None


def _wrong_budget(method: CacheMethod) -> str | None:
    if not method.budget.evicts:
        return "`every` needs a budget that evicts" if method.every is not None else None
    if method.fate.needs_rotated and method.stores_unrotated:
        return f"{type(method.fate).__name__} keeps keys that have no one position; it needs rotated keys"
    if method.budget.pooled and (problem := _wrong_pool(method)):
        return problem
    if method.fate.merges and (problem := _wrong_merge(method)):
        return problem
    least = method.policy.least_recent
    if isinstance(method.recent, int) and method.recent < least:
        return f"{type(method.policy).__name__} needs a recent window of at least {least} tokens; got {method.recent}"
    if method.every is not None and (method.every < 1 or method.every % method.block):
        return f"every={method.every} must be a positive multiple of the codecs' block of {method.block} tokens"
    if not method.policy.online and method.every is not None:
        return f"{type(method.policy).__name__} scores a prompt only, so decoded tokens cannot compete; use every=None"
    if method.repetition is not None and method.prefill == "streaming":
        return f"{type(method.policy).__name__} has the model repeat the whole prompt, so it needs prefill='exact'"
    if not (method.policy.online and method.policy.streams) and method.prefill == "streaming":
        return (
            f"{type(method.policy).__name__} scores with the prompt's last queries, which a streaming prefill has "
            "not seen when it must evict; use prefill='exact' or another policy"
        )
    return None


def _wrong_merge(method: CacheMethod) -> str | None:
    name = type(method.fate).__name__
    if method.every is None and method.prefill == "exact":
        return None
    if method.values != EXACT:
        return f"{name} adds to stored values, which a codec would round each time; use exact values or every=None"
    if method.block > 1:
        return f"{name} merges token by token, but a codec evicts blocks of {method.block}; use every=None"
    if method.policy.mass_reduce is None:
        return f"{name} compares the attention that tokens receive, which {type(method.policy).__name__} does not keep"
    return None


def _wrong_pool(method: CacheMethod) -> str | None:
    if not method.policy.per_head:
        return f"{type(method.policy).__name__} keeps the same tokens in all heads, so heads have nothing to share"
    if method.every is not None or method.prefill == "streaming":
        return "heads share their places once, at the end of an exact prompt; use every=None and prefill='exact'"
    if method.fate.codecs:
        return f"{type(method.fate).__name__} cannot follow: what heads lose differs in number"
    if method.positions == "renumbered":
        return "positions cannot be renumbered, because heads hold different numbers of tokens"
    if method.block > 1:
        return f"the codecs' blocks of {method.block} tokens would tie heads to whole blocks; use per-token codecs"
    return None
