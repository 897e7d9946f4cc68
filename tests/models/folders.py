"""Tiny Hugging Face folders for tests, written with the `safetensors` library, not with the project's own writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1) -> Path:
    """config.json and the tensors, in one file or spread over several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(dict(tensors), folder / "model.safetensors")
        return folder
    names = [f"model-{index:05d}-of-{shards:05d}.safetensors" for index in range(1, shards + 1)]
    weight_map = {tensor: names[index % shards] for index, tensor in enumerate(tensors)}
    for name in names:
        part = {tensor: tensors[tensor] for tensor in tensors if weight_map[tensor] == name}
        safetensors.numpy.save_file(part, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def small_tokenizer(vocab_size: int = 300) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer that puts <s> before a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cache keeps keys and values of the tokens that it has seen"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> None:
    """tokenizer.json and tokenizer_config.json, with the chat template inside the latter."""
    small_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "pad_token": "<pad>",
        "tokenizer_class": "LlamaTokenizerFast",
        "model_max_length": 64,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
