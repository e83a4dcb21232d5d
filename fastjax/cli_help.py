"""The help of commands that take every setting, made from the dataclasses."""

import dataclasses
import inspect
import re
import textwrap
from typing import Any, Literal, get_args, get_origin

from fastjax.aliases import ALIASES
from fastjax.config import Implementations, TrainConfig
from fastjax.flat_config import field_types, flat_values

_WIDTH, _INDENT = 88, " " * 6
_OWN_FLAGS = """\
  A flag alone is true, --no-FLAG is false; a list is written a,b or a b.

  --config FILE
      Settings from a YAML file of the same names; flags win over it.
  --print_config
      Write all settings as such a file and stop.
  --debug
      Show the traceback of an error.
"""


def settings_help(command: str) -> str:
    """Returns the help of a command whose flags are the fields of `TrainConfig`."""
    groups = [_group("run", TrainConfig())]
    for field in dataclasses.fields(TrainConfig):
        part = getattr(TrainConfig(), field.name)
        if dataclasses.is_dataclass(part) and not isinstance(part, Implementations):
            groups.append(_group(field.name, part))
    ops = ", ".join(field.name for field in dataclasses.fields(Implementations))
    groups.append(
        "implementations:\n  --implementation OP=NAME ...\n"
        + _wrapped(f"Implementation of each op, for comparisons: {ops}.")
    )
    usage = f"usage: fastjax {command} [--flag value] ...\n\n{_OWN_FLAGS}"
    return "\n".join([usage, *groups])


def _group(title: str, part: Any) -> str:
    """Returns the flags of one dataclass, each with what its docstring says."""
    said = _attributes(type(part))
    kinds, defaults = field_types(), flat_values(TrainConfig())
    lines = [f"{title}:\n"]
    for field in dataclasses.fields(part):
        if field.name not in kinds:
            continue
        old = [f"--{name}" for name, new in ALIASES.items() if new == field.name]
        also = f" Also {', '.join(old)}." if old else ""
        default = _shown(defaults[field.name])
        text = f"{said.get(field.name, '')}{also} Default: {default}."
        lines.append(f"  --{field.name} {_kind(kinds[field.name])}\n")
        lines.append(_wrapped(text.strip()))
    return "".join(lines)


def _attributes(kind: type) -> dict[str, str]:
    """Returns the `Attributes` of a docstring, each joined to one line."""
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "LIST"
    names = {str: "TEXT", int: "INT", float: "NUMBER", bool: "true|false"}
    options = [option for option in get_args(kind) if option is not type(None)]
    return names[kind] if kind in names else _kind(options[0])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _wrapped(text: str) -> str:
    return (
        textwrap.fill(text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
        + "\n"
    )
