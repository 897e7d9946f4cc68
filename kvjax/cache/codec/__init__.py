"""Codecs: in which precision, and in how many channels, a token is stored."""

from kvjax.cache.codec.balanced import Balanced
from kvjax.cache.codec.base import Codec
from kvjax.cache.codec.by_layer import ByLayer
from kvjax.cache.codec.channel_subset import ChannelSubset
from kvjax.cache.codec.fixed import Fixed
from kvjax.cache.codec.float8 import Float8
from kvjax.cache.codec.identity import Identity
from kvjax.cache.codec.integer import Integer
from kvjax.cache.codec.lloyd_max import LloydMax
from kvjax.cache.codec.low_rank import LowRank
from kvjax.cache.codec.nonuniform import NonUniform
from kvjax.cache.codec.per_channel import PerChannel
from kvjax.cache.codec.polar import Polar
from kvjax.cache.codec.polar_pairs import PolarPairs
from kvjax.cache.codec.qjl import QJL
from kvjax.cache.codec.rotated import Rotated
from kvjax.cache.codec.sketched import Sketched

__all__ = [
    "QJL",
    "Balanced",
    "ByLayer",
    "ChannelSubset",
    "Codec",
    "Fixed",
    "Float8",
    "Identity",
    "Integer",
    "LloydMax",
    "LowRank",
    "NonUniform",
    "PerChannel",
    "Polar",
    "PolarPairs",
    "Rotated",
    "Sketched",
]
