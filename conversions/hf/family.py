"""What a family's file says: its tensors and how its config.json is read."""

import dataclasses
from collections.abc import Callable
from typing import Any

from conversions.hf.config_fields import ConfigFields
from conversions.rules import WeightRule
from fastjax.models.transformer_config import TransformerConfig

Windows = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Checkpoint format of one `model_type`.

    Attributes:
      architecture: Class name that Hugging Face writes into config.json.
      rules: Every tensor that a checkpoint may hold.
      defaults: Values of keys that config.json may leave out.
      switches: Reads which biases and norms exist.
      windows: Reads the sliding windows from the keys and the number of layers.
      keys: Keys of config.json that only this family writes.
    """

    architecture: str
    rules: tuple[WeightRule, ...]
    defaults: dict[str, Any]
    switches: Callable[[ConfigFields], dict[str, bool]]
    windows: Callable[[ConfigFields, int], Windows]
    keys: Callable[[TransformerConfig], dict[str, Any]]
