"""config.json to `TransformerConfig` and back. The table of fields is `families.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from kvjax.attention.rope import RopeConfig
from kvjax.errors import UsageError, nearest
from kvjax.models.config import TransformerConfig
from kvjax.models.huggingface import latent
from kvjax.models.huggingface import rope as rope_json
from kvjax.models.huggingface.families import ACTIVATIONS, FAMILIES, HARMLESS, NEUTRAL, SAME, Family, Json

_SLIDING, _FULL = "sliding_attention", "full_attention"
_TYPES: Mapping[str, tuple[type, ...]] = (
    dict.fromkeys((*SAME, "sliding_window", "max_window_layers", "sliding_window_pattern"), (int,))
    | dict.fromkeys(("rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping"), (int, float))
    | dict.fromkeys(("query_pre_attn_scalar", "rope_theta", "rope_local_base_freq"), (int, float))
    | dict.fromkeys(
        ("tie_word_embeddings", "mlp_bias", "attention_bias", "use_sliding_window", "rope_interleave"), (bool,)
    )
    | dict.fromkeys(latent.SIZES, (int,))
    | dict.fromkeys(("hidden_act", "hidden_activation"), (str,))
    | {"layer_types": (list,), "rope_scaling": (dict,), "rope_parameters": (dict,)}
)
# Where null says "none" and does not stand for the default, which is a number.
_NULLABLE = frozenset({"sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "q_lora_rank"})
_TEXT_OF = {"gemma3": "gemma3_text"}  # multimodal model_type -> the model_type of its text_config


def text_fields(json: Json) -> dict[str, Any]:
    """The fields of the text model: `json` itself, or the `text_config` of a multimodal one."""
    inner = _TEXT_OF.get(str(json.get("model_type")))
    if inner is None:
        return dict(json)
    fields = {"model_type": inner} | (json.get("text_config") or {})
    for name in ("tie_word_embeddings", "quantization_config"):
        outer = json.get(name)
        if outer is not None and fields.get(name) not in (None, outer):
            raise UsageError(f"config.json: {name} is {outer!r}, but {fields[name]!r} in text_config; make them agree.")
        fields[name] = fields.get(name) if outer is None else outer
    if fields.get("final_logit_softcapping") is not None:
        raise UsageError(
            "config.json: final_logit_softcapping in the text_config of a multimodal model is refused: transformers "
            "applies it in the text-only class and not in the multimodal one; set it to null."
        )
    return fields


def read_config(json: Json, *, assume_harmless: Collection[str] = ()) -> TransformerConfig:
    """The model that a config.json describes.

    Args:
      json: the parsed file, in the spelling of transformers 4 or 5.
      assume_harmless: names of fields that the caller knows not to change the logits.

    Raises:
      UsageError: an unknown architecture, or a field that would change the logits and is not implemented.
    """
    given = text_fields(json)
    family = _family(given)
    _refuse_others(family, given, assume_harmless)
    fields = dict(family.honoured)
    fields |= {
        name: given[name] for name in fields.keys() & given.keys() if given[name] is not None or name in _NULLABLE
    }
    _check_types(fields)
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or fields["num_attention_heads"]
    fields["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    rope, local_rope = _ropes(family, fields)
    values: dict[str, Any] = {ours: fields[theirs] for theirs, ours in SAME.items() if theirs in fields}
    values |= {"rope": rope, "local_rope": local_rope, "windows": _windows(family, fields)}
    values["activation"] = _activation(family, fields)
    if "attention_bias" in fields:
        values |= {"qkv_bias": fields["attention_bias"], "output_bias": fields["attention_bias"]}
    if "query_pre_attn_scalar" in fields:
        values["attention_scale"] = fields["query_pre_attn_scalar"] ** -0.5
    if family.scales_embeddings:
        values["embed_scale"] = fields["hidden_size"] ** 0.5
    values |= family.read_attention(fields)
    return TransformerConfig(**values, **family.implied)


def _family(fields: Json) -> Family:
    model_type = str(fields.get("model_type") or "")
    if model_type not in FAMILIES:
        known = [*FAMILIES, *_TEXT_OF]
        raise UsageError(f"config.json: model_type {model_type!r} is not implemented. {nearest(model_type, known)}")
    family = FAMILIES[model_type]
    named = fields.get("architectures") or [family.architecture]
    if family.architecture not in named:
        raise UsageError(
            f"config.json: architecture {named[0]!r} of model_type {model_type!r} is not implemented, "
            f"only {family.architecture!r} (a decoder with a language-model head)."
        )
    return family


def _refuse_others(family: Family, fields: Json, assume_harmless: Collection[str]) -> None:
    for name, value in fields.items():
        if name in family.honoured or name in HARMLESS | family.harmless or name in assume_harmless:
            continue
        if value is None or value in NEUTRAL.get(name, ()):
            continue
        raise UsageError(
            f"config.json: the field {name!r} = {value!r} is not implemented for model_type {family.model_type!r}. "
            f"If it does not change the logits, load with assume_harmless=[{name!r}]."
        )


def _check_types(fields: Json) -> None:
    """Refuses text where a number is expected, and so on: a wrong type would fail far from its cause."""
    for name, value in fields.items():
        kind = _TYPES.get(name)
        if kind is None or value is None:
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            raise UsageError(f"config.json: the field {name!r} has the value {value!r} of type {type(value).__name__}.")


def _activation(family: Family, fields: Json) -> str:
    name = fields[family.activation_field]
    if name not in ACTIVATIONS:
        raise UsageError(
            f"config.json: {family.activation_field} {name!r} is not implemented. {nearest(name, ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _windows(family: Family, fields: Json) -> tuple[int | None, ...]:
    layers = fields["num_hidden_layers"]
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = [_SLIDING if family.slides(layer, fields) else _FULL for layer in range(layers)]
    if len(kinds) != layers:
        raise UsageError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers.")
    unknown = set(kinds) - {_SLIDING, _FULL}
    if unknown:
        raise UsageError(
            f"config.json: layer_types {sorted(unknown)} are not implemented, only {_FULL} and {_SLIDING}."
        )
    if _SLIDING not in kinds:
        return ()
    window = fields["sliding_window"] if fields.get("use_sliding_window", True) else None
    if window is None:
        raise UsageError("config.json: some layers are sliding_attention, but sliding_window is null or switched off.")
    return tuple(window if kind == _SLIDING else None for kind in kinds)


def _ropes(family: Family, fields: Json) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary embedding of the layers, and that of the windowed layers where the family has one of their own."""
    new, old = fields["rope_parameters"], fields["rope_scaling"]
    positions = fields["max_position_embeddings"]

    def parse(json: Json, where: str, theta: float) -> RopeConfig:
        return rope_json.parse(json, default_theta=theta, max_positions=positions, where=f"config.json: {where}")

    theta = fields["rope_theta"] or family.default_theta
    old_rope = parse(old or {}, "rope_scaling", theta)
    old_local = RopeConfig(float(fields.get("rope_local_base_freq") or family.default_local_theta))
    if new is None:
        return old_rope, old_local if family.local_rope else None
    nested = {key: value for key, value in new.items() if isinstance(value, Mapping)}
    if nested and not family.local_rope:
        raise UsageError(
            f"config.json: rope_parameters per layer type are not implemented for model_type {family.model_type!r}."
        )
    if nested:
        rope = parse(nested.get(_FULL, {}), f"rope_parameters.{_FULL}", theta)
        local = parse(nested.get(_SLIDING, {}), f"rope_parameters.{_SLIDING}", old_local.theta)
    elif family.local_rope:
        raise UsageError(f"config.json: rope_parameters must hold the keys {_FULL!r} and {_SLIDING!r}, got {new!r}.")
    else:
        rope, local = parse(new, "rope_parameters", theta), None
    if old is not None and old_rope.scaling != rope.scaling:
        raise UsageError("config.json: rope_scaling and rope_parameters disagree; keep the one that is right.")
    return rope, local


def write_config(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """The config.json of the first family that computes exactly what `config` does, readable by transformers 4 and 5.

    Raises:
      UsageError: no family can; the message names what stands in the way in the nearest one.
    """
    misfits: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        try:
            json = _write(family, config, dtype)
            differing = _differences(read_config(json), config)
        except UsageError as error:
            json, differing = {}, [str(error)]
        if not differing:
            return json
        misfits[family.model_type] = differing
    nearest_family = min(misfits, key=lambda name: len(misfits[name]))
    raise UsageError(
        f"no Hugging Face family computes this config; the nearest, {nearest_family!r}, "
        f"differs in {', '.join(misfits[nearest_family])}."
    )


def _write(family: Family, config: TransformerConfig, dtype: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    fields |= {theirs: getattr(config, ours) for theirs, ours in SAME.items() if theirs in family.honoured}
    fields[family.activation_field] = next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)
    if config.activation == "gelu_tanh":
        fields[family.activation_field] = "gelu_pytorch_tanh"
    if "attention_bias" in family.honoured:
        fields["attention_bias"] = config.qkv_bias
    if "query_pre_attn_scalar" in family.honoured:
        fields["query_pre_attn_scalar"] = round(config.scale**-2)
    fields |= _write_windows(family, config) | _write_ropes(family, config)
    fields |= family.write_attention(config, fields)
    return fields | {"torch_dtype": dtype, "dtype": dtype, "use_cache": True}


def _write_windows(family: Family, config: TransformerConfig) -> dict[str, Any]:
    if "sliding_window" not in family.honoured:
        return {}
    windows = [config.window_of(layer) for layer in range(config.num_layers)]
    window = next((size for size in windows if size is not None), None)
    fields: dict[str, Any] = {"sliding_window": window}
    if "use_sliding_window" in family.honoured:
        fields["use_sliding_window"] = window is not None
        fields["max_window_layers"] = next((layer for layer, size in enumerate(windows) if size), config.num_layers)
    if "layer_types" in family.honoured:
        fields["layer_types"] = [_FULL if size is None else _SLIDING for size in windows]
    return fields


def _write_ropes(family: Family, config: TransformerConfig) -> dict[str, Any]:
    rope = rope_json.write(config.rope or RopeConfig())
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    fields: dict[str, Any] = {"rope_theta": rope["rope_theta"], "rope_parameters": rope}
    fields["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    if family.local_rope:
        local = rope_json.write(config.local_rope or config.rope or RopeConfig())
        fields |= {"rope_local_base_freq": local["rope_theta"], "rope_parameters": {_FULL: rope, _SLIDING: local}}
    return fields


def _canonical(config: TransformerConfig) -> TransformerConfig:
    """The same function of the tokens, written in one way, so that two configs can be compared."""
    windows = tuple(config.window_of(layer) for layer in range(config.num_layers))
    group = config.num_heads // config.num_kv_heads
    in_order = config.kv_head_of_query == tuple(head // group for head in range(config.num_heads))
    return dataclasses.replace(
        config,
        attention=config.attention.spelled_out(config.attention_config(0)),
        windows=windows,
        attention_scale=config.scale,
        local_rope=(config.local_rope or config.rope) if any(windows) else config.rope,
        kv_head_of_query=None if in_order else config.kv_head_of_query,
        kv_layers=() if len(config.owners) == config.num_layers else config.kv_layers,
    )


def _differences(one: TransformerConfig, other: TransformerConfig) -> list[str]:
    """Names of the fields in which two configs compute differently, with both values."""
    left, right = _canonical(one), _canonical(other)
    names = [field.name for field in dataclasses.fields(TransformerConfig)]
    pairs = [(name, getattr(left, name), getattr(right, name)) for name in names]
    return [f"{name} (there {a!r}, here {b!r})" for name, a, b in pairs if a != b]
