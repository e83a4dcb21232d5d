"""A model that users call by name."""

import dataclasses

from fastjax.models.transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Sizes of a published model, and where its weights are.

    Attributes:
      hub_id: Repository on the Hugging Face hub; None when there is none.
      config: Its sizes.
    """

    hub_id: str | None
    config: TransformerConfig
