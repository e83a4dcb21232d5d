"""`fastjax train`: a configuration in, an adapter or a model out."""

import dataclasses
import sys

from fastjax.cli_flags import Call, read_settings, shows_settings_help
from fastjax.commands import plan

_PRINT_CONFIG = ("--print_config", "--print-config")


def run(call: Call) -> None:
    """Trains, or prints the memory plan or the resolved settings and stops."""
    if shows_settings_help(
        call,
        "Trains an adapter, or a whole model, on a dataset.",
        print_config="Write all settings as a file for --config and stop.",
        plan="Tell what memory the run needs, and what would fit, and stop.",
    ):
        return
    if "--plan" in call.words:
        words = tuple(word for word in call.words if word != "--plan")
        return plan.run(dataclasses.replace(call, words=words))
    words = [word for word in call.words if word not in _PRINT_CONFIG]
    settings = read_settings(words, program=call.program)
    if len(words) < len(call.words):
        from fastjax.config_file import config_yaml

        sys.stdout.write(config_yaml(settings.config))
        return
    from fastjax.api import run_training

    run_training(
        settings.config, notes=settings.notes, resume_command=call.resume_command
    )
