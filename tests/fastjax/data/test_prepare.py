"""From a configuration to documents: sources, held-out rows, templates."""

import dataclasses
import json
from collections import Counter

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from fastjax.config import DataConfig
from fastjax.data import Document, document_cache, held_out, load_data
from fastjax.data.documents import DocumentWriter
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


def test_a_hub_set_is_streamed_as_far_as_it_is_read(tokenizer, tmp_path, monkeypatch):
    """The rows come from a file by the library's own streaming, twice the same."""
    path, load, asked = tmp_path / "large.jsonl", datasets.load_dataset, []
    write(path, [f"text {i}" for i in range(5000)])

    def served(repo, config, *, split, streaming):
        asked.append((repo, config, split, streaming))
        return load("json", data_files=str(path), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", served)
    monkeypatch.setenv("FASTJAX_CACHE", str(tmp_path / "cache"))
    config = DataConfig(dataset_name="owner/name:part", max_train_samples=300)
    first = load_data(config, tokenizer, seed=0).train
    again = load_data(config, tokenizer, seed=0).train
    assert asked == [("owner/name", "part", "train", True)] * 2
    assert len(first) == 300
    assert first.fingerprint() == again.fingerprint()
    assert not list((tmp_path / "cache" / "data").iterdir())
    write(path, [f"text {i}" for i in range(300)] + ["other"] * 300)
    assert (
        load_data(config, tokenizer, seed=0).train.fingerprint() == first.fingerprint()
    )


def test_a_folder_brings_its_evaluation_rows(tokenizer, tmp_path):
    write(tmp_path / "train.jsonl", ["one", "two", "three"])
    write(tmp_path / "valid.jsonl", ["four", "two"])
    config = DataConfig(dataset_name=str(tmp_path))
    data = load_data(config, tokenizer, seed=0)
    assert (len(data.train), len(data.evaluation)) == (3, 2)
    assert data.packing
    assert data.notes == ("1 evaluation row is a training row too",)


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
    writer = DocumentWriter()
    for i in range(200):  # Two pieces a row.
        ids = np.array([i, i, i], np.int32)
        writer.add(Document(ids, np.ones(3, np.bool_)), i // 2)
    documents = writer.close()
    kept, held = held_out(documents, 0.1, seed=3)
    assert (len(kept), len(held)) == (180, 20)
    assert not set(kept.rows) & set(held.rows)
    assert held_out(documents, 10.0, seed=3)[1].rows.tolist() == held.rows.tolist()
    assert held_out(documents, 10.0, seed=4)[1].rows.tolist() != held.rows.tolist()
    assert (np.diff(kept.rows) >= 0).all()
    assert len(held_out(documents, 0.001, seed=3)[1]) == 2
    with pytest.raises(ConfigError, match="leaves nothing"):
        held_out(documents, 100.0, seed=3)


def test_sources_are_mixed_by_their_weights(tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", [f"alpha {i}" for i in range(10)])
    rows = [{"prompt": f"q{i}", "completion": " a"} for i in range(6)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    name = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    data = load_data(DataConfig(dataset_name=name), tokenizer, seed=0)
    assert (len(data.train), data.data_format) == (16, "text, prompt_completion")
    assert not data.packing
    config = DataConfig(dataset_name=name, dataset_weights=(0.5, 2.0))
    data = load_data(config, tokenizer, seed=0)
    counts = Counter(document.input_ids.tobytes() for document in data.train)
    assert sorted(counts.values()) == [1] * 5 + [2] * 6
    again = load_data(config, tokenizer, seed=0).train
    assert again.fingerprint() == data.train.fingerprint()
    assert (
        load_data(config, tokenizer, seed=1).train.fingerprint() != again.fingerprint()
    )
    config = DataConfig(dataset_name=name, dataset_weights=(1.0,))
    with pytest.raises(ConfigError, match="1 entries for 2 sources"):
        load_data(config, tokenizer, seed=0)


def test_the_cache_gives_back_equal_documents(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(document_cache, "MIN_FILE_BYTES", 10)
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps({'messages': turns})}\n" * 3 + "broken\n")
    config = DataConfig(
        dataset_name=str(path), skip_bad_rows=1, chat_template_path="llama-3"
    )
    entries = lambda: sorted((tmp_path / "cache" / "data").iterdir())  # noqa: E731

    def load(config=config):
        fresh = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
        return load_data(config, fresh, seed=0), fresh

    first, before = load()
    expected = first.train.fingerprint()
    [entry] = entries()
    again, after = load()
    assert "kept from an earlier run" in again.notes[-1]
    assert again.train.fingerprint() == expected
    assert again.train_report == first.train_report
    assert again.notes[:-1] == first.notes
    assert after.chat_template == before.chat_template
    plain = dataclasses.replace(config, use_dataset_cache=False)
    assert load(plain)[0].train.fingerprint() == expected
    # A flipped bit, a lost file and a changed source are noticed.
    raw = bytearray((entry / "tokens.bin").read_bytes())
    raw[5] ^= 1
    (entry / "tokens.bin").unlink()
    (entry / "tokens.bin").write_bytes(raw)
    assert load()[0].train.fingerprint() == expected
    (entry / "places.npy").unlink()
    assert load()[0].notes == first.notes
    # So are other facts, of these fields or others.
    for name in ("rows", "of_later"):
        facts = json.loads((entry / "entry.json").read_text())
        facts["facts"]["report"][name] = 1
        (entry / "entry.json").write_text(json.dumps(facts))
        assert load()[0].notes == first.notes
    # Other code and libraries have other entries.
    with monkeypatch.context() as patched:
        patched.setattr(document_cache, "version", lambda _: "0")
        assert load()[0].notes == first.notes
        patched.setattr(document_cache, "code_digest", lambda _: "0")
        assert load()[0].notes == first.notes
    assert len(entries()) == 3
    path.write_text(path.read_text().replace("broken\n", ""))
    assert load()[0].notes == first.notes[:-1]
    load(dataclasses.replace(config, max_length=16))
    assert len(entries()) == 5
    assert all(len(folder.name) == 64 for folder in entries())


def test_a_cache_that_cannot_be_written_is_no_fault(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTJAX_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(document_cache, "MIN_FILE_BYTES", 10)
    write(tmp_path / "a.jsonl", ["one", "two"])
    config = DataConfig(dataset_name=str(tmp_path / "a.jsonl"))
    assert len(load_data(config, tokenizer, seed=0).train) == 2
