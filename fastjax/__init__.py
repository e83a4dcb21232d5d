"""Fine-tunes Hugging Face language models on CUDA GPUs with JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastjax.api import (
        FastLanguageModel,
        LanguageModel,
        SFTConfig,
        SFTTrainer,
        TrainingArguments,
        add_new_tokens,
        get_chat_template,
        is_bfloat16_supported,
        standardize_sharegpt,
        train_on_responses_only,
    )

__version__ = "0.1.0"

__all__ = [
    "FastLanguageModel",
    "LanguageModel",
    "SFTConfig",
    "SFTTrainer",
    "TrainingArguments",
    "__version__",
    "add_new_tokens",
    "get_chat_template",
    "is_bfloat16_supported",
    "standardize_sharegpt",
    "train_on_responses_only",
]


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used."""
    if name in __all__:
        return getattr(importlib.import_module("fastjax.api"), name)
    raise AttributeError(f"module 'fastjax' has no attribute {name!r}")
