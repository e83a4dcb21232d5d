"""From a configuration to documents: sources, held-out rows, templates."""

import json

import pytest
from transformers import AutoTokenizer

from fastjax.config import DataConfig
from fastjax.data import Text, held_out, load_data
from fastjax.errors import ConfigError, DataError


@pytest.fixture
def tokenizer(fixtures):
    return AutoTokenizer.from_pretrained(fixtures / "tokenizer_v5")


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_the_default_is_the_embedded_set(tokenizer):
    data = load_data(DataConfig(), tokenizer, seed=0, vocab_size=len(tokenizer))
    assert len(data.train) > 3000
    assert len(data.evaluation) > 100
    assert data.eval_report is not None
    assert not data.packing
    assert "standard library" in data.notes[0]


def test_the_embedded_set_chooses_a_template_where_there_is_none(tokenizer):
    tokenizer.chat_template = None
    data = load_data(DataConfig(), tokenizer, seed=0)
    assert "using 'llama-3'" in data.notes[1]
    assert "start_header_id" in tokenizer.chat_template


def test_messages_need_a_template_and_leave_it_with_the_tokenizer(tokenizer):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "a"},
            ]
        }
    ]
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="--chat_template_path"):
        load_data(DataConfig(), tokenizer, seed=0, train_source=rows)
    config = DataConfig(chat_template_path="alpaca")
    data = load_data(config, tokenizer, seed=0, train_source=rows)
    assert len(data.train) == 1
    assert "### Response" in tokenizer.chat_template


def test_a_folder_brings_its_evaluation_rows(tokenizer, tmp_path):
    write(tmp_path / "train.jsonl", ["one", "two", "three"])
    write(tmp_path / "valid.jsonl", ["four", "two"])
    config = DataConfig(dataset_name=str(tmp_path))
    data = load_data(config, tokenizer, seed=0)
    assert (len(data.train), len(data.evaluation)) == (3, 2)
    assert data.packing
    assert data.notes == ("1 evaluation rows are training rows too",)


def test_evaluation_rows_can_be_named_or_held_out(tokenizer, tmp_path):
    write(tmp_path / "data.jsonl", [f"text {i}" for i in range(10)])
    name = str(tmp_path / "data.jsonl")
    config = DataConfig(dataset_name=name, val_set_size=0.2, packing=False)
    data = load_data(config, tokenizer, seed=0)
    assert (len(data.train), len(data.evaluation)) == (8, 2)
    assert not data.packing
    config = DataConfig(dataset_name=name, eval_dataset_name=str(tmp_path / "no"))
    with pytest.raises(DataError, match="no such file"):
        load_data(config, tokenizer, seed=0)
    rows = [{"text": "eval"}]
    config = DataConfig(dataset_name=name)
    data = load_data(config, tokenizer, seed=0, eval_source=rows)
    assert len(data.evaluation) == 1
    assert not load_data(config, tokenizer, seed=0).evaluation


def test_held_out_rows_depend_on_the_seed_alone():
    rows = [Text(text=str(i)) for i in range(100)]
    kept, held = held_out(rows, 0.1, seed=3)
    assert (len(kept), len(held)) == (90, 10)
    assert held_out(rows, 10.0, seed=3) == (kept, held)
    assert held_out(rows, 10.0, seed=4)[1] != held
    assert [row for row in rows if row in kept] == kept
    assert len(held_out(rows, 0.001, seed=3)[1]) == 1
    with pytest.raises(ConfigError, match="leaves nothing"):
        held_out(rows, 100.0, seed=3)
