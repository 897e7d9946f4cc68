"""Which codec each layer of a method has."""

from __future__ import annotations

from typing import TypeVar

from kvjax.cache.codec import ByLayer, Codec
from kvjax.cache.layout import CacheDims
from kvjax.cache.method import CacheMethod

Kind = TypeVar("Kind", bound=Codec)
Codecs = tuple[Kind | None, Kind | None]
"""Of keys and of values."""


def codecs_of(method: CacheMethod, kind: type[Kind], dims: tuple[CacheDims, ...]) -> tuple[Codecs[Kind], ...]:
    """Per layer its codecs of keys and values that are a `kind`, None for others."""

    def mine(codec: Codec) -> Kind | None:
        here = codec.here if isinstance(codec, ByLayer) else codec
        return here if isinstance(here, kind) else None

    layers = [method.for_layer(layer) for layer in dims]
    return tuple((mine(layer.keys), mine(layer.values)) for layer in layers)


def any_codec(method: CacheMethod, kind: type[Codec], dims: tuple[CacheDims, ...]) -> bool:
    """Whether any layer has such a codec."""
    return any(codec is not None for pair in codecs_of(method, kind, dims) for codec in pair)
