"""Flat names and values, from YAML, flags or Python, to the nested `TrainConfig`.

Hugging Face's names are canonical; the names that other tools use are aliases. Values
that come as text are read by the type of their field.
"""

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastjax.config import TrainConfig
from fastjax.errors import ConfigError, printable

ALIASES = {
    "model_name_or_path": "model",
    "model_name": "model",
    "base_model": "model",
    "model_id": "model",
    "revision": "model_revision",
    "data": "dataset_name",
    "dataset": "dataset_name",
    "train_file": "dataset_name",
    "validation_file": "eval_dataset_name",
    "format_type": "data_format",
    "out": "output_dir",
    "out_dir": "output_dir",
    "adapter_path": "output_dir",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "iters": "max_steps",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "warmup_ratio": "warmup_steps",
    "clip_grad_norm": "max_grad_norm",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
    "torch_dtype": "dtype",
    "sample_packing": "packing",
    "packed": "packing",
    "chat_template": "chat_template_path",
    "template": "chat_template_path",
    "val_size": "val_set_size",
    "steps_per_eval": "eval_steps",
    "steps_per_report": "logging_steps",
    "save_every": "save_steps",
    "resume": "resume_from_checkpoint",
    "random_state": "seed",
    "random_seed": "seed",
}

_REMAT = {
    "True": "attention",
    "true": "attention",
    "False": "none",
    "false": "none",
    "full": "layer",
    "unsloth": "layer",
}
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
}
_EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit")
_SWITCHES = {
    "bf16": ("dtype", "bfloat16"),
    "fp16": ("dtype", "float16"),
    "assistant_only_loss": ("train_on", "assistant"),
    "completion_only_loss": ("train_on", "completion"),
}
_REFUSED = {
    "trust_remote_code": "fastjax runs no code from model repositories",
    "push_to_hub": "this version does not push; use `hf upload` on the output folder",
}


def train_config(
    flat: Mapping[str, Any], *, base: TrainConfig | None = None
) -> tuple[TrainConfig, list[str]]:
    """Returns the configuration of flat names and values, and notes on what changed.

    Args:
      flat: Canonical names or aliases to values; text is read by the field's type.
      base: Values of what `flat` leaves out.

    Raises:
      ConfigError: Names every unknown field, with the nearest name, and every value
        that its field refuses.
    """
    notes: list[str] = []
    named = dict(_canonical(name, value, notes) for name, value in flat.items())
    named.pop("", None)
    hints = field_types()
    problems = [
        unknown_field(name) for name in named if name not in hints and name != ""
    ]
    values = {}
    for name, value in named.items():
        if name not in hints:
            continue
        try:
            values[name] = coerced(name, value, hints[name])
        except ConfigError as error:
            problems.append(error.what)
    if problems:
        raise ConfigError("; ".join(problems), fix="`fastjax train --help` lists all")
    return _replaced(base or TrainConfig(), values), notes


def flat_values(config: TrainConfig) -> dict[str, Any]:
    """Returns every field of `config` by its flat name, as YAML can hold it."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= {
                part.name: getattr(value, part.name)
                for part in dataclasses.fields(value)
            }
        else:
            values[field.name] = value
    names = field_types()
    plain = {name: value for name, value in values.items() if name in names}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in plain.items()
    }


def field_types() -> dict[str, Any]:
    """Returns the type of every flat field; implementations are not flat fields."""
    hints: dict[str, Any] = {}
    for name, kind in get_type_hints(TrainConfig).items():
        if name == "implementations":
            continue
        if dataclasses.is_dataclass(kind):
            hints |= get_type_hints(kind)
        else:
            hints[name] = kind
    return hints


def unknown_field(name: str) -> str:
    """Returns the sentence that names the nearest field or alias."""
    known = [*field_types(), *ALIASES]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"there is no field {printable(name)!r}{hint}"


def coerced(name: str, value: Any, kind: Any) -> Any:
    """Returns `value` as the type of its field, reading text where it must.

    Raises:
      ConfigError: The value is no such thing.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _coerced_union(name, value, get_args(kind))
    if origin is Literal:
        if value in get_args(kind):
            return value
        allowed = ", ".join(map(str, get_args(kind)))
        raise ConfigError(f"{name}={printable(value)!r} must be one of: {allowed}")
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{name}={printable(value)!r} must be a list")
        return tuple(coerced(name, item, get_args(kind)[0]) for item in items)
    if kind is bool:
        return _boolean(name, value)
    if kind is str:
        if isinstance(value, str | Path):
            return str(value)
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        return _number(name, value, kind)
    raise ConfigError(f"{name}={printable(value)!r} must be a {kind.__name__}")


def _canonical(name: str, value: Any, notes: list[str]) -> tuple[str, Any]:
    """Returns the canonical name and value; an empty name means nothing to set."""
    name = name.replace("-", "_")
    name = ALIASES.get(name, name)
    if name in _REFUSED and value not in (False, "False", "false", None):
        raise ConfigError(f"{name} is not supported: {_REFUSED[name]}")
    if name in _REFUSED or (name == "report_to" and value in ("none", None, [])):
        return "", None
    if name == "report_to":
        raise ConfigError(
            f"report_to={printable(value)!r} is not supported",
            fix="use none: metrics.jsonl in the output folder holds every number",
        )
    if name in _SWITCHES:
        target, meaning = _SWITCHES[name]
        return (target, meaning) if _boolean(name, value) else ("", None)
    if name in ("gradient_checkpointing", "activation_checkpointing"):
        return "remat", _REMAT.get(str(value), value)
    if name == "optim" and value in _EIGHT_BIT:
        notes.append(f"optim={value}: runs as adamw with float32 states")
        return "optim", "adamw"
    if name == "optim":
        return "optim", _OPTIMIZERS.get(str(value), value)
    if name == "eval_strategy":
        return ("eval_steps", 0) if value == "no" else ("", None)
    if name == "lora_target_modules" and re.fullmatch(r"[\w.]+(,[\w.]+)+", str(value)):
        return name, tuple(str(value).split(","))
    return name, value


def _coerced_union(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, str) and value.lower() in ("none", "null"):
        value = None if type(None) in kinds else value
        if value is None:
            return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if isinstance(value, list | tuple):
        kinds = tuple(kind for kind in kinds if get_origin(kind) is tuple) or kinds
    return coerced(name, value, kinds[0])


def _boolean(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    if str(value).lower() in words:
        return words[str(value).lower()]
    raise ConfigError(f"{name}={printable(value)!r} must be true or false")


def _number(name: str, value: float | str, kind: type) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"{name}={printable(value)!r} must be a number") from None
    if kind is float:
        return number
    if number != int(number):
        raise ConfigError(f"{name}={value!r} must be a whole number")
    return int(number)


def _replaced(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        part = getattr(config, field.name)
        if not dataclasses.is_dataclass(part) or isinstance(part, type):
            continue
        inside = {f.name for f in dataclasses.fields(part)} & set(values)
        if inside and field.name != "implementations":
            changes = {name: values.pop(name) for name in inside}
            parts[field.name] = dataclasses.replace(part, **changes)
    return dataclasses.replace(config, **parts, **values)
