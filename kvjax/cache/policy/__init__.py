"""Which tokens keep a place."""

from kvjax.cache.policy.attention_mass import AttentionMass
from kvjax.cache.policy.base import Perturbed, Policy, Repetition
from kvjax.cache.policy.chunks import Chunks
from kvjax.cache.policy.critical import Critical
from kvjax.cache.policy.expected_attention import ExpectedAttention
from kvjax.cache.policy.fixed_place import FixedPlace
from kvjax.cache.policy.frozen import Frozen
from kvjax.cache.policy.given import Given
from kvjax.cache.policy.hidden import Hidden
from kvjax.cache.policy.key_diff import KeyDiff
from kvjax.cache.policy.key_norm import KeyNorm
from kvjax.cache.policy.keyformer import Keyformer
from kvjax.cache.policy.lag import Lag
from kvjax.cache.policy.last_attention import LastAttention
from kvjax.cache.policy.observation import Observation
from kvjax.cache.policy.over_heads import OverHeads
from kvjax.cache.policy.predicted import Predicted
from kvjax.cache.policy.random import Random
from kvjax.cache.policy.recency import Recency
from kvjax.cache.policy.redundancy import Redundancy
from kvjax.cache.policy.seen import Prompt, Slots, Tokens

__all__ = [
    "AttentionMass",
    "Chunks",
    "Critical",
    "ExpectedAttention",
    "FixedPlace",
    "Frozen",
    "Given",
    "Hidden",
    "KeyDiff",
    "KeyNorm",
    "Keyformer",
    "Lag",
    "LastAttention",
    "Observation",
    "OverHeads",
    "Perturbed",
    "Policy",
    "Predicted",
    "Prompt",
    "Random",
    "Recency",
    "Redundancy",
    "Repetition",
    "Slots",
    "Tokens",
]
