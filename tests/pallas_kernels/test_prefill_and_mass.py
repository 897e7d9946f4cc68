"""`prefill_attention` and `attention_mass`: the TPU kernels interpreted on the CPU, and what the newer arguments mean.

Interpreted, memory that nobody wrote is NaN, a read out of bounds is an error and a race is found. Rows are poisoned
behind their end for the kernel and clean for the reference.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention_mass, prefill_attention
from pallas_kernels.attention_mass import GumbelNoise
from pallas_kernels.attention_mass import reference as mass_reference
from pallas_kernels.attention_mass import specs as mass_specs
from pallas_kernels.attention_mass import tiles as mass_tiles
from pallas_kernels.attention_mass.api import OP as MASS
from pallas_kernels.attention_mass.specs import MassSpec
from pallas_kernels.compat import RaceError, interpreted
from pallas_kernels.prefill_attention import reference, specs, walk
from pallas_kernels.prefill_attention.api import OP as PREFILL
from pallas_kernels.prefill_attention.specs import PrefillSpec
from pallas_kernels.testing import assert_close

QUICK = {"xla_backend_optimization_level": 0}
"""Each program runs once: compiling it well takes longer than it saves."""


def cover(**axes: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """A small list of choices in which every two values of every two axes meet; greedy and deterministic."""
    names, draw = list(axes), random.Random(0)
    open_pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }

    def pairs(choice: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, choice[a], b, choice[b]) for a, b in itertools.combinations(names, 2)}

    while open_pairs:
        a, i, b, j = min(open_pairs)
        tries = [{name: draw.randrange(len(axes[name])) for name in names} | {a: i, b: j} for _ in range(200)]
        best = max(tries, key=lambda choice: len(pairs(choice) & open_pairs))
        open_pairs -= pairs(best)
        yield {name: axes[name][at] for name, at in best.items()}


def sizes_of(groups: int, tokens: int, ragged: bool) -> dict[str, Any]:
    """Rows and kv heads, few where there is much else; a ragged batch has a full row and a short or empty one."""
    return {
        "batch": 2 if ragged else 1,
        "kv_heads": 1 if groups == 16 else 2,
        "groups": groups,
        "lengths": (tokens, tokens // 3) if ragged else None,
    }


def prefill_spec(name: str, tokens: int, groups: int, ragged: bool, **rest: Any) -> PrefillSpec:
    return PrefillSpec(name, **sizes_of(groups, tokens, ragged), tokens=tokens, **rest)


def mass_spec(name: str, sizes: tuple[int, int, int], groups: int, ragged: bool, **rest: Any) -> MassSpec:
    tokens, slots, offset = sizes
    return MassSpec(name, **sizes_of(groups, slots, ragged), tokens=tokens, slots=slots, offset=offset, **rest)


PREFILL_COVER = [
    prefill_spec(f"cover{i}", **choice)
    for i, choice in enumerate(
        cover(
            tokens=(1, 130, 300),
            head_dim=(64, 96, 256),
            groups=(1, 3, 16),
            temperature=(None, "token", "head"),
            dtype=("float32", "bfloat16"),
            window=(None, 50),
            softcap=(None, 5.0),
            ragged=(False, True),
            selection=(0, 1),
        )
    )
]
MASS_COVER = [
    mass_spec(f"cover{i}", **choice)
    for i, choice in enumerate(
        cover(
            sizes=((1, 1, 0), (300, 300, 0), (37, 200, 37)),
            head_dim=(64, 128, 256),
            groups=(1, 3, 16),
            reduce=("sum", "mean", "max"),
            temperature=(None, "token", "head"),
            dtype=("float32", "bfloat16"),
            window=(None, 50),
            softcap=(None, 5.0),
            ragged=(False, True),
            noise=(False, True),
            own=(False, True),
        )
    )
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128 tokens, so that a few hundred tokens have tiles of every kind, and heads are split."""
    monkeypatch.setattr(walk, "ROWS", 256)
    monkeypatch.setattr(walk, "PART", 128)
    monkeypatch.setattr(mass_tiles, "TOKENS", 128)


def jitted(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`run(*args, **kwargs)` in one program; only arrays are its arguments."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = [isinstance(leaf, jax.Array) for leaf in leaves]

    def call(arrays: list[jax.Array]) -> Any:
        rest = iter(arrays)
        args, kwargs = jax.tree.unflatten(
            structure, [next(rest) if t else x for x, t in zip(leaves, traced, strict=True)]
        )
        return run(*args, **kwargs)

    arrays = [leaf for leaf, t in zip(leaves, traced, strict=True) if t]
    return jax.block_until_ready(jax.jit(call, compiler_options=QUICK)(arrays))


def on_tpu(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The op's TPU kernel, interpreted."""
    with interpreted():
        return jitted(lambda *a, **k: op(*a, **k, implementation="pallas_tpu"), *args, **kwargs)


def poisoned(x: jax.Array, valid: jax.Array, axis: int) -> jax.Array:
    """NaN where `valid` [B, n] is False along `axis`."""
    mask = valid.reshape(valid.shape[0], *(1,) * (axis - 1), valid.shape[1], *(1,) * (x.ndim - axis - 1))
    return jnp.where(mask, x, jnp.nan)


def poisoned_prefill(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs, valid = dict(kwargs), kwargs["valid"]
    if "selection" in kwargs:
        kwargs["selection"] = tuple(poisoned(x, valid, 2) for x in kwargs["selection"])
    if "temperature" in kwargs:
        kwargs["temperature"] = poisoned(kwargs["temperature"], valid, kwargs["temperature"].ndim - 1)
    return tuple(poisoned(x, valid, x.ndim - 2) for x in args), kwargs


def poisoned_mass(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (q, k, lse), kwargs, valid = args, dict(kwargs), kwargs["query_valid"]
    if "temperature" in kwargs:
        kwargs["temperature"] = poisoned(kwargs["temperature"], valid, kwargs["temperature"].ndim - 1)
    lse = None if lse is None else poisoned(lse, valid, 3)
    return (poisoned(q, valid, 3), poisoned(k, kwargs["key_valid"], 2), lse), kwargs


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("spec", PREFILL_COVER, ids=lambda spec: spec.name)
def test_prefill_kernel_equals_the_reference(spec: PrefillSpec) -> None:
    args, kwargs = spec.arguments()
    bad_args, bad_kwargs = poisoned_prefill(args, kwargs)
    assert_close(on_tpu(PREFILL, *bad_args, **bad_kwargs), jitted(reference.run, *args, **kwargs))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("spec", MASS_COVER, ids=lambda spec: spec.name)
def test_mass_kernel_equals_the_reference(spec: MassSpec) -> None:
    args, kwargs = spec.arguments()
    bad_args, bad_kwargs = poisoned_mass(args, kwargs)
    assert_close(on_tpu(MASS, *bad_args, **bad_kwargs), jitted(mass_reference.run, *args, **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("spec", specs.SPECS, ids=lambda spec: spec.name)
def test_prefill_kernel_equals_the_reference_everywhere(spec: PrefillSpec) -> None:
    args, kwargs = spec.arguments()
    assert_close(on_tpu(PREFILL, *args, **kwargs), jitted(reference.run, *args, **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("spec", mass_specs.SPECS, ids=lambda spec: spec.name)
def test_mass_kernel_equals_the_reference_everywhere(spec: MassSpec) -> None:
    args, kwargs = spec.arguments()
    assert_close(on_tpu(MASS, *args, **kwargs), jitted(mass_reference.run, *args, **kwargs))


def loss_of(op: Callable[..., Any], kwargs: dict[str, Any], weights: jax.Array) -> Callable[..., Any]:
    """A scalar that depends on every result: differentiable in q, k, v, temperature and selection."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, more: dict[str, Any]) -> jax.Array:
        out, lse, *hidden = op(q, k, v, **(kwargs | more))
        total = (out.astype(jnp.float32) * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()
        return total + sum(jnp.sin(x).sum() for x in hidden)

    return loss


def gradients(op: Callable[..., Any], spec: PrefillSpec) -> Any:
    args, kwargs = spec.arguments()
    more = {name: kwargs.pop(name) for name in ("temperature", "selection") if name in kwargs}
    weights = jax.random.normal(jax.random.key(9), args[0].shape)
    grads = jitted(jax.grad(loss_of(op, kwargs, weights), argnums=(0, 1, 2, 3)), *args, more)
    # The gradient of a float32 temperature is made of products of the activations, and as exact as those.
    return jax.tree.map(lambda x: x.astype(spec.dtype), grads)


GRADIENTS = [
    PrefillSpec("ragged", 2, 2, 3, 300, 64, lengths=(300, 100), softcap=5.0, temperature="head"),
    PrefillSpec("window", 1, 1, 1, 300, 96, window=50, temperature="token"),
    PrefillSpec("split_bfloat16", 2, 1, 8, 140, 128, dtype="bfloat16", lengths=(140, 0)),
]
SELECTIVE = [
    PrefillSpec("shared", 2, 2, 2, 70, 32, lengths=(70, 30), softcap=6.0, temperature="token", selection=1),
    PrefillSpec("by_head", 1, 2, 1, 150, 32, window=40, selection=2),
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("spec", GRADIENTS, ids=lambda spec: spec.name)
def test_gradients_of_the_kernels_equal_autodiff_of_the_reference(spec: PrefillSpec) -> None:
    with interpreted():
        grads = gradients(lambda *a, **k: PREFILL(*a, **k, implementation="pallas_tpu"), spec)
    assert_close(grads, gradients(reference.run, spec))


@pytest.mark.parametrize("spec", [*GRADIENTS[:2], *SELECTIVE], ids=lambda spec: spec.name)
def test_gradients_of_the_xla_form_equal_autodiff_of_the_reference(
    spec: PrefillSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pallas_kernels.prefill_attention.xla.CACHE_BYTES", 1)  # blocks of 16 queries: several spans
    grads = gradients(lambda *a, **k: PREFILL(*a, **k, implementation="xla"), spec)
    assert_close(grads, gradients(reference.run, spec))


def test_gradients_of_the_selective_kernel_are_those_of_the_xla_form() -> None:
    spec = SELECTIVE[0]
    with interpreted():
        grads = gradients(lambda *a, **k: PREFILL(*a, **k, implementation="pallas_tpu"), spec)
    assert_close(grads, gradients(reference.run, spec))


def test_selection_hides_what_the_paper_says() -> None:
    """A transcription of the equations for one layer: head 0 decides for all heads, the first token is protected."""
    tokens, heads, dim = 24, 3, 8
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads, tokens, dim)).astype(np.float32) for _ in range(3))
    logits = np.einsum("htd,hsd->hts", q, k) / np.sqrt(dim)
    causal = np.tril(np.ones((tokens, tokens), bool))
    chosen = np.where(causal, np.maximum(logits[0], 0), 0)
    chosen[:, 0] = 0
    np.fill_diagonal(chosen, 0)
    hidden = np.cumsum(np.concatenate([np.zeros((1, tokens)), chosen[:-1]]), axis=0)
    scores = np.where(causal, logits - hidden, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("hts,hsd->htd", p / p.sum(-1, keepdims=True), v)

    chosen_keys = jnp.asarray(k)[None, :1].at[:, :, 0].set(0)
    out, _, total = prefill_attention(
        *(jnp.asarray(x)[None] for x in (q[:, None], k, v)),
        valid=jnp.ones((1, tokens), bool),
        scale=dim**-0.5,
        selection=(jnp.asarray(q)[None, :1], chosen_keys),
    )
    np.testing.assert_allclose(out[0, :, 0], expected, atol=2e-6)
    np.testing.assert_allclose(total[0, 0], hidden[-1] + chosen[-1], rtol=1e-5, atol=1e-6)


def test_what_a_prefix_has_hidden_is_what_the_next_query_sees() -> None:
    """So a cache that carries it on decodes as prefill computes."""
    spec = PrefillSpec("prefix", 1, 1, 2, 40, 16, selection=1)
    (q, k, v), kwargs = spec.arguments()
    whole, _, _ = prefill_attention(q, k, v, **kwargs)
    cut = {"valid": kwargs["valid"][:, :-1], "selection": tuple(x[:, :, :-1] for x in kwargs["selection"])}
    _, _, hidden = prefill_attention(q[..., :-1, :], k[:, :, :-1], v[:, :, :-1], **(kwargs | cut))
    logits = jnp.einsum("gh,sh->gs", q[0, 0, :, -1], k[0, 0]) * kwargs["scale"] - jnp.pad(hidden[0, 0], (0, 1))
    np.testing.assert_allclose(whole[0, 0, :, -1], jax.nn.softmax(logits) @ v[0, 0], atol=2e-6)


def test_selective_prefill_never_holds_all_pairs() -> None:
    """Forward and backward pass, for 4,096 tokens: less than a sixteenth of one T x T array."""
    spec = PrefillSpec("memory", 1, 1, 1, 4096, 32, selection=1)
    args, kwargs = spec.abstract()
    arrays = {name: kwargs.pop(name) for name in ("valid", "selection")}

    def loss(args: Any, arrays: Any) -> jax.Array:
        out, lse, hidden = prefill_attention(*args, **arrays, **kwargs, implementation="xla")
        return out.sum() + lse.sum() + hidden.sum()

    compiled = jax.jit(jax.grad(loss)).lower(args, arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096 * 4096 / 16


def test_a_temperature_is_a_factor_of_the_query() -> None:
    spec = PrefillSpec("factor", 2, 1, 2, 50, 16, temperature="head")
    (q, k, v), kwargs = spec.arguments()
    factor = kwargs.pop("temperature")
    heated = prefill_attention(q, k, v, **kwargs, temperature=factor)
    assert_close(heated, prefill_attention(q * factor[..., None], k, v, **kwargs))


def whole_prompt(tokens: int, noise: GumbelNoise | None = None) -> dict[str, Any]:
    at, valid = jnp.arange(tokens)[None], jnp.ones((1, tokens), bool)
    named = {"query_positions": at, "key_positions": at, "query_valid": valid, "key_valid": valid}
    return named | {"noise": noise, "scale": 0.25}


def test_keyformer_scores_are_a_softmax_of_noisy_logits() -> None:
    """softmax((x + noise) / tau) over the keys of a query, summed over queries, written from the equations in NumPy."""
    tokens, groups, tau = 30, 2, 1.5
    q, k = (
        jax.random.normal(jax.random.key(i), s) for i, s in ((0, (1, 2, groups, tokens, 8)), (1, (1, 2, tokens, 8)))
    )
    noise = GumbelNoise(jax.random.key_data(jax.random.key(7)), jnp.asarray([4, 5]))
    factor = jnp.full((1, tokens), 1 / tau)
    mass, lse = attention_mass(q, k, None, **whole_prompt(tokens, noise), temperature=factor, return_lse=True)

    zeta = np.asarray(noise.at(jnp.arange(tokens)[None], jnp.arange(tokens)[None], groups), np.float64)
    y = (np.einsum("bkgth,bksh->bkgts", *(np.asarray(x, np.float64) for x in (q, k))) * 0.25 + zeta) / tau
    y = np.where(np.tril(np.ones((tokens, tokens), bool)), y, -np.inf)
    total = np.log(np.exp(y).sum(-1))
    np.testing.assert_allclose(lse, total, atol=1e-5)
    np.testing.assert_allclose(mass, np.exp(y - total[..., None]).sum((2, 3)), rtol=2e-5)


def test_noise_does_not_depend_on_how_the_work_is_cut() -> None:
    """Heads on shards, queries in chunks, keys in any order of slots, rows of a batch: the same draws."""
    noise = GumbelNoise(jax.random.key_data(jax.random.key(3)), jnp.asarray([0, 1, 2, 3]))
    queries, keys = jnp.arange(20, 60)[None], jnp.arange(64)[None]
    whole = noise.at(queries, keys, 2)
    shard = GumbelNoise(noise.key, noise.head_index[2:])
    order = jax.random.permutation(jax.random.key(1), 64)
    np.testing.assert_array_equal(shard.at(queries, keys, 2), whole[:, 2:])
    np.testing.assert_array_equal(noise.at(queries[:, 5:9], keys[:, order], 2), whole[:, :, :, 5:9][..., order])
    np.testing.assert_array_equal(noise.at(jnp.tile(queries, (2, 1)), jnp.tile(keys, (2, 1)), 2)[1], whole[0])
    assert (noise.at(queries, jnp.tile(keys[:, None], (1, 4, 1)), 2) == whole).all()


def test_noise_is_gumbel_and_independent() -> None:
    noise = GumbelNoise(jax.random.key_data(jax.random.key(11)), jnp.arange(2))
    draws = np.asarray(noise.at(jnp.arange(256)[None], jnp.arange(512)[None], 2), np.float64).reshape(4, 256, 512)
    uniform = np.sort(np.exp(-np.exp(-draws)).ravel())
    distance = np.abs(uniform - (np.arange(uniform.size) + 0.5) / uniform.size).max()
    assert distance < 1.95 / np.sqrt(uniform.size)  # Kolmogorov and Smirnov, at 0.1 %
    z = (draws - draws.mean()) / draws.std()
    for a, b in ((z[:, :, 1:], z[:, :, :-1]), (z[:, 1:], z[:, :-1]), (z[1:], z[:-1])):  # keys, queries, heads
        assert abs((a * b).mean()) < 4 / np.sqrt(a.size)
    assert np.abs(z[0] @ z[0].T / 512 - np.eye(256)).max() < 0.3  # rows of one head: no two alike


def test_masses_of_parts_add_up_under_a_joint_softmax() -> None:
    """Keys in two sets: each gives its own lse, the merged one goes back in (streaming prefill beside a cache)."""
    tokens = 40
    q, k = (jax.random.normal(jax.random.key(i), s) for i, s in ((0, (1, 1, 2, tokens, 8)), (1, (1, 1, tokens, 8))))
    named = whole_prompt(tokens, GumbelNoise(jax.random.key_data(jax.random.key(5)), jnp.arange(1)))
    whole, expected = attention_mass(q, k, None, **named, return_lse=True)
    cut = 16

    def part(keys: slice, lse: jax.Array | None, **more: Any) -> Any:
        mine = {"key_positions": named["key_positions"][:, keys], "key_valid": named["key_valid"][:, keys]}
        return attention_mass(q, k[:, :, keys], lse, **(named | mine), **more)

    sides = (slice(0, cut), slice(cut, None))
    joint = jnp.logaddexp(*(part(side, None, return_lse=True)[1] for side in sides))
    np.testing.assert_allclose(joint, expected, atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate([part(side, joint) for side in sides], axis=-1), whole, atol=1e-5)


@pytest.mark.parametrize("by", ["query", "key"])
@pytest.mark.parametrize("window", [None, 1, 200, 5000])
@pytest.mark.parametrize("tokens", [1, 128, 1000, 5000])
def test_a_walk_visits_every_tile_that_has_something_to_see_once(tokens: int, window: int | None, by: Any) -> None:
    tiles = walk.Tiles.of(jax.ShapeDtypeStruct((1, 1, 4, tokens, 64), jnp.float32), window, 1.0, None)  # pyright: ignore
    entries = tiles.walk(by)
    assert entries[0] == entries[-1] == -1
    major, minor = entries[1:-1] >> 16, entries[1:-1] & 0xFFFF
    assert (np.diff(major) >= 0).all(), "the results of a tile are written once"
    i, j = (major, minor) if by == "query" else (minor, major)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    seen = (distance >= 0) & (distance < (window or tokens))
    rows, columns = np.nonzero(seen)
    expected = set(zip(rows // tiles.queries, columns // tiles.keys, strict=True))
    assert len(i) == len(expected) and set(zip(i.tolist(), j.tolist(), strict=True)) == expected


def test_a_kernel_says_what_it_does_not_take() -> None:
    def refused(op: Any, spec: Any) -> str:
        args, kwargs = spec.abstract()
        arrays = {name: x for name, x in kwargs.items() if jax.tree.leaves(x) and name in ("valid", *MASK_NAMES)}
        static = {name: x for name, x in kwargs.items() if name not in arrays}
        with pytest.raises(NotImplementedError) as caught:
            jax.eval_shape(lambda a, k: op(*a, **k, **static, implementation="pallas_tpu"), args, arrays)
        return str(caught.value)

    assert "float16" in refused(PREFILL, PrefillSpec("half", 1, 1, 1, 8, 64, dtype="float16"))
    assert "512" in refused(PREFILL, PrefillSpec("wide", 1, 1, 1, 8, 512))
    assert "tiles per head" in refused(PREFILL, PrefillSpec("long", 1, 1, 8, 1 << 19, 128, dtype="bfloat16"))
    assert "float16" in refused(MASS, MassSpec("half", 1, 1, 1, 8, 8, 64, dtype="float16"))
    assert "32 query heads" in refused(MASS, MassSpec("many", 1, 1, 32, 8, 8, 64))


MASK_NAMES = ("query_positions", "key_positions", "query_valid", "key_valid")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", jnp.ones((2, 5)), "temperature must be"),
        ("selection", (jnp.ones((1, 3, 6, 4)),) * 2, "selection must be"),
        ("valid", jnp.ones((1, 5), bool), "valid must be"),
    ],
)
def test_prefill_refuses_wrong_shapes(name: str, value: Any, message: str) -> None:
    (q, k, v), kwargs = PrefillSpec("small", 1, 2, 1, 6, 4).arguments()
    with pytest.raises(ValueError, match=message):
        prefill_attention(q, k, v, **(kwargs | {name: value}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", jnp.ones((2, 5)), "temperature must be"),
        ("noise", GumbelNoise(jnp.zeros(2, jnp.uint32), jnp.arange(3)), "head_index must be"),
        ("return_lse", True, "return_lse"),
    ],
)
def test_mass_refuses_wrong_requests(name: str, value: Any, message: str) -> None:
    args, kwargs = MassSpec("small", 1, 2, 1, 6, 6, 4).arguments()
    with pytest.raises(ValueError, match=message):
        attention_mass(*args, **(kwargs | {name: value}))


def test_a_race_is_found_in_whichever_kernel_has_it() -> None:
    """The harness itself: a kernel that reads before its copy has arrived, run before one that waits."""

    def copy(wait: bool) -> Any:
        def kernel(source: Any, target: Any, buffer: Any, semaphore: Any) -> None:
            transfer = pltpu.make_async_copy(source, buffer, semaphore)
            transfer.start()
            if wait:
                transfer.wait()
            target[...] = buffer[...]
            if not wait:
                transfer.wait()

        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        )

    with interpreted():
        np.testing.assert_array_equal(jax.jit(copy(True))(jnp.ones((8, 128))), 1.0)
    with pytest.raises(RaceError), interpreted():
        jax.block_until_ready(jax.jit(lambda x: copy(True)(copy(False)(x)))(jnp.ones((8, 128))))
    with interpreted():
        np.testing.assert_array_equal(jax.jit(copy(True))(jnp.ones((8, 128))), 1.0)
