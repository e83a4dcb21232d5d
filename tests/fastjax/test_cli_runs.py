"""The command line from data file to merged model, on a model of two layers."""

import io
import json
import types
from pathlib import Path

import pytest
import yaml

from fastjax import cli
from fastjax.api import Conversation, training
from fastjax.config import TrainConfig
from fastjax.errors import ModelError

pytestmark = pytest.mark.usefixtures("compiled_once")

SETTINGS = [
    *("--max_steps", "3", "--max_length", "160", "--dtype", "float32"),
    *("--gradient_accumulation_steps", "1", "--warmup_steps", "0", "--lora_r", "4"),
]


@pytest.fixture(scope="module")
def run_folder(
    small_model: Path, alpaca_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert cli.run("train", words(small_model, alpaca_file, folder)) == 0
    return folder


def words(model: Path, data: Path, folder: Path) -> list[str]:
    places = ["--model", str(model), "--data", str(data), "--output_dir", str(folder)]
    held_out = ["--val_set_size", "2", "--eval_strategy", "epoch"]
    return [
        *places,
        *SETTINGS,
        *held_out,
        "--logging_steps",
        "2",
        "--logging_first_step",
    ]


def test_a_run_leaves_what_it_promises(run_folder: Path) -> None:
    names = {path.name for path in run_folder.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "checkpoint-000003",
        "metrics.jsonl",
        "config.yaml",
        "run.json",
    }
    lines = [
        json.loads(line)
        for line in (run_folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3]
    mode = (run_folder / "adapter_model.safetensors").stat().st_mode & 0o777
    assert mode == 0o644


def test_the_same_command_finds_its_run_finished(
    run_folder: Path,
    small_model: Path,
    alpaca_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = run_folder / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    assert cli.run("train", words(small_model, alpaca_file, run_folder)) == 0
    shown = capsys.readouterr().err
    assert "this run is finished" in shown
    assert "compil" not in shown
    assert adapter.stat().st_mtime_ns == before


def test_the_settings_beside_the_adapter_run_again(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(run_folder / "config.yaml")
    assert cli.run("train", ["--config", config]) == 0
    assert "this run is finished" in capsys.readouterr().err
    again = tmp_path / "again"
    assert cli.run("train", ["--config", config, "--output_dir", str(again)]) == 0
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (run_folder / name).read_bytes()


def test_other_settings_in_the_same_folder_are_refused(
    run_folder: Path,
    small_model: Path,
    alpaca_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = [*words(small_model, alpaca_file, run_folder), "--lr", "1e-3"]
    assert cli.run("train", changed) == 2
    shown = capsys.readouterr().err
    assert "learning_rate" in shown
    assert "0.0002" in shown
    assert "allow_config_change" in shown
    saved = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert saved["learning_rate"] == 0.0002


def test_no_output_folder_takes_one_named_after_the_settings(
    small_model: Path,
    alpaca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(small_model), "--data", str(alpaca_file), *SETTINGS]
    assert cli.run("train", flags) == 0
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name.startswith("model-")
    assert (folder / "adapter_config.json").is_file()
    assert cli.run("train", flags) == 0
    assert "this run is finished" in capsys.readouterr().err


def test_generate_answers_one_prompt_as_it_comes_and_more_in_a_batch(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(run_folder), "--max_new_tokens", "4", "--dtype", "float32"]
    assert cli.run("generate", [*common, "--prompt", "one"]) == 0
    alone = capsys.readouterr().out
    assert cli.run("generate", [*common, "--prompt", "one", "two words"]) == 0
    both = capsys.readouterr().out
    assert both.startswith("> one\n")
    assert "> two words\n" in both
    assert alone.strip() in both
    raw = [*common, "--prompt", "one", "--no-chat"]
    assert cli.run("generate", [*raw, "--temperature", "0.7", "--top_p", "0.9"]) == 0


def test_chat_answers_each_line_of_a_pipe(
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def talk(lines: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        flags = ["--model", str(run_folder), "--max_new_tokens", "4"]
        assert cli.run("chat", [*flags, "--dtype", "float32"]) == 0
        return capsys.readouterr().out.splitlines()

    one, two = talk("one\n"), talk("one\n\n/reset\none\n/exit\nnever")
    assert two == one + one
    assert talk("one\nthen\n")[: len(one)] == one


def test_an_interrupt_ends_an_answer_and_not_the_talk(
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a terminal; the turn that was not answered is forgotten."""
    talks: list[list[dict]] = []
    lines = iter(["one", "two", "/exit"])

    def answer(*_: object, **__: object) -> tuple[str]:
        if not talks:
            raise KeyboardInterrupt
        return ("an answer",)

    def next_turn(*, is_terminal: bool) -> str:
        return next(lines)

    def said(self: Conversation, text: str, **options: object) -> str:
        try:
            return whole_say(self, text, **options)
        finally:
            talks.append(list(self.messages))

    whole_say = Conversation.say
    monkeypatch.setattr(Conversation, "say", said)
    monkeypatch.setattr("fastjax.api.chat.answer_ids", answer)
    monkeypatch.setattr("fastjax.commands.chat._next_turn", next_turn)
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    assert cli.run("chat", ["--model", str(run_folder), "--dtype", "float32"]) == 0
    assert talks[0] == []
    assert [turn["content"] for turn in talks[1]] == ["two", "an answer"]


def test_evaluate_measures_base_and_adapter(
    run_folder: Path,
    small_model: Path,
    alpaca_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    losses = {}
    for model in (small_model, run_folder):
        flags = ["--model", str(model), "--data", str(alpaca_file), "--epochs", "1"]
        assert cli.run("eval", [*flags, "--dtype", "float32"]) == 0
        shown = capsys.readouterr()
        assert "read data as dataset_name" in shown.err
        assert f"\nloading {model}\n" in shown.err
        told = yaml.safe_load(shown.out)
        losses[model] = told["eval_loss"]
        assert told["eval_loss"] == float(f"{told['eval_loss']:.4g}")
        assert told["eval_rows"] == 12
        assert told["eval_trained_tokens"] > 12
    assert losses[run_folder] < losses[small_model]


@pytest.mark.parametrize("command", ["check-data", "plan"])
def test_what_is_read_is_told_first(
    small_model: Path,
    alpaca_file: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    flags = ["--model", str(small_model), "--dataset_name", str(alpaca_file)]
    assert cli.run(command, [*flags, *SETTINGS]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith(f"reading {alpaca_file}\n")
    assert "reading" not in shown.out


def test_export_merges_and_never_overwrites_by_itself(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "merged"
    flags = ["--model", str(run_folder), "--output_dir", str(target)]
    flags += ["--dtype", "float32", "--base_precision", "dequantised"]
    assert cli.run("export", flags) == 0
    shown = capsys.readouterr().out
    assert "same likeliest token 100.0%" in shown
    assert (target / "tokenizer.json").is_file()
    before = (target / "model.safetensors").read_bytes()
    assert cli.run("export", flags) == 8
    assert "exists already" in capsys.readouterr().err
    assert (target / "model.safetensors").read_bytes() == before
    assert cli.run("export", [*flags, "--overwrite"]) == 0
    assert (target / "model.safetensors").read_bytes() == before


def test_full_finetuning_writes_a_model_with_the_implementations_it_is_told(
    small_model: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "full"
    flags = [*words(small_model, alpaca_file, folder), "--full_finetuning"]
    chosen = ["--implementation", "attention=reference", "rope=reference"]
    assert cli.run("train", [*flags, *chosen]) == 0
    assert (folder / "model" / "model.safetensors").is_file()
    assert (folder / "config.yaml").is_file()
    assert not (folder / "adapter_config.json").exists()
    run = json.loads((folder / "run.json").read_text())
    assert run["implementations"]["attention"] == ["reference"]
    assert run["implementations"]["rope"] == ["reference"]


def test_settings_are_those_of_the_run_that_goes_on(
    small_model: Path,
    alpaca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(config: TrainConfig) -> None:
        raise ModelError("a weight is missing", fix="copy the model again")

    monkeypatch.setattr(training, "load_for_training", fails)
    flags, rates = words(small_model, alpaca_file, tmp_path), (1e-3, 2e-3)
    for rate in rates:
        assert cli.run("train", [*flags, "--learning_rate", str(rate)]) != 0
        saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
        assert saved["learning_rate"] == rate
