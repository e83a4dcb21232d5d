"""New tokens: rows for them, adapters that keep them, folders that know them."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversions.hf import read_config
from fastjax import add_new_tokens
from fastjax.api import FastLanguageModel, LanguageModel, load_model, run_training
from fastjax.api.loading import load_text_side
from fastjax.api.vocabulary import resize_token_embeddings
from fastjax.config import DataConfig, LoRAConfig, QuantConfig, TrainConfig
from fastjax.errors import ConfigError

TABLES = ["embed_tokens", "lm_head"]


@pytest.fixture
def grown(small_model: Path) -> tuple[LanguageModel, Any, int]:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(small_model), dtype="float32", load_in_4bit=False
    )
    spare = model.config.vocab_size - len(tokenizer)
    names = [f"<new {n}>" for n in range(spare + 3)]
    assert add_new_tokens(model, tokenizer, names) == len(names)
    return model, tokenizer, len(names)


def test_new_rows_are_the_mean_of_those_that_were(grown: Any) -> None:
    model, tokenizer, count = grown
    assert model.config.vocab_size == len(tokenizer)
    table = np.asarray(model.decoder.embed_tokens.weight.get_value())
    assert table.shape[0] == len(tokenizer)
    old = table[: len(tokenizer) - count]
    np.testing.assert_allclose(table[-1], old.mean(axis=0), atol=1e-6)
    assert add_new_tokens(model, tokenizer, ["<new 0>"]) == 0
    with pytest.raises(ConfigError, match="would not be saved"):
        FastLanguageModel.get_peft_model(model)
    rows = sorted(model.new_rows)
    with pytest.raises(ConfigError, match="would not be saved"):
        FastLanguageModel.get_peft_model(model, trainable_token_indices=rows)
    with pytest.raises(ConfigError, match="rows are not taken away"):
        resize_token_embeddings(model, 8)
    model = FastLanguageModel.get_peft_model(model, modules_to_save=TABLES)
    with pytest.raises(ConfigError, match="has adapters already"):
        resize_token_embeddings(model, 10**4)


def test_rows_by_themselves_are_enough_for_spare_ones_of_tied_tables(
    small_model: Path, fixtures: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_model, tmp_path, dirs_exist_ok=True)
    shutil.copytree(fixtures / "tiny_llama_tied", tmp_path, dirs_exist_ok=True)
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tmp_path), dtype="float32", load_in_4bit=False
    )
    held = model.config.vocab_size
    resize_token_embeddings(model, held)
    assert not model.new_rows
    before = np.asarray(model.decoder.embed_tokens.weight.get_value())
    assert add_new_tokens(model, tokenizer, ["<new 0>", "<new 1>"]) == 2
    rows = sorted(model.new_rows)
    assert rows == tokenizer.convert_tokens_to_ids(["<new 0>", "<new 1>"])
    after = np.asarray(model.decoder.embed_tokens.weight.get_value())
    assert len(after) == held
    assert np.flatnonzero((before != after).any(axis=1)).tolist() == rows
    with pytest.raises(ConfigError, match=f"indices to {rows[0]} to {rows[1]}"):
        FastLanguageModel.get_peft_model(model, trainable_token_indices=rows[:1])
    FastLanguageModel.get_peft_model(model, trainable_token_indices=rows)


def test_a_run_keeps_them_in_adapter_and_merged_model(
    small_model: Path, tmp_path: Path
) -> None:
    vocabulary = read_config(small_model).vocab_size
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "say <new 0> and <new 1>"}\n' * 8)
    names = tuple(f"<new {n}>" for n in range(vocabulary))
    config = TrainConfig(
        model=str(small_model),
        output_dir=str(tmp_path / "run"),
        dtype="float32",
        max_steps=1,
        quant=QuantConfig(load_in_4bit=False),
        lora=LoRAConfig(lora_r=2, modules_to_save=("embed_tokens", "lm_head")),
        data=DataConfig(dataset_name=str(rows), max_length=16, new_tokens=names),
    )
    run_training(config)
    model = load_model(str(tmp_path / "run"), dtype="float32")
    size = model.config.vocab_size
    assert size == len(model.tokenizer) > vocabulary
    more = dataclasses.replace(config.data, new_tokens=(names[0], "<another>"))
    run = dataclasses.replace(config, model=str(tmp_path / "run"), data=more)
    with pytest.raises(ConfigError, match="1 of new_tokens are not in"):
        load_text_side(run)
    merged = model.save_pretrained_merged(tmp_path / "merged", dtype="float32")
    again = load_model(str(merged), dtype="float32")
    assert again.config.vocab_size == len(again.tokenizer) == size
    ids = np.asarray([again.tokenizer.encode("say " + names[-1] + " again")], np.int32)
    assert ids.max() >= vocabulary
    np.testing.assert_allclose(again.logits(ids), model.logits(ids), atol=1e-4)
