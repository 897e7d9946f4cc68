"""How much attention each key received: the statistic of eviction policies."""

from pallas_kernels.attention_mass.api import attention_mass
from pallas_kernels.attention_mass.noise import GumbelNoise

__all__ = ["GumbelNoise", "attention_mass"]
