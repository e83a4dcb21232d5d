"""The main job on any machine: no download, no GPU, a few minutes.

A tiny model learns from scratch to read Python's own documentation, is saved as a
Hugging Face checkpoint, and gets a QLoRA adapter that answers questions about it.
"""

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console

from fastjax.api.generation import answer
from fastjax.api.language_model import LanguageModel
from fastjax.api.loading import load_model
from fastjax.api.random_checkpoint import make_random_checkpoint
from fastjax.api.training import (
    evaluate_model,
    load_for_training,
    prepare_data,
    train,
)
from fastjax.config import (
    DataConfig,
    LoRAConfig,
    OptimizerConfig,
    QuantConfig,
    TrainConfig,
)
from fastjax.data import embedded_text
from fastjax.errors import StorageError
from fastjax.files import storage_errors
from fastjax.models.transformer_config import TransformerConfig

_QUESTIONS = ("What does `shutil.copyfile` do?", "Explain `math.sqrt` in Python.")
_LENGTH = 256
_MARK = ".fastjax-demo"
_PARTS = ("random", "base", "adapter", "merged")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DemoArgs:
    """Trains a tiny model from scratch, then a QLoRA adapter on it.

    Attributes:
      output_dir: New, or of an earlier demo, which is replaced; gets base model,
        adapter and merged model.
      base_steps: Steps that train the tiny model from random weights.
      adapter_steps: Steps that train the adapter.
    """

    output_dir: str = "outputs/demo"
    base_steps: int = 400
    adapter_steps: int = 200


def run_demo(args: DemoArgs) -> None:
    """Trains, saves, merges, reloads and asks; prints what it does."""
    console = Console()
    folder = Path(args.output_dir)
    _make_ready(folder)
    base = train_base(folder, args.base_steps, console)
    model = _train_adapter(base, folder / "adapter", args.adapter_steps, console)
    _say(console, "4. merge it, reload adapter and merged model, compare")
    merged = folder / "merged"
    model.save_pretrained_merged(merged, base_precision="dequantised", dtype="float32")
    _compare(folder / "adapter", merged, console)
    _say(console, "5. ask it")
    for question, reply in zip(_QUESTIONS, _answers(model), strict=True):
        console.print(f"> {question}\n{reply}\n", markup=False, highlight=False)
    console.print(f"everything is in {folder}", markup=False)


def _make_ready(folder: Path) -> None:
    """Makes the folder, or deletes in it what an earlier demo has written.

    Raises:
      StorageError: It holds something and no demo has made it, or cannot be written.
    """
    mark = folder / _MARK
    with storage_errors("use the output folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not mark.exists():
            raise StorageError(
                f"{folder} is not empty, and no demo has made it",
                fix="give another --output_dir, or delete that folder first",
            )
        mark.touch()
        for name in _PARTS:
            if (folder / name).exists():
                shutil.rmtree(folder / name)


def train_base(
    folder: Path,
    steps: int,
    console: Console,
    *,
    sizes: str | TransformerConfig = "tiny",
) -> Path:
    """Returns the folder of a tiny model that was trained from random weights."""
    _say(console, "1. a tiny model, random weights, as a Hugging Face checkpoint")
    start = make_random_checkpoint(sizes, folder / "random", dtype="float32")
    _say(console, "2. train every weight on the text of Python's documentation")
    config = TrainConfig(
        model=str(start),
        output_dir=str(folder / "base"),
        full_finetuning=True,
        dtype="float32",
        remat="none",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=steps,
        save_steps=0,
        quant=QuantConfig(load_in_4bit=False),
        data=DataConfig(max_length=_LENGTH, packing=True),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, lr_scheduler_type="cosine", weight_decay=0.01
        ),
    )
    model = load_for_training(config)
    data = prepare_data(
        config,
        model,
        train_source=[{"text": text} for text in embedded_text("train")],
        eval_source=[{"text": text} for text in embedded_text("validation")],
    )
    train(model, config, data, console=console)
    return folder / "base" / "model"


def _train_adapter(
    base: Path, folder: Path, steps: int, console: Console
) -> LanguageModel:
    _say(console, "3. QLoRA: 4-bit base, rank 16 on all linears, questions and answers")
    config = TrainConfig(
        model=str(base),
        output_dir=str(folder),
        dtype="float32",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=steps,
        save_steps=50,
        eval_steps=50,
        lora=LoRAConfig(lora_r=16, lora_alpha=32.0),
        data=DataConfig(max_length=_LENGTH, packing=True),
        optimizer=OptimizerConfig(learning_rate=1e-3, lr_scheduler_type="cosine"),
    )
    model = load_for_training(config)
    data = prepare_data(config, model)
    before = evaluate_model(model, config, data)["eval_loss"]
    train(model, config, data, console=console)
    after = evaluate_model(model, config, data)["eval_loss"]
    console.print(f"held-out loss: {before:.3f} before, {after:.3f} after")
    return model


def _compare(adapter: Path, merged: Path, console: Console) -> None:
    with_adapter = load_model(str(adapter), dtype="float32", quant=QuantConfig())
    one_folder = load_model(str(merged), dtype="float32")
    ids = jnp.arange(64, dtype=jnp.int32)[None] * 37 % one_folder.config.vocab_size
    difference = jnp.abs(one_folder.logits(ids) - with_adapter.logits(ids))
    console.print(f"largest difference of logits: {float(jnp.max(difference)):.2g}")


def _answers(model: LanguageModel) -> list[str]:
    return answer(model, _QUESTIONS, max_new_tokens=80)


def _say(console: Console, text: str) -> None:
    console.rule(text, align="left")
