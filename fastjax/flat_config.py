"""Flat names and values, from YAML, flags or Python, to the nested `TrainConfig`.

Hugging Face's names are canonical. Values that come as text are read by the type of
their field. Everything that is wrong is told at once.
"""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastjax.aliases import ALIASES, boolean, translation
from fastjax.config import Implementations, TrainConfig
from fastjax.errors import ConfigError, printable

_KINDS = {str: "text", int: "a whole number", float: "a number"}
_HELP = "`fastjax train --help` lists all fields and their values"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FlatConfig:
    """A configuration and how it was read.

    Attributes:
      config: The settings.
      given: Canonical names that were set, whatever their values.
      notes: What a user should know of the names and values, one sentence each.
    """

    config: TrainConfig
    given: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def train_config(
    flat: Mapping[str, Any], *, base: FlatConfig | None = None, help_hint: str = _HELP
) -> FlatConfig:
    """Returns the configuration of flat names and values.

    Args:
      flat: Canonical names or aliases to values; text is read by the field's type.
      base: What `flat` is laid over.
      help_hint: Where all names and values are listed, for errors.

    Raises:
      ConfigError: Names every unknown field, with the nearest name, every value that
        its field refuses, and every conflict.
    """
    base = base or FlatConfig(config=TrainConfig())
    reader = _Reader()
    for name, value in flat.items():
        reader.take(name.replace("-", "_"), value)
    values = reader.values
    given = base.given | frozenset(values)
    values |= _implied(values, given, base.config)
    config = _replaced(base.config, dict(values), reader.problems)
    if reader.problems or config is None:
        raise ConfigError.of(reader.problems, fix=help_hint)
    notes = (*base.notes, *reader.notes())
    return FlatConfig(config=config, given=given, notes=notes)


def flat_values(config: TrainConfig) -> dict[str, Any]:
    """Returns every field of `config` by its flat name, as YAML can hold it."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Implementations):
            chosen = dataclasses.asdict(value).items()
            values["implementation"] = [f"{op}={name}" for op, name in chosen if name]
        elif dataclasses.is_dataclass(value):
            parts = dataclasses.fields(value)
            values |= {part.name: getattr(value, part.name) for part in parts}
        else:
            values[field.name] = value
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def field_types() -> dict[str, Any]:
    """Returns the type of every flat field."""
    hints: dict[str, Any] = {}
    for name, kind in get_type_hints(TrainConfig).items():
        if kind is Implementations:
            hints["implementation"] = tuple[str, ...]
        elif dataclasses.is_dataclass(kind):
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
    options = get_args(kind) if origin is Literal else ()
    is_choice_of_no = value is False and ("no" in options or "none" in options)
    if isinstance(value, bool) and kind is not bool and not is_choice_of_no:
        # A flag alone, or --no-FLAG of what is no switch.
        raise ConfigError(f"{name} needs a value: {_expected(kind)}")
    if origin is Literal:
        return _coerced_choice(name, value, options)
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{name}={printable(value)!r} must be a list")
        return tuple(coerced(name, item, get_args(kind)[0]) for item in items)
    if kind is bool:
        return boolean(name, value)
    if kind is str:
        if isinstance(value, str | Path):
            return str(value)
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        return _number(name, value, kind)
    raise ConfigError(f"{name}={printable(value)!r} must be {_KINDS[kind]}")


class _Reader:
    """Gathers values by canonical name, and all that is wrong with them."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.problems: list[str] = []
        self._hints = field_types()
        self._sources: dict[str, str] = {}
        self._notes: list[str] = []
        self._without_effect: list[str] = []

    def take(self, name: str, value: Any) -> None:
        """Reads one name and value."""
        try:
            found = translation(name, value)
            self._notes += [found.note] if found.note else []
            self._without_effect += [name] if found.has_no_effect else []
            if found.name in self._hints:
                kind = self._hints[found.name]
                self._set(name, found.name, coerced(found.name, found.value, kind))
            elif found.name:
                self.problems.append(unknown_field(name))
        except ConfigError as error:
            self.problems.append(error.what)

    def notes(self) -> list[str]:
        """Returns the notes so far."""
        pairs = [(old, new) for new, old in self._sources.items()]
        renamed = [f"{old} as {new}" for old, new in pairs if ALIASES.get(old) == new]
        notes = [f"read {', '.join(renamed)}"] if renamed else []
        if self._without_effect:
            notes.append(f"without effect here: {', '.join(self._without_effect)}")
        return notes + self._notes

    def _set(self, source: str, name: str, value: Any) -> None:
        if name == "lora_target_modules":
            value = _module_names(value)
        before = self.values.get(name)
        if name not in self.values or before == value or not self._counts(name, before):
            self.values[name], self._sources[name] = value, source
        elif self._counts(name, value):
            self.problems.append(
                f"{name} is given twice: {self._sources[name]} says "
                f"{printable(before)}, {source} says {printable(value)}"
            )

    def _counts(self, name: str, value: Any) -> bool:
        """Tells whether a value speaks; of steps and share of warmup one may be 0."""
        return name != "warmup_steps" or value != 0


def _implied(
    values: Mapping[str, Any], given: frozenset[str], base: TrainConfig
) -> dict[str, Any]:
    """Returns what some settings mean for others that nobody has set."""
    implied: dict[str, Any] = {}
    if values.get("eval_strategy") == "steps" and "eval_steps" not in given:
        implied["eval_steps"] = values.get("logging_steps", base.logging_steps)
    is_other = values.get("full_finetuning") or values.get("load_in_8bit")
    if is_other and "load_in_4bit" not in given:
        implied["load_in_4bit"] = False
    return implied


def _module_names(value: Any) -> Any:
    """Returns names listed with commas as a tuple; a regular expression stays."""
    if isinstance(value, str) and re.fullmatch(r"[\w.]+(,[\w.]+)+", value):
        return tuple(value.split(","))
    return value


def _coerced_choice(name: str, value: Any, options: tuple[Any, ...]) -> Any:
    if value is False:  # --no-FLAG; and YAML reads a bare `no` as false.
        return "no" if "no" in options else "none"
    for option in options:
        if value == option:
            return option
    allowed = ", ".join(map(str, options))
    raise ConfigError(f"{name}={printable(value)!r} must be one of: {allowed}")


def _expected(kind: Any) -> str:
    """Returns what a field holds, in words."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return _KINDS.get(kind, "a list")


def _coerced_union(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    if type(None) in kinds:
        is_none = isinstance(value, str) and value.lower() in ("none", "null")
        if value is None or is_none:
            return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if isinstance(value, list | tuple):
        kinds = tuple(kind for kind in kinds if get_origin(kind) is tuple) or kinds
    return coerced(name, value, kinds[0])


def _number(name: str, value: float | int | str, kind: type) -> float | int:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ConfigError(f"{name}={printable(value)!r} must be a number") from None
    if kind is float:
        return number
    if not math.isfinite(number) or number != int(number):
        raise ConfigError(f"{name}={printable(value)} must be a whole number")
    return int(number)


def _implementations(choices: tuple[str, ...]) -> Implementations:
    """Returns the choices "op=name" by op.

    Raises:
      ConfigError: There is no such op.
    """
    ops = [field.name for field in dataclasses.fields(Implementations)]
    pairs = [(op, name) for op, _, name in (c.partition("=") for c in choices)]
    wrong = [f"{op}={name}" for op, name in pairs if op not in ops or not name]
    if wrong:
        raise ConfigError(
            f"implementation={printable(','.join(wrong))!r} must be OP=NAME, where OP "
            f"is one of: {', '.join(ops)}"
        )
    return Implementations(**dict(pairs))


def _replaced(
    config: TrainConfig, values: dict[str, Any], problems: list[str]
) -> TrainConfig | None:
    """Returns `config` with new values, or None and adds to `problems`."""
    changes: dict[str, Any] = {}
    try:
        if "implementation" in values:
            changes["implementations"] = _implementations(values.pop("implementation"))
    except ConfigError as error:
        problems += error.problems or (error.what,)
    for field in dataclasses.fields(config):
        part: Any = getattr(config, field.name)
        if not dataclasses.is_dataclass(part) or isinstance(part, type):
            continue
        inside = {f.name for f in dataclasses.fields(part)} & set(values)
        try:
            found = {name: values.pop(name) for name in sorted(inside)}
            if found:
                changes[field.name] = dataclasses.replace(part, **found)
        except ConfigError as error:
            problems += error.problems or (error.what,)
    try:
        return dataclasses.replace(config, **changes, **values)
    except ConfigError as error:
        problems += error.problems or (error.what,)
        return None
