"""Query heads allotted by key norms: the rule, the module, and its map in caches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import AttentionConfig, GroupedQuery, KeyDriven, KeyNorms, LayerMaps
from kvjax.attention.allocation import contiguous, head_counts, spread
from kvjax.cache import methods
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.step import Step
from kvjax.engine.prefill import cache_dims
from kvjax.errors import UsageError
from kvjax.models.huggingface.own import read_own_config, write_own_config
from kvjax.models.language_model import LanguageModel
from tests.attention.decoding import LENGTHS, PROMPT, STEPS, TOKENS, attention_of, config_of, model_of, through_cache
from tests.oracles import key_driven as oracle

SHAPES = [(6, 3), (12, 3), (16, 4), (8, 8), (12, 5), (7, 1), (32, 6)]


def step_of(heads: int, kv_heads: int, seed: int = 0, batch: int = 3) -> Step:
    """Random keys of different sizes; padding is poisoned."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((batch, 9, kv_heads, 4)) * rng.uniform(0.5, 1.5, (batch, 1, kv_heads, 1))
    valid = np.arange(9) < np.array([9, 4, 1])[:batch, None]
    keys = np.where(valid[..., None, None], keys, np.nan).astype(np.float32)
    queries = np.zeros((batch, 9, heads, 4), np.float32)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), valid.shape)
    return Step(*(jnp.asarray(x) for x in (queries, keys, keys, positions, valid)))


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
def test_the_rule_equals_the_transcription(heads: int, kv_heads: int) -> None:
    least = min(1, heads // kv_heads)
    for rule in (KeyNorms(least=least), KeyNorms("batch", 0), KeyNorms("example", 0), KeyNorms("batch", least)):
        found = jax.jit(rule.head_of_query)
        for seed in range(5):
            step = step_of(heads, kv_heads, seed)
            m = oracle.norms(np.asarray(step.keys), np.asarray(step.valid))
            m = np.broadcast_to(m.sum(0), m.shape) if rule.per == "batch" else m
            expected = [oracle.in_order(oracle.counts(oracle.spread(row), heads, rule.least)) for row in m]
            np.testing.assert_array_equal(found(step), expected, err_msg=f"{rule} seed {seed}")


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
def test_counts_add_up_and_no_head_has_fewer_than_the_least(heads: int, kv_heads: int) -> None:
    rng = np.random.default_rng(0)
    weights = rng.uniform(0, 1, (200, kv_heads)) ** rng.integers(1, 9, (200, 1))
    for least in range(heads // kv_heads + 1):
        found = np.asarray(head_counts(jnp.asarray(weights, jnp.float32), heads, least))
        assert (found.sum(1) == heads).all() and (found >= least).all()
        assert (np.asarray(contiguous(jnp.asarray(found), heads)) < kv_heads).all()


def test_the_release_leaves_the_smallest_head_without_queries_and_the_default_does_not() -> None:
    m = jnp.array([3.0, 2.0, 1.0])
    assert head_counts(spread(m), 12, 0).tolist() == [8, 4, 0]
    assert head_counts(spread(m), 12, 1).tolist() == [7, 4, 1]


def test_equal_norms_and_no_norms_are_equal_shares() -> None:
    for m in (jnp.full(4, 2.5), jnp.zeros(4)):
        assert spread(m).tolist() == [1] * 4 and head_counts(spread(m), 8, 1).tolist() == [2] * 4
    assert head_counts(jnp.zeros(4), 8, 0).tolist() == [2] * 4


SIZES = AttentionConfig(num_heads=6, num_kv_heads=3, head_dim=4, scale=0.5, qkv_bias=True)


def inputs(batch: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((batch, 7, 16)), jnp.float32)


@pytest.mark.parametrize("rule", [KeyNorms(), KeyNorms("batch", 0)])
def test_with_equal_keys_it_is_grouped_query_attention(rule: KeyNorms) -> None:
    params, apply = attention_of(KeyDriven(rule), SIZES, 16)
    _, grouped = attention_of(GroupedQuery(), SIZES, 16)
    flipped = jnp.array([1.0, -1.0, 1.0])[:, None]  # other keys, of exactly the same norm
    params["k"] = {name: x[..., :1, :] * flipped for name, x in params["k"].items()}
    np.testing.assert_allclose(apply(params, inputs()), grouped(params, inputs()), atol=1e-5)


def test_gradients_are_those_of_the_map_that_was_chosen() -> None:
    params, apply = attention_of(KeyDriven(), SIZES, 16)
    params["k"]["kernel"] = params["k"]["kernel"] * jnp.array([0.3, 2.0, 1.0])[:, None]
    x = inputs(batch=1)
    keys = jnp.einsum("btd,dkh->btkh", x, params["k"]["kernel"]) + params["k"]["bias"]
    m = oracle.norms(np.asarray(keys), np.ones((1, 7), bool))[0]
    reads = tuple(oracle.in_order(oracle.counts(oracle.spread(m), 6, 1)))
    assert reads != (0, 0, 1, 1, 2, 2)
    _, fixed = attention_of(GroupedQuery(), dataclasses.replace(SIZES, kv_head_of_query=reads), 16)

    def loss(apply: Any) -> Any:
        return jax.jit(jax.grad(lambda params, x: jnp.sum(jnp.sin(3 * apply(params, x))), argnums=(0, 1)))(params, x)

    for one, other in zip(jax.tree.leaves(loss(apply)), jax.tree.leaves(loss(fixed)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * (1 + float(jnp.abs(other).max())))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """Stands where a cache does: causal attention by a map."""

    head_map: Any

    def step(self, step: Step) -> tuple[Any, None]:
        return attend_prompt(dataclasses.replace(step, head_map=self.head_map, allocation=None))[0], None


def driven(rule: KeyNorms = KeyNorms(), **changes: Any) -> Any:
    return model_of(config_of(KeyDriven(rule), num_kv_heads=4, **changes))


def cached(model: LanguageModel, chunk: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """What layers keep as their maps, logits [B, PROMPT, V] of the prompts and [B, STEPS, V] of decoded tokens."""
    method = dataclasses.replace(methods.full(), prefill="exact" if chunk == PROMPT else "streaming")
    dims = cache_dims(model, len(LENGTHS), PROMPT, PROMPT + STEPS, "float32")
    layers, parts = ModelCache.init(method, dims, jnp.asarray(LENGTHS, jnp.int32)).layers, []
    step = jax.jit(lambda layers, x, valid: model.apply(x, cache=layers, valid=valid))
    for start in range(0, PROMPT, chunk):
        valid = start + np.arange(chunk) < np.array(LENGTHS)[:, None]
        logits, layers = step(layers, TOKENS[:, start : start + chunk], valid)
        parts.append(np.asarray(logits))
    prompt, parts, layers = np.concatenate(parts, axis=1), [], tuple(layer.end_prompt() for layer in layers)
    for i in range(STEPS):
        token = TOKENS[np.arange(len(LENGTHS)), np.array(LENGTHS) + i][:, None]
        logits, layers = step(layers, token, np.ones(token.shape, bool))
        parts.append(np.asarray(logits))
    return [np.asarray(layer.head_map) for layer in layers], prompt, np.concatenate(parts, axis=1)


@pytest.mark.parametrize("chunk", [PROMPT, 5])
def test_decoding_reads_by_the_map_of_the_prompt(chunk: int) -> None:
    model = driven(KeyNorms(least=0), num_heads=16, head_dim=4)
    maps, prompt, decoded = cached(model, chunk)
    assert any(len(np.unique(one, axis=0)) > 1 for one in maps), "rows differ"
    assert all((one != np.arange(16) // 4).any() for one in maps), "and are not equal groups"
    whole = jax.jit(model.apply)
    for row, length in enumerate(LENGTHS):
        tokens = TOKENS[row : row + 1, : length + STEPS]
        mine = [Given(jnp.asarray(one[row : row + 1])) for one in maps]
        expected = np.asarray(whole(tokens, np.arange(length + STEPS, dtype=np.int32)[None], mine)[0])[0]
        found = np.concatenate([prompt[row, :length], decoded[row]])
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("chunk", [PROMPT, 5])
def test_the_first_tokens_decide_the_map(chunk: int) -> None:
    """The first layer's keys depend on nothing before it, so the transcription can give its map."""
    model = driven(num_layers=1)
    maps, _, _ = cached(model, chunk)
    attention, embedding = model.params["layers_0"]["attention"], model.params["embed"]["embedding"]
    x = np.asarray(embedding)[TOKENS[:, :chunk]].astype(np.float64)
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + model.config.norm_eps)
    keys = np.einsum("btd,dkh->btkh", x, np.asarray(attention["k"]["kernel"]))
    m = oracle.norms(keys, np.arange(chunk) < np.array(LENGTHS)[:, None])
    expected = [oracle.in_order(oracle.counts(oracle.spread(row), 8, 1)) for row in m]
    np.testing.assert_array_equal(maps[0], expected)


@pytest.mark.parametrize("method", ["h2o:share=0.5", "snapkv:share=0.5"])
def test_methods_that_follow_attention_see_that_of_the_map(method: str) -> None:
    """A map for all rows is data here, and known beforehand there: the same tokens stay, and the same is read."""
    model = driven(KeyNorms("batch", 0), num_layers=1)
    maps, _, _ = cached(model, PROMPT)
    reads = tuple(maps[0][0].tolist())
    assert len(set(reads)) > 1 and reads != (0, 0, 1, 1, 2, 2, 3, 3)
    fixed = dataclasses.replace(model, config=config_of(LayerMaps((reads,)), num_kv_heads=4, num_layers=1))
    (_, ours, _), (_, others, _) = (through_cache(one, method) for one in (model, fixed))
    scale = np.abs(others[0]).max()
    np.testing.assert_allclose(np.stack(ours) / scale, np.stack(others) / scale, atol=1e-5)


def test_bytes_are_those_of_grouped_query_attention_and_of_the_map() -> None:
    caches = [through_cache(model_of(config_of(kind, num_kv_heads=4)))[2] for kind in (KeyDriven(), GroupedQuery())]
    assert caches[0].layer_bytes == caches[0].planned_bytes
    assert [one - other for one, other in zip(*(c.layer_bytes for c in caches), strict=True)] == [4 * 8 * 4] * 2


@pytest.mark.parametrize("per", ["example", "batch"])
def test_a_row_is_the_same_alone_only_where_it_has_an_allocation_of_its_own(per: Any) -> None:
    """Norms that are summed over a batch, as released, make a row depend on those beside it."""
    rule = KeyNorms(per, 0)
    step = step_of(12, 4, seed=2)
    together = rule.head_of_query(step)
    alone = [rule.head_of_query(jax.tree.map(lambda x, row=row: x[row : row + 1], step))[0] for row in range(3)]
    same = [bool((one == other).all()) for one, other in zip(together, alone, strict=True)]
    assert all(same) if per == "example" else not all(same)


def test_fixed_maps_are_read_layer_by_layer() -> None:
    maps = ((0, 0, 0, 0, 0, 1, 2, 3), (0, 1, 1, 1, 1, 2, 2, 3))
    model = model_of(config_of(LayerMaps(maps), num_kv_heads=4))
    tokens = jnp.asarray(TOKENS[:1, :9])
    positions = jnp.arange(9, dtype=jnp.int32)[None]
    given = [Given(jnp.asarray(one, jnp.int32)[None]) for one in maps]
    plain = dataclasses.replace(model, config=dataclasses.replace(model.config, attention=GroupedQuery()))
    np.testing.assert_allclose(model.apply(tokens)[0], plain.apply(tokens, positions, given)[0], atol=1e-4)


@pytest.mark.parametrize("kind", [KeyDriven(KeyNorms("batch", 0)), LayerMaps(((0,) * 7 + (1,),) * 2)])
def test_models_are_spelt_and_read_back(kind: Any) -> None:
    config = config_of(kind)
    assert read_own_config(write_own_config(config, "float32")) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeyNorms("row"), "unknown per 'row'"),  # pyright: ignore[reportArgumentType]
        (lambda: KeyNorms(least=-1), "must not be negative"),
        (lambda: config_of(KeyDriven(KeyNorms(least=3)), num_kv_heads=4), "not enough for 4 kv heads"),
        (lambda: config_of(KeyDriven(), kv_head_of_query=(0,) * 8), "leave kv_head_of_query out"),
        (lambda: config_of(LayerMaps(((0,) * 8,))), "1 maps for 2 layers"),
        (lambda: config_of(LayerMaps(((0,) * 7 + (2,),) * 2)), "does not give one of 2 kv heads"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
