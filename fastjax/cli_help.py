"""The help of commands that take every setting, made from the dataclasses."""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastjax.aliases import ALIASES
from fastjax.config import Implementations, TrainConfig
from fastjax.flat_config import field_types, flat_values

_WIDTH, _INDENT = 88, " " * 6
_ALL_FLAGS = """\
  A flag alone is true, --no-FLAG is false; a list is written a,b or a b.

  --config FILE
      Settings from a YAML file of the same names; flags win over it.
  --debug
      Show the traceback of an error.
"""


_PAGE = """\
# Settings

Made from the dataclasses of `fastjax/config.py` by `make docs`. Each is a flag of
`fastjax train` (`--max_steps 100`), a key of its YAML files, and a field of
`TrainingArguments`. [training.md](training.md) says which of them matter, and when.
"""
_FIELD_ROW = "| `{name}` | {kind} | {default} | {meaning} |\n"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Setting:
    name: str
    kind: str
    default: str
    meaning: str
    other_names: tuple[str, ...]


def settings_help(command: str, about: str, flags: Mapping[str, str]) -> str:
    """Returns the help of a command whose flags are the fields of `TrainConfig`.

    Args:
      command: Its name.
      about: What it does.
      flags: The command's own flags, and what each of them does.
    """
    usage = f"usage: fastjax {command} [--flag value] ...\n\n{about}\n\n{_ALL_FLAGS}"
    usage += "".join(f"  --{flag}\n{_wrapped(what)}" for flag, what in flags.items())
    groups = [
        "".join([f"{title}:\n", *map(_flag, settings)])
        for title, settings in _groups().items()
    ]
    return "\n".join([usage, *groups])


def command_help(kind: type, program: str) -> str:
    """Returns the help of a small command, whose flags are the fields of a dataclass.

    Args:
      kind: The dataclass.
      program: Words that start the command.
    """
    about = inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes:")[0]
    hints = get_type_hints(kind)
    said = {n: t for base in kind.__mro__[::-1] for n, t in _attributes(base).items()}
    fields: Any = dataclasses.fields(kind)
    flags = [
        _Setting(
            name=field.name,
            kind=_kind(hints[field.name]),
            default=""
            if field.default is dataclasses.MISSING
            else _shown(field.default),
            meaning=said.get(field.name, ""),
            other_names=(),
        )
        for field in fields
    ]
    bare = "".join(
        f" {field.name.upper()}" for field in fields if field.metadata.get("positional")
    )
    usage = f"usage: {program}{bare} [--flag value] ...\n\n{about}\n"
    return "\n".join([usage, "".join(map(_flag, flags))])


def settings_page() -> str:
    """Returns the page of the documentation that lists every setting."""
    pages = [_PAGE]
    for title, settings in _groups().items():
        head = (
            f"## {title}\n\n| name | value | default | meaning |\n|---|---|---|---|\n"
        )
        pages.append("".join([head, *map(_row, settings)]))
    return "\n".join(pages)


def _flag(setting: _Setting) -> str:
    old = ", ".join(f"--{name}" for name in setting.other_names)
    also = f" Also {old}." if old else ""
    default = f" Default: {setting.default}." if setting.default else ""
    text = f"{setting.meaning}{also}{default}".strip()
    return f"  --{setting.name} {setting.kind}\n{_wrapped(text)}"


def _row(setting: _Setting) -> str:
    old = ", ".join(f"`{name}`" for name in setting.other_names)
    cells = {
        "name": setting.name,
        "kind": setting.kind.replace("|", ", "),
        "default": setting.default,
        "meaning": setting.meaning + (f" Also {old}." if old else ""),
    }
    return _FIELD_ROW.format(**{k: v.replace("|", r"\|") for k, v in cells.items()})


def _groups() -> dict[str, list[_Setting]]:
    """Returns title to settings, in the order of the dataclasses."""
    groups = {"run": _settings_of(TrainConfig())}
    for field in dataclasses.fields(TrainConfig):
        part = getattr(TrainConfig(), field.name)
        if dataclasses.is_dataclass(part) and not isinstance(part, Implementations):
            groups[field.name] = _settings_of(part)
    ops = ", ".join(field.name for field in dataclasses.fields(Implementations))
    chosen = _Setting(
        name="implementation",
        kind="OP=NAME ...",
        default="",
        meaning=f"Implementation of each op, for comparisons: {ops}.",
        other_names=(),
    )
    return {**groups, "implementations": [chosen]}


def _settings_of(part: Any) -> list[_Setting]:
    """Returns the fields of one dataclass, each with what its docstring says."""
    said = _attributes(type(part))
    kinds, defaults = field_types(), flat_values(TrainConfig())
    return [
        _Setting(
            name=field.name,
            kind=_kind(kinds[field.name]),
            default=_shown(defaults[field.name]),
            meaning=said.get(field.name, ""),
            other_names=tuple(n for n, new in ALIASES.items() if new == field.name),
        )
        for field in dataclasses.fields(part)
        if field.name in kinds
    ]


def _attributes(kind: type) -> dict[str, str]:
    """Returns the `Attributes` of a docstring, each joined to one line."""
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        is_choice = get_origin(get_args(kind)[0]) is Literal
        return f"LIST of {_kind(get_args(kind)[0])}" if is_choice else "LIST"
    names = {str: "TEXT", int: "INT", float: "NUMBER", bool: "true|false"}
    options = [option for option in get_args(kind) if option is not type(None)]
    return names[kind] if kind in names else _kind(options[0])


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _wrapped(text: str) -> str:
    return (
        textwrap.fill(text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
        + "\n"
    )
