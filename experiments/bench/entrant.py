"""Who takes part in a contest: a program, the arrays that it reads, and how its answer is checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Arrays = tuple[Any, ...]


@dataclasses.dataclass(eq=False)
class Data:
    """Arrays that entrants read. They are made when first asked for, and entrants that name the same `Data` share them.

    Attributes:
      make: returns a tuple of pytrees of arrays; can be traced.
      expected: the right answer to these arrays (what `Entrant.answer` picks out), by the definition of the op.
    """

    make: Callable[[], Arrays]
    expected: Callable[..., Any] | None = None

    @functools.cached_property
    def abstract(self) -> Arrays:
        return jax.eval_shape(self.make)

    @functools.cached_property
    def arrays(self) -> Arrays:
        return jax.block_until_ready(self.make())

    @functools.cached_property
    def right_answer(self) -> np.ndarray | None:
        return None if self.expected is None else np.asarray(self.expected(*self.arrays), np.float64)

    @property
    def nbytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.abstract))


class Program(NamedTuple):
    """A compiled entrant.

    Attributes:
      start: begins one computation on `Data.arrays`; what it returns goes to `wait`.
      wait: returns when it has been computed.
      temporaries: bytes that one computation allocates beside its arrays and its result; None if nobody knows.
    """

    start: Callable[[Arrays], Any]
    wait: Callable[[Any], Any]
    temporaries: int | None


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One way to compute what a contest is about.

    Attributes:
      name: in tables and plots.
      data: what it reads.
      prepare: compiles it; an error that it raises says why it does not take part.
      moves: bytes of the arrays that every computation has to read or write.
      answer: the part of a result that is checked; None where there is nothing to check.
      naive: the entrant that does the same with a decoded copy, if there is one.
      own: it is this project's choice for this device, which must not fail.
    """

    name: str
    data: Data
    prepare: Callable[[Data], Program]
    moves: int
    answer: Callable[[Any], Any] | None = None
    naive: str | None = None
    own: bool = False


def compiled(function: Callable[..., Any]) -> Callable[[Data], Program]:
    """`Entrant.prepare` of a JAX function of the arrays."""

    def prepare(data: Data) -> Program:
        program = jax.jit(function).lower(*data.abstract).compile()
        return Program(lambda arrays: program(*arrays), jax.block_until_ready, temporaries(program))

    return prepare


def temporaries(program: Any) -> int | None:
    """Bytes that a compiled JAX program allocates beside arguments and results."""
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def reader(nbytes: int) -> Entrant:
    """Reads as many bytes once and does next to nothing with them: the bandwidth that can be had."""
    numbers = nbytes // 4
    shape = (numbers // 1024, 1024) if numbers >= 1024 else (1, numbers)
    data = Data(lambda: (jax.numpy.ones(shape),), lambda x: x.size)
    return Entrant("read", data, compiled(lambda x: x.sum()), shape[0] * shape[1] * 4, lambda out: out)
