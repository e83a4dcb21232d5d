"""What a run writes its result with: an adapter, or the whole model."""

from pathlib import Path

from jaxtyping import PyTree

from fastjax.api.language_model import LanguageModel
from fastjax.train.checkpoint import WriteWeights


def adapter_writer(model: LanguageModel) -> WriteWeights | None:
    """Returns what writes adapter and tokenizer; None for a model without adapter."""
    if model.lora is None:
        return None

    def write(folder: Path, trainable: PyTree) -> None:
        model.write_adapter(folder, trainable)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)

    return write


def model_writer(model: LanguageModel) -> WriteWeights | None:
    """Returns what writes the whole model; None for one with an adapter."""
    if model.lora is not None:
        return None

    def write(folder: Path, trainable: PyTree) -> None:
        model.update(trainable)
        model.save_pretrained(folder)

    return write
