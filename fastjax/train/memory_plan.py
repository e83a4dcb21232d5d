"""What a training step will hold on the device, by a closed formula of its sizes.

Saved activations are counted exactly. The workspace is what the largest of three
phases holds beside them: the loss with one chunk of logits, the backward pass of one
layer, and, with all weights trained, the optimiser.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from fastjax.config import OptimizerConfig, RematPolicy
from fastjax.models.build import DecoderSpec, abstract_decoder, layer_linears
from fastjax.nn.feed_forward import chunk_tokens
from fastjax.nn.variables import abstract
from fastjax.remat import KEEPING, RematPlan
from fastjax.train.host_states import PIECE_BYTES, bytes_by_place
from fastjax.train.optimizer import make_optimizer
from kernels import dispatch
from kernels.attention import most_dscores_bytes
from kernels.cross_entropy import CHUNK_TOKENS, HeadAdapter, linear_cross_entropy
from kernels.device import Capability, compute_capability

_FLOAT32 = 4
_LOGIT_BYTES = 6  # of a chunk: logits in float32, their cotangent in 16 bits
_ODDS_BYTES = 2  # of a chunk where a kernel makes the loss without logits
_VISITS = 4  # pieces: two states that come, and two that go
_RESIDUAL_ROWS = 5  # rows of D: the stream, its cotangent, norms and what they keep
_ATTENTION_ROWS = 3  # of D: input and cotangent, and what comes from the host next
_QUERY_ROWS, _KEY_ROWS = 4, 6  # heads, outputs and cotangents; k and v before RoPE too
_WITH_CUDNN = (None, "cudnn", "mosaic_gpu_cudnn")  # whose sums are in float32
_WITH_DSCORES = (None, "mosaic_gpu")  # kernels that keep gradients of scores


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """Of a step's batches.

    Attributes:
      rows: Of a micro-batch.
      tokens: Of a row.
      accumulation: Micro-batches of a step.
      documents: Most of a row.
    """

    rows: int
    tokens: int
    accumulation: int = 1
    documents: int = 1

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens that are on the device at once."""
        return self.rows * self.tokens


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes of a training step.

    Attributes:
      weights: Frozen ones, as they are stored.
      trained: Adapters, or all weights in full fine-tuning.
      optimizer: Its state.
      saved: Activations kept for the backward pass.
      workspace: The most that the step holds beside all this.
      host: Activations and states of the optimiser in pinned host memory.
    """

    weights: int
    trained: int
    optimizer: int
    saved: int
    workspace: int
    host: int

    @property
    def resident(self) -> int:
        """What is on the device between steps."""
        return self.weights + self.trained + self.optimizer

    @property
    def peak(self) -> int:
        """The most that is on the device at once."""
        return self.resident + self.saved + self.workspace


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelBytes:
    """Bytes that do not depend on the batch; see `MemoryPlan`.

    Of the optimiser's states, `host` are in host memory, and `visiting` of them on the
    device at once.
    """

    weights: int
    trained: int
    optimizer: int
    gradients: int
    host: int = 0
    visiting: int = 0

    @classmethod
    def of(cls, spec: DecoderSpec, optimizer: OptimizerConfig) -> "ModelBytes":
        """Returns those of a structure, with its adapters, and an optimiser."""
        _, trainable, frozen = nnx.split(abstract_decoder(spec), nnx.Param, ...)
        state = jax.eval_shape(make_optimizer(optimizer, 1).init, trainable)
        held, host = _bytes(state), 0
        if optimizer.offload_optimizer:
            held, host = bytes_by_place(state)
        return cls(
            weights=_bytes(frozen),
            trained=_bytes(trainable),
            optimizer=held,
            host=host,
            visiting=min(host, _VISITS * PIECE_BYTES),
            gradients=_FLOAT32 * sum(leaf.size for leaf in jax.tree.leaves(trainable)),
        )


def memory_plan(
    spec: DecoderSpec, model: ModelBytes, remat: RematPlan, shape: BatchShape
) -> MemoryPlan:
    """Returns the bytes of a step.

    Args:
      spec: Structure of the model, with its adapters.
      model: Of that structure.
      remat: What the backward pass recomputes, layer by layer.
      shape: Of the batches.
    """
    saved, host = 0, model.host
    for layer, policy in enumerate(remat.policies):
        device_bytes, host_bytes = saved_bytes(spec, layer, policy)
        saved += device_bytes * shape.micro_batch_tokens
        host += host_bytes * shape.micro_batch_tokens
    return MemoryPlan(
        weights=model.weights,
        trained=model.trained,
        optimizer=model.optimizer,
        saved=saved,
        workspace=_workspace(spec, model, remat, shape),
        host=host,
    )


def saved_bytes(spec: DecoderSpec, layer: int, policy: RematPolicy) -> tuple[int, int]:
    """Returns the bytes a token that one layer keeps: on the device, on the host."""
    config, width = spec.config, jnp.dtype(spec.compute_dtype).itemsize
    wide = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    names = (f"layers.{layer}.{name}" for name in layer_linears(config))
    ranks = sum(spec.adapters[name].rank for name in names if name in spec.adapters)
    statistics = _FLOAT32 * config.num_attention_heads
    raw = queries + keys if config.qk_norm else 0
    attention = 2 * queries + 2 * keys + raw
    if policy == "offload":
        return 0, width * (2 * wide + attention) + statistics
    if policy == "layer_offload":
        return 0, width * wide
    kept = wide
    if policy in KEEPING:
        kept += wide + 2 * config.intermediate_size + ranks
    if policy not in ("none", "norms"):
        return width * kept, 0
    keeps_normed = policy == "none" and config.norm_placement != "after"
    normed = 2 * wide if keeps_normed else 0
    return width * (kept + normed + attention) + statistics, 0


def _workspace(
    spec: DecoderSpec, model: ModelBytes, remat: RematPlan, shape: BatchShape
) -> int:
    config, width = spec.config, jnp.dtype(spec.compute_dtype).itemsize
    wide, inner = config.hidden_size, config.intermediate_size
    tokens = shape.micro_batch_tokens
    # Those of the micro-batch, and their sum over micro-batches.
    gradients = model.gradients * (2 if shape.accumulation > 1 else 1)
    # Gate, up, their product and the cotangents of all; the first two may be saved, or
    # all are made for a chunk of tokens at a time.
    keeping = set(KEEPING)
    recomputed = 6 * chunk_tokens(tokens) if set(remat.policies) - keeping else 0
    kept = 4 * tokens if set(remat.policies) & keeping else 0
    rows = max(recomputed, kept) * inner + _RESIDUAL_ROWS * tokens * wide
    dense = 2 * width * inner * wide if spec.packed or spec.trains_weights else 0
    layer = max(width * rows, _attention_bytes(spec, remat, shape))
    loss = _loss_bytes(spec, tokens)
    return max(loss, layer + dense + gradients, gradients + model.visiting)


def _loss_bytes(spec: DecoderSpec, tokens: int) -> int:
    """Returns what the loss holds of a micro-batch."""
    config, width = spec.config, jnp.dtype(spec.compute_dtype).itemsize
    adapter, chunk = spec.adapters.get(spec.head), min(CHUNK_TOKENS, tokens)
    rank = 0 if adapter is None else adapter.rank
    logit = _logit_bytes(
        spec.compute_dtype,
        chunk_shape=(chunk, config.hidden_size),
        vocabulary=config.vocab_size,
        softcap=config.logit_softcap,
        head_is_trainable=spec.trains_head,
        adapter_rank=rank,
        implementation=spec.implementations.cross_entropy,
        capability=compute_capability(),
    )
    # What trains of the head has a gradient, and both are copied to be multiplied.
    wide, trained = config.hidden_size, config.hidden_size * spec.trains_head + rank
    copied = wide + rank if trained else 0
    tables = (_FLOAT32 * trained + width * copied) * config.vocab_size
    # What is multiplied with tables, and its cotangent.
    rows = 2 * width * tokens * (wide + rank)
    return logit * chunk * config.vocab_size + tables + rows


def _attention_bytes(spec: DecoderSpec, remat: RematPlan, shape: BatchShape) -> int:
    """Returns what the backward pass of attention holds, which rules in long rows."""
    config, width = spec.config, jnp.dtype(spec.compute_dtype).itemsize
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    wide = _ATTENTION_ROWS + ("offload" in remat.policies)
    row = width * (wide * config.hidden_size + _QUERY_ROWS * queries + _KEY_ROWS * keys)
    more, tokens = 0, shape.micro_batch_tokens
    is_cudnn = spec.implementations.attention in _WITH_CUDNN and shape.documents == 1
    if is_cudnn and width < _FLOAT32:
        more = 2 * _FLOAT32 * queries * tokens
    by_kernels = spec.implementations.attention in _WITH_DSCORES
    if by_kernels and set(remat.policies) & set(KEEPING):
        heads = (config.num_attention_heads, config.head_dim)
        q = abstract((shape.rows, shape.tokens, *heads), jnp.dtype(spec.compute_dtype))
        more = max(more, most_dscores_bytes(q, softcap=config.attention_softcap))
    return row * tokens + more


@functools.cache
def _logit_bytes(
    dtype: str,
    *,
    chunk_shape: tuple[int, int],
    vocabulary: int,
    softcap: float | None,
    head_is_trainable: bool,
    adapter_rank: int,
    implementation: str | None,
    capability: Capability | None,
) -> int:
    """Returns what the loss holds of a token and entry, as this device computes it.

    `capability` is the device's, which dispatch asks for itself; it tells the cache.
    """
    (tokens, features), rank = chunk_shape, adapter_rank

    def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden, head, targets, *adapter = arrays
        return linear_cross_entropy(
            hidden,
            head,
            targets,
            adapter=HeadAdapter(*adapter) if adapter else None,
            softcap=softcap,
            head_is_trainable=head_is_trainable,
            implementation=implementation,
        )

    sizes = [(tokens, features), (vocabulary, features), (tokens,)]
    dtypes = [jnp.dtype(dtype), jnp.dtype(dtype), jnp.dtype("int32")]
    if rank:
        sizes += [(tokens, rank), (vocabulary, rank)]
        dtypes += dtypes[:2]
    with dispatch.record() as chosen:
        jax.eval_shape(loss, *map(abstract, sizes, dtypes))
    return _ODDS_BYTES if chosen["cross_entropy"] == {"mosaic_gpu"} else _LOGIT_BYTES


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
