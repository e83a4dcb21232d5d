"""`fastjax export` and `fastjax merge`: models and adapters for other tools."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from fastjax import runtime
from fastjax.cli_flags import Call, parsed
from fastjax.config import BasePrecision, DType, ExportFormat, GGUFKind, QuantConfig
from fastjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportArgs:
    """Writes a model, with its adapter merged, for another tool.

    Attributes:
      model: Folder of an adapter or model, preset name or hub name.
      output_dir: Folder that is made.
      format: hf: a Hugging Face folder; bnb-4bit: the same with linears in NF4 of
        bitsandbytes, for transformers and vLLM; bnb-dynamic: the same with the linears
        in 16 bits that matter most on calibration text; gguf: for llama.cpp and Ollama;
        gguf-lora: the adapter alone for these.
      base_precision: Merge onto the original 16-bit weights, or onto the 4-bit or
        8-bit ones as they were in training, by the run.json beside the adapter.
      load_in_4bit: Where there is no run.json: training held the base in 4 bits.
      load_in_8bit: The same in 8 bits.
      bnb_4bit_quant_type: The values of these 4 bits.
      bnb_4bit_use_double_quant: The scales of these took 8 bits themselves.
      dtype: Of the weights in a Hugging Face folder.
      gguf_type: Of the matrices in a GGUF file; types with a k, and iq4, need
        llama.cpp's `llama-quantize`.
      calibration_data: Text for bnb-dynamic: what a run's dataset_name may be; without,
        questions on Python's standard library.
      extra_memory: What bnb-dynamic may spend on 16 bits, as a share of the plain 4-bit
        model.
      compare_logits: Load source and result afterwards and compare their logits.
      overwrite: Replace the folder if it exists.
    """

    model: str = dataclasses.field(metadata={"positional": True})
    output_dir: str
    format: ExportFormat = "hf"
    base_precision: BasePrecision = "original"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    dtype: DType = "bfloat16"
    gguf_type: GGUFKind = "q8_0"
    calibration_data: str | None = None
    extra_memory: float = 0.1
    compare_logits: bool = True
    overwrite: bool = False


def run(call: Call) -> None:
    """Writes the folder, checks it, and prints what it found."""
    args = parsed(ExportArgs, call)
    runtime.configure(gpu="as needed")
    from fastjax.terminal import open_console, say

    say(open_console(), f"loading {args.model}")
    from fastjax.api import run_export

    names = [field.name for field in dataclasses.fields(QuantConfig)]
    held = QuantConfig(**{name: getattr(args, name) for name in names})
    plain = QuantConfig(load_in_4bit=False, load_in_8bit=held.load_in_8bit)
    if not held.load_in_4bit and held != plain:
        raise ConfigError(
            "bnb_4bit_quant_type and bnb_4bit_use_double_quant say how training held "
            "4 bits",
            fix="add --load_in_4bit, or leave them out",
        )
    for line in run_export(
        args.model,
        Path(args.output_dir),
        output_format=args.format,
        base_precision=args.base_precision,
        quant=held if held.is_packed else None,
        dtype=args.dtype,
        gguf_type=args.gguf_type,
        calibration_data=args.calibration_data,
        extra_memory=args.extra_memory,
        compare_logits=args.compare_logits,
        overwrite=args.overwrite,
    ):
        sys.stdout.write(line + "\n")
