"""Whether every op computes right on this device: a small tile against the reference.

The reference runs in float32 on the same device. Forward and gradients count.
"""

import contextvars
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .adam8bit import Blocks, adam8bit
from .attention import attention
from .cross_entropy import linear_cross_entropy
from .dispatch import UnknownImplementation, UnsupportedOp, record
from .gated_mlp import gated_mlp
from .lora_matmul import Projection, lora_matmul
from .nf4 import dequantize, quantize
from .numerics import relative_error, tolerance
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope, rotary_tables

IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_gpu_cudnn", "cudnn", "xla")
"""All that an op may have beside "reference"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpCheck:
    """What one implementation of an op gave on the tile.

    Attributes:
      op: As the dispatch names it.
      implementation: That was named.
      error: Largest relative error of a result or gradient, in the Frobenius norm.
      bound: What rounding may cause.
      seconds: With compilation, beside the other checks.
    """

    op: str
    implementation: str
    error: float
    bound: float
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether the error stays within the bound; NaN does not."""
        return self.error <= self.bound


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    rows: int
    tokens: int
    features: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    head_size: int = 128
    rank: int = 16


_TILE = _Sizes(
    rows=1, tokens=256, features=1024, heads=8, kv_heads=2, inner=512, vocabulary=2048
)
_LLAMA3_8B = _Sizes(
    rows=2,
    tokens=4096,
    features=4096,
    heads=32,
    kv_heads=8,
    inner=14336,
    vocabulary=128256,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Op:
    """An op and its arguments.

    Attributes:
      call: Takes the operands and `implementation`.
      operands: Makes them; those of floats are differentiated.
      terms: Roundings in a row; 0 where every bit must be right.
      has_gradient: Whether anybody differentiates it.
    """

    name: str
    call: Callable[..., Any]
    operands: Callable[[_Sizes], tuple[Any, ...]]
    terms: int = 4
    has_gradient: bool = True


def chosen_for_llama3_8b() -> dict[str, str]:
    """Returns op to the implementation that runs it on this device by default.

    At 2 rows of 4,096 tokens of Llama-3-8B in bfloat16. Traces only: it takes neither
    memory nor time on the device.
    """
    chosen = {}
    for op in _OPS:
        with record() as names:
            operands = jax.eval_shape(functools.partial(op.operands, _LLAMA3_8B))
            jax.eval_shape(functools.partial(op.call, implementation=None), *operands)
        chosen[op.name] = ", ".join(sorted(names[op.name]))
    return chosen


def check_ops() -> Iterator[OpCheck]:
    """Yields a check of each implementation that can run here, of each op.

    They are compiled side by side, which is what takes the time.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:

        def start(run: Callable[..., Any], *arguments: Any) -> Future[Any]:
            # In the caller's context, which may assume a device or record choices.
            return pool.submit(contextvars.copy_context().run, run, *arguments)

        # What checks wait for comes first, so that none can block it.
        expected = {op.name: start(_expected, op) for op in _OPS}
        checks = [
            start(_check, op, name, expected[op.name])
            for op in _OPS
            for name in IMPLEMENTATIONS
        ]
        for check in checks:
            if (found := check.result()) is not None:
                yield found


def _expected(op: _Op) -> tuple[tuple[Any, ...], list[jax.Array]]:
    """Returns the operands of an op on the tile, and the reference's results."""
    operands = jax.jit(op.operands, static_argnums=0)(_TILE)
    return operands, _results(op, jax.jit(_in_float32)(operands), "reference")


def _check(
    op: _Op, name: str, prepared: Future[tuple[tuple[Any, ...], list[jax.Array]]]
) -> OpCheck | None:
    """Returns the check of one implementation; None if it cannot run here."""
    operands, expected = prepared.result()
    start = time.perf_counter()
    try:
        actual = _results(op, operands, name)
    except (UnsupportedOp, UnknownImplementation):
        return None
    # On the host: on a GPU each shape would be a few programs more to compile.
    errors = map(relative_error, map(np.asarray, actual), map(np.asarray, expected))
    return OpCheck(
        op=op.name,
        implementation=name,
        error=float(np.max(list(errors))),
        bound=tolerance(jnp.bfloat16, terms=op.terms) if op.terms else 0.0,
        seconds=time.perf_counter() - start,
    )


def _results(op: _Op, operands: tuple[Any, ...], name: str) -> list[jax.Array]:
    """Returns the results of an op, then the gradients of its operands."""

    def run(operands: tuple[Any, ...]) -> list[jax.Array]:
        is_float = [_is_float(operand) for operand in operands]
        floats = [o for o, wanted in zip(operands, is_float, strict=True) if wanted]

        def call(*floats: jax.Array) -> list[jax.Array]:
            left = iter(floats)
            pairs = zip(operands, is_float, strict=True)
            arguments = [next(left) if wanted else o for o, wanted in pairs]
            return jax.tree.leaves(op.call(*arguments, implementation=name))

        if not op.has_gradient:
            return call(*floats)
        results, pullback = jax.vjp(call, *floats)
        keys = jax.random.split(jax.random.key(1), len(results))
        douts = [
            jax.random.normal(key, y.shape, jnp.bfloat16).astype(y.dtype)
            for key, y in zip(keys, results, strict=True)
        ]
        return [*results, *pullback(douts)]

    return jax.jit(run)(operands)


def _is_float(operand: Any) -> bool:
    is_array = isinstance(operand, jax.Array)
    return is_array and jnp.issubdtype(operand.dtype, jnp.floating)


def _in_float32(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(o.astype(jnp.float32) if _is_float(o) else o for o in operands)


def _normal(index: int, *shape: int, scale: float = 1.0) -> jax.Array:
    values = jax.random.normal(jax.random.key(index), shape, jnp.float32)
    return (scale * values).astype(jnp.bfloat16)


def _attention_operands(s: _Sizes) -> tuple[jax.Array, ...]:
    q, k = (_normal(i, s.rows, s.tokens, n, s.head_size) for i, n in _heads(s))
    return q, k, _normal(2, s.rows, s.tokens, s.kv_heads, s.head_size)


def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, **options: Any
) -> list[jax.Array]:
    """Two packed documents, which must not see each other; by either backward pass."""
    first = jnp.arange(q.shape[1]) < 100
    ids = jnp.broadcast_to(jnp.where(first, 1, 2), q.shape[:2])
    options |= {"segment_ids": ids, "max_segments": 2}
    return [
        attention(q, k, v, keeps_dscores=keeps, **options) for keeps in (True, False)
    ]


def _heads(s: _Sizes) -> tuple[tuple[int, int], ...]:
    return (0, s.heads), (1, s.kv_heads)


def _rope_operands(s: _Sizes) -> tuple[jax.Array, ...]:
    q, k = (_normal(i, s.rows, s.tokens, n, s.head_size) for i, n in _heads(s))
    return q, k


def _rope(q: jax.Array, k: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    half = np.arange(0, q.shape[3], 2, dtype=np.float32) / q.shape[3]
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    tables = rotary_tables(positions, (10_000.0**-half).astype(np.float32))
    return rope(q, k, *tables, **options)


def _lora_operands(s: _Sizes) -> tuple[Any, ...]:
    return (
        _normal(0, s.rows * s.tokens, s.features),
        quantize(_normal(1, s.features, s.inner, scale=s.features**-0.5)),
        _normal(2, s.features, s.rank, scale=s.features**-0.5),
        _normal(3, s.rank, s.inner),
    )


def _lora(x: jax.Array, *projection: Any, **options: Any) -> list[jax.Array]:
    """Many rows, and as few as decoding has."""
    options |= {"scaling": 1.0}
    return [lora_matmul(rows, *projection, **options) for rows in (x, x[:8])]


def _network_operands(s: _Sizes) -> tuple[Any, ...]:
    operands = [_normal(0, s.rows, s.tokens, s.features)]
    widths = (s.features, s.inner), (s.features, s.inner), (s.inner, s.features)
    for i, (inputs, outputs) in enumerate(widths):
        weight, a, b = (
            _normal(10 * i + j, *shape, scale=shape[0] ** -0.5)
            for j, shape in enumerate(
                [(inputs, outputs), (inputs, s.rank), (s.rank, outputs)], start=1
            )
        )
        operands += [quantize(weight), a, b]
    return tuple(operands)


def _network(x: jax.Array, *parts: Any, **options: Any) -> jax.Array:
    *gate_up, down = (
        Projection(weight, lora_a=a, lora_b=b, scaling=1.0)
        for weight, a, b in itertools.batched(parts, 3)
    )
    return gated_mlp(x, tuple(gate_up), down, activation="silu", **options)


def _loss_operands(s: _Sizes) -> tuple[jax.Array, ...]:
    rows = s.rows * s.tokens
    targets = jax.random.randint(jax.random.key(2), (rows,), 0, s.vocabulary)
    head = _normal(1, s.vocabulary, s.features, scale=s.features**-0.5)
    return _normal(0, rows, s.features), head, targets


def _loss(hidden: jax.Array, head: jax.Array, targets: jax.Array, **options: Any):
    total, _ = linear_cross_entropy(hidden, head, targets, **options)
    return total


def _adam8bit(first: jax.Array, second: jax.Array, **options: Any) -> jax.Array:
    """Two steps: the direction of the second reads the moments that the first wrote."""
    step = functools.partial(adam8bit, b1=0.9, b2=0.999, eps=1e-8, **options)
    start = Blocks.zeros(first.size)
    _, mu, nu = step(first.astype(jnp.float32), start, start, jnp.int32(1))
    return step(second.astype(jnp.float32), mu, nu, jnp.int32(2))[0]


def _norm_operands(s: _Sizes, inputs: int) -> tuple[jax.Array, ...]:
    arrays = [_normal(i, s.rows, s.tokens, s.features) for i in range(inputs)]
    return *arrays, 1 + _normal(9, s.features, scale=0.1)


def _norm(x: jax.Array, weight: jax.Array, **options: Any) -> list[jax.Array]:
    """With a weight that trains, and a frozen one."""
    weights = weight, jax.lax.stop_gradient(weight)
    return [rms_norm(x, each, eps=1e-5, **options) for each in weights]


_OPS = (
    _Op(name="attention", call=_attention, operands=_attention_operands),
    _Op(name="lora_matmul", call=_lora, operands=_lora_operands),
    _Op(
        name="nf4",
        call=dequantize,
        operands=lambda s: _lora_operands(s)[1:2],
        terms=0,
    ),
    _Op(
        name="rms_norm",
        call=_norm,
        operands=functools.partial(_norm_operands, inputs=1),
    ),
    _Op(
        name="add_rms_norm",
        call=functools.partial(add_rms_norm, eps=1e-5),
        operands=functools.partial(_norm_operands, inputs=2),
    ),
    _Op(name="rope", call=_rope, operands=_rope_operands),
    _Op(name="gated_mlp", call=_network, operands=_network_operands),
    _Op(name="cross_entropy", call=_loss, operands=_loss_operands),
    _Op(
        name="adam8bit",
        call=_adam8bit,
        operands=lambda s: (
            _normal(0, s.features, s.rank),
            _normal(1, s.features, s.rank),
        ),
        has_gradient=False,
    ),
)
