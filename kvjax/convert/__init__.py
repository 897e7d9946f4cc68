"""Conversions of trained weights for the methods that need them."""
