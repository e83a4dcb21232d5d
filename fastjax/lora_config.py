"""Which layers get adapters, of what kind, and what else trains beside them."""

import dataclasses
import math
import re
from typing import Literal

from fastjax.config_rules import Number, is_positive, keep_floats, require
from fastjax.errors import ConfigError

LoRABias = Literal["none", "all", "lora_only"]
LoRAStart = Literal["default", "gaussian", "loftq"]
Table = Literal["embed_tokens", "lm_head"]

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """Which layers get adapters (2106.09685), and of what kind.

    Attributes:
      lora_r: Rank of each adapter; its parameters and memory grow with it.
      lora_alpha: The adapter is multiplied by alpha / r.
      lora_dropout: Share of the adapter's input that is dropped while training.
      lora_target_modules: "all-linear", a regular expression over full module names,
        or names that match by suffix, as in PEFT; embed_tokens and lm_head are among
        them.
      lora_bias: Biases that train: none, all, or those of adapted layers.
      lora_b_bias: The up projection has a bias that trains, PEFT's `lora_bias`.
      use_rslora: Multiply by alpha / sqrt(r) instead (2312.03732).
      use_dora: Train a magnitude for each output feature (2402.09353).
      rank_pattern: Other ranks for some modules, "down_proj=4"; what stands before
        the last "=" is a regular expression for the end of the full name, and the
        first one that matches counts, as in PEFT.
      alpha_pattern: Other alphas for some modules, written alike.
      auto_rank: The first batches decide which modules get more rank and which less,
        within the parameters that `lora_r` everywhere would take.
      layers_to_transform: Only these layers get adapters; none means all.
      init_lora_weights: How adapters start. "default" and "gaussian" start from the
        base model, with a uniform or normal down projection; "loftq" from what 4 bits
        lose of each weight (2310.08659).
      modules_to_save: Tables that train whole: embed_tokens, lm_head; one table that
        is both trains as embed_tokens.
      trainable_token_indices: Tokens whose embeddings train, and no others.
    """

    lora_r: int = 16
    lora_alpha: Number = 16.0
    lora_dropout: Number = 0.0
    lora_target_modules: str | tuple[str, ...] = ALL_LINEAR
    lora_bias: LoRABias = "none"
    lora_b_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: tuple[str, ...] = ()
    alpha_pattern: tuple[str, ...] = ()
    auto_rank: bool = False
    layers_to_transform: tuple[int, ...] = ()
    init_lora_weights: LoRAStart = "default"
    modules_to_save: tuple[Table, ...] = ()
    trainable_token_indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        keep_floats(self)
        ranks = [_value(entry, "rank_pattern") for entry in self.rank_pattern]
        alphas = [_value(entry, "alpha_pattern") for entry in self.alpha_pattern]
        tokens = self.trainable_token_indices
        require(
            self,
            lora_r=(self.lora_r >= 1, "at least 1"),
            lora_alpha=(is_positive(self.lora_alpha), "a positive number"),
            lora_dropout=(0.0 <= self.lora_dropout < 1.0, "in [0, 1)"),
            lora_target_modules=(
                bool(self.lora_target_modules),
                "all-linear, or names of modules",
            ),
            rank_pattern=(
                all(rank >= 1 and rank.is_integer() for rank in ranks),
                "NAME=RANK, with whole numbers of at least 1",
            ),
            alpha_pattern=(
                all(map(is_positive, alphas)),
                "NAME=ALPHA, with positive numbers",
            ),
            auto_rank=(
                not (self.auto_rank and (self.rank_pattern or self.alpha_pattern)),
                "false with rank_pattern or alpha_pattern",
            ),
            layers_to_transform=(
                all(layer >= 0 for layer in self.layers_to_transform),
                "numbers of layers, from 0",
            ),
            trainable_token_indices=(
                all(token >= 0 for token in tokens) and len(set(tokens)) == len(tokens),
                "different token ids",
            ),
            modules_to_save=(
                not tokens or "embed_tokens" not in self.modules_to_save,
                "without embed_tokens when trainable_token_indices names tokens",
            ),
            lora_b_bias=(
                not (self.lora_b_bias and self.use_dora),
                "false with use_dora",
            ),
            init_lora_weights=(
                self.init_lora_weights != "loftq" or not self.use_dora,
                "default or gaussian with use_dora",
            ),
        )

    def rank(self, name: str) -> int:
        """Returns the rank of a module, by its full name."""
        return int(_matched(self.rank_pattern, name, self.lora_r))

    def scaling(self, name: str) -> float:
        """Returns the factor of a module's product, by its full name."""
        rank = self.rank(name)
        alpha = _matched(self.alpha_pattern, name, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _value(entry: str, field: str) -> float:
    """Returns the number of "EXPRESSION=NUMBER"."""
    expression, _, number = entry.rpartition("=")
    try:
        re.compile(expression)
        value = float(number)
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{field}={entry!r} must be the end of a module's name, or an expression "
            f"for it, and a number, such as down_proj=4: {error}"
        ) from error
    if not expression:
        raise ConfigError(f"{field}={entry!r} must name modules before the =")
    return value


def _matched(pattern: tuple[str, ...], name: str, default: Number) -> Number:
    for entry in pattern:
        expression, _, number = entry.rpartition("=")
        if re.fullmatch(rf"(?:.*\.)?(?:{expression})", name):
            return float(number)
    return default
