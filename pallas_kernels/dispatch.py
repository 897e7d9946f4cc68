"""Choosing an implementation of an op: the best one for this platform that accepts the request.

An implementation declines by raising `NotImplementedError` with the reason, before it computes anything.
The dispatcher then tries the next one; when the caller named the implementation, the error is shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
      name: what a caller writes in `implementation=`.
      run: the function; all implementations of an op take the same arguments.
      platforms: JAX backends ('cpu', 'gpu', 'tpu') where it is tried without being named; None means all.
      unproven: why its results are not trusted yet; then it is never tried without being named.
    """

    name: str
    run: Callable[..., Any]
    platforms: tuple[str, ...] | None = None
    unproven: str = ""

    def declines(self, platform: str) -> str | None:
        """Why it is not tried on `platform`, or None."""
        if self.platforms is None or platform in self.platforms:
            return self.unproven or None
        return f"made for {', '.join(self.platforms)}; this process computes on {platform}"


@dataclasses.dataclass(frozen=True)
class Support:
    """One row of `supported()`: `reason` says why an implementation does not run here, and is empty if it does."""

    op: str
    implementation: str
    reason: str = ""

    @property
    def runs(self) -> bool:
        return not self.reason


@dataclasses.dataclass(frozen=True)
class Op:
    """An op and its implementations, best first.

    Attributes:
      name: the public function's name.
      implementations: tried in this order.
      example: returns the abstract (args, kwargs) of a small real workload; `support` traces them.
    """

    name: str
    implementations: tuple[Implementation, ...]
    example: Callable[[], tuple[Sequence[Any], Mapping[str, Any]]]

    def __call__(self, *args: Any, implementation: str | None = None, **kwargs: Any) -> Any:
        """Runs the first implementation that accepts, or exactly the named one.

        Raises:
          ValueError: no implementation has that name.
          NotImplementedError: the named one declines, or all do; the message holds the reasons.
        """
        if implementation is not None:
            return self._named(implementation).run(*args, **kwargs)
        platform = jax.default_backend()
        reasons = []
        for candidate in self.implementations:
            reason = candidate.declines(platform)
            if reason is None:
                try:
                    return candidate.run(*args, **kwargs)
                except NotImplementedError as error:
                    reason = str(error)
            reasons.append(f"{candidate.name}: {reason}")
        raise NotImplementedError(f"no implementation of {self.name} takes this request. " + "; ".join(reasons))

    def _named(self, name: str) -> Implementation:
        for candidate in self.implementations:
            if candidate.name == name:
                return candidate
        known = ", ".join(repr(i.name) for i in self.implementations)
        raise ValueError(f"{self.name} has no implementation {name!r}; it has {known}")

    def support(self, platform: str | None = None) -> tuple[Support, ...]:
        """What runs on `platform` (default: this process's backend), by tracing `example`; computes nothing."""
        platform = platform or jax.default_backend()
        return tuple(Support(self.name, i.name, self._refusal(i, platform)) for i in self.implementations)

    def _refusal(self, candidate: Implementation, platform: str) -> str:
        reason = candidate.declines(platform)
        if reason is not None:
            return reason
        args, kwargs = self.example()
        arrays = {name: value for name, value in kwargs.items() if _is_abstract(value)}
        static = {name: value for name, value in kwargs.items() if name not in arrays}
        try:
            jax.eval_shape(lambda args, arrays: candidate.run(*args, **arrays, **static), args, arrays)
        except NotImplementedError as error:
            return str(error) or "declined without a reason"
        return ""


def _is_abstract(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)
