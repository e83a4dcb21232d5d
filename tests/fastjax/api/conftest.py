"""Rows in memory and a trainer on the small model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastjax.api import FastLanguageModel, SFTTrainer, TrainingArguments

TEXTS = [{"text": f"Number {n} comes before number {n + 1}."} for n in range(8)]
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": f"What comes after {n}?"},
            {"role": "assistant", "content": f"{n + 1}"},
        ]
    }
    for n in range(8)
]
BRIEF = {
    "max_steps": 2,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "logging_steps": 1,
    "report_to": "none",
}


@pytest.fixture
def model(small_model: Path) -> Any:
    """The small model with an adapter of rank 4, dense float32."""
    loaded, _ = FastLanguageModel.from_pretrained(
        str(small_model), 64, "float32", load_in_4bit=False
    )
    return FastLanguageModel.get_peft_model(loaded, r=4, lora_alpha=8)


@pytest.fixture
def trainer_of(tmp_path: Path) -> Callable[..., SFTTrainer]:
    """Makes a trainer of two steps; settings of the run go into `args`."""

    def make(model: Any, args: dict | None = None, **options: Any) -> SFTTrainer:
        settings = {"output_dir": str(tmp_path / "out")} | BRIEF | (args or {})
        data = {"train_dataset": TEXTS} | options
        return SFTTrainer(model, args=TrainingArguments(**settings), **data)

    return make
