"""What the kernels become on accelerators that this machine does not have, found by compiling for them."""
