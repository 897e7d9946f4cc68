"""Compiles one program for a target that is not there. Runs in a process of its own, because compilers abort.

    python -m experiments.hardware_table.program '{"cell": {...}, "steps": null, "copies": false}'

Writes `result.json` into the current folder: {"status": "ok", bytes…}, or "unsupported" or "failed" with a "reason".
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from experiments.hardware_table.cell import Cell, Workload, workload
from experiments.hardware_table.hlo import largest_intermediate, moved
from experiments.hardware_table.target import BY_NAME, Target

RESULT = "result.json"
LARGEST_FILE = 1 << 30


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled for a cell: the op as its users call it, or the static schedule of its kernel.

    Attributes:
      cell: which one.
      steps: blocks of the static schedule; None means the op itself.
      copies: whether the schedule includes the copies from HBM.
    """

    cell: Cell
    steps: int | None = None
    copies: bool = False

    def dumps(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def loads(cls, text: str) -> Program:
        values = json.loads(text)
        return cls(**{**values, "cell": Cell(**values["cell"])})


@dataclasses.dataclass(frozen=True)
class Source:
    """A function to compile, its abstract arguments, which of them are donated, and facts for the table."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    facts: dict[str, int] = dataclasses.field(default_factory=dict)


def main(text: str) -> None:
    """Compiles and writes the result."""
    # A compiler that goes wrong must not fill the disk, neither with a log nor with its core.
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path(RESULT).write_text(json.dumps(result(Program.loads(text))))


def result(program: Program) -> dict[str, Any]:
    """What became of a program. A kernel declines while it is traced; whatever is raised later is a failure."""
    import jax

    toolchain = BY_NAME[program.cell.target].toolchain
    with pretending(BY_NAME[program.cell.target]) as sharding:
        try:
            source = _source(program)
            arguments = _placed(source.arguments, sharding)
            jitted = jax.jit(source.function, donate_argnums=source.donated, keep_unused=True, out_shardings=sharding)
            traced = jitted.trace(*arguments)
        except NotImplementedError as error:
            return {"status": "unsupported", "reason": one_line(error)}
        except Exception as error:
            return {"status": "failed", "reason": one_line(error)}
        try:
            compiled = traced.lower(lowering_platforms=(toolchain.platform,)).compile()
        except Exception as error:
            return {"status": "failed", "reason": one_line(error)}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None, "this compiler says nothing of what it made"
    return {
        "status": "ok",
        "array_bytes": sum(map(size, jax.tree.leaves(arguments))),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "intermediate_bytes": largest_intermediate(text),
        "moved_bytes": moved(text),
        **source.facts,
    }


@contextlib.contextmanager
def pretending(target: Target) -> Iterator[Any]:
    """Inside, whatever asks what it is traced for is told of `target`; gives a sharding that places arrays there.

    Kernels ask for the described device of the mesh (`pltpu.get_tpu_info` does), everything else for the backend of the
    process, which is replaced: this process computes nothing.
    """
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array([target.toolchain.device(target.topology)]), ("x",), axis_types=(AxisType.Auto,))
    backend = mock.patch.object(jax, "default_backend", return_value=target.toolchain.name)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), backend:
        yield NamedSharding(mesh, PartitionSpec())


def _source(program: Program) -> Source:
    load = workload(program.cell)
    if program.steps is None:
        return _op(load)
    schedule = load.static_schedule(load.spec, steps=program.steps, copies=program.copies)
    facts = {"packed_bytes": schedule.packed_bytes, "slots": schedule.slots}
    return Source(schedule.run, schedule.arguments, facts=facts)


def _op(load: Workload) -> Source:
    import jax

    from pallas_kernels import rows

    args, kwargs = load.spec.abstract()
    arrays = {name: value for name, value in kwargs.items() if _abstract(value)}
    static = {name: value for name, value in kwargs.items() if name not in arrays}

    def run(arrays: dict[str, Any], *args: Any) -> Any:
        return load.op(*args, **arrays, **static, implementation=load.target.implementation)

    donated = tuple(index + 1 for index in getattr(load.spec, "donated", ()))
    # Stores lie as they do on the target.
    laid_out = jax.eval_shape(lambda tree: rows.fold(tree, load.target.toolchain.name), (arrays, *args))
    return Source(run, laid_out, donated)


def _abstract(value: Any) -> bool:
    import jax

    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def _placed(arguments: Any, sharding: Any) -> Any:
    import jax

    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)


def size(x: Any) -> int:
    """Bytes of an array without padding; types below a byte count by their bits."""
    import jax.numpy as jnp

    whole = jnp.issubdtype(x.dtype, jnp.integer)
    bits = jnp.iinfo(x.dtype).bits if whole else 8 * jnp.dtype(x.dtype).itemsize
    return math.ceil(math.prod(x.shape) * bits / 8)


def one_line(error: BaseException, longest: int = 300) -> str:
    """The first line of an error; unless it is a refusal also its type and where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines[0] if lines else "no reason given")[:longest]
    if isinstance(error, NotImplementedError):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{type(error).__name__}: {text}" + "".join(f" ({Path(f.filename).name}:{f.lineno})" for f in last)


if __name__ == "__main__":
    main(sys.argv[1])
