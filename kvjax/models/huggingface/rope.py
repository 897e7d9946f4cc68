"""Rotary embedding in config.json: the transformers-4 and -5 spellings, and back.

transformers 4 writes `rope_theta` beside `rope_scaling` (null, or a dictionary with `type` or `rope_type`);
transformers 5 writes one `rope_parameters` dictionary. The frequencies are those of
`transformers.modeling_rope_utils`, whose defaults for missing keys are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from kvjax.attention.rope import Dynamic, Linear, Llama3, Plain, RopeConfig, Scaling, Yarn
from kvjax.errors import UsageError

Json = Mapping[str, Any]


def _yarn(json: Json, max_positions: int) -> Yarn:
    original = json.get("original_max_position_embeddings") or max_positions
    factor = json.get("factor") or max_positions / original
    amplitude, mscale, mscale_all = (json.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if amplitude is None and mscale and mscale_all:
        amplitude = Yarn.default_amplitude(factor, mscale) / Yarn.default_amplitude(factor, mscale_all)
    return Yarn(
        factor=factor,
        original_positions=original,
        beta_fast=json.get("beta_fast") or 32.0,
        beta_slow=json.get("beta_slow") or 1.0,
        truncate=json.get("truncate", True),
        amplitude=amplitude,
    )


def _llama3(json: Json, max_positions: int) -> Llama3:
    return Llama3(
        factor=json["factor"],
        low_freq_factor=json["low_freq_factor"],
        high_freq_factor=json["high_freq_factor"],
        original_positions=json.get("original_max_position_embeddings") or max_positions,
    )


def _dynamic(json: Json, max_positions: int) -> Dynamic:
    original = json.get("original_max_position_embeddings")
    if original not in (None, max_positions):
        raise UsageError(
            f"dynamic rope scaling with original_max_position_embeddings {original} beside max_position_embeddings "
            f"{max_positions} is refused: transformers stretches from max_position_embeddings; set both to one value."
        )
    return Dynamic(json["factor"], max_positions)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One rope_type: the keys it may hold beside rope_theta and its name, and both directions."""

    name: str
    keys: frozenset[str]
    read: Callable[[Json, int], Scaling]
    write: Callable[[Any], dict[str, Any]]


_ORIGINAL = "original_max_position_embeddings"
_KINDS: dict[type, _Kind] = {
    Plain: _Kind("default", frozenset(), lambda json, positions: Plain(), lambda s: {}),
    Linear: _Kind(
        "linear", frozenset({"factor"}), lambda json, positions: Linear(json["factor"]), lambda s: {"factor": s.factor}
    ),
    Dynamic: _Kind("dynamic", frozenset({"factor", _ORIGINAL}), _dynamic, lambda s: {"factor": s.factor}),
    Llama3: _Kind(
        "llama3",
        frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}),
        _llama3,
        lambda s: {
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            _ORIGINAL: s.original_positions,
        },
    ),
    Yarn: _Kind(
        "yarn",
        frozenset(
            {"factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim", _ORIGINAL}
        ),
        _yarn,
        lambda s: {
            "factor": s.factor,
            _ORIGINAL: s.original_positions,
            "beta_fast": s.beta_fast,
            "beta_slow": s.beta_slow,
            "truncate": s.truncate,
            "attention_factor": s.amplitude,
        },
    ),
}
_BY_NAME = {kind.name: kind for kind in _KINDS.values()}
_ALWAYS = frozenset({"rope_theta", "rope_type", "type"})


def parse(json: Json, *, default_theta: float, max_positions: int, where: str) -> RopeConfig:
    """One rope dictionary (either spelling) as a `RopeConfig`; `where` names the field in errors.

    Raises:
      UsageError: an unknown rope_type, a key this type does not have, or a missing one.
    """
    name = json.get("rope_type") or json.get("type") or "default"
    if name not in _BY_NAME:
        raise UsageError(f"{where}: rope_type {name!r} is not implemented; known: {', '.join(sorted(_BY_NAME))}.")
    kind = _BY_NAME[name]
    partial = json.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise UsageError(f"{where}: partial_rotary_factor {partial} is not implemented (only whole heads are rotated).")
    surplus = {key for key in json if json[key] is not None} - kind.keys - _ALWAYS - {"partial_rotary_factor"}
    if surplus:
        raise UsageError(
            f"{where}: rope_type {name!r} has no {', '.join(sorted(surplus))}; remove it or fix rope_type."
        )
    for key, value in json.items():
        if key not in ("rope_type", "type") and value is not None and not isinstance(value, int | float):
            raise UsageError(f"{where}: the key {key!r} has the value {value!r} of type {type(value).__name__}.")
    try:
        scaling = kind.read(json, max_positions)
    except KeyError as error:
        raise UsageError(f"{where}: rope_type {name!r} needs the key {error.args[0]!r}.") from None
    return RopeConfig(float(json.get("rope_theta") or default_theta), scaling)


def write(rope: RopeConfig) -> dict[str, Any]:
    """The `rope_parameters` dictionary of transformers 5; without `rope_theta` it is `rope_scaling` of 4.

    Raises:
      UsageError: transformers has no such scaling.
    """
    kind = _KINDS.get(type(rope.scaling))
    if kind is None:
        raise UsageError(f"transformers has no rotary embedding like {rope.scaling!r}.")
    fields = {key: value for key, value in kind.write(rope.scaling).items() if value is not None}
    return {"rope_type": kind.name, "rope_theta": rope.theta, **fields}
