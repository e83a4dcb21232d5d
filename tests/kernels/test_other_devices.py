"""No kernel that is written for Hopper is tried on another GPU, for any op."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import kernels
from kernels.adam8bit import Blocks, adam8bit
from kernels.attention import attention
from kernels.cross_entropy import linear_cross_entropy, token_log_probs
from kernels.device import HOPPER, assume_compute_capability
from kernels.dispatch import UnsupportedOp, record
from kernels.gated_mlp import gated_activation, gated_mlp
from kernels.lora_matmul import Projection, lora_matmul
from kernels.nf4 import dequantize, quantize
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope

X = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
HEADS = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
TABLE = jax.ShapeDtypeStruct((1, 256, 32), jnp.float32)
ROWS = jax.ShapeDtypeStruct((256,), jnp.int32)
GRADIENT = jax.ShapeDtypeStruct((256, 256), jnp.float32)
MOMENT = jax.eval_shape(lambda: Blocks.zeros(256 * 256))
STEP = jax.ShapeDtypeStruct((), jnp.int32)

# By the name in the record: a call that the kernels, where there are some, can run.
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "adam8bit": (
        lambda *a, **named: adam8bit(*a, b1=0.9, b2=0.999, eps=1e-8, **named),
        (GRADIENT, MOMENT, MOMENT, STEP),
    ),
    "attention": (attention, (HEADS, HEADS, HEADS)),
    "cross_entropy": (linear_cross_entropy, (X, X, ROWS)),
    "gated_mlp": (
        lambda x, w, **named: gated_mlp(
            x, (Projection(w),) * 2, Projection(w), activation="silu", **named
        ),
        (X, X),
    ),
    "lora_matmul": (
        lambda x, w, a, **named: lora_matmul(x, w, a.T, a, scaling=1.0, **named),
        (X, X, jax.ShapeDtypeStruct((16, 256), jnp.bfloat16)),
    ),
    "nf4": (lambda w, **named: dequantize(quantize(w), **named), (X,)),
    "rms_norm": (lambda x, **named: rms_norm(x, x[0], eps=1e-6, **named), (X,)),
    "rope": (rope, (HEADS, HEADS, TABLE, TABLE)),
}
SECOND_CALLS = {
    "add_rms_norm": (
        lambda x, **named: add_rms_norm(x, x, x[0], eps=1e-6, **named),
        (X,),
    ),
    "cross_entropy": (token_log_probs, (X, X, ROWS)),
    "gated_mlp": (
        lambda *a, **named: gated_activation(*a, activation="silu", **named),
        (X, X),
    ),
}
BY_XLA_ALONE = {"rope"}
"""XLA runs it at the rate of memory, so nobody wrote a kernel."""


def traced(call: tuple[Callable[..., Any], tuple[Any, ...]], **named: str) -> dict:
    """Returns op -> implementations that the call takes."""
    function, arguments = call
    with record() as chosen:
        jax.eval_shape(lambda *a: function(*a, **named), *arguments)
    return chosen


def test_every_op_is_here() -> None:
    folders = {p.parent.name for p in Path(kernels.__path__[0]).glob("*/api.py")}
    assert set(CALLS) == folders


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (10, 0), (12, 0)])
def test_xla_runs_every_op_of_ours(capability: tuple[int, int]) -> None:
    for calls in (CALLS, SECOND_CALLS):
        for op, call in calls.items():
            with assume_compute_capability(capability):
                (chosen,) = traced(call)[op]
            # NVIDIA's own attention may run as well, where its library is at hand.
            assert chosen in ({"xla", "cudnn"} if op == "attention" else {"xla"}), op


@pytest.mark.parametrize("op", sorted(CALLS.keys() - BY_XLA_ALONE))
def test_a_kernel_by_name_is_refused_with_the_reason(op: str) -> None:
    with assume_compute_capability(HOPPER):
        assert traced(CALLS[op], implementation="mosaic_gpu")[op] == {"mosaic_gpu"}
    refused = pytest.raises(UnsupportedOp, match=r"compute \(9, 0\).*\(8, 0\)")
    with assume_compute_capability((8, 0)), refused:
        traced(CALLS[op], implementation="mosaic_gpu")
