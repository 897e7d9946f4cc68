"""Hugging Face folders (config.json, *.safetensors, tokenizer.json) in and out."""

from kvjax.models.huggingface.export import export
from kvjax.models.huggingface.load import load
from kvjax.models.huggingface.own import register

__all__ = ["export", "load", "register"]
