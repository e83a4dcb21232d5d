"""4-bit folders that keep in 16 bits what calibration text says matters most."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from conversions.hf import Checkpoint, stored_formats
from fastjax.api.finding import FoundModel, load_tokenizer
from fastjax.api.merging import Merge
from fastjax.config import BasePrecision, DataConfig, DType
from fastjax.data import Loader, load_data
from fastjax.errors import ConfigError, ModelError
from fastjax.lora import plain_spec
from fastjax.models.build import Weights, build_decoder, linear_names
from fastjax.nn.linear import PackedFormat
from fastjax.sensitivity import Batch, Calibration, GroupError, kept_in_16_bits

REPORT_NAME = "quantization_report.json"
_ROWS, _LENGTH, _MOST_BATCHES = 4, 512, 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DynamicPlan:
    """Which linears become 4-bit, and why.

    Attributes:
      formats: Format of those that do, by canonical module name.
      errors: What 4 bits do to each group.
      kept: The groups that stay in 16 bits.
      plain_divergence: With every linear in 4 bits, nats a token.
      divergence: With these formats.
    """

    formats: Mapping[str, PackedFormat]
    errors: tuple[GroupError, ...]
    kept: tuple[GroupError, ...]
    plain_divergence: float
    divergence: float

    def lines(self) -> Iterator[str]:
        """Yields what people want to know."""
        more = sum(group.extra_bytes for group in self.kept)
        modules = sum(len(group.modules) for group in self.kept)
        yield (
            f"{modules} linears stay in 16 bits, {more / 2**20:,.1f} MiB more; "
            f"divergence {self.divergence:.4g} nats a token, plain 4-bit "
            f"{self.plain_divergence:.4g}"
        )
        yield f"{REPORT_NAME} has the error of each module"
        yield (
            "some versions of vLLM do not load 4-bit folders with layers in 16 bits; "
            "transformers with bitsandbytes does"
        )

    def write(self, folder: Path) -> None:
        """Writes the errors beside the weights."""
        kept = {module for group in self.kept for module in group.modules}
        values: dict[str, Any] = {
            "divergence": self.divergence,
            "plain_divergence": self.plain_divergence,
            "groups": [
                dataclasses.asdict(group) | {"in_16_bits": group.modules[0] in kept}
                for group in self.errors
            ],
        }
        (folder / REPORT_NAME).write_text(json.dumps(values, indent=1) + "\n")


def plan_dynamic(
    found: FoundModel,
    merge: Merge,
    base_precision: BasePrecision,
    dtype: DType,
    *,
    calibration_data: str | None,
    extra_memory: float,
) -> DynamicPlan:
    """Returns which linears stay in 16 bits; holds the 16-bit model meanwhile.

    Args:
      found: Where the model is; gives the tokenizer.
      merge: The model, with its adapter merged.
      base_precision: What the adapter is merged onto.
      dtype: Of the weights that stay dense.
      calibration_data: What `dataset_name` of a run may be; None takes the embedded
        questions and answers.
      extra_memory: Bytes to spend, as a share of the plain 4-bit model's.

    Raises:
      ConfigError: The share is not positive.
      ModelError: The base is 4-bit already, or has no tokenizer.
    """
    config = merge.spec.config
    if not 0 < extra_memory < 3:
        raise ConfigError(f"extra_memory={extra_memory} must be above 0 and below 3")
    if stored_formats(Checkpoint(merge.folder), config):
        raise ModelError(
            "this model is in 4 bits already",
            where=str(merge.folder),
            fix="calibrate the 16-bit model that it was made of",
        )
    batches = _batches(found, config.vocab_size, calibration_data)
    weights: Weights = {
        name: jnp.asarray(value).astype(dtype)
        for name, value in merge.weights(base_precision, dtype)
    }
    itemsize = jnp.dtype(dtype).itemsize
    dense_bytes = itemsize * sum(value.size for value in weights.values())
    spec = dataclasses.replace(
        plain_spec(merge.spec), param_dtype=dtype, compute_dtype=dtype, packed={}
    )
    packed = PackedFormat(dtype=dtype)
    calibration = Calibration(build_decoder(spec, weights), spec, batches, packed)
    errors = tuple(calibration.errors())
    plain_bytes = dense_bytes - sum(error.extra_bytes for error in errors)
    kept = kept_in_16_bits(errors, budget_bytes=int(extra_memory * plain_bytes))
    dense = {module for group in kept for module in group.modules}
    names = linear_names(config)
    left = [name for name in names if name not in dense]
    return DynamicPlan(
        formats=dict.fromkeys(left, packed),
        errors=errors,
        kept=tuple(kept),
        plain_divergence=calibration.divergence(names),
        divergence=calibration.divergence(left),
    )


def _batches(found: FoundModel, vocab_size: int, name: str | None) -> list[Batch]:
    tokenizer = load_tokenizer(*found.tokenizer_folders)
    if tokenizer is None:
        raise ModelError(
            "the model folder has no tokenizer to read calibration text with",
            where=str(found.folder),
        )
    config = DataConfig(dataset_name=name, max_length=_LENGTH, packing=True)
    data = load_data(config, tokenizer, seed=0, vocab_size=vocab_size)
    loader = Loader(
        data.train, batch_size=_ROWS, max_length=_LENGTH, packing=True, seed=0
    )
    count = min(_MOST_BATCHES, loader.steps_per_epoch)
    return [
        {key: jnp.asarray(array[0]) for key, array in loader.batch(step).items()}
        for step in range(count)
    ]
