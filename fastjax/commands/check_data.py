"""`fastjax check-data`: what a data file holds, before anything is trained on it."""

import json
import sys

from fastjax import runtime
from fastjax.cli_flags import Call, read_settings, shows_settings_help

_JSON = "--json"


def run(call: Call) -> None:
    """Prints counts, lengths and one row with its trained text in colour.

    `--json` prints the counts alone, as one object.
    """
    about = (
        "Shows what a run with these settings would train on: rows, tokens, lengths,\n"
        "and one row with its trained text in colour. Reads no weights."
    )
    if shows_settings_help(call, about, json="Print the counts alone, as one object."):
        return
    words = [word for word in call.words if word != _JSON]
    settings = read_settings(words, program=call.program)
    runtime.configure(gpu="none")
    if _JSON not in call.words:
        from fastjax.terminal import open_console, say

        data = settings.config.data.dataset_name
        say(open_console(), f"reading {data or 'the embedded data'}")
    from fastjax.api import check_data

    check = check_data(settings.config)
    if _JSON in call.words:
        sys.stdout.write(json.dumps(check.as_json()) + "\n")
        return
    from rich.console import Console

    Console().print(check)
