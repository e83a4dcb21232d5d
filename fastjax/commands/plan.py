"""`fastjax plan`: the memory of a run, before any weight is read."""

import sys

from fastjax import runtime
from fastjax.cli_flags import Call, read_settings, shows_settings_help


def run(call: Call) -> None:
    """Prints the plan of the run that `fastjax train` would do with these flags."""
    about = (
        "Tells the memory of the training run that these settings describe, and what\n"
        "would fit, with the rows of dataset_name, or else rows of max_length tokens;\n"
        "no weight is read."
    )
    if shows_settings_help(call, about):
        return
    settings = read_settings(call.words, program=call.program)
    runtime.configure(gpu="as needed")
    from fastjax.terminal import open_console, say

    config = settings.config
    say(open_console(), f"reading {config.data.dataset_name or config.model}")
    from fastjax.api.run_plan import plan_lines

    for line in plan_lines(config):
        sys.stdout.write(f"{line}\n")
