"""The floating-point operations that a QLoRA step cannot do without."""

from fastjax.models.transformer_config import TransformerConfig

MATMUL_FLOPS_PER_SECOND = 790e12
"""Dense bfloat16 products by cuBLAS, as measured on an H200."""

FRUGAL_PASSES = (2.0, 3.5)
"""Forward passes of products and of attention in a step with nothing recomputed.

The gradient of a frozen weight's input costs what its product does; the backward pass
of attention 2.5 times its forward pass (2205.14135 section 3.1).
"""


def step_flops(config: TransformerConfig, *, batch: int, seq: int) -> float:
    """Returns the operations of one step with frozen weights and nothing recomputed.

    The adapters, less than 1 %, are left out.
    """
    layers = config.num_hidden_layers * layer_flops(config, seq, FRUGAL_PASSES)
    head = 2 * config.vocab_size * config.hidden_size * FRUGAL_PASSES[0]
    return batch * seq * (layers + head)


def layer_flops(
    config: TransformerConfig, seq: int, passes: tuple[float, float]
) -> float:
    """Returns the operations of a layer for one token of a row.

    A weight costs two operations a pass. Causal attention computes half of each matrix.

    Args:
      config: Sizes.
      seq: Tokens of the row.
      passes: Forward passes of products, and of attention, that are done.
    """
    wide, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    products = 2 * wide * (2 * queries + 2 * keys + 3 * inner)
    return passes[0] * products + passes[1] * 2 * seq * queries


def h200_roofline_share(
    config: TransformerConfig, *, batch: int, seq: int, seconds: float
) -> float:
    """Returns how much of the step's time its products would take on an H200."""
    fastest = step_flops(config, batch=batch, seq=seq) / MATMUL_FLOPS_PER_SECOND
    return fastest / seconds
