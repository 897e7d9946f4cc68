"""`generate`: rows of a batch do not know of each other, contexts can be asked again, and little is compiled."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.engine.generate import Generation
from kvjax.engine.prefill import Context
from kvjax.engine.request import as_rows
from kvjax.errors import CacheFullError, UsageError
from tests.engine.driver import PROMPTS, compilations, language_model

METHODS = ("full", "kivi-2:group=8,residual=16", "h2o:share=50%", "snapkv:share=50%,window=8+int4:group=16")
NEW = 20


@functools.cache
def batch(method: str) -> list[list[int]]:
    return kvjax.generate(language_model(), PROMPTS, method, max_new_tokens=NEW, dtype="float32").tokens


@functools.cache
def context() -> Context:
    """The prompts in a full cache with room for NEW more tokens. Only to be forked."""
    return kvjax.prefill(language_model(), PROMPTS, reserve=NEW, dtype="float32")


def ask(question: list[int], cache: Context, n: int = 6) -> Generation:
    return kvjax.generate(language_model(), [question], cache=cache, max_new_tokens=n)


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_row_says_the_same_alone_and_in_a_ragged_batch(method: str) -> None:
    for row in (1, 2):
        alone = kvjax.generate(language_model(), PROMPTS[row], method, max_new_tokens=NEW, dtype="float32")
        assert alone.tokens == [batch(method)[row]]


def test_the_tokens_depend_on_what_the_cache_holds() -> None:
    """Otherwise the test above could not fail."""
    said = [batch(method) for method in METHODS]
    assert all(a != b for i, a in enumerate(said) for b in said[:i])


def test_a_full_cache_says_what_no_cache_says() -> None:
    """And so for the full cache a row's tokens are its own."""
    model, size = language_model(), len(PROMPTS[0]) + NEW
    forward = jax.jit(lambda tokens: model.apply(tokens)[0])
    tokens = np.zeros((len(PROMPTS), size), np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    for step in range(NEW):
        logits = np.asarray(forward(jnp.asarray(tokens)))
        tokens[np.arange(len(PROMPTS)), lengths + step] = logits[np.arange(len(PROMPTS)), lengths + step - 1].argmax(-1)
    assert batch("full") == [list(row[n : n + NEW]) for row, n in zip(tokens, lengths, strict=True)]


def test_one_compile_per_model_method_and_bucket() -> None:
    """Other prompts, other lengths of the same bucket, another seed: nothing is traced again, a short last run too."""

    def generate(prompts: list[list[int]], seed: int) -> None:
        kvjax.generate(language_model(), prompts, "h2o:share=50%", max_new_tokens=NEW, seed=seed, dtype="float32")

    generate(PROMPTS, 0)
    with compilations() as seen:
        generate([prompt[::-1] for prompt in PROMPTS[::-1]], 1)
    assert seen == []
    with compilations() as seen:
        jax.jit(lambda x: x + 1)(0)
    assert seen, "jax reports what it compiles"


def test_rows_end_at_their_stop_token_and_the_others_go_on() -> None:
    free = batch("full")
    stop = free[0][4]
    pieces: list[np.ndarray] = []
    made = kvjax.generate(
        language_model(), PROMPTS, max_new_tokens=NEW, stop=[stop], dtype="float32", on_tokens=pieces.append
    )
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert made.tokens == cut and len(cut[0]) <= 5
    shown = np.concatenate(pieces, axis=1)
    assert [[t for t in row if t >= 0] for row in shown.tolist()] == cut
    lengths = np.asarray(made.context.cache.lengths)
    ended = [row[-1] == stop for row in cut]
    assert list(lengths) == [len(p) + len(row) - end for p, row, end in zip(PROMPTS, cut, ended, strict=True)]

    pieces.clear()
    same = [PROMPTS[0]] * len(PROMPTS)
    kvjax.generate(language_model(), same, max_new_tokens=NEW, stop=[stop], dtype="float32", on_tokens=pieces.append)
    assert sum(piece.shape[1] for piece in pieces) < NEW, "once all rows have ended, nothing is decoded"


def test_a_seed_decides_what_is_drawn() -> None:
    def drawn(seed: int) -> list[list[int]]:
        sampler = kvjax.Sampler(temperature=1.0)
        made = kvjax.generate(
            language_model(), PROMPTS, max_new_tokens=NEW, sampler=sampler, seed=seed, dtype="float32"
        )
        return made.tokens

    assert drawn(3) == drawn(3) != drawn(4)
    assert len({tuple(row) for row in drawn(3)}) == len(PROMPTS), "rows draw independently"


def test_several_questions_on_one_context() -> None:
    first, second = [5, 6, 7], [9]
    answers = [ask(question, context().fork()).tokens for question in (first, second, first)]
    assert answers[0] == answers[2] != answers[1]
    whole = [prompt + first for prompt in PROMPTS]
    at_once = kvjax.generate(language_model(), whole, max_new_tokens=NEW, dtype="float32").tokens
    assert answers[0] == [row[:6] for row in at_once]


def test_what_was_generated_can_be_continued() -> None:
    made = ask([], context().fork())
    assert [a + b for a, b in zip(made.tokens, ask([], made.context).tokens, strict=True)] == [
        row[:12] for row in batch("full")
    ]


def test_a_full_context_is_refused_and_stays_whole() -> None:
    kept = context().fork()
    with pytest.raises(CacheFullError, match=r"row 0 holds 29 tokens and is to append 24, .*reserve=24 or more"):
        ask([1, 2, 3, 4], kept, NEW)
    assert ask([5, 6, 7], kept).tokens == ask([5, 6, 7], context().fork()).tokens


def test_a_consumed_context_is_refused() -> None:
    used = context().fork()
    ask([5, 6, 7], used)
    with pytest.raises(UsageError, match=r"was consumed.*context.fork\(\)"):
        ask([5, 6, 7], used)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "the batch is empty"),
        ([[1, 2], []], "prompt 1 is empty"),
        (5, "text or token ids.*got 5, of type int"),
        ([1.5, 2.5], "prompt 0 is neither text nor a list of token ids"),
        ([[1, 2], [[3], [4, 5]]], "prompt 1 is neither text nor a list of token ids"),
        ([["a", "b"]], "prompt 0 is neither text"),
        (b"abc", "prompt 0 is neither text"),
        ([[1], [2, 64]], "prompt 1 holds token id 64, .* the ids 0 to 63"),
        ([-1], "prompt 0 holds token id -1"),
        ("abc", "this model has no tokenizer"),
        ([1] * 96, r"97 tokens .* beyond the 96 positions"),
    ],
)
def test_a_prompt_that_cannot_work_is_refused(prompt, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        kvjax.generate(language_model(), prompt, max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": 3}, "method is a CacheMethod or a name.*got 3, of type int"),
        ({"method": kvjax.methods.kivi}, "got kivi, of type function"),
        ({"method": "snapk"}, "Did you mean 'snapkv'"),
        ({"method": "int4"}, "head_dim 16 is not divisible by group 32 .*Valid groups: 2, 4, 8, 16"),
        ({"dtype": "int8"}, "dtype is how a cache stores exact tokens.*got 'int8'"),
        ({"dtype": "float12"}, "got 'float12'"),
        ({"stop": "\n"}, "stop is a list of token ids"),
        ({"stop": 3}, "stop is a list of token ids"),
        ({"seed": 1.5}, "seed is a whole number"),
        ({"seed": 2**32}, "less than 4294967296"),
        ({"max_new_tokens": -1}, "max_new_tokens is a whole number of at least 0; got -1"),
        ({"sampler": {"temperature": 1}}, r"sampler is a Sampler, such as kvjax.Sampler\("),
        ({"cache": "context"}, "cache is a context, as kvjax.prefill returns it; got a str"),
        ({"model": "reference"}, r"model is a LanguageModel, such as kvjax.load\("),
    ],
)
def test_an_option_that_cannot_work_is_refused(options, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        kvjax.generate(**{"model": language_model(), "prompt": [1, 2], "max_new_tokens": 1} | options)


def test_a_context_needs_as_many_questions_as_rows() -> None:
    with pytest.raises(UsageError, match="3 prompts for a context of 4 rows"):
        kvjax.generate(language_model(), [[1], [2], [3]], cache=context().fork())


def test_arrays_are_prompts_too() -> None:
    for array in (np.array([[1, 2], [3, 4]]), jnp.array([[1, 2], [3, 4]]), (np.array([1, 2]), [3, 4])):
        assert as_rows(language_model(), array, special=False) == [[1, 2], [3, 4]]
    for array in (np.array([1, 2], np.uint8), jnp.array([1, 2]), (1, 2)):
        assert as_rows(language_model(), array, special=False) == [[1, 2]]


def test_what_cannot_be_written_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*cache: .*Choose a place"):
        kvjax.save_cache(context(), tmp_path / "file" / "cache")
    with pytest.raises(UsageError, match="the cache to save is a ModelCache, such as the context"):
        kvjax.save_cache(5, tmp_path / "cache")  # type: ignore[arg-type]
