"""One module per experiment: a frozen dataclass `Config` and `main(config)`; `kvjax <name>` runs it.

The modules import jax inside `main`, never at the top, so that `kvjax <name> --help` answers at once.
"""
