"""4-bit folders: what was packed stays so bit by bit, and tools are told of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from conversions.bnb import nf4_tensors, parse_quant_state, quantised_names
from conversions.hf import (
    Checkpoint,
    read_config,
    save_model,
    stored_formats,
    stream_weights,
)
from fastjax.errors import ModelError
from fastjax.models.build import linear_names
from fastjax.nn.linear import PackedFormat
from fastjax.quantize import packed_weights
from kernels.nf4 import NF4Array

MODELS = ("bnb_nf4_dq_bf16", "bnb_nf4_dq_dynamic", "bnb_nf4_nodq_fp16")


def saved_again(source: Path, folder: Path, **options) -> Checkpoint:
    """Writes a 4-bit folder as it is."""
    checkpoint, config = Checkpoint(source), read_config(source)
    packed = stored_formats(checkpoint, config)
    dtype = next(iter(packed.values())).dtype
    weights = stream_weights(checkpoint, config, dtype=dtype)
    save_model(
        folder,
        packed_weights(weights, packed),
        config,
        source=source,
        dtype=dtype,
        packed=packed,
        **options,
    )
    return Checkpoint(folder)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_shard_bytes", [20_000, 10**9])
def test_packed_tensors_go_in_and_out_byte_equal(
    name: str, max_shard_bytes: int, fixtures: Path, tmp_path: Path
) -> None:
    before = Checkpoint(fixtures / name)
    after = saved_again(
        fixtures / name, tmp_path / "out", max_shard_bytes=max_shard_bytes
    )
    assert len(after.weight_files) > 1 or max_shard_bytes > 20_000
    assert before.tensors.keys() == after.tensors.keys()
    states = set(quantised_names(before.tensors).values())
    for key in before.tensors:
        old, new = before.read(key).tobytes(), after.read(key).tobytes()
        assert (new.rstrip(b" ") if key in states else new) == old
        if key in states:
            assert parse_quant_state(new, key=key) == parse_quant_state(old, key=key)


def test_config_names_format_and_what_stays_dense(
    fixtures: Path, tmp_path: Path
) -> None:
    source = fixtures / "bnb_nf4_dq_dynamic"
    saved_again(source, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    told = values["quantization_config"]
    known = json.loads((source / "config.json").read_text())["quantization_config"]
    assert told.keys() == known.keys()
    packed = stored_formats(Checkpoint(source), read_config(source))
    dense = [n for n in linear_names(read_config(source)) if n not in packed]
    skipped = told.pop("llm_int8_skip_modules")
    assert skipped[0] == "lm_head"
    assert sorted(skipped[1:]) == sorted(f"model.{name}" for name in dense)
    del known["llm_int8_skip_modules"]
    assert told == known


def test_dense_weights_are_packed_as_bitsandbytes_would(
    fixtures: Path, tmp_path: Path
) -> None:
    source = fixtures / "tiny_qwen2"
    checkpoint, config = Checkpoint(source), read_config(source)
    packed = dict.fromkeys(linear_names(config), PackedFormat(dtype="bfloat16"))
    weights = stream_weights(checkpoint, config, dtype="float32")
    save_model(
        tmp_path / "out",
        packed_weights(weights, packed),
        config,
        source=source,
        packed=packed,
    )
    after = dict(stream_weights(Checkpoint(tmp_path / "out"), config))
    assert {
        n.removesuffix(".weight") for n, v in after.items() if isinstance(v, NF4Array)
    } == {*packed}
    name = "layers.1.mlp.down_proj"
    rounded = stream_weights(checkpoint, config, dtype="bfloat16")
    expected = packed[name].pack(dict(rounded)[f"{name}.weight"])
    actual = nf4_tensors("w", after[f"{name}.weight"])
    for key, value in nf4_tensors("w", expected).items():
        np.testing.assert_array_equal(actual[key], value)


def test_formats_must_not_differ(fixtures: Path, tmp_path: Path) -> None:
    config = read_config(fixtures / "tiny_qwen2")
    first, *others = linear_names(config)
    packed = {first: PackedFormat(code="fp4"), others[0]: PackedFormat()}
    with pytest.raises(ModelError, match="several 4-bit formats"):
        save_model(
            tmp_path / "out", [], config, source=fixtures / "tiny_qwen2", packed=packed
        )
