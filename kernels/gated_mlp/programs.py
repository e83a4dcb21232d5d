"""The gated activation, beside narrow products too, and the network at real shapes."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels.device import multiprocessors, require_hopper
from kernels.line import as_lines
from kernels.lora_matmul import Projection
from kernels.lora_matmul.low_rank_cotangents import low_rank_cotangents
from kernels.lora_matmul.skinny import low_rank_gradient
from kernels.nf4 import quantize
from kernels.program import Program, moved_bytes

from . import reference, unit_product, vjp
from .api import gated_activation, gated_mlp
from .cases import GPU_CASES, GPU_NETWORKS, NetworkCase
from .unit_cotangents import KERNEL_NAME, UnitCotangents, unit_cotangents

_WEIGHT_DEVIATION = 0.02


def programs() -> tuple[Program, ...]:
    """Returns every program of the op."""
    of_networks = (
        run(case) for case in GPU_NETWORKS for run in (_product, _cotangents, _network)
    )
    return (*_activations(), *of_networks)


def _activations() -> tuple[Program, ...]:
    return tuple(
        Program(
            name=f"gated_mlp.{what}/{case.name}",
            run=functools.partial(run, case.activation),
            arguments=functools.partial(_normals, *[case.shape] * inputs),
            bytes_moved=arrays * 2 * math.prod(case.shape),
            implementations=("xla",),
        )
        for case in GPU_CASES
        for what, run, inputs, arrays in (
            ("forward", _forward, 2, 3),
            ("backward", _backward, 3, 5),
        )
    )


def _normals(*shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    )


def _forward(
    activation: str, gate: jax.Array, up: jax.Array, *, implementation: str
) -> jax.Array:
    return gated_activation(
        gate, up, activation=activation, implementation=implementation
    )


def _backward(
    activation: str,
    gate: jax.Array,
    up: jax.Array,
    dout: jax.Array,
    *,
    implementation: str,
) -> Any:
    run = functools.partial(_forward, activation, implementation=implementation)
    return jax.vjp(run, gate, up)[1](dout)


def _product(case: NetworkCase) -> Program:
    """Returns the unit with the product of the last adapter."""
    wide, down = (case.rows, case.features), (case.ranks[-1], case.features)
    arguments = functools.partial(_normals, wide, wide, down)
    run = functools.partial(_unit_product, case.activation)
    return Program(
        name=f"gated_mlp.unit_product/{case.name}",
        run=run,
        arguments=arguments,
        bytes_moved=moved_bytes(run, arguments),
        kernels=(unit_product.KERNEL_NAME,),
    )


def _unit_product(
    activation: str,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    implementation: str,
) -> tuple[jax.Array, jax.Array]:
    if implementation == "mosaic_gpu":
        require_hopper()
        return unit_product.gated_unit_product(
            gate, up, down, activation=activation, blocks=multiprocessors()
        )
    h = reference.gated_activation(gate, up, activation=activation)
    return h, jnp.dot(h, down.T)


def _cotangents(case: NetworkCase) -> Program:
    """Returns the gradient of the unit with the narrow products of it."""
    ups = sum(case.ranks[:2]), case.features
    narrow = sum(case.ranks), case.rows
    wide = [(case.rows, case.features)] * 3
    arguments = functools.partial(_normals, *wide, ups, narrow)
    run = functools.partial(_unit_cotangents, case)
    return Program(
        name=f"gated_mlp.unit_cotangents/{case.name}",
        run=run,
        arguments=arguments,
        bytes_moved=moved_bytes(run, arguments),
        kernels=(KERNEL_NAME,),
        implementations=("mosaic_gpu", "separate", "xla"),
    )


def _unit_cotangents(
    case: NetworkCase,
    gate: jax.Array,
    up: jax.Array,
    dout: jax.Array,
    ups: jax.Array,
    narrow: jax.Array,
    *,
    implementation: str,
) -> UnitCotangents:
    """Does as `unit_cotangents` and adds its parts up.

    "separate" has a loop or a kernel for each product.
    """
    gate_rank, up_rank, rank = case.ranks
    if implementation != "xla":
        require_hopper()
    if implementation == "mosaic_gpu":
        made = unit_cotangents(
            gate,
            up,
            dout,
            ups,
            narrow,
            ranks=(gate_rank, up_rank, rank),
            activation=case.activation,
            blocks=multiprocessors(),
        )
        return made._replace(dxa=_added(made.dxa, gate.dtype), sums=_added(made.sums))
    unit = functools.partial(vjp.gated_activation, activation=case.activation)
    out, pullback = jax.vjp(unit, gate, up)
    dgate, dup = pullback(dout)
    *xas, dxa = jnp.split(narrow.T, [gate_rank, gate_rank + up_rank], axis=1)
    own_ups = jnp.split(ups, [gate_rank])
    if implementation == "separate":
        blocks = multiprocessors()
        parts, db = low_rank_cotangents(
            (dgate, dup),
            [own.astype(jnp.float32) for own in own_ups],
            [as_lines(1)] * 2,
            narrow.T,
            starts=(0, gate_rank),
            blocks=blocks,
        )
        parts = [_added(part, gate.dtype) for part in parts]
        db = map(_added, db)
        da = low_rank_gradient(out, dxa, blocks=blocks)
    else:
        parts = [jnp.dot(dgate, own_ups[0].T), jnp.dot(dup, own_ups[1].T)]
        db = map(_transposed_product, (dgate, dup), xas)
        da = _transposed_product(out, dxa)
    joined = jnp.concatenate(parts, axis=1), jnp.concatenate([*db, da], axis=1)
    return UnitCotangents(dgate, dup, *joined)


def _added(parts: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.sum(parts, axis=0).astype(dtype)


def _transposed_product(x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.dot(x.T, t, preferred_element_type=jnp.float32)


def _network(case: NetworkCase) -> Program:
    """Returns the forward and the backward pass."""
    arguments = functools.partial(_network_arguments, case)
    run = functools.partial(_network_gradients, case.activation)
    sizes = {"rows": case.rows, "inputs": case.inputs, "outputs": case.features}
    return Program(
        name=f"gated_mlp.network/{case.name}",
        run=run,
        arguments=arguments,
        bytes_moved=moved_bytes(run, arguments),
        flops=12 * math.prod(sizes.values()),
        kernels=(KERNEL_NAME, unit_product.KERNEL_NAME),
        decides=("gated_mlp", sizes),
    )


def _network_arguments(case: NetworkCase) -> tuple[Any, ...]:
    """Returns x, its residual, the projections and the cotangent of the result."""
    keys = iter(jax.random.split(jax.random.key(0), 12))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    def projection(inputs: int, outputs: int, rank: int) -> Projection:
        a, b = normal(inputs, rank), normal(rank, outputs)
        return Projection(
            quantize(normal(inputs, outputs) * _WEIGHT_DEVIATION),
            lora_a=a.astype(jnp.float32) * _WEIGHT_DEVIATION,
            lora_b=b.astype(jnp.float32) * _WEIGHT_DEVIATION,
            scaling=as_lines(1),
        )

    inner = [projection(case.inputs, case.features, rank) for rank in case.ranks[:2]]
    down = projection(case.features, case.inputs, case.ranks[2])
    x, residual, dout = (normal(case.rows, case.inputs) for _ in range(3))
    return x, residual if case.has_residual else None, (*inner, down), dout


def _network_gradients(
    activation: str,
    x: jax.Array,
    residual: jax.Array | None,
    projections: tuple[Projection, ...],
    dout: jax.Array,
    *,
    implementation: str,
) -> Any:
    """Returns the result and the cotangents of x and of what is trained."""

    def run(x: jax.Array, trained: Any) -> jax.Array:
        adapted = [
            Projection(p.weight, scaling=p.scaling, **own)
            for p, own in zip(projections, trained, strict=True)
        ]
        return gated_mlp(
            x,
            tuple(adapted[:2]),
            adapted[2],
            activation=activation,
            residual=residual,
            implementation=implementation,
        )

    trained = [{"lora_a": p.lora_a, "lora_b": p.lora_b} for p in projections]
    y, pullback = jax.vjp(run, x, trained)
    return y, *pullback(dout)
