"""An op with small kernels by which the hardware table is tested: it compiles, declines, fails and dies."""
