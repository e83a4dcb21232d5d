"""What a family's file says: its tensors and how its config.json is read."""

import dataclasses
from collections.abc import Callable
from typing import Any

from conversions.hf.config_fields import ConfigFields
from conversions.hf.rope import one_rope, one_rope_keys
from conversions.rules import WeightRule
from fastjax.models.transformer_config import TransformerConfig
from fastjax.rope_config import RopeConfig

Windows = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Checkpoint format of one `model_type`.

    Attributes:
      architecture: Class name that Hugging Face writes into config.json.
      rules: Every tensor that a checkpoint may hold.
      defaults: Values of keys that config.json may leave out.
      switches: Reads what is this family's own: biases, norms, factors.
      keys: Keys of config.json that only this family writes.
      windows: Reads the sliding windows from the keys and the number of layers.
      ropes: Reads the rotary positions.
      rope_keys: Keys of config.json with the rotary positions.
      activation_key: Key of the feed-forward network's activation.
    """

    architecture: str
    rules: tuple[WeightRule, ...]
    defaults: dict[str, Any]
    switches: Callable[[ConfigFields], dict[str, Any]] = lambda fields: {}
    keys: Callable[[TransformerConfig], dict[str, Any]] = lambda config: {}
    windows: Callable[[ConfigFields, int], Windows] = lambda fields, layers: (None,)
    ropes: Callable[[ConfigFields], dict[str, RopeConfig]] = one_rope
    rope_keys: Callable[[TransformerConfig], dict[str, Any]] = one_rope_keys
    activation_key: str = "hidden_act"
