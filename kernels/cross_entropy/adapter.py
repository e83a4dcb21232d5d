"""A low-rank adapter of the output table, apart from the table."""

from typing import NamedTuple

from jaxtyping import Array, Float


class HeadAdapter(NamedTuple):
    """What adds `down @ up^T` to the logits; both get gradients.

    Added to a table of 16 bits, a small product would be lost in rounding.

    Attributes:
      down: Hidden states times the down projection, scaled.
      up: Up projection; products take it in the dtype of the hidden states.
    """

    down: Float[Array, "M R"]
    up: Float[Array, "V R"]
