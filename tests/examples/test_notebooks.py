"""The notebooks run as they are, on the tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def code_of(path: Path) -> str:
    """Returns the cells of code, and checks that no output is kept in the file."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    return "\n\n".join("".join(cell["source"]) for cell in code)


@pytest.mark.slow
def test_notebooks_run(tmp_path: Path) -> None:
    for path in NOTEBOOKS:
        (tmp_path / f"{path.stem}.py").write_text(code_of(path))
    # One process: importing takes longer than the training.
    imports = "; ".join(f"import {path.stem}" for path in NOTEBOOKS)
    done = subprocess.run(
        [sys.executable, "-c", imports],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert {"quickstart", "research"} <= {path.stem for path in NOTEBOOKS}
    for name in ("adapter", "merged", "quickstart/run.json", "slow/loss.svg"):
        assert (tmp_path / "outputs" / name).exists(), name
