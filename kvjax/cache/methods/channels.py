"""Methods that keep every token and act on its channels: fewer of them, or a scale for each; and bits by layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from kvjax.cache.codec import ByLayer, ChannelSubset, Codec, Fixed, Float8, Identity, Integer, LowRank, PerChannel
from kvjax.cache.method import CacheMethod
from kvjax.errors import UsageError


def int8_channel(bits: Literal[8, 4] = 8) -> CacheMethod:
    """Every token in integers with one scale per channel, which the prompt fixes.

    Paper: none in particular; the static scaling per channel of serving engines, which calibrate scales; here they
    come from each row's prompt. Cached: keys after rotary embedding and values, exactly `bits` bits per element, and a
    float32 scale per row, head and channel. Tokens after the prompt saturate where they are larger than all of it.
    """
    codec = PerChannel(Fixed(bits))
    return CacheMethod(name="int8_channel", keys=codec, values=codec)


def fp8_channel(format: Literal["e4m3", "e5m2"] = "e4m3") -> CacheMethod:
    """Every token in floating numbers of 8 bits with one scale per channel, which the prompt fixes.

    Paper: Micikevicius et al., 2022, "FP8 Formats for Deep Learning" (arXiv 2209.05433) has the formats; scales as in
    `int8_channel`. Cached: keys after rotary embedding and values, exactly 8 bits per element, and a float32 scale per
    row, head and channel.
    """
    codec = PerChannel(Float8(format, "none"))
    return CacheMethod(name="fp8_channel", keys=codec, values=codec)


def think(share: float = 0.6, window: int = 32, recent: int = 32) -> CacheMethod:
    """Keys without the channels that the prompt's last queries need least.

    Paper: Xu et al., 2024, "ThinK: Thinner Key Cache by Query-Driven Pruning" (arXiv 2407.21018). Cached: share · 16
    bits per element for keys after rotary embedding (the channels that stay, chosen per row and kv head at the end of
    the prompt), 16 for values, both exactly in a recent window. 60 % of the channels, 32 queries and a window of 32 are
    the paper's. Public libraries set channels to 0 and store them all the same; here the store is smaller.
    """
    return CacheMethod(name="think", keys=ChannelSubset(Identity(), share, window), recent=recent)


def cskv(
    keys_share: float = 0.25, values_share: float = 0.75, bits: Literal[16, 8, 4] = 16, window: int = 32
) -> CacheMethod:
    """Keys and values of all heads as a few latent numbers, recent tokens exact besides.

    Paper: Wang et al., 2024, "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios" (arXiv
    2409.10593). Cached: keys before rotary embedding as keys_share · 16 bits per element, values as values_share · 16;
    with bits=8 or 4 latents are integers with scale and zero point (keys per channel over `window` tokens, values per
    token). Tokens become latents by whole windows. Needs calibration: `kvjax calibrate` finds the two factors of each
    projection. The shares are the defaults of the released training script. Differences: latents are made of keys and
    values, not of the layer's input, which loses nothing; a window that is full stays exact until the next token comes,
    in the release for the token that fills it; zero points are not clamped, so that groups of one sign are coded as
    well as others.
    """
    keys: Codec = Identity() if bits == 16 else Integer(bits, "channel", window)
    values: Codec = Identity() if bits == 16 else Integer(bits, "token")
    return CacheMethod(
        name="cskv",
        keys=LowRank(keys, keys_share, window),
        values=LowRank(values, values_share, window),
        recent=1,
        rotate="read",
    )


def kvtuner(table: str = "k8v4-k8v4-k4v2", mode: Literal["kivi", "token"] = "kivi") -> CacheMethod:
    """Integers of other bits for each layer, keys of no fewer than values.

    Paper: Li et al., 2025, "KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization" (arXiv
    2502.04420). Cached: keys after rotary embedding and values with scale and zero point. Mode 'kivi': keys per channel
    over 32 tokens, values per token over 32 channels, 32 recent tokens exact, 1 bit per element for scales; 'token':
    both per token, nothing exact. `table` has the bits of each layer's keys and values, the last entry also for all
    layers that follow; `kvjax calibrate` finds one for a model. The default is the paper's rule of thumb: keys of twice
    the bits of values, and more of both in the first layers. The paper searches for the accuracy of answers; here the
    sum of the layers' errors is made least, within a mean of bits.
    """
    bits = [_pair(entry) for entry in table.split("-")]
    axis, group = ("channel", 32) if mode == "kivi" else ("token", None)
    return CacheMethod(
        name="kvtuner",
        keys=ByLayer(tuple(Integer(k, axis, group) for k, _ in bits)),
        values=ByLayer(tuple(Integer(v, "token", group) for _, v in bits)),
        recent=32 if mode == "kivi" else 0,
    )


def _pair(entry: str) -> tuple[int, int]:
    """(4, 2) from 'k4v2'."""
    found = re.fullmatch(r"k(\d+)v(\d+)", entry.strip().lower())
    if found is None:
        raise UsageError(f"a table of bits is written k8v4-k4v2-…, one entry per layer; got {entry!r}")
    return int(found[1]), int(found[2])


NAMED: dict[str, Callable[..., CacheMethod]] = {
    "int8_channel": int8_channel,
    "fp8_channel": fp8_channel,
    "think": think,
    "cskv": cskv,
    "kvtuner": kvtuner,
}
