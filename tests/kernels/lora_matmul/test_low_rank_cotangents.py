"""The low-rank products that read several matrices in one launch."""

import jax
import jax.numpy as jnp

from kernels.interpret import interpreted
from kernels.line import as_lines
from kernels.lora_matmul.low_rank_cotangents import low_rank_cotangents
from kernels.numerics import relative_error, tolerance


def test_cotangents_of_a_group_are_those_of_its_members() -> None:
    """The second one's columns of `xa` lie across the border of a line of 64."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    douts = [jax.random.normal(next(keys), (128, n), "bfloat16") for n in (256, 128)]
    ups = [jax.random.normal(next(keys), (24, dout.shape[1])) for dout in douts]
    xa = jax.random.normal(next(keys), (128, 72), "bfloat16")
    scales, starts = (0.5, 2.0), (0, 48)
    with interpreted():
        dxa, db = low_rank_cotangents(
            douts, ups, [*map(as_lines, scales)], xa, starts=starts, blocks=4
        )
    for i, (dout, up) in enumerate(zip(douts, ups, strict=True)):
        own = xa[:, starts[i] : starts[i] + 24].astype(jnp.float32)
        wide = dout.astype(jnp.float32)
        limit = tolerance("bfloat16")
        assert relative_error(dxa[i].sum(axis=0), wide @ (scales[i] * up).T) < limit
        assert relative_error(db[i].sum(axis=0), wide.T @ own) < tolerance("float32")
