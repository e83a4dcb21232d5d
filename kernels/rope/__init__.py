"""Rotary position embedding."""

from .api import rope as rope
from .tables import rotary_tables as rotary_tables
