"""Contexts longer than the trained one: RoPE stretched by a flag, in every format."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversions.gguf.architectures import model_metadata
from conversions.hf import read_config
from conversions.safetensors_file import SafetensorsFile
from fastjax.api import (
    FastLanguageModel,
    SFTTrainer,
    TrainingArguments,
    load_model,
    plan_run,
    run_export,
)
from fastjax.api.combination import combine_adapters
from fastjax.api.context import context_fault, note_context
from fastjax.api.data_check import check_data
from fastjax.api.loading import load_text_side
from fastjax.api.training import run_training
from fastjax.config import DataConfig, QuantConfig, RopeScaling, TrainConfig
from fastjax.data import load_data
from fastjax.errors import ConfigError, ModelError
from fastjax.rope_config import RopeConfig
from fastjax.train.record import settings

LONG = 160
WORDS = " ".join(f"number {n}" for n in range(40))


@pytest.fixture
def base(fixtures: Path, tmp_path: Path) -> Path:
    """A Mistral of two layers, 256 tokens and a plain RoPE, with a tokenizer."""
    folder = tmp_path / "base"
    shutil.copytree(fixtures / "tokenizer_v5", folder)
    shutil.copytree(fixtures / "tiny_mistral", folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("name", "scaling", "family"),
    [
        ("linear", "linear", "odd_llama"),
        ("dynamic", "dynamic", "odd_qwen3"),
        ("yarn", "yarn", "granite"),
        ("linear again", "linear", "gemma3_text"),
        ("yarn again", "yarn", "olmo3"),
    ],
)
def test_logits_match_transformers(
    fixtures: Path, name: str, scaling: RopeScaling, family: str
) -> None:
    numbers = load_file(fixtures / "stretched_context.safetensors")
    model = load_model(
        str(fixtures / f"tiny_{family}"),
        dtype="float32",
        max_seq_length=LONG,
        rope_scaling=scaling,
    )
    assert model.config.context_tokens == LONG
    actual = np.asarray(model.logits(numbers["input_ids"]))[:, ::10]
    np.testing.assert_allclose(actual, numbers[name], atol=1e-4)


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
def test_adapter_and_merged_model_keep_the_context(
    base: Path, tmp_path: Path, scaling: str
) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        str(base), 640, "float32", load_in_4bit=False, rope_scaling=scaling
    )
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"])
    folder, merged = tmp_path / "adapter", tmp_path / "merged"
    model.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert f"context of 640 tokens by {scaling} RoPE" in card
    list(run_export(str(folder), merged, compare_logits=False))
    assert read_config(merged) == model.config
    combine_adapters([folder, folder], tmp_path / "both")
    again = load_model(str(tmp_path / "both"))
    assert again.config == model.config
    options = {"output_format": "gguf-lora"}
    if scaling == "dynamic":
        with pytest.raises(ModelError, match="rope_type=dynamic is not written"):
            list(run_export(str(folder), tmp_path / "gguf", **options))
        return
    lines = list(run_export(str(folder), tmp_path / "gguf", **options))
    assert f"--rope-scaling {scaling} --rope-scale 2.5" in lines[1]


def test_an_adapter_is_written_without_the_folder_of_its_base(
    base: Path, tmp_path: Path
) -> None:
    model = load_model(
        str(base), dtype="float32", max_seq_length=640, rope_scaling="linear"
    )
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"])
    base.rename(tmp_path / "elsewhere")
    folder = model.save_pretrained(tmp_path / "adapter")
    notes = SafetensorsFile(folder / "adapter_model.safetensors").metadata
    assert (notes["rope_scaling"], notes["context_tokens"]) == ("linear", "640")


def test_gguf_says_how_positions_are_stretched(base: Path) -> None:
    config = read_config(base)
    linear = model_metadata(config.stretched("linear", 640))
    assert linear["llama.context_length"] == 640
    assert linear["llama.rope.scaling.factor"] == 2.5
    yarn = model_metadata(config.stretched("yarn", 640))
    assert yarn["llama.rope.scaling.original_context_length"] == 256


def test_a_stretch_reaches_as_far_in_two_steps_as_in_one(base: Path) -> None:
    config = read_config(base)
    assert config.stretched("linear", 100) is config
    assert config.stretched("none", 10**6) is config
    for scaling in ("linear", "dynamic", "yarn"):
        once = config.stretched(scaling, 1024)
        assert config.stretched(scaling, 512).stretched(scaling, 1024) == once
    with pytest.raises(ConfigError, match="which is of kind yarn already"):
        config.stretched("yarn", 512).stretched("linear", 1024)


def test_longer_documents_need_the_flag(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": WORDS * 4}) + "\n")
    config = TrainConfig(
        model=str(base),
        output_dir=str(tmp_path / "run"),
        dtype="float32",
        max_steps=1,
        gradient_accumulation_steps=1,
        quant=QuantConfig(load_in_4bit=False),
        data=DataConfig(dataset_name=str(rows), max_length=512),
    )
    with pytest.raises(ConfigError, match="the model's context is 256") as caught:
        run_training(config)
    assert "or rope_scaling to linear, dynamic or yarn" in str(caught.value.fix)
    assert caught.value.what in check_data(config).notes[-1]
    with pytest.raises(ConfigError, match="the model's context is 256"):
        plan_run(config)
    config = dataclasses.replace(config, rope_scaling="linear")
    tokenizer, sizes = load_text_side(config)
    data = load_data(config.data, tokenizer, seed=0, vocab_size=sizes.vocab_size)
    said: list[str] = []
    note_context(sizes, config, data, note=said.append)
    assert said[0].startswith("context of 512 tokens by linear RoPE, stretched 2 times")
    assert settings(config)["rope_scaling"] == "linear"
    for scaling in ("none", "yarn"):
        config = dataclasses.replace(config, rope_scaling=scaling)
        note_context(sizes, config, data, note=said.append)
    assert said[1:] == ["rope_scaling has no effect: the model's context is 512 tokens"]
    # A base that is of that kind already, and reaches further, is not stretched.
    further = read_config(base).stretched("yarn", 2048)
    note_context(further, config, data, note=said.append)
    assert said[2:] == [said[1].replace("512", "2,048")]
    config = dataclasses.replace(config, full_finetuning=True, rope_scaling="linear")
    note_context(sizes, config, data, note=said.append)
    assert said[3].endswith("whole models say it in their config.json")
    low = dataclasses.replace(read_config(base), rope=RopeConfig(kind="llama3"))
    fault = context_fault(low, data)
    assert fault is not None
    assert fault.fix == "set max_length to 256"


def test_a_trainer_records_the_context_of_its_model(base: Path, tmp_path: Path) -> None:
    rows = {"train_dataset": [{"text": "number 1 and number 2"}]}

    def trainer(tokens: int, loaded: str | None, **args: Any) -> SFTTrainer:
        model, _ = FastLanguageModel.from_pretrained(
            str(base), tokens, "float32", load_in_4bit=False, rope_scaling=loaded
        )
        model = FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"])
        args = {"output_dir": str(tmp_path / "out")} | args
        return SFTTrainer(model, args=TrainingArguments(**args), **rows)

    stretched = trainer(640, "linear")
    config = stretched.config
    again = read_config(base).stretched(config.rope_scaling, config.data.max_length)
    assert again == stretched.model.config
    shorter = trainer(640, "linear", max_length=512).config
    assert (shorter.data.max_length, shorter.context_length) == (512, 640)
    assert read_config(base).stretched("linear", shorter.reach) == again
    with pytest.raises(
        ConfigError, match="max_length=700 is beyond the context of 640"
    ):
        trainer(640, "linear", max_length=700)
    for scaling in ("none", "yarn"):
        with pytest.raises(ConfigError, match=f"rope_scaling={scaling} has no effect"):
            trainer(640, "linear", rope_scaling=scaling)
    with pytest.raises(ConfigError, match="with a context of 256 tokens"):
        trainer(512, None, rope_scaling="linear")
    assert trainer(128, "yarn", rope_scaling="yarn").config.rope_scaling == "yarn"
    short = trainer(512, None)
    for measure in (short.predict, short.evaluate):
        with pytest.raises(ConfigError, match="the model's context is 256"):
            measure([{"text": WORDS * 4}])


def test_broken_notes_are_refused(base: Path, tmp_path: Path) -> None:
    model = load_model(str(base), dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=2)
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for notes, reason in (
        ({"rope_scaling": "linear"}, "notes on its context are broken"),
        ({"rope_scaling": "none", "context_tokens": "-1"}, "are broken"),
    ):
        save_file(tensors, path, metadata=notes)
        with pytest.raises(ModelError, match=reason):
            load_model(str(tmp_path / "adapter"))
