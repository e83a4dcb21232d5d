"""Adam, arxiv.org/abs/1412.6980, with the 8-bit states of arxiv.org/abs/2110.02861."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from kernels import dispatch
from kernels.choice import fastest_first

from . import mosaic_gpu, reference, xla
from .blocks import BLOCK_SIZE, Blocks, in_blocks, out_of_blocks

_IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.adam8bit,
    "xla": xla.adam8bit,
    "reference": reference.adam8bit,
}


def adam8bit(
    gradient: Float32[Array, "*S"],
    mu: Blocks,
    nu: Blocks,
    step: Int32[Array, ""],
    *,
    b1: float,
    b2: float,
    eps: float,
    implementation: str | None = None,
) -> tuple[Float32[Array, "*S"], Blocks, Blocks]:
    """Returns the direction `mû / (sqrt(nû) + eps)` and the new moments.

    `mu` becomes `b1 mu + (1 - b1) g` and `nu` becomes `b2 nu + (1 - b2) g²`; mû and nû
    are these over `1 - b1**step` and `1 - b2**step`. The moments are read and updated
    in float32, the direction is taken from them, and then they are rounded to 8 bits:
    blocks of 256, dynamic maps, signed for the first moment and unsigned for the
    second, as bitsandbytes does.

    Args:
      gradient: Of any shape.
      mu: First moment, from `Blocks.zeros` or the step before.
      nu: Second moment.
      step: Steps with this one, so from 1: the moments started at zero.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      implementation: "mosaic_gpu", "xla" or "reference"; None takes the fastest able.

    Raises:
      ValueError: The moments are not of the gradient's size.
      UnsupportedOp: The named implementation cannot run this size here.
    """
    blocks = -(-gradient.size // BLOCK_SIZE)
    for name, moment in (("mu", mu), ("nu", nu)):
        if moment.codes.shape[0] != blocks:
            raise ValueError(
                f"{name} has {moment.codes.shape[0]} blocks, {gradient.shape=} {blocks}"
            )
    count = step.astype(jnp.float32)
    # 1 - b ** count, without the loss of digits where b is near 1.
    shares = [-jnp.expm1(count * math.log(b)) if b else 1.0 for b in (b1, b2)]
    corrections = jnp.stack([1 / shares[0], 1 / jnp.sqrt(shares[1])])
    direction, mu, nu = dispatch.run(
        "adam8bit",
        fastest_first("adam8bit", {"elements": gradient.size}, _IMPLEMENTATIONS),
        implementation,
        in_blocks(gradient),
        mu,
        nu,
        corrections.astype(jnp.float32),
        b1=b1,
        b2=b2,
        eps=eps,
    )
    return out_of_blocks(direction, gradient.shape), mu, nu
