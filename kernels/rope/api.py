"""Rotary position embedding of queries and keys."""

from jaxtyping import Array, Float, Float32

from kernels import dispatch

from . import reference, vjp


def rope(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    cos: Float32[Array, "B T H//2"],
    sin: Float32[Array, "B T H//2"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Returns q and k, halves (x, y) of a head as `(x cos - y sin, y cos + x sin)`.

    Rotated by the angles of their positions, arxiv.org/abs/2104.09864, with Hugging
    Face's pairing: feature i turns with feature i + H/2. Computes in float32, returns
    the dtypes of `q` and `k`. The tables, which `rotary_tables` makes, are constants:
    they get no gradient.

    Args:
      q: Queries.
      k: Keys.
      cos: Cosines, scaled or not.
      sin: Sines, scaled as the cosines.
      implementation: "xla" or "reference"; None takes the first able.

    Raises:
      ValueError: The sizes disagree.
    """
    half = (*q.shape[:2], q.shape[3] // 2)
    if q.shape[3] % 2 or q.shape[::3] != k.shape[::3] or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"q and k must share an even head size: {q.shape=}, {k.shape=}"
        )
    if cos.shape != half or sin.shape != half:
        raise ValueError(f"tables must be {half}: {cos.shape=}, {sin.shape=}")
    return dispatch.run(
        "rope",
        {"xla": vjp.rope, "reference": reference.rope},
        implementation,
        q,
        k,
        cos,
        sin,
    )
