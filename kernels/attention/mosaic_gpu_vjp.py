"""Gradient of attention on Hopper: one kernel for dk and dv, one for dq.

With p the weights, dp = dout vᵀ and delta = sum(out * dout) (2307.08691 section 3),

    ds = p * (dp - delta),    dq = scale ds k,    dk = scale dsᵀ q,    dv = pᵀ dout.

Both kernels recompute p from the log-sum-exp, unless dk/dv leaves ds in memory, from
which `mosaic_gpu_dscores` makes dq. A thread block of dq holds queries and streams
keys; one of dk/dv holds keys and streams the queries of all heads that share them, and
works on transposed scores, so that p and ds leave one product as registers and enter
the next. Every sum has one owner and one order: no atomics, and the same bits each
time.

A multiprocessor runs one thread block of dk/dv for the whole launch (256 features leave
no registers for that): while it stores the gradients of one block of keys, the next one
is there. Each warpgroup passes by the queries that see none of its 64 keys. What
registers are left decides the form of its loops: whatever is live across a step costs
one.

Budget at H 128: dq takes 192 KiB of shared memory, dk/dv 194, and 32 more where it
leaves ds; both 240 registers a thread, of which dk/dv hold 128 in the two gradients.
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

from .mosaic_gpu_dq import dq_of_scores
from .mosaic_gpu_dscores import Outbox, dq_of_dscores, dscores_shape
from .mosaic_scores import LOG2_E, along, is_seen, weights_of, zeros
from .mosaic_tiles import (
    GROUPS,
    WARPGROUP_ROWS,
    Share,
    TileConfig,
    accumulator,
    operand,
)
from .visits import Visits

KERNEL_NAME = "attention_dkv"

_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def attention_backward(
    arrays: tuple[Array, Array, Array, Array],
    statistics: tuple[Float32[Array, "B N T"], Float32[Array, "B N T"]],
    visits: Visits,
    *,
    scale: float,
    softcap: float | None,
    tiles: TileConfig,
    keeps_dscores: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns dq, dk, dv from (q, k, v, dout) and (lse, delta).

    T and S are whole blocks. A gradient of the log-sum-exp is subtracted from delta.
    """
    lse, delta = statistics
    statistics = (lse * LOG2_E, delta)
    options = {"scale": scale, "softcap": softcap, "tiles": tiles}
    q, k, _, _ = arrays
    if not keeps_dscores:
        dq = dq_of_scores(*arrays, statistics, visits, **options)
        dk, dv = _dkv(*arrays, statistics, visits, **options)
        return dq, dk, dv
    assert visits.dscores is not None
    dk, dv, dscores = _dkv(*arrays, statistics, visits, **options, keeps_dscores=True)
    dq = dq_of_dscores(dscores, k, visits.dscores, heads=q.shape[2], scale=scale)
    return dq, dk, dv


def _dkv(
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
    keeps_dscores: bool = False,
) -> tuple[Array, ...]:
    """Returns dk, dv and, if they are to be kept, the gradients of the scores."""
    _, _, kv_heads, head_size = k.shape
    tile = functools.partial(operand, dtype=q.dtype, step=tiles.dkv_q)
    row_groups = tiles.dkv_k // WARPGROUP_ROWS
    rows = tile((tiles.buffers * row_groups, WARPGROUP_ROWS, head_size))
    stages = tile((tiles.dkv_stages, tiles.dkv_q, head_size))
    dealt = visits.dkv.shape[0] * kv_heads
    if tiles.is_persistent:
        dealt = min(multiprocessors(), dealt)
    body = functools.partial(
        _dkv_body, dealt=dealt, scale=scale, softcap=softcap, tiles=tiles
    )
    results = [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2
    outbox_memory = {}
    if keeps_dscores:
        results.append(jax.ShapeDtypeStruct(dscores_shape(q), q.dtype))
        outbox_memory = Outbox.memory(tiles.dkv_stages, q.dtype)
    return plgpu.kernel(
        body,
        out_type=tuple(results),
        scratch_types={
            "k_smem": rows,
            "v_smem": rows,
            "q_smem": stages,
            "dout_smem": stages,
            # One array: each takes 1,024 bytes and their multiples.
            "statistics_smem": plgpu.SMEM(
                (tiles.dkv_stages, 2, tiles.dkv_q), jnp.float32
            ),
            "spans_smem": plgpu.SMEM((tiles.dkv_stages, 2, tiles.dkv_q), jnp.int32),
            "kv_loaded": plgpu.Barrier(
                num_arrivals=2 * row_groups, num_barriers=tiles.buffers
            ),
            "kv_free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=tiles.buffers),
            "loaded": plgpu.Barrier(num_arrivals=5, num_barriers=tiles.dkv_stages),
            "free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=tiles.dkv_stages),
            "done": plgpu.Barrier(num_arrivals=GROUPS),
            **outbox_memory,
        },
        grid=(dealt,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name=KERNEL_NAME,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(
        q,
        k,
        v,
        dout,
        *statistics,
        visits.spans,
        visits.dkv,
    )


def _dkv_body(
    q_gmem,
    k_gmem,
    v_gmem,
    dout_gmem,
    lse_gmem,
    delta_gmem,
    spans_gmem,
    tasks_gmem,
    dk_gmem,
    dv_gmem,
    dscores_gmem=None,
    *,
    dealt: int,
    scale: float,
    softcap: float | None,
    tiles: TileConfig,
    k_smem,
    v_smem,
    q_smem,
    dout_smem,
    statistics_smem,
    spans_smem,
    kv_loaded,
    kv_free,
    loaded,
    free,
    done,
    **outbox_memory,
) -> None:
    kv_heads, tokens = k_gmem.shape[2], k_gmem.shape[1]
    share = Share(lax.axis_index("block"), dealt, kv_heads, tasks_gmem)
    group = lax.axis_index("group")
    heads, head_size = q_gmem.shape[2] // kv_heads, q_gmem.shape[3]
    row_groups = tiles.dkv_k // WARPGROUP_ROWS
    shares_rows = row_groups == 1
    columns = head_size // 2 if shares_rows else head_size
    row_group = 0 if shares_rows else group
    outbox = Outbox(dscores_gmem, tokens, **outbox_memory) if outbox_memory else None
    lse_smem, delta_smem = (statistics_smem.at[:, i] for i in range(2))

    @pl.when(group == GROUPS)
    def _load():
        plgpu.set_max_registers(24, action="decrease")
        kv_ring = Ring((k_smem, v_smem), kv_loaded, kv_free)
        buffers = (q_smem, dout_smem, lse_smem, delta_smem, spans_smem)
        streams = (q_gmem, dout_gmem, lse_gmem, delta_gmem, spans_gmem)
        rings = kv_ring, Ring(buffers, loaded, free)
        _stream_queries((k_gmem, v_gmem), streams, rings, share, outbox, tiles)

    mine = pl.ds(group * columns, columns) if shares_rows else slice(None)

    def compute(task, begun):
        """Makes one block, after so many steps of earlier ones; returns their sum."""
        _, (_, block, begin, *parts, end) = share.take(task)
        first, full_first, full_stop, stop = (
            parts[i] if shares_rows else jnp.where(group == 0, parts[i], parts[4 + i])
            for i in range(4)
        )
        steps = end - begin
        kv_at = lax.rem(task, jnp.int32(tiles.buffers))
        tile = kv_at * row_groups + row_group
        k_tile, v_tile = k_smem.at[tile], v_smem.at[tile]
        plgpu.barrier_wait(kv_loaded.at[kv_at])

        def step(number, carry):
            turn, *gradients = carry
            if shares_rows:
                gradients = see(number, turn, *gradients)
            else:
                is_seen = (turn >= first) & (turn < stop)
                gradients = lax.cond(is_seen, see, pass_by, number, turn, *gradients)
            turn += 1
            return jnp.where(turn == steps, 0, turn), *gradients

        def pass_by(number, _, *gradients):
            at = lax.rem(number, jnp.int32(tiles.dkv_stages))
            plgpu.barrier_wait(loaded.at[at])
            if outbox is not None:
                outbox.claim(number)
            plgpu.barrier_arrive(free.at[at])
            return gradients

        def see(number, turn, *gradients):
            at = lax.rem(number, jnp.int32(tiles.dkv_stages))

            def products(dk_ref, dv_ref, scores_ref):
                dk_ref[...], dv_ref[...] = gradients
                plgpu.barrier_wait(loaded.at[at])
                plgpu.wgmma(scores_ref, k_tile, q_smem.at[at].T)
                # Its registers are cleared while the first product runs.
                later = functools.partial(later_products, dk_ref, dv_ref, scores_ref)
                pl.run_scoped(later, accumulator(tiles.dkv_q))
                results = dk_ref[...], dv_ref[...]
                plgpu.barrier_arrive(free.at[at])
                return results

            def later_products(dk_ref, dv_ref, scores_ref, dweights_ref):
                plgpu.wgmma(dweights_ref, v_tile, dout_smem.at[at].T)
                lse = plgpu.load(statistics_smem.at[at, 0], layout=_COLUMNS)
                scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
                weights, slope = weights_of(scores, lse, 1, scale, softcap)
                # Mask and ds take the rounded weights: half of the registers. Without
                # the barrier LLVM rounds them one by one, as slow as the powers.
                weights = lax.optimization_barrier(weights.astype(q_smem.dtype))
                first_key = _keys(block, row_group, tiles).start
                masked = functools.partial(
                    _without_hidden, spans_smem.at[at], first_key
                )
                is_full = (turn >= full_first) & (turn < full_stop)
                weights = lax.cond(is_full, lambda all_seen: all_seen, masked, weights)
                plgpu.wgmma(dv_ref, weights, dout_smem.at[at, :, mine])
                delta = plgpu.load(statistics_smem.at[at, 1], layout=_COLUMNS)
                dweights = plgpu.wgmma_accumulator_load(dweights_ref, wait_n=1)
                dscores = dweights - along(delta, dweights.shape, 1)
                dscores *= weights.astype(jnp.float32)
                if slope is not None:
                    dscores *= slope
                dscores = dscores.astype(q_smem.dtype)
                if outbox is not None:
                    outbox.put(number, group, dscores)
                plgpu.wgmma(dk_ref, dscores, q_smem.at[at, :, mine])
                # The statistics were read, copies may overwrite. The fence takes a
                # while: beside the last product it costs nothing.
                plgpu.commit_smem()

            gradient = accumulator(columns)
            return pl.run_scoped(products, gradient, gradient, accumulator(tiles.dkv_q))

        done_by = begun + heads * steps
        carry = (jnp.int32(0), zeros(columns), zeros(columns))
        _, dk, dv = lax.fori_loop(begun, done_by, step, carry)
        # Read again: no registers are left to keep them.
        kv_head, (row, *_) = share.take(lax.optimization_barrier(task))
        place = (row, _keys(block, row_group, tiles), kv_head)
        results = (
            (dk * scale, k_tile, dk_gmem.at[place]),
            (dv, v_tile, dv_gmem.at[place]),
        )
        _store(results, group, done if shares_rows else None)
        plgpu.barrier_arrive(kv_free.at[kv_at])
        return done_by

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        lax.fori_loop(0, share.total, compute, jnp.int32(0))


def _keys(block, row_group, tiles: TileConfig):
    """Returns the 64 keys of a warpgroup."""
    start = block * tiles.dkv_k + row_group * WARPGROUP_ROWS
    return pl.ds(start, WARPGROUP_ROWS)


def _stream_queries(
    keys_and_values, streams, rings, share: Share, outbox, tiles: TileConfig
) -> None:
    """Brings blocks of keys, and with each the queries of all heads that share it.

    Args:
      keys_and_values: Two arrays.
      streams: Queries, gradients of the output, statistics and spans.
      rings: What the two kinds go through.
      share: The blocks of keys.
      outbox: Sends what the other warpgroups put, or None.
      tiles: Of the kernel.
    """
    kv_ring, queries_ring = rings
    q_gmem, dout_gmem, lse_gmem, delta_gmem, spans_gmem = streams
    q_heads = q_gmem.shape[2]
    heads, row_groups = q_heads // share.heads, tiles.dkv_k // WARPGROUP_ROWS

    def load(task, carry):
        kv_head, (row, block, begin, *parts, end) = share.take(task)
        at = kv_ring.claim(task)
        for i in range(row_groups):
            place = row, _keys(block, i, tiles), kv_head
            for gmem, smem in zip(keys_and_values, kv_ring.buffers, strict=True):
                target = smem.at[at * row_groups + i]
                plgpu.copy_gmem_to_smem(gmem.at[place], target, kv_ring.loaded.at[at])

        def step(head, i, carry):
            number, unsent = carry
            queries = pl.ds(i * tiles.dkv_q, tiles.dkv_q)
            q_head = kv_head * heads + head
            queries_ring.fill(
                number,
                q_gmem.at[row, queries, q_head],
                dout_gmem.at[row, queries, q_head],
                lse_gmem.at[row, q_head, queries],
                delta_gmem.at[row, q_head, queries],
                spans_gmem.at[row, :, queries],
            )
            if outbox is not None:
                outbox.send(number - tiles.dkv_stages, unsent[0])
                turn = i - begin
                seen = [(turn >= parts[n]) & (turn < parts[n + 3]) for n in (0, 4)]
                address = outbox.address(row * q_heads + q_head, block, i, seen)
                unsent = (*unsent[1:], address)
            return number + 1, unsent

        def over_head(head, carry):
            return lax.fori_loop(begin, end, functools.partial(step, head), carry)

        return lax.fori_loop(0, heads, over_head, carry)

    unsent = () if outbox is None else outbox.nowhere()
    steps, unsent = lax.fori_loop(0, share.total, load, (jnp.int32(0), unsent))
    queries_ring.drain(steps)
    kv_ring.drain(share.total)
    if outbox is not None:
        outbox.drain(steps, unsent)


def _without_hidden(spans, first_key, weights):
    """Returns the weights, 0 where a query does not see a key."""
    first, end = (plgpu.load(spans.at[i], layout=_COLUMNS) for i in range(2))
    mask = is_seen(weights.shape, first_key, first, end, axis=1)
    return jnp.where(mask, weights, jnp.zeros_like(weights))


def _store(results, group, done) -> None:
    """Stores gradients by way of shared memory that no product reads any more.

    With `done` two warpgroups hold half of the features each, and store one each.
    """
    if done is not None:
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
    for gradient, smem, _ in results:
        columns = gradient.shape[1]
        mine = slice(None) if done is None else pl.ds(group * columns, columns)
        smem.at[:, mine][...] = gradient.astype(smem.dtype)
    plgpu.commit_smem()
    if done is not None:
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
    for i, (_, smem, gmem) in enumerate(results):
        copy = functools.partial(plgpu.copy_smem_to_gmem, smem, gmem)
        if done is None:
            copy()
        else:
            pl.when(group == i)(copy)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
