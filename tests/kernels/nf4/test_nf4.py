"""NF4 and FP4: bit-equality with bitsandbytes, and the rules of the type."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.flax import load_file

from kernels.device import HOPPER, assume_compute_capability
from kernels.dispatch import UnsupportedOp
from kernels.interpret import interpreted
from kernels.line import NUMBERS_A_LINE, as_lines
from kernels.lora_matmul.narrow import Part, narrow_work
from kernels.nf4 import (
    CODEBOOKS,
    DYNAMIC_MAP,
    NF4Array,
    dequantize,
    dequantize_group,
    quantize,
    rounding,
)
from kernels.nf4.cases import INTERPRETED, LARGE, SMALL, Case

pytestmark = pytest.mark.usefixtures("optimised")

IMPLEMENTATIONS = ["reference", "xla"]
CHECKPOINTS = {
    "bnb_nf4_dq_bf16": 14,
    "bnb_nf4_nodq_fp16": 14,
    "bnb_fp4_dq_bf16": 14,
    "bnb_nf4_dq_dynamic": 7,
}


_quantize = jax.jit(quantize, static_argnames=("code", "double_quant"))
_dequantize = jax.jit(dequantize, static_argnames=("dtype", "implementation"))


def _bits(x: jax.Array | np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def _from_checkpoint(tensors: dict[str, jax.Array], name: str) -> NF4Array:
    """Reads one tensor of a bitsandbytes file."""
    (state_name,) = (k for k in tensors if k.startswith(f"{name}.quant_state."))
    state = json.loads(np.asarray(tensors[state_name]).tobytes())
    is_nested = "nested_blocksize" in state
    out_features, in_features = state["shape"]
    return NF4Array(
        codes=tensors[name].reshape(-1),
        absmax=tensors[f"{name}.absmax"],
        nested_absmax=tensors[f"{name}.nested_absmax"] if is_nested else None,
        nested_offset=as_lines(state["nested_offset"]) if is_nested else None,
        shape=(in_features, out_features),
        dtype=state["dtype"],
        code=state["quant_type"],
    )


def _random(case: Case, dtype: str = "bfloat16", seed: int = 0) -> NF4Array:
    lead = () if case.layers is None else (case.layers,)
    shape = (*lead, case.inputs, case.outputs)
    w = jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)
    return jax.jit(jax.vmap(quantize) if lead else quantize)(w)


@pytest.fixture(scope="module")
def quantise_cases(fixtures: Path) -> dict[str, jax.Array]:
    return load_file(fixtures / "bnb_quantise_cases.safetensors")


def test_codebooks_are_those_of_bitsandbytes(quantise_cases: dict) -> None:
    for name, table in (*CODEBOOKS.items(), ("dynamic", DYNAMIC_MAP)):
        key = "dynamic_map" if name == "dynamic" else f"{name}_code"
        np.testing.assert_array_equal(table, np.asarray(quantise_cases[key]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("checkpoint", "tensors"), CHECKPOINTS.items())
def test_checkpoints_dequantise_bit_equal(
    fixtures: Path, checkpoint: str, tensors: int, implementation: str
) -> None:
    _check_checkpoint(fixtures / checkpoint, tensors, implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("checkpoint", "tensors"), CHECKPOINTS.items())
def test_checkpoints_dequantise_bit_equal_on_cuda(
    fixtures: Path, checkpoint: str, tensors: int, implementation: str
) -> None:
    _check_checkpoint(fixtures / checkpoint, tensors, implementation)


def _check_checkpoint(folder: Path, tensors: int, implementation: str) -> None:
    raw = load_file(folder / "model.safetensors")
    expected = load_file(folder / "reference.safetensors")
    names = [k.removesuffix(".dequant") for k in expected if k.endswith(".dequant")]
    assert len(names) == tensors
    for name in names:
        actual = _dequantize(_from_checkpoint(raw, name), implementation=implementation)
        np.testing.assert_array_equal(
            _bits(actual.T), _bits(expected[f"{name}.dequant"]), err_msg=name
        )


@pytest.mark.parametrize("code", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantise_is_bit_equal(
    quantise_cases: dict, code: str, dtype: str, double_quant: bool
) -> None:
    _check_quantised(quantise_cases, code, dtype, double_quant)


@pytest.mark.gpu
@pytest.mark.parametrize("code", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantise_is_bit_equal_on_cuda(
    quantise_cases: dict, code: str, dtype: str, double_quant: bool
) -> None:
    _check_quantised(quantise_cases, code, dtype, double_quant)


def _check_quantised(
    quantise_cases: dict, code: str, dtype: str, double_quant: bool
) -> None:
    kind = f".{code}.{'dq' if double_quant else 'sq'}.x"
    keys = [k for k in quantise_cases if k.startswith(dtype) and k.endswith(kind)]
    assert len(keys) == 6
    for key in keys:
        expected = {
            k: np.asarray(quantise_cases[key[:-1] + k])
            for k in ("packed", "absmax", "dequant")
        }
        hf_weight = quantise_cases[key].reshape(expected["dequant"].shape)
        w = _quantize(hf_weight.T, code=code, double_quant=double_quant)
        np.testing.assert_array_equal(w.codes, expected["packed"].reshape(-1), key)
        if double_quant:
            np.testing.assert_array_equal(
                w.nested_offset, as_lines(quantise_cases[key[:-1] + "offset"][0]), key
            )
            np.testing.assert_array_equal(
                w.nested_absmax, quantise_cases[key[:-1] + "nested_absmax"], key
            )
        if not double_quant or np.all(np.asarray(w.nested_absmax) > 0):
            # With a nested scale of 0 the code means nothing.
            np.testing.assert_array_equal(w.absmax, expected["absmax"], key)
        for implementation in IMPLEMENTATIONS:
            actual = _dequantize(w, implementation=implementation)
            # bitsandbytes' CPU kernel gives -0 for code 8 of FP4, in odd shapes only.
            zero = np.zeros((), expected["dequant"].dtype)
            np.testing.assert_array_equal(
                _bits(actual.T), _bits(expected["dequant"] + zero), key
            )


def test_ties_go_to_the_lower_code(quantise_cases: dict) -> None:
    w = quantize(quantise_cases["ties.x"].reshape(1, -1).T, double_quant=False)
    np.testing.assert_array_equal(w.codes, quantise_cases["ties.packed"].reshape(-1))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_implementations_agree_bit_for_bit(case: Case) -> None:
    w = _random(case)
    expected = _dequantize(w, implementation="reference")
    actual = _dequantize(w, implementation="xla")
    assert actual.dtype == jnp.bfloat16
    assert actual.shape[-2:] == w.shape == (case.inputs, case.outputs)
    np.testing.assert_array_equal(_bits(actual), _bits(expected))


def _assert_kernel_is_exact(w: NF4Array) -> None:
    actual = jax.jit(functools.partial(dequantize, implementation="mosaic_gpu"))(w)
    expected = _dequantize(w, implementation="reference")
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(_bits(actual), _bits(expected))


@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.name)
def test_the_kernel_is_exact_in_the_interpreter(case: Case) -> None:
    w = _random(case)
    with interpreted():
        _assert_kernel_is_exact(w)


@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_the_kernel_takes_float32_scales_and_float16(code: str) -> None:
    w = jax.random.normal(jax.random.key(0), (128, 64), jnp.float16)
    w = _quantize(w, code=code, double_quant=False)
    with interpreted():
        _assert_kernel_is_exact(w)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla"])
def test_a_group_is_dequantised_with_work_beside(implementation: str) -> None:
    weights = tuple(map(_random, INTERPRETED[:2]))
    source = jax.random.normal(jax.random.key(0), (128, 8))

    def run(weights: tuple[NF4Array, ...], source: jax.Array) -> Any:
        part = Part(source=source, is_long_first=True)
        work = narrow_work(
            [part], length=128, width=8, is_long_first=True, dtype="bfloat16"
        )
        return dequantize_group(weights, beside=[work], implementation=implementation)

    with interpreted():
        found, ((copied,),) = jax.jit(run)(weights, source)
    for actual, w in zip(found, weights, strict=True):
        expected = _dequantize(w, implementation="reference")
        np.testing.assert_array_equal(_bits(actual), _bits(expected))
    np.testing.assert_array_equal(copied, source.astype(jnp.bfloat16))


@pytest.mark.gpu(HOPPER)
@pytest.mark.parametrize("code", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", [*INTERPRETED[:2], *LARGE], ids=lambda case: case.name)
def test_the_kernel_is_exact_on_a_gpu(
    case: Case, dtype: str, double_quant: bool, code: str
) -> None:
    w = jax.random.normal(jax.random.key(1), (case.inputs, case.outputs))
    _assert_kernel_is_exact(
        _quantize(w.astype(dtype), code=code, double_quant=double_quant)
    )


@pytest.mark.gpu(HOPPER)
def test_the_kernel_is_exact_on_a_stack() -> None:
    _assert_kernel_is_exact(_random(INTERPRETED[2]))


def test_the_kernel_says_what_it_lacks() -> None:
    run = functools.partial(dequantize, implementation="mosaic_gpu")
    with assume_compute_capability(HOPPER):
        with pytest.raises(UnsupportedOp, match="multiple of 8192 elements"):
            run(_random(SMALL[3]))
        with pytest.raises(UnsupportedOp, match=r"w.dtype='float32' must be one of"):
            run(_random(INTERPRETED[0], "float32"))
    with (
        assume_compute_capability((10, 0)),
        pytest.raises(UnsupportedOp, match=r"found compute \(10, 0\)"),
    ):
        run(_random(INTERPRETED[0]))


def test_scales_are_multiplied_then_added_each_rounded() -> None:
    """A fused multiply-add in the compiled program would change some of 50,000."""
    blocks = 50_000
    rng = np.random.default_rng(0)
    absmax = rng.integers(0, 256, blocks).astype(np.uint8)
    nested = rng.random(-(-blocks // 256), np.float32)
    offset = np.float32(0.7123457)
    w = NF4Array(
        codes=jnp.full(blocks * 32, 0xFF, jnp.uint8),  # the value 1 everywhere
        absmax=jnp.asarray(absmax),
        nested_absmax=jnp.asarray(nested),
        nested_offset=as_lines(offset),
        shape=(64, blocks),
        dtype="float32",
    )
    expected = DYNAMIC_MAP[absmax] * np.repeat(nested, 256)[:blocks] + offset
    for implementation in IMPLEMENTATIONS:
        actual = _dequantize(w, implementation=implementation)
        np.testing.assert_array_equal(actual[0], expected, implementation)


def test_scale_offset_is_close_to_the_mean_of_many_blocks() -> None:
    rng = np.random.default_rng(1)
    for blocks in (33, 4099, 70_001):
        absmax = rng.lognormal(size=blocks).astype(np.float32)
        actual = jax.jit(rounding.mean)(absmax)
        expected = absmax.astype(np.float64).mean()
        np.testing.assert_allclose(actual, expected, rtol=2e-7)


def test_quotients_are_rounded_once() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.lognormal(size=(2, 10_000)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(rounding.quotient)(a, b), a / b)
    tiny = np.float32([2e-38, 3e-35])
    np.testing.assert_array_equal(
        jax.jit(rounding.quotient)(np.float32([1, 1]), tiny), 1 / tiny
    )


@functools.partial(jax.jit, static_argnames="code")
def _round_trip(w: jax.Array, code: str) -> jax.Array:
    return dequantize(quantize(w, code=code, double_quant=False))


@settings(max_examples=12, deadline=None)
@given(
    hf_weight=hnp.arrays(
        np.float32,
        st.sampled_from([(1, 1), (3, 7), (2, 64), (5, 65)]),
        elements=st.floats(-8, 8, width=32, allow_subnormal=False),
    ),
    code=st.sampled_from(["nf4", "fp4"]),
)
def test_quantising_again_changes_nothing(hf_weight: np.ndarray, code: str) -> None:
    once = _round_trip(jnp.asarray(hf_weight).T, code)
    twice = _round_trip(once, code)
    np.testing.assert_array_equal(once, twice)
    error = np.abs(np.asarray(once).T - hf_weight).max()
    assert error <= 0.18 * np.abs(hf_weight).max()


def test_scan_over_a_stack_and_vmap() -> None:
    stacked = _random(Case(name="", inputs=64, outputs=48, layers=3))
    expected = dequantize(stacked)
    _, scanned = jax.lax.scan(lambda c, w: (c, dequantize(w)), 0, stacked)
    np.testing.assert_array_equal(_bits(scanned), _bits(expected))
    np.testing.assert_array_equal(_bits(jax.vmap(dequantize)(stacked)), _bits(expected))
    one = jax.tree.map(lambda leaf: leaf[1], stacked)
    np.testing.assert_array_equal(_bits(dequantize(one)), _bits(expected[1]))


def test_bytes_of_double_quantised_scales() -> None:
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
    scales = 4096 * 4096 // 64
    assert w.nbytes == 4096 * 4096 // 2 + scales + 4 * (scales // 256 + NUMBERS_A_LINE)


def test_asked_dtype_is_reached_through_the_stored_one() -> None:
    w = _random(Case(name="", inputs=64, outputs=64))
    wide = _dequantize(w, dtype="float32")
    np.testing.assert_array_equal(wide, dequantize(w).astype(jnp.float32))


def test_a_block_with_nan_is_nan_and_zeros_stay_zero() -> None:
    w = jnp.ones((64, 2)).at[3, 0].set(jnp.nan)
    values = dequantize(_quantize(w, double_quant=False))
    assert jnp.isnan(values[:, 0]).all()
    assert (values[:, 1] == 1).all()
    assert not dequantize(_quantize(jnp.zeros((64, 3)))).any()


def test_wrong_use_is_named() -> None:
    with pytest.raises(ValueError, match="block_size=63"):
        quantize(jnp.ones((4, 4)), block_size=63)
    w = quantize(jnp.ones((64, 4)))
    broken = jax.tree.map(lambda leaf: leaf[..., :1], w)
    with pytest.raises(ValueError, match="needs 128 codes, got 1"):
        dequantize(broken)
    assert w.nested_offset is not None
    with pytest.raises(ValueError, match="needs 64 nested_offset, got 1"):
        dequantize(dataclasses.replace(w, nested_offset=w.nested_offset[0]))
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        dequantize(w, implementation="triton")
