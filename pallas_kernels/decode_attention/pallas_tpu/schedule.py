"""The kernel's block over and over, for measuring; see `pallas_kernels.schedule`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.pallas_tpu.call import block_shape, is_memory, make_step, memory, parameters
from pallas_kernels.decode_attention.pallas_tpu.edges import finish, start
from pallas_kernels.decode_attention.pallas_tpu.mask import Mask
from pallas_kernels.decode_attention.pallas_tpu.plan import Plan
from pallas_kernels.loader import Loader
from pallas_kernels.schedule import StaticSchedule


def schedule(plan: Plan, keys: Loader, values: Loader, steps: int, copies: bool) -> StaticSchedule:
    """`steps` whole blocks in one loop, from HBM with `copies`, else from vector memory as it is."""
    slots = keys.count

    def cut(x: Any, turned: bool) -> jax.ShapeDtypeStruct:
        heads = 1 if x.shape[1] == 1 else plan.step_heads
        shape = block_shape(x.shape[2:], turned, plan.block, slots)
        return jax.ShapeDtypeStruct((plan.step_rows, heads, *shape), x.dtype)

    def of_heads(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((min(x.shape[0], plan.step_heads), *x.shape[1:]), x.dtype)

    def whole_spec(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda s: (0,) * len(x.shape))

    def step_spec(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda s: (s, *(0,) * (len(x.shape) - 1)))

    turned = plan.keys.turned(keys), plan.values.turned(values)
    blocks = jax.tree.map(cut, (keys.slots, values.slots), turned)
    q = jax.ShapeDtypeStruct((plan.step_rows, plan.step_heads, plan.queries, plan.keys.dim), jnp.float32)
    constants = (jax.eval_shape(plan.keys.constants, keys), jax.eval_shape(plan.values.constants, values))
    small = (q, *jax.tree.map(of_heads, constants))
    stored = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] * steps, *x.shape[1:]), x.dtype), blocks)
    flat, tree = jax.tree.flatten((small, stored if copies else ()))
    specs = [whole_spec(x) for x in jax.tree.leaves(small)]
    specs += [step_spec(x) for x in jax.tree.leaves(blocks)] if copies else []
    scratch = (memory(plan), () if copies else jax.tree.map(lambda x: pltpu.VMEM(x.shape, x.dtype), blocks))
    outputs = (
        jax.ShapeDtypeStruct((plan.step_rows, plan.step_heads, plan.queries, plan.values.dim), jnp.float32),
        jax.ShapeDtypeStruct((1, 1, 1, len(plan.heads) * plan.queries), jnp.float32),
    )

    def kernel(*refs: Any) -> None:
        (query, *constants), from_hbm = jax.tree.unflatten(tree, refs[: len(flat)])
        results = refs[len(flat) : len(flat) + 2]
        at, in_memory = jax.tree.unflatten(jax.tree.structure(scratch, is_leaf=is_memory), refs[len(flat) + 2 :])
        arrays = zip(from_hbm if copies else in_memory, constants, strict=True)
        step = make_step(plan, keys, values, dict(zip(("keys", "values"), arrays, strict=True)), at)
        pl.when(pl.program_id(0) == 0)(lambda: start(plan, query, at["own"]))
        first = pl.program_id(0)
        step.block(Mask(plan, at["own"], first, lambda i, h: plan.block) if plan.always_masked else None)
        pl.when(pl.program_id(0) == steps - 1)(lambda: finish(plan, at["own"], *results))

    run = pl.pallas_call(
        kernel,
        grid=(steps,),
        in_specs=specs,
        out_specs=[whole_spec(x) for x in outputs],
        out_shape=outputs,
        scratch_shapes=jax.tree.leaves(scratch, is_leaf=is_memory),
        compiler_params=parameters(plan, ("arbitrary",)),
        name="decode_attention",
    )
    packed = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(blocks))
    return StaticSchedule(run, tuple(flat), packed, plan.block * len(plan.heads))
