"""Which key tokens a query token sees."""

from jaxtyping import Array, Bool, Int


def visible(
    q_index: Int[Array, "#B T"],
    k_index: Int[Array, " S"],
    *,
    q_segment_ids: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B S"] | None,
    window: int | Int[Array, ""] | None,
) -> Bool[Array, "#B T S"]:
    """Returns `0 <= q - k < window`, within one document, as a mask.

    Segment 0 is padding: it sees nothing and nothing sees it.
    """
    distance = q_index[:, :, None] - k_index[None, None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if q_segment_ids is not None and segment_ids is not None:
        q_segment, k_segment = q_segment_ids[:, :, None], segment_ids[:, None, :]
        mask = mask & (q_segment == k_segment) & (q_segment != 0)
    return mask
