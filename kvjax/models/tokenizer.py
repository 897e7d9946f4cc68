"""Text to token ids and back: the fast tokenizer of a Hugging Face folder, with its chat template."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from kvjax.errors import CorruptDataError, UsageError
from kvjax.models.chat import render

Message = Mapping[str, Any]

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer that may be absent: then every use of text says so, and models still run on token ids.

    Attributes:
      backend: the tokenizer itself, or None.
      config: the content of tokenizer_config.json.
      template: the chat template (Jinja), or None.
      stop_ids: token ids that end a generation.
    """

    backend: tokenizers.Tokenizer | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    template: str | None = None
    stop_ids: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, added ones included."""
        return self._present().get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """The id of the token that begins a text, or None."""
        return self._special_id("bos_token")

    @property
    def pad_id(self) -> int | None:
        """The id of the padding token, or None."""
        return self._special_id("pad_token")

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact string in the vocabulary, or None."""
        return self._present().token_to_id(token)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; with `special` also what the tokenizer puts around a text, such as a first token.

        Raises:
          UsageError: not a text, or one with half characters (lone surrogates), as badly decoded bytes have.
        """
        try:
            return self._present().encode(text, add_special_tokens=special).ids
        except TypeError:
            raise UsageError(
                f"this is no text that can be encoded: {text!r:.80}. If it was read from bytes, decode them as what "
                "they are, or with errors='replace'."
            ) from None

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` for many texts, on several threads."""
        return [found.ids for found in self._present().encode_batch(list(texts), add_special_tokens=special)]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of token ids; special tokens are left out unless `special`."""
        return self._present().decode([int(token) for token in ids], skip_special_tokens=not special)

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt that the chat template makes of `messages` ({"role", "content"} each), special tokens included.

        Raises:
          UsageError: there is no template, or the template refuses the messages.
        """
        if self.template is None:
            raise UsageError("this model has no chat template; give the prompt as plain text.")
        special = {name: _content(self.config.get(name)) or "" for name in _SPECIAL}
        return render(
            self.template,
            special | {"messages": messages, "add_generation_prompt": add_generation_prompt} | variables,
        )

    def _special_id(self, name: str) -> int | None:
        token = _content(self.config.get(name))
        return None if token is None else self.token_id(token)

    def _present(self) -> tokenizers.Tokenizer:
        if self.backend is None:
            raise UsageError(
                "this model has no tokenizer: its folder holds no tokenizer.json. Copy the file there, or, where only "
                "a tokenizer.model exists, write one with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
            )
        return self.backend


def load_tokenizer(folder: Path, stop_ids: tuple[int, ...] = ()) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; without tokenizer.json, an absent one.

    Args:
      folder: may hold tokenizer.json, tokenizer_config.json, chat_template.jinja, chat_template.json.
      stop_ids: as the model's own files name them; where they name none, the tokenizer's end of text.

    Raises:
      CorruptDataError: a file that cannot be parsed.
    """
    path = folder / "tokenizer.json"
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    template = _template(folder, config)
    if not path.is_file():
        return Tokenizer(None, config, template, stop_ids)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CorruptDataError(
            f"{path} is not a tokenizer that `tokenizers` can read: {error}. Download it again."
        ) from None
    # Padding and truncation saved in the file would silently change every encoding.
    backend.no_padding()
    backend.no_truncation()
    end = _content(config.get("eos_token"))
    end_id = None if end is None else backend.token_to_id(end)
    return Tokenizer(backend, config, template, stop_ids or (() if end_id is None else (end_id,)))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, as far as there is something to write."""
    if tokenizer.backend is None:
        return
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config = {key: value for key, value in tokenizer.config.items() if key not in ("chat_template", "auto_map")}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", config)
    if tokenizer.template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.template, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      CorruptDataError: not JSON, or not an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptDataError(f"{path} is not JSON: {error}. Download or write it again.") from None
    if not isinstance(found, dict):
        raise CorruptDataError(f"{path} should hold a JSON object, but holds a {type(found).__name__}.")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _content(token: Any) -> str | None:
    """A special token is a string, or an object that holds it under `content`."""
    return token.get("content") if isinstance(token, Mapping) else token


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: its own file first, then chat_template.json, then tokenizer_config.json."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    processor = folder / "chat_template.json"
    found = (read_json(processor) if processor.is_file() else config).get("chat_template")
    if isinstance(found, list):  # several, by name
        by_name = {entry["name"]: entry["template"] for entry in found}
        return by_name.get("default")
    return found
