"""Root-mean-square normalisation, alone or with the residual add."""

from .api import add_rms_norm as add_rms_norm
from .api import rms_norm as rms_norm
