"""What differs between the supported versions of JAX (0.10.2 to 0.12), and how kernels run without their accelerator.

Names that both ends have, and that kernels therefore use directly: `pltpu.CompilerParams`, `pltpu.InterpretParams`,
`plgpu.kernel(out_type=, scratch_types=)` (never `out_shape=`), `pl.pallas_call(out_shape=)`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu


class RaceError(AssertionError):
    """A kernel touched memory that a copy in flight was reading or writing."""


STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
"""Memory that nobody wrote is NaN, a read out of bounds is an error, and unordered accesses are found."""


@contextlib.contextmanager
def interpreted(params: Any = STRICT) -> Iterator[None]:
    """Pallas kernels for TPU that are traced inside run on the CPU, on simulated memories, copies and semaphores.

    Kernels need no argument for it. Compilations are not shared between inside and outside. The context waits for
    what was started in it.

    Args:
      params: a `pltpu.InterpretParams`.

    Raises:
      RaceError: `params.detect_races` is set and any kernel that ran inside has a race.
    """
    interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    with _watched(interpreter, pltpu.force_tpu_interpret_mode(params), pltpu.reset_tpu_interpret_mode_state):
        yield


@contextlib.contextmanager
def interpreted_gpu() -> Iterator[None]:
    """The same for Mosaic GPU kernels: grids, copies, barriers and arithmetic run, layouts in registers mean nothing.

    Kernels ask `is_interpreted_gpu` where they need another form of what the interpreter does not know.

    Raises:
      RaceError: a kernel that ran inside has a race.
    """
    interpret = "jax._src.pallas.mosaic_gpu.interpret"
    params, callbacks = (importlib.import_module(f"{interpret}.{name}") for name in ("params", "gpu_callbacks"))
    # Copies that one thread does are ordered by it, and to have waited for one would do for those before it.
    strict = {"detect_races": True, "uninitialized_memory": "nan", "num_tma_threads_per_device": 16}
    mode = params.force_gpu_interpret_mode(params.InterpretGPUParams(**strict))
    token = _interpreted_gpu.set(True)
    try:
        with _watched(callbacks, mode, callbacks.reset_gpu_interpret_mode_state):
            yield
    finally:
        _interpreted_gpu.reset(token)


def is_interpreted_gpu() -> bool:
    """Whether Mosaic GPU kernels that are traced now are interpreted."""
    return _interpreted_gpu.get()


_interpreted_gpu: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted_gpu", default=False)


@contextlib.contextmanager
def _watched(interpreter: Any, mode: Any, reset: Callable[[], None]) -> Iterator[None]:
    """Runs inside of `mode` and then raises a `RaceError` if any kernel had a race."""
    states: list[Any] = []
    create = getattr(interpreter, "RaceDetectionState", None)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        assert create is not None
        states.append(create(*args, **kwargs))
        return states[-1]

    # JAX 0.10 keeps the flag of the last kernel only, so every state is recorded; JAX 0.12 raises by itself.
    if create is not None:
        interpreter.RaceDetectionState = recorded
    try:
        with mode:
            yield
            jax.effects_barrier()
    except Exception as error:
        if "RACE DETECTED" in str(error):
            raise RaceError(str(error)) from error
        raise
    finally:
        if create is not None:
            interpreter.RaceDetectionState = create
        reset()
    if any(state.races_found for state in states):
        raise RaceError("a kernel that ran here has a race; JAX printed both accesses")


def load_fragment(ref: Any, layout: Any, optimized: bool) -> jax.Array:
    """All of a reference in a register layout, for Mosaic GPU; `optimized` refuses to load with bank conflicts."""
    load: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu").load
    index = ((),) if "idx" in inspect.signature(load).parameters else ()  # JAX 0.12 takes none
    return load(ref, *index, layout=layout, optimized=optimized)


def store_fragment(ref: Any, x: jax.Array) -> None:
    """Writes an array in any register layout to global memory, for Mosaic GPU, in however small pieces."""
    plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    if hasattr(plgpu, "store"):  # JAX 0.12, where an assignment insists on whole cache lines
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


@dataclasses.dataclass(frozen=True)
class TpuCore:
    """What kernels decide by.

    Attributes:
      multiplies_int8: whether the matrix unit takes int8.
      vector_memory: bytes.
    """

    multiplies_int8: bool = True
    vector_memory: int = 1 << 26


def tpu_core() -> TpuCore:
    """The core that is traced for: a real one or, inside the mesh of a described one, that; else the default."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return TpuCore()
    return TpuCore(info.is_matmul_supported(jnp.int8, jnp.int8), info.vmem_capacity_bytes)
