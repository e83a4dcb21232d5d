"""`TrainingArguments` and `SFTConfig`: Hugging Face's names for a `TrainConfig`."""

from typing import Any

from fastjax.config import TrainConfig
from fastjax.flat_config import flat_values, train_config


class TrainingArguments:
    """Settings of a run by the names of Hugging Face's class of this name.

    Takes every flag of `fastjax train` and its aliases; what is left out has
    fastjax's default. `config` is the checked result.

    Attributes:
      config: The settings.
      given: Names that the caller gave, after aliases.
      notes: Values that were translated, one sentence each.

    Raises:
      ConfigError: Names every unknown field and every value that cannot be.
    """

    def __init__(self, output_dir: str = "outputs", **fields: Any) -> None:
        flat = {"output_dir": output_dir, **fields}
        self.config, self.notes = train_config(flat)
        default = flat_values(TrainConfig())
        values = flat_values(self.config)
        self.given = frozenset(n for n in values if values[n] != default[n])

    def __getattr__(self, name: str) -> Any:
        """Returns a setting by its flat name."""
        if name.startswith("_") or name in ("config", "given", "notes"):
            raise AttributeError(name)
        values = flat_values(self.config)
        if name not in values:
            raise AttributeError(f"TrainingArguments has no field {name!r}")
        return values[name]


class SFTConfig(TrainingArguments):
    """The same with TRL's name; data fields such as `max_length` are among them."""
