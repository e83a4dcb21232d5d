"""`check-data`: counts, lengths and a sample, without any weight."""

import io
import json
import shutil

import pytest
from rich.console import Console

from fastjax import cli
from fastjax.api import check_data
from fastjax.config import DataConfig, TrainConfig

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Number {n}?"},
            {"role": "assistant", "content": f"It is {n}." * (1 + 9 * (n == 5))},
        ]
    }
    for n in range(8)
]


@pytest.fixture(scope="module")
def weightless(small_model, tmp_path_factory):
    """A model folder without weights."""
    folder = tmp_path_factory.mktemp("weightless") / "model"
    shutil.copytree(small_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[0]]))
    return path


def test_the_sample_shows_what_is_trained(weightless, chats):
    data = DataConfig(dataset_name=str(chats), val_set_size=2.0, max_length=60)
    check = check_data(TrainConfig(model=str(weightless), data=data))
    assert (check.train.rows, check.evaluation.rows) == (7, 2)
    assert (check.train.truncated, check.train.duplicates) == (1, 1)
    trained = [piece.text for piece in check.sample if piece.is_trained]
    assert trained == ["It is 0.<|eot_id|>"]
    assert check.sample_end == "the last token is <|eot_id|> 4 (end of text), trained"
    console = Console(record=True, width=90, file=io.StringIO())
    console.print(check)
    text = console.export_text()
    for expected in ("[It is 0.<|eot_id|>]", "rows cut at 60 tokens", "messages", "█"):
        assert expected in text
    assert "<pre>" in check._repr_html_()
    assert json.loads(json.dumps(check.as_json()))["train"]["rows"] == 7


def test_the_command_prints_and_fails_in_words(weightless, chats, tmp_path, capsys):
    words = ["--model", str(weightless), "--data", str(chats)]
    assert cli.run("check-data", [*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data_format"] == "messages"
    assert cli.run("check-data", words) == 0
    assert "steps of an epoch" in capsys.readouterr().out
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text" "b"}\n')
    for command in ("check-data", "train"):  # Without weights: the data comes first.
        words = ["--model", str(weightless), "--data", str(bad)]
        words += ["--output_dir", str(tmp_path / "run")]
        assert cli.run(command, words) == 3
        assert f"{bad}:2:9" in capsys.readouterr().err
