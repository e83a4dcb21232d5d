"""Logits of every family against transformers, float32, on tiny random models."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastjax.api import load_model
from fastjax.config import QuantConfig

MODELS = ("tiny_llama3", "tiny_llama_tied", "tiny_mistral", "tiny_qwen2", "tiny_qwen3")
OLD_CONFIGS = ("tiny_llama3_v4", "tiny_mistral_v4", "tiny_qwen3_v4")


def _assert_logits(folder: Path, reference: Path) -> None:
    expected = load_file(reference / "reference.safetensors")
    model = load_model(str(folder), dtype="float32")
    actual = np.asarray(model.logits(expected["input_ids"].astype(np.int32)))
    np.testing.assert_allclose(actual, expected["logits"], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_logits_match_transformers(name: str, fixtures: Path) -> None:
    _assert_logits(fixtures / name, fixtures / name)


def test_sharded_checkpoint_gives_the_same_logits(fixtures: Path) -> None:
    _assert_logits(fixtures / "tiny_llama3_sharded", fixtures / "tiny_llama3")


@pytest.mark.parametrize("name", OLD_CONFIGS)
def test_config_of_transformers_4_gives_the_same_logits(
    name: str, fixtures: Path, tmp_path: Path
) -> None:
    model = fixtures / name.removesuffix("_v4")
    shutil.copy(model / "model.safetensors", tmp_path)
    shutil.copy(fixtures / name / "config.json", tmp_path)
    _assert_logits(tmp_path, model)


@pytest.mark.parametrize(
    "name",
    ["bnb_nf4_dq_bf16", "bnb_fp4_dq_bf16", "bnb_nf4_dq_dynamic", "bnb_nf4_nodq_fp16"],
)
def test_logits_of_4_bit_checkpoints_match(name: str, fixtures: Path) -> None:
    expected = load_file(fixtures / name / "reference.safetensors")
    model = load_model(str(fixtures / name), dtype="float32", quant=QuantConfig())
    actual = np.asarray(model.logits(expected["input_ids"].astype(np.int32)))
    # The reference multiplied in the 16-bit dtype of the checkpoint.
    error = np.linalg.norm(actual - expected["logits"])
    assert error / np.linalg.norm(expected["logits"]) < 2e-2
    assert model.spec.packed
