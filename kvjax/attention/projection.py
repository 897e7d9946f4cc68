"""A linear map whose inputs and outputs may be several axes, so that heads need no reshape."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvjax.typing import Array


class Projection(nn.Module):
    """Contracts the last `len(inputs)` axes of x with the kernel.

    Attributes:
      inputs: sizes of the contracted axes, for example (N, H).
      outputs: sizes of the axes that replace them.
      use_bias: adds a bias of shape `outputs`.
      dtype: of the parameters `kernel` [*inputs, *outputs] and `bias` at initialisation.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        stddev = 1.0 / math.sqrt(math.prod(self.inputs))
        init = nn.initializers.truncated_normal(stddev)
        self.kernel = self.param("kernel", init, (*self.inputs, *self.outputs), self.dtype)
        self.bias = self.param("bias", nn.initializers.zeros, self.outputs, self.dtype) if self.use_bias else None

    def __call__(self, x: Array, out_dtype: jnp.dtype | None = None) -> Array:
        """x [..., *inputs] to [..., *outputs] in `out_dtype` (the dtype of x by default)."""
        contracted = len(self.inputs)
        axes = (tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted)))
        y = jax.lax.dot_general(x, self.kernel, (axes, ((), ())), preferred_element_type=out_dtype or x.dtype)
        return y if self.bias is None else y + self.bias.astype(y.dtype)
