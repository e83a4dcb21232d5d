"""Adapters combined: the sum of what each does, in one PEFT folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from conversions.hf import read_config
from conversions.peft import Adapter, read_adapter
from fastjax import cli
from fastjax.errors import ConfigError, StorageError
from fastjax.lora import adapted_spec
from fastjax.models.build import DecoderSpec

NAMES = ("peft_lora_default", "peft_lora_rslora")
UP, Q = "layers.0.mlp.up_proj", "layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapters(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A LoRA on seven linears and an rsLoRA on two, of one base."""
    folders = []
    for name in NAMES:
        folder = tmp_path_factory.mktemp("adapters") / name
        shutil.copytree(fixtures / name, folder)
        path = folder / "adapter_config.json"
        base = {"base_model_name_or_path": str(fixtures / "tiny_llama3")}
        path.write_text(json.dumps(json.loads(path.read_text()) | base))
        folders.append(str(folder))
    return folders


def change(folder: Path | str, fixtures: Path, module: str) -> np.ndarray:
    """What an adapter adds to a weight."""
    config = read_config(fixtures / "tiny_llama3")
    adapter: Adapter = read_adapter(Path(folder), config)
    spec = adapted_spec(DecoderSpec(config=config), adapter.lora).adapters[module]
    down, up = (np.asarray(adapter.weights[f"{module}.lora_{x}"]) for x in "ab")
    return spec.scaling * down @ up


def combine(adapters: list[str], output: Path, *more: str) -> int:
    words = ["--adapters", *adapters, "--output_dir", str(output), *more]
    return cli.run("combine", [*words, "--weights", "2", "-0.5"])


def test_side_by_side_is_the_sum(
    adapters: list[str], fixtures: Path, tmp_path: Path
) -> None:
    assert combine(adapters, tmp_path / "new") == 0
    expected = 2 * change(adapters[0], fixtures, Q)
    expected -= 0.5 * change(adapters[1], fixtures, Q)
    np.testing.assert_allclose(
        change(tmp_path / "new", fixtures, Q), expected, atol=1e-6
    )
    expected = 2 * change(adapters[0], fixtures, UP)
    np.testing.assert_allclose(
        change(tmp_path / "new", fixtures, UP), expected, atol=1e-6
    )


def test_the_tokenizer_that_all_adapters_have_comes_along(
    adapters: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = [shutil.copytree(a, tmp_path / Path(a).name) for a in adapters]
    for folder in copies:
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "chat_template.jinja").write_text("same")
    names = [str(folder) for folder in copies]
    assert combine(names, tmp_path / "new") == 0
    assert (tmp_path / "new" / "tokenizer_config.json").read_text() == "{}"
    assert (tmp_path / "new" / "chat_template.jinja").read_text() == "same"
    assert "without tokenizer" not in capsys.readouterr().out
    (copies[1] / "chat_template.jinja").write_text("other")
    assert combine(names, tmp_path / "bare") == 0
    assert not (tmp_path / "bare" / "tokenizer_config.json").exists()
    assert "without tokenizer and chat template, in" in capsys.readouterr().out


def test_the_nearest_of_a_rank(
    adapters: list[str], fixtures: Path, tmp_path: Path
) -> None:
    assert combine(adapters, tmp_path / "new", "--method", "svd", "--rank", "5") == 0
    whole = 2 * change(adapters[0], fixtures, Q)
    whole -= 0.5 * change(adapters[1], fixtures, Q)
    left, values, right = np.linalg.svd(whole)
    expected = left[:, :5] * values[:5] @ right[:5]
    np.testing.assert_allclose(
        change(tmp_path / "new", fixtures, Q), expected, atol=1e-5
    )
    config = json.loads((tmp_path / "new/adapter_config.json").read_text())
    assert config["r"] == 5


def test_factors_that_are_added_keep_the_rank(
    adapters: list[str], fixtures: Path, tmp_path: Path
) -> None:
    assert combine([adapters[0]] * 2, tmp_path / "new", "--method", "linear") == 0
    # PEFT: roots of the shares on both sides, the sign on one.
    down, up = np.sqrt(2) + np.sqrt(0.5), np.sqrt(2) - np.sqrt(0.5)
    expected = down * up * change(adapters[0], fixtures, Q)
    np.testing.assert_allclose(
        change(tmp_path / "new", fixtures, Q), expected, atol=1e-6
    )


def test_what_is_no_product_is_refused(
    adapters: list[str], fixtures: Path, tmp_path: Path
) -> None:
    dora = tmp_path / "dora"
    shutil.copytree(fixtures / "peft_lora_dora", dora)
    path = dora / "adapter_config.json"
    base = {"base_model_name_or_path": str(fixtures / "tiny_llama3")}
    path.write_text(json.dumps(json.loads(path.read_text()) | base))
    assert combine([adapters[0], str(dora)], tmp_path / "a") == ConfigError.exit_code
    assert combine(adapters[:1], tmp_path / "a") == ConfigError.exit_code


def test_what_is_there_stays(adapters: list[str], tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    assert combine(adapters, kept) == StorageError.exit_code
    assert kept.read_text() == "mine"
    assert combine(adapters, kept, "--overwrite") == 0
    assert (kept / "adapter_config.json").exists()
    base = json.loads((Path(adapters[0]) / "adapter_config.json").read_text())
    for read in (adapters[0], base["base_model_name_or_path"]):
        assert combine(adapters, Path(read), "--overwrite") == StorageError.exit_code


@pytest.mark.parametrize("words", [("--rank", "4"), ("--method", "svd", "--rank", "0")])
def test_a_rank_is_for_svd_and_positive(
    adapters: list[str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    assert combine(adapters, tmp_path / "new", *words) == ConfigError.exit_code
