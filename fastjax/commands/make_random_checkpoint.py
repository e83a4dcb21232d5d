"""`fastjax make-random-checkpoint`: a model folder without a download."""

import dataclasses
import sys
from pathlib import Path

from fastjax import runtime
from fastjax.cli_flags import Call, parsed
from fastjax.config import DType


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RandomCheckpointArgs:
    """Writes a checkpoint of a preset's shapes with random weights and a tokenizer.

    Attributes:
      model: Preset name.
      out: Folder that is made.
      dtype: Of the weights.
      seed: Of the weights.
      overwrite: Replace the folder if it exists.
    """

    model: str = dataclasses.field(metadata={"positional": True})
    out: str
    dtype: DType = "bfloat16"
    seed: int = 0
    overwrite: bool = False


def run(call: Call) -> None:
    """Writes the folder and prints its name."""
    args = parsed(RandomCheckpointArgs, call)
    runtime.configure(gpu="as needed")
    from fastjax.api import make_random_checkpoint

    folder = make_random_checkpoint(
        args.model,
        Path(args.out),
        dtype=args.dtype,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    sys.stdout.write(f"{folder}\n")
