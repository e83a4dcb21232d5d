"""The forward and the backward pass, with as few passes over memory as XLA allows."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from kernels.packed import PackedArray, dense

from .dora import column_norm
from .dropout import dropped, kept_scale
from .products import product, sum_of_products
from .projection import Projection

RESIDUAL_NAMES = ("lora_xa",)

Projections = tuple[Projection, ...]
Keys = tuple[PRNGKeyArray | None, ...]
Added = tuple[jax.Array, ...]
"""What is added to the outputs: nothing, or (M, O) to the only one."""


class Residuals(NamedTuple):
    """What the backward pass reads.

    Attributes:
      x: (M, I).
      projections: As given, weights packed.
      keys: Of dropout.
      xa: `scaling * drop(x) @ a` of each adapter, (M, R) in the dtype of `x`; the
        scale of dropout is in it.
      norms: DoRA's column lengths, (O,) in float32.
    """

    x: jax.Array
    projections: Projections
    keys: Keys
    xa: tuple[jax.Array | None, ...]
    norms: tuple[jax.Array | None, ...]


def forward(
    dropout_rate: float,
    x: jax.Array,
    projections: Projections,
    keys: Keys,
    added: Added,
) -> tuple[tuple[jax.Array, ...], Residuals]:
    """Returns the product of each projection, and what its gradient needs."""
    xa = scaled_down_products(dropout_rate, x, projections, keys)
    is_joined = _forward_is_joined(x, projections)
    outputs, norms = [], []
    for index, projection in enumerate(projections):
        weight = dense(projection.weight, x.dtype)
        norm = _norm(projection, weight)
        # What follows the product in float32 takes it unrounded.
        is_last = norm is None and projection.bias is None
        dtype = x.dtype if is_last else jnp.dtype(jnp.float32)
        y = _linear(x, weight, xa, projections, index, is_joined, dtype)
        outputs.append(epilogue(y, projection, norm, x.dtype))
        norms.append(norm)
    # XLA adds to a product inside of it.
    outputs[: len(added)] = map(jnp.add, outputs, added)
    return tuple(outputs), Residuals(x, projections, keys, xa, tuple(norms))


def scaled_down_products(
    dropout_rate: float, x: jax.Array, projections: Projections, keys: Keys
) -> tuple[jax.Array | None, ...]:
    """Returns `scaling * drop(x) @ a` of each adapter."""
    adapted = [i for i, p in enumerate(projections) if p.has_adapter]
    products: list[jax.Array | None] = [None] * len(projections)
    if all(keys[i] is None for i in adapted) and adapted:
        # One reading of x for all of them.
        downs = [_down(projections[i], x.dtype) for i in adapted]
        joined = product(x, jnp.concatenate(downs, axis=1), jnp.float32)
        parts = _split(joined, [a.shape[1] for a in downs])
    else:
        parts = [
            product(
                dropped(x, keys[i], dropout_rate),
                _down(projections[i], x.dtype),
                jnp.float32,
            )
            for i in adapted
        ]
    for i, part in zip(adapted, parts, strict=True):
        scale = _branch_scale(projections[i], keys[i], dropout_rate)
        scaled = (scale * part).astype(x.dtype)
        products[i] = checkpoint_name(scaled, RESIDUAL_NAMES[0])
    return tuple(products)


def _linear(
    x: jax.Array,
    weight: jax.Array,
    xa: tuple[jax.Array | None, ...],
    projections: Projections,
    index: int,
    is_joined: bool,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Returns `x @ weight + xa @ b` for one projection of the group.

    Joined, all projections read the same `[x | xa_0 | xa_1 ...]`, and the rows of their
    matrix that stand for other projections are zero.
    """
    own = xa[index]
    if own is None:
        return product(x, weight, dtype)
    weight_up = up(projections[index], x.dtype)
    if not is_joined:
        return sum_of_products(
            (x, own), (weight, weight_up), is_joined=False, dtype=dtype
        )
    ranks = [0 if part is None else part.shape[1] for part in xa]
    before, after = sum(ranks[:index]), sum(ranks[index + 1 :])
    rows = jnp.pad(weight_up, ((before, after), (0, 0)))
    shared = jnp.concatenate([part for part in xa if part is not None], axis=1)
    return sum_of_products((x, shared), (weight, rows), is_joined=True, dtype=dtype)


def backward(
    dropout_rate: float, residuals: Residuals, douts: tuple[jax.Array, ...]
) -> tuple[jax.Array, Projections]:
    """Returns the cotangents of `x` and of all that is trained."""
    x, projections, keys, xa, norms = residuals
    weights = [dense(p.weight, x.dtype) for p in projections]
    dbias = [
        bias_gradient(dout, p.bias) for dout, p in zip(douts, projections, strict=True)
    ]
    dmagnitude: list[jax.Array | None] = [None] * len(projections)
    dys = list(douts)  # cotangents of x @ weight + xa @ b
    for i, norm in enumerate(norms):
        if norm is not None:
            y = _linear(x, weights[i], xa, projections, i, False, jnp.float32)
            dmagnitude[i] = _magnitude_gradient(projections[i], norm, y, douts[i])
            scaled = douts[i].astype(jnp.float32) * _column_scale(projections[i], norm)
            dys[i] = scaled.astype(x.dtype)
    dxa = [
        _scaled_up_product(dy, p, _branch_scale(p, key, dropout_rate))
        if p.has_adapter
        else None
        for dy, p, key in zip(dys, projections, keys, strict=True)
    ]
    da = _down_gradients(dropout_rate, x, dxa, projections, keys)
    gradients = tuple(
        dataclasses.replace(
            projection,
            weight=None,
            bias=dbias[i],
            lora_a=da[i],
            lora_b=_up_gradient(xa[i], dys[i], projection),
            scaling=None,
            magnitude=dmagnitude[i],
        )
        for i, projection in enumerate(projections)
    )
    dx = _input_gradient(dropout_rate, dys, dxa, weights, projections, keys)
    return dx, gradients


def _input_gradient(
    dropout_rate: float,
    dys: list[jax.Array],
    dxa: list[jax.Array | None],
    weights: list[jax.Array],
    projections: Projections,
    keys: Keys,
) -> jax.Array:
    """Returns the sum over projections of `dy @ weight^T + dropped(dxa @ a^T)`."""
    lhs, rhs = list(dys), [weight.T for weight in weights]
    separate = []
    for part, projection, key in zip(dxa, projections, keys, strict=True):
        if part is None:
            continue
        up = _down(projection, part.dtype).T
        if key is None:
            lhs.append(part)
            rhs.append(up)
        else:
            separate.append(dropped(product(part, up), key, dropout_rate))
    rows, columns = dys[0].shape[0], weights[0].shape[0]
    copied = sum(w.size for w in _copied_weights(projections))
    is_joined = _joining_moves_less(
        rows, sum(part.shape[1] for part in lhs), columns * (len(lhs) - 1), copied
    )
    return sum(separate, sum_of_products(lhs, rhs, is_joined=is_joined))


def _down_gradients(
    dropout_rate: float,
    x: jax.Array,
    dxa: list[jax.Array | None],
    projections: Projections,
    keys: Keys,
) -> list[jax.Array | None]:
    """Returns `dropped(x)^T @ dxa` of each adapter."""
    gradients: list[jax.Array | None] = [None] * len(projections)
    parts = [(i, part) for i, part in enumerate(dxa) if part is not None]
    if all(keys[i] is None for i, _ in parts) and parts:
        joined = product(
            x.T, jnp.concatenate([part for _, part in parts], axis=1), jnp.float32
        )
        products = _split(joined, [part.shape[1] for _, part in parts])
    else:
        products = [
            product(dropped(x, keys[i], dropout_rate).T, part, jnp.float32)
            for i, part in parts
        ]
    for (i, _), gradient in zip(parts, products, strict=True):
        gradients[i] = gradient.astype(_present(projections[i].lora_a).dtype)
    return gradients


def _up_gradient(
    xa: jax.Array | None, dy: jax.Array, projection: Projection
) -> jax.Array | None:
    if xa is None:
        return None
    gradient = product(xa.T, dy, jnp.float32)
    return gradient.astype(_present(projection.lora_b).dtype)


def _scaled_up_product(
    dy: jax.Array, projection: Projection, scale: Float32[Array, ""]
) -> jax.Array:
    """Returns `scale * dy @ b^T`, the cotangent of `dropped(x) @ a`."""
    upstream = product(dy, up(projection, dy.dtype).T, jnp.float32)
    return (scale * upstream).astype(dy.dtype)


def _branch_scale(
    projection: Projection, key: PRNGKeyArray | None, dropout_rate: float
) -> Float32[Array, ""]:
    """Returns the factor of `dropped(x) @ a @ b`, that of dropout included."""
    return projection.scale * kept_scale(key, dropout_rate)


def epilogue(
    y: Float[Array, "M O"],
    projection: Projection,
    norm: Float32[Array, " O"] | None,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "M O"]:
    """Applies DoRA's scale and the bias in float32, then rounds to `dtype`."""
    result = y.astype(jnp.float32)
    if norm is not None:
        result = result * _column_scale(projection, norm)
    if projection.bias is not None:
        result = result + projection.bias.astype(jnp.float32)[None]
    return result.astype(dtype)


def _norm(projection: Projection, weight: jax.Array) -> Float32[Array, " O"] | None:
    if projection.magnitude is None:
        return None
    a, b = _present(projection.lora_a), _present(projection.lora_b)
    return column_norm(
        weight, a.astype(jnp.float32), b.astype(jnp.float32), projection.scale
    )


def _column_scale(projection: Projection, norm: jax.Array) -> Float32[Array, "1 O"]:
    return (_present(projection.magnitude).astype(jnp.float32) / norm)[None]


def _magnitude_gradient(
    projection: Projection, norm: jax.Array, y: jax.Array, dout: jax.Array
) -> jax.Array:
    gradient = jnp.sum(dout.astype(jnp.float32) * y, axis=0) / norm
    return gradient.astype(_present(projection.magnitude).dtype)


def bias_gradient(dout: jax.Array, bias: jax.Array | None) -> jax.Array | None:
    """Returns the sum of the cotangents over rows, in the dtype of the bias."""
    if bias is None:
        return None
    return jnp.sum(dout.astype(jnp.float32), axis=0).astype(bias.dtype)


def _forward_is_joined(x: jax.Array, projections: Projections) -> bool:
    adapted = tuple(p for p in projections if p.has_adapter)
    ranks = sum(_present(p.lora_a).shape[1] for p in adapted)
    columns = sum(_present(p.lora_b).shape[1] for p in adapted)
    copied = sum(weight.size for weight in _copied_weights(adapted))
    return _joining_moves_less(x.shape[0], x.shape[1] + ranks, columns, copied)


def _joining_moves_less(rows: int, joined: int, added: int, copied: int) -> bool:
    """Whether copying `joined` columns costs less than adding `added` to a result."""
    return rows * joined + copied < rows * added


def _copied_weights(projections: Projections) -> list[jax.Array]:
    """Weights that joining would copy; a packed one is written anew in any case."""
    return [p.weight for p in projections if not isinstance(p.weight, PackedArray)]


def _down(projection: Projection, dtype: jax.typing.DTypeLike) -> jax.Array:
    return _present(projection.lora_a).astype(dtype)


def up(projection: Projection, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns `lora_b`, of (R, O), in a dtype."""
    return _present(projection.lora_b).astype(dtype)


def _present(array: jax.Array | None) -> jax.Array:
    assert array is not None
    return array


def _split(joined: jax.Array, widths: list[int]) -> list[jax.Array]:
    borders = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    return jnp.split(joined, borders, axis=1)
