"""Gradients of an implementation that has none of its own: those of another one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.loader import Loader

Run = Callable[..., tuple[jax.Array, ...]]

_STATIC = ("window", "scale", "softcap", "return_logits")


def with_gradient_of(backward: Run) -> Callable[[Run], Run]:
    """Decorates an implementation so that its gradients are those of `backward`, recomputed from the arguments."""

    def decorate(forward: Run) -> Run:
        @functools.wraps(forward)
        def run(q: jax.Array, keys: Loader, values: Loader, **options: Any) -> tuple[jax.Array, ...]:
            static = {name: options.pop(name) for name in _STATIC}

            @jax.custom_vjp
            def attend(*operands: Any) -> tuple[jax.Array, ...]:
                return forward(*operands[:3], **operands[3], **static)

            def keep(*operands: Any) -> tuple[tuple[jax.Array, ...], Any]:
                return attend(*operands), operands

            def pull(operands: Any, cotangents: tuple[jax.Array, ...]) -> tuple[Any, ...]:
                return jax.vjp(lambda *x: backward(*x[:3], **x[3], **static), *operands)[1](cotangents)

            attend.defvjp(keep, pull)
            return attend(q, keys, values, options)

        return run

    return decorate
