"""Trains tiny adapters with fastjax and writes what PEFT must reproduce.

Usage: export.py OUT, with fastjax's Python. OUT must not exist; verify.py reads it.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from safetensors import flax as jax_files
from safetensors import numpy as numpy_files

from fastjax import FastLanguageModel, SFTTrainer, TrainingArguments

FIXTURES = Path(__file__).parents[1] / "fixtures"
DTYPES = ("float32", "bfloat16")
ROWS = [
    {"text": f"The {animal} is number {n}. It likes the number {n * n % 7}."}
    for n, animal in enumerate(("cat", "dog", "owl", "fox", "bee", "cow") * 4)
]


@dataclasses.dataclass(frozen=True)
class Training:
    """An adapter to train.

    Attributes:
      name: Of its folder.
      base: Fixture of the base model.
      nf4: Who makes the base NF4: "loader" from 16 bits, "file" holds it so, or none.
      lora: Arguments of `get_peft_model`.
    """

    name: str
    base: str
    nf4: Literal["loader", "file"] | None = None
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)


TRAININGS = (
    Training("llama3-lora", "tiny_llama3"),
    Training("llama3-rslora", "tiny_llama3", lora={"use_rslora": True}),
    Training("llama3-dora", "tiny_llama3", lora={"use_dora": True}),
    Training("mistral-q_proj", "tiny_mistral", lora={"target_modules": ["q_proj"]}),
    Training("qwen2-bias", "tiny_qwen2", lora={"bias": "lora_only"}),
    Training("qwen3-lora", "tiny_qwen3"),
    Training(
        "llama3-ends",
        "tiny_llama3",
        lora={"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    Training(
        "tied-ends",
        "tiny_llama_tied",
        lora={"target_modules": ["v_proj", "embed_tokens"], "use_rslora": True},
    ),
    Training(
        "qwen2-up-bias",
        "tiny_qwen2",
        lora={"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    ),
    Training("qwen3-ranks", "tiny_qwen3", lora={"auto_rank": True}),
    Training("llama3-nf4", "tiny_llama3", "loader"),
    Training("mistral-nf4", "tiny_mistral", "loader"),
    Training("qwen2-nf4", "tiny_qwen2", "loader"),
    Training("qwen3-nf4", "tiny_qwen3", "loader"),
    Training("bnb-lora", "bnb_nf4_dq_bf16", "file"),
    Training("bnb-dora", "bnb_nf4_dq_bf16", "file", {"use_dora": True}),
    Training("bnb-dynamic", "bnb_nf4_dq_dynamic", "file"),
)


def main(out: Path) -> None:
    """Writes bases, adapters, merged models, logits and manifest.json to `out`."""
    out.mkdir(parents=True)
    for base in {training.base for training in TRAININGS}:
        write_base(FIXTURES / base, out / "bases" / base)
    input_ids = np.random.default_rng(0).integers(0, 512, (2, 40))
    cases = []
    for training in TRAININGS:
        print(f"training {training.name}", flush=True)
        train(out, training)
        cases.append(export_case(out, training, training.nf4, input_ids))
        if training.nf4 == "loader":
            cases.append(export_case(out, training, None, input_ids))
    manifest = {"input_ids": input_ids.tolist(), "cases": cases}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2))


def write_base(fixture: Path, folder: Path) -> None:
    """Writes a fixture model with a tokenizer; float32 weights become bfloat16."""
    shutil.copytree(FIXTURES / "tokenizer_v5", folder)
    config = json.loads((fixture / "config.json").read_text())
    tensors = jax_files.load_file(fixture / "model.safetensors")
    if config["dtype"] == "float32":
        config["dtype"] = "bfloat16"
        tensors = {name: t.astype(jnp.bfloat16) for name, t in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = folder / "model.safetensors"
    jax_files.save_file(tensors, weights, metadata={"format": "pt"})


def train(out: Path, training: Training) -> None:
    """Trains an adapter for a few steps and saves it as a PEFT folder."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(out / "bases" / training.base),
        max_seq_length=64,
        dtype="bfloat16",
        load_in_4bit=training.nf4 is not None,
    )
    model = FastLanguageModel.get_peft_model(model, r=8, **training.lora)
    arguments = TrainingArguments(
        output_dir=str(out / training.name / "run"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=12,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        warmup_steps=0,
    )
    trainer = SFTTrainer(
        model, train_dataset=ROWS, tokenizer=tokenizer, args=arguments, packing=False
    )
    trainer.train()
    model.save_pretrained(out / training.name / "adapter")


def export_case(
    out: Path, training: Training, nf4: str | None, input_ids: np.ndarray
) -> dict[str, Any]:
    """Returns the manifest's entry of an adapter on its base as NF4 or as it is.

    The adapter is read again from its folder. The base of the merged model is the one
    that gives the logits: the dequantised NF4 weights, or the original ones.
    """
    adapter = out / training.name / "adapter"
    precision = "dequantised" if nf4 else "original"
    logits, merged = {}, {}
    for dtype in DTYPES:
        model, _ = FastLanguageModel.from_pretrained(
            str(adapter), dtype=dtype, load_in_4bit=nf4 is not None
        )
        logits[dtype] = np.asarray(model.logits(input_ids))
        folder = out / training.name / f"merged-{precision}-{dtype}"
        model.save_pretrained_merged(folder, base_precision=precision)
        merged[dtype] = str(folder.relative_to(out))
    file = out / training.name / f"logits-{precision}.safetensors"
    numpy_files.save_file(logits, file)
    return {
        "name": training.name + ("" if nf4 == training.nf4 else " on 16-bit base"),
        "base": str(Path("bases", training.base)),
        "nf4": nf4,
        "adapter": str(adapter.relative_to(out)),
        "logits": str(file.relative_to(out)),
        "merged": merged,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
