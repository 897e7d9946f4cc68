"""Decoder-only transformers in Flax Linen, and Hugging Face folders in and out."""
