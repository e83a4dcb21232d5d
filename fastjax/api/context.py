"""Whether documents stay within the positions that a model can tell apart."""

from collections.abc import Callable
from typing import Any

from fastjax.api.language_model import LanguageModel
from fastjax.config import TrainConfig
from fastjax.data import TrainingData
from fastjax.errors import ConfigError
from fastjax.models.transformer_config import TransformerConfig


def note_context(
    sizes: TransformerConfig,
    config: TrainConfig,
    data: TrainingData,
    *,
    note: Callable[[str], None],
) -> None:
    """Says how RoPE is stretched, if the run asks for it, and checks the documents.

    Raises:
      ConfigError: A document is longer than the context.
    """
    require_context(sizes, data)
    if config.rope_scaling == "none":
        return
    reached, rope = sizes.context_tokens, sizes.rope
    # A stretch reaches as far as rows may; what reaches further was so before.
    if (rope.kind, reached) == (config.rope_scaling, config.reach):
        text = (
            f"context of {reached:,} tokens by {rope.kind} RoPE, stretched "
            f"{rope.factor:g} times; whole models say it in their config.json"
        )
        if not config.full_finetuning:
            text += ", for PEFT and vLLM the adapter's README.md says what to give them"
        note(text)
    else:
        note(f"rope_scaling has no effect: the model's context is {reached:,} tokens")


def require_context(sizes: TransformerConfig, data: TrainingData) -> None:
    """Raises what `context_fault` returns."""
    fault = context_fault(sizes, data)
    if fault is not None:
        raise fault


def context_fault(sizes: TransformerConfig, data: TrainingData) -> ConfigError | None:
    """Returns what is wrong where a document is longer than the model's context."""
    lengths = [part.lengths.max() for part in (data.train, data.evaluation) if part]
    longest, context = int(max(lengths, default=0)), sizes.context_tokens
    if longest <= context:
        return None
    fix, kind = f"set max_length to {context}", sizes.rope.kind
    if kind in ("default", "linear", "dynamic", "yarn"):
        able = "linear, dynamic or yarn" if kind == "default" else kind
        fix += (
            f", or rope_scaling to {able}, which stretches the context to "
            "max_length (Python: rope_scaling and a larger max_seq_length of "
            "FastLanguageModel.from_pretrained)"
        )
    return ConfigError(
        f"a document has {longest:,} tokens, the model's context is {context:,}",
        fix=fix,
        code="FJ-CONFIG-CONTEXT",
    )


def settled_scaling(
    model: LanguageModel, config: TrainConfig, *, given: frozenset[str], max_length: int
) -> dict[str, Any]:
    """Returns the fields of a run that give a loaded model's context once more.

    Args:
      model: May be stretched.
      config: What the settings say.
      given: Names of the settings that the user gave.
      max_length: Longest row in tokens.

    Raises:
      ConfigError: The settings ask for another context than the model has.
    """
    stretch, context = model.stretch, model.config.context_tokens
    scaling = config.rope_scaling if "rope_scaling" in given else None
    length = config.context_length
    if stretch is None:
        is_met = scaling in (None, "none") or (length or max_length) <= context
    else:
        is_met = scaling in (None, stretch.scaling) and length in (None, context)
    if not is_met:
        asked = f"rope_scaling={scaling}" if length is None else f"{length:,} tokens"
        raise ConfigError(
            f"{asked} has no effect here: the model is loaded already, with a context "
            f"of {context:,} tokens",
            fix="give rope_scaling and max_seq_length to "
            "FastLanguageModel.from_pretrained",
        )
    if stretch is None:
        return {"rope_scaling": scaling or "none", "context_length": length}
    if max_length > context:
        raise ConfigError(
            f"max_length={max_length} is beyond the context of {context:,} tokens to "
            "which the model was stretched",
            fix=f"set max_length to {context}, or load the base with "
            f"max_seq_length={max_length}",
        )
    longer = None if max_length == context else context
    return {"rope_scaling": stretch.scaling, "context_length": longer}
