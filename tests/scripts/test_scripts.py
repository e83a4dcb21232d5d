"""Each script starts, explains itself, and ends with the right exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a script as a user does."""
    command = [sys.executable, str(SCRIPTS / name), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "name", sorted(path.name for path in SCRIPTS.glob("*.py")), ids=str
)
def test_every_script_explains_itself(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    assert not done.stderr


@pytest.mark.parametrize(
    ("name", "words", "code", "message"),
    [
        ("train.py", ["--learning_rat", "1"], 2, "did you mean 'learning_rate'"),
        ("generate.py", ["--promt", "x"], 2, "did you mean --prompt"),
        ("export.py", ["--model", "x"], 2, "--output_dir"),
        ("evaluate.py", ["--model", "./nowhere"], 4, "no such folder"),
        ("make_random_checkpoint.py", ["--model", "tinny", "--out", "x"], 2, "tiny"),
    ],
)
def test_wrong_use_ends_with_a_message_and_no_traceback(
    name: str, words: list[str], code: int, message: str
) -> None:
    done = run(name, *words)
    assert done.returncode == code, done.stderr
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_random_checkpoint_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    done = run("make_random_checkpoint.py", "--model", "tiny", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder)
    assert not done.stderr
    assert (folder / "model.safetensors").is_file()
    assert (folder / "tokenizer.json").is_file()
