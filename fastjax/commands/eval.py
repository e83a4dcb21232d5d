"""`fastjax eval`: the loss of a model or adapter on a data file."""

import sys

from fastjax import runtime
from fastjax.cli_flags import Call, read_settings, shows_settings_help, write_yaml


def run(call: Call) -> None:
    """Prints loss, perplexity and seconds, of four digits, and counts as YAML."""
    about = (
        "Measures loss and perplexity of a model or adapter on dataset_name. Settings\n"
        "of training alone have no effect."
    )
    if shows_settings_help(call, about):
        return
    settings = read_settings(call.words, program=call.program)
    for note in settings.notes:
        sys.stderr.write(f"{note}\n")
    runtime.configure(gpu="as needed")
    from fastjax.terminal import open_console, say

    say(open_console(), f"loading {settings.config.model}")
    from fastjax.api import run_evaluation

    values = run_evaluation(settings.config)
    write_yaml(
        {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in values.items()
        }
    )
