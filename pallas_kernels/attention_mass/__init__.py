"""How much attention each key received: the statistic of eviction policies."""

from pallas_kernels.attention_mass.api import attention_mass

__all__ = ["attention_mass"]
