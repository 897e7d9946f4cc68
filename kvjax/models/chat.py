"""Chat templates: Jinja that comes with a model, so it runs in a sandbox without access to Python."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from kvjax.errors import UsageError


def _raise(message: str) -> str:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML; templates expect plain JSON."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Renders a chat template with the functions that Hugging Face offers to it.

    Raises:
      UsageError: the template is invalid, or refuses these messages (its own words are in the error).
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    try:
        return environment.from_string(template).render(**variables)
    except jinja2.TemplateError as error:
        raise UsageError(
            f"the chat template of this model failed: {error}. Check the messages' roles and content."
        ) from None
