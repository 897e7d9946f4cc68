"""Progress of the commands: the display that comparisons have."""

from kvjax.evaluation.progress import track

__all__ = ["track"]
