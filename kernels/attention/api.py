"""Causal grouped-query attention over packed, windowed or cached rows."""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.choice import Case, fastest_first
from kernels.dispatch import UnsupportedOp

from . import cudnn, flash, mixed, reference, vjp
from .visits import Visits


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_index: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    max_segments: int | None = None,
    visits: Visits | None = None,
    keeps_dscores: bool = True,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Returns `softmax(scale * q kᵀ) v` over the keys that each query may see.

    Query t sees key s if `s <= q_index[t]`, `q_index[t] - s < window` and both are of
    one document. A query that sees no key gives zeros and has no gradient. Scores and
    softmax are float32; probabilities are rounded to the dtype of `v`. Grouped heads
    share keys (arxiv.org/abs/2305.13245); N must be a multiple of K.

    Args:
      q: Queries, rotated.
      k: Keys, rotated.
      v: Values.
      q_index: Row index of each query, for decoding into a cache; None is 0 .. T-1.
      segment_ids: Document of each key, from 1; 0 is padding, which is neither seen
        nor sees. "cudnn" wants them ascending, with the padding at the end;
        "mosaic_gpu" wants the tokens of a document side by side.
      q_segment_ids: Document of each query; by default that of the keys.
      window: Tokens seen, the query's own included (arxiv.org/abs/2004.05150); may be
        a traced scalar, so that layers under one scan can differ.
      softcap: Bounds scores to `softcap * tanh(scores / softcap)`.
      scale: Of the scores; H**-0.5 by default.
      max_segments: No row has more documents than this; only "cudnn" needs it, for
        packed rows, for which it keeps `4 * max_segments` bytes a query and head.
        Queries of a document above it become NaN there.
      visits: What the Hopper kernels know of these documents and this window, from
        `attention_visits`; None makes it here.
      keeps_dscores: The Hopper kernels may hold the gradients of the scores in memory
        between two kernels of the backward pass, where `dscores_bytes` is above 0.
      implementation: "mosaic_gpu", "cudnn", "mosaic_gpu_cudnn" (forward by the one,
        backward by the other), "xla" or "reference"; None takes the fastest able, as
        measured.

    Raises:
      ValueError: Shapes, dtypes or options contradict each other.
      UnsupportedOp: The named implementation cannot run this case here.
    """
    _check_arrays(q, k, v)
    _check_options(q, k, segment_ids, q_segment_ids, softcap, max_segments)
    window = _effective_window(window, q, q_index)
    keeps_dscores = keeps_dscores and flash.dscores_bytes(q, softcap=softcap) > 0
    case = choice_case(
        q.shape[3],
        q.shape[1],
        is_packed=segment_ids is not None and max_segments != 1,
        has_window=window is not None,
        has_softcap=softcap is not None,
        keeps_dscores=keeps_dscores,
    )
    return dispatch.run(
        "attention",
        _implementations(case, visits=visits, keeps_dscores=keeps_dscores),
        implementation,
        q,
        k,
        v,
        q_index=q_index,
        segment_ids=segment_ids,
        q_segment_ids=segment_ids if q_segment_ids is None else q_segment_ids,
        window=window,
        softcap=softcap,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        max_segments=max_segments,
    )


def attention_visits(
    q: Float[Array, "B T N H"] | jax.ShapeDtypeStruct,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Visits | None:
    """Returns what calls of `attention` with such queries and these options share.

    Made once, outside of the layers, it spares each of them the small programs that
    find which blocks of keys to visit. None where no Hopper kernel would take it.
    """
    has_softcap = softcap is not None
    try:
        return flash.row_visits(
            q, segment_ids=segment_ids, window=window, has_softcap=has_softcap
        )
    except UnsupportedOp:
        return None


def choice_case(
    head_size: int,
    tokens: int,
    *,
    is_packed: bool,
    has_window: bool,
    has_softcap: bool,
    keeps_dscores: bool,
) -> Case:
    """Returns what the default implementation depends on, as in the tuned tables.

    Whole rows whose gradients of scores are not kept are "lean": cuDNN's backward may
    be faster than the kernels then. A window over documents, which cuDNN lacks, makes
    rows of another kind than either alone.

    The head size is a kind: the kernels' tiles differ by it, so that times of one size
    say nothing of another, at however near a number of tokens.
    """
    whole = "whole" if keeps_dscores else "lean"
    rows = "softcap" if has_softcap else "window" if has_window else whole
    if is_packed:
        words = (("packed", True), ("window", has_window), ("softcap", has_softcap))
        rows = " ".join(word for word, holds in words if holds)
    return {"rows": rows, "head_size": str(head_size), "tokens": tokens}


def _implementations(
    case: Case, *, visits: Visits | None, keeps_dscores: bool
) -> dict[str, Callable[..., Array]]:
    """Returns name to function, the default first.

    The kernels must be asked for by name where they were not timed.
    """
    implementations = {
        "cudnn": cudnn.attention,
        "xla": vjp.attention,
        "mosaic_gpu": functools.partial(
            flash.attention, visits=visits, keeps_dscores=keeps_dscores
        ),
        "mosaic_gpu_cudnn": functools.partial(mixed.attention, visits=visits),
        "reference": reference.attention,
    }
    # A window over documents that was not timed takes the times without one.
    rows = str(case["rows"]).replace("packed window", "packed")
    implementations = fastest_first(
        "attention", {**case, "rows": rows}, implementations
    )
    return fastest_first("attention", case, implementations)


def _check_arrays(q: Array, k: Array, v: Array) -> None:
    if k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(f"shapes disagree: {q.shape=}, {k.shape=}, {v.shape=}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"query heads must be a multiple of key heads: {q.shape=}, {k.shape=}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"dtypes disagree: {q.dtype=}, {k.dtype=}, {v.dtype=}")


def _check_options(
    q: Array,
    k: Array,
    segment_ids: Array | None,
    q_segment_ids: Array | None,
    softcap: float | None,
    max_segments: int | None,
) -> None:
    if q_segment_ids is not None and segment_ids is None:
        raise ValueError("q_segment_ids need segment_ids of the keys")
    if segment_ids is not None and q_segment_ids is None and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"segment_ids are of the keys; {q.shape[1]} queries against {k.shape[1]} "
            "keys need q_segment_ids too"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{softcap=} must be above 0")
    if max_segments is not None and max_segments < 1:
        raise ValueError(f"{max_segments=} must be at least 1")


def _effective_window(
    window: int | jax.Array | None, q: Array, q_index: Array | None
) -> int | jax.Array | None:
    """Returns None for a window that hides nothing."""
    if not isinstance(window, int):
        return window
    if window < 1:
        raise ValueError(f"{window=} must be at least 1")
    return None if q_index is None and window >= q.shape[1] else window
