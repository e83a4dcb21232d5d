"""The embedded data set and its tokenizer: the same on every run, and cheap."""

import hashlib
import json
import os
import subprocess
import sys

from transformers import AutoTokenizer

from fastjax.data import (
    ExampleTokenizer,
    Text,
    embedded_announcement,
    embedded_examples,
    embedded_text,
    save_tiny_tokenizer,
)

FINGERPRINT = """
import hashlib, json
from fastjax.data import embedded_examples
rows = [example.messages for example in embedded_examples()]
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())
"""


def test_rows_are_questions_with_answers():
    train, held_out = embedded_examples(), embedded_examples("validation")
    assert len(train) >= 3000
    assert 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.07
    assert not {e.where for e in train} & {e.where for e in held_out}
    questions = set()
    for example in train:
        question, answer = (str(message["content"]) for message in example.messages)
        assert f"`{example.where}`" in question
        assert 20 <= len(answer) <= 3000
        assert " at 0x" not in answer
        questions.add(question.replace(example.where, ""))
    assert len(questions) >= 5
    assert {"textwrap.shorten", "math.sqrt", "os.path.join"} <= {
        e.where for e in train + held_out
    }
    assert f"{len(train):,} questions" in embedded_announcement()


def test_the_corpus_is_real_text():
    corpus = embedded_text()
    assert sum(map(len, corpus)) > 500_000
    assert len(set(corpus)) == len(corpus)


def test_another_process_makes_the_same_rows():
    rows = [example.messages for example in embedded_examples()]
    expected = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    actual = subprocess.run(
        [sys.executable, "-c", FINGERPRINT],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert actual.stdout.strip() == expected


def test_importing_data_is_cheap():
    code = "import sys, fastjax.data; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {"jax", "transformers", "datasets", "tokenizers", "torch"}
    assert not heavy & set(run.stdout.split())


def test_the_tiny_tokenizer_loads_elsewhere(tmp_path):
    texts = embedded_text()[:1500]
    folder = save_tiny_tokenizer(tmp_path / "a", texts=texts, vocab_size=1024)
    again = save_tiny_tokenizer(tmp_path / "b", texts=texts, vocab_size=1024)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 1024
    ids = tokenizer("naïve ≤ 你好 🙂").input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == "naïve ≤ 你好 🙂"
    make = ExampleTokenizer(tokenizer, max_length=512, vocab_size=1024)
    documents, report = make.tokenize(embedded_examples()[:50])
    assert report.rows == 50
    assert report.notes == ()
    for document in documents:
        assert document.input_ids[0] == tokenizer.bos_token_id
        assert document.input_ids[-1] == tokenizer.eos_token_id
        assert document.trained[-1]
    [text], _ = make.tokenize([Text(text="hello")])
    assert text.input_ids[0] == tokenizer.bos_token_id
