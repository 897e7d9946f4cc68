"""How numbers are written, in tables, sentences and plots."""

from __future__ import annotations

from kvjax.evaluation.summary import Estimate


def percent(share: float) -> str:
    """A share as text: "97 %", with one digit more below ten."""
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.1f} %"


def interval(score: Estimate) -> str:
    """ "97 % (95–98)": the mean and the limits of its interval."""
    return f"{100 * score.mean:.0f} % ({100 * score.low:.0f}–{100 * score.high:.0f})"


def spread(score: Estimate | None) -> str:
    """ "97 ±3": percent, with the longer side of the 95 % interval."""
    if score is None:
        return "–"
    half = max(score.high - score.mean, score.mean - score.low)
    return f"{100 * score.mean:.0f} ±{100 * half:.0f}"


def number(value: float | None, digits: int = 3) -> str:
    """A number with that many significant digits, or a dash."""
    if value is None:
        return "–"
    if abs(value) >= 10 ** (digits - 1) or value == 0:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def byte_size(size: float) -> str:
    """Bytes as text: "160 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if size >= 99.5 or size == int(size) else f"{size:.1f} {unit}"
