"""Adam with block-wise 8-bit states."""

from .api import adam8bit as adam8bit
from .blocks import BLOCK_SIZE as BLOCK_SIZE
from .blocks import Blocks as Blocks
