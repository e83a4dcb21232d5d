"""dq on Hopper from gradients of scores in memory: one product where `dq` makes three.

The dk/dv kernel has the gradient of every score in registers and stores it, in the
16 bits in which it multiplies. What dq is left with is `scale * ds k`, a product that
reads 2 bytes a score: of rows of 4,096 tokens a device of 4.3 TB/s brings these faster
than it would multiply them anew. They grow with the square of the row, so that only
rows within `MAX_BYTES` are taken.

A thread block takes 128 queries of two heads, 64 queries for each warpgroup: where the
heads share keys, it reads the keys once. One thread block runs on a multiprocessor for
the whole launch; one more warpgroup loads and is ahead into the next queries.

Budget at H 128: 208 KiB of shared memory (three stages of 64 keys and their gradients
48 each, results 64; where heads do not share keys, two stages of 64), 128 registers a
thread for the results.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from kernels.device import multiprocessors
from kernels.ring import Ring

from .mosaic_tiles import (
    WARPGROUP_ROWS,
    Share,
    TileConfig,
    accumulator,
    operand,
)
from .spans import Spans, in_parts, visited_keys

KERNEL_NAME = "attention_dq_product"

MAX_BYTES = 5 * 2**28
"""What gradients of scores may take; 32 heads of 2 rows of 4,096 tokens: 1.1 GB."""

_BLOCK = 128  # queries and keys
_HEADS = 2
_HALVES = _BLOCK // WARPGROUP_ROWS
_STEP = WARPGROUP_ROWS
_MOST_STAGES = 3
_SHARED_BYTES = 224 * 2**10  # for results and stages


def dscores_shape(q: jax.ShapeDtypeStruct | Array) -> tuple[int, int]:
    """Returns (rows * heads * tiles * 64 keys, 64 queries).

    A tile has 64 keys and 64 queries. Those of the same keys follow one another, from
    the first queries that can see the block of keys; `tile_of` knows the first one.
    """
    batch, tokens, heads, _ = q.shape
    return batch * heads * _tiles(tokens) * WARPGROUP_ROWS, WARPGROUP_ROWS


def _tiles(tokens: int) -> int:
    """Returns how many tiles a head of a row has."""
    return tile_of(tokens // WARPGROUP_ROWS, tokens) + tokens // WARPGROUP_ROWS


def tile_of(keys: Any, tokens: int) -> Any:
    """Returns which tile 64 keys would have with the first 64 queries of a row.

    Blocks of queries are added to it, from the block on that has the keys.

    Args:
      keys: Blocks of 64 before these.
      tokens: Of a row.
    """
    # Two blocks of 64 keys have the same queries: two less for each pair before it.
    pairs, rest = keys >> 1, keys & 1
    queries = tokens // WARPGROUP_ROWS
    return keys * queries - 2 * pairs * (pairs + rest)


def all_bytes(q: jax.ShapeDtypeStruct | Array, tiles: TileConfig) -> int:
    """Returns what all gradients of scores take; 0 where the kernels cannot store."""
    if not tiles.keeps_dscores or q.shape[2] % _HEADS:
        return 0
    return math.prod(dscores_shape(q)) * q.dtype.itemsize


class Outbox(NamedTuple):
    """Gradients of scores on their way to memory, inside of the dk/dv kernel.

    Two warpgroups put those of 64 keys each, the one that loads sends them some steps
    later. Steps are counted over all blocks of keys of the thread block.

    Attributes:
      gmem: Of `dscores_shape`.
      tokens: Of a row.
      outbox_smem: By warpgroup and stage.
      outbox_free: Barriers, one a stage, that sending arrives at.
    """

    gmem: Any
    tokens: int
    outbox_smem: Any
    outbox_free: Any

    @staticmethod
    def memory(stages: int, dtype: jnp.dtype) -> dict[str, Any]:
        """Returns the shared memory, by name."""
        shape = (_HALVES, stages, WARPGROUP_ROWS, WARPGROUP_ROWS)
        return {
            "outbox_smem": operand(shape, dtype),
            "outbox_free": plgpu.Barrier(num_barriers=stages),
        }

    def put(self, step: Any, group: Any, dscores: Any) -> None:
        """Writes a step's gradients; `commit_smem` and a barrier have to follow."""
        self.outbox_smem.at[group, self.claim(step)][...] = dscores

    def claim(self, step: Any) -> Any:
        """Returns the stage of a step, once what it held was sent.

        Each warpgroup claims each step, before it frees the step's queries: then the
        stage is sent again.
        """
        at, is_reused = self._stage(step), step >= self.outbox_free.shape[0]
        pl.when(is_reused)(lambda: plgpu.barrier_wait(self.outbox_free.at[at]))
        return at

    def address(
        self, head: Any, keys: Any, queries: Any, seen: Sequence[Any]
    ) -> tuple[Any, ...]:
        """Returns where a step's gradients go: a tile for each warpgroup, or -1.

        Args:
          head: Among those of all rows.
          keys: Blocks of 128 before these.
          queries: Blocks of 64 before these.
          seen: Whether they see the keys of each warpgroup.
        """
        before = head * _tiles(self.tokens) + queries
        firsts = (tile_of(keys * _HALVES + i, self.tokens) for i in range(_HALVES))
        return tuple(
            jnp.where(is_seen, before + first, -1)
            for first, is_seen in zip(firsts, seen, strict=True)
        )

    def nowhere(self) -> tuple[tuple[Any, ...], ...]:
        """Returns the addresses of as many steps as are on their way at most."""
        return ((jnp.int32(0),) * _HALVES,) * self.outbox_free.shape[0]

    def send(self, step: Any, address: tuple[Any, ...]) -> None:
        """Copies what both warpgroups put at a step; there is none below 0."""

        @pl.when(step >= 0)
        def _():
            self._copy(step, address)
            plgpu.barrier_arrive(self.outbox_free.at[self._stage(step)])

    def drain(self, steps: Any, addresses: tuple[tuple[Any, ...], ...]) -> None:
        """Copies what was put at the last of so many steps."""
        for i, address in enumerate(addresses):
            step = steps - len(addresses) + i
            pl.when(step >= 0)(functools.partial(self._copy, step, address))

    def _copy(self, step: Any, address: tuple[Any, ...]) -> None:
        def copy(group, tile):
            rows = pl.ds(tile * WARPGROUP_ROWS, WARPGROUP_ROWS)
            source = self.outbox_smem.at[group, self._stage(step)]
            plgpu.copy_smem_to_gmem(source, self.gmem.at[rows])

        for group, tile in enumerate(address):
            pl.when(tile >= 0)(functools.partial(copy, group, tile))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _stage(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.outbox_free.shape[0]))


def key_ranges(spans: Spans) -> Int32[Array, "B I 6"]:
    """Returns for each block of queries which blocks of 64 keys it visits.

    As (begin, begin and end of its first half, of its second half, end).
    """
    return in_parts(visited_keys(spans, WARPGROUP_ROWS, _STEP), _HALVES)


def dq_of_dscores(
    dscores: Array,
    k: Float[Array, "B S K H"],
    tasks: Int32[Array, "tasks numbers"],
    *,
    heads: int,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Returns `scale * ds k`.

    Args:
      dscores: Of `dscores_shape`.
      k: Keys.
      tasks: `visits.tasks` of `key_ranges`.
      heads: Of the queries.
      scale: Of the scores.
    """
    batch, tokens, kv_heads, head_size = k.shape
    shares_keys = heads // kv_heads % _HEADS == 0
    pairs = heads // _HEADS
    dealt = min(multiprocessors(), tasks.shape[0] * pairs)
    tile = functools.partial(operand, dtype=k.dtype)
    gradients = (_HEADS, _HALVES * _STEP, WARPGROUP_ROWS)
    keys = (1 if shares_keys else _HEADS, _STEP, head_size)
    results = (_HALVES, _HEADS, WARPGROUP_ROWS, head_size)
    left = _SHARED_BYTES // k.dtype.itemsize - math.prod(results)
    stages = min(left // (math.prod(gradients) + math.prod(keys)), _MOST_STAGES)
    body = functools.partial(
        _body, dealt=dealt, pairs=pairs, heads_per_key=heads // kv_heads, scale=scale
    )
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, tokens, heads, head_size), k.dtype),
        scratch_types={
            "dscores_smem": tile((stages, *gradients), step=head_size),
            "k_smem": tile((stages, *keys), step=_STEP),
            "dq_smem": tile(results, step=_STEP),
            "loaded": plgpu.Barrier(num_arrivals=_HEADS + keys[0], num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=_HALVES, num_barriers=stages),
        },
        grid=(dealt,),
        grid_names=("block",),
        num_threads=_HALVES + 1,
        thread_name="half",
        kernel_name=KERNEL_NAME,
    )(dscores, k, tasks)


def _body(
    dscores_gmem,
    k_gmem,
    tasks_gmem,
    dq_gmem,
    *,
    dealt: int,
    pairs: int,
    heads_per_key: int,
    scale: float,
    dscores_smem,
    k_smem,
    dq_smem,
    loaded,
    free,
) -> None:
    share = Share(lax.axis_index("block"), dealt, pairs, tasks_gmem)
    half, head_size = lax.axis_index("half"), k_gmem.shape[3]

    def slot(step):
        return lax.rem(step, jnp.int32(free.shape[0]))

    @pl.when(half == _HALVES)
    def _load():
        plgpu.set_max_registers(24, action="decrease")
        ring = Ring((dscores_smem, k_smem), loaded, free)

        def load(number, begun):
            pair, (row, block, begin, first, stop, *_, end) = share.take(number)

            def step(turn, _):
                keys = begin + turn
                at = ring.claim(begun + turn)
                tile = tile_of(keys, k_gmem.shape[1]) + block * _HALVES

                def bring(half):
                    """Copies the gradients of both halves, or from one on."""
                    size = (_HALVES - half) * _STEP
                    for i in range(_HEADS):
                        head = (row * pairs + pair) * _HEADS + i
                        first = head * _tiles(k_gmem.shape[1]) + tile + half
                        source = dscores_gmem.at[pl.ds(first * _STEP, size)]
                        target = dscores_smem.at[at, i, pl.ds(half * _STEP, size)]
                        plgpu.copy_gmem_to_smem(source, target, loaded.at[at])

                # On the diagonal the first half of the queries sees no key.
                is_seen = (turn >= first) & (turn < stop)
                pl.when(is_seen)(functools.partial(bring, 0))
                pl.when(jnp.logical_not(is_seen))(functools.partial(bring, 1))
                for i in range(k_smem.shape[1]):
                    head = lax.div(pair * _HEADS + i, jnp.int32(heads_per_key))
                    plgpu.copy_gmem_to_smem(
                        k_gmem.at[row, pl.ds(keys * _STEP, _STEP), head],
                        k_smem.at[at, i],
                        loaded.at[at],
                    )

            lax.fori_loop(0, end - begin, step, None)
            return begun + end - begin

        ring.drain(lax.fori_loop(0, share.total, load, jnp.int32(0)))

    def compute(number, begun):
        """Makes one block, after so many steps of earlier ones; returns their sum."""
        pair, (row, block, begin, *halves, end) = share.take(number)
        first, stop = (
            begin + jnp.where(half == 0, halves[i], halves[2 + i]) for i in range(2)
        )

        def skip(step, _):
            at = slot(begun + step - begin)
            plgpu.barrier_wait(loaded.at[at])
            plgpu.barrier_arrive(free.at[at])

        def products(*dq_refs):
            def step(keys, _):
                at = slot(begun + keys - begin)
                plgpu.barrier_wait(loaded.at[at])
                for i, dq_ref in enumerate(dq_refs):
                    gradients = dscores_smem.at[at, i, pl.ds(half * _STEP, _STEP)]
                    values = k_smem.at[at, min(i, k_smem.shape[1] - 1)]
                    plgpu.wgmma(dq_ref, gradients.T, values)
                plgpu.wgmma_wait(len(dq_refs))

                @pl.when(keys > first)
                def _():
                    plgpu.barrier_arrive(free.at[slot(begun + keys - begin - 1)])

            lax.fori_loop(first, stop, step, None)
            plgpu.wgmma_wait(0)
            pl.when(stop > first)(
                lambda: plgpu.barrier_arrive(free.at[slot(begun + stop - begin - 1)])
            )
            # The last block's results were copied from where these go.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i, dq_ref in enumerate(dq_refs):
                dq_smem.at[half, i][...] = (dq_ref[...] * scale).astype(dq_smem.dtype)

        lax.fori_loop(begin, first, skip, None)
        pl.run_scoped(products, *[accumulator(head_size)] * _HEADS)
        plgpu.commit_smem()
        queries = pl.ds(block * _BLOCK + half * WARPGROUP_ROWS, WARPGROUP_ROWS)
        for i in range(_HEADS):
            target = dq_gmem.at[row, queries, pair * _HEADS + i]
            plgpu.copy_smem_to_gmem(dq_smem.at[half, i], target)
        lax.fori_loop(stop, end, skip, None)
        return begun + end - begin

    @pl.when(half < _HALVES)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        lax.fori_loop(0, share.total, compute, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
