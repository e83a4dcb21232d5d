"""Which implementation of an op runs, by the names that kernels give them."""

import dataclasses

from fastjax.config_rules import require

_USUAL = ("mosaic_gpu", "xla", "reference")
IMPLEMENTATION_NAMES = {
    "attention": ("mosaic_gpu", "cudnn", "mosaic_gpu_cudnn", "xla", "reference"),
    "lora_matmul": _USUAL,
    "rms_norm": _USUAL,
    "rope": ("xla", "reference"),
    "gated_mlp": _USUAL,
    "cross_entropy": _USUAL,
}
"""Written down here, so that a wrong name is told before any kernel is imported."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Implementations:
    """Implementation of each op by name; None takes the first that can run."""

    attention: str | None = None
    lora_matmul: str | None = None
    rms_norm: str | None = None
    rope: str | None = None
    gated_mlp: str | None = None
    cross_entropy: str | None = None

    def __post_init__(self) -> None:
        rules = {
            op: (
                getattr(self, op) in (None, *names),
                f"an implementation of {op}: {', '.join(names)}",
            )
            for op, names in IMPLEMENTATION_NAMES.items()
        }
        require(self, **rules)
