"""Sums of int8 rows as a Pallas kernel for TPUs, one for NVIDIA GPUs, and in plain jax."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Implementation, Op
from pallas_kernels.schedule import StaticSchedule
from tests.hardware.standin.specs import BLOCK, HARDWARE, LANES, Spec

SUBLANES = 8


def xla(x: jax.Array, *, bias: jax.Array, trouble: str) -> jax.Array:
    """f32 [LANES]: the sum of x int8 [S, LANES] over S, plus bias f32 [LANES]."""
    if trouble == "declines":
        raise NotImplementedError("this workload is declined")
    if trouble == "fails":
        raise TypeError("this workload fails\nand says more than one line")
    if trouble == "aborts":
        os.abort()
    return x.astype(jnp.float32).sum(0) + bias


def run_tpu(x: jax.Array, *, bias: jax.Array, trouble: str) -> jax.Array:
    """See `xla`."""
    if trouble == "knows_the_chip":
        raise NotImplementedError(f"traced for {pltpu.get_tpu_info().chip_version}")
    if trouble != "illegal":
        xla(x, bias=bias, trouble=trouble)
    total = _sum(x.shape[0] // BLOCK, trouble == "illegal")(x)
    return total.sum(0) + bias


def _sum(steps: int, illegal: bool = False) -> Any:
    def body(x_ref: Any, out_ref: Any) -> None:
        x = x_ref[...]
        out_ref[...] += _folded(jnp.right_shift(x, jnp.int8(4)) if illegal else x)

    return pl.pallas_call(
        body,
        grid=(steps,),
        in_specs=[pl.BlockSpec((BLOCK, LANES), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((SUBLANES, LANES), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((SUBLANES, LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="standin_sum",
    )


def _folded(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).reshape(-1, SUBLANES, LANES).sum(0)


def static_schedule(spec: Spec, *, steps: int, copies: bool) -> StaticSchedule:
    """See `pallas_kernels.schedule`."""
    if spec.name == "unscheduled":
        raise NotImplementedError("this workload has no schedule")
    if copies:
        arguments = (jax.ShapeDtypeStruct((steps * BLOCK, LANES), jnp.int8),)
        return StaticSchedule(_sum(steps), arguments, BLOCK * LANES, BLOCK)

    def body(out_ref: Any, x_ref: Any) -> None:
        out_ref[...] += _folded(x_ref[...])

    run = pl.pallas_call(
        body,
        grid=(steps,),
        out_specs=pl.BlockSpec((SUBLANES, LANES), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((SUBLANES, LANES), jnp.float32),
        scratch_shapes=[pltpu.VMEM((BLOCK, LANES), jnp.int8)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="standin_schedule",
    )
    return StaticSchedule(run, (), BLOCK * LANES, BLOCK)


def run_gpu(x: jax.Array, *, bias: jax.Array, trouble: str) -> jax.Array:
    """See `xla`; the kernel widens what XLA then sums."""
    xla(x, bias=bias, trouble=trouble)
    tile = 64

    def body(x_gmem: Any, out_gmem: Any, x_smem: Any, barrier: Any) -> None:
        rows = pl.ds(jax.lax.axis_index("i") * tile, tile)
        plgpu.copy_gmem_to_smem(x_gmem.at[rows], x_smem, barrier)
        plgpu.barrier_wait(barrier)
        out_gmem[rows] = x_smem[...].astype(jnp.float32)

    wide = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        scratch_types=[plgpu.SMEM((tile, LANES), jnp.int8), plgpu.Barrier()],
        grid=(x.shape[0] // tile,),
        grid_names=("i",),
    )(x)
    return wide.sum(0) + bias


OPS = (
    Op(
        name="standin",
        implementations=(
            Implementation("pallas_tpu", run_tpu, ("tpu",)),
            Implementation("pallas_gpu", run_gpu, ("gpu",)),
            Implementation("xla", xla),
        ),
        example=HARDWARE[0].abstract,
    ),
)
