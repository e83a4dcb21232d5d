"""Gated linear units (arxiv.org/abs/2002.05202): the unit alone, and the network."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from kernels import dispatch
from kernels.choice import fastest_first
from kernels.dispatch import UnsupportedOp
from kernels.lora_matmul import Projection, check_projection, check_residual

from . import composed, fused, reference, vjp

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
"""Known activations, by Hugging Face's names."""


def _no_unit_alone(*_: Any, **__: Any) -> Array:
    raise UnsupportedOp(
        "the kernels of gated_mlp take networks of frozen weights, no unit alone"
    )


_COMPOSED_OF = {"xla": vjp.gated_activation, "reference": reference.gated_activation}
_UNITS = {**_COMPOSED_OF, "mosaic_gpu": _no_unit_alone}


def gated_activation(
    gate: Float[Array, "*B F"],
    up: Float[Array, "*B F"],
    *,
    activation: str,
    implementation: str | None = None,
) -> Float[Array, "*B F"]:
    """Returns `act(gate) * up`.

    Computes in float32, returns the dtype of the inputs.

    Args:
      gate: Output of the gate projection.
      up: Output of the up projection.
      activation: "silu" (SwiGLU) or "gelu_pytorch_tanh" (GeGLU, tanh form).
      implementation: "xla" or "reference"; None takes the first able.

    Raises:
      ValueError: Unknown activation, or shapes or dtypes disagree.
      UnsupportedOp: "mosaic_gpu" is named, which has kernels for `gated_mlp` alone.
    """
    _check(activation)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        types = f"{jax.typeof(gate)}, {jax.typeof(up)}"
        raise ValueError(f"gate and up must be alike: {types}")
    return dispatch.run(
        "gated_mlp", _UNITS, implementation, gate, up, activation=activation
    )


def gated_mlp(
    x: Float[Array, "*B D"],
    gate_up: tuple[Projection, ...],
    down: Projection,
    *,
    activation: str,
    residual: Float[Array, "*B D"] | None = None,
    dropout_rate: float = 0.0,
    dropout_keys: tuple[PRNGKeyArray | None, ...] | None = None,
    implementation: str | None = None,
    product_implementation: str | None = None,
) -> Float[Array, "*B D"]:
    """Returns `down(act(gate(x)) * up(x)) + residual`.

    Each projection as in `lora_matmul_group`, the unit as in `gated_activation`: gate,
    up and their unit are rounded to the dtype of `x`.

    Args:
      x: Normalised hidden states.
      gate_up: The projections to F features, or one to 2 F, the gate's first.
      down: The projection back.
      activation: "silu" (SwiGLU) or "gelu_pytorch_tanh" (GeGLU, tanh form).
      residual: Like `x`; None adds nothing.
      dropout_rate: Of the adapters' inputs.
      dropout_keys: One for each of `gate_up` and one for `down`; None drops nothing.
      implementation: "mosaic_gpu" makes adapters' products with the unit and with its
        gradient, "xla" and "reference" beside them; None takes the fastest able.
      product_implementation: Of the products, as in `lora_matmul`.

    Raises:
      ValueError: Unknown activation, widths disagree, or what `lora_matmul_group`
        raises.
      UnsupportedOp: A named implementation cannot run this case here.
    """
    _check(activation)
    _check_network(x, gate_up, down)
    rows = x.reshape(-1, x.shape[-1])
    if residual is not None:
        check_residual(x, (down,), residual)
        residual = residual.reshape(rows.shape)
    inputs, outputs = rows.shape[1], down.weight.shape[0]
    case = {"rows": rows.shape[0], "inputs": inputs, "outputs": outputs}
    implementations = {"mosaic_gpu": fused.gated_mlp} | {
        name: functools.partial(composed.gated_mlp, unit)
        for name, unit in _COMPOSED_OF.items()
    }
    result = dispatch.run(
        "gated_mlp",
        fastest_first("gated_mlp", case, implementations),
        implementation,
        rows,
        gate_up,
        down,
        activation=activation,
        residual=residual,
        dropout_rate=dropout_rate,
        dropout_keys=dropout_keys or (None,) * (len(gate_up) + 1),
        product_implementation=product_implementation,
    )
    return result.reshape(x.shape)


def _check(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{activation=} must be one of {', '.join(ACTIVATIONS)}")


def _check_network(
    x: jax.Array, gate_up: tuple[Projection, ...], down: Projection
) -> None:
    for projection in gate_up:
        check_projection(x.shape[-1], projection)
    widths = [projection.weight.shape[1] for projection in gate_up]
    is_merged = len(widths) == 1 and widths[0] % 2 == 0
    if not is_merged and (len(widths) != 2 or widths[0] != widths[1]):
        raise ValueError(
            f"gate and up must be two projections to the same number of features, or "
            f"one to twice as many; they have {widths}"
        )
    check_projection(sum(widths) // 2, down)
    if down.weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"x has {x.shape[-1]} features, down {down.weight.shape[1]} outputs"
        )
