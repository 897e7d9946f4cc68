"""Codes that name the entries of a fitted codebook, and a few exact outliers (KVQuant)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from kvjax.cache.codec.base import Codec
from kvjax.cache.codec.numbers import finite, look_up, nearest, whole_bytes
from kvjax.cache.codec.scale import MIN_SCALE, least_scale
from kvjax.cache.layout import CacheDims
from kvjax.errors import UsageError, unknown
from kvjax.typing import Array, PyTree
from pallas_kernels.loader import CodebookLoader, Loader, OutlierLoader, ScaledLoader
from pallas_kernels.packing import split
from pallas_kernels.rows import Rows

BITS = (4, 3, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NonUniformStore:
    """Codes, ranges and outliers, as `pallas_kernels.OutlierLoader` of a `CodebookLoader` reads them.

    Attributes:
      codes: H·bits/8 uint8 per token, packed in planes; of 3 bits, the low 2. high: the high bits of codes of 3 bits.
      scale, offset: bfloat16 [B, K or 1, S] where the range is found per token, else None.
      index, value: the outliers: C arrays [B, K or 1, S] each, the channel and what is added to the decoded code. A
        place that is not used adds 0.
    """

    codes: Rows
    high: Rows | None
    scale: Array | None
    offset: Array | None
    index: tuple[Array, ...]
    value: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class NonUniform(Codec):
    """x is kept as `levels[code] * scale + offset`, a code of a fitted codebook, and 1 % of it exactly.

    KVQuant (Hooper et al., 2024, arXiv:2401.18079, section 3). The codebook has 2**bits entries in [-1, 1] for the
    whole layer. Keys have a range per channel, known beforehand (axis 'channel', meant for keys before rotary
    embedding); values have a range per token, found when they come (axis 'token'). What lies outside the range is an
    outlier: the difference to what its code decodes to is stored beside it, in bfloat16.

    Each vector has room for as many outliers as quantiles of 1 - outliers/2 cut off both its ends (`capacity`). For
    values that is how many there are, ties apart. Ranges known beforehand can be exceeded more often: then the ones
    that are furthest out get the room, and the others get the nearest code (`overflow` counts them).

    Bits per element: bits + 32·capacity/W, W channels per vector (24 instead of 32 where W <= 256), + 32/W on axis
    'token'. Parameters (`fit_non_uniform`): codebook f32 [1, 1, 2**bits], rising, whose nearest entry names the code;
    levels, of the same shape, what codes decode to: the codebook, or an affine map of it (Q-Norm); on axis 'channel'
    scale and offset f32 [1, K, H].

    Elements that are not finite: NaN counts as 0, infinities saturate at ±`LIMIT`.

    Attributes:
      bits: 4, 3 or 2.
      axis: 'channel' (static ranges) or 'token' (a range per token).
      outliers: the share of a vector that is kept exactly; 0 for none.
      span: 'layer': a vector is a token's channels of all heads, as in the paper; all heads then hold the same tokens.
        'head': each head by itself.

    Raises:
      UsageError: an attribute has no such value.
    """

    calibrated: ClassVar[bool] = True

    bits: int = 4
    axis: Literal["channel", "token"] = "channel"
    outliers: float = 0.01
    span: Literal["layer", "head"] = "layer"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"NonUniform codes have {', '.join(map(str, BITS))} bits; got bits={self.bits!r}")
        if self.axis not in ("channel", "token"):
            raise unknown("axis of NonUniform", self.axis, ("channel", "token"))
        if self.span not in ("layer", "head"):
            raise unknown("span of NonUniform", self.span, ("layer", "head"))
        if not 0 <= self.outliers < 0.5:
            raise UsageError(f"NonUniform keeps a share of outliers from 0 to 0.5; got outliers={self.outliers!r}")

    @property
    def joint(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether heads share outliers or ranges."""
        return self.span == "layer" and (self.outliers > 0 or self.axis == "token")

    @property
    def block(self) -> int:
        return 1

    def capacity(self, width: int) -> int:
        """Outliers of a vector of `width` channels that have room: those beyond both quantiles."""
        if self.outliers == 0:
            return 0
        return 2 * (width - math.ceil((1 - self.outliers / 2) * (width - 1) - 1e-9))

    def validate(self, head_dim: int) -> None:
        whole_bytes(head_dim, self.bits)

    def parameter_shapes(self, dims: CacheDims) -> dict[str, jax.ShapeDtypeStruct]:
        entries = jax.ShapeDtypeStruct((1, 1, 2**self.bits), jnp.float32)
        shapes = {"codebook": entries, "levels": entries}
        if self.axis == "channel":
            channels = jax.ShapeDtypeStruct((1, dims.kv_heads, dims.head_dim), jnp.float32)
            shapes |= {"scale": channels, "offset": channels}
        return shapes

    def encode(self, x: Array, params: PyTree = None) -> NonUniformStore:
        self.validate(x.shape[-1])
        x = finite(x)
        codebook, levels = params["codebook"][0, 0], params["levels"][0, 0]
        x, beyond, scale, offset = self._in_range(x, params)
        if scale is None or offset is None:
            codes = nearest(x, codebook)
            rest = x - look_up(codes, levels)
        else:
            wide, zero = (a.astype(jnp.float32)[..., None] for a in (scale, offset))
            codes = nearest((x - zero) / wide, codebook)
            rest = x - (look_up(codes, levels) * wide + zero)
        low, high = split(codes, self.bits)
        index, value = self._outliers(self._vectors(rest), beyond)
        return NonUniformStore(Rows.of(low), None if high is None else Rows.of(high), scale, offset, index, value)

    def loader(self, store: NonUniformStore, params: PyTree = None) -> Loader:
        loader: Loader = CodebookLoader(
            store.codes, params["levels"][0], self.bits, store.high, store.scale, store.offset
        )
        if store.index:
            first = jnp.arange(store.codes.data.shape[-3], dtype=jnp.int32) * loader.head_dim if self.joint else None
            loader = OutlierLoader(loader, store.index, store.value, 1, first)
        if self.axis == "channel":
            loader = ScaledLoader(loader, _width(params)[0], params["offset"][0])
        return loader

    def overflow(self, x: Array, params: PyTree) -> Array:
        """int32 [B, K or 1, S]: elements of x [B, K, S, H] outside their range for which there is no room."""
        _, beyond, _, _ = self._in_range(finite(x), params)
        return jnp.maximum((beyond > 0).sum(-1, dtype=jnp.int32) - self.capacity(beyond.shape[-1]), 0)

    def _in_range(self, x: Array, params: PyTree) -> tuple[Array, Array, Array | None, Array | None]:
        """x as the codebook and the outliers see it, and each token's (scale, offset) where there is one.

        The second is f32 [..., K or 1, S, W]: how far an outlier is outside its range, -1 for others.
        """
        if self.axis == "channel":
            x = (x - params["offset"][0][:, None]) / _width(params)[0][:, None]
            far = jnp.abs(self._vectors(x)) - 1
            return x, jnp.where(far > 0, far, -1.0), None, None
        vectors = self._vectors(x)
        low, high, outlier = self._quantiles(vectors)
        offset = (0.5 * low + 0.5 * high).astype(jnp.bfloat16)
        middle = offset.astype(jnp.float32)
        scale = least_scale(jnp.maximum(high - middle, middle - low))
        beyond = jnp.maximum(vectors - high, low - vectors)
        return x, jnp.where(outlier, beyond, -1.0), scale[..., 0], offset[..., 0]

    def _quantiles(self, x: Array) -> tuple[Array, Array, Array]:
        """Least and largest element of each vector [..., W] without its outliers, f32 [..., 1], and which these are."""
        if self.outliers == 0:
            return x.min(-1, keepdims=True), x.max(-1, keepdims=True), jnp.zeros(x.shape, bool)
        width = x.shape[-1]
        rising = jnp.sort(x, axis=-1)
        place = (1 - self.outliers / 2) * (width - 1)
        index, part = int(place), place - int(place)

        def quantile(order: Array) -> Array:
            """Linear between neighbours."""
            near = order[..., index : index + 1]
            return near + part * (order[..., min(index + 1, width - 1)][..., None] - near)

        outlier = (x >= quantile(rising)) | (x <= quantile(rising[..., ::-1]))
        middle = rising[..., (width - 1) // 2, None]
        inside = jnp.where(outlier, middle, x)
        return inside.min(-1, keepdims=True), inside.max(-1, keepdims=True), outlier

    def _outliers(self, rest: Array, beyond: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Channels and values of the outliers that are furthest out, C arrays [..., S] each."""
        width = rest.shape[-1]
        room = self.capacity(width)
        if room == 0:
            return (), ()
        far, channel = jax.lax.top_k(beyond, room)
        value = jnp.where(far > 0, jnp.take_along_axis(rest, channel, axis=-1), 0.0).astype(jnp.bfloat16)
        number = jnp.uint8 if width <= 256 else jnp.uint16 if width <= 65536 else jnp.uint32
        return tuple(jnp.moveaxis(channel.astype(number), -1, 0)), tuple(jnp.moveaxis(value, -1, 0))

    def _vectors(self, x: Array) -> Array:
        """What shares outliers and ranges: x [..., K, S, H] itself, or all heads' channels [..., 1, S, K·H]."""
        if not self.joint:
            return x
        *lead, heads, tokens, dim = x.shape
        return jnp.moveaxis(x, -3, -2).reshape(*lead, 1, tokens, heads * dim)


def _width(params: PyTree) -> Array:
    """f32 [1, K, H]: half the range of each channel; never 0."""
    return jnp.maximum(params["scale"], MIN_SCALE)
