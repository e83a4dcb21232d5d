"""Fine-tunes Hugging Face language models on CUDA GPUs with JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"

_API = (
    "FastLanguageModel",
    "LanguageModel",
    "SFTConfig",
    "SFTTrainer",
    "TrainingArguments",
    "get_chat_template",
    "is_bfloat16_supported",
    "train_on_responses_only",
)
__all__ = ["__version__", *_API]


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used."""
    if name in _API:
        return getattr(importlib.import_module("fastjax.api"), name)
    raise AttributeError(f"module 'fastjax' has no attribute {name!r}")
