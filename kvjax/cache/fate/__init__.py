"""What becomes of a token that loses its place."""

from kvjax.cache.fate.base import Drop, Fate, Kept, Lost
from kvjax.cache.fate.compensate import Compensate
from kvjax.cache.fate.demote import Demote
from kvjax.cache.fate.merge import Merge
from kvjax.cache.fate.represent import Represent

__all__ = ["Compensate", "Demote", "Drop", "Fate", "Kept", "Lost", "Merge", "Represent"]
