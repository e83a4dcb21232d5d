"""The presets that users call by name."""

import difflib

from fastjax.errors import ConfigError
from fastjax.models import (
    gemma2,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    relatives,
    smollm,
)
from fastjax.models.preset import Preset

PRESETS: dict[str, Preset] = (
    llama.PRESETS
    | mistral.PRESETS
    | qwen2.PRESETS
    | qwen3.PRESETS
    | gemma2.PRESETS
    | phi3.PRESETS
    | granite.PRESETS
    | olmo2.PRESETS
    | smollm.PRESETS
    | relatives.PRESETS
)


def preset(name: str) -> Preset:
    """Returns the preset of that name, in any case.

    Raises:
      ConfigError: There is none; it lists the nearest names.
    """
    found = PRESETS.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.4)
        raise ConfigError(
            f"no preset is called {name!r}",
            fix=f"did you mean {', '.join(near)}?" if near else "see `fastjax models`",
        )
    return found
