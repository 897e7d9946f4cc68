"""Tokenizers and chat templates of a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvjax.errors import CorruptDataError, UsageError
from kvjax.models.chat import render
from kvjax.models.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from tests.models.folders import small_tokenizer, write_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
RENDERED = "<s>[user] hi</s>\n[assistant] yes?</s>\n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["the cache keeps keys", "", "naïve ⟨🙂⟩\n\ttabs", "<s> is not special here?"])
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), special=True) == text
    assert tokenizer.encode(text, special=True) == [0, *tokenizer.encode(text)]
    assert tokenizer.encode_batch([text, "the"]) == [tokenizer.encode(text), tokenizer.encode("the")]


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.stop_ids) == (0, 2, (1,))
    assert tokenizer.token_id("</s>") == 1 and tokenizer.token_id("nowhere") is None
    ids = [0, *tokenizer.encode("the"), 1]
    assert tokenizer.decode(ids) == "the" and tokenizer.decode(ids, special=True) == "<s>the</s>"


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    saved = small_tokenizer()
    saved.enable_truncation(3)
    saved.enable_padding(length=8)
    saved.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "the cache keeps keys and values"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template(tokenizer: Tokenizer) -> None:
    assert tokenizer.chat(MESSAGES, add_generation_prompt=False) == RENDERED
    assert tokenizer.chat(MESSAGES) == RENDERED + "[assistant] "


def test_where_the_template_lies(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template=None)
    with pytest.raises(UsageError, match="no chat template"):
        load_tokenizer(tmp_path).chat(MESSAGES)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert load_tokenizer(tmp_path).chat(MESSAGES) == "d"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert load_tokenizer(tmp_path).chat(MESSAGES) == "processor"
    (tmp_path / "chat_template.jinja").write_text("own file {{ eos_token }}")
    assert load_tokenizer(tmp_path).chat(MESSAGES) == "own file </s>"


def test_saving_keeps_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_tokenizer(tokenizer, out)
    again = load_tokenizer(out)
    text = "the cache, again"
    assert again.encode(text, special=True) == tokenizer.encode(text, special=True)
    assert again.chat(MESSAGES) == tokenizer.chat(MESSAGES)
    assert (again.bos_id, again.pad_id, again.stop_ids) == (0, 2, (1,))
    save_tokenizer(Tokenizer(), out / "none")
    assert not (out / "none").exists()


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{,}")
    with pytest.raises(CorruptDataError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("no")
    with pytest.raises(CorruptDataError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "the chat template of this model failed"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "not callable|unsafe"),
        ("{{ absent.field }}", "undefined"),
    ],
)
def test_templates_that_fail(template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        render(template, {"messages": []})


def test_functions_that_templates_expect() -> None:
    assert render("{{ x | tojson }}", {"x": {"a": "<ü>"}}) == '{"a": "<ü>"}'
    assert render("{{ x | tojson(indent=1) }}", {"x": [1]}) == "[\n 1\n]"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", {}) == "01"
    assert len(render("{{ strftime_now('%Y-%m-%d') }}", {})) == 10
