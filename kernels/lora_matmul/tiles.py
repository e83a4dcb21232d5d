"""How the large products are cut into tiles, and the choice for a shape."""

from collections.abc import Sequence
from dataclasses import dataclass

from kernels.dispatch import UnsupportedOp

MAX_RANK = 256
"""Ranks of a group together: columns of one wgmma instruction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """Tiles of one block: two warpgroups multiply a half of the columns each.

    The defaults were the fastest of those timed on an H200; three stages cost 8 %.

    Attributes:
      tile_m: Rows.
      tile_n: Columns.
      tile_k: Contracted elements of one step; 64 of 16 bits are a swizzled line.
      stages: Steps in shared memory at a time.
      width: Columns of tiles that blocks walk along together, for the L2 cache.
    """

    tile_m: int = 128
    tile_n: int = 256
    tile_k: int = 64
    stages: int = 4
    width: int = 8

    def __post_init__(self) -> None:
        if self.tile_m % 64 or self.tile_n % 128 or self.tile_k % 64:
            raise ValueError(f"{self} does not suit wgmma")


def tiles_for(rows: int, widths: Sequence[int]) -> TileConfig:
    """Returns the tiles for results of `rows` and each of `widths`.

    Raises:
      UnsupportedOp: The sizes are no multiples of any tile.
    """
    for tile_n in (256, 128):
        if rows % 128 == 0 and all(width % tile_n == 0 for width in widths):
            return TileConfig(tile_n=tile_n)
    raise UnsupportedOp(f"{rows=} and {widths=} must be multiples of 128")
