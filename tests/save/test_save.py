"""A saved cache comes back bit for bit, decoding goes on as if nothing had happened, and no crash loses one."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import describe
from kvjax.cache import save as save_module
from kvjax.cache.budget import Uniform
from kvjax.cache.method import CacheMethod
from kvjax.cache.methods import parse
from kvjax.cache.model_cache import ModelCache
from kvjax.cache.policy import AttentionMass, Recency
from kvjax.cache.save import load, save
from kvjax.engine.prefill import Context
from kvjax.engine.save import load_cache, save_cache
from kvjax.errors import UsageError
from tests.save.driver import (
    FAST_COMPILE,
    SPECS,
    assert_same_bits,
    continued,
    decoded,
    dims,
    empty,
    make_step,
    prefilled,
)
from tests.thin import thinned

SMALL = "kivi-4:residual=16,group=16"


@pytest.mark.parametrize("spec", thinned(SPECS))
def test_every_named_method_after_prefill_and_after_decode(spec: str, tmp_path: Path) -> None:
    _, cache = prefilled(spec)
    save(cache, tmp_path / "prompt")
    back, extras = load(tmp_path / "prompt")
    assert extras == {}
    assert_same_bits(back, cache)

    outputs, after = decoded(spec)
    outputs_of_loaded, after_loaded = continued(back)
    assert np.asarray(outputs_of_loaded).tobytes() == np.asarray(outputs).tobytes()
    assert_same_bits(after_loaded, after)

    save(after, tmp_path / "decoded")
    assert_same_bits(load(tmp_path / "decoded")[0], after)


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    _, cache = prefilled("h2o:tokens=24", dtype="bfloat16")
    save(cache, tmp_path / "c")
    back, _ = load(tmp_path / "c")
    assert {str(x.dtype) for x in jax.tree.leaves(back)} == {"bfloat16", "float32", "int32"}
    assert_same_bits(back, cache)


def test_nan_payloads_minus_zero_and_zeros_keep_their_bits(tmp_path: Path) -> None:
    """A chunk of zeros is stored too, else a lost file would read as zeros."""
    cache = empty("full")
    body = cache[0].body
    assert body is not None
    bits = np.zeros(body.keys.shape, np.uint32)
    bits.flat[:4] = [0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001]
    layer = dataclasses.replace(cache[0], body=dataclasses.replace(body, keys=jnp.array(bits.view(np.float32))))
    cache = dataclasses.replace(cache, layers=(layer,))
    save(cache, tmp_path / "c")
    assert len(list(tmp_path.glob("c/arrays-*/layers.0.body.values/c/**/*"))) == 4, "zeros are on disk"
    assert_same_bits(load(tmp_path / "c")[0], cache)


def test_a_half_done_streaming_prefill_goes_on(tmp_path: Path) -> None:
    method = CacheMethod(
        budget=Uniform(tokens_kept=24), policy=AttentionMass(), recent=8, prefill="streaming", every=1, name="chunks"
    )
    cache = ModelCache.init(method, [dims()])
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16))
    first, second = (make_step(i, positions + 16 * i, np.ones((4, 16), bool)) for i in (0, 1))
    advance = jax.jit(lambda layer, step: layer.step(step), compiler_options=FAST_COMPILE)
    cache = dataclasses.replace(cache, layers=(advance(cache[0], first)[1],))
    assert cache[0].phase == "prompt"
    save(cache, tmp_path / "c")
    back, _ = load(tmp_path / "c")
    assert_same_bits(back, cache)
    assert_same_bits(advance(back[0], second), advance(cache[0], second))


def test_several_layers_and_large_arrays_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = empty("h2o:tokens=24+int8", layers=2)
    fill = np.random.default_rng(0)
    random_bits = lambda x: jnp.array(fill.integers(0, 256, x.nbytes, np.uint8).view(x.dtype).reshape(x.shape))  # noqa: E731
    cache = jax.tree.map(random_bits, cache)
    monkeypatch.setattr("kvjax.cache.array_folder.CHUNK_BYTES", 1000)
    save(cache, tmp_path / "c")
    assert len(list(tmp_path.glob("c/arrays-*/layers.1.recent.keys/c/*"))) == 4, "one folder per row"
    assert_same_bits(load(tmp_path / "c")[0], cache)


def test_a_context_comes_back_as_a_context(tmp_path: Path) -> None:
    context = Context(prefilled(SMALL)[1], jnp.linspace(-3.0, 7.0, 40).reshape(4, 10))
    save_cache(context, tmp_path / "context")
    back = load_cache(tmp_path / "context")
    assert type(back) is Context
    assert_same_bits(back, context)
    save_cache(context.cache, tmp_path / "cache")
    assert_same_bits(load_cache(tmp_path / "cache"), context.cache)


def test_an_existing_cache_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save(prefilled(SMALL)[1], path)
    with pytest.raises(UsageError, match="overwrite=True"):
        save(decoded(SMALL)[1], path)
    assert_same_bits(load(path)[0], prefilled(SMALL)[1])
    save(decoded(SMALL)[1], path, overwrite=True)
    assert_same_bits(load(path)[0], decoded(SMALL)[1])
    assert len(list(path.iterdir())) == 2 and list(tmp_path.iterdir()) == [path], "nothing is left of the old one"


def test_a_folder_that_is_no_cache_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not a saved cache"):
            save(prefilled(SMALL)[1], tmp_path / "thesis", overwrite=overwrite)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    with pytest.raises(UsageError, match="not a saved cache"):
        load(tmp_path / "thesis")
    with pytest.raises(UsageError, match="not a saved cache"):
        load(tmp_path / "nowhere")


class Killed(BaseException):
    """Stands for the process's end: nothing runs after it, no cleanup either."""


@pytest.mark.parametrize("exists", [False, True])
def test_a_crash_at_any_moment_leaves_the_old_cache_or_the_new(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operation on the file system is once the last one that happens."""
    old, new = prefilled(SMALL)[1], decoded(SMALL)[1]
    operations = [
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "replace"),
        (save_module, "write_arrays"),
        (save_module, "_write_document"),
        (save_module, "_sync"),
        (shutil, "rmtree"),
    ]
    seen = set()
    for survived in range(20):
        path = tmp_path / str(survived) / "c"
        path.parent.mkdir()
        if exists:
            save(old, path)
        budget = [survived]

        def limited(original, budget=budget):
            def call(*args, **kwargs):
                if budget[0] == 0:
                    raise Killed
                budget[0] -= 1
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in operations:
                patch.setattr(owner, name, limited(getattr(owner, name)))
            try:
                save(new, path, overwrite=exists)
                finished = True
            except Killed:
                finished = False
        if not exists and not path.exists():
            seen.add("nothing")
            continue
        found = load(path)[0]
        assert int(found.lengths[0]) in (int(old.lengths[0]), int(new.lengths[0]))
        is_new = int(found.lengths[0]) == int(new.lengths[0])
        assert_same_bits(found, new if is_new else old)
        seen.add("new" if is_new else "old")
        save(old, path, overwrite=True)  # what the crash has left is in nobody's way, and goes
        assert len(list(path.iterdir())) == 2
        if finished:
            break
    else:
        pytest.fail("the list of operations did not end")
    assert seen == ({"old", "new"} if exists else {"nothing", "new"})


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save_module, "_write_document", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(prefilled(SMALL)[1], tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_donated_buffers_are_named(tmp_path: Path) -> None:
    cache = prefilled(SMALL)[1].fork()
    cache[0].length.delete()
    with pytest.raises(UsageError, match=r"layers\.0\.length.*donated.*fork"):
        save(cache, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_ones_own_is_saved_once_it_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Newest(Recency):
        pass

    method = CacheMethod(budget=Uniform(tokens_kept=24), policy=Newest(), recent=4)
    cache = ModelCache.init(method, [dims()])
    with pytest.raises(UsageError, match=r"Newest.*[Rr]egister"):
        save(cache, tmp_path / "c")
    monkeypatch.setattr(describe, "PARTS", dict(describe.PARTS))
    describe.register(Newest)
    save(cache, tmp_path / "c")
    assert_same_bits(load(tmp_path / "c")[0], cache)


def test_what_is_no_whole_cache_is_refused(tmp_path: Path) -> None:
    cache = empty("full")
    cut = dataclasses.replace(cache, layers=(dataclasses.replace(cache[0], body=None),))
    with pytest.raises(UsageError, match="whole cache"):
        save(cut, tmp_path / "c")


def test_layers_with_and_without_a_window(tmp_path: Path) -> None:
    """A layer with a sliding window keeps only its window, so its method is another form of the same one."""
    layers = [dataclasses.replace(dims(), window=8), dims(layer=1)]
    cache = ModelCache.init(parse("int8"), layers)
    assert cache.method == parse("int8") and cache.layers[0].method != cache.method
    save_cache(cache, tmp_path / "cache")
    again = load_cache(tmp_path / "cache")
    assert jax.tree.structure(again) == jax.tree.structure(cache)
