"""Gated activation of the feed-forward block: SwiGLU and GeGLU."""

from .api import ACTIVATIONS as ACTIVATIONS
from .api import gated_activation as gated_activation
from .api import gated_mlp as gated_mlp
from .composed import unit_of as unit_of
from .vjp import RESIDUAL_NAMES as RESIDUAL_NAMES
