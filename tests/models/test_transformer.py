"""The decoder itself: positions, padding, selected logits, dtypes, gradients, and the protocol with a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.rope import Linear, RopeConfig
from kvjax.cache.prompt import attend_prompt
from kvjax.cache.step import Step
from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer

B, T = 2, 12
CONFIG = TransformerConfig(
    vocab_size=30,
    embed_dim=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    max_positions=64,
    windows=(None, 5),
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, T)), jnp.int32)


def make(**fields: Any) -> LanguageModel:
    """Random parameters by shape: `init` would compile a forward pass of its own for every config."""
    config = dataclasses.replace(CONFIG, **fields)
    rng = np.random.default_rng(0)

    def draw(path: Any, struct: jax.ShapeDtypeStruct) -> jax.Array:
        x = rng.standard_normal(struct.shape, np.float32)
        x = 1 + 0.1 * x if "norm" in str(path) else x if "embedding" in str(path) else 0.2 * x
        return jnp.asarray(x, struct.dtype)

    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), TOKENS[:1, :1])["params"]
    return LanguageModel(config, jax.tree_util.tree_map_with_path(draw, shapes))


run = jax.jit(LanguageModel.apply)


def test_init_makes_the_documented_tree() -> None:
    config = dataclasses.replace(
        CONFIG, num_layers=1, windows=(), qkv_bias=True, qk_norm=True, sandwich_norm=True, norm_offset=1.0
    )
    params = jax.jit(Transformer(config, jnp.bfloat16).init)(jax.random.key(0), TOKENS[:1, :2])["params"]
    model = LanguageModel(config, params)
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves(model)}
    assert shapes["embed/embedding"] == (30, 24) and shapes["head/kernel"] == (24, 30)
    assert shapes["layers_0/attention/q/kernel"] == (24, 4, 8) and shapes["layers_0/attention/o/kernel"] == (4, 8, 24)
    assert shapes["layers_0/attention/k/bias"] == (2, 8) and shapes["layers_0/attention/q_norm/scale"] == (8,)
    assert shapes["layers_0/mlp/down/kernel"] == (32, 24) and shapes["layers_0/mlp_output_norm/scale"] == (24,)
    assert {leaf.dtype for _, leaf in leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    assert model.num_params == sum(np.prod(shape) for shape in shapes.values())
    assert (params["final_norm"]["scale"] == 0).all(), "with an offset of one, a new norm multiplies by one"
    spread = float(params["layers_0"]["mlp"]["down"]["kernel"].astype(jnp.float32).std())
    assert abs(spread * np.sqrt(32) - 1) < 0.2, "a projection keeps the variance of its input"


def leaves(model: LanguageModel) -> list[Any]:
    return jax.tree_util.tree_flatten_with_path(model.params)[0]


def test_tied_embeddings_have_no_head_and_use_the_table() -> None:
    model = make(num_layers=1, windows=(), tied_embeddings=True)
    assert "head" not in model.params
    untied = make(num_layers=1, windows=())
    head = {"head": {"kernel": model.params["embed"]["embedding"].T}}
    same = dataclasses.replace(untied, params=model.params | head)
    np.testing.assert_allclose(run(model, TOKENS)[0], run(same, TOKENS)[0], atol=1e-5)


def test_logits_at_selects_one_index_per_row() -> None:
    model = make()
    at = jnp.int32([3, 11])
    selected, _ = run(model, TOKENS, logits_at=at)
    everything, _ = run(model, TOKENS)
    assert selected.shape == (B, 1, 30)
    np.testing.assert_allclose(selected[:, 0], everything[jnp.arange(B), at], atol=1e-5)


def test_the_future_and_padding_change_nothing() -> None:
    model = make()
    logits, _ = run(model, TOKENS)
    changed, _ = run(model, TOKENS.at[:, 8:].set(1))
    np.testing.assert_array_equal(logits[:, :8], changed[:, :8])
    valid = jnp.arange(T) < jnp.int32([[T], [5]])
    padded, _ = run(model, jnp.where(valid, TOKENS, 29), valid=valid)
    np.testing.assert_array_equal(padded[0], logits[0])
    np.testing.assert_array_equal(padded[1, :5], logits[1, :5])


def test_only_relative_positions_matter() -> None:
    model = make()
    positions = jnp.broadcast_to(jnp.arange(T) + 37, (B, T))
    np.testing.assert_allclose(run(model, TOKENS, positions)[0], run(model, TOKENS)[0], atol=1e-5)


def test_without_rope_and_window_the_order_of_earlier_tokens_is_lost() -> None:
    model = make(rope=None, windows=(), num_layers=1)
    swapped = TOKENS.at[:, jnp.array([0, 1])].set(TOKENS[:, jnp.array([1, 0])])
    assert (swapped != TOKENS).any()
    np.testing.assert_allclose(run(model, TOKENS)[0][:, -1], run(model, swapped)[0][:, -1], atol=1e-5)
    turned = make(windows=(), num_layers=1)
    assert abs(run(turned, TOKENS)[0][:, -1] - run(turned, swapped)[0][:, -1]).max() > 1e-3


def test_a_window_limits_what_a_layer_sees() -> None:
    model = make(num_layers=1, windows=(5,))
    logits, _ = run(model, TOKENS)
    far, _ = run(model, TOKENS.at[:, :7].set(0))
    near, _ = run(model, TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % 30))
    np.testing.assert_array_equal(logits[:, 11], far[:, 11])
    assert abs(logits[:, 11] - near[:, 11]).max() > 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RecordingCache:
    """Attends to the new tokens only, and keeps the step that it was given."""

    length: jax.Array
    seen: Step | None = None

    def step(self, step: Step) -> tuple[jax.Array, RecordingCache]:
        return attend_prompt(step)[0], RecordingCache(self.length + step.valid.sum(axis=1), step)


def run_recorded(model: LanguageModel, length: list[int], valid: jax.Array | None = None) -> Any:
    """Logits, the lengths after, and one step per layer."""
    cache = tuple(RecordingCache(jnp.int32(length)) for _ in range(model.config.num_layers))
    logits, after = run(model, TOKENS, cache=cache, valid=valid)
    assert after is not None
    return logits, [layer.length.tolist() for layer in after], [layer.seen for layer in after]


def test_bfloat16_parameters_give_bfloat16_activations_and_float32_logits() -> None:
    exact = make()
    rounded = dataclasses.replace(exact, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact.params))
    logits, _, steps = run_recorded(rounded, [0, 0])
    assert logits.dtype == jnp.float32 and rounded.dtype == jnp.bfloat16
    found = {x.dtype for step in steps for x in (step.queries, step.keys, step.values, step.hidden)}
    assert found == {jnp.dtype(jnp.bfloat16)}
    error = logits - run(exact, TOKENS)[0]
    assert jnp.abs(error).max() < 0.05 * logits.std(), "eight bits of mantissa, a dozen roundings deep"


def test_a_cache_gets_one_complete_step_per_layer() -> None:
    local = RopeConfig(100.0, Linear(2.0))
    model = make(attention_scale=0.7, attention_softcap=3.0, local_rope=local, kv_head_of_query=(1, 0, 0, 1))
    valid = jnp.ones((B, T), bool).at[1, 10:].set(False)
    logits, lengths, steps = run_recorded(model, [4, 9], valid)
    assert lengths == [[16, 19]] * 2 and logits.shape == (B, T, 30)
    np.testing.assert_array_equal(steps[0].positions, jnp.arange(T) + jnp.int32([[4], [9]]))
    assert [step.window for step in steps] == [None, 5]
    assert {(step.scale, step.softcap, step.kv_head_of_query) for step in steps} == {(0.7, 3.0, (1, 0, 0, 1))}
    np.testing.assert_allclose(steps[1].rope.inv_freq, 100.0 ** (-np.arange(4) / 4) / 2, rtol=1e-6)
    np.testing.assert_allclose(steps[0].rope.inv_freq, 1e4 ** (-np.arange(4) / 4), rtol=1e-6)
    kernel = model.params["layers_0"]["attention"]["k"]["kernel"]
    np.testing.assert_allclose(steps[0].keys, np.einsum("btd,dkh->btkh", steps[0].hidden, kernel), atol=1e-5)
    np.testing.assert_array_equal(steps[0].output_projection, model.params["layers_0"]["attention"]["o"]["kernel"])
    np.testing.assert_array_equal(steps[0].valid, valid)


def test_gradients_reach_every_parameter() -> None:
    biases = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
    norms = {"qk_norm": True, "sandwich_norm": True, "logit_softcap": 5.0}
    model = make(num_layers=1, windows=(5,), **biases, **norms)

    @jax.jit
    @jax.grad
    def gradient(model: LanguageModel) -> jax.Array:
        logits, _ = model.apply(TOKENS[:, :-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], axis=-1).mean()

    for path, leaf in leaves(gradient(model)):
        assert jnp.isfinite(leaf).all() and (leaf != 0).any(), path


def test_one_compile_serves_models_of_one_config() -> None:
    traces = 0

    @jax.jit
    def forward(model: LanguageModel, tokens: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return model.apply(tokens)[0]

    model = make()
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: x * 2, model.params))
    assert abs(forward(model, TOKENS) - forward(other, TOKENS)).max() > 1e-3
    assert traces == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"windows": (5,)}, "1 entries for 2 layers"),
        ({"windows": (0, None)}, "at least 1 token"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"kv_head_of_query": (0, 1)}, "2 entries for 4 query heads"),
        ({"kv_head_of_query": (0, 1, 2, 0)}, "outside 0..1"),
        ({"activation": "tanh"}, "unknown activation 'tanh'"),
        ({"attention_softcap": 0.0}, "attention_softcap must be positive"),
    ],
)
def test_impossible_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(CONFIG, **fields)
    assert hash(CONFIG) == hash(dataclasses.replace(CONFIG))


def test_unequal_groups_run() -> None:
    """A map with unequal groups equals the same heads copied into equal groups."""
    one_layer = {"num_layers": 1, "windows": ()}
    uneven = make(**one_layer, kv_head_of_query=(0, 0, 0, 1))
    layer = uneven.params["layers_0"]
    copies = {name: {"kernel": layer["attention"][name]["kernel"][:, np.array([0, 0, 0, 1])]} for name in "kv"}
    params = uneven.params | {"layers_0": layer | {"attention": layer["attention"] | copies}}
    spread = LanguageModel(dataclasses.replace(CONFIG, **one_layer, num_kv_heads=4), params)
    np.testing.assert_allclose(run(uneven, TOKENS)[0], run(spread, TOKENS)[0], atol=1e-5)
