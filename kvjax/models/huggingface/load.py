"""`load`: a Hugging Face folder as a `LanguageModel`, one tensor at a time."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kvjax.errors import CorruptDataError, UsageError
from kvjax.models.config import TransformerConfig
from kvjax.models.huggingface.checkpoint import Checkpoint
from kvjax.models.huggingface.config import read_config, text_fields
from kvjax.models.huggingface.own import MODEL_TYPE, read_own_config, read_own_params
from kvjax.models.huggingface.params import read_params
from kvjax.models.language_model import LanguageModel
from kvjax.models.tokenizer import Tokenizer, load_tokenizer, read_json

REFERENCE = "reference"
PARAM_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def load(folder: str | Path, *, dtype: Any = None, assume_harmless: Collection[str] = ()) -> LanguageModel:
    """Reads config.json, *.safetensors and tokenizer.json; host memory grows by the weights and one tensor's copies.

    Args:
      folder: a path, or "reference" for the small model that ships with kvjax.
      dtype: of the parameters: float32, bfloat16 or float16; None takes what the config (or the file) says, and keeps
        each tensor's own where kvjax wrote the folder for a model that transformers does not have.
      assume_harmless: fields of config.json that kvjax does not know and that you know not to change the logits.

    Raises:
      UsageError: not a model folder, an architecture or field that is not implemented, only pickle files.
      CorruptDataError: a damaged file; a missing, unexpected or mis-shaped tensor.
    """
    path = _resolve(folder)
    json = read_json(path / "config.json")
    if json.get("model_type") == MODEL_TYPE:
        config = read_own_config(json, assume_harmless=assume_harmless)
        params = read_own_params(config, Checkpoint(path), None if dtype is None else _known(dtype))
    else:
        config, checkpoint = read_config(json, assume_harmless=assume_harmless), Checkpoint(path)
        params = read_params(config, checkpoint, _param_dtype(dtype, json, checkpoint))
    tokenizer = load_tokenizer(path, _stop_ids(path, json))
    _check_vocabulary(tokenizer, config, path)
    return LanguageModel(config, params, tokenizer, path.name)


def _resolve(folder: str | Path) -> Path:
    shipped = str(folder) == REFERENCE
    path = (
        Path(str(importlib.resources.files("kvjax") / "assets" / REFERENCE)) if shipped else Path(folder).expanduser()
    )
    if not (path / "config.json").is_file():
        why = "it has no config.json" if path.is_dir() else "there is no such folder"
        on_hub = not path.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder))
        download = f" Nothing is downloaded for you; for example: hf download {folder} --local-dir FOLDER."
        raise UsageError(
            f"cannot load a model from {path}: {why}. Give the folder of a Hugging Face model "
            f"(config.json, *.safetensors, tokenizer.json), or {REFERENCE!r}.{download if on_hub else ''}"
        )
    return path.resolve()


def _param_dtype(dtype: Any, json: dict[str, Any], checkpoint: Checkpoint) -> np.dtype[Any]:
    fields = text_fields(json)
    named = dtype or fields.get("dtype") or fields.get("torch_dtype") or json.get("dtype") or json.get("torch_dtype")
    if named is None:
        named = max((checkpoint.entry(name) for name in checkpoint), key=lambda entry: entry.nbytes).dtype
    return _known(named)


def _known(named: Any) -> np.dtype[Any]:
    """A dtype that parameters can have. Raises UsageError for others."""
    name = named.removeprefix("torch.") if isinstance(named, str) else jnp.dtype(named).name
    if name not in PARAM_DTYPES:
        raise UsageError(f"dtype {name!r} cannot hold parameters; give dtype=float32, bfloat16 or float16.")
    return PARAM_DTYPES[name]


def _stop_ids(folder: Path, json: dict[str, Any]) -> tuple[int, ...]:
    """Ids that end a generation: generation_config.json, else config.json."""
    generation = folder / "generation_config.json"
    sources = [read_json(generation)] if generation.is_file() else []
    for source in [*sources, json, text_fields(json)]:
        ids = source.get("eos_token_id")
        if ids is not None:
            return tuple(int(token) for token in ids) if isinstance(ids, list) else (int(ids),)
    return ()


def _check_vocabulary(tokenizer: Tokenizer, config: TransformerConfig, folder: Path) -> None:
    """Added tokens may lie beyond the embedding (Gemma 3's image token does); ordinary ones may not."""
    if tokenizer.backend is None:
        return
    size = tokenizer.backend.get_vocab_size(with_added_tokens=False)
    if size > config.vocab_size:
        raise CorruptDataError(
            f"{folder / 'tokenizer.json'} has {size} tokens, but the model embeds {config.vocab_size}; "
            "the tokenizer belongs to another model."
        )
