"""Weight rules: Hugging Face's tensor names <-> ours, through an invertible layout."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal

from fastjax.models.transformer_config import TransformerConfig

Layout = Literal["identity", "transpose"]

_SIZES: dict[str, Callable[[TransformerConfig], int]] = {
    "V": lambda c: c.vocab_size,
    "D": lambda c: c.hidden_size,
    "F": lambda c: c.intermediate_size,
    "H": lambda c: c.head_dim,
    "NH": lambda c: c.num_attention_heads * c.head_dim,
    "KH": lambda c: c.num_key_value_heads * c.head_dim,
    "QKV": lambda c: (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim,
    "FF": lambda c: 2 * c.intermediate_size,
}


def relaid(array: Any, layout: Layout) -> Any:
    """Returns an array of either side, NumPy or JAX, in the layout of the other."""
    return array.T if layout == "transpose" else array


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of one model, on both sides.

    Attributes:
      hf: Name in Hugging Face's files.
      name: Name in our weights.
      shape: Shape in Hugging Face's files.
      layout: How the axes change between the two; its own inverse.
    """

    hf: str
    name: str
    shape: tuple[int, ...]
    layout: Layout

    @property
    def is_linear(self) -> bool:
        """Says whether this is the matrix of a linear layer inside a block."""
        return self.layout == "transpose"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WeightRule:
    """Tensors that correspond; `{i}` in both names stands for the layer.

    Attributes:
      hf: Name pattern in Hugging Face's files.
      name: Name pattern in our weights.
      shape: Shape in Hugging Face's files, in letters: V D F H, NH and KH for all
        query and all key/value heads, QKV for both and values, FF for gate and up.
      layout: "transpose" turns [out, in] into (I, O) and back.
      when: Says for which models the tensor exists.
    """

    hf: str
    name: str
    shape: str
    layout: Layout = "identity"
    when: Callable[[TransformerConfig], bool] = lambda config: True

    @property
    def is_layered(self) -> bool:
        """Says whether every layer has such a tensor."""
        return "{i}" in self.hf

    def tensor(self, config: TransformerConfig, layer: int) -> Tensor:
        """Returns the tensor of one layer of one model."""
        shape = tuple(_SIZES[letter](config) for letter in self.shape.split())
        hf, name = self.hf.format(i=layer), self.name.format(i=layer)
        return Tensor(hf, name, shape, self.layout)


def model_tensors(
    rules: Iterable[WeightRule], config: TransformerConfig
) -> tuple[Tensor, ...]:
    """Returns exactly the tensors that a checkpoint of `config` holds.

    They come in the order of the rules, rules of the layers layer by layer.
    """
    present = [rule for rule in rules if rule.when(config)]
    return tuple(
        rule.tensor(config, layer)
        for is_layered, group in itertools.groupby(present, lambda r: r.is_layered)
        for layer, rule in itertools.product(
            range(config.num_hidden_layers if is_layered else 1), tuple(group)
        )
    )
