"""Rotary positions in config.json, in the keys of transformers 4 and of 5."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, get_args

from conversions.hf.config_fields import ConfigFields
from fastjax.models.transformer_config import TransformerConfig
from fastjax.rope_config import RopeConfig, RopeKind, yarn_attention_factor

DEFAULT_THETA = 10000.0

_KINDS = tuple(kind for kind in get_args(RopeKind) if kind != "none")
_CONTEXT, _TRAINED = "max_position_embeddings", "original_max_position_embeddings"
_SHARE = "partial_rotary_factor"
_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor")
_FULL, _SLIDING = "full_attention", "sliding_attention"


def one_rope(fields: ConfigFields) -> dict[str, RopeConfig]:
    """Returns the rotary positions that all layers share."""
    return {"rope": parse_rope(fields)}


def one_rope_keys(config: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of both versions of transformers for the same positions.

    transformers 4 reads a file of 5 without complaint, and wrongly.
    """
    rope = config.rope
    keys: dict[str, Any] = {
        "rope_theta": rope.theta,
        "rope_scaling": _scaling(rope),
        "rope_parameters": _parameters(rope),
    }
    if rope.rotary_share != 1.0:
        keys[_SHARE] = rope.rotary_share
    if rope.kind == "longrope":
        keys[_TRAINED] = rope.original_max_position_embeddings
    return keys


def ropes_by_attention(
    local_theta: float | None = None,
) -> Callable[[ConfigFields], dict[str, RopeConfig]]:
    """Returns a reader of one RoPE for full and one for sliding attention.

    transformers 4 stretches full attention only; its sliding layers have the base
    `rope_local_base_freq`.

    Args:
      local_theta: Base of sliding layers where the file has none; None takes that of
        full attention.
    """

    def parse(fields: ConfigFields) -> dict[str, RopeConfig]:
        new = fields.section("rope_parameters")
        if new is None or not {_FULL, _SLIDING} & new.values.keys():
            rope = parse_rope(fields)
            base = fields.values.get("rope_local_base_freq") or local_theta
            return {"rope": rope, "local_rope": RopeConfig(theta=base or rope.theta)}
        theta = fields.get("rope_theta") or DEFAULT_THETA
        sections = [new.section(key) for key in (_FULL, _SLIDING)]
        thetas = (theta, local_theta or theta)
        full, sliding = (
            RopeConfig(theta=default)
            if section is None
            else _section(section, fields, default)
            for section, default in zip(sections, thetas, strict=True)
        )
        _check_old_keys(fields, full)
        return {"rope": full, "local_rope": sliding}

    return parse


def ropes_by_attention_keys(config: TransformerConfig) -> dict[str, Any]:
    """Returns the keys that `ropes_by_attention` reads, of both versions."""
    local = config.local_rope or config.rope
    keys = one_rope_keys(config)
    keys["rope_local_base_freq"] = local.theta
    keys["rope_parameters"] = {
        _FULL: _parameters(config.rope),
        _SLIDING: _parameters(local),
    }
    return keys


def parse_rope(fields: ConfigFields) -> RopeConfig:
    """Returns the rotary positions of a config.json.

    transformers 5 writes `rope_parameters`, 4 writes `rope_theta` and `rope_scaling`.
    Files may hold both, if they agree.

    Raises:
      ModelError: A kind or number is not supported, or the two disagree.
    """
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    theta = DEFAULT_THETA
    if fields.get("rope_theta") is not None:
        theta = fields.number("rope_theta")
    sections = [section for section in (new, old) if section is not None]
    if not sections:
        empty = ConfigFields({}, where=fields.where)
        return _section(empty, fields, theta)
    found = _section(sections[0], fields, theta)
    if new is not None:
        _check_old_keys(fields, found)
    return found


def _check_old_keys(fields: ConfigFields, found: RopeConfig) -> None:
    """Raises when the keys of transformers 4 are there too and say something else."""
    others = []
    theta = found.theta
    if fields.values.get("rope_theta") is not None:
        theta = fields.number("rope_theta")
        others.append(dataclasses.replace(found, theta=theta))
    old = fields.section("rope_scaling")
    if old is not None:
        others.append(_section(old, fields, theta))
    if any(rope != found for rope in others):
        raise fields.error("rope_parameters", "the same as rope_theta and rope_scaling")


def _section(section: ConfigFields, fields: ConfigFields, theta: float) -> RopeConfig:
    """Returns what one object of config.json says; `fields` is the whole file."""
    key = "rope_type" if "rope_type" in section.values else "type"
    context = fields.get(_CONTEXT)
    defaults = {
        key: "default",
        "rope_theta": theta,
        _SHARE: fields.get(_SHARE),
        _TRAINED: fields.values.get(_TRAINED, context),
        "beta_fast": 32,
        "beta_slow": 1,
        "truncate": True,
        "attention_factor": None,
    }
    section = ConfigFields(section.values, where=section.where, defaults=defaults)
    named = section.get(key)
    # The first Phi-3 files call longrope "su"; some have "yarn" with its factors.
    if named == "su" or (named == "yarn" and "long_factor" in section.values):
        section.values = {**section.values, key: "longrope"}
    kind = section.choice(key, _KINDS)
    share = section.get(_SHARE)
    plain = RopeConfig(
        theta=section.number("rope_theta"),
        rotary_share=1.0 if share is None else section.number(_SHARE),
    )
    if plain.rotary_share > 1:
        raise section.error(_SHARE, "at most 1")
    if kind == "default":
        return plain
    return dataclasses.replace(plain, kind=kind, **_stretch(kind, section, fields))


def _stretch(
    kind: str, section: ConfigFields, fields: ConfigFields
) -> dict[str, float | int | bool | tuple[float, ...]]:
    if kind == "longrope":
        return _longrope(section, fields)
    factor = section.number("factor")
    if factor < 1:
        raise section.error("factor", "at least 1")
    if kind == "linear":
        return {"factor": factor}
    if kind == "dynamic":
        trained = fields.integer(_CONTEXT)
        return {"factor": factor, _TRAINED: trained}
    trained = section.integer(_TRAINED)
    if kind == "llama3":
        low, high = (section.number(key) for key in _LLAMA3_KEYS)
        if low >= high:
            raise section.error("low_freq_factor", "below high_freq_factor")
        return {
            "factor": factor,
            _TRAINED: trained,
            "low_freq_factor": low,
            "high_freq_factor": high,
        }
    return {
        "factor": factor,
        _TRAINED: trained,
        "beta_fast": section.number("beta_fast"),
        "beta_slow": section.number("beta_slow"),
        "truncate": section.flag("truncate"),
        "attention_factor": _yarn_attention_factor(section, factor),
    }


def _yarn_attention_factor(section: ConfigFields, factor: float) -> float:
    if section.get("attention_factor") is not None:
        return section.number("attention_factor")
    values = section.values
    if values.get("mscale") and values.get("mscale_all_dim"):
        above, below = (
            yarn_attention_factor(factor, section.number(key))
            for key in ("mscale", "mscale_all_dim")
        )
        return above / below
    return yarn_attention_factor(factor)


def _longrope(
    section: ConfigFields, fields: ConfigFields
) -> dict[str, float | int | bool | tuple[float, ...]]:
    trained = section.integer(_TRAINED)
    factor = fields.integer(_CONTEXT) / trained
    if section.values.get("factor") is not None:
        factor = section.number("factor")
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    if section.get("attention_factor") is not None:
        scale = section.number("attention_factor")
    return {
        "factor": factor,
        _TRAINED: trained,
        "attention_factor": scale,
        "short_factors": section.numbers("short_factor"),
        "long_factors": section.numbers("long_factor"),
    }


def _parameters(rope: RopeConfig) -> dict[str, Any]:
    """Returns an object of `rope_parameters`, as transformers 5 writes it."""
    values: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.rotary_share != 1.0:
        values[_SHARE] = rope.rotary_share
    if rope.kind not in ("default", "longrope"):
        values["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        values[_TRAINED] = rope.original_max_position_embeddings
    if rope.kind in ("yarn", "longrope"):
        values["attention_factor"] = rope.attention_factor
    own: dict[str, tuple[str, ...]] = {
        "llama3": _LLAMA3_KEYS,
        "yarn": ("beta_fast", "beta_slow", "truncate"),
    }
    values |= {key: getattr(rope, key) for key in own.get(rope.kind, ())}
    if rope.kind == "longrope":
        values["short_factor"] = list(rope.short_factors)
        values["long_factor"] = list(rope.long_factors)
    return values


def _scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """Returns `rope_scaling`, as transformers 4 writes it."""
    if rope.kind == "default":
        return None
    values = _parameters(rope)
    left_out = ("rope_theta", _SHARE)
    if rope.kind == "longrope":
        # Its Phi-3 takes exactly three keys, and the others from the top level.
        values["type"] = values.pop("rope_type")
        left_out += (_TRAINED, "attention_factor")
    return {key: value for key, value in values.items() if key not in left_out}
