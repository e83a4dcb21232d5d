"""`fastjax train`: a configuration in, an adapter or a model out."""

import sys

from fastjax.cli_flags import Call, read_settings, shows_settings_help

_PRINT_CONFIG = ("--print_config", "--print-config")


def run(call: Call) -> None:
    """Trains, or prints the resolved settings and stops."""
    if shows_settings_help(call):
        return
    words = [word for word in call.words if word not in _PRINT_CONFIG]
    settings = read_settings(words)
    if len(words) < len(call.words):
        from fastjax.config_file import config_yaml

        sys.stdout.write(config_yaml(settings.config))
        return
    from fastjax import runtime

    runtime.configure(full_determinism=settings.config.full_determinism)
    from fastjax.api import run_training

    run_training(
        settings.config, notes=settings.notes, resume_command=call.resume_command
    )
