"""Names of models: folders, hub names, and what people see when neither works."""

from pathlib import Path

import pytest
from huggingface_hub import constants, errors

from conversions.hf import folder, resolve
from fastjax.errors import EnvironmentFault, FastJaxError, ModelError


def make(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("the hub said no",)
    return error


def failing(error: Exception):
    def download(name: str, **options):
        raise error

    return download


def test_folders_are_taken_as_they_are(tmp_path: Path):
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./nope", "no such folder"),
        ("/nope", "no such folder"),
        ("a/b/c", "no such folder"),
        ("bad name!", "neither a folder nor a hub name"),
        ("x\n\x1b[2J", "neither"),
    ],
)
def test_names_that_are_nothing(name: str, reason: str):
    with pytest.raises(ModelError, match=reason) as caught:
        resolve(name)
    assert "\x1b" not in str(caught.value)


def test_a_file_is_not_a_model(tmp_path: Path):
    (tmp_path / "x").touch()
    with pytest.raises(ModelError, match="is a file"):
        resolve(str(tmp_path / "x"))


def test_offline_and_not_in_the_cache_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault, match="hf download someone/model --revision"):
        resolve("someone/model", revision="main")


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (errors.GatedRepoError, EnvironmentFault, "https://huggingface.co/a/b, then"),
        (errors.RepositoryNotFoundError, ModelError, "did you mean a/bc?"),
        (errors.RevisionNotFoundError, ModelError, "no revision v9"),
        (errors.HfHubHTTPError, EnvironmentFault, "cannot be downloaded: the hub"),
        (errors.LocalEntryNotFoundError, EnvironmentFault, "hub cannot be reached"),
        (OSError, EnvironmentFault, "network and disk"),
    ],
)
def test_faults_of_the_hub_are_explained(
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
    kind: type[FastJaxError],
    reason: str,
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(folder, "snapshot_download", failing(make(error)))
    with pytest.raises(kind) as caught:
        resolve("a/b", revision="v9", known_names=["a/bc", "q/xyz"])
    assert reason in str(caught.value)


def test_only_what_is_needed_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    seen = {}

    def download(name: str, **options) -> str:
        seen.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(folder, "snapshot_download", download)
    assert resolve("a/b", revision="0a1b") == tmp_path
    assert (seen["name"], seen["revision"]) == ("a/b", "0a1b")
    assert "model*.safetensors" in seen["allow_patterns"]
    assert not any(p.endswith((".bin", ".py", ".pt")) for p in seen["allow_patterns"])
