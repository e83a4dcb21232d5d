"""adapter_config.json -> LoRAConfig."""

import dataclasses
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from conversions.hf.config_fields import ConfigFields
from conversions.strict_json import read_json_object
from fastjax.config import (
    LoRABias,
    LoRAConfig,
    LoRAStart,
    Table,
    choices,
)
from fastjax.errors import ConfigError, ModelError, printable
from fastjax.target_modules import (
    adaptable_modules,
    ends_with_module,
    matched_modules,
)

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1_000_000

_EMBEDDING: Table = "embed_tokens"
# Keys that this reader obeys, or that say nothing about a finished adapter. Any other
# key with a value asks for something that the model cannot hold.
_KNOWN = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias"),
        *("ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode"),
        *("init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config"),
        *(
            "lora_alpha",
            "lora_bias",
            "lora_dropout",
            "megatron_core",
            "modules_to_save",
        ),
        *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
        *("revision", "runtime_config", "target_modules", "task_type"),
        *("trainable_token_indices", "use_dora", "use_rslora"),
    )
)
_DEFAULTS: dict[str, Any] = {
    "alpha_pattern": {},
    "base_model_name_or_path": None,
    "bias": "none",
    "ensure_weight_tying": False,
    "exclude_modules": None,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "rank_pattern": {},
    "revision": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}
# Other ways to start (PiSSA, OLoRA, CorDA) change the base weights as well.
_STARTS = ("gaussian", "eva", "orthogonal")
# How we note a start from what 4 bits lose: PEFT keeps it and does nothing.
LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}
_LAYER_LISTS = ((), ("layers",))
# Nested repetition can make a match take exponential time.
_NESTED_REPETITION = re.compile(r"[*+}]\??\)[*+{]")
_MAX_EXPRESSION = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """What adapter_config.json says.

    Attributes:
      lora: Kind of the adapter; its target modules still speak of the whole model.
      base_model_name_or_path: Folder or hub name of the base model, if recorded.
      revision: Of the base model, if recorded.
      excluded: Target that the target modules leave out.
      layers: Only these layers have adapters; None for all.
      layers_pattern: Names of the lists that `layers` counts in; empty for any.
      ties_tables: Of tied embeddings, both ends are trained as one table.
      where: The file.
    """

    lora: LoRAConfig
    base_model_name_or_path: str | None = None
    revision: str | None = None
    excluded: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    ties_tables: bool = False
    where: str = CONFIG_NAME

    def resolved(
        self, linears: Sequence[str], *, is_tied: bool = False
    ) -> tuple[LoRAConfig, tuple[str, ...]]:
        """Returns the adapter's kind and the full names of its modules.

        Target modules of the result match exactly these modules.

        Args:
          linears: Full names of the base's linears.
          is_tied: Its embeddings are its output head as well.

        Raises:
          ModelError: They match nothing.
        """
        target = self.lora.lora_target_modules
        names = adaptable_modules(target, linears, is_tied=is_tied)
        if isinstance(target, tuple):
            target = tuple(
                entry
                for entry in target
                if any(ends_with_module(name, entry) for name in names)
            )
        try:
            matched = matched_modules(target, names)
            if not matched:
                matched = matched_modules(self.lora.lora_target_modules, names)
        except ConfigError as error:
            raise ModelError(error.what, where=self.where, fix=error.fix) from error
        kept = tuple(name for name in matched if self._is_kept(name))
        if not kept:
            raise ModelError("no layer is left to adapt", where=self.where)
        lora = dataclasses.replace(self.lora, lora_target_modules=target)
        if kept != matched:
            is_by_layer = self.excluded is None and self.layers_pattern in _LAYER_LISTS
            lora = dataclasses.replace(
                lora,
                lora_target_modules=target if is_by_layer else kept,
                layers_to_transform=(self.layers or ()) if is_by_layer else (),
            )
        return lora, kept

    def check_tables(self, adapted: Collection[str], *, is_tied: bool) -> None:
        """Checks that trained tables are those of the base.

        Args:
          adapted: Our names of the modules with an adapter.
          is_tied: The base's embeddings are its output head as well.

        Raises:
          ModelError: PEFT trained one end of tied embeddings apart from the other.
        """
        trains = bool(self.lora.modules_to_save) or _EMBEDDING in adapted
        if is_tied and trains and not self.ties_tables:
            raise ModelError(
                "this adapter trains one end of tied embeddings without the other",
                where=self.where,
                fix="train it with ensure_weight_tying=true, or merge it with PEFT",
            )

    def _is_kept(self, name: str) -> bool:
        if isinstance(self.excluded, str) and re.fullmatch(self.excluded, name):
            return False
        if isinstance(self.excluded, tuple) and any(
            ends_with_module(name, entry) for entry in self.excluded
        ):
            return False
        if self.layers is None:
            return True
        lists = "|".join(map(re.escape, self.layers_pattern)) or r"[^.]*"
        found = re.match(rf".*\.(?:{lists})\.(\d+)\.", name)
        return found is not None and int(found[1]) in self.layers


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Returns what the adapter of a folder is.

    Raises:
      ModelError: A key is missing, wrong, or asks for what is not supported.
    """
    path = folder / CONFIG_NAME
    values = read_json_object(path, limit_bytes=MAX_CONFIG_BYTES)
    fields = ConfigFields(values, where=str(path), defaults=_DEFAULTS)
    fields.choice("peft_type", ("LORA",))
    if fields.get("task_type") is not None:
        fields.choice("task_type", ("CAUSAL_LM",))
    for key, value in values.items():
        if key not in _KNOWN and value:
            raise _unsupported(fields, key)
    start = fields.get("init_lora_weights")
    if type(start) is not bool and start not in _STARTS:
        raise _unsupported(fields, "init_lora_weights")
    try:
        return AdapterConfig(
            lora=_lora(fields),
            base_model_name_or_path=_text(fields, "base_model_name_or_path"),
            revision=_text(fields, "revision"),
            excluded=_target(fields, "exclude_modules"),
            layers=_layers(fields),
            layers_pattern=_names(fields, "layers_pattern"),
            ties_tables=fields.flag("ensure_weight_tying"),
            where=str(path),
        )
    except ConfigError as error:
        raise ModelError(error.what, where=str(path), fix=error.fix) from error


def _lora(fields: ConfigFields) -> LoRAConfig:
    target = _target(fields, "target_modules")
    if not target:
        raise fields.error("target_modules", "a list of names or an expression")
    dropout = fields.get("lora_dropout")
    return LoRAConfig(
        lora_r=fields.integer("r"),
        lora_alpha=fields.number("lora_alpha"),
        lora_dropout=fields.number("lora_dropout") if dropout != 0 else 0.0,
        lora_target_modules=target,
        lora_bias=cast(LoRABias, fields.choice("bias", choices(LoRABias))),
        lora_b_bias=fields.flag("lora_bias"),
        use_rslora=fields.flag("use_rslora"),
        use_dora=fields.flag("use_dora"),
        rank_pattern=_pattern(fields, "rank_pattern"),
        alpha_pattern=_pattern(fields, "alpha_pattern"),
        init_lora_weights=_start(fields),
        modules_to_save=_tables(fields),
        trainable_token_indices=_tokens(fields),
    )


def _start(fields: ConfigFields) -> LoRAStart:
    start, note = fields.get("init_lora_weights"), fields.get("loftq_config")
    if note and note != LOFTQ:
        raise _unsupported(fields, "loftq_config")
    if note:
        return "loftq"
    return "gaussian" if start == "gaussian" else "default"


def _pattern(fields: ConfigFields, key: str) -> tuple[str, ...]:
    """Returns an object of expressions and numbers, as `LoRAConfig` writes it."""
    value = fields.get(key) or {}
    if not isinstance(value, dict):
        raise fields.error(key, "an object of names and numbers")
    entries = []
    for expression, number in value.items():
        _check_expression(fields, key, expression)
        section = ConfigFields({expression: number}, where=f"{fields.where}, {key}")
        entries.append(f"{expression}={plain_number(section.number(expression))}")
    return tuple(entries)


def plain_number(value: float) -> float | int:
    """Returns a whole number without its point, as JSON files of PEFT have it."""
    return int(value) if value == int(value) else value


def _tables(fields: ConfigFields) -> tuple[Table, ...]:
    ends = [name.rpartition(".")[2] for name in _names(fields, "modules_to_save")]
    if any(end not in get_args(Table) for end in ends):
        raise _unsupported(fields, "modules_to_save")
    return tuple(cast(list[Table], list(dict.fromkeys(ends))))


def _tokens(fields: ConfigFields) -> tuple[int, ...]:
    key = "trainable_token_indices"
    value = fields.get(key)
    if isinstance(value, dict) and set(value) == {_EMBEDDING}:
        value = value[_EMBEDDING]
    if isinstance(value, dict):
        raise _unsupported(fields, key)
    tokens = value or []
    if not isinstance(tokens, list) or not all(
        type(token) is int and 0 <= token < 2**31 for token in tokens
    ):
        raise fields.error(key, "token ids")
    return tuple(tokens)


def _target(fields: ConfigFields, key: str) -> str | tuple[str, ...] | None:
    """Returns a target: an expression, checked, or names."""
    value = fields.get(key)
    if value is None or isinstance(value, list):
        return _names(fields, key) or None
    if not isinstance(value, str):
        raise fields.error(key, "a list of names or an expression")
    _check_expression(fields, key, value)
    return value


def _check_expression(fields: ConfigFields, key: str, expression: str) -> None:
    if len(expression) > _MAX_EXPRESSION or _NESTED_REPETITION.search(expression):
        raise fields.error(key, "a shorter expression without nested repetition")
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise fields.error(key, f"a regular expression ({error})") from error


def _names(fields: ConfigFields, key: str) -> tuple[str, ...]:
    value = fields.get(key)
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name for name in names
    ):
        raise fields.error(key, "a list of names")
    return tuple(names)


def _layers(fields: ConfigFields) -> tuple[int, ...] | None:
    value = fields.get("layers_to_transform")
    if value is None:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int and 0 <= layer < 2**31 for layer in layers):
        raise fields.error("layers_to_transform", "layer numbers")
    return tuple(layers)


def _text(fields: ConfigFields, key: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise fields.error(key, "a name")
    return value or None


def _unsupported(fields: ConfigFields, key: str) -> ModelError:
    return ModelError(
        f"{key}={printable(repr(fields.get(key)))} is not supported yet",
        where=fields.where,
        fix="adapters may be LoRA, rsLoRA or DoRA on the linear layers inside blocks, "
        "with biases, and embeddings and output head may have LoRA, or train whole or "
        "by token; merge this one with PEFT first",
    )
