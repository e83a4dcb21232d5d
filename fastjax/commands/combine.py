"""`fastjax combine`: several adapters of one base as one."""

import dataclasses
import sys
from pathlib import Path

from fastjax import runtime
from fastjax.cli_flags import Call, parsed
from fastjax.config import CombineMethod


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CombineArgs:
    """Combines adapters of one base into one that PEFT and vLLM load.

    Attributes:
      adapters: Folders of two adapters or more.
      output_dir: Folder of the result.
      weights: Factor of each; without, 1.
      method: concat: exact, the ranks add up; svd: the nearest of one rank; linear:
        adds the factors, as PEFT's method of that name.
      rank: Rank of the result by svd; without, the largest of the adapters.
      overwrite: Replace the folder if it exists.
    """

    adapters: tuple[str, ...] = dataclasses.field(metadata={"positional": True})
    output_dir: str
    weights: tuple[float, ...] = ()
    method: CombineMethod = "concat"
    rank: int | None = None
    overwrite: bool = False


def run(call: Call) -> None:
    """Writes the folder and says what it holds."""
    args = parsed(CombineArgs, call)
    runtime.configure(gpu="none")
    from fastjax.api import combine_adapters

    told = combine_adapters(
        args.adapters,
        Path(args.output_dir),
        weights=args.weights or None,
        method=args.method,
        rank=args.rank,
        overwrite=args.overwrite,
    )
    sys.stdout.write(f"{told}\n")
