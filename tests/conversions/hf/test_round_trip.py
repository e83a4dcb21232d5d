"""HF -> weights -> HF is bit-equal, and the loader accepts nothing but the model."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from conversions.hf import (
    Checkpoint,
    checkpoint_tensors,
    load_weights,
    read_config,
    save_model,
    stream_weights,
)
from conversions.safetensors_writer import write_safetensors
from fastjax.config import QuantConfig
from fastjax.errors import CheckpointMismatch, ModelError, StorageError
from kernels.nf4 import NF4Array, quantize

MODELS = (
    *("tiny_llama3", "tiny_llama3_sharded", "tiny_llama_tied", "tiny_mistral"),
    *("tiny_qwen2", "tiny_qwen3"),
)
NORM = "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def edited(folder: Path, target: Path, **changes: np.ndarray | None) -> Checkpoint:
    """A copy of the weights with tensors replaced, added, or (None) removed."""
    tensors = tensors_of(folder)
    tensors |= {name: array for name, array in changes.items() if array is not None}
    for name, array in changes.items():
        if array is None:
            del tensors[name]
    write_safetensors(target / "model.safetensors", tensors)
    return Checkpoint(target)


NEWER = ("gemma2", "gemma3_text", "granite", "olmo2", "olmo3", "phi3", "smollm3")


@pytest.mark.parametrize(
    ("name", "max_shard_bytes"),
    [
        *((name, size) for name in MODELS for size in (5_000_000_000, 100_000)),
        *((f"tiny_{name}", 5_000_000_000) for name in NEWER),
    ],
)
def test_round_trip_is_bit_equal(
    fixtures: Path, tmp_path: Path, name: str, max_shard_bytes: int
):
    source = fixtures / name
    config = read_config(source)
    weights = load_weights(Checkpoint(source), config, dtype="float32")
    backwards = reversed(weights.items())
    save_model(
        tmp_path / "out",
        backwards,
        config,
        source=source,
        dtype="float32",
        max_shard_bytes=max_shard_bytes,
    )
    expected, actual = tensors_of(source), tensors_of(tmp_path / "out")
    assert set(actual) == set(expected)
    for key, array in expected.items():
        assert actual[key].dtype == array.dtype
        assert actual[key].tobytes() == array.tobytes()
    for file in {path.name for path in source.glob("*config.json")}:
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes == 100_000)


def test_single_file_is_the_file_of_transformers(fixtures: Path, tmp_path: Path):
    source = fixtures / "tiny_qwen3"
    config = read_config(source)
    weights = load_weights(Checkpoint(source), config, dtype="float32")
    save_model(
        tmp_path / "out", weights.items(), config, source=source, dtype="float32"
    )
    file = "model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()


def test_index_counts_what_is_there(fixtures: Path, tmp_path: Path):
    source = fixtures / "tiny_llama3_sharded"
    config = read_config(source)
    weights = load_weights(Checkpoint(source), config, dtype="float32")
    save_model(
        tmp_path / "out",
        weights.items(),
        config,
        source=source,
        dtype="float32",
        max_shard_bytes=200_000,
    )
    index = "model.safetensors.index.json"
    expected = json.loads((source / index).read_text())
    actual = json.loads((tmp_path / "out" / index).read_text())
    assert actual["metadata"] == expected["metadata"]
    assert set(actual["weight_map"]) == set(expected["weight_map"])


def test_linear_weights_are_turned_and_cast(fixtures: Path):
    source = fixtures / "tiny_llama3"
    weights = load_weights(Checkpoint(source), read_config(source))
    stored = Checkpoint(source).read("model.layers.0.mlp.up_proj.weight")
    actual = weights["layers.0.mlp.up_proj.weight"]
    assert actual.shape == (64, 128)
    expected = jnp.asarray(np.array(stored)).astype("bfloat16").T
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))
    assert {array.dtype.name for array in weights.values()} == {"bfloat16"}
    embedding = weights["embed_tokens.weight"]
    assert embedding.shape == (512, 64)


def test_linear_layers_are_quantised_while_loading(fixtures: Path):
    source = fixtures / "tiny_llama3"
    config = read_config(source)
    dense = load_weights(Checkpoint(source), config)
    quantised = load_weights(
        Checkpoint(source),
        config,
        quant=QuantConfig(),
        is_quantised_name=lambda name: ".layers.1." not in f".{name}",
    )
    linear = {t.name for t in checkpoint_tensors(config) if t.is_linear}
    packed = {n for n, array in quantised.items() if isinstance(array, NF4Array)}
    assert packed == {name for name in linear if name.startswith("layers.0.")}
    for name in packed:
        expected, actual = quantize(dense[name]), quantised[name]
        np.testing.assert_array_equal(actual.codes, expected.codes)
        np.testing.assert_array_equal(actual.absmax, expected.absmax)
        assert (actual.shape, actual.dtype) == (dense[name].shape, "bfloat16")


def test_weights_do_not_depend_on_the_file(fixtures: Path, tmp_path: Path):
    source = fixtures / "tiny_llama3"
    checkpoint = edited(source, tmp_path)
    weights = load_weights(checkpoint, read_config(source), dtype="float32")
    before = np.array(weights["norm.weight"])
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * (tmp_path / "model.safetensors").stat().st_size)
    np.testing.assert_array_equal(np.asarray(weights["norm.weight"]), before)


def test_every_difference_is_in_one_error(fixtures: Path, tmp_path: Path):
    source = fixtures / "tiny_llama3"
    checkpoint = edited(
        source,
        tmp_path,
        **{
            NORM: None,
            Q: np.zeros((64, 63), np.float32),
            HEAD: np.zeros((512, 64), np.int32),
            "model.extra.weight": np.zeros(1, np.float32),
        },
    )
    config = dataclasses.replace(read_config(source), num_hidden_layers=4)
    with pytest.raises(CheckpointMismatch) as caught:
        next(stream_weights(checkpoint, config))
    text = str(caught.value)
    assert f"missing: {NORM}" in text
    assert "missing: model.layers.[2-3].self_attn.q_proj.weight" in text
    assert "unexpected: model.extra.weight" in text
    assert f"{Q}: shape [64, 63], the model needs [64, 64]" in text
    assert f"{HEAD}: int32" in text


def test_fewer_layers_than_the_checkpoint_are_refused(fixtures: Path):
    source = fixtures / "tiny_llama3"
    config = dataclasses.replace(read_config(source), num_hidden_layers=1)
    with pytest.raises(CheckpointMismatch, match=r"unexpected: model.layers.1.mlp"):
        load_weights(Checkpoint(source), config)


def test_rotary_leftovers_are_ignored(fixtures: Path, tmp_path: Path):
    source = fixtures / "tiny_llama3"
    spare = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    checkpoint = edited(source, tmp_path, **spare)
    assert load_weights(checkpoint, read_config(source))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_values_that_are_not_finite_are_named(
    fixtures: Path, tmp_path: Path, value: float
):
    source = fixtures / "tiny_llama3"
    poisoned = np.array(Checkpoint(source).read(Q))
    poisoned[3, 4:6] = value
    checkpoint = edited(source, tmp_path, **{Q: poisoned})
    with pytest.raises(ModelError, match="2 of 4096 values") as caught:
        load_weights(checkpoint, read_config(source), dtype="float16")
    assert Q in caught.value.where


def test_head_of_a_tied_model_must_be_the_embedding(fixtures: Path, tmp_path: Path):
    source = fixtures / "tiny_llama_tied"
    config = read_config(source)
    embedding = np.array(Checkpoint(source).read(EMBEDDING))
    weights = load_weights(edited(source, tmp_path, **{HEAD: embedding}), config)
    assert HEAD not in weights
    embedding[511, 63] += 1
    with pytest.raises(CheckpointMismatch, match="differs from"):
        load_weights(edited(source, tmp_path, **{HEAD: embedding}), config)
    shorter = edited(source, tmp_path, **{HEAD: embedding[:9]})
    with pytest.raises(CheckpointMismatch, match="differs from"):
        load_weights(shorter, config)


def test_untied_model_needs_its_head(fixtures: Path):
    source = fixtures / "tiny_llama_tied"
    config = dataclasses.replace(read_config(source), tie_word_embeddings=False)
    with pytest.raises(CheckpointMismatch, match=f"missing: {HEAD}"):
        load_weights(Checkpoint(source), config)


def test_float64_and_float16_checkpoints_load(fixtures: Path, tmp_path: Path):
    source = fixtures / "tiny_llama3"
    stored = np.array(Checkpoint(source).read(Q))
    checkpoint = edited(source, tmp_path, **{Q: stored.astype(np.float64)})
    weights = load_weights(checkpoint, read_config(source), dtype="float32")
    actual = weights["layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(np.asarray(actual).T, stored)


def test_saving_refuses_what_is_not_the_model(fixtures: Path, tmp_path: Path):
    source, out = fixtures / "tiny_llama3", tmp_path / "out"
    config = read_config(source)
    weights = load_weights(Checkpoint(source), config, dtype="float32")
    norm = weights.pop("norm.weight")
    with pytest.raises(CheckpointMismatch, match=r"missing: norm.weight"):
        save_model(out, weights.items(), config, source=source)
    weights |= {"norm.weight": norm, "spare": norm}
    with pytest.raises(CheckpointMismatch, match="unexpected: spare"):
        save_model(out, weights.items(), config, source=source)
    assert not list(tmp_path.iterdir())


def test_saving_needs_a_new_name_and_room(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = fixtures / "tiny_llama3"
    config = read_config(source)
    with pytest.raises(StorageError, match="exists already"):
        save_model(tmp_path, [], config, source=source)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Room(free=1000))
    with pytest.raises(StorageError, match="too full"):
        save_model(tmp_path / "out", [], config, source=source)
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass
class Room:
    free: int


@pytest.mark.parametrize("keys", [["dtype"], ["torch_dtype"], []])
def test_config_keeps_everything_but_dtype_and_quantisation(
    fixtures: Path, tmp_path: Path, keys: list[str]
):
    source = fixtures / "tiny_llama3"
    config = read_config(source)
    weights = load_weights(Checkpoint(source), config)
    values = json.loads((source / "config.json").read_text())
    del values["dtype"]
    values |= dict.fromkeys(keys, "float32")
    values["quantization_config"] = {"load_in_4bit": True}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(values))
    (tmp_path / "source" / "tokenizer.json").write_bytes(b"\xff\r\n")
    out = tmp_path / "out"
    save_model(out, weights.items(), config, source=tmp_path / "source")
    saved = json.loads((out / "config.json").read_text())
    del values["quantization_config"]
    assert saved == values | dict.fromkeys(keys or ["torch_dtype"], "bfloat16")
    assert list(saved)[: len(values)] == list(values)
    assert (out / "tokenizer.json").read_bytes() == b"\xff\r\n"
    assert Checkpoint(out).tensors[NORM].dtype.name == "bfloat16"
