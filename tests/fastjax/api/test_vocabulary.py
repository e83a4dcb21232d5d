"""New tokens: rows for them, adapters that keep them, folders that know them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversions.hf import read_config
from fastjax import add_new_tokens
from fastjax.api import FastLanguageModel, LanguageModel, load_model, run_training
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
    with pytest.raises(ConfigError, match="rows are not taken away"):
        resize_token_embeddings(model, 8)
    model = FastLanguageModel.get_peft_model(model, modules_to_save=TABLES)
    with pytest.raises(ConfigError, match="has adapters already"):
        resize_token_embeddings(model, 10**4)


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
    merged = model.save_pretrained_merged(tmp_path / "merged", dtype="float32")
    again = load_model(str(merged), dtype="float32")
    assert again.config.vocab_size == len(again.tokenizer) == size
    ids = np.asarray([again.tokenizer.encode("say " + names[-1] + " again")], np.int32)
    assert ids.max() >= vocabulary
    np.testing.assert_allclose(again.logits(ids), model.logits(ids), atol=1e-4)
