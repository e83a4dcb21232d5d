"""The loss of supervised fine-tuning: next-token cross-entropy, summed over tokens."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from fastjax.losses.neftune import neftune_noise
from fastjax.remat import Remat
from kernels.cross_entropy import linear_cross_entropy


def cross_entropy(
    graphdef: nnx.GraphDef,
    trainable: PyTree,
    frozen: PyTree,
    batch: Mapping[str, Int[Array, "B S"]],
    *,
    dropout_key: PRNGKeyArray | None = None,
    max_segments: int | None = None,
    remat: Remat | None = None,
    head_is_trainable: bool = False,
    neftune_noise_alpha: float = 0.0,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the sum of -log p(target) over trained tokens, and their number.

    Sum and number are float32 and stay apart, so that micro-batches add up exactly
    and are divided once.

    Args:
      graphdef: Structure of the decoder, from `nnx.split`.
      trainable: Its variables that get gradients.
      frozen: All its others.
      batch: input_ids, targets (-100 carries no loss), positions and segment_ids.
      dropout_key: Of adapters' dropout and noise on embeddings; None leaves out both.
      max_segments: Upper bound of the documents in a row; 1 needs no `segment_ids`, as
        padding at the end reaches no token before it and carries no loss.
      remat: What the backward pass recomputes.
      head_is_trainable: The output table gets a gradient; without, none is computed
        but that of its adapter.
      neftune_noise_alpha: Size of the noise on embeddings.
      implementation: Of the cross-entropy op.
    """
    decoder = nnx.merge(graphdef, trainable, frozen)
    segment_ids = None if max_segments == 1 else batch["segment_ids"]
    hidden_btd = decoder(
        batch["input_ids"],
        positions=batch["positions"],
        segment_ids=segment_ids,
        max_segments=max_segments,
        dropout_key=dropout_key,
        embedding_noise=_noise(
            decoder,
            batch["segment_ids"],
            dropout_key,
            alpha=neftune_noise_alpha,
            max_segments=max_segments,
        ),
        remat=remat,
    )
    hidden = hidden_btd.reshape(-1, hidden_btd.shape[-1])
    return linear_cross_entropy(
        hidden,
        decoder.head_weight(),
        batch["targets"].reshape(-1),
        adapter=decoder.head_adapter(hidden, dropout_key=dropout_key),
        softcap=decoder.logit_softcap,
        head_is_trainable=head_is_trainable,
        implementation=implementation,
    )


def _noise(
    decoder: Any,
    segment_ids: Int[Array, "B S"],
    key: PRNGKeyArray | None,
    *,
    alpha: float,
    max_segments: int | None,
) -> Float[Array, "B S D"] | None:
    """Returns what is added to embeddings; None without a key or a size."""
    if key is None or alpha <= 0:
        return None
    return neftune_noise(
        key,
        segment_ids,
        features=decoder.head_weight().shape[1],
        alpha=alpha,
        max_segments=max_segments,
        dtype=decoder.compute_dtype,
    )
