"""Methods that keep every token as codes of a codebook: fitted to the model, or known beforehand after a rotation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

from kvjax.cache.codec import (
    QJL,
    ByLayer,
    Identity,
    Integer,
    LloydMax,
    NonUniform,
    Polar,
    PolarPairs,
    Rotated,
    Sketched,
)
from kvjax.cache.method import CacheMethod


def kvquant(
    bits: Literal[4, 3, 2] = 3, outliers: float = 0.01, sinks: int = 1, span: Literal["layer", "head"] = "layer"
) -> CacheMethod:
    """Non-uniform codes fitted to the model, keys per channel before rotary embedding, 1 % of outliers exact.

    Paper: Hooper et al., 2024, "KVQuant" (arXiv 2401.18079). Cached: keys before rotary embedding and values, each as
    `bits` bits per element, 32·0.01 more for outliers (bfloat16 and an index), and for values 32 per token for its
    range; the first token exactly. 4, 3 and 2 bits, 1 % and one sink are the paper's. Needs calibration: `kvjax
    calibrate`. Differences: ranges and outliers are bfloat16, where the release has float16; each key has room for as
    many outliers as a value (those furthest out get it), where the release stores any number; the release can fit its
    codebooks by the Fisher information alone, without the range, which calibration offers too. With `span=head` each
    head has ranges and outliers of its own, so that heads can keep different tokens.
    """
    return CacheMethod(
        name=f"kvquant-{bits}",
        keys=NonUniform(bits, "channel", outliers, span),
        values=NonUniform(bits, "token", outliers, span),
        sinks=sinks,
        rotate="read",
    )


def turboquant(bits: Literal[4, 3, 2, 1] = 4, seed: int = 0) -> CacheMethod:
    """Randomly rotated keys and values, each channel as the nearest of 2**bits levels for normal numbers.

    Paper: Zandieh et al., 2025, "TurboQuant" (arXiv 2504.19874), algorithm 1: least squared error. Cached: keys after
    rotary embedding and values, each as `bits` bits per element and a bfloat16 norm per token and head. No calibration,
    nothing kept exactly. The rotation is the Q of Gaussian numbers; implementations often take signed Hadamard
    matrices. The paper's 2.5 and 3.5 bits mix two widths by channel, which is not built here.
    """
    codec = Rotated(LloydMax(bits), seed)
    return CacheMethod(name=f"turboquant-{bits}", keys=codec, values=codec)


def turboquant_prod(bits: Literal[4, 3, 2] = 4, seed: int = 0) -> CacheMethod:
    """TurboQuant whose keys spend one of their bits on a sketch, so that products with queries have no bias.

    Paper: Zandieh et al., 2025, "TurboQuant" (arXiv 2504.19874), algorithm 2. Cached: keys as bits - 1 bits per element
    and the sign of a random projection of the rest, with two bfloat16 norms per token and head; values as in
    `turboquant`, because sums of values need a small error and not products without bias. Public reports dispute that
    the sketch helps: compare with `turboquant` of the same bits.
    """
    keys = Sketched(Rotated(LloydMax(bits - 1), seed), seed + 1)
    return CacheMethod(name=f"turboquant_prod-{bits}", keys=keys, values=Rotated(LloydMax(bits), seed))


def qjl(
    bits: int = 2,
    first_bits: int = 4,
    first_layers: int = 15,
    outliers: int = 8,
    group: int = 32,
    residual: int = 128,
    seed: int = 0,
) -> CacheMethod:
    """Keys as signs of random projections and a norm, values in 2 bits, recent tokens exact.

    Paper: Zandieh et al., 2024, "QJL: 1-Bit Quantized JL Transform for KV Cache Quantization with Zero Overhead" (arXiv
    2406.03482). Cached: keys after rotary embedding as `bits` signs per channel (`first_bits` in the first layers: 256
    and 512 signs per key at head size 128, as released), half a sign per channel more for the 8 channels of each 32
    tokens that are largest, two bfloat16 norms; values as 2-bit integers over 32 channels with scale and zero point, 3
    bits per element. The number of signs for the large channels is this project's choice, and they have directions of
    their own, where the release takes the first of the others'. Keys and values leave the recent window together, 32
    tokens at a time; the release lets keys go by whole windows and values one by one.
    """
    first, others = (QJL(bits=b, outliers=outliers, group=group, seed=seed) for b in (first_bits, bits))
    return CacheMethod(
        name="qjl",
        keys=ByLayer((first,) * first_layers + (others,)),
        values=Integer(2, "token", group),
        recent=residual,
    )


def polarquant(levels: int = 4, seed: int = 0) -> CacheMethod:
    """Randomly rotated keys and values as the angles of a recursive polar transform.

    Paper: Han et al., 2025, "PolarQuant: Quantizing KV Caches with Polar Transformation" (arXiv 2502.02617). Cached:
    keys after rotary embedding and values as angles, 4 bits on the first level and 2 on the deeper ones, and a bfloat16
    radius per 2**levels channels: 3.875 bits per element with 4 levels. No calibration, nothing kept exactly. The
    codebooks are those of the angles' known distributions; the paper can also fit them to each prompt.
    """
    codec = Rotated(Polar(levels), seed)
    return CacheMethod(name="polarquant", keys=codec, values=codec)


def polarquant_pairs(
    radius_bits: Literal[8, 4, 2] = 4,
    angle_bits: Literal[8, 4, 2] = 4,
    value_bits: Literal[16, 8, 4, 3, 2] = 16,
    group: int = 128,
    angles: Literal["group", "circle"] = "group",
) -> CacheMethod:
    """Each rotary pair of a key as a radius and an angle, recent tokens exact.

    Paper: Wu et al., 2025, "PolarQuant: Leveraging Polar Transformation for Key Cache Quantization and Decoding
    Acceleration" (arXiv 2502.00527). Cached: keys after rotary embedding as (radius_bits + angle_bits + 64/group)/2
    bits per element, radii and angles with a range per pair and `group` tokens; values exact as released, or with
    `value_bits` as integers per token over 32 channels with scale and zero point. Keys are coded by whole groups, of
    128 tokens as released. Differences: products by table are not built, a run of blocks is decoded at a time; a group
    that is full stays exact until the next token comes, and values stay in the recent window as long as keys.
    """
    return CacheMethod(
        name="polarquant_pairs",
        keys=PolarPairs(radius_bits, angle_bits, group, angles),
        values=Identity() if value_bits == 16 else Integer(value_bits, "token", 32),
        recent=1,
    )


def _at(build: Callable[..., CacheMethod], bits: int) -> Callable[..., CacheMethod]:
    """`build` at a number of bits that its name says."""
    fixed = functools.partial(build, bits)
    fixed.__doc__ = build.__doc__
    return fixed


NAMED: dict[str, Callable[..., CacheMethod]] = {
    **{f"kvquant-{bits}": _at(kvquant, bits) for bits in (4, 3, 2)},
    **{f"turboquant-{bits}": _at(turboquant, bits) for bits in (4, 3, 2)},
    **{f"turboquant_prod-{bits}": _at(turboquant_prod, bits) for bits in (4, 3, 2)},
    "qjl": qjl,
    "polarquant": polarquant,
    "polarquant_pairs": polarquant_pairs,
}
