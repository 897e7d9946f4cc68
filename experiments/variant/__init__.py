"""Attention variants at equal parameters: which there are, how they are trained, and what is measured."""
