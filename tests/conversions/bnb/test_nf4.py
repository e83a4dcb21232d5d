"""Pre-quantised checkpoints: codes and scales stay as they are, faults are named."""

import contextlib
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversions.bnb import (
    companion_keys,
    nf4_tensors,
    parse_quant_state,
    quantised_names,
    read_nf4,
)
from conversions.hf import Checkpoint, load_weights, read_config
from conversions.safetensors_file import SafetensorsFile
from conversions.safetensors_writer import write_safetensors
from fastjax.config import QuantConfig
from fastjax.errors import CheckpointMismatch, FastJaxError, ModelError
from kernels.nf4 import NF4Array, dequantize

pytestmark = pytest.mark.usefixtures("optimised")

MODELS = (
    *("bnb_nf4_dq_bf16", "bnb_nf4_dq_dynamic", "bnb_nf4_nodq_fp16", "bnb_fp4_dq_bf16"),
)
Q = "model.layers.0.self_attn.q_proj.weight"
STATE = Q + ".quant_state.bitsandbytes__nf4"


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def edited(source: Path, target: Path, changes: dict) -> Checkpoint:
    tensors = tensors_of(source) | changes
    kept = {name: array for name, array in tensors.items() if array is not None}
    write_safetensors(target / "model.safetensors", kept)
    return Checkpoint(target)


def state_bytes(**changes) -> np.ndarray:
    values = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [64, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.25,
    }
    values = {k: v for k, v in (values | changes).items() if v is not None}
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


@pytest.mark.parametrize("name", MODELS)
def test_tensors_come_back_bit_equal(fixtures: Path, name: str):
    stored = tensors_of(fixtures / name)
    states = quantised_names(stored)
    assert states
    for weight, key in states.items():
        state = parse_quant_state(stored[key].tobytes(), key=key)
        written = nf4_tensors(weight, read_nf4(weight, state, stored.__getitem__))
        assert set(written) == {weight, key, *companion_keys(weight, state)}
        for part, array in written.items():
            assert (array.dtype, array.shape) == (
                stored[part].dtype,
                stored[part].shape,
            )
            assert array.tobytes() == stored[part].tobytes(), part


@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_bitsandbytes(fixtures: Path, name: str):
    folder = fixtures / name
    reference = SafetensorsFile(folder / "reference.safetensors")
    weights = load_weights(Checkpoint(folder), read_config(folder), quant=QuantConfig())
    packed = {n: w for n, w in weights.items() if isinstance(w, NF4Array)}
    assert len(packed) == len(quantised_names(Checkpoint(folder).tensors))
    for ours, array in packed.items():
        expected = reference.read(f"model.{ours}.dequant")
        actual = np.asarray(dequantize(array)).T
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


def test_quantising_while_loading_equals_bitsandbytes(fixtures: Path):
    """All codes and nested scales agree; of 1,152 scale codes, six do not.

    Those six lie on a border, where the CPU build of bitsandbytes, which made the
    file, and its CUDA build differ.
    """
    expected_folder, folder = fixtures / "bnb_nf4_dq_bf16", fixtures / "tiny_llama3"
    config = read_config(folder)
    expected = load_weights(Checkpoint(expected_folder), config)
    actual = load_weights(Checkpoint(folder), config, quant=QuantConfig())
    different = 0
    for name, array in expected.items():
        leaves = zip(
            jax.tree_util.tree_leaves_with_path(array),
            jax.tree.leaves(actual[name]),
            strict=True,
        )
        for (path, leaf), other in leaves:
            if jax.tree_util.keystr(path) == ".absmax":
                different += np.count_nonzero(np.asarray(leaf) != np.asarray(other))
            else:
                np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), name)
    assert different == 6


def test_dynamic_checkpoints_keep_their_16_bit_layers(fixtures: Path):
    folder = fixtures / "bnb_nf4_dq_dynamic"
    weights = load_weights(Checkpoint(folder), read_config(folder), quant=QuantConfig())
    assert not isinstance(weights["layers.1.self_attn.q_proj.weight"], NF4Array)
    assert isinstance(weights["layers.0.self_attn.q_proj.weight"], NF4Array)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_codes_stored_as_floats_are_viewed_as_bytes(
    fixtures: Path, tmp_path: Path, dtype
):
    folder = fixtures / "bnb_nf4_dq_bf16"
    stored = tensors_of(folder)[Q]
    changed = edited(folder, tmp_path, {Q: stored.reshape(-1).view(dtype)[:, None]})
    weights = load_weights(changed, read_config(folder))
    expected = load_weights(Checkpoint(folder), read_config(folder))
    name = Q.removeprefix("model.")
    np.testing.assert_array_equal(weights[name].codes, expected[name].codes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({STATE: np.frombuffer(b"{", np.uint8)}, "not valid JSON"),
        ({STATE: state_bytes(quant_type="int8")}, "quant_type='int8'"),
        ({STATE: state_bytes(quant_type="fp4")}, "agree with the key"),
        ({STATE: state_bytes(blocksize=0)}, "blocksize=0"),
        ({STATE: state_bytes(blocksize=7)}, "blocksize=7"),
        ({STATE: state_bytes(blocksize=2**40)}, "blocksize=1099511627776"),
        ({STATE: state_bytes(dtype="int8")}, "dtype="),
        ({STATE: state_bytes(shape=[64])}, r"shape=\[64\]"),
        ({STATE: state_bytes(shape=[64, 0])}, r"shape=\[64, 0\]"),
        ({STATE: state_bytes(shape=[64, 32])}, r"shape \[64, 32\], the model needs"),
        ({STATE: state_bytes(nested_blocksize=64)}, "nested_blocksize=64"),
        ({STATE: state_bytes(nested_dtype="float16")}, "nested_dtype='float16'"),
        ({STATE: state_bytes(nested_offset=float("nan"))}, "NaN"),
        ({STATE: state_bytes(nested_offset="x")}, "nested_offset='x'"),
        ({STATE: state_bytes(nested_offset=None)}, "nested_offset=None"),
        ({STATE.replace("nf4", "fp4"): state_bytes()}, "two quant_state keys"),
        ({Q: np.zeros((2047, 1), np.uint8)}, "2047 bytes of codes"),
        ({Q: np.zeros((2048, 1), np.int8)}, "stored as int8"),
        ({Q: None}, f"missing: {Q}"),
        ({Q + ".absmax": None}, f"missing: {Q}.absmax"),
        ({Q + ".absmax": np.zeros(63, np.uint8)}, r"\[63\]; uint8 of shape \[64\]"),
        ({Q + ".absmax": np.zeros(64, np.float32)}, "float32 scales"),
        ({Q + ".quant_map": np.zeros(15, np.float32)}, "table of 16"),
        ({Q + ".quant_map": np.zeros(16, np.float32)}, "table of 16"),
        ({Q + ".nested_quant_map": np.zeros(256, np.float32)}, "table of 256"),
        ({Q + ".nested_absmax": np.full(1, np.nan, np.float32)}, "1 of 1 scales"),
        ({STATE: None}, f"unexpected: .*{Q}.absmax"),
        (
            {"lm_head.weight.quant_state.bitsandbytes__nf4": state_bytes()},
            "only linear layers",
        ),
    ],
)
def test_faults_are_named(fixtures: Path, tmp_path: Path, changes: dict, reason: str):
    folder = fixtures / "bnb_nf4_dq_bf16"
    checkpoint = edited(folder, tmp_path, changes)
    with pytest.raises(ModelError, match=f"(?s){reason.replace('.*', '.{0,999}')}"):
        load_weights(checkpoint, read_config(folder))


def test_single_quantised_scales_must_be_finite(fixtures: Path, tmp_path: Path):
    folder = fixtures / "bnb_nf4_nodq_fp16"
    scales = np.array(tensors_of(folder)[Q + ".absmax"])
    scales[5] = np.inf
    checkpoint = edited(folder, tmp_path, {Q + ".absmax": scales})
    with pytest.raises(ModelError, match="1 of 64 scales"):
        load_weights(checkpoint, read_config(folder))


def test_old_names_of_dtypes_are_read():
    raw = state_bytes(dtype="torch.float16", nested_dtype="torch.float32").tobytes()
    assert parse_quant_state(raw, key=STATE).dtype == "float16"


def test_stacked_arrays_are_not_written(fixtures: Path):
    folder = fixtures / "bnb_nf4_dq_bf16"
    array = load_weights(Checkpoint(folder), read_config(folder))[
        Q.removeprefix("model.")
    ]
    stacked = type(array)(
        **{
            **{name: getattr(array, name) for name in array.__dataclass_fields__},
            "codes": array.codes[None],
        }
    )
    with pytest.raises(ValueError, match="one row_major array"):
        nf4_tensors(Q, stacked)


def test_mismatches_come_before_values(fixtures: Path, tmp_path: Path):
    folder = fixtures / "bnb_nf4_dq_bf16"
    changes = {Q + ".absmax": None, "model.norm.weight": None}
    with pytest.raises(CheckpointMismatch, match="2 missing"):
        load_weights(edited(folder, tmp_path, changes), read_config(folder))


FIELDS = st.sampled_from(list(json.loads(state_bytes().tobytes())))
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)


@given(changes=st.dictionaries(FIELDS, VALUES | st.lists(VALUES, max_size=3)))
def test_random_states_parse_or_are_refused(changes: dict):
    with contextlib.suppress(FastJaxError):
        parse_quant_state(state_bytes(**changes).tobytes(), key=STATE)
