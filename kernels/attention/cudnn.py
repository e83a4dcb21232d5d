"""Attention by cuDNN's fused kernels, for bf16 and f16 on CUDA devices.

Unpacked rows go through `jax.nn.dot_product_attention`. Packed rows need the offsets
of `jax._src.cudnn.fused_attention_stablehlo`, which is private: without it they are
unsupported. cuDNN neither reads nor writes tokens outside the segments it is told of,
so what it leaves there, forward and backward, is replaced by zeros.
"""

import contextlib
import importlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from kernels.device import compute_capability
from kernels.dispatch import UnsupportedOp

_PRIVATE_API = "jax._src.cudnn.fused_attention_stablehlo"
_GRADIENT = (
    "_dot_product_attention_bwd_p_wrapper",
    "MaskType.CAUSAL",
    "AttentionLayout.BTNH.value",
)
_NO_CUDNN = "cuDNN is not detected"

type Causal = Callable[[Array, Array, Array, float, int | None], Array]
"""Of q, k, v, the scale and the window."""


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_index: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B S"] | None,
    q_segment_ids: Int[Array, "B T"] | None,
    window: int | Int[Array, ""] | None,
    softcap: float | None,
    scale: float,
    max_segments: int | None,
    causal: Causal | None = None,
) -> Float[Array, "B T N H"]:
    """Returns attention by cuDNN; see `api.attention`.

    Args:
      causal: Stands in for cuDNN where rows are not packed.

    Raises:
      UnsupportedOp: cuDNN lacks this case, or there is no such device.
    """
    _check_options(q, k, q_index, window, softcap)
    if q_segment_ids is not segment_ids:
        raise UnsupportedOp("documents of queries and keys must be the same array")
    packed = max_segments is not None and max_segments > 1 and segment_ids is not None
    check_device(q.shape[3], packed=packed)
    causal = _causal if causal is None else causal
    window = None if window is None else int(window)
    if segment_ids is None:
        return causal(q, k, v, scale, window)
    if max_segments is None:
        raise UnsupportedOp("segment_ids need max_segments")
    real = segment_ids > 0
    q, k, v = (_without_padding_gradient(x, real) for x in (q, k, v))
    if not packed:
        out = causal(q, k, v, scale, window)
    elif window is None:
        out = _packed(q, k, v, segment_ids, max_segments, scale)
    else:
        raise UnsupportedOp("no sliding window over packed rows")
    out = jnp.where(real[:, :, None, None], out, 0)
    too_many = segment_ids > max_segments
    return jnp.where(too_many[:, :, None, None], jnp.nan, out)


def check_device(head_size: int, *, packed: bool) -> None:
    """Raises UnsupportedOp unless the default device runs this head size."""
    capability = compute_capability()
    if capability is None or capability < (8, 0):
        raise UnsupportedOp("needs a CUDA device of compute capability 8.0 or more")
    if packed and capability < (9, 0):
        raise UnsupportedOp("packed rows need compute capability 9.0 or more")
    largest = 256 if capability >= (9, 0) else 128
    if head_size > largest or head_size % 8:
        raise UnsupportedOp(f"{head_size=} must be a multiple of 8 up to {largest}")


def require_gradient() -> None:
    """Raises UnsupportedOp where JAX finds no cuDNN or lacks what its gradient takes.

    JAX asks for `causal_gradient` when the choice of an implementation is made already.
    """
    _private_api(*_GRADIENT)
    check_version = _private_api("check_cudnn_version")
    with _as_unsupported():
        check_version()


def _check_options(
    q: Array,
    k: Array,
    q_index: Array | None,
    window: int | Array | None,
    softcap: float | None,
) -> None:
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UnsupportedOp(f"{q.dtype=} must be bfloat16 or float16")
    if q_index is not None or q.shape[1] != k.shape[1]:
        raise UnsupportedOp("queries must be those of the whole row, in order")
    if q.shape[1] % 2:
        raise UnsupportedOp(f"JAX differentiates even lengths only: {q.shape[1]}")
    if softcap is not None:
        raise UnsupportedOp("no softcap")
    if window is not None and not isinstance(window, int):
        raise UnsupportedOp("the window must be a plain integer")


def _causal(q: Array, k: Array, v: Array, scale: float, window: int | None) -> Array:
    """Returns causal attention; padding at the end of a row cannot reach its tokens."""
    with _as_unsupported():
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )


def causal_gradient(
    residuals: tuple[Array, ...], dout: Array, scale: float, window: int | None
) -> tuple[Array, Array, Array]:
    """Returns dq, dk, dv of causal attention that need not be cuDNN's.

    Args:
      residuals: q, k, v, the output and the log-sum-exp (B, N, T).
      dout: Gradient of the output.
      scale: Of the scores.
      window: Tokens seen, or None.
    """
    q, k, v, out, lse = residuals
    primitive, mask_type, layout = _private_api(*_GRADIENT)
    absent = jnp.zeros(0, q.dtype)  # bias, lengths, offsets and pages
    dq, dk, dv = primitive.bind(
        *(q, k, v),
        *[absent] * 7,
        *(lse, out, dout),
        scale=scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=mask_type,
        layout=layout,
        sliding_window_length=window,
    )
    return dq, dk, dv


def _packed(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    max_segments: int,
    scale: float,
) -> Array:
    """Returns attention within each segment; what is outside of them is undefined."""
    if q.size >= 2**31:
        raise UnsupportedOp(f"{q.shape=}: offsets of packed rows overflow 32 bits")
    fused, mask_type = _private_api("dot_product_attention", "MaskType.PADDING_CAUSAL")
    lengths, starts = segment_bounds(segment_ids, max_segments)
    with _as_unsupported():
        return fused(
            q,
            k,
            v,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=starts,
            kv_offsets=starts,
            scale=scale,
            mask_type=mask_type,
        )


@contextlib.contextmanager
def _as_unsupported() -> Iterator[None]:
    """Turns JAX's words for what cuDNN lacks, or for its absence, into ours."""
    try:
        yield
    except NotImplementedError as error:
        raise UnsupportedOp(str(error)) from error
    except RuntimeError as error:
        # Faults of the device are RuntimeErrors too, and are no reason to go on.
        if _NO_CUDNN not in str(error):
            raise
        raise UnsupportedOp(str(error)) from error


def _private_api(*names: str) -> Any:
    """Returns what `_PRIVATE_API` has by these names, or raises UnsupportedOp."""
    try:
        return operator.attrgetter(*names)(importlib.import_module(_PRIVATE_API))
    except (ImportError, AttributeError) as error:
        raise UnsupportedOp(f"this JAX has another {_PRIVATE_API}: {error}") from error


def segment_bounds(
    segment_ids: Int[Array, "B S"], max_segments: int
) -> tuple[Int32[Array, "B M"], Int32[Array, "B M+1"]]:
    """Returns the length and the first token of each segment, -1 where there is none.

    JAX moves the entries that are not negative to the front before cuDNN reads them,
    so lengths and starts must have as many; the column beyond the last stays -1.
    """
    numbers = jnp.arange(1, max_segments + 1, dtype=segment_ids.dtype)
    is_member = segment_ids[:, None, :] == numbers[None, :, None]
    lengths = jnp.sum(is_member, axis=2, dtype=jnp.int32)
    starts = jnp.cumsum(lengths, axis=1) - lengths
    exists = lengths > 0
    starts = jnp.pad(
        jnp.where(exists, starts, -1), ((0, 0), (0, 1)), constant_values=-1
    )
    return jnp.where(exists, lengths, -1), starts


@jax.custom_vjp
def _without_padding_gradient(
    x: Float[Array, "B T N H"], real: Bool[Array, "B T"]
) -> Float[Array, "B T N H"]:
    """Returns `x`; its gradient is zero, not undefined, where a token is not real."""
    del real
    return x


def _keep(x: Array, real: Array) -> tuple[Array, Array]:
    return x, real


def _zero_padding(real: Array, dx: Array) -> tuple[Array, None]:
    return jnp.where(real[:, :, None, None], dx, 0), None


_without_padding_gradient.defvjp(_keep, _zero_padding)
