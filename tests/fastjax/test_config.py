"""The configuration's own rules: ranges, conflicts, numbers."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from fastjax.api import load_model
from fastjax.config import (
    DataConfig,
    Implementations,
    LoRAConfig,
    OptimizerConfig,
    QuantConfig,
    TrainConfig,
)
from fastjax.errors import ConfigError
from fastjax.implementation_config import IMPLEMENTATION_NAMES
from kernels import dispatch
from kernels.cross_entropy import linear_cross_entropy


def test_the_names_of_implementations_are_those_of_the_kernels(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, set[str]] = {}
    run = dispatch.run

    def noting(op: str, implementations: dict, *args: Any, **kwargs: Any) -> Any:
        known.setdefault(op, set()).update(implementations)
        return run(op, implementations, *args, **kwargs)

    monkeypatch.setattr(dispatch, "run", noting)
    decoder = load_model(str(small_model), dtype="float32").decoder
    ids = jnp.arange(6)[None]
    hidden = decoder(ids, positions=ids)[0]
    linear_cross_entropy(hidden, decoder.head_weight(), ids[0])
    assert {op: set(names) for op, names in IMPLEMENTATION_NAMES.items()} == {
        op: known[op] for op in IMPLEMENTATION_NAMES
    }
    assert known["add_rms_norm"] == known["rms_norm"]


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        (Implementations, {"attention": "nope"}),
        (Implementations, {"rope": "mosaic_gpu"}),
        (LoRAConfig, {"lora_r": 0}),
        (LoRAConfig, {"lora_alpha": math.nan}),
        (LoRAConfig, {"lora_alpha": 0}),
        (LoRAConfig, {"lora_dropout": 1.0}),
        (LoRAConfig, {"lora_target_modules": ()}),
        (DataConfig, {"max_length": 1}),
        (DataConfig, {"dataset_text_field": "text", "data_format": "alpaca"}),
        (DataConfig, {"val_set_size": -1}),
        (DataConfig, {"val_set_size": 1.5}),
        (DataConfig, {"skip_bad_rows": -1}),
        (OptimizerConfig, {"learning_rate": 0.0}),
        (OptimizerConfig, {"learning_rate": math.inf}),
        (OptimizerConfig, {"offload_optimizer": True, "optim": "adafactor"}),
        (OptimizerConfig, {"warmup_steps": -1}),
        (OptimizerConfig, {"weight_decay": math.nan}),
        (OptimizerConfig, {"adam_beta2": 1.0}),
        (OptimizerConfig, {"adam_epsilon": 0.0}),
        (TrainConfig, {"per_device_train_batch_size": 0}),
        (TrainConfig, {"gradient_accumulation_steps": 0}),
        (TrainConfig, {"logging_steps": 0}),
        (TrainConfig, {"save_steps": -1}),
        (TrainConfig, {"seed": -1}),
        (TrainConfig, {"data_seed": -1}),
        (TrainConfig, {"num_train_epochs": 0}),
        (TrainConfig, {"num_train_epochs": math.inf}),
    ],
)
def test_impossible_values_are_refused_by_name(part: type, fields: dict) -> None:
    name, value = next(iter(fields.items()))
    with pytest.raises(ConfigError, match=f"{name}=.*{value}".replace("()", "")):
        part(**fields)


def test_everything_wrong_in_a_part_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LoRAConfig(lora_r=-1, lora_dropout=2.0)
    assert len(caught.value.problems) == 2
    assert "lora_r=-1" in str(caught.value)
    assert "lora_dropout=2.0" in str(caught.value)


def test_contradictions_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(
            full_finetuning=True,
            max_steps=2,
            per_device_train_batch_size=0,
            optimizer=OptimizerConfig(warmup_steps=5),
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    for part in ("load_in_4bit", "warmup_steps=5 is more than max_steps=2", "batch"):
        assert part in text


def test_steps_take_the_place_of_epochs() -> None:
    assert TrainConfig(max_steps=5, num_train_epochs=0).max_steps == 5


def test_whole_numbers_stand_for_floats() -> None:
    lora = LoRAConfig(lora_alpha=16, lora_dropout=0)
    assert isinstance(lora.lora_alpha, float)
    assert isinstance(lora.lora_dropout, float)
    assert lora == LoRAConfig(lora_alpha=16.0, lora_dropout=0.0)
    assert isinstance(OptimizerConfig(warmup_steps=5).warmup_steps, float)
    replaced = dataclasses.replace(TrainConfig(), num_train_epochs=3)
    assert isinstance(replaced.num_train_epochs, float)


def test_scaling_of_adapters() -> None:
    name = "model.layers.3.mlp.up_proj"
    assert LoRAConfig(lora_r=8, lora_alpha=16).scaling(name) == 2.0
    assert LoRAConfig(lora_r=16, use_rslora=True).scaling(name) == 4.0
    patterns = LoRAConfig(
        rank_pattern=("layers.[0-3].*=4", "up_proj=8"), alpha_pattern=("up_proj=2.5",)
    )
    assert patterns.rank(name) == 4
    assert patterns.scaling(name) == 2.5 / 4
    assert patterns.rank("model.layers.4.mlp.up_proj") == 8
    assert patterns.scaling("model.layers.4.mlp.down_proj") == 1.0


def test_full_finetuning_goes_with_dense_weights() -> None:
    config = TrainConfig(full_finetuning=True, quant=QuantConfig(load_in_4bit=False))
    assert config.full_finetuning


def test_a_plan_made_of_times_is_not_deterministic() -> None:
    with pytest.raises(ConfigError, match="differ from run to run"):
        TrainConfig(full_determinism=True, remat="auto")
