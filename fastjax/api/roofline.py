"""The floating-point operations that a QLoRA step cannot do without."""

from fastjax.models.transformer_config import TransformerConfig

MATMUL_FLOPS_PER_SECOND = 790e12
"""Dense bfloat16 products by cuBLAS, as measured on an H200."""

_FORWARD_AND_INPUT_GRADIENT = 4
_ATTENTION_PASSES = 3.5


def step_flops(config: TransformerConfig, *, batch: int, seq: int) -> float:
    """Returns the operations of one step with frozen weights and nothing recomputed.

    A weight costs two operations a token forward and two for the gradient of its
    input; its own gradient is not needed. Causal attention computes half of each
    matrix, and its backward pass 2.5 times its forward pass (2205.14135 section 3.1).
    The adapters, less than 1 %, are left out.
    """
    wide, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = wide * (2 * queries + 2 * keys + 3 * inner)
    weights = config.num_hidden_layers * layer + config.vocab_size * wide
    attention = config.num_hidden_layers * 2 * seq * queries * _ATTENTION_PASSES
    return batch * seq * (_FORWARD_AND_INPUT_GRADIENT * weights + attention)


def roofline_share(
    config: TransformerConfig, *, batch: int, seq: int, seconds: float
) -> float:
    """Returns how much of the step's time its products would take at full rate."""
    fastest = step_flops(config, batch=batch, seq=seq) / MATMUL_FLOPS_PER_SECOND
    return fastest / seconds
