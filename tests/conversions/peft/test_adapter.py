"""PEFT adapters come in strictly and go out as PEFT writes them."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conversions.hf import read_config
from conversions.peft import read_adapter, read_adapter_config, write_adapter
from conversions.safetensors_file import SafetensorsFile
from conversions.safetensors_writer import write_safetensors
from fastjax.config import LoRAConfig
from fastjax.errors import CheckpointMismatch, FastJaxError, ModelError
from fastjax.models.build import linear_names
from fastjax.target_modules import full_name, matched_modules, own_name

SUPPORTED = {
    "peft_lora_default": "tiny_llama3",
    "peft_lora_rslora": "tiny_llama3",
    "peft_lora_dora": "tiny_llama3",
    "peft_lora_all_linear": "tiny_llama3",
    "peft_lora_layers": "tiny_llama3",
    "peft_lora_bias": "tiny_qwen2",
    "peft_lora_modules_to_save": "tiny_llama3",
    "peft_lora_tokens": "tiny_llama3",
    "peft_lora_embed_lora": "tiny_llama3",
}
PREFIX = "base_model.model.model.layers."
A = PREFIX + "0.self_attn.q_proj.lora_A.weight"
B = PREFIX + "0.self_attn.q_proj.lora_B.weight"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(folder / FILE)
    return {name: file.read(name) for name in file.tensors}


def edited(source: Path, target: Path, tensors=None, **values) -> Path:
    """A copy of an adapter with other tensors, and other values of its config."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    if tensors is not None:
        write_safetensors(target / FILE, tensors)
    config = json.loads((source / CONFIG).read_text()) | values
    config = {key: value for key, value in config.items() if value != "absent"}
    (target / CONFIG).write_text(json.dumps(config))
    return target


@pytest.fixture
def default(fixtures: Path) -> Path:
    return fixtures / "peft_lora_default"


@pytest.fixture
def llama(fixtures: Path):
    return read_config(fixtures / "tiny_llama3")


@pytest.mark.parametrize(("name", "base"), SUPPORTED.items())
def test_round_trip_is_bit_equal(fixtures: Path, tmp_path: Path, name: str, base: str):
    config = read_config(fixtures / base)
    adapter = read_adapter(fixtures / name, config)
    write_adapter(
        tmp_path / "out", adapter.weights, adapter.lora, base_model_name_or_path=base
    )
    written = (tmp_path / "out" / FILE).read_bytes()
    assert written == (fixtures / name / FILE).read_bytes()
    again = read_adapter(tmp_path / "out", config)
    assert set(again.weights) == set(adapter.weights)
    assert again.base_model_name_or_path == adapter.base_model_name_or_path == base
    recorded = json.loads((fixtures / name / CONFIG).read_text())
    values = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert list(values) == sorted(values)
    for key, value in values.items():
        if key not in ("target_modules", "task_type", "layers_pattern"):
            assert value == recorded[key], key


def test_weights_have_our_names_and_layouts(default: Path, llama):
    adapter = read_adapter(default, llama)
    assert adapter.lora.lora_r == 8
    assert adapter.lora.scaling("model.layers.0.self_attn.q_proj") == 2.0
    assert len(adapter.weights) == 2 * 7 * 2
    stored = tensors_of(default)
    actual = adapter.weights["layers.0.self_attn.q_proj.lora_a"]
    np.testing.assert_array_equal(np.asarray(actual), stored[A].T)
    actual = adapter.weights["layers.0.self_attn.q_proj.lora_b"]
    np.testing.assert_array_equal(np.asarray(actual), stored[B].T)


def test_kinds_are_recognised(fixtures: Path, llama):
    assert read_adapter(fixtures / "peft_lora_rslora", llama).lora.use_rslora
    dora = read_adapter(fixtures / "peft_lora_dora", llama)
    assert dora.lora.use_dora
    assert dora.weights["layers.1.mlp.down_proj.lora_magnitude"].shape == (64,)
    layers = read_adapter(fixtures / "peft_lora_layers", llama)
    assert layers.lora.lora_target_modules == ("q_proj",)
    assert layers.lora.layers_to_transform == (1,)
    bias = read_adapter(
        fixtures / "peft_lora_bias", read_config(fixtures / "tiny_qwen2")
    )
    assert bias.weights["layers.0.self_attn.q_proj.bias"].shape == (64,)


def test_all_biases_are_written_where_peft_has_them(fixtures: Path, tmp_path: Path):
    """PEFT wraps adapted layers only, so other biases keep their plain name."""
    config = read_config(fixtures / "tiny_qwen2")
    adapter = read_adapter(fixtures / "peft_lora_bias", config)
    lora = LoRAConfig(
        lora_r=4,
        lora_alpha=8.0,
        lora_target_modules=("q_proj", "v_proj"),
        lora_bias="all",
    )
    spare = {f"layers.{i}.self_attn.k_proj.bias": jnp.ones(32) for i in range(2)}
    write_adapter(tmp_path, adapter.weights | spare, lora, base_model_name_or_path="x")
    assert PREFIX + "0.self_attn.k_proj.bias" in tensors_of(tmp_path)
    assert PREFIX + "0.self_attn.q_proj.base_layer.bias" in tensors_of(tmp_path)
    again = read_adapter(tmp_path, config)
    assert set(again.weights) == set(adapter.weights) | set(spare)


@pytest.mark.parametrize(
    ("target", "kept", "count"),
    [
        (r".*\.layers\.1\.self_attn\.(q|v)_proj", r"1\.self_attn\.[qv]_proj", 2),
        (["q_proj", "self_attn.v_proj", "c_attn"], r"[qv]_proj", 4),
        ("all-linear", "", 14),
    ],
)
def test_targets_may_be_lists_and_expressions(
    default: Path, tmp_path: Path, llama, target, kept: str, count: int
):
    tensors = {k: v for k, v in tensors_of(default).items() if re.search(kept, k)}
    folder = edited(default, tmp_path, tensors, target_modules=target)
    adapter = read_adapter(folder, llama)
    assert len(adapter.weights) == 2 * count
    names = [full_name(name) for name in linear_names(llama)]
    matched = matched_modules(adapter.lora.lora_target_modules, names)
    assert {own_name(name) for name in matched} == {
        name.rpartition(".")[0] for name in adapter.weights
    }


def test_excluded_modules_have_no_adapter(default: Path, tmp_path: Path, llama):
    kept = {k: v for k, v in tensors_of(default).items() if "up_proj" not in k}
    folder = edited(default, tmp_path, kept, exclude_modules=["up_proj"])
    adapter = read_adapter(folder, llama)
    assert not any("up_proj" in name for name in adapter.weights)
    assert isinstance(adapter.lora.lora_target_modules, tuple)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_names_of_adapters_and_16_bits_are_accepted(
    default: Path, tmp_path: Path, llama, dtype
):
    stored = {
        key.replace(".weight", ".default.weight"): array.astype(dtype)
        for key, array in tensors_of(default).items()
    }
    adapter = read_adapter(edited(default, tmp_path, stored), llama)
    actual = np.asarray(adapter.weights["layers.0.self_attn.q_proj.lora_a"])
    assert actual.dtype == np.float32
    expected = tensors_of(default)[A].astype(dtype).astype(np.float32).T
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(A), f"missing: {A}"),
        (lambda t: t.update(x=t[A]), "unexpected: x"),
        (lambda t: t.update({"model." + A: t.pop(A)}), "unexpected: model.base"),
        (lambda t: t.update({A: t[A].T}), r"\[64, 8\], the model needs \[8, 64\]"),
        (lambda t: t.update({A: t[A][:4]}), r"\[4, 64\], the model needs \[8, 64\]"),
        (lambda t: t.update({A: t[A].astype(np.int32)}), "no dtype of an adapter"),
        (lambda t: t.update({A: t[A] * np.nan}), "512 of 512 values are NaN"),
        (lambda t: t.update({A.replace("_A", "_A.default"): t[A]}), "the same tensor"),
    ],
)
def test_wrong_tensors_are_named(default: Path, tmp_path: Path, llama, change, reason):
    tensors = {key: np.array(array) for key, array in tensors_of(default).items()}
    change(tensors)
    tensors = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
    with pytest.raises(ModelError, match=f"(?s){reason}"):
        read_adapter(edited(default, tmp_path, tensors), llama)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"lora_alpha": "absent"}, "lora_alpha is missing"),
        ({"r": "absent"}, "r is missing"),
        ({"r": 0}, "r=0"),
        ({"r": 4}, "misshapen"),
        ({"lora_alpha": -1}, "lora_alpha=-1"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'"),
        ({"target_modules": None}, "target_modules=None"),
        ({"target_modules": []}, r"target_modules=\[\]"),
        ({"target_modules": ["nope"]}, "matches no linear layer or table"),
        ({"target_modules": "q_proj"}, "matches no linear layer"),
        ({"target_modules": "("}, "regular expression"),
        ({"target_modules": "(a+)+b"}, "nested repetition"),
        ({"target_modules": [3]}, "list of names"),
        ({"target_modules": 3}, "list of names"),
        ({"target_modules": ["q_proj"]}, "unexpected"),
        ({"bias": "some"}, "bias='some'"),
        ({"use_dora": True}, "missing: .*lora_magnitude_vector"),
        ({"rank_pattern": {"q_proj": 4}}, "misshapen"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern=.*whole numbers"),
        ({"rank_pattern": {"(a+)+b": 4}}, "nested repetition"),
        ({"rank_pattern": ["q_proj"]}, "an object of names and numbers"),
        ({"alpha_pattern": {"q_proj": "4"}}, "q_proj='4' must be a positive number"),
        ({"modules_to_save": ["norm"]}, "modules_to_save=.* not supported yet"),
        ({"modules_to_save": ["lm_head"]}, "missing: base_model.model.lm_head"),
        ({"trainable_token_indices": [-1]}, "token ids"),
        ({"trainable_token_indices": {"lm_head": [1]}}, "not supported yet"),
        ({"lora_bias": True}, "missing: .*lora_B.bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"layers_to_transform": ["x"]}, "layers_to_transform"),
        ({"layers_to_transform": [7]}, "no layer is left"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3"),
        ({"some_new_option": 1}, "some_new_option=1 is not supported yet"),
    ],
)
def test_wrong_configs_are_named(default: Path, tmp_path: Path, llama, values, reason):
    with pytest.raises(ModelError, match=f"(?s){reason}"):
        read_adapter(edited(default, tmp_path, **values), llama)


def test_an_adapter_of_another_base_is_refused(default: Path, fixtures: Path):
    with pytest.raises(CheckpointMismatch, match="misshapen"):
        read_adapter(default, read_config(fixtures / "tiny_qwen3"))


def test_missing_files_and_pickles(default: Path, tmp_path: Path, llama):
    folder = edited(default, tmp_path)
    (folder / FILE).unlink()
    with pytest.raises(ModelError, match=f"{FILE} is missing"):
        read_adapter(folder, llama)
    (folder / "adapter_model.bin").touch()
    with pytest.raises(ModelError, match="pickle"):
        read_adapter(folder, llama)
    with pytest.raises(ModelError, match="cannot read"):
        read_adapter_config(tmp_path / "nope")


def test_names_cannot_add_lines_to_the_card(default: Path, tmp_path: Path, llama):
    adapter = read_adapter(default, llama)
    name = 'x"\n---\ntoken: 1'
    write_adapter(tmp_path, adapter.weights, adapter.lora, base_model_name_or_path=name)
    front = (tmp_path / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == name
    assert "token" not in yaml.safe_load(front)


def test_half_an_adapter_is_not_written(default: Path, tmp_path: Path, llama):
    adapter = read_adapter(default, llama)
    weights = dict(adapter.weights)
    del weights["layers.1.mlp.up_proj.lora_b"]
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj"):
        write_adapter(tmp_path, weights, adapter.lora, base_model_name_or_path="x")
    other = LoRAConfig(lora_r=4)
    with pytest.raises(ValueError, match="has rank 8, not 4"):
        write_adapter(tmp_path, adapter.weights, other, base_model_name_or_path="x")
    assert not list(tmp_path.iterdir())


KEYS = st.sampled_from(
    (
        *("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_dora"),
        *("layers_to_transform", "layers_pattern", "exclude_modules", "revision"),
        *("init_lora_weights", "peft_type", "rank_pattern", "modules_to_save"),
        *("alpha_pattern", "trainable_token_indices", "loftq_config"),
    )
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.sampled_from(["LORA", "all-linear", "q_proj", "none"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)


@given(values=st.dictionaries(KEYS, VALUES, max_size=6))
def test_random_configs_are_read_or_refused(tmp_path_factory, values: dict):
    folder = tmp_path_factory.mktemp("adapter")
    good = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(good | values))
    with contextlib.suppress(FastJaxError):
        read_adapter_config(folder).resolved(["model.layers.0.self_attn.q_proj"])
