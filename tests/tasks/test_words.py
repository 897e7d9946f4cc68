"""Words are single tokens of any tokenizer, and keys are never values."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer

from kvjax.assets import REFERENCE, heldout_text
from kvjax.errors import UsageError
from kvjax.tasks import TASKS, Vocabulary, examples


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))


def test_reference_tokenizer_has_enough_words(tokenizer):
    vocabulary = Vocabulary.of(tokenizer)
    assert vocabulary.size == tokenizer.get_vocab_size() == 1024
    assert len(vocabulary.keys) >= 200 and len(vocabulary.values) >= 200
    assert not set(vocabulary.keys.tolist()) & set(vocabulary.values.tolist())
    for token in np.concatenate([vocabulary.keys, vocabulary.values]):
        assert tokenizer.decode([int(token)]).strip().isalpha()
    assert tokenizer.decode(vocabulary.frame.tolist()) == "\n"
    assert vocabulary.ask.tolist() == [tokenizer.token_to_id("<q>")]
    assert vocabulary.prefix.tolist() == [tokenizer.token_to_id("<bos>")]


def test_reference_tokenizer_is_lossless(tokenizer):
    text = heldout_text()[:20_000] + "\r\n\tünïcödé 漢字 🎉 \x00"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_every_task_with_the_reference_tokenizer(tokenizer):
    vocabulary = Vocabulary.of(tokenizer)
    text = np.asarray(tokenizer.encode(heldout_text()[:60_000], add_special_tokens=False).ids)
    for name in TASKS:
        (example,) = examples(name, vocabulary, text, length=1024, count=1, seed=0)
        assert len(example.context) + len(example.question) + len(example.answer) == 1024


@dataclasses.dataclass
class Encoding:
    ids: list[int]


class SpacedTokenizer:
    """A large vocabulary, as Llama's: whole words behind a space, without a question marker or a prefix."""

    def __init__(self, words: int) -> None:
        letters = "abcdefghij"
        names = ["Ġ" + "".join(letters[int(d)] for d in f"{i:04d}") for i in range(words)]
        self.vocab = {name: i for i, name in enumerate(["Ċ", "Q", ":", "piece", "Ġx", "12", *names])}

    def get_vocab(self) -> dict[str, int]:
        return self.vocab

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoding:
        return Encoding([self.vocab["Ċ" if c == "\n" else c] for c in sequence])


def test_a_large_vocabulary_gives_whole_words_only():
    vocabulary = Vocabulary.of(SpacedTokenizer(9000))
    words = np.concatenate([vocabulary.keys, vocabulary.values])
    assert len(words) == 4096 and words.min() >= 6
    assert vocabulary.ask.tolist() == [0, 1, 2] and vocabulary.prefix.tolist() == []


def test_too_few_words_is_an_error():
    with pytest.raises(UsageError, match="at least 32 alphabetic tokens and this tokenizer has 3"):
        Vocabulary.of(SpacedTokenizer(2))
