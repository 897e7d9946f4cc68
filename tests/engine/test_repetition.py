"""The pass in which the model repeats its prompts: what it is told, what it scores, and what `generate` makes of it."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import kvjax
from kvjax.cache.policy import Repetition
from kvjax.engine.prefill import bucket, pad
from kvjax.engine.recorded import record_prompt
from kvjax.engine.repetition import Instruction, pieces, repeat
from kvjax.errors import UsageError
from kvjax.sharding import make_mesh
from tests.cache.driver import THETA
from tests.engine.driver import PROMPTS, compilations, language_model
from tests.evaluation.tiny import tiny
from tests.oracles.attention import contiguous
from tests.oracles.kvzip import chunks, kvzip_chunk_scores, kvzip_scores, reconstruction_attention
from tests.oracles.rotary import rotate_each

REPETITION = Repetition(chunk=12, tail=3, sinks=2)
METHOD = "kvzip:share=50%,chunk=12,tail=3,sinks=2"
NEW = 12


def test_pieces_are_what_the_rows_are_to_say() -> None:
    tokens, lengths = pad([[*range(10, 17)], [*range(20, 23)]], 8)
    instruction = Instruction(from_start=(1, 2), from_tail=(3,), answer=(4,))
    found = list(pieces(tokens, lengths, Repetition(chunk=3, tail=2), instruction))
    said = [[row[:n].tolist() for row, n in zip(piece.tokens, piece.counts, strict=True)] for piece in found]
    assert said == [
        [[1, 2, 4, 10, 11, 12], [1, 2, 4, 20, 21, 22]],
        [[3, 11, 12, 4, 13, 14, 15], []],
        [[3, 14, 15, 4, 16], []],
    ]
    assert [piece.start.tolist() for piece in found] == [[0, 0], [3, 3], [6, 3]]
    assert [piece.stop.tolist() for piece in found] == [[3, 3], [6, 3], [7, 3]]
    assert {piece.tokens.shape for piece in found} == {(2, 7)}


def test_a_short_prompt_is_one_piece_and_needs_no_tail() -> None:
    tokens, lengths = pad([[*range(7)]], 8)
    (piece,) = pieces(tokens, lengths, Repetition(chunk=8), Instruction((1,), (2, 3, 4), ()))
    assert piece.tokens.tolist() == [[1, *range(7), 0]] and piece.counts.tolist() == [8]


def test_the_words_are_those_of_the_release() -> None:
    model = tiny()
    instruction = Instruction.of(model.tokenizer)
    assert model.tokenizer.decode(instruction.before([], 0, 8)) == "\n\nRepeat the previous context exactly.\n"
    tail = model.tokenizer.encode(" the cat")
    said = model.tokenizer.decode(instruction.before(tail, len(tail), 8))
    assert said == "\n\nRepeat the part of the previous context exactly, starting with the cat\n"
    assert Instruction.of(language_model().tokenizer) == Instruction()


@functools.cache
def scores() -> tuple[np.ndarray, ...]:
    """Of every layer: [B, K, P]."""
    model = tiny(sharpness=6.0)
    tokens, lengths = pad(PROMPTS, bucket(max(map(len, PROMPTS))))
    prompt = record_prompt(model.module, model.params, tokens, lengths)[1]
    return tuple(map(np.asarray, repeat(model, prompt, tokens, lengths, REPETITION)))


@pytest.mark.parametrize("row", [0, 3])
def test_scores_are_those_of_a_model_that_reads_prompt_and_repetition_at_once(row: int) -> None:
    """Each piece behind the prompt in one uncached pass; the transcription scores that pass's queries and keys."""
    model, prompt = tiny(sharpness=6.0), PROMPTS[row]
    instruction, layers = Instruction.of(model.tokenizer), model.config.num_layers
    reads = contiguous(model.config.num_heads, model.config.num_kv_heads)
    found = [[] for _ in range(layers)]
    for chunk in chunks(len(prompt), REPETITION.chunk):
        said = [*prompt, *instruction.before(prompt, chunk.start, REPETITION.tail), *(prompt[i] for i in chunk)]
        tokens, lengths = pad([said], 96)
        recorded = record_prompt(model.module, model.params, tokens, lengths)[1]
        for per_chunk, layer in zip(found, recorded, strict=True):
            q, k = (np.asarray(x[0, : len(said)], np.float64) for x in (layer.step.queries, layer.step.keys))
            q, k = (rotate_each(x, np.arange(len(said)), THETA) for x in (q, k))
            at = len(prompt)
            attention = reconstruction_attention(q[at:], k[:at], k[at:], chunk, sinks=REPETITION.sinks, reads=reads)
            per_chunk.append(kvzip_chunk_scores(attention, None, reads))
    for layer, per_chunk in enumerate(found):
        expected = kvzip_scores(per_chunk, sinks=REPETITION.sinks)
        assert expected[:, REPETITION.sinks :].std() > 0.01, "the attention is flat, so nothing is compared"
        np.testing.assert_allclose(scores()[layer][row, :, : len(prompt)], expected, atol=1e-5)


def test_a_piece_is_at_most_an_eighth_of_the_models_positions() -> None:
    """Whatever the batch, so that a row's pieces are its own."""
    model = language_model()
    tokens, lengths = pad(PROMPTS, 32)
    prompt = record_prompt(model.module, model.params, tokens, lengths)[1]
    few, most, more = (
        np.asarray(repeat(model, prompt, tokens, lengths, Repetition(chunk=chunk))[0]) for chunk in (6, 12, 2048)
    )
    np.testing.assert_array_equal(most, more)
    assert (few != most).any()


@functools.cache
def batch() -> kvjax.engine.generate.Generation:
    return kvjax.generate(language_model(), PROMPTS, METHOD, max_new_tokens=NEW, dtype="float32")


def test_a_row_says_the_same_alone_and_in_a_ragged_batch() -> None:
    """Alone it is padded to another length, and has fewer pieces than the longest row."""
    for row in (1, 3):
        alone = kvjax.generate(language_model(), PROMPTS[row], METHOD, max_new_tokens=NEW, dtype="float32")
        assert alone.tokens == [batch().tokens[row]]


def test_what_is_kept_depends_on_the_repetition() -> None:
    other = kvjax.generate(
        language_model(), PROMPTS, "kvzip:share=50%,chunk=5,sinks=2", max_new_tokens=NEW, dtype="float32"
    )
    assert other.tokens != batch().tokens
    full = kvjax.generate(language_model(), PROMPTS, max_new_tokens=NEW, dtype="float32")
    roomy = kvjax.generate(language_model(), PROMPTS, "kvzip:tokens=96", max_new_tokens=NEW, dtype="float32")
    assert roomy.tokens == full.tokens != batch().tokens


def test_a_context_is_asked_about_and_nothing_of_the_repetition_is_in_it() -> None:
    context = kvjax.prefill(language_model(), PROMPTS, METHOD, reserve=NEW, dtype="float32")
    assert np.asarray(context.cache.lengths).tolist() == [len(prompt) for prompt in PROMPTS]
    assert context.cache.layer_bytes == context.cache.planned_bytes
    asked = kvjax.generate(language_model(), [[5, 6, 7]], cache=context, max_new_tokens=2)
    assert all(len(row) == 2 for row in asked.tokens)


def test_other_prompts_of_the_same_bucket_compile_nothing() -> None:
    def generate(prompts: list[list[int]]) -> None:
        kvjax.generate(language_model(), prompts, METHOD, max_new_tokens=NEW, dtype="float32")

    generate(PROMPTS)
    with compilations() as seen:
        generate(PROMPTS[::-1])
    assert seen == []


def test_on_a_mesh_it_is_refused() -> None:
    model = language_model().on_mesh(make_mesh(data=1, model=1))
    with pytest.raises(UsageError, match=r"'kvzip:.*' has the model repeat the prompt.*mesh"):
        kvjax.prefill(model, PROMPTS, METHOD, reserve=NEW)
