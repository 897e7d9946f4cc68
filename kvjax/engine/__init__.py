"""Prefill, decode and generate."""
