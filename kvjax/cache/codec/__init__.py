"""Codecs: in which precision a token is stored."""

from kvjax.cache.codec.base import Codec
from kvjax.cache.codec.float8 import Float8
from kvjax.cache.codec.identity import Identity
from kvjax.cache.codec.integer import Integer

__all__ = ["Codec", "Float8", "Identity", "Integer"]
