"""Rotary positions in config.json, in the keys of transformers 4 and of 5."""

import dataclasses
from typing import Any, Literal, cast, get_args

from conversions.hf.config_fields import ConfigFields
from fastjax.models.transformer_config import RopeConfig

Kind = Literal["default", "linear", "llama3"]
DEFAULT_THETA = 10000.0


def parse_rope(fields: ConfigFields) -> RopeConfig:
    """Returns the rotary positions of a config.json.

    transformers 5 writes `rope_parameters`, 4 writes `rope_theta` and `rope_scaling`.
    Files may hold both, if they agree.

    Raises:
      ModelError: A kind or number is not supported, or the two disagree.
    """
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    theta = DEFAULT_THETA
    if fields.values.get("rope_theta") is not None:
        theta = fields.number("rope_theta")
    sections = [section for section in (fields, new, old) if section is not None]
    for section in sections:
        if section.values.get("partial_rotary_factor") not in (None, 1):
            raise section.error("partial_rotary_factor", "1.0; others are unsupported")
    found = [_stretched(section, theta) for section in sections[1:]]
    if not found:
        return RopeConfig(theta=theta)
    if new is not None and fields.values.get("rope_theta") is not None:
        found.append(dataclasses.replace(found[0], theta=theta))
    if any(rope != found[0] for rope in found):
        raise fields.error("rope_parameters", "the same as rope_theta and rope_scaling")
    return found[0]


def rope_keys(rope: RopeConfig) -> dict[str, Any]:
    """Returns the keys of both versions of transformers for the same positions.

    transformers 4 reads a file of 5 without complaint, and wrongly.
    """
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        for key in _LLAMA3_KEYS:
            scaling[key] = getattr(rope, key)
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": scaling | {"rope_theta": rope.theta},
    }


_LLAMA3_KEYS = (
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def _stretched(section: ConfigFields, theta: float) -> RopeConfig:
    key = "rope_type" if "rope_type" in section.values else "type"
    defaults = {key: "default", "rope_theta": theta}
    section = ConfigFields(section.values, where=section.where, defaults=defaults)
    kind = cast(Kind, section.choice(key, get_args(Kind)))
    theta = section.number("rope_theta")
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = section.number("factor")
    if factor < 1:
        raise section.error("factor", "at least 1")
    if kind == "linear":
        return RopeConfig(kind=kind, theta=theta, factor=factor)
    low, high = (section.number(k) for k in _LLAMA3_KEYS[:2])
    if low >= high:
        raise section.error("low_freq_factor", "below high_freq_factor")
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=section.integer(_LLAMA3_KEYS[2]),
    )
