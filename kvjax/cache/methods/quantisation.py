"""Methods that keep every token, in fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from kvjax.cache.codec import Float8, Integer
from kvjax.cache.method import CacheMethod


def kivi(bits: Literal[8, 4, 3, 2] = 2, group: int = 32, residual: int = 128) -> CacheMethod:
    """Keys per channel over token groups, values per token over channel groups, recent tokens exact.

    Paper: Liu et al., 2024, "KIVI" (arXiv 2402.02750), section 3. Asymmetric, with a scale and a zero point of 16 bits
    per group. Keys and values leave the recent window together, a group of tokens at a time (the release slides the
    values one by one); the window holds `residual` to `residual + group - 1` tokens.
    """
    return CacheMethod(
        name=f"kivi-{bits}",
        keys=Integer(bits=bits, axis="channel", group=group),
        values=Integer(bits=bits, axis="token", group=group),
        recent=residual,
    )


def kivi_released(bits: Literal[8, 4, 3, 2] = 2, group: int = 32, residual: int = 128) -> CacheMethod:
    """KIVI, its keys coded `residual` tokens at a time and its values one by one.

    Paper: Liu et al., 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (arXiv 2402.02750), as
    released. Cached: keys after rotary embedding per channel over `group` tokens, values per token over `group`
    channels, `bits` + 32 / group bits per element. Keys are exact until there are `residual` of them, then all of
    these are coded: 0 to residual - 1 exact ones stay, T mod `residual`. The newest `residual` values are always
    exact. Defaults are the release's. Differences: scale and zero point are bfloat16, not float16; the window has
    `residual` exact places for keys too, what the release's tail needs at its longest. With `kivi-2` and `kivi-4` keys
    and values leave the window together.
    """
    return CacheMethod(
        name="kivi_released",
        keys=Integer(bits=bits, axis="channel", group=group),
        values=Integer(bits=bits, axis="token", group=group),
        recent=residual,
        flush="keys first",
    )


def integer(bits: Literal[8, 4, 3, 2] = 8, group: int | None = None, symmetric: bool = False) -> CacheMethod:
    """Every token in integers, per token and head (or per `group` channels), nothing exact but the current token.

    Paper: none in particular; what serving engines call per-token-head quantisation.
    """
    codec = Integer(bits=bits, axis="token", group=group, symmetric=symmetric)
    return CacheMethod(name=f"int{bits}", keys=codec, values=codec)


def fp8(format: Literal["e4m3", "e5m2"] = "e4m3", scale: Literal["token", "none"] = "token") -> CacheMethod:
    """Every token in floating numbers of 8 bits, nothing exact but the current token.

    Paper: Micikevicius et al., 2022, "FP8 Formats for Deep Learning" (arXiv 2209.05433) has the formats. Each token and
    head has a scale; with `scale=none` magnitudes beyond 448 (e4m3) or 57344 (e5m2) saturate.
    """
    codec = Float8(format=format, scale=scale)
    return CacheMethod(name="fp8", keys=codec, values=codec)


def kivi_4(group: int = 32, residual: int = 128) -> CacheMethod:
    return kivi(4, group, residual)


def kivi_2(group: int = 32, residual: int = 128) -> CacheMethod:
    return kivi(2, group, residual)


def int8(group: int | None = None, symmetric: bool = False) -> CacheMethod:
    return integer(8, group, symmetric)


def int4(group: int | None = 32, symmetric: bool = False) -> CacheMethod:
    return integer(4, group, symmetric)


def int3(group: int | None = 32, symmetric: bool = False) -> CacheMethod:
    return integer(3, group, symmetric)


def int2(group: int | None = 32, symmetric: bool = False) -> CacheMethod:
    return integer(2, group, symmetric)


kivi_4.__doc__ = kivi_2.__doc__ = kivi.__doc__
int8.__doc__ = int4.__doc__ = int3.__doc__ = int2.__doc__ = integer.__doc__

NAMED: dict[str, Callable[..., CacheMethod]] = {
    "kivi-4": kivi_4,
    "kivi-2": kivi_2,
    "kivi_released": kivi_released,
    "int8": int8,
    "fp8": fp8,
    "int4": int4,
    "int3": int3,
    "int2": int2,
}
