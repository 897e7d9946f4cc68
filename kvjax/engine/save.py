"""A prefilled context, or only its cache, on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kvjax.cache import save as folder
from kvjax.cache.model_cache import ModelCache
from kvjax.engine.prefill import Context
from kvjax.engine.request import check_kind
from kvjax.errors import writing


def save_cache(cache: ModelCache | Context, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes a cache (and the logits of a context) to the folder `path`; see `kvjax.cache.save.save`.

    Raises:
      UsageError: `path` exists and `overwrite` is False or it is not a saved cache, it cannot be written, or the cache
        cannot be saved.
    """
    extras = {}
    if isinstance(cache, Context):
        cache, extras = cache.cache, {"logits": cache.logits}
    check_kind("the cache to save", cache, ModelCache, "the context that kvjax.prefill returns, or its .cache")
    if cache.draws is not None:
        cache, extras = dataclasses.replace(cache, draws=None), extras | {"draws": cache.draws}
    with writing(path):
        folder.save(cache, path, extras=extras, overwrite=overwrite)


def load_cache(path: str | Path) -> ModelCache | Context:
    """What `save_cache` wrote, bit for bit: a context if it was one.

    Raises:
      UsageError: no saved cache, or one that needs a part or a version that this kvjax does not know.
      CorruptDataError: the folder is damaged; names the file and the leaf.
    """
    cache, extras = folder.load(path)
    cache = dataclasses.replace(cache, draws=extras.get("draws"))
    return Context(cache, extras["logits"]) if "logits" in extras else cache
