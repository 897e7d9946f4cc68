"""Fewer kv heads from trained weights: as specified, exact at full rank, and on the reference model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.attention import GroupedQuery, ProjectedKeys
from kvjax.attention.rope import RopeConfig
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.convert.mha_to_gqa import By, mha_to_gqa
from kvjax.convert.moments import activation_moments
from kvjax.engine.prefill import cache_dims
from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from tests.oracles import svd_heads as oracle
from tests.thin import thinned

THETA = 30.0
CONFIG = TransformerConfig(
    vocab_size=50,
    embed_dim=32,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=24,
    max_positions=32,
    rope=RopeConfig(THETA),
    tied_embeddings=True,
)
GROUPED = CONFIG
MULTI = dataclasses.replace(CONFIG, num_heads=4)
LENGTHS = np.array([14, 9, 11], np.int32)
TOKENS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (3, 14)).astype(np.int32)
TEXT = [(TOKENS[:2], LENGTHS[:2]), (TOKENS[2:], LENGTHS[2:])]
WAYS: tuple[By, ...] = ("mean", "svd-weights", "svd-activations")


def make(config: TransformerConfig, dtype: Any = jnp.float32) -> LanguageModel:
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    def draw(path: Any, struct: Any) -> jax.Array:
        x = rng.standard_normal(struct.shape)
        return jnp.asarray(1 + 0.1 * x if "scale" in str(path) else x if "embed" in str(path) else 0.3 * x, dtype)

    return LanguageModel(config, jax.tree_util.tree_map_with_path(draw, shapes))


apply = jax.jit(LanguageModel.apply)


def logits(model: LanguageModel) -> np.ndarray[Any, Any]:
    return np.asarray(apply(model, jnp.asarray(TOKENS[:1]))[0][0])


def decoder(model: LanguageModel) -> oracle.Decoder:
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    return oracle.Decoder(params, None if model.config.rope is None else THETA, model.config.norm_eps)


def reads(config: TransformerConfig) -> list[int]:
    group = config.num_heads // config.num_kv_heads
    return list(config.kv_head_of_query or [n // group for n in range(config.num_heads)])


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    return bool(abs(np.asarray(found) - expected).max() <= tolerance * abs(np.asarray(expected)).max())


def directions(rows: list[Any], rank: int, heads: slice) -> Any:
    return oracle.top(np.concatenate([x[:, heads].reshape(len(x), -1) for x in rows]), rank)


def by_the_paper(model: LanguageModel, heads: int, by: str) -> np.ndarray[Any, Any]:
    """The logits of the first row, from the specification alone."""
    reference, config = decoder(model), model.config
    h, t = config.head_dim, config.num_kv_heads // heads
    if by == "svd-activations":
        sampled = [reference.qkv(row[:n]) for row, n in zip(TOKENS, LENGTHS, strict=True)]
        keys, values = [k for _, k, _ in sampled], [v for _, _, v in sampled]
    else:
        kernels = [reference.layer["attention"][name]["kernel"] for name in "kv"]
        keys, values = ([kernel] for kernel in kernels)
        if config.rope is not None:
            turns = range(config.max_positions)
            keys = [np.stack([[oracle.rotated(head, p, THETA) for head in row] for row in kernels[0]]) for p in turns]
    omegas = np.stack([directions(values, h, slice(i * t, (i + 1) * t)) for i in range(heads)])
    joint = config.rope is not None
    psi = (
        directions(keys, heads * h, slice(None))
        if joint
        else np.stack([directions(keys, h, slice(i * t, (i + 1) * t)) for i in range(heads)])
    )
    q, k, v = reference.qkv(TOKENS[0])
    read = oracle.converted(q, k, v, reads(config), config.scale, omegas, psi, joint=joint)
    return reference.logits(TOKENS[0], read)


def test_the_slow_decoder_is_the_model() -> None:
    for config in (GROUPED, dataclasses.replace(MULTI, rope=None, qkv_bias=True, output_bias=True)):
        model = make(config)
        q, k, v = decoder(model).qkv(TOKENS[0])
        expected = decoder(model).logits(TOKENS[0], oracle.plain(q, k, v, reads(config), config.scale))
        assert close(logits(model), expected)


@pytest.mark.parametrize("by", ["svd-weights", "svd-activations"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    "config",
    thinned(
        [
            pytest.param(GROUPED, id="grouped, rotary"),
            pytest.param(MULTI, id="multi-head, rotary"),
            pytest.param(dataclasses.replace(MULTI, rope=None), id="multi-head, absolute"),
            pytest.param(dataclasses.replace(GROUPED, rope=None), id="grouped, absolute"),
        ]
    ),
)
def test_principal_directions_as_specified(config: TransformerConfig, heads: int, by: By) -> None:
    model = make(config)
    made = mha_to_gqa(model, heads, by, text=TEXT)
    expected = by_the_paper(model, heads, by)
    assert close(logits(made), expected, 1e-4)
    assert not close(logits(made), logits(model), 1e-2), "the conversion loses something here"
    assert (made.config.attention == ProjectedKeys(heads)) == (config.rope is not None)


@pytest.mark.parametrize("reading", [None, (0, 0, 0, 1, 2, 2, 3, 3)], ids=["in a row", "uneven"])
def test_means_of_neighbours(reading: tuple[int, ...] | None) -> None:
    """Rotary embedding turns all heads alike, so the mean of rotated keys is what the mean weights give."""
    config = dataclasses.replace(GROUPED, kv_head_of_query=reading, qkv_bias=True)
    model = make(config)
    made = mha_to_gqa(model, 2, "mean")
    reference = decoder(model)
    q, k, v = reference.qkv(TOKENS[0])
    k, v = (np.repeat(x.reshape(14, 2, 2, 8).mean(2), 2, axis=1) for x in (k, v))
    expected = reference.logits(TOKENS[0], oracle.plain(q, k, v, reads(config), config.scale))
    assert close(logits(made), expected, 1e-4)
    assert made.config.attention == GroupedQuery() and made.config.num_kv_heads == 2


EXACT = {
    "grouped": GROUPED,
    "multi-head, two layers": dataclasses.replace(MULTI, num_layers=2, windows=(None, 6)),
    "biases, norms, soft cap": dataclasses.replace(
        GROUPED, qkv_bias=True, output_bias=True, qk_norm=True, attention_softcap=9.0, attention_scale=0.7
    ),
    "no rotary embedding": dataclasses.replace(GROUPED, rope=None, qkv_bias=True),
    "norms without rotary embedding": dataclasses.replace(GROUPED, rope=None, qk_norm=True),
    "unequal groups": dataclasses.replace(GROUPED, kv_head_of_query=(0, 1, 1, 1, 2, 3, 3, 3)),
    "a rotary embedding of windows alone": dataclasses.replace(
        GROUPED, num_layers=2, windows=(None, 6), rope=None, local_rope=RopeConfig(9.0)
    ),
}


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("config", thinned([pytest.param(config, id=name) for name, config in EXACT.items()]))
def test_as_many_heads_as_before_is_the_model(config: TransformerConfig, by: By) -> None:
    model = make(config)
    made = mha_to_gqa(model, 4, by, text=TEXT)
    assert close(logits(made), logits(model))


@pytest.mark.parametrize("by", WAYS)
def test_alike_heads_in_another_order(by: By) -> None:
    """Heads 0 and 2 are copies of each other, and 1 and 3: only neighbours that are no copies lose anything."""
    model = make(GROUPED)
    attention = model.params["layers_0"]["attention"]
    kernels = {name: {"kernel": attention[name]["kernel"][:, jnp.array([0, 1, 0, 1])]} for name in "kv"}
    layer = model.params["layers_0"] | {"attention": attention | kernels}
    model = dataclasses.replace(model, params=model.params | {"layers_0": layer})
    assert close(logits(mha_to_gqa(model, 2, by, groups="alike", text=TEXT)), logits(model))
    if by == "mean":
        assert not close(logits(mha_to_gqa(model, 2, by, text=TEXT)), logits(model), 1e-2)


def test_moments_are_summed_over_what_exists() -> None:
    """Batches, padding and rows: the same sums as of every token by itself."""
    model = make(GROUPED)
    (found,) = activation_moments(model, TEXT)
    sampled = [decoder(model).qkv(row[:n]) for row, n in zip(TOKENS, LENGTHS, strict=True)]
    for ours, theirs in ((found.keys, 1), (found.values, 2)):
        rows = np.concatenate([parts[theirs] for parts in sampled])
        assert close(ours, np.einsum("tkh,tjc->khjc", rows, rows)) and ours.dtype == np.float64


@pytest.mark.parametrize("by", WAYS)
def test_the_cache_holds_half(by: By) -> None:
    from experiments.convert import bytes_per_token

    model = make(MULTI, jnp.bfloat16)
    made = mha_to_gqa(model, 2, by, text=TEXT)
    assert bytes_per_token(model) == 2 * bytes_per_token(made) == 2 * 2 * 4 * 8
    assert {leaf.dtype for leaf in jax.tree.leaves(made.params)} == {jnp.dtype(jnp.bfloat16)}
    caches = [ModelCache.init(parse("full"), cache_dims(one, 1, 16, 32)) for one in (model, made)]
    positions = 4 * 32 + 4 * 4
    assert all(cache.layer_bytes == cache.planned_bytes for cache in caches)
    assert 0 <= 2 * caches[1].nbytes - caches[0].nbytes <= positions


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (GROUPED, {"heads": 3}, "4 kv heads cannot become 3: give one of 1, 2, 4"),
        (GROUPED, {"heads": 8}, "cannot become 8"),
        (GROUPED, {"heads": 0}, "cannot become 0"),
        (GROUPED, {"heads": 2, "by": "svd"}, "unknown way to fewer heads 'svd'"),
        (GROUPED, {"heads": 2, "groups": "near"}, "unknown grouping of heads 'near'"),
        (GROUPED, {"heads": 2, "by": "svd-activations"}, "give some text"),
        (dataclasses.replace(GROUPED, attention=ProjectedKeys(2)), {"heads": 2}, r"this model has ProjectedKeys"),
        (dataclasses.replace(GROUPED, num_layers=2, kv_layers=(0, 0)), {"heads": 2}, "and shares them"),
        (
            dataclasses.replace(GROUPED, kv_head_of_query=(0, 1, 2, 3) * 2),
            {"heads": 2, "by": "mean", "groups": "alike"},
            "use groups='adjacent'",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(config: TransformerConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mha_to_gqa(make(config), **options)


@pytest.mark.slow
def test_on_the_reference_model_activations_beat_weights_beat_means() -> None:
    """Half of its two kv heads; other text than what is measured on. The orders of magnitude are the paper's too."""
    from kvjax.assets import heldout_text
    from kvjax.calibration.samples import Samples
    from kvjax.evaluation.text import ratio, read_windows

    model, text = kvjax.load("reference"), heldout_text()
    held = Samples.of(model, text[:150_000], 12, 256)
    looked = Samples.of(model, text[300_000:500_000], 24, 256)
    base = read_windows(model, held.batches(12))
    found = {}
    for by in WAYS:
        read = read_windows(mha_to_gqa(model, 1, by, text=looked.batches(8)), held.batches(12))
        found[by] = ratio(read, base)
    assert found["svd-activations"].low > 1.0 and found["svd-activations"].high < 1.3
    assert found["svd-activations"].high < found["svd-weights"].low
    assert found["svd-weights"].high < found["mean"].low
