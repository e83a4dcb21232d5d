"""Gated activation of the feed-forward block: SwiGLU and GeGLU."""

from .api import ACTIVATIONS as ACTIVATIONS
from .api import gated_activation as gated_activation
