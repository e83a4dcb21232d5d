"""Frozen weights with low-rank adapters (arxiv.org/abs/2106.09685)."""

from .api import check_projection as check_projection
from .api import check_residual as check_residual
from .api import lora_matmul as lora_matmul
from .api import lora_matmul_group as lora_matmul_group
from .branch import scaled_down_product as scaled_down_product
from .projection import Projection as Projection
from .vjp import RESIDUAL_NAMES as RESIDUAL_NAMES
