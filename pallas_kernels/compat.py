"""What differs between the supported versions of JAX (0.10.2 to 0.12), and how kernels for a TPU run without one.

Names that both ends have, and that kernels therefore use directly: `pltpu.CompilerParams`, `pltpu.InterpretParams`,
`plgpu.kernel(out_type=, scratch_types=)` (never `out_shape=`), `pl.pallas_call(out_shape=)`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import jax
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
    interpreter: Any = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    states: list[Any] = []
    create = interpreter.RaceDetectionState

    def recorded(*args: Any, **kwargs: Any) -> Any:
        states.append(create(*args, **kwargs))
        return states[-1]

    # JAX 0.10 keeps the flag of the last kernel only, so every state is recorded; JAX 0.12 raises by itself.
    interpreter.RaceDetectionState = recorded
    try:
        with pltpu.force_tpu_interpret_mode(params):
            yield
            jax.effects_barrier()
    except Exception as error:
        if "RACE DETECTED" in str(error):
            raise RaceError(str(error)) from error
        raise
    finally:
        interpreter.RaceDetectionState = create
        pltpu.reset_tpu_interpret_mode_state()
    if any(state.races_found for state in states):
        raise RaceError("a kernel that ran here has a race; JAX printed both accesses")
