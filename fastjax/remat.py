"""What the backward pass recomputes: named `jax.checkpoint` policies.

Bytes saved per token and layer for Llama-3-8B in bfloat16 (D 4096, F 14336, 32 query
and 8 key heads of 128):

| policy | saved besides the layer's input | bytes |
| --- | --- | --- |
| none | q, k, v, attention's output and statistics, residual, gate, up | 93 K |
| attention | residual, gate, up | 73 K |
| layer | nothing | 8 K |

`x @ lora_a`, 2 R bytes a token and linear, is saved by the first two as well. No
policy ever saves a dequantised weight: the matmul's own VJP keeps the
packed one.
"""

from collections.abc import Callable
from typing import Any

import jax

from fastjax.config import RematPolicy
from kernels.attention import RESIDUAL_NAMES as ATTENTION_RESIDUALS
from kernels.attention import SAVED_PRIMITIVES as ATTENTION_PRIMITIVES
from kernels.lora_matmul import RESIDUAL_NAMES as LORA_RESIDUALS

QUERY, KEY, VALUE = "query", "key", "value"
QUERY_RAW, KEY_RAW = "query_raw", "key_raw"
ATTENTION_RESIDUAL = "attention_residual"
GATE, UP = "gate", "up"

_MLP_NAMES = (ATTENTION_RESIDUAL, GATE, UP, *LORA_RESIDUALS)
_PROJECTION_NAMES = (QUERY, KEY, VALUE, QUERY_RAW, KEY_RAW)
_ATTENTION_NAMES = (*_PROJECTION_NAMES, *ATTENTION_RESIDUALS)


def rematerialised(body: Callable[..., Any], policy: RematPolicy) -> Callable[..., Any]:
    """Returns the body of a layer scan that saves what `policy` names, no more."""
    return jax.checkpoint(body, policy=_saveable(policy), prevent_cse=False)


def _saveable(policy: RematPolicy) -> Callable[..., bool]:
    if policy == "layer":
        return jax.checkpoint_policies.nothing_saveable
    if policy == "attention":
        return jax.checkpoint_policies.save_only_these_names(*_MLP_NAMES)
    names = jax.checkpoint_policies.save_only_these_names(
        *_MLP_NAMES, *_ATTENTION_NAMES
    )

    def saveable(primitive: Any, *args: Any, **params: Any) -> bool:
        fused_attention = str(primitive) in ATTENTION_PRIMITIVES
        return fused_attention or names(primitive, *args, **params)

    return saveable
