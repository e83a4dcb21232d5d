"""The demo's folder; `make demo` runs the rest."""

from pathlib import Path

import pytest

from fastjax import demo
from fastjax.errors import StorageError


class Reached(Exception):
    """The training would begin here."""


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train_base(folder: Path, *_: object) -> Path:
        assert not (folder / "base").exists()
        (folder / "base").mkdir()
        raise Reached

    monkeypatch.setattr(demo, "train_base", train_base)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match="no demo has made it"):
        demo.run_demo(demo.DemoArgs(output_dir=str(tmp_path)))
    assert (tmp_path / "base" / "thesis.txt").read_text() == "mine"


def test_an_earlier_demo_is_replaced_and_what_lies_beside_it_stays(
    tmp_path: Path,
) -> None:
    args = demo.DemoArgs(output_dir=str(tmp_path / "deep" / "demo"))
    for _ in range(2):
        with pytest.raises(Reached):
            demo.run_demo(args)
        (tmp_path / "deep" / "demo" / "notes.txt").touch()
    assert (tmp_path / "deep" / "demo" / "notes.txt").exists()
