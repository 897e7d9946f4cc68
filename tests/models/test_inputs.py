"""What `Transformer` refuses: one message with the argument, what it should be, what it is, and the fix."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.errors import UsageError
from kvjax.models import transformer
from kvjax.models.config import TransformerConfig
from kvjax.models.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=16, embed_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8, max_positions=32
)
B, T = 2, 3
TOKENS = jax.ShapeDtypeStruct((B, T), jnp.int32)
PARAMS = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((B, T), jnp.int32))


def ints(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


def layers(*rows: int) -> list[Any]:
    return [SimpleNamespace(length=ints(n)) for n in rows]


def trace(tokens: Any = TOKENS, **arguments: Any) -> Any:
    """Traces a forward pass; nothing runs."""
    if isinstance(tokens, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda p, t: Transformer(CONFIG).apply(p, t, **arguments), PARAMS, tokens)
    return jax.eval_shape(lambda p: Transformer(CONFIG).apply(p, tokens, **arguments), PARAMS)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (jnp.zeros((B, T)), r"tokens is int32 \[B, T\]; got float32 \[2, 3\]"),
        (ints(T), r"tokens is int32 \[B, T\]; got int32 \[3\].*one prompt is a batch of one"),
        (ints(B, 0), "at least one row and one token"),
        ([[1, 2]], r"tokens is int32 \[B, T\]; got \[\[1, 2\]\] of type list.*jnp.array"),
    ],
)
def test_tokens(tokens: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        trace(tokens)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"positions": ints(T)}, r"positions is int32 \[B, T\] = \[2, 3\], for these tokens; got int32 \[3\]"),
        ({"positions": jnp.zeros((B, T))}, r"positions .*got float32 \[2, 3\].*leave it out"),
        ({"valid": ints(B, T)}, r"valid is bool \[B, T\] = \[2, 3\].*got int32 \[2, 3\]"),
        ({"valid": jnp.ones((B,), bool)}, r"valid .*got bool \[2\]"),
        ({"logits_at": ints(B, 1)}, r"logits_at is int32 \[B\] = \[2\].*got int32 \[2, 1\].*one index per row"),
        ({"logits_at": 2}, r"logits_at .*got 2 of type int"),
        ({"cache": layers(B)}, "one layer cache for each of the model's 2 layers; got 1"),
        ({"cache": SimpleNamespace()}, "got a SimpleNamespace.*context.cache.layers"),
        ({"cache": layers(3, 3)}, "the cache has 3 rows, but tokens has 2"),
    ],
)
def test_the_other_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        trace(**arguments)


def test_any_integers_are_tokens() -> None:
    for dtype in (np.int64, np.uint8, np.uint16):
        logits, _ = trace(np.zeros((B, T), dtype), positions=np.zeros((B, T), dtype), logits_at=np.zeros(B, dtype))
        assert logits.shape == (B, 1, CONFIG.vocab_size)


def test_the_checks_leave_nothing_in_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def program() -> str:
        return str(jax.make_jaxpr(lambda p, t: Transformer(CONFIG).apply(p, t)[0])(PARAMS, TOKENS))

    checked = program()
    monkeypatch.setattr(transformer, "check_inputs", lambda *_: None)
    assert program() == checked
