"""What a run leaves on the disk is the model that it hands back, each time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastjax.api import FastLanguageModel, SFTTrainer, load_model

pytestmark = pytest.mark.usefixtures("compiled_once")

IDS = np.arange(6, 30, dtype=np.int32)[None]
# The first step overshoots, so that an earlier evaluation than the last is the best.
OVERSHOOTING = {
    "max_steps": 4,
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "eval_strategy": "steps",
    "eval_steps": 1,
}


def fresh_model(folder: Path, *, full_finetuning: bool) -> Any:
    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        64,
        "float32",
        load_in_4bit=False,
        full_finetuning=full_finetuning,
    )
    return model if full_finetuning else FastLanguageModel.get_peft_model(model, r=4)


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("full_finetuning", [False, True])
def test_files_and_handle_are_one_model(
    small_model: Path,
    trainer_of: Callable[..., SFTTrainer],
    full_finetuning: bool,
    best: bool,
) -> None:
    args = OVERSHOOTING | {"load_best_model_at_end": best}
    logits = []
    for is_finished in (False, True):
        model = fresh_model(small_model, full_finetuning=full_finetuning)
        trainer = trainer_of(model, args, eval_dataset=[{"text": "9 is after 8."}])
        trainer.train(resume_from_checkpoint=True)
        assert trainer.result is not None
        assert trainer.result.was_finished == is_finished
        folder = Path(trainer.config.output_dir)
        run = json.loads((folder / "run.json").read_text())
        assert run["best"]["step"] < run["steps_done"]
        wanted = run["best"]["step"] if best else run["steps_done"]
        assert run["published_step"] == wanted
        written = load_model(
            str(folder / "model" if full_finetuning else folder), dtype="float32"
        )
        np.testing.assert_allclose(written.logits(IDS), model.logits(IDS), atol=1e-5)
        logits.append(model.logits(IDS))
    np.testing.assert_array_equal(*logits)
