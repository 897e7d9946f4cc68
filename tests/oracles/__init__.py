"""Slow NumPy transcriptions of the published methods, written from their descriptions alone.

They work on one row and one layer, token by token, in float64, and import nothing of the project.
"""
