"""Which tokens keep a place."""

from kvjax.cache.policy.attention_mass import AttentionMass
from kvjax.cache.policy.base import Policy, Prompt, Slots
from kvjax.cache.policy.observation import Observation
from kvjax.cache.policy.random import Random
from kvjax.cache.policy.recency import Recency

__all__ = ["AttentionMass", "Observation", "Policy", "Prompt", "Random", "Recency", "Slots"]
