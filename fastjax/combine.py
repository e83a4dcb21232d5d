"""Several adapters of one base as a single one."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastjax.config import CombineMethod, LoRAConfig, Table
from fastjax.errors import ConfigError

type Factors = tuple[Float[Array, "I _"], Float[Array, "_ O"]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One adapter of a combination.

    Attributes:
      lora: What it is.
      weights: Its arrays by canonical name.
      factor: How much of it the combination has.
    """

    lora: LoRAConfig
    weights: Mapping[str, Array]
    factor: float


def combined(
    parts: Sequence[Part], *, method: CombineMethod, rank: int | None = None
) -> tuple[LoRAConfig, dict[str, Array]]:
    """Returns an adapter that does what the sum of `factor * adapter` does.

    "concat" puts the factors side by side: exact, and the ranks add up. "svd" is the
    nearest product of rank `rank` to that sum. "linear" adds the factors themselves,
    each times the root of its share, as PEFT's method of that name: it keeps the rank
    and mixes the adapters' directions, so it is no sum unless they agree.

    Args:
      parts: Plain LoRA or rsLoRA of one base.
      method: How.
      rank: Of "svd"; None takes the largest of the parts.

    Raises:
      ConfigError: A part trains more than low-rank factors, or ranks differ.
    """
    for part in parts:
        _require_plain(part)
    modules = dict.fromkeys(module for part in parts for module in _modules(part))
    wanted = rank or max(part.lora.lora_r for part in parts)
    found: dict[str, Factors] = {}
    for module in modules:
        held = [_scaled(part, module) for part in parts if module in _modules(part)]
        match method:
            case "concat":
                found[module] = _side_by_side(held)
            case "svd":
                found[module] = _truncated(_side_by_side(held), wanted)
            case "linear":
                found[module] = _added(held, module)
    ranks = {module: down.shape[1] for module, (down, _) in found.items()}
    most = max(ranks.values())
    others = [f"model.{m}={r}" for m, r in ranks.items() if r != most]
    lora = LoRAConfig(
        lora_r=most,
        lora_alpha=float(most),
        lora_target_modules=tuple(f"model.{module}" for module in modules),
        rank_pattern=tuple(others),
        alpha_pattern=tuple(others),
    )
    weights = {f"{module}.lora_a": down for module, (down, _) in found.items()}
    return lora, weights | {f"{m}.lora_b": up for m, (_, up) in found.items()}


def _require_plain(part: Part) -> None:
    lora = part.lora
    more = {
        "DoRA": lora.use_dora,
        "trained biases": lora.lora_bias != "none" or lora.lora_b_bias,
        "trained embeddings": bool(lora.modules_to_save) or _on_tables(part),
        "trained tokens": bool(lora.trainable_token_indices),
        "a start by LoftQ": lora.init_lora_weights == "loftq",
    }
    names = [name for name, is_so in more.items() if is_so]
    if names:
        raise ConfigError(
            f"adapters with {', '.join(names)} cannot be combined",
            fix="merge one into the base and train or merge the others onto that",
        )


def _on_tables(part: Part) -> bool:
    return any(module in get_args(Table) for module in _modules(part))


def _modules(part: Part) -> dict[str, None]:
    ends = (name.rpartition(".") for name in part.weights)
    return dict.fromkeys(module for module, _, leaf in ends if leaf == "lora_a")


def _scaled(part: Part, module: str) -> Factors:
    """Returns factors whose product is the part's share of the weight."""
    down, up = part.weights[f"{module}.lora_a"], part.weights[f"{module}.lora_b"]
    share = part.factor * part.lora.scaling(f"model.{module}")
    root = math.sqrt(abs(share))
    return down * math.copysign(root, share), up * root


def _side_by_side(held: Sequence[Factors]) -> Factors:
    downs, ups = zip(*held, strict=True)
    return jnp.concatenate(downs, axis=1), jnp.concatenate(ups, axis=0)


def _added(held: Sequence[Factors], module: str) -> Factors:
    ranks = {down.shape[1] for down, _ in held}
    if len(ranks) > 1:
        raise ConfigError(
            f"{module} has the ranks {sorted(ranks)}; method=linear needs one",
            fix="use concat or svd",
        )
    downs, ups = zip(*held, strict=True)
    return functools.reduce(jnp.add, downs), functools.reduce(jnp.add, ups)


def _truncated(factors: Factors, rank: int) -> Factors:
    """Returns the nearest product of a rank, by way of small matrices alone."""
    down, up = factors
    q, r = jnp.linalg.qr(down)
    p, s = jnp.linalg.qr(up.T)
    highest = lax.Precision.HIGHEST
    middle = jnp.matmul(r, s.T, precision=highest)
    left, values, right = jnp.linalg.svd(middle, full_matrices=False)
    root = jnp.sqrt(values[:rank])
    return (
        jnp.matmul(q, left[:, :rank] * root[None], precision=highest),
        jnp.matmul(right[:rank] * root[:, None], p.T, precision=highest),
    )
