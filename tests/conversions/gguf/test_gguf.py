"""GGUF files against those that llama.cpp's own package wrote and llama.cpp read."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from conversions.gguf import (
    ENCODINGS,
    requantise,
    require_llama_quantize,
    write_gguf,
    write_gguf_lora,
)
from conversions.gguf.architectures import (
    architecture_of,
    differences,
    gguf_name,
    model_metadata,
    rope_tensors,
)
from conversions.gguf.file import GGUFTensor, gguf_writer
from conversions.hf import Checkpoint, read_config, stream_weights
from conversions.peft import read_adapter
from fastjax.errors import EnvironmentFault, ModelError, StorageError
from fastjax.nn.linear import AdapterSpec

Contents = tuple[dict[str, Any], dict[str, tuple[str, np.ndarray]]]
BLOCKS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")


def contents(path: Path) -> Contents:
    """Returns metadata and tensors as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {t.name: (t.tensor_type.name, np.array(t.data)) for t in reader.tensors}
    return metadata, tensors


def written(fixtures: Path, name: str, path: Path, **options: Any) -> Contents:
    folder = fixtures / name
    config = read_config(folder)
    write_gguf(
        path,
        stream_weights(Checkpoint(folder), config, dtype="float32"),
        config,
        source=fixtures / "tokenizer_v5",
        name=name,
        **options,
    )
    return contents(path)


@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_qwen3"])
def test_a_model_is_what_the_package_writes(
    name: str, fixtures: Path, tmp_path: Path
) -> None:
    metadata, tensors = written(fixtures, name, tmp_path / "m.gguf", encoding="f32")
    known_metadata, known_tensors = contents(fixtures / f"{name}.gguf")
    # The fixture names the family's pre-tokenizer; its tokenizer splits as GPT-2's.
    assert metadata.pop("tokenizer.ggml.pre") == "gpt-2"
    del known_metadata["tokenizer.ggml.pre"]
    assert metadata.pop("tokenizer.ggml.add_eos_token") is False
    assert metadata == known_metadata
    assert tensors.keys() == known_tensors.keys()
    for key, (kind, values) in tensors.items():
        expected = known_tensors[key][1]
        assert kind == "F32"
        if key == "rope_freqs.weight":
            np.testing.assert_allclose(values, expected, rtol=1e-6)
        else:
            np.testing.assert_array_equal(values, expected)


def test_a_tied_model_has_no_head_and_vectors_stay_float32(
    fixtures: Path, tmp_path: Path
) -> None:
    metadata, tensors = written(
        fixtures, "tiny_llama_tied", tmp_path / "m.gguf", encoding="q4_0"
    )
    assert "output.weight" not in tensors
    assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    kinds = {name: kind for name, (kind, _) in tensors.items()}
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"


def test_rows_that_are_no_whole_blocks_are_float16(tmp_path: Path) -> None:
    assert not ENCODINGS["q8_0"].fits(48)
    with gguf_writer(tmp_path / "x.gguf", {}, {"a": GGUFTensor((3, 5), "f16")}) as put:
        put("a", np.ones((2, 5), np.float32), first_row=1)
        put("a", np.zeros((1, 5), np.float32))
    kind, values = contents(tmp_path / "x.gguf")[1]["a"]
    assert kind == "F16"
    np.testing.assert_array_equal(values[:, 0], [0, 1, 1])


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_those_of_the_package(name: str) -> None:
    rows = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    rows[0, :32] = 0
    rows[1, :32] *= 1e-3
    kind = gguf.GGMLQuantizationType[name.upper()]
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(rows, kind)
    actual = ENCODINGS[name].encode(rows)
    np.testing.assert_array_equal(actual.reshape(expected.shape), expected)
    assert expected.shape[-1] == ENCODINGS[name].row_bytes(96)


def test_half_a_step_rounds_away_from_zero() -> None:
    rows = np.zeros((1, 32), np.float32)
    rows[0, :4] = 127, 2.5, -2.5, 0.5
    codes = ENCODINGS["q8_0"].encode(rows).view(np.int8).reshape(-1)[2:6]
    assert codes.tolist() == [127, 3, -3, 1]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    tensors = {"a": GGUFTensor((2, 4), "f32")}
    with (
        pytest.raises(ValueError, match="lacks rows"),
        gguf_writer(tmp_path / "x.gguf", {}, tensors) as put,
    ):
        put("a", np.ones((1, 4), np.float32))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before_anything_is_written(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: type("Room", (), {"free": 1000})
    )
    with pytest.raises(StorageError, match="too full"):
        written(fixtures, "tiny_qwen2", tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_what_the_package_writes(fixtures: Path, tmp_path: Path) -> None:
    config = read_config(fixtures / "tiny_llama3")
    adapter = read_adapter(fixtures / "peft_lora_default", config)
    modules = {name.rpartition(".")[0] for name in adapter.weights}
    spec = AdapterSpec(rank=8, scaling=2.0)
    path = tmp_path / "a.gguf"
    write_gguf_lora(path, adapter.weights, config, dict.fromkeys(modules, spec))
    metadata, tensors = contents(path)
    known_metadata, known_tensors = contents(fixtures / "peft_lora_default.gguf")
    assert metadata == known_metadata
    assert tensors.keys() == known_tensors.keys()
    for key, (_, values) in tensors.items():
        np.testing.assert_array_equal(values, known_tensors[key][1])


def test_scalings_that_differ_go_into_the_up_projections(
    fixtures: Path, tmp_path: Path
) -> None:
    config = read_config(fixtures / "tiny_qwen3")
    factors = {"layers.0.mlp.up_proj": 0.5, "layers.1.mlp.up_proj": 3.0}
    weights, specs = {}, {}
    for name, factor in factors.items():
        weights[f"{name}.lora_a"] = np.ones((config.hidden_size, 2), np.float32)
        weights[f"{name}.lora_b"] = np.ones((2, config.intermediate_size), np.float32)
        specs[name] = AdapterSpec(rank=2, scaling=factor)
    write_gguf_lora(tmp_path / "a.gguf", weights, config, specs)
    metadata, tensors = contents(tmp_path / "a.gguf")
    scale = metadata["adapter.lora.alpha"] / 2
    for layer, factor in enumerate(factors.values()):
        values = tensors[f"blk.{layer}.ffn_up.weight.lora_b"][1]
        np.testing.assert_allclose(scale * values, factor)


def test_dora_and_biases_have_no_place(fixtures: Path, tmp_path: Path) -> None:
    config = read_config(fixtures / "tiny_qwen2")
    spec = AdapterSpec(rank=2, scaling=1.0, is_dora=True)
    with pytest.raises(ModelError, match="DoRA"):
        write_gguf_lora(tmp_path / "a.gguf", {}, config, {"m": spec})
    bias = {"layers.0.self_attn.q_proj.bias": np.ones(4, np.float32)}
    with pytest.raises(ModelError, match=r"q_proj\.bias"):
        write_gguf_lora(tmp_path / "a.gguf", bias, config, {})


def test_k_quants_ask_for_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match="not on the PATH"):
        require_llama_quantize()
    source, target = tmp_path / "s.gguf", tmp_path / "t.gguf"
    source.write_bytes(b"16 bits")
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\n/bin/cp "$1" "$2"; /bin/echo "$3" >> "$2"\n')
    program.chmod(0o755)
    requantise(source, target, "q4_k_m")
    assert target.read_bytes() == b"16 bitsQ4_K_M\n"
    program.write_text("#!/bin/sh\n/bin/echo unknown type >&2; exit 3\n")
    with pytest.raises(EnvironmentFault, match="unknown type"):
        requantise(source, target, "q4_k_m")


def test_output_norms_and_windows_of_gemma(fixtures: Path) -> None:
    config = read_config(fixtures / "tiny_gemma2")
    with pytest.raises(ModelError, match="another attention scale than"):
        architecture_of(config)
    config = dataclasses.replace(config, attention_scale=config.head_dim**-0.5)
    metadata = model_metadata(config)
    assert metadata["gemma2.attention.sliding_window"] == 8
    assert metadata["gemma2.attn_logit_softcapping"] == 5.0
    name = "layers.1.post_attention_layernorm.weight"
    assert gguf_name(name, config) == "blk.1.post_attention_norm.weight"
    assert not differences(config)
    windows = dataclasses.replace(config, layer_windows=(8,))
    with pytest.raises(ModelError, match="another pattern of sliding windows than"):
        architecture_of(windows)


def test_fused_projections_and_longrope_of_phi(fixtures: Path) -> None:
    config = read_config(fixtures / "tiny_phi3")
    name = "layers.0.self_attn.qkv_proj.weight"
    assert gguf_name(name, config) == "blk.0.attn_qkv.weight"
    assert rope_tensors(config)["rope_factors_long.weight"].tolist()[-1] == 6.0
    metadata = model_metadata(config)
    assert metadata["phi3.rope.dimension_count"] == 12
    assert metadata["phi3.rope.scaling.original_context_length"] == 16
    remarks = differences(config)
    assert "-c 16" in remarks[0]
    assert "ignores the sliding window" in remarks[1]
