"""FFNified attention: its convolutions against a slow transcription, its state, padding, gradients and sizes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.attention import AttentionConfig, AttentionKind, FFNified, FFNifiedGrid, GroupedQuery
from kvjax.cache.layout import CacheDims
from kvjax.cache.plan import layer_bytes
from kvjax.cache.recorder import PromptRecorder
from kvjax.engine.prefill import Context
from kvjax.errors import UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.language_model import LanguageModel
from kvjax.models.transformer import Transformer
from kvjax.models.vit import VisionConfig, VisionTransformer
from kvjax.sharding import describe, make_mesh, unshard_cache
from tests.oracles import ffnified as oracle

B, T, D, K = 3, 14, 16, 4
SIZES = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, scale=1.0)
CONFIG = TransformerConfig(
    vocab_size=23,
    embed_dim=D,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    max_positions=64,
    attention=FFNified(kernel=K),
)
LENGTHS = np.array([T, 5, 9])
VALID = np.arange(T) < LENGTHS[:, None]


def parameters(shapes: Any, seed: int = 0) -> Any:
    """Large enough that each part matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype), shapes)


@functools.cache
def model() -> LanguageModel:
    shapes = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return LanguageModel(CONFIG, parameters(shapes))


def mixer(kind: AttentionKind, x: Any, valid: Any, cache: Any = None) -> tuple[Any, Any, Any]:
    """The weights of one mixer, what it gives, and the next state."""
    module = kind.module(SIZES, jnp.float32, "attention")
    valid = jnp.asarray(valid)
    given = {"positions": jnp.zeros(valid.shape, jnp.int32), "valid": valid, "rope": None}
    shapes = jax.eval_shape(functools.partial(module.init, **given), jax.random.key(0), jnp.asarray(x))["params"]
    weights = parameters(shapes)
    return weights, *module.apply({"params": weights}, jnp.asarray(x), **given, cache=cache)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape, np.float32)


@pytest.mark.parametrize("kernel", [1, 2, 7])
def test_a_row_equals_the_transcription(kernel: int) -> None:
    x = draw(B, T, D)
    weights, out, _ = mixer(FFNified(kernel), x, VALID)
    for row, length in enumerate(LENGTHS):
        expected = oracle.causal(x[row, :length], weights)
        np.testing.assert_allclose(out[row, :length], expected, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize(("kernel", "class_tokens"), [(3, 0), (5, 1), (7, 2)])
def test_a_grid_equals_the_transcription(kernel: int, class_tokens: int) -> None:
    x = draw(2, 16 + class_tokens, D)
    valid = np.ones(x.shape[:2], bool)
    valid[1, -5:] = False
    weights, out, state = mixer(FFNifiedGrid(kernel, class_tokens), x, valid)
    assert state is None
    for row in range(2):
        expected = oracle.grid(x[row], weights, valid[row, class_tokens:], class_tokens)
        np.testing.assert_allclose(out[row], expected, atol=1e-5 * abs(expected).max())


def test_padding_does_not_leak_from_a_grid() -> None:
    x = draw(2, 17, D)
    valid = np.ones(x.shape[:2], bool)
    valid[1, -5:] = False
    kind = FFNifiedGrid(3, 1)
    _, out, _ = mixer(kind, x, valid)
    _, poisoned, _ = mixer(kind, np.where(valid[..., None], x, np.nan), valid)
    np.testing.assert_array_equal(out, poisoned)


@pytest.mark.parametrize("chunks", [(T,), (1,) * T, (3, 8, 1, 2)], ids=["prefill", "decode", "chunks"])
def test_steps_through_states_equal_the_full_forward(chunks: tuple[int, ...]) -> None:
    language_model = model()
    run = jax.jit(LanguageModel.apply)
    tokens = np.random.default_rng(1).integers(0, 23, (B, T)).astype(np.int32)
    full = np.asarray(run(language_model, jnp.asarray(tokens))[0])
    cache, start = states(), 0
    for size in chunks:
        stop = start + size
        part, valid = tokens[:, start:stop], VALID[:, start:stop]
        logits, cache = run(language_model, jnp.where(valid, part, 22), cache=cache, valid=jnp.asarray(valid))
        assert cache is not None
        np.testing.assert_allclose(logits[valid], full[:, start:stop][valid], atol=1e-5 * abs(full).max())
        start = stop
    for state in cache:
        np.testing.assert_array_equal(state.length, LENGTHS)


def states(kernel: int = K) -> tuple[Any, ...]:
    kind = FFNified(kernel)
    return tuple(kind.state(B, D) for _ in range(CONFIG.num_layers))


def test_a_row_goes_on_behind_its_own_padding() -> None:
    """Prompts of different lengths first, then tokens for all: each row as if it were alone."""
    language_model = model()
    run = jax.jit(LanguageModel.apply)
    rng = np.random.default_rng(2)
    prompt, later = (rng.integers(0, 23, (B, n)).astype(np.int32) for n in (T, 3))
    _, cache = run(language_model, jnp.asarray(prompt), cache=states(), valid=jnp.asarray(VALID))
    logits, _ = run(language_model, jnp.asarray(later), cache=cache)
    for row, length in enumerate(LENGTHS):
        alone = np.concatenate([prompt[row, :length], later[row]])[None]
        expected = np.asarray(run(language_model, jnp.asarray(alone))[0])[0, -3:]
        np.testing.assert_allclose(logits[row], expected, atol=1e-5 * abs(expected).max())


def test_poisoned_padding_changes_neither_outputs_nor_state_nor_gradients() -> None:
    x = draw(B, T, D)
    poisoned = np.where(VALID[..., None], x, np.nan)
    state = FFNified(K).state(B, D)
    _, out, after = mixer(FFNified(K), x, VALID, state)
    _, same, after_poison = mixer(FFNified(K), poisoned, VALID, state)
    np.testing.assert_array_equal(out[VALID], same[VALID])
    jax.tree.map(np.testing.assert_array_equal, after, after_poison)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients(poisoned)))
    jax.tree.map(np.testing.assert_array_equal, gradients(x), gradients(poisoned))


def gradients(x: np.ndarray) -> Any:
    """Of a loss over what is valid."""
    kind = FFNified(K)
    module = kind.module(SIZES, jnp.float32, "attention")
    weights, _, _ = mixer(kind, draw(B, T, D), VALID)
    target = draw(B, T, D)

    def loss(weights: Any) -> Any:
        given = {"positions": jnp.zeros((B, T), jnp.int32), "valid": jnp.asarray(VALID), "rope": None}
        out, _ = module.apply({"params": weights}, jnp.asarray(x), **given)
        return jnp.sum(jnp.where(VALID[..., None], jnp.tanh(out) * target, 0))

    return jax.grad(loss)(weights)


def test_gradients_equal_differences_of_the_transcription() -> None:
    """The transcription is in float64, so that differences of it are exact to many digits."""
    x, target = draw(B, T, D).astype(np.float64), draw(B, T, D).astype(np.float64)
    weights, _, _ = mixer(FFNified(K), x.astype(np.float32), VALID)
    exact = jax.tree.map(lambda w: np.asarray(w, np.float64), weights)

    def loss(weights: Any) -> float:
        outs = [oracle.causal(x[row, :n], weights) for row, n in enumerate(LENGTHS)]
        return sum(float((np.tanh(out) * target[row, : len(out)]).sum()) for row, out in enumerate(outs))

    rng = np.random.default_rng(5)
    found = gradients(x.astype(np.float32))
    for name in ("query", "key", "value"):
        for leaf in ("kernel", "bias"):
            direction = rng.standard_normal(exact[name][leaf].shape)
            moved = [
                loss({**exact, name: {**exact[name], leaf: exact[name][leaf] + step * direction}})
                for step in (1e-5, -1e-5)
            ]
            expected = (moved[0] - moved[1]) / 2e-5
            assert float((found[name][leaf] * direction).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_only_the_last_tokens_reach_a_token() -> None:
    """Two convolutions of k tokens in one layer: 2 k - 1 of them."""
    x = draw(1, T, D)
    seen = np.ones((1, T), bool)
    far, near = x.copy(), x.copy()
    far[0, T - 2 * K] += 1
    near[0, T - 2 * K + 1] += 1
    out, beyond, within = (mixer(FFNified(K), one, seen)[1] for one in (x, far, near))
    np.testing.assert_array_equal(out[0, -1], beyond[0, -1])
    assert abs(out[0, -1] - within[0, -1]).max() > 1e-4
    np.testing.assert_array_equal(out[0, : T - 2 * K], beyond[0, : T - 2 * K])  # nor the other way


def test_sizes_are_those_of_the_maps_and_the_state_does_not_grow() -> None:
    weights = model().params["layers_0"]["attention"]
    assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == D * D + D + 2 * (K * D + D)
    plain = dataclasses.replace(CONFIG, attention=FFNified(K, use_bias=False))
    shapes = jax.eval_shape(Transformer(plain).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes["layers_0"]["attention"])) == D * D + 2 * K * D
    state = states()[0]
    assert state.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == B * (2 * (K - 1) * D * 4 + 4)
    _, after = jax.jit(LanguageModel.apply)(model(), jnp.zeros((B, 40), jnp.int32), cache=states())
    assert after is not None and after[0].nbytes == state.nbytes


def test_beside_grouped_query_attention_it_has_fewer_parameters_and_less_to_keep() -> None:
    """At the sizes of the reference model and 1,024 tokens in bfloat16."""
    sizes = AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=32, scale=1.0)
    x = jnp.zeros((1, 1, 160))
    given = {"positions": jnp.zeros((1, 1), jnp.int32), "valid": jnp.ones((1, 1), bool), "rope": None}

    def count(kind: AttentionKind) -> int:
        module = kind.module(sizes, jnp.float32, "attention")
        shapes = jax.eval_shape(functools.partial(module.init, **given), jax.random.key(0), x)["params"]
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert count(FFNified()) == 28_320 and count(GroupedQuery()) == 102_400
    dims = CacheDims(1, 2, 8, 32, 1024, 1024)
    assert FFNified().state(1, 160, jnp.bfloat16).nbytes == 3_844
    assert layer_bytes(kvjax.methods.full(), dims) > 68 * 3_844


def test_bfloat16_activations_stay_so_and_are_summed_in_float32() -> None:
    x = jnp.asarray(draw(B, T, D)).astype(jnp.bfloat16)
    weights, out, state = mixer(FFNified(K), x, VALID, FFNified(K).state(B, D, jnp.bfloat16))
    assert out.dtype == state.queries.dtype == state.coefficients.dtype == jnp.bfloat16
    expected = oracle.causal(np.asarray(x[0], np.float64), weights)
    assert abs(np.asarray(out[0], np.float64) - expected).max() < 0.02 * abs(expected).max()


def test_an_image_encoder_takes_the_grid_and_refuses_what_looks_back_only() -> None:
    def config(kind: AttentionKind, pool: str = "mean") -> VisionConfig:
        return VisionConfig(8, 2, 3, D, 1, 2, 1, 8, 24, mixer=kind, pool=pool)  # pyright: ignore[reportArgumentType]

    images = jnp.asarray(draw(2, 8, 8, 3))
    for kind, pool in ((FFNifiedGrid(3), "mean"), (FFNifiedGrid(3, class_tokens=1), "class token")):
        model = VisionTransformer(config(kind, pool))
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        params = parameters(shapes)
        logits = model.apply({"params": params}, images)[0]
        corner = model.apply({"params": params}, images.at[:, -1, -1].add(1.0))[0]
        assert logits.shape == (2, 3) and np.isfinite(logits).all() and abs(logits - corner).max() > 1e-4
    with pytest.raises(UsageError, match="got a Bidirectional"):
        jax.eval_shape(VisionTransformer(config(FFNified())).init, jax.random.key(0), images)


def test_a_donated_state_is_updated_in_place() -> None:
    apply = jax.jit(lambda cache, tokens: model().apply(tokens, cache=cache)[1], donate_argnums=0)
    compiled = apply.lower(states(), jnp.zeros((B, 1), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes == sum(state.nbytes for state in states())


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (FFNified(0), {}, "kernel must be at least 1"),
        (FFNifiedGrid(4), {}, "must be odd"),
        (FFNifiedGrid(3, -1), {}, "class_tokens"),
        (FFNified(), {"windows": (None, 5)}, "no window"),
        (FFNified(), {"qk_norm": True}, "no qk_norm"),
        (FFNified(), {"output_bias": True}, "use_bias"),
        (FFNified(), {"kv_layers": (0, 0)}, "grouped-query"),
    ],
)
def test_what_does_not_go_together_is_refused(kind: AttentionKind, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        dataclasses.replace(CONFIG, attention=kind, **fields)


def test_the_engine_decodes_with_states_and_saves_them(tmp_path) -> None:
    """Greedy decoding behind prompts of two lengths is that of the uncached pass, also from a saved context."""
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8]]
    context = kvjax.prefill(model(), prompts, reserve=8, dtype="float32")
    assert context.cache.layer_bytes == context.cache.planned_bytes == [2 * (2 * (K - 1) * D * 4 + 4)] * 2
    assert context.cache.effective_bytes == context.cache.nbytes and context.cache.full_bytes == 0
    kvjax.save_cache(context, tmp_path / "cache")
    questions = [[9, 4], [3]]
    found = kvjax.generate(model(), questions, cache=context, max_new_tokens=5, stop=())
    loaded = kvjax.load_cache(tmp_path / "cache")
    assert isinstance(loaded, Context)
    assert kvjax.generate(model(), questions, cache=loaded, max_new_tokens=5, stop=()).tokens == found.tokens
    for text, question, said in zip(prompts, questions, found.tokens, strict=True):
        prompt = [*text, *question]
        logits = jax.jit(LanguageModel.apply)(model(), jnp.asarray([[*prompt, *said]]))[0][0]
        assert np.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist() == said


def test_states_are_spread_over_a_mesh_by_rows() -> None:
    prompts = [[1, 2, 3, 4], [5, 6], [7, 8, 9], [1]]
    spread = model().on_mesh(make_mesh(2, 4))
    said = [kvjax.generate(one, prompts, max_new_tokens=4, stop=(), dtype="float32") for one in (model(), spread)]
    assert said[0].tokens == said[1].tokens
    cache = said[1].context.cache
    assert cache[0].queries.sharding.spec[0] == "data"
    assert "replicated: batch" not in describe(spread.params, cache, make_mesh(2, 4))
    assert unshard_cache(cache).layers == cache.layers


@pytest.mark.parametrize("method", ["h2o", "int8", "quest", "streaming_llm", "pyramidkv", "adakv"])
def test_methods_have_nothing_to_keep(method: str) -> None:
    with pytest.raises(UsageError, match="keeps no keys and values"):
        kvjax.prefill(model(), [[1, 2, 3]], method, reserve=4)


def test_foreign_caches_are_refused_with_what_to_do() -> None:
    tokens = jnp.zeros((B, 2), jnp.int32)
    for cache in ((PromptRecorder(jnp.zeros((B,), jnp.int32)),) * 2, states(K + 1)):
        with pytest.raises(UsageError, match=r"ConvolutionState of \(3, 16\).*got"):
            model().apply(tokens, cache=cache)


def test_a_grid_must_be_one_and_has_no_cache() -> None:
    with pytest.raises(UsageError, match="16 tokens are not a square grid behind 1 class"):
        mixer(FFNifiedGrid(3, 1), draw(1, 16, D), np.ones((1, 16), bool))
    with pytest.raises(UsageError, match="both directions"):
        mixer(FFNifiedGrid(3), draw(1, 16, D), np.ones((1, 16), bool), FFNified(3).state(1, D))
