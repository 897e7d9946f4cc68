"""The same request on several CPU devices of one process: XLA computes a loop on one core, however many there are."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.bench.entrant import Arrays, Data, Program, temporaries

HEADS = "heads"


def one_device_per_core() -> None:
    """Makes CPU devices, if this process may still choose how many it has."""
    try:
        jax.config.update("jax_num_cpu_devices", cores())
    except RuntimeError:  # XLA_FLAGS or whoever started JAX has decided
        return


def cores() -> int:
    """Processor cores that this process may use; fewer than the machine has where it is pinned to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(kv_heads: int) -> int:
    """CPU devices over which so many kv heads can be spread evenly; 1 on an accelerator."""
    present = len(jax.devices()) if jax.default_backend() == "cpu" else 1
    return next(n for n in range(min(present, kv_heads, cores()), 0, -1) if kv_heads % n == 0)


def spread(data: Data, number: int) -> Data:
    """(q, keys, values, arrays without a head axis) with kv heads on `number` devices; heads are axis 1.

    `data` knows its right answer.
    """
    mesh = _mesh(number)

    def make() -> Arrays:
        return jax.device_put(data.make(), _placements(data.abstract, mesh))

    return Data(make, lambda *_: data.right_answer)


def program(attend: Callable[..., Any], number: int) -> Callable[[Data], Program]:
    """`Entrant.prepare` of a function of what `spread` gives that returns [B, K, ...] arrays."""
    mesh = _mesh(number)

    def prepare(data: Data) -> Program:
        placed = _placements(data.abstract, mesh)
        specs = jax.tree.map(lambda sharding: sharding.spec, placed)
        apart = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=P(None, HEADS)))
        shapes = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), data.abstract, placed
        )
        compiled = apart.lower(*shapes).compile()
        return Program(lambda arrays: compiled(*arrays), jax.block_until_ready, temporaries(compiled))

    return prepare


def _mesh(number: int) -> Mesh:
    return jax.make_mesh((number,), (HEADS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:number])


def _placements(abstract: Arrays, mesh: Mesh) -> Arrays:
    *by_head, everywhere = abstract
    return (
        *jax.tree.map(lambda _: NamedSharding(mesh, P(None, HEADS)), tuple(by_head)),
        jax.tree.map(lambda _: NamedSharding(mesh, P()), everywhere),
    )
