"""`fastjax inspect`: what a folder holds, and what is missing or wrong."""

import dataclasses
import sys
from pathlib import Path

from fastjax import runtime
from fastjax.cli_flags import Call, parsed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InspectArgs:
    """Shows what a model or adapter folder holds, and what is missing or wrong.

    Attributes:
      model: Folder of a model or adapter, or a GGUF file.
      check: Read every weight too, to find NaN and broken 4-bit data.
    """

    model: str = dataclasses.field(metadata={"positional": True})
    check: bool = False


def run(call: Call) -> None:
    """Prints facts and remarks; problems are the error."""
    args = parsed(InspectArgs, call)
    runtime.configure(gpu="none")
    from fastjax.api import inspect_folder

    found = inspect_folder(Path(args.model), reads_values=args.check)
    for name, value in found.facts.items():
        sys.stdout.write(f"{name:11} {value}\n")
    for remark in found.remarks:
        sys.stdout.write(f"note        {remark}\n")
    for problem in found.problems:
        sys.stdout.write(f"problem     {problem.what}\n            {problem.where}\n")
    sys.stdout.write("nothing is wrong\n" if not found.problems else "")
    if found.problems:
        raise found.problems[0]
