"""The command line before anything runs: flags, help, messages, exit codes."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastjax import cli
from fastjax.cli_flags import Call, flag_values, parsed, read_settings
from fastjax.config import TrainConfig
from fastjax.errors import ConfigError

FASTJAX = Path(sys.executable).with_name("fastjax")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lr", "1e-4"], {"lr": "1e-4"}),
        (["--lr=1e-4"], {"lr": "1e-4"}),
        (["--max_steps", "-1"], {"max_steps": "-1"}),
        (["--packing"], {"packing": True}),
        (["--no-load_in_4bit"], {"load_in_4bit": False}),
        (["--load-in-4bit", "False"], {"load_in_4bit": "False"}),
        (["--target_modules", "a", "b"], {"target_modules": "a,b"}),
        (["--model=", "--seed", "1"], {"model": "", "seed": "1"}),
    ],
)
def test_forms_of_flags(words: list[str], expected: dict[str, object]) -> None:
    assert flag_values(words) == expected


@pytest.mark.parametrize("words", [["lr"], ["--seed", "1", "--seed", "2"]])
def test_words_that_are_no_flags(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        flag_values(words)


@dataclasses.dataclass(frozen=True)
class _Args:
    names: tuple[str, ...] = dataclasses.field(metadata={"positional": True})
    weights: tuple[float, ...] = ()
    chat: bool = True
    limit: int | None = None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a, b", "c"], _Args(names=("a, b", "c"))),
        (["--names", "a", "--weights", "1,2", "3"], _Args(("a",), (1.0, 2.0, 3.0))),
        (["--chat", "a", "--limit=none"], _Args(("a",))),
        (["--no-chat", "a", "--limit", "-1"], _Args(("a",), (), False, -1)),
        (["a", "--chat", "false"], _Args(("a",), (), False)),
    ],
)
def test_flags_of_small_commands(words: list[str], expected: _Args) -> None:
    call = Call(command="x", program=("fastjax", "x"), words=tuple(words))
    assert parsed(_Args, call) == expected


def test_only_a_switch_can_be_refused() -> None:
    call = Call(command="x", program=("fastjax", "x"), words=("a", "--no-limit"))
    with pytest.raises(ConfigError, match="no flag --no_limit; did you mean --limit"):
        parsed(_Args, call)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-3\nseed: 5\n")
    read = read_settings(["--config", str(path), "--lr", "2e-3"])
    assert read.config.optimizer.learning_rate == 2e-3
    assert read.config.seed == 5
    with pytest.raises(ConfigError, match="needs the name"):
        read_settings(["--config"])
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        read_settings(["--config", str(path.with_name("none.yaml"))])
    assert "--print_config" in caught.value.fix


def test_printed_settings_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "tiny", "--lora_r", "4", "--implementation", "rope=xla"]
    assert cli.run("train", [*words, "--print_config"]) == 0
    first = capsys.readouterr().out
    path = tmp_path / "run.yaml"
    path.write_text(first)
    assert cli.run("train", ["--config", str(path), "--print-config"]) == 0
    assert capsys.readouterr().out == first
    assert read_settings(["--config", str(path)]).config == read_settings(words).config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed", "1"], "fastjax train --seed 1"),
        (["--model", "a b"], "fastjax train --model 'a b'"),
        (
            ["--resume", "no", "--seed", "1"],
            "fastjax train --seed 1 --resume_from_checkpoint=auto",
        ),
        (
            ["--seed", "1", "--resume_from_checkpoint=x"],
            "fastjax train --seed 1 --resume_from_checkpoint=auto",
        ),
    ],
)
def test_the_command_that_goes_on(words: list[str], expected: str) -> None:
    call = Call(command="train", program=("fastjax", "train"), words=tuple(words))
    assert call.resume_command == expected


@pytest.mark.parametrize(
    ("command", "words", "messages"),
    [
        ("train", ["--learning_rat", "1"], ["did you mean 'learning_rate'"]),
        ("train", ["--lora_r", "0", "--packng"], ["2 settings", "lora_r=0", "packng"]),
        ("train", ["--full_finetuning", "--load_in_4bit"], ["no-load_in_4bit"]),
        ("train", ["--trust_remote_code"], ["runs no code"]),
        ("eval", ["--modle", "x"], ["did you mean 'model'"]),
        ("generate", ["--promt", "x"], ["did you mean --prompt"]),
        ("export", ["--model", "x", "--overwrit"], ["did you mean --overwrite"]),
        ("make-random-checkpoint", ["--outt", "x"], ["did you mean --out"]),
        ("trian", [], ["did you mean train"]),
        ("train", ["--lora_r"], ["lora_r needs a value: a whole number"]),
        ("train", ["--optim"], ["optim needs a value: one of adamw"]),
        ("generate", ["--model", "x"], ["FJ-CONFIG", "--prompt is missing"]),
        ("inspect", [], ["FJ-CONFIG", "--model is missing"]),
        ("models", ["x" * 300], ["is no flag"]),
        ("models", ["tiny"], ["FJ-CONFIG", "'tiny' is no flag", "models --help"]),
        ("plan", ["modle", "x"], ["'modle' is no flag; did you mean --model?"]),
        ("plan", ["--modle", "x"], ["'model'", "fastjax plan --help"]),
        ("check-data", [__file__], ["mean --dataset_name ", "check-data --help"]),
        ("generate", ["mode=x"], ["'mode=x' is no flag; did you mean --model?"]),
        ("train", ["--no-model"], ["model needs a value: text"]),
        ("train", ["--implementation", "rope=nope"], ["rope='nope'", "xla, reference"]),
        ("sweep", ["--vary", "seed=1", "--no-lora_r"], ["lora_r needs a value"]),
        ("chat", ["--top_k", "1", "2"], ["takes one value, not 2"]),
        ("export", ["--format", "a", "--gguf_type", "b"], ["2 settings", "bnb-4bit"]),
        (
            "export",
            ["--model=x", "--output_dir=y", "--bnb_4bit_quant_type=fp4"],
            ["add --load_in_4bit"],
        ),
    ],
)
def test_wrong_words_are_named_with_the_nearest_right_ones(
    command: str,
    words: list[str],
    messages: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(command, words) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert all(message in shown for message in messages)


def test_a_traceback_is_shown_only_when_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run("train", ["--lora_r", "0"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert cli.run("train", ["--lora_r", "0", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.count("lora_r=0 must be at least 1") == 1


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "eval",
        "evaluate",
        "generate",
        "chat",
        "export",
        "make-random-checkpoint",
    ],
)
def test_each_command_explains_itself(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(command, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--model" in shown


def test_the_help_of_train_lists_every_setting(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fastjax.flat_config import flat_values

    cli.run("train", ["--help"])
    shown = capsys.readouterr().out
    for name in flat_values(TrainConfig()):
        assert f"--{name} " in shown
    assert "Also --max_seq_length" in shown
    assert "bfloat16|float16|float32" in shown
    assert max(len(line) for line in shown.splitlines()) <= 88
    for text in shown.partition("\nrun:")[2].split("\n  --")[1:]:
        meaning = (
            text.partition("\n")[2].partition("Also --")[0].partition("Default:")[0]
        )
        assert len(meaning.split()) >= 4, text


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("models", []) == 0
    shown = capsys.readouterr().out
    assert "llama3-8b" in shown
    assert "meta-llama/Meta-Llama-3-8B" in shown
    assert "no download" in shown


@pytest.mark.parametrize("words", [[], ["--help"], ["train", "--help"]])
def test_help_is_quick_and_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from fastjax import cli; cli.main();"
        "heavy = {'jax', 'transformers', 'datasets', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert "usage: fastjax" in done.stdout
    assert min(seconds) < 0.5


def test_the_installed_command_is_this_one() -> None:
    done = subprocess.run([FASTJAX, "trian"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean train" in done.stderr


def test_a_reader_that_leaves_is_no_fault() -> None:
    command = f"{FASTJAX} models | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 141)
    assert len(done.stdout.splitlines()) == 1
    assert not done.stderr


@pytest.mark.parametrize(
    ("error", "code", "messages"),
    [
        (OSError(28, "No space left on device", "/x/cache"), 8, ["/x/cache", "space"]),
        (MemoryError(), 6, ["FJ-MEMORY-HOST"]),
    ],
)
def test_errors_of_the_system_are_told_in_words(
    error: Exception,
    code: int,
    messages: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr("fastjax.commands.models.run", fails)
    assert cli.run("models", []) == code
    shown = capsys.readouterr().err
    assert all(message in shown for message in messages)


def test_a_fault_nobody_foresaw_has_four_lines_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        raise KeyError("a\nb")
    except KeyError as error:
        cli._report_fault(KeyError, error, error.__traceback__)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 3
    assert "KeyError" in shown[0]
    assert "test_cli.py" in shown[1]
    assert "--debug" in shown[2]
