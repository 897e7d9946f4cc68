"""Every error a user can cause: one message that says what, where, why and the fix."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from os import PathLike


class KvjaxError(Exception):
    """Base of all errors that kvjax raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 2


class UsageError(KvjaxError):
    """An argument, name or combination that cannot work."""


class CacheFullError(KvjaxError):
    """A row needs more slots than the cache was made with. Nothing has been written."""

    exit_code = 4


class CorruptDataError(KvjaxError):
    """A file is damaged, truncated or not what it claims to be."""

    exit_code = 5


class NumericsError(KvjaxError):
    """A result is a NaN or an infinity."""

    exit_code = 6


class MissingExtraError(KvjaxError):
    """An optional dependency is needed; the message holds the exact pip command."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the closest known names, for messages about unknown ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"Known: {', '.join(known)}."


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not registered."""
    return UsageError(f"unknown {kind} {name!r}. {nearest(name, known)}")


@contextlib.contextmanager
def writing(path: str | PathLike[str]) -> Iterator[None]:
    """Turns what the system says when `path` cannot be written into a UsageError that names it."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}. Choose a place that exists, has room, and is yours to "
            "write to."
        ) from error
