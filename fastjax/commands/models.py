"""`fastjax models`: the presets."""

import dataclasses
import sys

from fastjax.cli_flags import Call, parsed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelsArgs:
    """Lists the presets: name, family, hub id."""


def run(call: Call) -> None:
    """Prints a line for each preset."""
    parsed(ModelsArgs, call)
    from fastjax.models.registry import PRESETS

    for name, preset in sorted(PRESETS.items()):
        source = preset.hub_id or "random weights (no download)"
        sys.stdout.write(f"{name:28} {preset.config.family:12} {source}\n")
