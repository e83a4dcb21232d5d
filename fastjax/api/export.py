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
    merge = _merge(found, base_precision, quant)
    files.require_free_name(folder, overwrite=overwrite, sources=merge.sources)
    export = _Export(
        merge=merge,
        folder=folder,
        base_precision=base_precision,
        dtype=dtype,
        overwrite=overwrite,
    )
    if output_format in ("gguf", "gguf-lora"):
        yield from export.gguf(gguf_type if output_format == "gguf" else None)
        return
    plan = None
    if output_format == "bnb-dynamic":
        plan = export.dynamic_plan(found, calibration_data, extra_memory)
    yield from export.hugging_face(output_format, plan)
    if compare_logits:
        yield export.comparison(name, output_format)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Export:
    """What is written, and where: the same in every format."""

    merge: Merge
    folder: Path
    base_precision: BasePrecision
    dtype: DType
    overwrite: bool

    def gguf(self, kind: GGUFKind | None) -> Iterator[str]:
        """Writes a model of a kind, or with None its adapter alone; yields lines."""
        if kind is not None:
            weights = self.merge.weights(self.base_precision, self.dtype)
            yield from write_gguf_folder(
                self.folder, self.merge, weights, kind=kind, overwrite=self.overwrite
            )
            yield f"{self._merged_onto()}{kind} for llama.cpp: {self.folder}"
            return
        if not self.merge.adapter:
            raise ConfigError(
                "format=gguf-lora needs an adapter", fix="give the adapter's folder"
            )
        yield from write_gguf_adapter_folder(
            self.folder, self.merge, overwrite=self.overwrite
        )
        yield f"adapter for llama.cpp and Ollama: {self.folder}"

    def dynamic_plan(
        self, found: FoundModel, calibration_data: str | None, extra_memory: float
    ) -> DynamicPlan:
        """Returns which linears stay in 16 bits."""
        return plan_dynamic(
            found,
            self.merge,
            self.base_precision,
            self.dtype,
            calibration_data=calibration_data,
            extra_memory=extra_memory,
        )

    def hugging_face(
        self, output_format: ExportFormat, plan: DynamicPlan | None
    ) -> Iterator[str]:
        """Writes a Hugging Face folder; yields what the plan of its formats tells."""
        self.merge.write_folder(
            self.folder,
            base_precision=self.base_precision,
            dtype=self.dtype,
            is_4bit=output_format in ("bnb-4bit", "bnb-dynamic"),
            overwrite=self.overwrite,
            formats=None if plan is None else plan.formats,
        )
        if plan is not None:
            plan.write(self.folder)
            yield from plan.lines()
        yield f"{self._merged_onto()}{output_format}, {self.dtype}: {self.folder}"

    def comparison(self, name: str, output_format: ExportFormat) -> str:
        """Returns how the logits of the folder differ from those of its source."""
        held = QuantConfig(load_in_4bit=False)
        if self.base_precision == "dequantised":
            held = self.merge.quant_of_training()
        bound = _BOUNDS[self.dtype] if output_format == "hf" else math.inf
        return _comparison(name, self.folder, quant=held, dtype=self.dtype, bound=bound)

    def _merged_onto(self) -> str:
        if self.merge.adapter_folder is None:
            return ""
        return f"merged onto {self.base_precision} weights, "


def _merge(
    found: FoundModel, base_precision: BasePrecision, quant: QuantConfig | None
) -> Merge:
    if quant is not None and base_precision == "original":
        raise ConfigError(
            "load_in_4bit and load_in_8bit say what training saw; this merge is onto "
            "the original weights",
            fix="add --base_precision dequantised, or leave them out",
        )
    return dataclasses.replace(Merge.of(found), quant=quant)


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
