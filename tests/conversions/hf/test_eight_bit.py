"""8-bit checkpoints: dequantised on the way in, quantised to 4 bits when asked."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conversions.hf import Checkpoint, load_weights, read_config
from conversions.hf.eight_bit import read_eight_bit
from conversions.safetensors_writer import write_safetensors
from fastjax.api import inspect_folder
from fastjax.config import QuantConfig
from fastjax.errors import CheckpointMismatch, ModelError
from kernels.int8 import Int8Array, dequantize
from kernels.nf4 import NF4Array

pytestmark = pytest.mark.usefixtures("optimised")

Tensors = dict[str, np.ndarray]
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
Q = "model.layers.0.self_attn.q_proj.weight"


def fp8(name: str, weight: np.ndarray) -> Tensors:
    """A weight as blocks of FP8; tiny ones are a single block."""
    scale = np.abs(weight).max() / 448
    codes = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    scales = np.full((1, 1), scale, np.float32)
    return {name: codes, name.removesuffix("weight") + "weight_scale_inv": scales}


def int8(name: str, weight: np.ndarray) -> Tensors:
    """A weight as LLM.int8 stores it."""
    scales = np.abs(weight).max(axis=1).astype(np.float32)
    codes = np.rint(weight / scales[:, None] * 127).astype(np.int8)
    module = name.removesuffix("weight")
    order = np.zeros((), np.uint8)
    return {name: codes, module + "SCB": scales, module + "weight_format": order}


def written(fixtures: Path, folder: Path, pack: Any, settings: Any) -> Path:
    source = Checkpoint(fixtures / "tiny_llama3")
    tensors: Tensors = {}
    for name in source.tensors:
        weight = source.read(name).astype(np.float32)
        is_linear = name.endswith("_proj.weight")
        tensors |= pack(name, weight) if is_linear else {name: weight}
    write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((source.folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("pack", "settings"), [(fp8, FP8), (int8, INT8)])
def test_values_are_code_times_scale(
    fixtures: Path, tmp_path: Path, pack: Any, settings: Any
) -> None:
    folder = written(fixtures, tmp_path, pack, settings)
    config = read_config(folder)
    weights = load_weights(Checkpoint(folder), config, dtype="float32")
    exact = Checkpoint(fixtures / "tiny_llama3").read(Q).astype(np.float32)
    held = pack(Q, exact)
    scales = next(v for k, v in held.items() if k.endswith(("inv", "SCB")))
    expected = held[Q].astype(np.float32) * scales.reshape(-1, 1)
    expected = expected / 127 if pack is int8 else expected
    actual = np.asarray(weights["layers.0.self_attn.q_proj.weight"]).T
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    kind = "LLM.int8" if pack is int8 else "FP8, in blocks"
    assert inspect_folder(folder).facts["8-bit"] == f"14 linears in {kind}"
    packed = load_weights(Checkpoint(folder), config, quant=QuantConfig())
    assert isinstance(packed["layers.0.self_attn.q_proj.weight"], NF4Array)


def test_each_block_has_its_own_scale(tmp_path: Path) -> None:
    codes = np.ones((130, 260), ml_dtypes.float8_e4m3fn)
    scales = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    actual = np.asarray(read_eight_bit(Checkpoint(tmp_path), "a.weight"))
    expected = np.kron(scales, np.ones((128, 128)))[:130, :260]
    np.testing.assert_array_equal(actual, expected)


def test_scales_must_be_there_and_finite(fixtures: Path, tmp_path: Path) -> None:
    folder = written(fixtures, tmp_path, int8, INT8)
    file = Checkpoint(folder)
    tensors = {name: np.array(file.read(name)) for name in file.tensors}
    name = Q.removesuffix("weight") + "SCB"
    tensors[name][3] = np.nan
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(ModelError, match="scales are NaN"):
        load_weights(Checkpoint(folder), read_config(folder))
    del tensors[name]
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointMismatch, match=f"missing: {name}"):
        load_weights(Checkpoint(folder), read_config(folder))


def test_rows_of_8_bits_are_taken_as_they_are(fixtures: Path, tmp_path: Path) -> None:
    folder = written(fixtures, tmp_path, int8, INT8)
    quant = QuantConfig(load_in_4bit=False, load_in_8bit=True)
    checkpoint = Checkpoint(folder)
    weights = load_weights(checkpoint, read_config(folder), quant=quant)
    held = weights["layers.0.self_attn.q_proj.weight"]
    assert isinstance(held, Int8Array)
    np.testing.assert_array_equal(held.codes, checkpoint.read(Q).T)
    np.testing.assert_array_equal(
        held.absmax, checkpoint.read(Q.removesuffix("weight") + "SCB")
    )
    exact = dequantize(dataclasses.replace(held, dtype="float32"))
    np.testing.assert_array_equal(exact, read_eight_bit(checkpoint, Q).T)
