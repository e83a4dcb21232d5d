"""The model's tokenizer, whose tensors are NumPy arrays, and its chat template."""

from collections import UserDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastjax.data import get_chat_template as set_chat_template
from fastjax.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TENSORS = ("pt", "tf", "jax", "np")
_TEMPLATE_NAMES = {
    "llama3": "llama-3",
    **dict.fromkeys(("llama-31", "llama31", "llama3.1"), "llama-3.1"),
    **dict.fromkeys(("llama-3.2", "llama-3.3"), "llama-3.1"),
    **dict.fromkeys(("qwen-25", "qwen25", "qwen2.5"), "qwen-2.5"),
}


class HostArray(np.ndarray):
    """A NumPy array that scripts may send to a device, where the model sends it."""

    def to(self, device: Any = None, **options: Any) -> "HostArray":
        """Returns itself: the model moves arrays to its device."""
        return self


class ArrayEncoding(UserDict):
    """What a tokenizer returns, in NumPy arrays, which need no device."""

    def __getattr__(self, name: str) -> Any:
        """Returns the array of that name, such as `input_ids`."""
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]

    def to(self, device: Any = None, **options: Any) -> "ArrayEncoding":
        """Returns itself: the model moves arrays to its device."""
        return self


class Tokenizer:
    """A transformers tokenizer that gives NumPy arrays where tensors are asked for.

    Everything else is the tokenizer's own, so that scripts written for PyTorch run
    without it: `tokenizer(texts, return_tensors="pt").to("cuda")`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        object.__setattr__(self, "wrapped", tokenizer)

    def __call__(
        self, *texts: Any, return_tensors: str | None = None, **options: Any
    ) -> Any:
        """Returns the token ids of texts, as NumPy arrays for any kind of tensor."""
        kind = "np" if return_tensors in _TENSORS else return_tensors
        encoded = self.wrapped(*texts, return_tensors=kind, **options)
        return _arrays(encoded) if kind == "np" else encoded

    def apply_chat_template(
        self, conversation: Any, *, return_tensors: str | None = None, **options: Any
    ) -> Any:
        """Returns the rendered conversation; as (B, T) ids where tensors are asked."""
        if return_tensors not in _TENSORS:
            return self.wrapped.apply_chat_template(conversation, **options)
        wants_dict = options.pop("return_dict", False)
        encoded = self.wrapped.apply_chat_template(
            conversation, return_tensors="np", return_dict=True, **options
        )
        arrays = _arrays(encoded)
        return arrays if wants_dict else arrays["input_ids"]

    def __getattr__(self, name: str) -> Any:
        """Returns the tokenizer's own attribute."""
        if name == "wrapped":  # a copy in the making, which has none yet
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __getstate__(self) -> Any:
        """Returns what a copy, or a process of `dataset.map`, is made of."""
        return self.wrapped

    def __setstate__(self, state: Any) -> None:
        """Takes over the tokenizer of the original."""
        object.__setattr__(self, "wrapped", state)

    def __repr__(self) -> str:
        """Returns what the tokenizer says of itself."""
        return repr(self.wrapped)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets the tokenizer's own attribute."""
        setattr(self.wrapped, name, value)

    def __len__(self) -> int:
        """Returns the number of tokens, added ones included."""
        return len(self.wrapped)


def get_chat_template(
    tokenizer: Any,
    chat_template: str = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
) -> Any:
    """Returns the tokenizer with a built-in chat template.

    Args:
      tokenizer: Changed in place.
      chat_template: "llama-3.1", "chatml" and so on, also as "llama31" or "llama-3.2".
      mapping: Must map names to themselves: rows have the columns role and content.
      map_eos_token: Make the template's end of a turn the EOS token.

    Raises:
      ConfigError: There is no such template; lists those there are.
    """
    renamed = [old for old, new in (mapping or {}).items() if old != new]
    if renamed:
        raise ConfigError(
            f"mapping of {', '.join(renamed)} is not supported",
            fix="leave it out, and give the rows of standardize_sharegpt(dataset), or "
            "rename the keys in dataset.map: role and content, user and assistant",
        )
    plain = tokenizer.wrapped if isinstance(tokenizer, Tokenizer) else tokenizer
    eos_token = plain.eos_token
    set_chat_template(plain, _TEMPLATE_NAMES.get(chat_template, chat_template))
    if not map_eos_token:
        plain.eos_token = eos_token
    return tokenizer


def _arrays(encoded: Any) -> ArrayEncoding:
    named = {name: np.asarray(array) for name, array in encoded.items()}
    return ArrayEncoding({name: a.view(HostArray) for name, a in named.items()})
