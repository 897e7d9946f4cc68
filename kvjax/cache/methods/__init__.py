"""Named methods: published points of the algebra, and the little language that composes them.

`parse("snapkv:tokens=256+int4")` is SnapKV at 256 tokens whose body is stored in 4 bits. Each name is a function that
can be called from Python with the same options: `methods.snapkv(tokens=256)`.
"""

from kvjax.cache.methods.channels import cskv, fp8_channel, int8_channel, kvtuner, think
from kvjax.cache.methods.codebook import kvquant, polarquant, polarquant_pairs, qjl, turboquant, turboquant_prod
from kvjax.cache.methods.eviction import full, random, streaming_llm
from kvjax.cache.methods.keys_only import keydiff, knorm, lagkv
from kvjax.cache.methods.language import combine, parse
from kvjax.cache.methods.named import METHODS
from kvjax.cache.methods.prompt_end import chunkkv, criticalkv, expected_attention, pyramidkv, snapkv
from kvjax.cache.methods.quantisation import fp8, int2, int3, int4, int8, integer, kivi, kivi_2, kivi_4, kivi_released
from kvjax.cache.methods.repetition import kvzip
from kvjax.cache.methods.size import DEFAULT_SHARE
from kvjax.cache.methods.structured import (
    actqkv,
    adakv,
    cam,
    duo_attention,
    kvcrush,
    mikv,
    prefixkv,
    quest,
    razor,
    simlayerkv,
    top_values,
)
from kvjax.cache.methods.while_decoding import h2o, keyformer, keyformer_released, kvzap, rkv, selective, tova

__all__ = [
    "DEFAULT_SHARE",
    "METHODS",
    "actqkv",
    "adakv",
    "cam",
    "chunkkv",
    "combine",
    "criticalkv",
    "cskv",
    "duo_attention",
    "expected_attention",
    "fp8",
    "fp8_channel",
    "full",
    "h2o",
    "int2",
    "int3",
    "int4",
    "int8",
    "int8_channel",
    "integer",
    "keydiff",
    "keyformer",
    "keyformer_released",
    "kivi",
    "kivi_2",
    "kivi_4",
    "kivi_released",
    "knorm",
    "kvcrush",
    "kvquant",
    "kvtuner",
    "kvzap",
    "kvzip",
    "lagkv",
    "mikv",
    "parse",
    "polarquant",
    "polarquant_pairs",
    "prefixkv",
    "pyramidkv",
    "qjl",
    "quest",
    "random",
    "razor",
    "rkv",
    "selective",
    "simlayerkv",
    "snapkv",
    "streaming_llm",
    "think",
    "top_values",
    "tova",
    "turboquant",
    "turboquant_prod",
]
