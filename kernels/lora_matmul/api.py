"""The public LoRA products: types, checks, dispatch."""

import functools

import jax
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from kernels import dispatch
from kernels.choice import fastest_first
from kernels.packed import PackedArray

from . import reference, vjp
from .projection import Projection

_IMPLEMENTATIONS = {
    "mosaic_gpu": functools.partial(vjp.lora_matmul_group, vjp.MOSAIC_GPU),
    "xla": functools.partial(vjp.lora_matmul_group, vjp.XLA),
    "reference": reference.lora_matmul_group,
}


def lora_matmul(
    x: Float[Array, "*B I"],
    w: Float[Array, "I O"] | PackedArray,
    a: Float[Array, "I R"] | None,
    b: Float[Array, "R O"] | None,
    *,
    scaling: Float32[Array, ""] | float | None,
    bias: Float[Array, " O"] | None = None,
    magnitude: Float[Array, " O"] | None = None,
    residual: Float[Array, "*B O"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    implementation: str | None = None,
) -> Float[Array, "*B O"]:
    """Returns `x @ w + scaling * (drop(x) @ a) @ b + bias + residual`.

    One projection of `lora_matmul_group`, where dtypes and gradients are described.

    Args:
      x: Activations.
      w: Frozen weight, packed or dense.
      a: Down projection; None without an adapter.
      b: Up projection; None without an adapter.
      scaling: alpha / R, or alpha / sqrt(R) for rsLoRA (arxiv.org/abs/2312.03732), as
        a number or in float32; not differentiated. None only without an adapter.
      bias: None adds nothing.
      magnitude: Length of each output's column, for DoRA; None leaves it.
      residual: Of the dtype of `x`; None adds nothing.
      dropout_rate: Fraction of `x` that the adapter branch does not see.
      dropout_key: Of its mask; None drops nothing, as in evaluation.
      implementation: As in `lora_matmul_group`.

    Raises:
      ValueError: Sizes disagree, an adapter is incomplete, the rate is not in [0, 1).
      UnsupportedOp: The named implementation cannot run this case here.
    """
    projection = Projection(w, bias, a, b, scaling, magnitude)
    (y,) = lora_matmul_group(
        x,
        (projection,),
        residual=residual,
        dropout_rate=dropout_rate,
        dropout_keys=(dropout_key,),
        implementation=implementation,
    )
    return y


def lora_matmul_group(
    x: Float[Array, "*B I"],
    projections: tuple[Projection, ...],
    *,
    residual: Float[Array, "*B _"] | None = None,
    dropout_rate: float = 0.0,
    dropout_keys: tuple[PRNGKeyArray | None, ...] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*B _"], ...]:
    """Returns `x @ w + scaling * (drop(x) @ a) @ b + bias + residual` of each one.

    LoRA, arxiv.org/abs/2106.09685. With a magnitude (DoRA, arxiv.org/abs/2402.09353)
    the first two terms are multiplied by magnitude / |w + scaling * a @ b|, the length
    of each column, which counts as a constant in the gradient.

    Products accumulate in float32; results have the dtype of `x`, to which weights and
    adapters are cast. Frozen weights get no gradient and no float copy of them is kept
    for the backward pass. Gradients of adapters and biases accumulate in float32 and
    have the dtype of what they belong to.

    Args:
      x: Activations that all projections read: for q, k and v, or for gate and up.
      projections: Weights of (I, O) with what is trained beside them.
      residual: Added to the result of the only projection, whose shape it has, and the
        dtype of `x`; None adds nothing.
      dropout_rate: Fraction of `x` that the adapter branch does not see, to the
        nearest 1/65536.
      dropout_keys: One for each projection, its mask; None drops nothing, as in
        evaluation.
      implementation: "mosaic_gpu" (16 bits, without dropout and DoRA), "xla" or
        "reference": that one runs or fails; None takes the fastest able.

    Raises:
      ValueError: Sizes disagree, an adapter is incomplete, the rate is not in [0, 1),
        keys are not one a projection, or a residual is beside several projections.
      UnsupportedOp: The named implementation cannot run this case here.
    """
    keys = dropout_keys if dropout_keys is not None else (None,) * len(projections)
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"{dropout_rate=} must be at least 0 and below 1")
    if len(keys) != len(projections):
        raise ValueError(f"{len(projections)} projections, {len(keys)} dropout keys")
    for projection in projections:
        check_projection(x.shape[-1], projection)
    if dropout_rate == 0:
        keys = (None,) * len(projections)
    rows = x.reshape(-1, x.shape[-1])
    if residual is not None:
        check_residual(x, projections, residual)
        residual = residual.reshape(-1, residual.shape[-1])
    case = {
        "rows": rows.shape[0],
        "inputs": rows.shape[1],
        "outputs": sum(projection.weight.shape[1] for projection in projections),
    }
    results = dispatch.run(
        "lora_matmul",
        fastest_first("lora_matmul", case, _IMPLEMENTATIONS),
        implementation,
        dropout_rate,
        rows,
        projections,
        keys,
        residual,
    )
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in results)


def check_residual(
    x: jax.Array, projections: tuple[Projection, ...], residual: jax.Array
) -> None:
    """Raises `ValueError` where a residual is not like the only result."""
    expected = (*x.shape[:-1], projections[0].weight.shape[1])
    if len(projections) != 1 or (residual.shape, residual.dtype) != (expected, x.dtype):
        raise ValueError(
            f"a residual must be like the result of one projection, {expected} of "
            f"{x.dtype}; there are {len(projections)}, and it is {jax.typeof(residual)}"
        )


def check_projection(features: int, projection: Projection) -> None:
    """Raises `ValueError` where the parts do not fit each other or so many features."""
    inputs, outputs = projection.weight.shape
    if features != inputs:
        raise ValueError(f"x has {features} features, the weight {inputs} inputs")
    a, b = projection.lora_a, projection.lora_b
    if (a is None) != (b is None) or (a is not None and projection.scaling is None):
        raise ValueError("an adapter needs lora_a, lora_b and scaling")
    if projection.magnitude is not None and a is None:
        raise ValueError("a magnitude (DoRA) needs lora_a and lora_b")
    rank = 0 if a is None else a.shape[-1]
    expected = {
        "lora_a": (inputs, rank),
        "lora_b": (rank, outputs),
        "bias": (outputs,),
        "magnitude": (outputs,),
    }
    for name, shape in expected.items():
        array: jax.Array | None = getattr(projection, name)
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
