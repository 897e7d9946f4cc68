"""`generate` on a (data, model) mesh: the tokens of one device, and nothing said but tensor parallelism's own."""

from __future__ import annotations

import functools
import re

import jax
import pytest

import kvjax
from kvjax.engine import generate as engine
from kvjax.errors import UsageError
from kvjax.sharding import ShardingRules, make_mesh
from tests.engine.driver import CONFIG, PROMPTS, language_model
from tests.sharding.hlo import collectives

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices"),
]
NEW = 20


@functools.cache
def sharded(vocab: str | None) -> kvjax.LanguageModel:
    """2 rows and 1 kv head on each of 8 devices."""
    return language_model().on_mesh(make_mesh(2, 4), ShardingRules(vocab=vocab))


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[jax.stages.Compiled]:
    """The compiled decode loops that `generate` has used meanwhile."""
    compiled: list[jax.stages.Compiled] = []
    static = 4

    def decode(*args):
        if not compiled:
            compiled.append(original.lower(*args).compile())
        return compiled[0](*args[static:])

    original = engine.decode
    monkeypatch.setattr(engine, "decode", decode)
    return compiled


# What a step says: a sum after attention and after the MLP of each layer. Where the vocabulary lies in parts also one
# for the embedding, and, to find the likeliest token, the largest logit of each part and its place.
SUMS = {"all-reduce": 2 * CONFIG.num_layers}
WITH_PARTS = {"all-reduce": 2 * CONFIG.num_layers + 1, "all-gather": 2}


@pytest.mark.parametrize(
    ("method", "vocab", "said"),
    [
        ("full", None, SUMS),
        ("h2o:share=50%", "model", WITH_PARTS),
        ("snapkv:share=50%,window=8+int4:group=16", "model", WITH_PARTS),
    ],
)
def test_a_ragged_batch_says_the_same_on_a_mesh(
    method: str, vocab: str | None, said: dict[str, int], loops: list[jax.stages.Compiled]
) -> None:
    here = kvjax.generate(language_model(), PROMPTS, method, max_new_tokens=NEW, dtype="float32")
    loops.clear()
    there = kvjax.generate(sharded(vocab), PROMPTS, method, max_new_tokens=NEW, dtype="float32")
    assert there.tokens == here.tokens
    (loop,) = loops
    assert collectives(loop) == said
    gathered = re.findall(r"= (\w+\[[\d,]*\])\S* all-gather", loop.as_text())
    assert set(gathered) <= {"f32[2,4]", "s32[2,4]"}, "a number per row and part, never logits or a cache"
    cache = there.context.cache
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(cache))
    assert held < 1.5 * here.context.cache.nbytes / 8, "each device holds its rows and heads, and shared positions"
    assert loop.memory_analysis().alias_size_in_bytes >= held, "every shard is updated in place"


def test_a_context_on_a_mesh_is_saved_only_whole(tmp_path) -> None:
    context = kvjax.prefill(sharded(None), PROMPTS, reserve=NEW, dtype="float32")
    with pytest.raises(UsageError, match="unshard_cache"):
        kvjax.save_cache(context, tmp_path / "cache")
