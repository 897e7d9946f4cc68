"""The attention that every key receives."""

from pallas_kernels.attention_mass.api import attention_mass

__all__ = ["attention_mass"]
