"""Bad input at the command line: a code, a place, a way out, and nothing lost."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastjax import cli

pytestmark = pytest.mark.usefixtures("compiled_once")

SETTINGS = [
    *("--max_steps", "4", "--max_length", "160", "--dtype", "float32"),
    *("--gradient_accumulation_steps", "1", "--warmup_steps", "0", "--lora_r", "4"),
    "--no-load_in_4bit",
]
Edit = Callable[[Path], object]


@pytest.fixture
def broken_model(small_model: Path, tmp_path: Path) -> Path:
    """A copy of the model to break."""
    return shutil.copytree(small_model, tmp_path / "broken")


@pytest.fixture
def fails(
    tmp_path: Path, alpaca_file: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs training, checks the exit code, and returns what was said."""

    def run(code: int, *flags: str, data: Path = alpaca_file) -> str:
        folder = ["--output_dir", str(tmp_path / "out")]
        own = [] if "--output_dir" in flags else folder
        words = ["--dataset_name", str(data), *own, *SETTINGS, *flags]
        assert cli.run("train", words) == code
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        assert "FJ-" in shown
        return shown

    return run


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Edit:
    """Returns an edit of the weights."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        held = {name: array.copy() for name, array in load_file(path).items()}
        change(held)
        save_file(held, path, metadata={"format": "pt"})

    return edit


def text(name: str, content: str) -> Edit:
    """Returns an edit that writes one file."""
    return lambda folder: (folder / name).write_text(content)


def index(entry: str) -> Edit:
    """Returns an edit that makes an index name one file."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        weight_map = {"weight_map": {"model.norm.weight": entry}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))

    return edit


def config(**fields: object) -> Edit:
    """Returns an edit of config.json."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "messages"),
    [
        (tensors(lambda t: t.pop(UP)), ["1 missing", UP]),
        (tensors(lambda t: t.update(extra=t[UP])), ["1 unexpected", "extra"]),
        (tensors(lambda t: t.update({UP: t[UP][:-1]})), ["misshapen", "127", "128"]),
        (tensors(lambda t: t[UP].fill(np.nan)), [UP, "NaN"]),
        (index("../../etc/passwd"), ["../../etc/passwd", "same folder"]),
        (index("/etc/passwd"), ["/etc/passwd", "same folder"]),
        (text("config.json", "{"), ["config.json", "JSON"]),
        (config(model_type="zzz"), ["zzz", "llama"]),
        (config(num_hidden_layers=3), ["missing", "layers.2"]),
        (text("tokenizer.json", "{"), ["tokenizer"]),
        (lambda f: (f / "tokenizer_config.json").unlink(), ["no tokenizer"]),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            ["pytorch_model.bin", "safetensors"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_broken_model_folders(
    broken_model: Path, fails: Callable[..., str], edit: Edit, messages: list[str]
) -> None:
    edit(broken_model)
    shown = fails(4, "--model", str(broken_model))
    assert all(message in shown for message in messages)
    assert "tokenizer" in messages or "tokenizer cannot be read" not in shown


@pytest.mark.parametrize(
    ("name", "code", "messages"),
    [
        ("lama3-8b", 4, ["did you mean llama3-8b", "fastjax models"]),
        ("./nowhere", 4, ["no such folder"]),
        ("nobody/nothing", 5, ["HF_HUB_OFFLINE", "hf download nobody/nothing"]),
    ],
)
def test_unknown_models(
    fails: Callable[..., str], name: str, code: int, messages: list[str]
) -> None:
    shown = fails(code, "--model", name)
    assert all(message in shown for message in messages)


def test_a_mistyped_run_folder_names_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    shown = fails(4, "--model", "outputs/mien")
    assert "outputs/mien: there is no such folder" in shown
    assert "nearest names: mine; if a hub name is meant" in shown
    assert "beside it: mine\n" in fails(4, "--model", str(tmp_path / "outputs" / "x"))


@pytest.mark.parametrize(
    ("flag", "code"),
    [
        ("--sample_prompts", 2),
        ("--resume_from_checkpoint", 4),
        ("--chat_template_path", 4),
    ],
)
def test_files_of_the_settings_are_missed_before_weights_are_read(
    small_model: Path, fails: Callable[..., str], flag: str, code: int
) -> None:
    shown = fails(code, "--model", str(small_model), flag, "nowhere.txt")
    assert "nowhere.txt" in shown
    assert "loading" not in shown


LONG = {"prompt": "word " * 300, "completion": "x"}


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ('{"text": "a"}\n{"text": "b\n', ["data.jsonl:2", "skip_bad_rows"]),
        (
            '{"text": "a"}\n{"text": 1}\n\n{"text": "b\n{"text": "c"}\n[2]\n',
            ["3 rows are broken", "data.jsonl:2: ", "data.jsonl:4:", "data.jsonl:6: "],
        ),
        (
            "".join(f'{{"text": {i}}}\n' for i in range(12)),
            ["12 rows are broken", "data.jsonl:10: ", "and 2 more"],
        ),
        (json.dumps(LONG), ["no token of any row", "max_length=160"]),
        ("", ["nothing to train on", "0 empty rows, 0 broken", "right file"]),
        ('{"words": "a"}\n', ["words"]),
    ],
)
def test_broken_data(
    small_model: Path,
    tmp_path: Path,
    fails: Callable[..., str],
    content: str,
    messages: list[str],
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    shown = fails(3, "--model", str(small_model), data=data)
    assert all(message in shown for message in messages)


def test_missing_data_names_its_neighbours(
    small_model: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    shown = fails(3, "--model", str(small_model), data=tmp_path / "row.jsonl")
    assert "rows.jsonl" in shown


def test_a_tokenizer_larger_than_the_vocabulary(
    broken_model: Path,
    fails: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config(vocab_size=300)(broken_model)

    def cut(held: dict[str, np.ndarray]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            held[name] = held[name][:300].copy()

    tensors(cut)(broken_model)
    shown = fails(3, "--model", str(broken_model))
    assert "outside the embedding, which has 300 rows" in shown
    words = ["--model", str(broken_model), "--prompt", "Name some numbers, please."]
    assert cli.run("generate", [*words, "--dtype", "float32"]) == 3
    assert "outside the embedding" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "messages"),
    [
        (["--lora_target_modules", "query_proj"], 2, ["query_proj", "q_proj"]),
        (["--eval_steps", "1"], 2, ["needs evaluation data", "val_set_size"]),
        (["--val_set_size", "12"], 2, ["nothing of 12 rows"]),
        (["--implementation", "attention=cudnn"], 5, ["leave --implementation out"]),
        (["--resume", "outputs/none"], 4, ["no such folder"]),
    ],
)
def test_settings_that_only_model_and_data_show_to_be_wrong(
    small_model: Path,
    fails: Callable[..., str],
    flags: list[str],
    code: int,
    messages: list[str],
) -> None:
    shown = fails(code, "--model", str(small_model), *flags)
    assert all(message in shown for message in messages)


def test_output_folders_that_cannot_be_are_found_before_loading(
    tmp_path: Path, fails: Callable[..., str]
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for folder in (file, file / "below"):
        shown = fails(8, "--model", "/nonexistent", "--output_dir", str(folder))
        assert "is a file" in shown
    # Where root may write, and yet no folder can be made.
    shown = fails(8, "--model", "/nonexistent", "--output_dir", "/proc/x")
    assert "check that path" in shown
    assert "free space" not in shown
    fresh = tmp_path / "a" / "b"
    fails(4, "--model", "/nonexistent", "--output_dir", str(fresh))
    assert not fresh.parent.exists()
    assert file.read_text() == "kept"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(
    broken_model: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    tensors(lambda t: t[UP].fill(1e38))(broken_model)
    shown = fails(7, "--model", str(broken_model), "--logging_steps", "1")
    assert "not finite in 2 steps in a row" in shown
    assert "nan" in shown
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [None]
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_first_interrupt_saves_and_tells_the_whole_command(
    small_model: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    script = Path(__file__).parents[2] / "scripts" / "train.py"
    words = ["--model", small_model, "--data", alpaca_file, *SETTINGS]
    command = [
        sys.executable,
        script,
        *words,
        "--output_dir",
        tmp_path / "ein Lauf für 北",
    ]
    # Neither the locale nor the width of the terminal matters.
    plain = {"LC_ALL": "C", "COLUMNS": "20"}
    environment = os.environ | plain | {"FASTJAX_FAULT": "int@step@2"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 130, done.stderr
    assert "SIGINT: stopped after step 2 of 4" in done.stderr
    (line,) = [s for s in done.stderr.splitlines() if "to continue, run" in s]
    assert f"python {script} --model {small_model}" in line
    assert line.endswith(f"--output_dir '{tmp_path}/ein Lauf für 北'")
    assert (
        tmp_path / "ein Lauf für 北" / "checkpoint-000002" / "manifest.json"
    ).is_file()


def test_an_interrupt_while_loading_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
    small_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastjax.api.run_training", interrupted)
    assert cli.run("train", ["--model", str(small_model)]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
