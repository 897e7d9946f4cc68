"""Comparisons of cache methods: what each one costs and what it loses."""
