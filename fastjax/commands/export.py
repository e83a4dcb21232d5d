"""`fastjax export`: an adapter merged into its base model."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from fastjax.cli_flags import Call, parsed
from fastjax.config import DType


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportArgs:
    """Merges an adapter into its base model and writes a Hugging Face folder.

    Attributes:
      model: Folder of the adapter.
      output_dir: Folder that is made.
      base_precision: Merge onto the original 16-bit weights, or onto the 4-bit ones
        as they were in training.
      dtype: Of the written weights.
      overwrite: Replace the folder if it exists.
    """

    model: str
    output_dir: str
    base_precision: Literal["original", "dequantised"] = "original"
    dtype: DType = "bfloat16"
    overwrite: bool = False


def run(call: Call) -> None:
    """Merges, checks the merged folder, and prints what it found."""
    args = parsed(ExportArgs, call)
    from fastjax import runtime

    runtime.configure()
    from fastjax.api import run_export

    for line in run_export(
        args.model,
        Path(args.output_dir),
        base_precision=args.base_precision,
        dtype=args.dtype,
        overwrite=args.overwrite,
    ):
        sys.stdout.write(line + "\n")
