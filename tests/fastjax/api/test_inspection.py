"""What `fastjax inspect` finds in folders, whole and broken."""

import json
import shutil
from pathlib import Path

import pytest

from fastjax import cli
from fastjax.api import inspect_folder
from fastjax.errors import ModelError


def test_a_model_and_its_tokenizer(small_model: Path) -> None:
    found = inspect_folder(small_model, reads_values=True)
    assert not found.problems
    assert found.facts["family"] == "llama"
    assert found.facts["values"] == "all finite"
    assert found.facts["tokenizer"] == "403 tokens, with chat template"
    assert "21 tensors in 1 file: " in found.facts["weights"]


def test_dynamic_4_bits(fixtures: Path) -> None:
    found = inspect_folder(fixtures / "bnb_nf4_dq_dynamic")
    assert found.facts["4-bit"] == "7 linears in nf4, double quantised; 7 in 16 bits"
    assert found.facts["tokenizer"] == "none in this folder"


def test_an_adapter_what_will_not_serve_it_and_what_is_missing(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(fixtures / "adapter_layers", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    base = {"base_model_name_or_path": str(fixtures / "tiny_gemma2")}
    path.write_text(json.dumps(json.loads(path.read_text()) | base))
    found = inspect_folder(tmp_path)
    assert not found.problems
    assert found.facts["adapter"].startswith("rsLoRA and DoRA of rank 4, alpha 8")
    assert found.facts["trained"].endswith("values, 14 adapted modules")
    assert "DoRA" in found.remarks[0]
    (tmp_path / "adapter_model.safetensors").unlink()
    assert cli.run("inspect", [str(tmp_path)]) == ModelError.exit_code
    shown = capsys.readouterr()
    assert "problem     adapter_model.safetensors is missing" in shown.out
    assert "adapter_model.safetensors is missing" in shown.err


def test_gguf_files_whole_and_cut(fixtures: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copyfile(fixtures / "tiny_llama3.gguf", path)
    found = inspect_folder(tmp_path)
    assert not found.problems
    assert found.facts == inspect_folder(path).facts
    assert found.facts["GGUF"] == "model.gguf: llama model for llama.cpp"
    assert found.facts["sizes"] == "2 layers of 64"
    assert found.facts["context"] == "256 tokens, RoPE llama3"
    lora = inspect_folder(fixtures / "peft_lora_default.gguf").facts
    assert lora["adapter"] == "rank 8, alpha 16.0"
    shutil.copyfile(fixtures / "peft_lora_default.gguf", tmp_path / "lora.gguf")
    both = inspect_folder(tmp_path).facts
    assert both["lora.gguf adapter"] == lora["adapter"]
    assert both["model.gguf weights"] == found.facts["weights"]
    for end, reason in ((-40, "its tensors at"), (999, "within its header")):
        path.write_bytes((fixtures / "tiny_llama3.gguf").read_bytes()[:end])
        (problem,) = inspect_folder(path).problems
        assert reason in problem.what
    path.write_text("<html>")
    (problem,) = inspect_folder(path).problems
    assert problem.what == "this is no GGUF file"


def test_a_folder_of_neither(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither config\.json nor"):
        inspect_folder(tmp_path)
