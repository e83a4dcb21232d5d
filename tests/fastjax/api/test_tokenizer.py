"""The tokenizer that needs no torch, in the ways that scripts use it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from fastjax.api import FastLanguageModel


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    """The small model's, as `from_pretrained` gives it."""
    return FastLanguageModel.from_pretrained(str(small_model), dtype="float32")[1]


@pytest.mark.parametrize("kind", ["pt", "tf", "np", "jax"])
def test_every_kind_of_tensor_is_an_array_that_stays(tokenizer: Any, kind: str) -> None:
    encoded = tokenizer(["one two"], return_tensors=kind).to("cuda", non_blocking=True)
    assert isinstance(encoded["input_ids"], np.ndarray)
    assert encoded.input_ids.to("cuda:0") is encoded.input_ids
    assert {**encoded}.keys() >= {"input_ids", "attention_mask"}
    with pytest.raises(AttributeError):
        _ = encoded.nothing


def test_without_tensors_it_is_the_tokenizer_itself(tokenizer: Any) -> None:
    assert isinstance(tokenizer("one")["input_ids"], list)
    assert tokenizer.decode(tokenizer("one two")["input_ids"]).endswith("one two")
    assert len(tokenizer) == len(tokenizer.wrapped)
    assert repr(tokenizer) == repr(tokenizer.wrapped)


def test_settings_reach_the_model(small_model: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(small_model), dtype="float32"
    )
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    assert model.tokenizer.pad_token == tokenizer.eos_token
    padded = tokenizer(["a b c d", "a"], return_tensors="pt", padding=True)
    assert padded["attention_mask"][1, 0] == 0
    out = model.generate(**padded, max_new_tokens=2)
    assert out.shape[0] == 2
    assert "LanguageModel(" in repr(model)


def test_it_is_copied_pickled_and_hashed_by_data_sets(tokenizer: Any) -> None:
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.wrapped is not tokenizer.wrapped
        assert other("one two")["input_ids"] == tokenizer("one two")["input_ids"]
    rows = datasets.Dataset.from_list([{"said": "hi"}, {"said": "yo"}])
    mapped = rows.map(lambda row: {"text": row["said"] + tokenizer.eos_token})
    assert mapped[1]["text"] == "yo" + tokenizer.eos_token


def test_chats_become_ids_or_text(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt"
    )
    text = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    assert ids.shape[0] == 1
    assert ids.to("cuda").dtype == np.int64
    assert tokenizer.decode(ids[0]) == text
