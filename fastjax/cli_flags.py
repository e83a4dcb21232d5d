"""Words of the command line: how a command was called, and what its flags say."""

import dataclasses
import difflib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastjax.config_file import read_config_file
from fastjax.errors import ConfigError, printable
from fastjax.flat_config import FlatConfig, train_config


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


def read_settings(words: Sequence[str]) -> FlatConfig:
    """Returns the settings of flags and of the YAML file that they may name.

    A flag wins over the file.

    Raises:
      ConfigError: Flags, keys or values are wrong; it names all of them.
    """
    flags = flag_values(words)
    path = flags.pop("config", None)
    if path is True:
        raise ConfigError("--config needs the name of a YAML file")
    base = None if path is None else read_config_file(Path(str(path)))
    return train_config(flags, base=base)


def flag_values(words: Sequence[str]) -> dict[str, str | bool]:
    """Returns flag names and their text values; a flag without a value is true.

    `--flag value`, `--flag=value`, `--flag a b` (a list), `--flag`, `--no-flag`.

    Raises:
      ConfigError: A value stands alone, or a flag comes twice.
    """
    flags: dict[str, str | bool] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if not has_value and name.startswith("no_") and name != "no_cuda":
                name, value, has_value = name.removeprefix("no_"), "False", "="
            if name in flags:
                raise ConfigError(f"--{printable(name)} is given twice")
            flags[name] = value if has_value else True
        elif not name:
            raise ConfigError(
                f"{printable(word)!r} is no flag", fix="flags begin with --"
            )
        else:
            given = flags[name]
            flags[name] = word if given is True else f"{given},{word}"
    return flags


def parsed[T](kind: type[T], call: Call) -> T:
    """Returns the flags of a small command as its dataclass.

    Raises:
      ConfigError: A flag is unknown; names the nearest.
      SystemExit: Help was asked for, or a value is wrong.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    problems = []
    for word in call.words:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        is_known = name == "help" or name.removeprefix("no_") in known
        if word.startswith("--") and not is_known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean --{near[0]}?" if near else ""
            problems.append(f"there is no flag --{printable(name)}{hint}")
    if problems:
        raise ConfigError.of(problems, fix=f"see {shlex.join(call.program)} --help")
    import tyro

    return tyro.cli(kind, args=call.words, prog=shlex.join(call.program))


def shows_settings_help(call: Call, about: str, **flags: str) -> bool:
    """Prints the help of a command that takes every setting, if it is asked for.

    Args:
      call: Of the command.
      about: What it does.
      flags: The command's own flags, and what each of them does.
    """
    if "-h" not in call.words and "--help" not in call.words:
        return False
    from fastjax.cli_help import settings_help

    sys.stdout.write(settings_help(call.command, about, flags))
    return True


def write_yaml(values: Mapping[str, Any]) -> None:
    """Prints values for people and programs."""
    import yaml

    sys.stdout.write(yaml.safe_dump(dict(values), sort_keys=False))


def write_now(text: str) -> None:
    """Prints a piece of text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
