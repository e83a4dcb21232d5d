"""The Python of the README runs as it is, on the tiny model, and again."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_sample_runs_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = README.read_text(encoding="utf-8")
    samples = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (sample,) = (code for code in samples if "SFTTrainer(" in code)
    name = "meta-llama/Meta-Llama-3-8B"
    assert name in sample
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        exec(compile(sample.replace(name, "tiny"), "README.md", "exec"), {})
    assert (tmp_path / "outputs" / "my-model" / "config.json").is_file()
