"""Attention forward on Hopper, in the manner of FlashAttention-3 (2407.08608).

Each multiprocessor runs one thread block for the whole launch (256 features leave no
registers for that). It takes `BLOCK_Q` queries of one head at a time, 64 for each
compute warpgroup; keys and values stream through shared memory, brought by one more
warpgroup, which is ahead into the next queries when the last ones are stored. While a
warpgroup exponentiates its scores, the other one multiplies: they take turns. The
product with the values of a step is issued together with the scores of the next one.

Budget at H 128: 192 KiB of shared memory (two blocks of queries 64, two stages of keys
and values 128), 240 registers a thread, of which 64 hold the output, 64 the scores and
64 the weights of two steps.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from kernels.device import multiprocessors
from kernels.ring import Ring

from .mosaic_scores import LOG2_E, along, is_seen, zeros
from .mosaic_tiles import (
    GROUPS,
    STAGES,
    WARPGROUP_ROWS,
    Share,
    TileConfig,
    Visit,
    accumulator,
    operand,
    stream_keys,
)
from .visits import Visits

KERNEL_NAME = "attention_forward"

_ROWS = plgpu.Layout.WGMMA.reduce(1)


def attention_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visits: Visits,
    *,
    scale: float,
    softcap: float | None,
    tiles: TileConfig,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
    """Returns the output and the log-sum-exp of the scores, 0 where no key is seen.

    T and S are whole blocks; a chunk of a longer row differs in its visits only.
    """
    batch, q_tokens, heads, head_size = q.shape
    dealt = visits.forward.shape[0] * heads
    if tiles.is_persistent:
        dealt = min(multiprocessors(), dealt)
    q_tiles = GROUPS * tiles.buffers
    tile = functools.partial(operand, dtype=q.dtype, step=tiles.forward_k)
    kv_stages = tile((STAGES, tiles.forward_k, head_size))
    stage_loaded = plgpu.Barrier(num_barriers=STAGES)
    stage_free = plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES)
    body = functools.partial(
        _body, dealt=dealt, scale=scale, softcap=softcap, tiles=tiles
    )
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, q_tokens), jnp.float32),
        ),
        scratch_types={
            "q_smem": tile((q_tiles, WARPGROUP_ROWS, head_size)),
            "spans_smem": plgpu.SMEM((q_tiles, 2, WARPGROUP_ROWS), jnp.int32),
            "k_smem": kv_stages,
            "v_smem": kv_stages,
            "lse_smem": plgpu.SMEM((GROUPS, WARPGROUP_ROWS), jnp.float32),
            "q_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=q_tiles),
            "q_free": plgpu.Barrier(num_barriers=q_tiles),
            "k_loaded": stage_loaded,
            "v_loaded": stage_loaded,
            "k_free": stage_free,
            "v_free": stage_free,
            "turn": plgpu.Barrier(num_barriers=GROUPS),
        },
        grid=(dealt,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name=KERNEL_NAME,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, visits.spans, visits.forward)


def _body(
    q_gmem,
    k_gmem,
    v_gmem,
    spans_gmem,
    tasks_gmem,
    out_gmem,
    lse_gmem,
    *,
    dealt: int,
    scale: float,
    softcap: float | None,
    tiles: TileConfig,
    q_smem,
    spans_smem,
    k_smem,
    v_smem,
    lse_smem,
    q_loaded,
    q_free,
    k_loaded,
    v_loaded,
    k_free,
    v_free,
    turn,
) -> None:
    _, _, heads, head_size = q_gmem.shape
    share = Share(lax.axis_index("block"), dealt, heads, tasks_gmem)
    group, block_k = lax.axis_index("group"), tiles.forward_k
    heads_per_key = jnp.int32(heads // k_gmem.shape[2])
    factor = LOG2_E * (scale if softcap is None else softcap)

    def rows(tile):
        return pl.ds(tile * WARPGROUP_ROWS, WARPGROUP_ROWS)

    @pl.when(group == GROUPS)
    def _load():
        plgpu.set_max_registers(24, action="decrease")

        queries_ring = Ring((q_smem, spans_smem), q_loaded, q_free)
        keys_ring = Ring((k_smem,), k_loaded, k_free)
        values_ring = Ring((v_smem,), v_loaded, v_free)
        streams = ((k_gmem, keys_ring), (v_gmem, values_ring))

        def load(number, begun):
            head, (row, block, *ranges) = share.take(number)
            visit = Visit.of(*ranges)
            for i in range(GROUPS):
                step, tile = (x * GROUPS + i for x in (number, block))
                source = q_gmem.at[row, rows(tile), head]
                queries_ring.fill(step, source, spans_gmem.at[row, :, rows(tile)])
            keys = (row, lax.div(head, heads_per_key))
            return stream_keys(visit, keys, block_k, streams, begun)

        steps = lax.fori_loop(0, share.total, load, jnp.int32(0))
        keys_ring.drain(steps)
        values_ring.drain(steps)
        queries_ring.drain(share.total * GROUPS)

    def compute(number, begun):
        """Mixes one block, after so many steps of earlier ones; returns their sum."""
        head, (row, block, *ranges) = share.take(number)
        visit = Visit.of(*ranges)
        mine = rows(block * GROUPS + group)
        q_at = lax.rem(number * GROUPS + group, jnp.int32(q_smem.shape[0]))
        q_tile = q_smem.at[q_at]
        plgpu.barrier_wait(q_loaded.at[q_at])
        first, end = (
            plgpu.load(spans_smem.at[q_at, i], layout=_ROWS) for i in range(2)
        )

        def slot(step):
            return lax.rem(begun + step, jnp.int32(STAGES))

        def step(number, carry, *, is_first=False, is_full=False):
            acc, top, total, weights = carry
            at, before = slot(number), slot(number - 1)
            plgpu.barrier_wait(k_loaded.at[at])
            plgpu.barrier_wait(turn.at[group])

            def products(acc_ref, scores_ref):
                plgpu.wgmma(scores_ref, q_tile, k_smem.at[at].T)
                if not is_first:
                    acc_ref[...] = acc
                    plgpu.barrier_wait(v_loaded.at[before])
                    plgpu.wgmma(acc_ref, weights, v_smem.at[before])
                plgpu.barrier_arrive(turn.at[(group + 1) % GROUPS])
                scores = plgpu.wgmma_accumulator_load(
                    scores_ref, wait_n=0 if is_first else 1
                )
                plgpu.barrier_arrive(k_free.at[at])
                if softcap is not None:
                    scores = jnp.tanh(scores * (scale / softcap))
                start = visit.block(number) * block_k
                masked = functools.partial(_masked, start=start, first=first, end=end)
                if is_first:
                    scores = lax.cond(
                        visit.full_steps > 0, lambda all_seen: all_seen, masked, scores
                    )
                elif not is_full:
                    scores = masked(scores)
                softmax = _online_softmax(scores, top, total, factor)
                if is_first:
                    return acc, *softmax
                acc_new = acc_ref[...]
                plgpu.barrier_arrive(v_free.at[before])
                return acc_new, *softmax

            acc, decay, top, total, weights = pl.run_scoped(
                products, accumulator(head_size), accumulator(block_k)
            )
            if not is_first:
                acc *= along(decay, acc.shape, 0)
            return acc, top, total, weights.astype(v_smem.dtype)

        carry = step(jnp.int32(0), _nothing(head_size), is_first=True)
        plain = functools.partial(step, is_full=True)
        full_steps = jnp.maximum(visit.full_steps, 1)
        carry = lax.fori_loop(1, full_steps, plain, carry)
        acc, top, total, weights = lax.fori_loop(full_steps, visit.steps, step, carry)
        last = slot(visit.steps - 1)
        plgpu.barrier_wait(v_loaded.at[last])

        def last_product(acc_ref):
            acc_ref[...] = acc
            plgpu.wgmma(acc_ref, weights, v_smem.at[last])
            return acc_ref[...]

        acc = pl.run_scoped(last_product, accumulator(head_size))
        plgpu.barrier_arrive(v_free.at[last])
        out, lse_smem.at[group][...] = _normalised(acc, top, total)
        q_tile[...] = out.astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, out_gmem.at[row, mine, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[group], lse_gmem.at[row, head, mine])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(q_free.at[q_at])
        return begun + visit.steps

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        pl.when(group == GROUPS - 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
        lax.fori_loop(0, share.total, compute, jnp.int32(0))
        pl.when(group == 0)(lambda: plgpu.barrier_wait(turn.at[0]))


def _nothing(head_size: int):
    """Returns what no step has left: (output, maximum, sum, no weights yet)."""
    rows = jnp.zeros((WARPGROUP_ROWS,), jnp.float32)
    return (
        zeros(head_size),
        plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), -jnp.inf), _ROWS),
        plgpu.layout_cast(rows, _ROWS),
        None,
    )


def _masked(scores, start, first, end):
    """Returns the scores of a block; minus infinity for keys that a query sees not."""
    return jnp.where(is_seen(scores.shape, start, first, end, axis=0), scores, -jnp.inf)


def _online_softmax(scores, top, total, factor: float):
    """Returns (decay of earlier terms, maximum, sum, weights); powers are of two."""
    new_top = jnp.maximum(top, scores.max(axis=1) * factor)
    # Of a query that sees nothing yet.
    shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    weights = jnp.exp2(scores * factor - along(shift, scores.shape, 0))
    decay = jnp.exp2(top - shift)
    return decay, new_top, total * decay + weights.sum(axis=1), weights


def _normalised(acc, top, total):
    """Returns the output and the log-sum-exp; zeros where no key was seen."""
    sees = total > 0
    total = jnp.where(sees, total, 1.0)
    lse = jnp.where(sees, top / LOG2_E + jnp.log(total), 0.0)
    return acc * along(1 / total, acc.shape, 0), lse
