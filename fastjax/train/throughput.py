"""What a device could do at most, to say how much of it a run uses."""

# Dense bfloat16 products with float32 sums, in TFLOP/s, from NVIDIA's data sheets.
_PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10": 125,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of a device, None when it is not known."""
    found = [name for name in _PEAK_TFLOPS if name in device_kind]
    return _PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None


def roofline_share(
    tokens_per_second: float, flops_per_token: float, device_kind: str
) -> float | None:
    """Returns the share of the device's peak that the useful products take.

    Recomputed products are not counted as useful, nor are padding and attention's
    scores: it is a lower bound.

    Args:
      tokens_per_second: Without padding.
      flops_per_token: Of forward and backward pass; 0 when not known.
      device_kind: As JAX names it.
    """
    peak = peak_flops(device_kind)
    if peak is None or not flops_per_token:
        return None
    return tokens_per_second * flops_per_token / peak
