"""Ranks by importance: where a direction of the gradient is worth its parameters."""

import heapq
from collections.abc import Mapping, Sequence

from fastjax.lora_config import LoRAConfig

# A module has at least this share of the even rank, and at most so many times it.
_LEAST_SHARE, _MOST_TIMES = 0.25, 4


def probe_of(lora: LoRAConfig) -> LoRAConfig:
    """Returns the adapters by which the gradients of an adapter's linears are measured.

    They hold as many directions as a module may get.
    """
    rank = _MOST_TIMES * lora.lora_r
    return LoRAConfig(
        lora_r=rank,
        lora_alpha=float(rank),
        lora_target_modules=lora.lora_target_modules,
        layers_to_transform=lora.layers_to_transform,
        init_lora_weights="gaussian",
    )


def allocated_ranks(
    values: Mapping[str, Sequence[float]], costs: Mapping[str, int], *, rank: int
) -> dict[str, int]:
    """Returns a rank for each module, within what `rank` everywhere would cost.

    The first step of a product of rank R lowers the loss, to first order, by the R
    largest squared singular values of the loss's gradient (2407.05000 section 3.2).
    So each step of rank has a worth, its squares over its parameters, which falls from
    step to step, and the budget goes to the best ones first.

    Args:
      values: Singular values of the gradient of each weight, the largest first.
      costs: Parameters of one rank of each module.
      rank: The even rank, which says what may be spent.
    """
    step = max(1, int(rank * _LEAST_SHARE))
    ranks = {name: min(step, len(found)) for name, found in values.items()}
    budget = sum(rank * costs[name] for name in values)
    budget -= sum(ranks[name] * costs[name] for name in values)

    def offer(name: str) -> tuple[float, str, int] | None:
        """Returns the next step of a module: its worth, negative, and its size."""
        held = ranks[name]
        size = min(step, len(values[name]) - held, _MOST_TIMES * rank - held)
        if size <= 0:
            return None
        gain = sum(value**2 for value in values[name][held : held + size])
        return -gain / (size * costs[name]), name, size

    offers = [found for name in values if (found := offer(name)) is not None]
    heapq.heapify(offers)
    while offers:
        _, name, size = heapq.heappop(offers)
        if size * costs[name] > budget:
            continue  # a cheaper module may still fit
        budget -= size * costs[name]
        ranks[name] += size
        if (following := offer(name)) is not None:
            heapq.heappush(offers, following)
    return ranks
