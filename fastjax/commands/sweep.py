"""`fastjax sweep`: several adapters over one base, and which of them is best."""

from typing import Any

from fastjax.cli_flags import Call, read_settings, shows_settings_help
from fastjax.errors import ConfigError, printable

_FLAG = "--vary"


def run(call: Call) -> None:
    """Trains every combination of the values and prints the table."""
    about = (
        "Trains an adapter for every combination of some values, those of equal\n"
        "shapes at once, and tells which is best. All see the same rows in order."
    )
    what = (
        "Fields and the values of each, such as --vary learning_rate=1e-4,2e-4 "
        "lora_r=8,16 for four adapters: learning_rate, seed, and those of the group "
        "lora. Modules of one value are joined by +: lora_target_modules="
        "q_proj+v_proj,all-linear."
    )
    if shows_settings_help(call, about, vary=what):
        return
    words, varied = _separated(call.words)
    settings = read_settings(words, program=call.program)
    from fastjax.api import grid, run_sweep

    result = run_sweep(settings.config, grid(varied), notes=settings.notes)
    from rich.console import Console

    from fastjax.terminal import whole_width

    Console(width=whole_width(result)).print(result)


def _separated(words: tuple[str, ...]) -> tuple[list[str], dict[str, list[Any]]]:
    """Returns the words of the settings, and field to values of `--vary`.

    Raises:
      ConfigError: Nothing varies, or a word is no field with values.
    """
    settings: list[str] = []
    varied: dict[str, list[Any]] = {}
    is_varying = False
    for word in words:
        if word.startswith("--"):
            is_varying = word.partition("=")[0] == _FLAG
            word = word.removeprefix(f"{_FLAG}=") if is_varying else word
            if word == _FLAG:
                continue
        if not is_varying:
            settings.append(word)
            continue
        name, _, values = word.partition("=")
        if not values or name in varied:
            raise ConfigError(
                f"{printable(word)!r} is no field=value,value, or comes twice",
                fix="such as --vary learning_rate=1e-4,2e-4 lora_r=8,16",
            )
        varied[name.replace("-", "_")] = [_value(text) for text in values.split(",")]
    if not varied:
        raise ConfigError(f"{_FLAG} is missing", fix=f"{_FLAG} learning_rate=1e-4,2e-4")
    return settings, varied


def _value(text: str) -> str | list[str]:
    return text.split("+") if "+" in text else text
