"""Attention forward on Hopper, in the manner of FlashAttention-3 (2407.08608).

A thread block holds `block_q` queries of one head, 64 for each compute warpgroup; keys
and values stream through shared memory, brought by one more warpgroup. While a
warpgroup exponentiates its scores, the other one multiplies: they take turns. The
product with the values of a step is issued together with the scores of the next one.

Budget at H 128: 160 KiB of shared memory (queries 32, two stages of keys and values
128), 240 registers a thread, of which 64 hold the output, 64 the scores and 64 the
weights of two steps.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from .mosaic_tiles import WARPGROUP_ROWS, TileConfig, Visit, accumulator, operand
from .spans import Spans, key_blocks

KERNEL_NAME = "attention_forward"

LOG2_E = math.log2(math.e)

_ROWS = plgpu.Layout.WGMMA.reduce(1)


def attention_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spans: Spans,
    *,
    scale: float,
    softcap: float | None,
    tiles: TileConfig,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
    """Returns the output and the log-sum-exp of the scores, 0 where no key is seen.

    T and S are whole blocks; a chunk of a longer row differs in its spans only.
    """
    batch, q_tokens, heads, head_size = q.shape
    count = q_tokens // tiles.block_q
    rows = (tiles.groups, WARPGROUP_ROWS)
    kv_stages = operand((tiles.stages, tiles.forward_k, head_size), q.dtype)
    stage_loaded = plgpu.Barrier(num_barriers=tiles.stages)
    stage_free = plgpu.Barrier(num_arrivals=tiles.groups, num_barriers=tiles.stages)
    body = functools.partial(_body, scale=scale, softcap=softcap, tiles=tiles)
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, q_tokens), jnp.float32),
        ),
        scratch_types={
            "q_smem": operand((*rows, head_size), q.dtype),
            "k_smem": kv_stages,
            "v_smem": kv_stages,
            "lse_smem": plgpu.SMEM(rows, jnp.float32),
            "q_loaded": plgpu.Barrier(num_barriers=tiles.groups),
            "k_loaded": stage_loaded,
            "v_loaded": stage_loaded,
            "k_free": stage_free,
            "v_free": stage_free,
            "turn": plgpu.Barrier(num_barriers=tiles.groups),
        },
        grid=(count, batch, heads),
        grid_names=("block", "batch", "head"),
        num_threads=tiles.groups + 1,
        thread_name="group",
        kernel_name=KERNEL_NAME,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, *spans, key_blocks(spans, tiles.block_q, tiles.forward_k))


def _body(
    q_gmem,
    k_gmem,
    v_gmem,
    first_gmem,
    end_gmem,
    ranges_gmem,
    out_gmem,
    lse_gmem,
    *,
    scale: float,
    softcap: float | None,
    tiles: TileConfig,
    q_smem,
    k_smem,
    v_smem,
    lse_smem,
    q_loaded,
    k_loaded,
    v_loaded,
    k_free,
    v_free,
    turn,
) -> None:
    # The blocks with the most keys start first, so that the last ones end together.
    block = q_gmem.shape[1] // tiles.block_q - 1 - lax.axis_index("block")
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    group = lax.axis_index("group")
    kv_head = lax.div(head, jnp.int32(q_gmem.shape[2] // k_gmem.shape[2]))
    visit = Visit.load(ranges_gmem.at[batch, block])
    block_k, head_size = tiles.forward_k, q_gmem.shape[3]

    def queries(group):
        return pl.ds(block * tiles.block_q + group * WARPGROUP_ROWS, WARPGROUP_ROWS)

    def slot(step):
        return lax.rem(step, jnp.int32(tiles.stages))

    @pl.when(group == tiles.groups)
    def _load():
        plgpu.set_max_registers(24, action="decrease")
        for i in range(tiles.groups):
            source = q_gmem.at[batch, queries(i), head]
            plgpu.copy_gmem_to_smem(source, q_smem.at[i], q_loaded.at[i])

        def load(step, _):
            at, j = slot(step), visit.block(step)
            for gmem, smem, loaded, free in (
                (k_gmem, k_smem, k_loaded, k_free),
                (v_gmem, v_smem, v_loaded, v_free),
            ):
                pl.when(step >= tiles.stages)(
                    functools.partial(plgpu.barrier_wait, free.at[at])
                )
                source = gmem.at[batch, pl.ds(j * block_k, block_k), kv_head]
                plgpu.copy_gmem_to_smem(source, smem.at[at], loaded.at[at])

        def drain(step, _):
            plgpu.barrier_wait(k_free.at[slot(step)])
            plgpu.barrier_wait(v_free.at[slot(step)])

        steps = visit.steps
        lax.fori_loop(0, steps, load, None)
        lax.fori_loop(jnp.maximum(steps - tiles.stages, 0), steps, drain, None)

    @pl.when(group < tiles.groups)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        first, end = (
            plgpu.load(ref.at[batch, queries(group)], layout=_ROWS, optimized=False)
            for ref in (first_gmem, end_gmem)
        )
        plgpu.barrier_wait(q_loaded.at[group])

        def step(number, carry, *, is_first=False, is_masked=False):
            acc, top, total, weights = carry
            at, before = slot(number), slot(number - 1)
            plgpu.barrier_wait(k_loaded.at[at])
            plgpu.barrier_wait(turn.at[group])

            def products(acc_ref, scores_ref):
                plgpu.wgmma(scores_ref, q_smem.at[group], k_smem.at[at].T)
                if not is_first:
                    acc_ref[...] = acc
                    plgpu.barrier_wait(v_loaded.at[before])
                    plgpu.wgmma(acc_ref, weights, v_smem.at[before])
                plgpu.barrier_arrive(turn.at[(group + 1) % tiles.groups])
                scores = plgpu.wgmma_accumulator_load(
                    scores_ref, wait_n=0 if is_first else 1
                )
                plgpu.barrier_arrive(k_free.at[at])
                mask = None
                if is_masked:
                    start = visit.block(number) * block_k
                    mask = _mask(first - start, end - start, block_k)
                softmax = _online_softmax(scores, top, total, mask, scale, softcap)
                if is_first:
                    return acc, *softmax
                acc_new = acc_ref[...]
                plgpu.barrier_arrive(v_free.at[before])
                return acc_new, *softmax

            acc, decay, top, total, weights = pl.run_scoped(
                products,
                accumulator(head_size),
                accumulator(block_k),
            )
            if not is_first:
                acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
            return acc, top, total, weights.astype(v_smem.dtype)

        pl.when(group == tiles.groups - 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
        zeros = jnp.zeros((WARPGROUP_ROWS, head_size), jnp.float32)
        carry = (
            plgpu.layout_cast(zeros, plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), -jnp.inf), _ROWS),
            plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), _ROWS),
            None,
        )
        carry = step(jnp.int32(0), carry, is_first=True, is_masked=True)
        masked = functools.partial(step, is_masked=True)
        full_steps = jnp.maximum(visit.full_steps, 1)
        carry = lax.fori_loop(1, full_steps, step, carry)
        carry = lax.fori_loop(full_steps, visit.steps, masked, carry)
        acc, top, total, weights = carry

        pl.when(group == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
        last = slot(visit.steps - 1)
        plgpu.barrier_wait(v_loaded.at[last])

        def last_product(acc_ref):
            acc_ref[...] = acc
            plgpu.wgmma(acc_ref, weights, v_smem.at[last])
            return acc_ref[...]

        acc = pl.run_scoped(last_product, accumulator(head_size))
        plgpu.barrier_arrive(v_free.at[last])
        out, lse = _normalised(acc, top, total)
        q_smem.at[group][...] = out.astype(q_smem.dtype)
        lse_smem.at[group][...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            q_smem.at[group], out_gmem.at[batch, queries(group), head]
        )
        plgpu.copy_smem_to_gmem(
            lse_smem.at[group], lse_gmem.at[batch, head, queries(group)]
        )
        plgpu.wait_smem_to_gmem(0)


def _mask(seen_from, seen_to, block_k: int):
    """Returns which of the next `block_k` keys each query sees."""
    shape = (WARPGROUP_ROWS, block_k)
    key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    seen_from, seen_to = (
        lax.broadcast_in_dim(x, shape, [0]) for x in (seen_from, seen_to)
    )
    return (key >= seen_from) & (key < seen_to)


def _online_softmax(scores, top, total, mask, scale: float, softcap: float | None):
    """Returns (decay of earlier terms, maximum, sum, weights); powers are of two."""
    factor = scale * LOG2_E
    if softcap is not None:
        scores = jnp.tanh(scores * (scale / softcap))
        factor = softcap * LOG2_E
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(axis=1) * factor)
    shift = new_top
    if mask is not None:
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(shift, scores.shape, [0]))
    decay = jnp.exp2(top - shift)
    return decay, new_top, total * decay + weights.sum(axis=1), weights


def _normalised(acc, top, total):
    """Returns the output and the log-sum-exp; zeros where no key was seen."""
    sees = total > 0
    total = jnp.where(sees, total, 1.0)
    lse = jnp.where(sees, top / LOG2_E + jnp.log(total), 0.0)
    return acc * lax.broadcast_in_dim(1 / total, acc.shape, [0]), lse
