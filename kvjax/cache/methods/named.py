"""All named methods."""

from __future__ import annotations

from collections.abc import Callable

from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import (
    channels,
    codebook,
    eviction,
    keys_only,
    prompt_end,
    quantisation,
    repetition,
    structured,
    while_decoding,
)

METHODS: dict[str, Callable[..., CacheMethod]] = {
    **eviction.NAMED,
    **while_decoding.NAMED,
    **prompt_end.NAMED,
    **keys_only.NAMED,
    **repetition.NAMED,
    **structured.NAMED,
    **quantisation.NAMED,
    **codebook.NAMED,
    **channels.NAMED,
}
