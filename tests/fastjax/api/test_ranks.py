"""Ranks by importance: who gets them, what they cost, and that runs keep them."""

from pathlib import Path

import numpy as np
import pytest

from fastjax.api import FastLanguageModel, SFTTrainer, TrainingArguments
from fastjax.config import LoRAConfig
from fastjax.errors import ConfigError
from fastjax.rank_allocation import allocated_ranks

ROWS = [{"text": f"the number {n} is followed by {n + 1}"} for n in range(40)]


def test_rank_goes_where_a_parameter_is_worth_most() -> None:
    strong, weak = [9.0, 8.0, 7.0, 6.0] * 8, [1.0] * 32
    values = {"a": strong, "b": weak, "dear": strong}
    costs = {"a": 10, "b": 10, "dear": 100}
    ranks = allocated_ranks(values, costs, rank=8)
    assert ranks["a"] == 32
    assert sum(costs[name] * rank for name, rank in ranks.items()) <= 8 * 120
    assert allocated_ranks({"a": weak[:3]}, {"a": 1}, rank=8) == {"a": 3}


def test_runs_measure_once_and_keep_their_ranks(
    small_model: Path, tmp_path: Path
) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        str(small_model), max_seq_length=32, dtype="float32", load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, auto_rank=True)
    even = model.num_parameters(only_trainable=True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=1, learning_rate=1e-3
    )
    trainer = SFTTrainer(model, train_dataset=ROWS, args=arguments)
    trainer.train()
    adapters = model.spec.adapters
    assert len({adapter.rank for adapter in adapters.values()}) > 1
    assert 0.9 * even < model.num_parameters(only_trainable=True) <= even
    assert {adapter.scaling for adapter in adapters.values()} == {2.0}
    held = model.lora
    assert held is not None
    assert not held.auto_rank
    # A checkpoint that is not whole has no say in it.
    (tmp_path / "checkpoint-000002" / "adapter_config.json").write_text("{")
    # As a new process would: the same settings, and the folder of the first run.
    again = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, auto_rank=True)
    trainer = SFTTrainer(again, train_dataset=ROWS, args=arguments)
    assert np.isfinite(trainer.train(resume_from_checkpoint=True).training_loss)
    assert again.lora == held


def test_ranks_by_hand_and_by_importance_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="auto_rank=True must be false with"):
        LoRAConfig(auto_rank=True, rank_pattern=("q_proj=4",))
