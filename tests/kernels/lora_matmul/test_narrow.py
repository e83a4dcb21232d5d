"""Narrow operands: parts of several adapters, cast and laid out as one matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.interpret import interpreted
from kernels.joint_launch import joint_launch
from kernels.line import as_lines
from kernels.lora_matmul.narrow import Part, narrow_work
from kernels.numerics import relative_error, tolerance


def _normal(shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape, jnp.float32)


@pytest.mark.parametrize("is_long_first", [True, False])
def test_parts_stand_where_they_belong(is_long_first: bool) -> None:
    """Two pieces of work in one launch: parts side by side, and on a diagonal."""
    wide, small, up = _normal((256, 24)), _normal((256, 8)), _normal((16, 128))
    scale = as_lines(0.37)

    def run(wide, small, up, scale):
        beside = (
            Part(source=wide, is_long_first=True, scale=scale),
            Part(source=small, is_long_first=True, column=32),
        )
        diagonal = (
            Part(source=small, is_long_first=True),
            Part(source=up, is_long_first=False, scale=scale, first=384, column=8),
        )
        works = tuple(
            narrow_work(
                parts,
                length=length,
                width=40,
                is_long_first=is_long_first,
                dtype="bfloat16",
            )
            for parts, length in ((beside, 256), (diagonal, 512))
        )
        return joint_launch(works, name="narrow")

    with interpreted():
        results = jax.jit(run)(wide, small, up, scale)
    side, steps = np.zeros((256, 40), np.float32), np.zeros((512, 40), np.float32)
    side[:, :24], side[:, 32:] = wide * scale[0], small
    steps[:256, :8], steps[384:, 8:24] = small, (up * scale[0]).T
    for (actual,), expected in zip(results, (side, steps), strict=True):
        expected = jnp.asarray(expected if is_long_first else expected.T, "bfloat16")
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("is_long_first", [True, False])
@pytest.mark.parametrize("terms", [2, 9])
def test_a_stack_is_added_up(terms: int, is_long_first: bool, dtype: str) -> None:
    """Some of its columns, behind a matrix of 16 bits that stands as it is."""
    stack, ready = _normal((terms, 256, 40)), _normal((256, 8)).astype("bfloat16")

    def run(stack, ready):
        parts = (
            Part(source=ready, is_long_first=True),
            Part(source=stack, is_long_first=True, columns=range(16, 40), column=8),
        )
        work = narrow_work(
            parts, length=256, width=32, is_long_first=is_long_first, dtype=dtype
        )
        return joint_launch((work,), name="narrow")

    with interpreted():
        ((actual,),) = jax.jit(run)(stack, ready)
    added = np.asarray(stack, np.float64)[..., 16:].sum(axis=0)
    expected = np.concatenate([np.asarray(ready, np.float64), added], axis=1)
    actual = actual if is_long_first else actual.T
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < tolerance(dtype)
    np.testing.assert_array_equal(actual[:, :8], ready.astype(dtype))
