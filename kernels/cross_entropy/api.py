"""The public cross-entropy functions: types, checks, dispatch."""

from typing import Any

import jax
from jaxtyping import Array, Float, Float32, Int

from kernels import dispatch
from kernels.choice import Case, fastest_first
from kernels.dispatch import UnsupportedOp

from . import odds, reference, vjp
from .adapter import HeadAdapter
from .options import CHUNK_TOKENS, Options

_LOSS = {
    "mosaic_gpu": odds.linear_cross_entropy,
    "xla": vjp.linear_cross_entropy,
    "reference": reference.linear_cross_entropy,
}


def _no_log_probs(*_: Any) -> Array:
    raise UnsupportedOp(
        "the kernel of cross_entropy sums losses up: it has no log-probability of each "
        "row"
    )


_LOG_PROBS = {
    "xla": vjp.token_log_probs,
    "reference": reference.token_log_probs,
    "mosaic_gpu": _no_log_probs,
}


def linear_cross_entropy(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " M"],
    *,
    adapter: HeadAdapter | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_tokens: int = CHUNK_TOKENS,
    head_is_trainable: bool = False,
    implementation: str | None = None,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Returns the sum of `-log softmax(logits)[target]`, and the number of targets.

    The logits are `hidden @ head^T`, and `adapter.down @ adapter.up^T` is added where
    there is an adapter. Logits, log-sum-exp and loss are float32; products take the
    dtype of `hidden` as input. When differentiated, the gradient of `hidden` is
    computed in the same pass. "mosaic_gpu" wants bfloat16, a frozen head without an
    adapter, no softcap and a vocabulary that is a multiple of 128.

    Args:
      hidden: After the final norm.
      head: Output table; embedding tables can be passed as they are.
      targets: Indices into the vocabulary, already shifted.
      adapter: Adds to the logits, before the softcap; it gets its gradient whether the
        head is trainable or not.
      softcap: Logits become `softcap * tanh(logits / softcap)` (Gemma 2).
      ignore_index: Target of rows that carry no loss.
      chunk_tokens: Rows whose logits exist at a time, 4 V bytes each; by "mosaic_gpu"
        their exponentials, 2 V bytes each.
      head_is_trainable: Differentiates with respect to `head`; else nothing is
        computed for it and its gradient is zero.
      implementation: "mosaic_gpu", "xla" or "reference": that one runs or fails; None
        takes the fastest able.

    Raises:
      ValueError: Sizes disagree, or a setting is not positive.
      UnsupportedOp: The named implementation cannot run this case here.
    """
    options = Options(
        softcap=softcap,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        head_is_trainable=head_is_trainable,
    )
    _check(hidden.shape, head.shape, targets.shape, adapter)
    return dispatch.run(
        "cross_entropy",
        fastest_first("cross_entropy", choice_case(hidden, head), _LOSS),
        implementation,
        options,
        hidden,
        head,
        targets,
        adapter,
    )


def choice_case(
    hidden: Array | jax.ShapeDtypeStruct, head: Array | jax.ShapeDtypeStruct
) -> Case:
    """Returns what the default implementation depends on, as in the tuned tables."""
    (rows, features), vocabulary = hidden.shape, head.shape[0]
    return {"rows": rows, "features": features, "vocabulary": vocabulary}


def token_log_probs(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " M"],
    *,
    adapter: HeadAdapter | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_tokens: int = CHUNK_TOKENS,
    head_is_trainable: bool = False,
    implementation: str | None = None,
) -> Float32[Array, " M"]:
    """Returns `log softmax(logits)[target]` of each row, 0 where ignored.

    The backward pass computes the logits of each chunk again. Logits, arguments and
    errors are those of `linear_cross_entropy`, whose kernel has no part here.
    """
    options = Options(
        softcap=softcap,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        head_is_trainable=head_is_trainable,
    )
    _check(hidden.shape, head.shape, targets.shape, adapter)
    return dispatch.run(
        "cross_entropy",
        _LOG_PROBS,
        implementation,
        options,
        hidden,
        head,
        targets,
        adapter,
    )


def _check(
    hidden: tuple[int, ...],
    head: tuple[int, ...],
    targets: tuple[int, ...],
    adapter: HeadAdapter | None,
) -> None:
    if hidden[1] != head[1]:
        raise ValueError(f"hidden has {hidden[1]} features, the head {head[1]}")
    if hidden[0] != targets[0]:
        raise ValueError(f"hidden has {hidden[0]} rows, targets {targets[0]}")
    if adapter is None:
        return
    down, up = adapter.down.shape, adapter.up.shape
    if (down[0], up[0]) != (hidden[0], head[0]) or down[1] != up[1]:
        raise ValueError(f"{hidden=} and {head=} have an adapter of {down=} and {up=}")
