"""What a finished run leaves: samples, model card, settings, no secrets; uploads."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import HFValidationError

from fastjax import cli
from fastjax.api import load_model, push_folder
from fastjax.api.model_card import base_licence, write_model_card
from fastjax.api.samples import read_prompts
from fastjax.config import TrainConfig
from fastjax.errors import ConfigError, EnvironmentFault, ModelError
from fastjax.train import TrainResult

pytestmark = pytest.mark.usefixtures("compiled_once")

SECRETS = {"HF_TOKEN": "hf_secret1234", "WANDB_API_KEY": "wandbsecret5678"}


@pytest.fixture(scope="module")
def finished(
    small_model: Path, alpaca_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """A run of two steps on a base with a licence, in an environment with secrets."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "prompts.txt").write_text("one\n\ntwo words\n")
    flags = ["--model", small_model, "--data", alpaca_file, "--max_steps", "2"]
    flags += ["--output_dir", folder / "run", "--gradient_accumulation_steps", "1"]
    flags += ["--sample_prompts", folder / "prompts.txt", "--val_set_size", "2"]
    flags += ["--sample_max_new_tokens", "2", "--dtype", "float32", "--max_length"]
    flags += ["160", "--no-load_in_4bit", "--eval_steps", "1", "--eval_on_start"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        code = cli.run("train", [str(flag) for flag in flags])
    return SimpleNamespace(folder=folder / "run", code=code)


def test_samples_settings_and_card_are_beside_the_adapter(
    finished: SimpleNamespace, small_model: Path
) -> None:
    assert finished.code == 0
    lines = (finished.folder / "samples.jsonl").read_text().splitlines()
    places = [(json.loads(x)["step"], json.loads(x)["prompt"]) for x in lines]
    assert places == [(s, p) for s in (0, 1, 2) for p in ("one", "two words")]
    card = (finished.folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == str(small_model.resolve())
    assert "eval_loss" in card
    run = json.loads((finished.folder / "run.json").read_text())
    assert run["data"] in card
    assert run["metrics"]["eval_loss"] > 0
    assert (finished.folder / "loss.svg").is_file()
    assert (finished.folder / "config.yaml").is_file()


def test_secrets_of_the_environment_are_written_nowhere(
    finished: SimpleNamespace,
) -> None:
    for path in finished.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(value.encode() in content for value in SECRETS.values())


def test_hostile_names_stay_inside_the_card(small_model: Path, tmp_path: Path) -> None:
    model = load_model(str(small_model), dtype="float32")
    name = "x\n---\nlicense: mit|<script>`"
    model.source = dataclasses.replace(model.source, name=name, folder=tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\nlicense: x")
    assert base_licence(tmp_path) == "apache-2.0"
    result = TrainResult(
        trainable=None,
        step=1,
        metrics={"train_loss": None},
        implementations={},
        memory=None,
        compile_seconds=0.0,
        step_seconds=(),
        was_finished=False,
    )
    out = tmp_path / "out"
    out.mkdir()
    write_model_card(out, model, TrainConfig(), result, data="d")
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---"))
    assert front["base_model"] == name
    assert front["license"] == "apache-2.0"
    assert "<script>" not in card.split("\n---\n", 1)[1]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"p\n" * 33])
def test_prompts_that_cannot_be(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="sample_prompts"):
        read_prompts(path)


class FakeApi:
    """Stands for the hub."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    fault: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append((repo_id, options))
        if self.fault is not None:
            raise self.fault

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_uploads_are_a_step_of_their_own(
    finished: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    flags = ["--folder", str(finished.folder), "--hub_model_id", "me/adapter"]
    assert cli.run("push", [*flags, "--hub_private_repo"]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/me/adapter\n"
    (name, made), (_, sent) = FakeApi.calls
    assert (name, made["private"]) == ("me/adapter", True)
    assert sent["folder_path"] == finished.folder
    assert "checkpoint-*" in sent["ignore_patterns"]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (HFValidationError("bad"), ConfigError),
        (ConnectionError("no route to host"), EnvironmentFault),
    ],
)
def test_uploads_that_fail_say_what_to_do(
    finished: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    kind: type[Exception],
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "fault", fault)
    with pytest.raises(kind, match="hub"):
        push_folder(finished.folder, "me/x")


def test_a_hub_that_does_not_answer_is_told(
    finished: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = functools.partial(
        huggingface_hub.HfApi, endpoint="http://127.0.0.1:1", token="hf_none"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", nobody)
    with pytest.raises(EnvironmentFault, match="check the network") as caught:
        push_folder(finished.folder, "me/x")
    assert caught.value.code == "FJ-ENV-HUB"


def test_a_folder_without_a_result_is_not_uploaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither an adapter nor a model"):
        push_folder(tmp_path, "me/x")
