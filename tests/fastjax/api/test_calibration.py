"""Dynamic 4-bit: what stays in 16 bits is what matters most, within the budget."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from conversions.hf import Checkpoint, read_config
from fastjax.api import run_export
from fastjax.errors import FastJaxError
from fastjax.nn.linear import PackedFormat
from fastjax.sensitivity import (
    GroupError,
    kept_in_16_bits,
    linear_groups,
    lost_share,
)


def group(name: str, size: int, divergence: float) -> GroupError:
    return GroupError(
        modules=(name,),
        extra_bytes=size,
        divergence=divergence,
        activation_error=0.1,
        weight_errors=(0.1,),
    )


def test_the_budget_goes_where_a_byte_helps_most() -> None:
    errors = [group("a", 10, 1.0), group("b", 1, 0.5), group("c", 3, 0.9)]
    kept = kept_in_16_bits(errors, budget_bytes=11)
    assert [error.modules for error in kept] == [("b",), ("c",)]
    assert not kept_in_16_bits([group("a", 1, 0.0)], budget_bytes=9)


def test_linears_of_one_input_go_together(fixtures: Path) -> None:
    groups = linear_groups(read_config(fixtures / "tiny_llama3"))
    assert len(groups) == 8
    assert groups[0] == tuple(f"layers.0.self_attn.{n}_proj" for n in "qkv")
    fused = linear_groups(read_config(fixtures / "tiny_phi3"))
    assert fused[0] == ("layers.0.self_attn.qkv_proj",)


def test_a_linear_of_zeros_loses_nothing() -> None:
    packed = PackedFormat(dtype="float32")
    assert lost_share(jnp.zeros((64, 64)), packed) == 0
    assert lost_share(jnp.eye(64) + 0.1, packed) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_holds_what_the_report_says(
    small_model: Path, alpaca_file: Path, tmp_path: Path, dtype: str
) -> None:
    folder = tmp_path / "out"
    options = {
        "output_format": "bnb-dynamic",
        "calibration_data": str(alpaca_file),
        "extra_memory": 0.2,
        "dtype": dtype,
    }
    lines = list(run_export(str(small_model), folder, compare_logits=False, **options))
    report = json.loads((folder / "quantization_report.json").read_text())
    kept = {m for g in report["groups"] if g["in_16_bits"] for m in g["modules"]}
    assert 0 < len(kept) < 14
    assert f"{len(kept)} linears stay in 16 bits" in lines[0]
    assert 0 < report["divergence"] < report["plain_divergence"]
    for g in report["groups"]:
        assert len(g["weight_errors"]) == len(g["modules"])
        assert all(0.05 < error < 0.2 for error in g["weight_errors"])
        assert 0 < g["activation_error"] < 0.2
    names = Checkpoint(folder).tensors
    assert sum(".quant_state." in name for name in names) == 14 - len(kept)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    skipped = set(settings["llm_int8_skip_modules"])
    assert skipped == {f"model.{module}" for module in kept} | {"lm_head"}
    with pytest.raises(FastJaxError, match="in 4 bits already"):
        list(run_export(str(folder), tmp_path / "again", **options))
