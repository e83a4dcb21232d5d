"""Sliding windows in config.json: one for all layers, or chosen by layer."""

from collections.abc import Iterable
from typing import Any

from conversions.hf.config_fields import ConfigFields
from conversions.hf.family import Windows
from fastjax.models.transformer_config import TransformerConfig

_KINDS = ("full_attention", "sliding_attention")


def one_window(fields: ConfigFields, layers: int) -> Windows:
    """Returns the window that all layers share."""
    return (fields.optional_integer("sliding_window"),)


def one_window_keys(config: TransformerConfig) -> dict[str, Any]:
    """Returns the keys that `one_window` reads."""
    return {"sliding_window": config.windows[0]}


def windows_by_layer(fields: ConfigFields, layers: int) -> Windows:
    """Returns the window of each layer: `layer_types`, or layers after a border."""
    window = None
    if fields.flag("use_sliding_window"):
        window = fields.optional_integer("sliding_window")
    if fields.get("layer_types") is None:
        border = fields.integer("max_window_layers", minimum=0)
        return _shortest(window if i >= border else None for i in range(layers))
    return _typed(fields, layers, window)


def windows_between(fields: ConfigFields, layers: int) -> Windows:
    """Returns the window of each layer: `layer_types`, or all but every n-th slide.

    The n is `sliding_window_pattern`.
    """
    window = fields.optional_integer("sliding_window")
    if fields.get("layer_types") is None:
        n = fields.integer("sliding_window_pattern")
        return _shortest(window if (i + 1) % n else None for i in range(layers))
    return _typed(fields, layers, window)


def windows_between_keys(config: TransformerConfig) -> dict[str, Any]:
    """Returns the keys that `windows_between` reads."""
    keys = windows_by_layer_keys(config)
    return {key: keys[key] for key in ("sliding_window", "layer_types")}


def _typed(fields: ConfigFields, layers: int, window: int | None) -> Windows:
    """Returns the window of each layer by its entry in `layer_types`."""
    kinds = fields.get("layer_types")
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in _KINDS for kind in kinds)
    ):
        raise fields.error(
            "layer_types", f"{layers} entries, each one of: {', '.join(_KINDS)}"
        )
    if window is None and _KINDS[1] in kinds:
        raise fields.error(
            "layer_types",
            "full_attention everywhere, because use_sliding_window or "
            "sliding_window is off",
        )
    return _shortest(window if kind == _KINDS[1] else None for kind in kinds)


def _shortest(windows: Iterable[int | None]) -> Windows:
    every = tuple(windows)
    return every if len(set(every)) > 1 else every[:1]


def windows_by_layer_keys(config: TransformerConfig) -> dict[str, Any]:
    """Returns the keys that `windows_by_layer` reads."""
    windows = config.windows
    sizes = [window for window in windows if window is not None]
    full = next((i for i, window in enumerate(windows) if window), len(windows))
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": sizes[0] if sizes else None,
        "max_window_layers": full,
        "layer_types": [_KINDS[window is not None] for window in windows],
    }
