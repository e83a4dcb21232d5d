"""`fastjax eval`: the loss of a model or adapter on a data file."""

import sys

from fastjax.cli_flags import Call, read_settings, shows_settings_help, write_yaml


def run(call: Call) -> None:
    """Prints loss, perplexity and seconds as YAML."""
    about = (
        "Measures loss and perplexity of a model or adapter on dataset_name. Settings\n"
        "of training alone have no effect."
    )
    if shows_settings_help(call, about):
        return
    settings = read_settings(call.words, program=call.program)
    for note in settings.notes:
        sys.stderr.write(f"{note}\n")
    from fastjax.api import run_evaluation

    write_yaml(run_evaluation(settings.config))
