"""dq on Hopper, by scores made anew: three products a block of keys.

Where gradients of scores are kept, `mosaic_gpu_dscores` makes dq of them by one.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from kernels.ring import Ring

from .mosaic_scores import along, is_seen, weights_of, zeros
from .mosaic_tiles import (
    BLOCK_Q,
    GROUPS,
    STAGES,
    WARPGROUP_ROWS,
    TileConfig,
    Visit,
    accumulator,
    operand,
    stream_keys,
)
from .visits import Visits

KERNEL_NAME = "attention_dq"

_ROWS = plgpu.Layout.WGMMA.reduce(1)


def dq_of_scores(
    q: Array,
    k: Array,
    v: Array,
    dout: Array,
    statistics: tuple[Float32[Array, "B N T"], Float32[Array, "B N T"]],
    visits: Visits,
    *,
    scale: float,
    softcap: float | None,
    tiles: TileConfig,
) -> Float[Array, "B T N H"]:
    """Returns dq from the arrays and (lse in powers of two, delta), of whole blocks."""
    batch, q_tokens, heads, head_size = q.shape
    tile = functools.partial(operand, dtype=q.dtype, step=tiles.dq_k)
    rows = tile((GROUPS, WARPGROUP_ROWS, head_size))
    kv_stages = tile((STAGES, tiles.dq_k, head_size))
    stage_loaded = plgpu.Barrier(num_barriers=STAGES)
    stage_free = plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES)
    body = functools.partial(_body, scale=scale, softcap=softcap, tiles=tiles)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types={
            "q_smem": rows,
            "dout_smem": rows,
            "k_smem": kv_stages,
            "v_smem": kv_stages,
            "q_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            "k_loaded": stage_loaded,
            "v_loaded": stage_loaded,
            "k_free": stage_free,
            "v_free": stage_free,
        },
        grid=(q_tokens // BLOCK_Q, batch, heads),
        grid_names=("block", "batch", "head"),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name=KERNEL_NAME,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, dout, *statistics, visits.spans, visits.dq)


def _body(
    q_gmem,
    k_gmem,
    v_gmem,
    dout_gmem,
    lse_gmem,
    delta_gmem,
    spans_gmem,
    ranges_gmem,
    dq_gmem,
    *,
    scale: float,
    softcap: float | None,
    tiles: TileConfig,
    q_smem,
    dout_smem,
    k_smem,
    v_smem,
    q_loaded,
    k_loaded,
    v_loaded,
    k_free,
    v_free,
) -> None:
    block = q_gmem.shape[1] // BLOCK_Q - 1 - lax.axis_index("block")
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    group = lax.axis_index("group")
    kv_head = lax.div(head, jnp.int32(q_gmem.shape[2] // k_gmem.shape[2]))
    visit = Visit.of(*(ranges_gmem[batch, block, i] for i in range(4)))
    block_k, head_size = tiles.dq_k, q_gmem.shape[3]

    def queries(group):
        return pl.ds(block * BLOCK_Q + group * WARPGROUP_ROWS, WARPGROUP_ROWS)

    def slot(step):
        return lax.rem(step, jnp.int32(STAGES))

    @pl.when(group == GROUPS)
    def _load():
        plgpu.set_max_registers(24, action="decrease")
        for i in range(GROUPS):
            for gmem, smem in ((q_gmem, q_smem), (dout_gmem, dout_smem)):
                source = gmem.at[batch, queries(i), head]
                plgpu.copy_gmem_to_smem(source, smem.at[i], q_loaded.at[i])

        keys_ring = Ring((k_smem,), k_loaded, k_free)
        values_ring = Ring((v_smem,), v_loaded, v_free)
        streams = ((k_gmem, keys_ring), (v_gmem, values_ring))
        stream_keys(visit, (batch, kv_head), block_k, streams)
        keys_ring.drain(visit.steps)
        values_ring.drain(visit.steps)

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")

        def load(ref):
            return plgpu.load(ref, layout=_ROWS, optimized=False)

        first, end = (load(spans_gmem.at[batch, i, queries(group)]) for i in range(2))
        lse, delta = (
            load(x.at[batch, head, queries(group)]) for x in (lse_gmem, delta_gmem)
        )
        plgpu.barrier_wait(q_loaded.at[group])

        def step(turn, dq, *, is_masked=False):
            at = slot(turn)

            def products(dq_ref, scores_ref):
                dq_ref[...] = dq
                plgpu.barrier_wait(k_loaded.at[at])
                plgpu.wgmma(scores_ref, q_smem.at[group], k_smem.at[at].T)
                # Its registers are cleared while the first product runs.
                later = functools.partial(later_products, dq_ref, scores_ref)
                pl.run_scoped(later, accumulator(block_k))
                dq_new = dq_ref[...]
                plgpu.barrier_arrive(k_free.at[at])
                return dq_new

            def later_products(dq_ref, scores_ref, dweights_ref):
                plgpu.barrier_wait(v_loaded.at[at])
                plgpu.wgmma(dweights_ref, dout_smem.at[group], v_smem.at[at].T)
                scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
                weights, slope = weights_of(scores, lse, 0, scale, softcap)
                if is_masked:
                    start = visit.block(turn) * block_k
                    mask = is_seen(scores.shape, start, first, end, axis=0)
                    weights = jnp.where(mask, weights, 0.0)
                dweights = dweights_ref[...]
                plgpu.barrier_arrive(v_free.at[at])
                dscores = weights * (dweights - along(delta, dweights.shape, 0))
                if slope is not None:
                    dscores *= slope
                plgpu.wgmma(dq_ref, dscores.astype(k_smem.dtype), k_smem.at[at])

            return pl.run_scoped(products, accumulator(head_size), accumulator(block_k))

        dq = zeros(head_size)
        masked = functools.partial(step, is_masked=True)
        dq = lax.fori_loop(0, visit.full_steps, step, dq)
        dq = lax.fori_loop(visit.full_steps, visit.steps, masked, dq)
        q_smem.at[group][...] = (dq * scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            q_smem.at[group], dq_gmem.at[batch, queries(group), head]
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
