"""Flat names and values become the configuration, or an error that says why not."""

from typing import Any

import pytest

from fastjax.config import TrainConfig
from fastjax.errors import ConfigError
from fastjax.flat_config import field_types, flat_values, train_config


def read(**flat: Any) -> TrainConfig:
    return train_config(flat).config


@pytest.mark.parametrize(
    ("flat", "name", "expected"),
    [
        ({"lr": "1e-5"}, "learning_rate", 1e-5),
        ({"learning_rate": 1}, "learning_rate", 1.0),
        ({"epochs": "2"}, "num_train_epochs", 2.0),
        ({"max_seq_length": "64"}, "max_length", 64),
        ({"cutoff_len": 1e2}, "max_length", 100),
        ({"warmup_ratio": 0.1}, "warmup_steps", 0.1),
        ({"warmup_steps": 5, "warmup_ratio": 0.0}, "warmup_steps", 5.0),
        ({"warmup_ratio": 0.2, "warmup_steps": 0}, "warmup_steps", 0.2),
        ({"bf16": True, "fp16": False}, "dtype", "bfloat16"),
        ({"fp16": "true", "bf16": "false"}, "dtype", "float16"),
        ({"torch_dtype": "torch.float32"}, "dtype", "float32"),
        ({"precision": "bf16-true"}, "dtype", "bfloat16"),
        ({"gradient_checkpointing": True}, "remat", "attention"),
        ({"gradient_checkpointing": "false"}, "remat", "none"),
        ({"gradient_checkpointing": "unsloth"}, "remat", "layer"),
        ({"optim": "adamw_torch_fused"}, "optim", "adamw"),
        ({"optim": "adamw_bnb_8bit"}, "optim", "adamw_8bit"),
        ({"optim": "paged_adamw_8bit"}, "optim", "adamw_8bit"),
        ({"optim": "lion_8bit"}, "optim", "lion"),
        ({"evaluation_strategy": "epoch"}, "eval_strategy", "epoch"),
        ({"save_strategy": False}, "save_strategy", "no"),
        ({"resume_from_checkpoint": True}, "resume_from_checkpoint", "auto"),
        ({"resume": "checkpoint-7"}, "resume_from_checkpoint", "checkpoint-7"),
        ({"assistant_only_loss": True}, "train_on", "assistant"),
        ({"completion_only_loss": False}, "train_on", "all"),
        ({"train_on_inputs": False}, "train_on", "auto"),
        ({"packing": "none"}, "packing", None),
        ({"packing": "no"}, "packing", False),
        ({"target_modules": "q_proj,v_proj"}, "lora_target_modules", "[q_proj,v_proj]"),
        ({"target_modules": ["q_proj"]}, "lora_target_modules", "[q_proj]"),
        ({"target_modules": r".*\.q_proj"}, "lora_target_modules", r".*\.q_proj"),
        ({"implementation": "rope=xla"}, "implementation", "[rope=xla]"),
        ({"rope_scaling": False}, "rope_scaling", "none"),
        ({"per-device-train-batch-size": "3"}, "per_device_train_batch_size", 3),
    ],
)
def test_names_and_values_of_other_tools(
    flat: dict[str, Any], name: str, expected: object
) -> None:
    value = flat_values(train_config(flat).config)[name]
    shown = f"[{','.join(value)}]" if isinstance(value, list) else value
    assert shown == expected
    assert isinstance(shown, type(expected))


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"learning_rat": 1}, "'learning_rat'; did you mean 'learning_rate'"),
        ({"lora_rnk": 1}, "did you mean 'lora_rank'"),
        ({"max_steps": "nan"}, "max_steps=nan must be a whole number"),
        ({"max_steps": 2.5}, "max_steps=2.5 must be a whole number"),
        ({"max_steps": True}, "needs a value: a whole number"),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be a number"),
        ({"learning_rate": None}, "must be a number"),
        ({"packing": "perhaps"}, "must be true or false"),
        ({"dtype": "int8"}, "one of: bfloat16, float16, float32"),
        ({"lr_scheduler_type": False}, "lr_scheduler_type needs a value: one of"),
        ({"lr_scheduler_type": "polynomial"}, "one of: linear, cosine"),
        ({"dataset_name": ["a", "b"]}, "must be text"),
        ({"implementation": "attn=xla"}, "one of: attention, lora_matmul"),
        ({"implementation": "attention"}, "must be OP=NAME"),
        ({"fp16": True, "bf16": True}, "fp16 says float16, bf16 says bfloat16"),
        ({"lr": 1, "learning_rate": 2}, "given twice: lr says 1.0"),
        ({"trust_remote_code": True}, "runs no code from model repositories"),
        ({"report_to": "wandbb"}, "one of: none, tensorboard, wandb"),
        ({"greater_is_better": True}, "better when smaller"),
        ({"neftune_noise_alpha": -5}, "must be 0 or more"),
        ({"logging_strategy": "epoch"}, "logging_steps counts steps"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    flat: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        train_config(flat)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_everything_wrong_is_told_at_once() -> None:
    flat = {"learning_rat": 1, "lora_r": 0, "max_length": 0, "packing": "x", "seed": -1}
    with pytest.raises(ConfigError) as caught:
        train_config(flat)
    assert len(caught.value.problems) == 5
    assert all(name in str(caught.value) for name in flat)


def test_names_without_effect_are_noted_in_one_line() -> None:
    read = train_config({"tf32": True, "dataloader_num_workers": 4, "lr": 1e-4})
    assert read.notes == (
        "read lr as learning_rate",
        "without effect here: tf32, dataloader_num_workers",
    )
    assert read.given == {"learning_rate"}


@pytest.mark.parametrize("value", ["none", None, [], ["none"]])
def test_no_reporting_is_the_default_under_every_name(value: object) -> None:
    assert train_config({"report_to": value}).config == TrainConfig()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw_bnb_8bit", ""),
        (
            "paged_adamw_8bit",
            "adamw_8bit with states on the device; offload_optimizer moves them",
        ),
        ("lion_8bit", "lion with float32 states"),
    ],
)
def test_optimisers_that_differ_say_what_runs(name: str, expected: str) -> None:
    notes = train_config({"optim": name}).notes
    expected_notes = [f"optim={name} runs as {expected}"] if expected else []
    assert [note for note in notes if "optim" in note] == expected_notes


def test_evaluation_by_steps_follows_the_log_unless_told() -> None:
    assert read(eval_strategy="steps", logging_steps=7).eval_steps == 7
    assert read(eval_strategy="steps", eval_steps=3).eval_steps == 3
    assert read(eval_steps=3).eval_strategy == "steps"
    assert read().eval_steps == 0


def test_full_finetuning_turns_off_4_bit_unless_both_are_asked_for() -> None:
    assert not read(full_finetuning=True).quant.load_in_4bit
    with pytest.raises(ConfigError, match="load_in_4bit"):
        read(full_finetuning=True, load_in_4bit=True)
    base = train_config({"load_in_4bit": True})
    with pytest.raises(ConfigError, match="load_in_4bit"):
        train_config({"full_finetuning": True}, base=base)


def test_later_settings_are_laid_over_earlier_ones() -> None:
    base = train_config({"learning_rate": 1e-3, "lora_r": 8})
    both = train_config({"lr": 1e-4}, base=base)
    assert both.config.optimizer.learning_rate == 1e-4
    assert both.config.lora.lora_r == 8
    assert both.given == {"learning_rate", "lora_r"}


def test_every_field_is_flat_and_comes_back() -> None:
    config = read(
        lora_target_modules=["q_proj", "v_proj"],
        implementation="attention=xla,rope=reference",
        val_set_size=0.1,
        column_map=["question=prompt"],
        eval_strategy="no",
    )
    values = flat_values(config)
    assert set(values) == set(field_types())
    assert train_config(values).config == config
