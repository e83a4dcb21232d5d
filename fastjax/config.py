"""What a run is: frozen dataclasses whose fields are the flags of the command line.

Field names are Hugging Face's, and unique over all parts, so that flags and YAML keys
are flat. `TrainConfig` is all that training reads.
"""

import dataclasses
import math
from typing import Literal, get_args

from fastjax.config_rules import Number as Number
from fastjax.config_rules import is_positive, keep_floats, require
from fastjax.errors import ConfigError
from fastjax.implementation_config import Implementations as Implementations
from fastjax.lora_config import ALL_LINEAR as ALL_LINEAR
from fastjax.lora_config import LoRABias as LoRABias
from fastjax.lora_config import LoRAConfig as LoRAConfig
from fastjax.lora_config import LoRAStart as LoRAStart
from fastjax.lora_config import Table as Table
from fastjax.optimizer_config import Optimizer as Optimizer
from fastjax.optimizer_config import OptimizerConfig as OptimizerConfig
from fastjax.optimizer_config import Schedule as Schedule
from fastjax.report_config import ReportConfig as ReportConfig

DType = Literal["bfloat16", "float16", "float32"]
RematPolicy = Literal["none", "norms", "attention", "layer", "offload", "layer_offload"]
RematChoice = Literal[RematPolicy, "auto"]
DataFormat = Literal[
    "auto",
    "text",
    "prompt_completion",
    "messages",
    "sharegpt",
    "alpaca",
    "tokens",
    "segments",
]
RopeScaling = Literal["none", "linear", "dynamic", "yarn"]
Overlong = Literal["truncate", "split", "drop", "error"]
SpecialTokens = Literal["keep", "error"]
TrainOn = Literal["auto", "assistant", "last", "completion", "all"]
When = Literal["no", "steps", "epoch"]
BasePrecision = Literal["original", "dequantised"]
CombineMethod = Literal["concat", "linear", "svd"]
ExportFormat = Literal["hf", "bnb-4bit", "bnb-dynamic", "gguf", "gguf-lora"]
GGUFKind = Literal[
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q2_k",
    "q3_k_s",
    "q3_k_m",
    "q3_k_l",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """How frozen weights are stored (2305.14314, in 8 bits 2208.07339).

    Attributes:
      load_in_4bit: Linears take 4 bits a weight and a scale for each block of 64.
      load_in_8bit: Linears take 8 bits a weight and a scale for each output; twice the
        memory of 4 bits.
      bnb_4bit_quant_type: The 16 values of 4 bits: those of a normal distribution, or
        small floating-point numbers.
      bnb_4bit_use_double_quant: The scales of blocks take 8 bits themselves.
    """

    load_in_4bit: bool = True
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError(
                "load_in_4bit and load_in_8bit are both on; weights have one size",
                fix="add --no-load_in_4bit or drop --load_in_8bit",
            )

    @classmethod
    def asked(cls, *, load_in_4bit: bool, load_in_8bit: bool) -> "QuantConfig":
        """Returns what two flags ask for; 8 bits take the place of 4, the default."""
        return cls(
            load_in_4bit=load_in_4bit and not load_in_8bit, load_in_8bit=load_in_8bit
        )

    @property
    def is_packed(self) -> bool:
        """Whether linears take fewer bits than 16."""
        return self.load_in_4bit or self.load_in_8bit


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where rows come from and which of their tokens are trained.

    Attributes:
      dataset_name: File, glob, folder or hub name, or several with commas between;
        None takes the embedded set.
      dataset_weights: How often an epoch sees each row of each of several sources:
        2 twice, 0.5 a half of them; none is once.
      eval_dataset_name: The same for evaluation; None evaluates on `val_set_size`.
      dataset_train_split: Split of a hub set that trains, or files of a folder whose
        names begin so; "train[:10%]" takes a part of a hub set.
      dataset_test_split: The same for evaluation.
      max_train_samples: Rows that are read of each source, from its start; a set of the
        hub is then streamed, not downloaded before. 0 reads all.
      val_set_size: Rows held out: a count, or a share below 1; 0 holds out none.
      data_format: What a row is: a text; a prompt and its completion; messages;
        ShareGPT's conversations; Alpaca's instruction, input and output; token ids;
        segments that train or not. "auto" tells by the columns of the first row.
      dataset_text_field: Column of plain texts, which makes "auto" the format "text";
        None takes the column "text" where "auto" or `data_format` reads one.
      column_map: Renames columns before the format is detected: "question=prompt".
      max_length: Tokens of a row.
      packing: Several documents share a row, isolated from each other; None packs
        the format "text" only.
      train_on: Tokens that carry loss; "auto" takes assistant turns, completions, or
        all of a plain text.
      new_tokens: Texts that become one token each; embeddings and output head grow.
      chat_template_path: Jinja file or tokenizer folder; None takes the tokenizer's.
      overlong: What happens to a row longer than `max_length`; None splits the format
        "text" and truncates the others.
      skip_bad_rows: Broken rows that are tolerated and counted.
      special_tokens_in_text: Control tokens inside messages are read as such, or their
        rows are broken ones.
      neftune_noise_alpha: Size of the noise on embeddings while training (2310.05914);
        0 is none.
      use_dataset_cache: Keep tokenised files of some size for the next run.
    """

    dataset_name: str | None = None
    dataset_weights: tuple[Number, ...] = ()
    eval_dataset_name: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    max_train_samples: int = 0
    val_set_size: Number = 0.0
    data_format: DataFormat = "auto"
    dataset_text_field: str | None = None
    column_map: tuple[str, ...] = ()
    max_length: int = 2048
    packing: bool | None = None
    train_on: TrainOn = "auto"
    new_tokens: tuple[str, ...] = ()
    chat_template_path: str | None = None
    overlong: Overlong | None = None
    skip_bad_rows: int = 0
    special_tokens_in_text: SpecialTokens = "keep"
    neftune_noise_alpha: Number = 0.0
    use_dataset_cache: bool = True

    def __post_init__(self) -> None:
        keep_floats(self)
        size = self.val_set_size
        is_share_or_count = 0 <= size < 1 or size.is_integer()
        require(
            self,
            max_length=(self.max_length >= 2, "at least 2"),
            dataset_text_field=(
                self.dataset_text_field is None or self.data_format in ("auto", "text"),
                f"left out: data_format={self.data_format} has no column of texts",
            ),
            val_set_size=(
                size >= 0 and is_share_or_count,
                "a count of rows, or a share below 1",
            ),
            skip_bad_rows=(self.skip_bad_rows >= 0, "0 or more"),
            max_train_samples=(self.max_train_samples >= 0, "0 or more"),
            dataset_weights=(
                all(is_positive(weight) for weight in self.dataset_weights),
                "positive numbers",
            ),
            neftune_noise_alpha=(
                math.isfinite(self.neftune_noise_alpha)
                and self.neftune_noise_alpha >= 0,
                "0 or more",
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that a training run depends on.

    Attributes:
      model: Preset name, hub name or folder.
      model_revision: Branch, tag or commit of a hub model.
      output_dir: Where adapter, checkpoints and metrics go; None derives a name.
      rope_scaling: How RoPE is stretched where `max_length` is beyond the model's
        context: "linear" divides positions, "dynamic" raises the base for documents
        that are longer, "yarn" divides low frequencies; "none" refuses these.
      context_length: Tokens that `rope_scaling` makes room for, where rows are shorter;
        None makes room for `max_length`.
      full_finetuning: Train every weight instead of adapters.
      dtype: Of activations and matrix products; sums are always float32.
      remat: What the backward pass recomputes: "none" only activations, "norms" norms
        too, "attention" the attention blocks, "layer" all but layer inputs, "offload"
        as much, and keeps these and attention's output in host memory,
        "layer_offload" the layer inputs alone; "auto" measures them and picks for each
        layer what is fastest within the memory.
      unroll_layers: Write layers that keep much out in the program, for a faster step,
        a longer compilation; False scans them, None writes them out where the run is
        long enough to gain by it.
      per_device_train_batch_size: Rows of a micro-batch; memory grows with them.
      per_device_eval_batch_size: Rows that are evaluated at once; the loss does not
        depend on it.
      gradient_accumulation_steps: Micro-batches of one step. The gradient is that of
        all their rows at once, in the memory of one.
      num_train_epochs: How often each row is seen, unless `max_steps` says; 0.5 is a
        half of the rows.
      max_steps: Optimiser steps; -1 follows `num_train_epochs`.
      logging_steps: Steps between lines of metrics.jsonl.
      logging_first_step: Write a line for the first step too.
      eval_strategy: Evaluate every `eval_steps`, at the end of each epoch, or not at
        all. Without evaluation data nothing is evaluated.
      eval_steps: Steps between evaluations; 0 evaluates at the end only.
      save_strategy: Save every `save_steps`, at the end of each epoch, or only at
        the end ("no").
      save_steps: Steps between checkpoints; 0 saves at the end only.
      save_total_limit: Newest checkpoints that are kept.
      resume_from_checkpoint: "auto" continues the newest whole checkpoint of
        `output_dir`, "no" starts anew, a path continues that one or fails.
      allow_config_change: Go on from a checkpoint of other settings, data or base, as
        long as the weights have its shapes; without, these are listed and refused.
      seed: Of adapters, dropout and the order of the data.
      data_seed: Of the order of the data; None takes `seed`.
      full_determinism: Bit-equal results run after run on one device.
      memory_gib: GPU memory that a run takes at most: one that needs more stops before
        it loads, remat "auto" stays below it, and JAX allocates no more; 0 leaves it to
        JAX, which takes three quarters.
      implementations: Implementation of each op, for comparisons.
    """

    model: str = "llama3-8b"
    model_revision: str = "main"
    output_dir: str | None = None
    rope_scaling: RopeScaling = "none"
    context_length: int | None = None
    full_finetuning: bool = False
    dtype: DType = "bfloat16"
    remat: RematChoice = "attention"
    unroll_layers: bool | None = None
    per_device_train_batch_size: int = 2
    per_device_eval_batch_size: int = 2
    gradient_accumulation_steps: int = 8
    num_train_epochs: Number = 1.0
    max_steps: int = -1
    logging_steps: int = 10
    logging_first_step: bool = False
    eval_strategy: When = "steps"
    eval_steps: int = 0
    save_strategy: When = "steps"
    save_steps: int = 100
    save_total_limit: int = 3
    resume_from_checkpoint: str = "auto"
    allow_config_change: bool = False
    seed: int = 42
    data_seed: int | None = None
    full_determinism: bool = False
    memory_gib: Number = 0.0
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)
    implementations: Implementations = dataclasses.field(
        default_factory=Implementations
    )

    def __post_init__(self) -> None:
        keep_floats(self)
        conflicts = [text for broken, text in self._conflicts() if broken]
        if conflicts:
            raise ConfigError.of(conflicts)

    def _conflicts(self) -> list[tuple[bool, str]]:
        steps, epochs = self.max_steps, self.num_train_epochs
        warmup = self.optimizer.warmup_steps
        return [
            *self._out_of_range(),
            (
                steps < 1 and not (math.isfinite(epochs) and epochs > 0),
                f"max_steps={steps} and num_train_epochs={epochs} leave nothing to "
                "train; set one of them",
            ),
            (
                0 < steps < warmup,
                f"warmup_steps={warmup:g} is more than max_steps={steps}: the "
                "learning rate would never reach its peak",
            ),
            (
                self.eval_strategy == "no" and bool(self.uses_of_evaluation),
                "eval_strategy=no leaves nothing to choose the best weights by, to "
                "stop early by, or to show samples at; set it to steps or epoch",
            ),
            (
                not 0 <= self.memory_gib < math.inf,
                f"memory_gib={self.memory_gib} must be 0 or more",
            ),
            (
                self.context_length is not None
                and (self.rope_scaling == "none" or self.reach < self.data.max_length),
                f"context_length={self.context_length} needs rope_scaling and at least "
                f"max_length={self.data.max_length}",
            ),
            (
                self.full_determinism and self.remat == "auto",
                "remat=auto chooses by times, which differ from run to run; for "
                "full_determinism set remat to one of the policies",
            ),
            (
                self.full_finetuning and self.quant.is_packed,
                "full_finetuning trains every weight, load_in_4bit and load_in_8bit "
                "freeze them; add --no-load_in_4bit or drop --full_finetuning",
            ),
            (
                self.full_finetuning and self.implementations.lora_matmul is not None,
                "full_finetuning has no adapters, so --implementation lora_matmul=... "
                "has nothing to choose",
            ),
        ]

    @property
    def reach(self) -> int:
        """Tokens that `rope_scaling` makes room for."""
        return self.context_length or self.data.max_length

    @property
    def has_dropout(self) -> bool:
        """Whether steps need keys, for dropout or for noise on embeddings."""
        has_dropout = self.lora.lora_dropout > 0 and not self.full_finetuning
        return has_dropout or self.data.neftune_noise_alpha > 0

    @property
    def uses_of_evaluation(self) -> tuple[str, ...]:
        """The settings of this run that mean nothing without evaluations."""
        names = (
            "load_best_model_at_end",
            "early_stopping_patience",
            "eval_on_start",
            "sample_prompts",
        )
        return tuple(name for name in names if getattr(self.report, name))

    def _out_of_range(self) -> list[tuple[bool, str]]:
        at_least = {
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "save_total_limit": 1,
            "eval_steps": 0,
            "save_steps": 0,
            "seed": 0,
            "data_seed": 0,
        }
        values = {name: getattr(self, name) for name in at_least}
        return [
            (value is not None and value < least, f"{name}={value} must be >= {least}")
            for (name, value), least in zip(
                values.items(), at_least.values(), strict=True
            )
        ]


def choices(alias: object) -> tuple[str, ...]:
    """Returns the allowed values of a Literal."""
    return get_args(alias)
