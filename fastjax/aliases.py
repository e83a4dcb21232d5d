"""Names and values of other tools, and what each of them is here.

Scripts and configs written for transformers, TRL, Unsloth, axolotl or LLaMA-Factory
are pasted as they are. A name that means something here is translated, one that
decides nothing here is noted, and one that would be ignored to somebody's loss is
refused with the reason.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastjax.errors import ConfigError, printable

ALIASES = {
    "model_name_or_path": "model",
    "model_name": "model",
    "base_model": "model",
    "model_id": "model",
    "revision": "model_revision",
    "data": "dataset_name",
    "dataset": "dataset_name",
    "train_file": "dataset_name",
    "validation_file": "eval_dataset_name",
    "eval_dataset": "eval_dataset_name",
    "format_type": "data_format",
    "out": "output_dir",
    "out_dir": "output_dir",
    "adapter_path": "output_dir",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "iters": "max_steps",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",
    "clip_grad_norm": "max_grad_norm",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "lora_target": "lora_target_modules",
    "lora_modules_to_save": "modules_to_save",
    "target_modules": "lora_target_modules",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
    "torch_dtype": "dtype",
    "precision": "dtype",
    "gradient_checkpointing": "remat",
    "use_gradient_checkpointing": "remat",
    "activation_checkpointing": "remat",
    "sample_packing": "packing",
    "packed": "packing",
    "chat_template": "chat_template_path",
    "template": "chat_template_path",
    "val_size": "val_set_size",
    "evaluation_strategy": "eval_strategy",
    "steps_per_eval": "eval_steps",
    "steps_per_report": "logging_steps",
    "save_every": "save_steps",
    "resume": "resume_from_checkpoint",
    "wandb_project": "project",
    "upload_repo": "hub_model_id",
    "random_state": "seed",
    "random_seed": "seed",
    "implementations": "implementation",
}

_VALUES = {
    "dtype": {
        "bf16": "bfloat16",
        "bf16-true": "bfloat16",
        "fp16": "float16",
        "16-true": "float16",
        "half": "float16",
        "fp32": "float32",
        "32-true": "float32",
    },
    "remat": {
        "True": "attention",
        "true": "attention",
        "False": "none",
        "false": "none",
        "full": "layer",
        "unsloth": "layer",
    },
    "init_lora_weights": {"True": "default", "true": "default"},
    "optim": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "lion_32bit": "lion",
    },
    "metric_for_best_model": {
        "loss": "eval_loss",
        "perplexity": "eval_perplexity",
        "None": "eval_loss",
    },
    "resume_from_checkpoint": {
        "True": "auto",
        "true": "auto",
        "False": "no",
        "false": "no",
    },
}
_MOVABLE = "states on the device; offload_optimizer moves them"
# Name -> (what it is here, how its states differ from those that were asked for).
_NEAREST_OPTIMIZERS = {
    "paged_adamw_8bit": ("adamw_8bit", _MOVABLE),
    "paged_adamw_32bit": ("adamw", _MOVABLE),
    "paged_adamw": ("adamw", _MOVABLE),
    "lion_8bit": ("lion", "float32 states"),
    "paged_lion_8bit": ("lion", f"float32 {_MOVABLE}"),
    "paged_lion_32bit": ("lion", _MOVABLE),
}

_ADAPTER_LISTS = (
    *("alpha_pattern", "layers_to_transform", "modules_to_save", "rank_pattern"),
    "trainable_token_indices",
)

# A switch that is on, or off, sets a field.
_SWITCHES = {
    "bf16": {True: ("dtype", "bfloat16")},
    "fp16": {True: ("dtype", "float16")},
    "assistant_only_loss": {True: ("train_on", "assistant")},
    "completion_only_loss": {
        True: ("train_on", "completion"),
        False: ("train_on", "all"),
    },
    "train_on_inputs": {True: ("train_on", "all")},
    "train_on_prompt": {True: ("train_on", "all")},
    "mask_prompt": {False: ("train_on", "all")},
}

_OFF = (None, False, 0, "", "no", "none", "None", "False", "false", "0", [], {})

# Name -> (values that change nothing, what to know of the others).
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "trust_remote_code": (_OFF, "fastjax runs no code from model repositories"),
    "greater_is_better": (_OFF, "the evaluation's loss is better when smaller"),
    "logging_strategy": (("steps", None), "logging_steps counts steps"),
    "packing_strategy": (("bfd", None), "documents are packed by best fit"),
    "loss_type": (("nll", None), "the loss is cross-entropy"),
    "label_smoothing_factor": (_OFF, "the loss is plain cross-entropy"),
    "lr_scheduler_kwargs": (_OFF, "the schedules take no options"),
    "optim_args": (_OFF, "the optimisers are set by the adam_* fields"),
    "eval_packing": (_OFF, "evaluation rows are packed as training rows are"),
    "save_only_model": (_OFF, "checkpoints hold all that resuming needs"),
    "auto_find_batch_size": (_OFF, "set per_device_train_batch_size"),
    "dataloader_drop_last": (_OFF, "the last, smaller batch trains too"),
    "activation_offloading": (_OFF, "use remat layer to save memory"),
    "eos_token": (_OFF, "set it on the tokenizer"),
    "pad_token": (_OFF, "padding is known by its length; set it on the tokenizer"),
    "use_cpu": (_OFF, "set JAX_PLATFORMS=cpu in the environment"),
    "no_cuda": (_OFF, "set JAX_PLATFORMS=cpu in the environment"),
    "deepspeed": (_OFF, "runs use one device"),
    "fsdp": (_OFF, "runs use one device"),
}

_SECRETS = frozenset(["hub_token", "token", "hf_token", "push_to_hub_token"])

_WITHOUT_EFFECT = frozenset(
    [
        "average_tokens_across_devices",
        "bf16_full_eval",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataset_batch_size",
        "dataset_kwargs",
        "dataset_num_proc",
        "ddp_find_unused_parameters",
        "ddp_timeout",
        "disable_tqdm",
        "do_eval",
        "do_predict",
        "do_train",
        "eval_accumulation_steps",
        "fp16_full_eval",
        "gradient_checkpointing_kwargs",
        "group_by_length",
        "half_precision_backend",
        "hub_strategy",
        "include_num_input_tokens_seen",
        "include_tokens_per_second",
        "label_names",
        "local_rank",
        "log_level",
        "logging_dir",
        "logging_nan_inf_filter",
        "num_proc",
        "overwrite_output_dir",
        "pad_to_multiple_of",
        "padding_free",
        "prediction_loss_only",
        "remove_unused_columns",
        "save_safetensors",
        "skip_memory_metrics",
        "tf32",
        "torch_compile",
        "torch_empty_cache_steps",
        "use_liger_kernel",
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Translation:
    """What a name and value of another tool are here.

    Attributes:
      name: Canonical field; empty when nothing is to be set.
      value: Its value.
      note: One sentence for the user, or empty.
      has_no_effect: The name is known and decides nothing here.
    """

    name: str = ""
    value: Any = None
    note: str = ""
    has_no_effect: bool = False


def translation(name: str, value: Any) -> Translation:
    """Returns what to set for a name and value as another tool knows them.

    Names that nobody knows come back as they are.

    Raises:
      ConfigError: The name is known, and its value asks for what does not exist.
    """
    name = ALIASES.get(name, name)
    if name in _SECRETS and value is not None:
        raise ConfigError(
            f"{name} is not taken, so that it is written nowhere: set HF_TOKEN in the "
            "environment, or run `hf auth login`"
        )
    if name in _WITHOUT_EFFECT or name in _SECRETS:
        return Translation(has_no_effect=True)
    if name in _ONLY:
        harmless, reason = _ONLY[name]
        if value in harmless:
            return Translation()
        raise ConfigError(f"{name}={printable(value)} is not supported: {reason}")
    if name in _SWITCHES:
        found = _SWITCHES[name].get(boolean(name, value), ("", None))
        return Translation(name=found[0], value=found[1])
    if name in _ADAPTER_LISTS:
        return Translation(name=name, value=_entries(value))
    if name == "report_to" and value in (None, "", "no", "none", "None", ["none"]):
        return Translation(name=name, value=())
    if name == "resume_from_checkpoint" and value is None:
        return Translation()
    if name == "optim" and str(value) in _NEAREST_OPTIMIZERS:
        nearest, states = _NEAREST_OPTIMIZERS[str(value)]
        note = f"optim={value} runs as {nearest} with {states}"
        return Translation(name=name, value=nearest, note=note)
    if name == "dtype":
        value = str(value).removeprefix("torch.")
    return Translation(name=name, value=_VALUES.get(name, {}).get(str(value), value))


def _entries(value: Any) -> Any:
    """Returns null as an empty list, one number as a list, and PEFT's objects of
    expressions and numbers as "EXPRESSION=NUMBER".
    """
    if value is None or value in ("", "none", "None", "null"):
        return []
    if isinstance(value, Mapping):
        return [f"{expression}={number}" for expression, number in value.items()]
    return [value] if isinstance(value, int) else value


def boolean(name: str, value: Any) -> bool:
    """Returns a switch's value, also from text.

    Raises:
      ConfigError: It is neither true nor false.
    """
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ConfigError(f"{name}={printable(value)!r} must be true or false")
