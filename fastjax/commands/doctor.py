"""`fastjax doctor`: what is installed, what the machine has, and what is wrong."""

import dataclasses
import json
import sys

from fastjax import runtime
from fastjax.cli_flags import Call, parsed
from fastjax.errors import EnvironmentFault


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DoctorArgs:
    """Checks the installation, the GPU, and every op on a small tile.

    Attributes:
      json: Print one JSON object.
    """

    json: bool = False


def run(call: Call) -> None:
    """Prints what it finds.

    Raises:
      EnvironmentFault: Something is wrong; tells all of it.
    """
    args = parsed(DoctorArgs, call)
    runtime.configure(gpu="as needed")
    from fastjax.terminal import open_console, say

    if not args.json:
        say(
            open_console(),
            "checking each op; the first time, its kernels are compiled",
        )
    from fastjax.api.doctor import diagnose

    found = diagnose()
    if args.json:
        sys.stdout.write(json.dumps(found.as_json()) + "\n")
    else:
        from rich.console import Console

        Console(soft_wrap=True).print(found)
    if found.problems:
        raise _all_of(found.problems)


def _all_of(problems: tuple[EnvironmentFault, ...]) -> EnvironmentFault:
    if len(problems) == 1:
        return problems[0]
    lines = [f"{p.what}: {p.fix}" for p in problems]
    return EnvironmentFault(
        f"{len(problems)} things are wrong",
        where="\n         ".join(lines),
        fix="mend them from the top, then run `fastjax doctor` again",
        code="FJ-ENV-DOCTOR",
    )
