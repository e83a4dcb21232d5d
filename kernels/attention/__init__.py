"""Causal grouped-query attention."""

from .api import attention as attention
from .api import attention_visits as attention_visits
from .flash import dscores_bytes as dscores_bytes
from .flash import most_dscores_bytes as most_dscores_bytes
from .visits import Visits as Visits
from .vjp import RESIDUAL_NAMES as RESIDUAL_NAMES
from .vjp import SAVED_PRIMITIVES as SAVED_PRIMITIVES
