"""`attention_mass` on XLA: a block of queries computes with the keys it may see, wherever in the array these lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention_mass
from pallas_kernels.attention_mass import xla

TOKENS = 96


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight queries at a time."""
    monkeypatch.setattr(xla, "CACHE_BYTES", 1)


def masses(order: np.ndarray, lengths: tuple[int, ...], own: bool, implementation: str) -> tuple[jax.Array, ...]:
    """Of keys that lie in another order than that of their positions, and of rows of different lengths."""
    rng = np.random.default_rng(0)
    rows = len(lengths)
    q = jnp.asarray(rng.standard_normal((rows, 2, 2, TOKENS, 16)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((rows, 2, TOKENS, 16)), jnp.float32)
    position = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (rows, TOKENS))
    valid = position < jnp.asarray(lengths)[:, None]
    lse = jnp.full(q.shape[:4], 3.0)
    found = attention_mass(
        q,
        k[:, :, order],
        None if own else lse,
        query_positions=position,
        key_positions=position[:, order],
        query_valid=valid,
        key_valid=valid[:, order],
        scale=0.25,
        return_lse=own,
        implementation=implementation,
    )
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("own", [False, True], ids=["lse", "no lse"])
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled", "swapped"])
def test_keys_in_any_order(order: str, own: bool) -> None:
    places = np.arange(TOKENS)
    orders = {
        "forward": places,
        "backward": places[::-1],
        "shuffled": np.random.default_rng(1).permutation(TOKENS),
        "swapped": np.roll(places, TOKENS // 2),
    }
    for got, expected in zip(
        *(masses(orders[order].copy(), (TOKENS, 31, 0), own, name) for name in ("xla", "reference")), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_block_takes_the_shortest_prefix_that_holds_what_it_sees() -> None:
    """Of 4 prefixes of 96 keys: block after block in a prompt; all of them where a late key may be seen."""
    ends = xla._ends(96, 96, 8)
    assert ends == (24, 48, 72, 96)
    last = jnp.arange(7, 96, 8, dtype=jnp.int32)[None]
    keys = jnp.arange(96, dtype=jnp.int32)[None]
    assert xla._prefixes(ends, last, keys).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert xla._prefixes(ends, last, keys.at[0, 50].set(1)).tolist() == [2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3]
    both = xla._prefixes(ends, jnp.concatenate([last, last * 0 + xla.NOTHING]), jnp.concatenate([keys, keys]))
    assert both.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], "a row without queries needs nothing"
    hidden = jnp.where(keys < 30, keys, jnp.iinfo(jnp.int32).max)
    assert xla._prefixes(ends, last, hidden).tolist() == [0, 0, 0] + [1] * 9
    assert xla._ends(96, 8, 8) == (96,), "a prompt's last queries see everything"
    assert xla._ends(10, 20, 10) == (5, 10)
