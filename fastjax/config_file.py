"""YAML files of flat settings: read strictly, written so that they run again."""

from pathlib import Path
from typing import Any

import yaml

from fastjax.config import TrainConfig
from fastjax.errors import ConfigError, printable
from fastjax.flat_config import FlatConfig, flat_values, train_config

_MAX_BYTES = 1 << 20


def read_config_file(path: Path) -> FlatConfig:
    """Returns the settings of a YAML file of flat names and values.

    Only plain values are read; text such as `1e-5` becomes what its field holds.

    Raises:
      ConfigError: The file cannot be read, is no mapping, names a key twice, or holds
        unknown keys or wrong values; says which, and in which line.
    """
    lines: dict[str, int] = {}
    try:
        root = yaml.compose(_text(path), Loader=yaml.SafeLoader)
        _check_keys(root, lines)
        values = _constructed(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"the config is not YAML: {printable(error.problem or error)}",
            where=f"{path}{line}",
            fix="one `name: value` a line",
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the config is not YAML: {printable(error)}", where=str(path)
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            "the config holds no settings",
            where=str(path),
            fix="one `name: value` a line, such as `max_steps: 100`",
        )
    try:
        return train_config({str(name): value for name, value in values.items()})
    except ConfigError as error:
        marked = [_with_line(p, lines) for p in error.problems or (error.what,)]
        raise ConfigError.of(marked, where=str(path), fix=error.fix) from error


def config_yaml(config: TrainConfig) -> str:
    """Returns every setting as YAML that `--config` takes."""
    return yaml.safe_dump(flat_values(config), sort_keys=False)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise ConfigError(
            f"the config cannot be read: {error.strerror}",
            where=str(path),
            fix="check the path; fastjax train --print_config writes such a file",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError("the config is not UTF-8 text", where=str(path)) from error
    if len(content) > _MAX_BYTES:
        raise ConfigError("the config is larger than 1 MiB", where=str(path))
    return text


def _check_keys(root: yaml.Node | None, lines: dict[str, int]) -> None:
    """Fills `lines` with the line of each key, and refuses one that comes twice."""
    if not isinstance(root, yaml.MappingNode):
        return
    for key, _ in root.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            raise yaml.MarkedYAMLError(
                problem=f"{name} is given twice, first in line {lines[name]}",
                problem_mark=key.start_mark,
            )
        lines[name] = line


def _constructed(root: yaml.Node | None) -> Any:
    return None if root is None else yaml.SafeLoader("").construct_document(root)


def _with_line(problem: str, lines: dict[str, int]) -> str:
    """Returns the sentence with the line of the first key that it speaks of."""
    words = problem.replace("=", " ").replace("'", " ").split()
    found = [lines[word] for word in words if word in lines]
    return f"line {found[0]}: {problem}" if found else problem
