"""The TPU kernel of `prefill_attention`, interpreted on the CPU: its numbers, its walk and what it declines."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import prefill_attention
from pallas_kernels.prefill_attention import reference, specs, walk
from pallas_kernels.prefill_attention.api import OP
from pallas_kernels.prefill_attention.specs import PrefillSpec
from pallas_kernels.testing import assert_close
from tests.pallas_kernels.interpret import cover, heated, jitted, on_tpu, poisoned, sizes_of, small_tiles
from tests.thin import thinned


def covering(name: str, tokens: int, groups: int, ragged: bool, **rest: Any) -> PrefillSpec:
    return PrefillSpec(name, **sizes_of(groups, tokens, ragged), tokens=tokens, **rest)


COVER = [
    covering(f"cover{i}", **choice)
    for i, choice in enumerate(
        cover(
            tokens=(1, 300),
            head_dim=(64, 96),
            groups=(1, 3, 16),
            temperature=(None, "head"),
            dtype=("float32", "bfloat16"),
            window=(None, 50),
            softcap=(None, 5.0),
            ragged=(False, True),
            selection=(0, 1),
        )
    )
]


@pytest.mark.parametrize("spec", thinned(COVER), ids=lambda spec: spec.name)
def test_equals_the_reference(spec: PrefillSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    assert_close(*poisoned_pair(spec))


@pytest.mark.slow
@pytest.mark.parametrize("spec", specs.SPECS, ids=lambda spec: spec.name)
def test_equals_the_reference_everywhere(spec: PrefillSpec) -> None:
    assert_close(*poisoned_pair(spec))


def poisoned_pair(spec: PrefillSpec) -> tuple[Any, Any]:
    """What the kernel makes of inputs that are NaN behind each row's end, and the reference of clean ones."""
    args, kwargs = spec.arguments()
    valid = kwargs["valid"]
    bad = heated(kwargs, valid)
    if "selection" in kwargs:
        bad |= {"selection": tuple(poisoned(x, valid, 2) for x in kwargs["selection"])}
    got = on_tpu(OP, *(poisoned(x, valid, x.ndim - 2) for x in args), **bad)
    return got, jitted(reference.run, *args, **kwargs)


MUTANTS = {
    "nothing is masked": ("edge", lambda self, i, j, length: i < 0),
    "a query sees the key behind it": ("sees", lambda self, query, key, length: (key <= query + 1) & (key < length)),
    "the last tile is left out": ("walk", lambda self, by, walk=walk.Tiles.walk: np.delete(walk(self, by), -2)),
}


@pytest.mark.parametrize(("method", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_a_kernel_with_an_error_is_found_out(method: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: it fails for kernels that are nearly right."""
    small_tiles(monkeypatch)
    monkeypatch.setattr(walk.Tiles, method, wrong)
    got, expected = poisoned_pair(PrefillSpec("mutant", 2, 1, 1, 200, 64, lengths=(200, 60)))
    with pytest.raises(AssertionError):
        assert_close(got, expected)


@pytest.mark.parametrize("by", ["query", "key"])
@pytest.mark.parametrize("window", [None, 1, 200, 2100])
@pytest.mark.parametrize("tokens", [1, 128, 1000, 2100])
def test_a_walk_visits_every_tile_that_has_something_to_see_once(tokens: int, window: int | None, by: Any) -> None:
    tiles = walk.Tiles.of(jnp.zeros((1, 1, 4, tokens, 64)), window, 1.0, None)
    entries = tiles.walk(by)
    assert entries[0] == entries[-1] == -1
    major, minor = entries[1:-1] >> 16, entries[1:-1] & 0xFFFF
    assert (np.diff(major) >= 0).all(), "the results of a tile are written once"
    i, j = (major, minor) if by == "query" else (minor, major)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    rows, columns = np.nonzero((distance >= 0) & (distance < (window or tokens)))
    expected = set(zip(rows // tiles.queries, columns // tiles.keys, strict=True))
    assert len(i) == len(expected) and set(zip(i.tolist(), j.tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (PrefillSpec("half", 1, 1, 1, 8, 64, dtype="float16"), "not float16"),
        (PrefillSpec("wide", 1, 1, 1, 8, 512), "512 channels are above 256"),
        (PrefillSpec("long", 1, 1, 8, 1 << 19, 128, dtype="bfloat16"), "tiles per head"),
    ],
)
def test_it_says_what_it_does_not_take(spec: PrefillSpec, reason: str) -> None:
    args, kwargs = spec.abstract()
    valid = kwargs.pop("valid")
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda a, v: OP(*a, valid=v, **kwargs, implementation="pallas_tpu"), args, valid)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", jnp.ones((2, 5))),
        ("selection", (jnp.ones((1, 3, 6, 4)),) * 2),
        ("selection", (jnp.ones((1, 1, 6, 4)), jnp.ones((1, 2, 6, 4)))),
        ("valid", jnp.ones((1, 5), bool)),
    ],
)
def test_wrong_shapes_are_refused_by_name(name: str, value: Any) -> None:
    args, kwargs = PrefillSpec("small", 1, 2, 1, 6, 4).arguments()
    with pytest.raises(ValueError, match=f"{name} must be"):
        prefill_attention(*args, **(kwargs | {name: value}))
