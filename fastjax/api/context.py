"""Whether documents stay within the positions that a model can tell apart."""

from collections.abc import Callable

from conversions.peft import Stretch
from fastjax.config import RopeScaling, TrainConfig
from fastjax.data import TrainingData
from fastjax.errors import ConfigError
from fastjax.models.transformer_config import TransformerConfig
from fastjax.rope_config import RopeKind


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
    if (rope.kind, reached) == (config.rope_scaling, config.data.max_length):
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
    stretch: Stretch | None,
    context: int,
    *,
    asked: RopeScaling | None,
    max_length: int,
) -> RopeKind:
    """Returns the `rope_scaling` that gives a loaded model's context once more.

    Args:
      stretch: How the model was stretched.
      context: Of the model, in tokens.
      asked: What the settings say; None if nothing.
      max_length: Longest row in tokens.

    Raises:
      ConfigError: The settings ask for another context than the model has.
    """
    if stretch is None:
        is_met = asked in (None, "none") or max_length <= context
    else:
        is_met = asked in (None, stretch.scaling)
    if not is_met:
        raise ConfigError(
            f"rope_scaling={asked} has no effect here: the model is loaded already, "
            f"with a context of {context:,} tokens",
            fix="give rope_scaling and max_seq_length to "
            "FastLanguageModel.from_pretrained",
        )
    if stretch is None:
        return asked or "none"
    if max_length != context:
        raise ConfigError(
            f"max_length={max_length} is not the context of {context:,} tokens to "
            "which the model was stretched: the run's record would tell another model",
            fix=f"set max_length to {context}, or load the base with "
            f"max_seq_length={max_length}",
        )
    return stretch.scaling
