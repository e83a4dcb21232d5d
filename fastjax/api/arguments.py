"""`TrainingArguments` and `SFTConfig`: Hugging Face's names for a `TrainConfig`."""

from typing import Any

from fastjax.flat_config import flat_values, train_config


class TrainingArguments:
    """Settings of a run by the names of Hugging Face's class of this name.

    Takes every flag of `fastjax train` and its aliases; what is left out has
    fastjax's default. `config` is the checked result.

    Attributes:
      config: The settings.
      given: Canonical names of what the caller set.
      notes: What was translated or has no effect, one sentence each.

    Raises:
      ConfigError: Names every unknown field and every value that cannot be.
    """

    def __init__(self, output_dir: str = "outputs", **fields: Any) -> None:
        read = train_config({"output_dir": output_dir, **fields})
        self.config, self.given, self.notes = read.config, read.given, read.notes

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
