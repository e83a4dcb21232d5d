"""Models and adapters for other tools: merged, packed, or in llama.cpp's format."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from fastjax import files, runtime
from fastjax.api.calibration import DynamicPlan, plan_dynamic
from fastjax.api.finding import FoundModel, find_model
from fastjax.api.gguf_folder import write_gguf_adapter_folder, write_gguf_folder
from fastjax.api.loading import load_model
from fastjax.api.merging import Merge
from fastjax.config import BasePrecision, DType, ExportFormat, GGUFKind, QuantConfig
from fastjax.errors import ConfigError, ModelError

# Relative errors of logits that the rounding of merged weights and of activations may
# cause: far above what is seen, far below what a wrong merge gives.
_BOUNDS: dict[DType, float] = {"float32": 1e-2, "float16": 0.1, "bfloat16": 0.3}


def run_export(
    name: str,
    folder: Path,
    *,
    output_format: ExportFormat = "hf",
    base_precision: BasePrecision = "original",
    quant: QuantConfig | None = None,
    dtype: DType = "bfloat16",
    gguf_type: GGUFKind = "q8_0",
    calibration_data: str | None = None,
    extra_memory: float = 0.1,
    compare_logits: bool = True,
    overwrite: bool = False,
) -> Iterator[str]:
    """Writes a model or adapter for another tool, and yields lines for people.

    The weights stream from disk to disk. Afterwards the logits of a Hugging Face folder
    are compared with those of base and adapter; that loads one, then the other.

    Args:
      name: Preset, folder or hub name of a model, or folder of an adapter.
      folder: Made, whole or not at all.
      output_format: "hf" is a folder of 16 or 32 bits; "bnb-4bit" the same with linears
        in NF4; "bnb-dynamic" keeps some of these in 16 bits; "gguf" one file for
        llama.cpp; "gguf-lora" the adapter alone for it.
      base_precision: Merge onto the weights of the base, or onto those that
        training saw.
      quant: How these were held; None takes what the run's record says.
      dtype: Of the weights in a Hugging Face folder.
      gguf_type: Of the matrices in a GGUF file.
      calibration_data: Text that decides what "bnb-dynamic" keeps; None takes the
        embedded set.
      extra_memory: What it may spend, as a share of the plain 4-bit model.
      compare_logits: False leaves out the comparison.
      overwrite: Replace an existing folder.

    Raises:
      FastJaxError: The model cannot be read, or the folder not be written; says why.
    """
    files.require_free_name(folder, overwrite=overwrite)
    runtime.configure()
    found = find_model(name)
    if quant is not None and base_precision == "original":
        raise ConfigError(
            "load_in_4bit and load_in_8bit say what training saw; this merge is onto "
            "the original weights",
            fix="add --base_precision dequantised, or leave them out",
        )
    merge = dataclasses.replace(Merge.of(found), quant=quant)
    told = _told(found, base_precision)
    if output_format in ("gguf", "gguf-lora"):
        yield from _gguf(
            merge,
            folder,
            None if output_format == "gguf-lora" else gguf_type,
            base_precision=base_precision,
            dtype=dtype,
            overwrite=overwrite,
            told=told,
        )
        return
    plan = None
    if output_format == "bnb-dynamic":
        plan = plan_dynamic(
            found,
            merge,
            base_precision,
            dtype,
            calibration_data=calibration_data,
            extra_memory=extra_memory,
        )
    is_4bit = output_format in ("bnb-4bit", "bnb-dynamic")
    yield from _hugging_face(
        merge, folder, plan, base_precision, dtype, is_4bit=is_4bit, overwrite=overwrite
    )
    yield f"{told}{output_format}, {dtype}: {folder}"
    if compare_logits:
        bound = _BOUNDS[dtype] if output_format == "hf" else math.inf
        held = QuantConfig(load_in_4bit=False)
        if base_precision == "dequantised":
            held = merge.quant_of_training()
        yield _comparison(name, folder, quant=held, dtype=dtype, bound=bound)


def _gguf(
    merge: Merge,
    folder: Path,
    kind: GGUFKind | None,
    *,
    base_precision: BasePrecision,
    dtype: DType,
    overwrite: bool,
    told: str,
) -> Iterator[str]:
    """Writes a model of a kind, or with None its adapter alone; yields lines on it."""
    if kind is not None:
        weights = merge.weights(base_precision, dtype)
        yield from write_gguf_folder(
            folder, merge, weights, kind=kind, overwrite=overwrite
        )
        yield f"{told}{kind} for llama.cpp: {folder}"
        return
    if not merge.adapter:
        raise ConfigError(
            "format=gguf-lora needs an adapter", fix="give the adapter's folder"
        )
    yield from write_gguf_adapter_folder(folder, merge, overwrite=overwrite)
    yield f"adapter for llama.cpp and Ollama: {folder}"


def _hugging_face(
    merge: Merge,
    folder: Path,
    plan: DynamicPlan | None,
    base_precision: BasePrecision,
    dtype: DType,
    *,
    is_4bit: bool,
    overwrite: bool,
) -> Iterator[str]:
    """Writes a Hugging Face folder; yields what the plan of its formats tells."""
    merge.write_folder(
        folder,
        base_precision=base_precision,
        dtype=dtype,
        is_4bit=is_4bit,
        overwrite=overwrite,
        formats=None if plan is None else plan.formats,
    )
    if plan is not None:
        plan.write(folder)
        yield from plan.lines()


def _told(found: FoundModel, base_precision: BasePrecision) -> str:
    return "" if found.adapter is None else f"merged onto {base_precision} weights, "


def _comparison(
    name: str,
    folder: Path,
    *,
    quant: QuantConfig,
    dtype: DType,
    bound: float,
) -> str:
    """Returns how the logits of a written folder differ from those of its source.

    Raises:
      ModelError: They differ by more than `bound`, relative to their spread, or are
        not finite; the folder has another name then.
    """
    expected = _probe_logits(name, dtype, quant)
    actual = _probe_logits(str(folder), dtype, QuantConfig(load_in_4bit=False))
    difference = np.max(np.abs(actual - expected))
    error = np.linalg.norm(actual - expected) / np.linalg.norm(
        expected - expected.mean(-1, keepdims=True)
    )
    if not (np.isfinite(error) and error <= bound):
        kept = files.set_aside(folder, "failed")
        raise ModelError(
            f"the written model is not its source: its logits are {error:.1%} off",
            where=f"kept as {kept}",
            fix="export with --dtype float32, or report this with the names of both",
            code="FJ-MODEL-EXPORT",
        )
    agreement = np.mean(np.argmax(actual, -1) == np.argmax(expected, -1))
    return (
        f"written against source on {expected.shape[1]} tokens: largest logit "
        f"difference {float(difference):.3g} of {float(np.ptp(expected)):.3g}, same "
        f"likeliest token {float(agreement):.1%}"
    )


def _probe_logits(
    name: str, dtype: DType, quant: QuantConfig
) -> Float[np.ndarray, "B T V"]:
    """Returns logits of a row that touches the whole vocabulary; drops the model."""
    model = load_model(name, dtype=dtype, quant=quant)
    return np.asarray(model.logits(_probe_ids(model.config.vocab_size)))


def _probe_ids(vocab_size: int) -> Int[np.ndarray, "B T"]:
    count = min(64, vocab_size)
    return np.linspace(0, vocab_size - 1, count).astype(np.int32)[None]
