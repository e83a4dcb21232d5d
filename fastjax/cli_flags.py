"""Words of the command line: how a command was called, and what its flags say."""

import dataclasses
import difflib
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from fastjax.aliases import ALIASES
from fastjax.config_file import read_config_file
from fastjax.errors import ConfigError, printable
from fastjax.flat_config import FlatConfig, coerced, field_types, train_config

_TRAIN = ("fastjax", "train")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """How a command was called.

    Attributes:
      command: Its name.
      program: Words that start it, such as `fastjax train`.
      words: Its flags.
    """

    command: str
    program: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def resume_command(self) -> str:
        """The command that goes on where this one stops."""
        kept, skips = [], False
        for word in self.words:
            name = word.removeprefix("--").replace("-", "_").partition("=")[0]
            if word.startswith("--"):
                skips = name in ("resume", "resume_from_checkpoint", "no_resume")
            if not skips:
                kept.append(word)
        more = [] if len(kept) == len(self.words) else ["--resume_from_checkpoint=auto"]
        return shlex.join([*self.program, *kept, *more])


def read_settings(
    words: Sequence[str], *, program: Sequence[str] = _TRAIN
) -> FlatConfig:
    """Returns the settings of flags and of the YAML file that they may name.

    A flag wins over the file.

    Args:
      words: The flags.
      program: Words that start the command, whose help an error points at.

    Raises:
      ConfigError: Flags, keys or values are wrong; it names all of them.
    """
    help_hint = f"`{shlex.join(program)} --help` lists all flags and their values"
    flags = flag_values(words, help_hint)
    path = flags.pop("config", None)
    if isinstance(path, bool):
        raise ConfigError("--config needs the name of a YAML file")
    base = None if path is None else read_config_file(Path(path))
    return train_config(flags, base=base, help_hint=help_hint)


def flag_values(words: Sequence[str], help_hint: str = "") -> dict[str, str | bool]:
    """Returns flag names and their text values; a flag without a value is true.

    `--flag value`, `--flag=value`, `--flag a b` (a list), `--flag`, `--no-flag`.

    Args:
      words: The flags.
      help_hint: Where all flags are listed, for errors.

    Raises:
      ConfigError: A value stands alone, or a flag comes twice.
    """
    flags: dict[str, str | bool] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            name = name.replace("-", "_")
            is_on = has_value or not name.startswith("no_") or name == "no_cuda"
            name = name if is_on else name.removeprefix("no_")
            if name in flags:
                raise ConfigError(f"--{printable(name)} is given twice")
            flags[name] = value if has_value else is_on
        elif not name or flags[name] is False:
            known = [*field_types(), *ALIASES, "config"]
            raise _no_flag(word, known, help_hint)
        else:
            given = flags[name]
            flags[name] = word if given is True else f"{given},{word}"
    return flags


def _no_flag(word: str, known: Iterable[str], help_hint: str) -> ConfigError:
    """Returns the error for a word that stands where a flag should."""
    known, path = list(known), Path(word)
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean --{near[0]}?" if near else ""
    if not near and os.path.exists(word):
        is_settings = path.suffix in (".yaml", ".yml")
        owner = "config" if is_settings else "dataset_name"
        owner = "model" if path.is_dir() else owner
        hint = f"; did you mean --{owner} {printable(word)}?" * (owner in known)
    fix = "; ".join(part for part in ("flags begin with --", help_hint) if part)
    return ConfigError(f"{printable(word)!r} is no flag{hint}", fix=fix)


def parsed[T](kind: type[T], call: Call) -> T:
    """Returns the flags of a small command as its dataclass.

    A field whose metadata says `positional` takes words without a flag as well.

    Raises:
      ConfigError: Names every flag that is unknown, with the nearest, is missing, or
        has a wrong value.
      SystemExit: Help was asked for, and printed.
    """
    if _asks_for_help(call):
        from fastjax.cli_help import command_help

        sys.stdout.write(command_help(kind, shlex.join(call.program)))
        raise SystemExit(0)
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    values: dict[str, Any] = {}
    problems = []
    help_hint = f"see {shlex.join(call.program)} --help"
    for name, words in _grouped(call.words, fields, hints, help_hint).items():
        try:
            if name not in fields:
                raise ConfigError(_unknown_flag(name, fields))
            values[name] = _value(name, words, hints[name])
        except ConfigError as error:
            problems.append(error.what)
    for name, field in fields.items():
        is_required = field.default is dataclasses.MISSING
        if is_required and name not in values and not problems:
            problems.append(f"--{name} is missing")
    if problems:
        raise ConfigError.of(problems, fix=help_hint)
    return kind(**values)


def _grouped(
    words: Sequence[str],
    fields: Mapping[str, dataclasses.Field[Any]],
    hints: Mapping[str, Any],
    help_hint: str,
) -> dict[str, list[str]]:
    """Returns flag names to the words that follow; bare words to their field.

    Raises:
      ConfigError: A word has no place, or a flag comes twice.
    """
    bare = next((n for n, f in fields.items() if f.metadata.get("positional")), "")
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name not in fields and hints.get(name.removeprefix("no_")) is bool:
                name, has_value, value = name.removeprefix("no_"), "=", "False"
            if name in found:
                raise ConfigError(f"--{printable(name)} is given twice")
            found[name] = [value] if has_value else []
            continue
        is_switch = hints.get(name) is bool and word.lower() not in ("true", "false")
        owner = bare if not name or is_switch else name
        is_setting = owner == bare and "=" in word and not os.path.exists(word)
        if not owner or is_setting:
            raise _no_flag(word, fields, help_hint)
        found.setdefault(owner, []).append(word)
    return found


def _value(name: str, words: list[str], kind: Any) -> Any:
    """Returns the words after a flag as the type of its field."""
    if get_origin(kind) is tuple:
        if get_args(kind)[0] is not str:
            words = [part for word in words for part in word.split(",")]
        if not words:
            raise ConfigError(f"--{name} needs a value")
        return coerced(name, words, kind)
    if not words and kind is bool:
        return True
    if len(words) != 1:
        shown = printable(" ".join(words))
        raise ConfigError(
            f"--{name} takes one value, not {len(words)}: {shown}"
            if words
            else f"--{name} needs a value"
        )
    return coerced(name, words[0], kind)


def _unknown_flag(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean --{near[0]}?" if near else ""
    return f"there is no flag --{printable(name)}{hint}"


def shows_settings_help(call: Call, about: str, **flags: str) -> bool:
    """Prints the help of a command that takes every setting, if it is asked for.

    Args:
      call: Of the command.
      about: What it does.
      flags: The command's own flags, and what each of them does.
    """
    if not _asks_for_help(call):
        return False
    from fastjax.cli_help import settings_help

    sys.stdout.write(settings_help(call.command, about, flags))
    return True


def _asks_for_help(call: Call) -> bool:
    return "-h" in call.words or "--help" in call.words


def write_yaml(values: Mapping[str, Any]) -> None:
    """Prints values for people and programs."""
    import yaml

    sys.stdout.write(yaml.safe_dump(dict(values), sort_keys=False))


def write_now(text: str) -> None:
    """Prints a piece of text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
