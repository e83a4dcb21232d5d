"""What a run is: frozen dataclasses whose fields are the flags of the command line.

Field names are Hugging Face's, and unique over all parts, so that flags and YAML keys
are flat. `TrainConfig` is all that training reads.
"""

import dataclasses
import math
from typing import Literal, get_args

from fastjax.errors import ConfigError

DType = Literal["bfloat16", "float16", "float32"]
RematPolicy = Literal["none", "attention", "layer"]
LoRABias = Literal["none", "all", "lora_only"]
Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr"
]
Optimizer = Literal["adamw", "adafactor", "lion", "sgd"]
DataFormat = Literal["auto", "text", "prompt_completion", "messages", "alpaca"]
TrainOn = Literal["auto", "assistant", "last", "completion", "all"]

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Implementations:
    """Implementation of each op by name; None takes the first that can run."""

    attention: str | None = None
    lora_matmul: str | None = None
    rms_norm: str | None = None
    rope: str | None = None
    gated_mlp: str | None = None
    cross_entropy: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """Which layers get adapters (2106.09685), and of what kind.

    Attributes:
      lora_r: Rank.
      lora_alpha: The adapter is multiplied by alpha / r.
      lora_dropout: Share of the adapter's input that is dropped while training.
      lora_target_modules: "all-linear", a regular expression over full module names,
        or names that match by suffix, as in PEFT.
      lora_bias: Biases that train: none, all, or those of adapted layers.
      use_rslora: Multiply by alpha / sqrt(r) instead (2312.03732).
      use_dora: Train a magnitude for each output feature (2402.09353).
    """

    lora_r: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_target_modules: str | tuple[str, ...] = ALL_LINEAR
    lora_bias: LoRABias = "none"
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        _check("lora_r", self.lora_r, self.lora_r >= 1, "at least 1")
        finite = math.isfinite(self.lora_alpha) and self.lora_alpha > 0
        _check("lora_alpha", self.lora_alpha, finite, "a positive number")
        share = 0.0 <= self.lora_dropout < 1.0
        _check("lora_dropout", self.lora_dropout, share, "in [0, 1)")
        if not self.lora_target_modules:
            raise ConfigError(
                "lora_target_modules is empty", fix="name modules, or use all-linear"
            )

    @property
    def scaling(self) -> float:
        """The factor of the adapter's product."""
        r = math.sqrt(self.lora_r) if self.use_rslora else self.lora_r
        return self.lora_alpha / r


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """How frozen weights are stored (2305.14314)."""

    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where rows come from and which of their tokens are trained.

    Attributes:
      dataset_name: File, folder or hub name; None takes the embedded set.
      eval_dataset_name: The same for evaluation; None evaluates on `val_set_size`.
      val_set_size: Rows held out: a count, or a share below 1; 0 holds out none.
      dataset_text_field: Column of the format "text".
      column_map: Renames columns before the format is detected: "question=prompt".
      max_length: Tokens of a row.
      packing: Several documents share a row, isolated from each other; None packs
        the format "text" only.
      train_on: Tokens that carry loss; "auto" takes assistant turns, completions, or
        all of a plain text.
      chat_template_path: Jinja file or tokenizer folder; None takes the tokenizer's.
      overlong: What happens to a row longer than `max_length`.
      skip_bad_rows: Broken rows that are tolerated and counted.
    """

    dataset_name: str | None = None
    eval_dataset_name: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    val_set_size: float = 0.0
    data_format: DataFormat = "auto"
    dataset_text_field: str = "text"
    column_map: tuple[str, ...] = ()
    max_length: int = 2048
    packing: bool | None = None
    train_on: TrainOn = "auto"
    chat_template_path: str | None = None
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    skip_bad_rows: int = 0

    def __post_init__(self) -> None:
        _check("max_length", self.max_length, self.max_length >= 2, "at least 2")
        _check("val_set_size", self.val_set_size, self.val_set_size >= 0, "0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How gradients become updates.

    Attributes:
      warmup_steps: Steps of rising learning rate; below 1, a share of all steps.
    """

    optim: Optimizer = "adamw"
    learning_rate: float = 2e-4
    lr_scheduler_type: Schedule = "linear"
    warmup_steps: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        rate = self.learning_rate
        good = math.isfinite(rate) and rate > 0
        _check("learning_rate", rate, good, "a positive number")
        _check("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            _check(name, value, math.isfinite(value) and value >= 0, "0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            _check(name, value, 0 <= value < 1, "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that a training run depends on.

    Attributes:
      model: Preset name, hub name or folder.
      model_revision: Branch, tag or commit of a hub model.
      output_dir: Where adapter, checkpoints and metrics go; None derives a name.
      full_finetuning: Train every weight instead of adapters.
      dtype: Of activations and matrix products; sums are always float32.
      remat: What the backward pass recomputes: "none" only norms and activations,
        "attention" the attention blocks too, "layer" everything but layer inputs.
      max_steps: Optimiser steps; -1 follows `num_train_epochs`.
      eval_steps: Steps between evaluations; 0 evaluates at the end only.
      save_steps: Steps between checkpoints; 0 saves at the end only.
      save_total_limit: Newest checkpoints that are kept.
      resume_from_checkpoint: "auto" continues the newest whole checkpoint of
        `output_dir`, "no" starts anew, a path continues that one or fails.
      data_seed: Of the order of the data; None takes `seed`.
      full_determinism: Bit-equal results run after run on one device.
      implementations: Implementation of each op, for comparisons.
    """

    model: str = "llama3-8b"
    model_revision: str = "main"
    output_dir: str | None = None
    full_finetuning: bool = False
    dtype: DType = "bfloat16"
    remat: RematPolicy = "attention"
    per_device_train_batch_size: int = 2
    per_device_eval_batch_size: int = 2
    gradient_accumulation_steps: int = 8
    num_train_epochs: float = 1.0
    max_steps: int = -1
    logging_steps: int = 10
    eval_steps: int = 0
    save_steps: int = 100
    save_total_limit: int = 3
    resume_from_checkpoint: str = "auto"
    allow_config_change: bool = False
    seed: int = 42
    data_seed: int | None = None
    full_determinism: bool = False
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    implementations: Implementations = dataclasses.field(
        default_factory=Implementations
    )

    def __post_init__(self) -> None:
        conflicts = [text for broken, text in self._conflicts() if broken]
        if conflicts:
            raise ConfigError("; ".join(conflicts))

    def _conflicts(self) -> list[tuple[bool, str]]:
        counts = ("per_device_train_batch_size", "per_device_eval_batch_size")
        counts += ("gradient_accumulation_steps", "logging_steps", "save_total_limit")
        rows = [
            (getattr(self, name) < 1, f"{name}={getattr(self, name)} must be >= 1")
            for name in counts
        ]
        for name in ("eval_steps", "save_steps", "seed"):
            value = getattr(self, name)
            rows.append((value < 0, f"{name}={value} must be >= 0"))
        rows.append(
            (
                self.max_steps < 1 and self.num_train_epochs <= 0,
                f"max_steps={self.max_steps} and num_train_epochs="
                f"{self.num_train_epochs} leave nothing to train; set one of them",
            )
        )
        rows.append(
            (
                self.full_finetuning and self.quant.load_in_4bit,
                "full_finetuning trains every weight, load_in_4bit freezes them; "
                "add --no-load_in_4bit or drop --full_finetuning",
            )
        )
        return rows


def choices(alias: object) -> tuple[str, ...]:
    """Returns the allowed values of a Literal."""
    return get_args(alias)


def _check(name: str, value: object, good: bool, rule: str) -> None:
    if not good:
        raise ConfigError(f"{name}={value!r} must be {rule}")
