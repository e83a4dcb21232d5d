"""The fastest remat plan that fits: what each layer keeps, from measured costs."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

from fastjax.config import RematPolicy
from fastjax.remat import RematPlan

_EARLIEST_FIRST: tuple[RematPolicy, ...] = (
    "offload",
    "layer_offload",
    "layer",
    "attention",
    "norms",
    "none",
)
"""Order of the layers of a plan.

The last layers are the first of the backward pass: what they keep is gone when the
early ones recompute, and an early layer has the most time to travel to the host.
"""

_GAIN_OF_WRITING_OUT: Mapping[RematPolicy, float] = {
    "attention": 0.015,
    "norms": 0.055,
    "none": 0.055,
}
"""Share of a layer's time, measured on an H200 with Llama-3-8B."""
_SECONDS_OF_WRITING_OUT = 0.5
"""Of compilation, a layer; the same."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PolicyCost:
    """What one policy costs: of a step without layers, and of each layer.

    Attributes:
      base_seconds: Embedding, loss, optimiser and all else that is done once.
      base_bytes: The workspace of a step.
      layer_seconds: Of one layer, forward and backward.
      layer_bytes: That one layer keeps on the device.
      layer_host_bytes: That one layer keeps in host memory.
    """

    base_seconds: float
    base_bytes: float
    layer_seconds: float
    layer_bytes: float
    layer_host_bytes: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A plan and what it is predicted to cost.

    Attributes:
      remat: The plan.
      seconds: Of a micro-batch; None when nothing could be timed.
      bytes: Of activations and workspace.
    """

    remat: RematPlan
    seconds: float | None
    bytes: float

    def prediction(self, tokens: int) -> dict[str, float]:
        """Returns the peak and the speed; no speed where none was timed.

        Args:
          tokens: Of a micro-batch.
        """
        costs = {"peak_gib": self.bytes / 2**30}
        if self.seconds is not None:
            costs["tokens_per_second"] = tokens / self.seconds
        return costs

    def described(self, tokens: int) -> str:
        """Returns the plan and its predicted costs, for people."""
        predicted = self.prediction(tokens)
        text = f"{self.remat}; predicted {predicted['peak_gib']:.2f} GiB"
        speed = predicted.get("tokens_per_second")
        return text if speed is None else f"{text} and {speed:,.0f} tokens/s"


def fastest(
    costs: Mapping[RematPolicy, PolicyCost],
    *,
    num_layers: int,
    limit_bytes: float,
    host_limit_bytes: float = math.inf,
    is_unrolled: bool = False,
) -> Choice | None:
    """Returns the fastest plan within the limit, None when no plan is.

    Every way to share the layers out among the policies is compared: what a layer
    costs does not depend on its place.

    Args:
      costs: Of the policies that may be used.
      num_layers: Of the decoder.
      limit_bytes: Of activations and workspace.
      host_limit_bytes: Of activations in host memory.
      is_unrolled: The plan writes layers out.
    """
    names: list[RematPolicy] = [name for name in _EARLIEST_FIRST if name in costs]
    if not names:
        return None
    best, least = None, math.inf
    for counts in _shares(num_layers, len(names)):
        used = [(costs[name], n) for name, n in zip(names, counts, strict=True) if n]
        size = max(cost.base_bytes for cost, _ in used)
        size += sum(n * cost.layer_bytes for cost, n in used)
        seconds = max(cost.base_seconds for cost, _ in used)
        seconds += sum(n * cost.layer_seconds for cost, n in used)
        host = sum(n * cost.layer_host_bytes for cost, n in used)
        if size > limit_bytes or host > host_limit_bytes or seconds >= least:
            continue
        least = seconds
        policies: list[RematPolicy] = []
        for name, count in zip(names, counts, strict=True):
            policies.extend(itertools.repeat(name, count))
        remat = RematPlan(policies=tuple(policies), is_unrolled=is_unrolled)
        best = Choice(remat=remat, seconds=seconds, bytes=size)
    return best


def written_out(choice: Choice, *, micro_batches: int) -> Choice:
    """Returns the choice with its layers written out, where a run gains time by that.

    Args:
      choice: A plan that scans, of known time.
      micro_batches: Of the run; with 0 nothing is gained.
    """
    assert choice.seconds is not None
    plan = dataclasses.replace(choice.remat, is_unrolled=True)
    written: list[RematPolicy] = [p for p in plan.policies if plan.writes_out(p)]
    share = sum(_GAIN_OF_WRITING_OUT[policy] for policy in written)
    gain = share * choice.seconds / len(plan.policies)
    if micro_batches * gain <= len(written) * _SECONDS_OF_WRITING_OUT:
        return choice
    return dataclasses.replace(choice, remat=plan, seconds=choice.seconds - gain)


def _shares(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yields every way to write `total` as an ordered sum of so many parts."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _shares(total - first, parts - 1):
            yield (first, *rest)
