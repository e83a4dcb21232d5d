"""How far training stretched the context of an adapter's base.

PEFT has no place for it, so it is noted beside the weights, which are wrong without.
"""

import dataclasses
import json
from typing import Any, get_args

from conversions.hf.config import stretched_keys
from conversions.safetensors_file import SafetensorsFile
from fastjax.config import RopeScaling
from fastjax.errors import ConfigError, ModelError, printable
from fastjax.models.transformer_config import TransformerConfig
from fastjax.rope_config import RopeKind

_SCALING, _CONTEXT = "rope_scaling", "context_tokens"
_CARD = """
## Context

Trained with a context of {tokens:,} tokens by {scaling} RoPE, which the base has not.
`fastjax export` merges a model whose `config.json` says so. PEFT must be told:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

longer = {keys}
base = AutoModelForCausalLM.from_pretrained({base}, **longer)
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

and so must vLLM: `--hf-overrides '{json}'`
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """A context longer than that of the base's files.

    Attributes:
      scaling: How RoPE is stretched.
      tokens: The context.
      keys: What config.json says of it in transformers 5.
    """

    scaling: RopeKind
    tokens: int
    keys: dict[str, Any]

    def notes(self) -> dict[str, str]:
        """Returns what is written beside the weights, for `stretched_config`."""
        return {_SCALING: self.scaling, _CONTEXT: str(self.tokens)}

    def card(self, base: str) -> str:
        """Returns what people must know to load the adapter on its base."""
        return _CARD.format(
            tokens=self.tokens,
            scaling=self.scaling,
            base=json.dumps(base),
            keys=self.keys,
            json=json.dumps(self.keys),
        )


def stretch_of(config: TransformerConfig, base: TransformerConfig) -> Stretch | None:
    """Returns how `config` is stretched from its base; None if it is not."""
    keys = stretched_keys(config, base)
    if not keys:
        return None
    newer = ("max_position_embeddings", "rope_parameters")
    return Stretch(
        scaling=config.rope.kind,
        tokens=config.context_tokens,
        keys={name: keys[name] for name in newer},
    )


def stretched_config(
    file: SafetensorsFile, config: TransformerConfig
) -> TransformerConfig:
    """Returns the base as an adapter's training stretched it.

    Raises:
      ModelError: The notes are broken, or are not for this base.
    """
    found = [file.metadata.get(name) for name in (_SCALING, _CONTEXT)]
    scaling, tokens = found
    if scaling is None and tokens is None:
        return config
    kinds = {kind: kind for kind in get_args(RopeScaling)}
    if scaling not in kinds or not (tokens and tokens.isdecimal() and len(tokens) < 10):
        raise ModelError(
            f"the adapter's notes on its context are broken: {printable(found)}",
            where=str(file.path),
        )
    try:
        return config.stretched(kinds[scaling], int(tokens))
    except ConfigError as error:
        raise ModelError(
            f"this adapter is of another base: {error.what}", where=str(file.path)
        ) from error
