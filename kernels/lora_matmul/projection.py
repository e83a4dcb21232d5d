"""Projection: a frozen weight and what is trained beside it, as a pytree."""

import functools
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from kernels.line import NUMBERS_A_LINE
from kernels.packed import PackedArray


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "bias", "lora_a", "lora_b", "scaling", "magnitude"],
    meta_fields=[],
)
@no_type_check  # JAX rebuilds pytrees with leaves that are no arrays
@dataclass(frozen=True)
class Projection:
    """The parts of `y = (x @ weight + scaling * (x @ lora_a) @ lora_b) + bias`.

    Attributes:
      weight: Frozen; never gets a gradient.
      bias: Added last.
      lora_a: Down projection; None without an adapter.
      lora_b: Up projection; None without an adapter.
      scaling: alpha / R, or alpha / sqrt(R) for rsLoRA (arxiv.org/abs/2312.03732), or
        a line of it; not differentiated.
      magnitude: Length of each output's column, for DoRA (arxiv.org/abs/2402.09353).
    """

    weight: Float[Array, "I O"] | PackedArray
    bias: Float[Array, " O"] | None = None
    lora_a: Float[Array, "I R"] | None = None
    lora_b: Float[Array, "R O"] | None = None
    scaling: Float32[Array, " line"] | Float32[Array, ""] | float | None = None
    magnitude: Float[Array, " O"] | None = None

    @property
    def has_adapter(self) -> bool:
        """Whether there is a low-rank branch."""
        return self.lora_a is not None

    @property
    def scale(self) -> Float32[Array, ""]:
        """`scaling` as a float32 array."""
        return self.scale_line[0]

    @property
    def scale_line(self) -> Float32[Array, " line"]:
        """A line of `scaling`."""
        assert self.scaling is not None
        return jnp.broadcast_to(
            jnp.asarray(self.scaling, jnp.float32), (NUMBERS_A_LINE,)
        )
