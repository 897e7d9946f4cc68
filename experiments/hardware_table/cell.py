"""The cells of the table: an op's workload on a target, and what is compiled for it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.hardware_table.target import BY_NAME, Target
from kvjax.errors import unknown

REGISTRIES = ("pallas_kernels.ops:OPS", "experiments.hardware_table.decode_step.op:OPS")


@dataclasses.dataclass(frozen=True)
class Cell:
    """Names only, so that it can be handed to another process.

    Attributes:
      op: name of the op.
      spec: name of one of its `HARDWARE` specs.
      target: name of the target.
      registry: module:attribute that holds the ops.
    """

    op: str
    spec: str
    target: str
    registry: str = REGISTRIES[0]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A cell with everything that its names stand for.

    Attributes:
      op: a `pallas_kernels.dispatch.Op`.
      spec: has `name`, `abstract()` and perhaps `donated`.
      target: where it shall run.
    """

    op: Any
    spec: Any
    target: Target

    @property
    def static_schedule(self) -> Any:
        """The function of that name beside the kernel, or None."""
        run = next(i.run for i in self.op.implementations if i.name == self.target.implementation)
        return getattr(importlib.import_module(run.__module__), "static_schedule", None)


def cells(
    ops: tuple[str, ...] = (),
    specs: tuple[str, ...] = (),
    targets: tuple[str, ...] = (),
    registries: tuple[str, ...] = REGISTRIES,
) -> Iterator[Cell]:
    """All cells, or those of the named ops, specs and targets: every spec where the op has a kernel for the target.

    Raises:
      UsageError: a name is unknown.
    """
    homes = {op.name: (op, registry) for registry in registries for op in registered(registry)}
    workloads = {name: [spec.name for spec in hardware(op)] for name, (op, _) in homes.items()}
    _known("op", ops, workloads)
    _known("spec", specs, {name for known in workloads.values() for name in known})
    _known("target", targets, BY_NAME)
    for name, (op, registry) in homes.items():
        implementations = {implementation.name for implementation in op.implementations}
        for spec in workloads[name]:
            for target in BY_NAME.values():
                chosen = (not ops or name in ops, not specs or spec in specs, not targets or target.name in targets)
                if all(chosen) and target.implementation in implementations:
                    yield Cell(name, spec, target.name, registry)


def workload(cell: Cell) -> Workload:
    """What the names of a cell stand for."""
    op = next(op for op in registered(cell.registry) if op.name == cell.op)
    return Workload(op, next(spec for spec in hardware(op) if spec.name == cell.spec), BY_NAME[cell.target])


def registered(registry: str) -> tuple[Any, ...]:
    """The ops that a registry holds."""
    module, _, attribute = registry.partition(":")
    return getattr(importlib.import_module(module), attribute)


def hardware(op: Any) -> tuple[Any, ...]:
    """The workloads of real size: `HARDWARE` in the `specs` module beside the op's implementations."""
    modules = (implementation.run.__module__ for implementation in op.implementations)
    package = min(modules, key=lambda name: name.count(".")).rpartition(".")[0]
    return tuple(getattr(importlib.import_module(f"{package}.specs"), "HARDWARE", ()))


def _known(kind: str, names: tuple[str, ...], known: Mapping[str, Any] | set[str]) -> None:
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)
