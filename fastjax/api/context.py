"""Whether documents stay within the positions that a model can tell apart."""

from collections.abc import Callable

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
    if rope.kind == config.rope_scaling:
        note(
            f"context of {reached:,} tokens by {rope.kind} RoPE, stretched "
            f"{rope.factor:g} times; merged models know it, for PEFT and vLLM the "
            "adapter's README.md says what to give them"
        )
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
    return ConfigError(
        f"a document has {longest:,} tokens, the model's context is {context:,}",
        fix="set rope_scaling to linear, dynamic or yarn, which stretch the "
        f"context to max_length, or max_length to {context}",
        code="FJ-CONFIG-CONTEXT",
    )
