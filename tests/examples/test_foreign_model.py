"""The cache under a model that is not ours: plain functions, a Flax Linen module, an nnx module.

Each of the three models below has attention of its own, written without kvjax. To decode with a cache, that one
function is replaced: project as before, hand queries, keys and values *before* rotary embedding to `cache.step`, and go
on with what comes back. The rest of the model passes one `LayerCache` per layer along. Which tokens are kept, in which
precision, is chosen where the cache is made, and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.layout import CacheDims
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.step import Step
from kvjax.typing import Array
from pallas_kernels.rope import Rope

LAYERS, V, D, N, K, H = 2, 50, 48, 4, 2, 32
INV_FREQ = 10_000.0 ** -(np.arange(H // 2, dtype=np.float32) / (H // 2))


# ---- 1. plain functions: grouped-query attention with rotary embedding ----------------------------------------------


def init_plain(key: Array) -> dict[str, Any]:
    def weight(i: int, *shape: int) -> Array:
        return jax.random.normal(jax.random.fold_in(key, i), shape) * shape[0] ** -0.5

    layer = lambda i: {  # noqa: E731
        "q": weight(i, D, N, H),
        "k": weight(i + 1, D, K, H),
        "v": weight(i + 2, D, K, H),
        "o": weight(i + 3, N * H, D).reshape(N, H, D),
        "mlp": weight(i + 4, D, D),
    }
    return {"embed": weight(1, V, D) * V**0.5, "layers": [layer(10 * i) for i in range(1, LAYERS + 1)]}


def rotate(x: Array, positions: Array) -> Array:
    """Rotary embedding as this model has it: x [B, T, heads, H], positions [B, T]."""
    angle = positions[:, :, None, None] * INV_FREQ
    a, b = x[..., : H // 2], x[..., H // 2 :]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


def plain_attention(p: dict[str, Array], x: Array) -> Array:
    """The model's own attention, [B, T, D] to [B, T, D]."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    q = rotate(jnp.einsum("btd,dnh->btnh", x, p["q"]), positions)
    k = rotate(jnp.einsum("btd,dkh->btkh", x, p["k"]), positions)
    v = jnp.einsum("btd,dkh->btkh", x, p["v"])
    k, v = (jnp.repeat(y, N // K, axis=2) for y in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(x.shape[1], dtype=bool), logits, -jnp.inf))
    return jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", weights, v), p["o"])


def plain_attention_cached(p: dict[str, Array], x: Array, cache: Any, valid: Array) -> tuple[Array, Any]:
    """What replaces it."""
    step = Step(
        queries=jnp.einsum("btd,dnh->btnh", x, p["q"]),
        keys=jnp.einsum("btd,dkh->btkh", x, p["k"]),
        values=jnp.einsum("btd,dkh->btkh", x, p["v"]),
        positions=cache.length[:, None] + jnp.arange(x.shape[1]),
        valid=valid,
        rope=Rope(jnp.asarray(INV_FREQ), jnp.ones(())),
        scale=H**-0.5,
    )
    out, cache = cache.step(step)
    return jnp.einsum("btnh,nhd->btd", out, p["o"]), cache


def plain_model(params: dict[str, Any], tokens: Array, caches: Any = None, valid: Array | None = None) -> Any:
    x, new = params["embed"][tokens], []
    for i, p in enumerate(params["layers"]):
        if caches is None:
            x = x + plain_attention(p, x)
        else:
            out, cache = plain_attention_cached(p, x, caches[i], valid)
            x, new = x + out, [*new, cache]
        x = x + jax.nn.relu(x @ p["mlp"])
    return x @ params["embed"].T, tuple(new)


# ---- 2. a Linen module: multi-head attention with learned positions (GPT-2's way), so no rotary embedding -----------


class LinenAttention(nn.Module):
    """The model's own attention."""

    def setup(self) -> None:
        self.query, self.key, self.value = (nn.DenseGeneral((N, H)) for _ in range(3))
        self.out = nn.DenseGeneral(D, axis=(-2, -1))

    def __call__(self, x: Array) -> Array:
        causal = nn.make_causal_mask(x[..., 0])
        return self.out(nn.dot_product_attention(self.query(x), self.key(x), self.value(x), mask=causal))


class LinenAttentionCached(LinenAttention):
    """What replaces it: the same parameters."""

    def __call__(self, x: Array, cache: Any, valid: Array) -> tuple[Array, Any]:  # type: ignore[override]
        step = Step(
            queries=self.query(x),
            keys=self.key(x),
            values=self.value(x),
            positions=cache.length[:, None] + jnp.arange(x.shape[1]),
            valid=valid,
            scale=H**-0.5,
        )
        out, cache = cache.step(step)
        return self.out(out), cache


class LinenModel(nn.Module):
    cached: bool = False

    @nn.compact
    def __call__(self, tokens: Array, caches: Any = None, valid: Array | None = None) -> Any:
        start = caches[0].length[:, None] if self.cached else 0
        embed = nn.Embed(V, D, embedding_init=nn.initializers.normal(1.0))
        x = embed(tokens) + nn.Embed(64, D)(start + jnp.arange(tokens.shape[1]))
        new = []
        for i in range(LAYERS):
            attention = (LinenAttentionCached if self.cached else LinenAttention)(name=f"attention_{i}")
            if self.cached:
                out, cache = attention(nn.LayerNorm()(x), caches[i], valid)
                x, new = x + out, [*new, cache]
            else:
                x = x + attention(nn.LayerNorm()(x))
            x = x + nn.Dense(D)(nn.gelu(nn.Dense(2 * D)(nn.LayerNorm()(x))))
        return embed.attend(x), tuple(new)


# ---- 3. an nnx module: one kv head, a sliding window would be one more argument of Step ------------------------------


def nnx_model(seed: int) -> Any:
    nnx = pytest.importorskip("flax.nnx", reason="this pair of flax and jax cannot import flax.nnx", exc_type=Exception)

    class NnxAttention(nnx.Module):
        def __init__(self, rngs: Any):
            self.q = nnx.LinearGeneral(D, (N, H), rngs=rngs)
            self.kv = nnx.LinearGeneral(D, (2, 1, H), rngs=rngs)
            self.o = nnx.LinearGeneral((N, H), D, axis=(-2, -1), rngs=rngs)

        def __call__(self, x: Array) -> Array:
            """The model's own attention."""
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
            k, v = jnp.moveaxis(self.kv(x), 2, 0)
            q, k = rotate(self.q(x), positions), rotate(k, positions)
            causal = nnx.make_causal_mask(x[..., 0])
            return self.o(nnx.dot_product_attention(q, jnp.repeat(k, N, 2), jnp.repeat(v, N, 2), mask=causal))

        def cached(self, x: Array, cache: Any, valid: Array) -> tuple[Array, Any]:
            """What replaces it."""
            k, v = jnp.moveaxis(self.kv(x), 2, 0)
            step = Step(
                queries=self.q(x),
                keys=k,
                values=v,
                positions=cache.length[:, None] + jnp.arange(x.shape[1]),
                valid=valid,
                rope=Rope(jnp.asarray(INV_FREQ), jnp.ones(())),
                scale=H**-0.5,
            )
            out, cache = cache.step(step)
            return self.o(out), cache

    class NnxModel(nnx.Module):
        def __init__(self, rngs: Any):
            self.embed = nnx.Embed(V, D, embedding_init=jax.nn.initializers.normal(1.0), rngs=rngs)
            self.attention = nnx.List([NnxAttention(rngs) for _ in range(LAYERS)])

        def __call__(self, tokens: Array, caches: Any = None, valid: Array | None = None) -> Any:
            x, new = self.embed(tokens), []
            for i, attention in enumerate(self.attention):
                if caches is None:
                    x = x + attention(x)
                else:
                    out, cache = attention.cached(x, caches[i], valid)
                    x, new = x + out, [*new, cache]
            return self.embed.attend(x), tuple(new)

    return nnx.split(NnxModel(nnx.Rngs(seed)))


# ---- the test: with a full cache all three give their own logits; with h2o in 4 bits nearly -------------------------

B, PROMPT, DECODED = 2, 32, 8
LENGTHS = np.array([32, 19], np.int32)
TOKENS = np.random.default_rng(0).integers(0, V, (B, PROMPT + DECODED), np.int32)
# tokens -> logits [B, T, V]; and tokens, caches, valid -> logits, caches
Forward = Callable[..., Any]


def plain() -> tuple[Forward, Forward, int]:
    params = init_plain(jax.random.key(0))
    return lambda tokens: plain_model(params, tokens)[0], functools.partial(plain_model, params), K


def linen() -> tuple[Forward, Forward, int]:
    params = LinenModel().init(jax.random.key(0), TOKENS)
    return (
        lambda tokens: LinenModel().apply(params, tokens)[0],
        functools.partial(LinenModel(cached=True).apply, params),
        N,
    )


def nnx() -> tuple[Forward, Forward, int]:
    import flax.nnx

    graph, state = nnx_model(0)
    model = functools.partial(lambda *args: flax.nnx.merge(graph, state)(*args))
    return lambda tokens: model(tokens)[0], model, 1


def decode(cached: Forward, kv_heads: int, method: str) -> np.ndarray:
    """Logits [B, 1 + DECODED, V] after the prompt and after each further token, from a cache."""
    dims = [CacheDims(B, kv_heads, N, H, PROMPT + DECODED, PROMPT, "float32", layer=i) for i in range(LAYERS)]
    cache = ModelCache.init(parse(method), dims, jnp.asarray(LENGTHS))
    run = jax.jit(cached, donate_argnums=1, compiler_options={"xla_backend_optimization_level": 0})
    logits, layers = run(TOKENS[:, :PROMPT], cache.layers, np.arange(PROMPT) < LENGTHS[:, None])
    found = [np.asarray(logits)[np.arange(B), LENGTHS - 1]]
    for i in range(DECODED):
        token = TOKENS[np.arange(B), LENGTHS + i][:, None]
        logits, layers = run(token, layers, np.ones((B, 1), bool))
        found.append(np.asarray(logits)[:, 0])
    return np.stack(found, axis=1)


@pytest.mark.parametrize(
    "model", [pytest.param(plain, marks=pytest.mark.slow), linen, nnx], ids=["plain", "linen", "nnx"]
)
def test_a_foreign_model_decodes_from_the_cache(model: Callable[[], tuple[Forward, Forward, int]]) -> None:
    forward, cached, kv_heads = model()
    own = np.asarray(jax.jit(forward)(TOKENS))
    own = own[np.arange(B)[:, None], LENGTHS[:, None] - 1 + np.arange(1 + DECODED)]

    full = decode(cached, kv_heads, "full")
    np.testing.assert_allclose(full, own, rtol=0, atol=1e-5 * np.abs(own).max())

    small = decode(cached, kv_heads, "h2o:tokens=32+int4")
    np.testing.assert_allclose(small[0, 0], own[0, 0], rtol=0, atol=1e-5 * np.abs(own).max(), err_msg="exact prefill")
    assert not np.allclose(small[:, 1:], own[:, 1:], atol=1e-4), "it does evict and quantise"
    error = np.linalg.norm(small - own, axis=-1) / np.linalg.norm(own, axis=-1)
    assert error[0].max() < 0.2, error  # 8 of 40 tokens are evicted by the end
    assert error[1].max() < 0.06, error  # fits the budget: what 4 bits cost
