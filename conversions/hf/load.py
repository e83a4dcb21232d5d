"""Hugging Face checkpoint -> weights, one tensor in host memory at a time."""

import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from conversions.bnb import (
    QuantState,
    companion_keys,
    parse_quant_state,
    quantised_names,
    read_nf4,
)
from conversions.hf.checkpoint import Checkpoint
from conversions.hf.eight_bit import (
    companions,
    is_eight_bit,
    is_int8,
    read_eight_bit,
    read_int8,
)
from conversions.hf.families import checkpoint_tensors
from conversions.report import TensorReport, compare_shapes
from conversions.rules import Layout, Tensor, relaid
from fastjax.config import DType, QuantConfig
from fastjax.errors import CheckpointMismatch, ModelError
from fastjax.models.build import Weights
from fastjax.models.transformer_config import TransformerConfig
from fastjax.nn.linear import PackedFormat
from fastjax.quantize import wanted_format
from kernels.packed import PackedArray

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_IGNORED_END = "rotary_emb.inv_freq"
_COMPARED_PARTS = 64


def load_weights(
    checkpoint: Checkpoint,
    config: TransformerConfig,
    *,
    dtype: DType = "bfloat16",
    quant: QuantConfig | None = None,
    is_quantised_name: Callable[[str], bool] | None = None,
) -> Weights:
    """Returns all weights of a checkpoint by our names; see `stream_weights`."""
    return dict(
        stream_weights(
            checkpoint,
            config,
            dtype=dtype,
            quant=quant,
            is_quantised_name=is_quantised_name,
        )
    )


def stream_weights(
    checkpoint: Checkpoint,
    config: TransformerConfig,
    *,
    dtype: DType = "bfloat16",
    quant: QuantConfig | None = None,
    is_quantised_name: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, Array | PackedArray]]:
    """Yields the weights of a checkpoint one by one, in the order of its files.

    A tensor that the checkpoint holds in 4 bits stays as it is, whatever `quant`
    says; the 16-bit ones beside it were left out on purpose and stay so too.

    Args:
      checkpoint: The files.
      config: Says exactly which tensors must be there.
      dtype: Of weights that are not quantised, and of dequantised values.
      quant: Packs linear layers of 16-bit checkpoints; None keeps them dense.
      is_quantised_name: Chooses among the linear layers by our name, such as
        "layers.0.self_attn.q_proj.weight"; None takes all of them.

    Raises:
      CheckpointMismatch: Before any weight is read; names every missing, unexpected
        or misshapen tensor.
      ModelError: A tensor holds NaN or infinite values, or broken 4-bit data.
    """
    expected, states = check_tensors(checkpoint, config)
    wanted_packed = None if states else wanted_format(quant, dtype)
    names = [name for name in checkpoint.tensors if name in expected]
    for hf_name, following in zip(names, [*names[1:], None], strict=True):
        if following is not None:
            # The disk reads it while the device has this one.
            checkpoint.read(following)
        tensor = expected[hf_name]
        if hf_name in states:
            yield tensor.name, read_nf4(hf_name, states[hf_name], checkpoint.read)
            continue
        wanted = is_quantised_name is None or is_quantised_name(tensor.name)
        packs = tensor.is_linear and wanted
        is_stored = is_int8(checkpoint.tensors[hf_name].dtype)
        if packs and is_stored and wanted_packed and wanted_packed.code == "int8":
            yield tensor.name, read_int8(checkpoint, hf_name, dtype=dtype)
            continue
        array = _read_dense(checkpoint, hf_name, dtype)
        if wanted_packed is None or not packs:
            yield tensor.name, _relaid(array, layout=tensor.layout)
        else:
            yield tensor.name, _quantised(array, packed=wanted_packed)


def check_tensors(
    checkpoint: Checkpoint, config: TransformerConfig
) -> tuple[dict[str, Tensor], dict[str, QuantState]]:
    """Returns the tensors that the model needs by name, and how 4-bit ones are stored.

    Raises:
      CheckpointMismatch: Names every missing, unexpected or misshapen tensor.
      ModelError: A quant_state is broken.
    """
    expected = {tensor.hf: tensor for tensor in checkpoint_tensors(config)}
    states = _quant_states(checkpoint, expected)
    _check_names_and_shapes(checkpoint, expected, states)
    if config.tie_word_embeddings and _HEAD in checkpoint.tensors:
        _check_tied_head(checkpoint)
    return expected, states


def stored_formats(
    checkpoint: Checkpoint, config: TransformerConfig
) -> dict[str, PackedFormat]:
    """Returns the 4-bit format of each linear that the files hold so, by our name."""
    expected = {tensor.hf: tensor for tensor in checkpoint_tensors(config)}
    return {
        expected[weight].name.removesuffix(".weight"): PackedFormat(
            code=state.code,
            double_quant=state.nested_offset is not None,
            dtype=state.dtype,
        )
        for weight, state in _quant_states(checkpoint, expected).items()
    }


def _quant_states(
    checkpoint: Checkpoint, expected: Mapping[str, Tensor]
) -> dict[str, QuantState]:
    states = {}
    for weight, key in quantised_names(checkpoint.tensors).items():
        if weight not in expected or not expected[weight].is_linear:
            raise ModelError(
                "only linear layers inside blocks may be quantised",
                where=f"{checkpoint.folder}, {weight}",
            )
        raw = checkpoint.read(key).tobytes()
        states[weight] = parse_quant_state(raw, key=key)
    return states


def _check_names_and_shapes(
    checkpoint: Checkpoint,
    expected: Mapping[str, Tensor],
    states: Mapping[str, QuantState],
) -> None:
    """Compares names, shapes and dtypes with those of the model."""
    needed = {name: tensor.shape for name, tensor in expected.items()}
    found = {name: spec.shape for name, spec in checkpoint.tensors.items()}
    for weight, key in quantised_names(found).items():
        if weight in found:
            found[weight] = states[weight].shape
        needed[key] = found[key]
        for companion in companion_keys(weight, states[weight]):
            needed[companion] = found.get(companion, ())
    eight_bit = {
        name: spec.dtype
        for name, spec in checkpoint.tensors.items()
        if name in expected
        and name not in states
        and expected[name].is_linear
        and is_eight_bit(spec.dtype)
    }
    for name, dtype in eight_bit.items():
        needed |= companions(name, dtype, expected[name].shape)
    for name in list(found):
        if name.endswith(_IGNORED_END) or _is_spare_head(name, expected):
            del found[name]
    report = compare_shapes(needed, found)
    wrong_dtypes = {
        name: f"{checkpoint.tensors[name].dtype} is no dtype of weights"
        for name in expected
        if name in checkpoint.tensors
        and name not in states
        and name not in eight_bit
        and checkpoint.tensors[name].dtype.name not in _FLOATS
    }
    TensorReport(
        missing=report.missing,
        unexpected=report.unexpected,
        misshapen={**report.misshapen, **wrong_dtypes},
    ).check(
        where=str(checkpoint.folder),
        fix="config.json and weights must be of the same model; download both again",
    )


def _is_spare_head(name: str, expected: Mapping[str, Tensor]) -> bool:
    return name == _HEAD and _HEAD not in expected


def _check_tied_head(checkpoint: Checkpoint) -> None:
    """Accepts the head of a tied model only if it is the embedding, bit for bit."""
    head, embedding = checkpoint.read(_HEAD), checkpoint.read(_EMBEDDING)
    is_same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    is_same = is_same and all(
        np.array_equal(rows.view(np.uint8), others.view(np.uint8))
        for rows, others in zip(
            np.array_split(head, _COMPARED_PARTS),
            np.array_split(embedding, _COMPARED_PARTS),
            strict=True,
        )
    )
    if not is_same:
        raise CheckpointMismatch(
            f"tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}",
            where=str(checkpoint.folder),
            fix="set tie_word_embeddings to false in config.json, or remove the head",
        )


def _read_dense(checkpoint: Checkpoint, name: str, dtype: DType) -> Array:
    """Returns a tensor on the device, in the file's layout."""
    if is_eight_bit(checkpoint.tensors[name].dtype):
        array = read_eight_bit(checkpoint, name).astype(dtype)
    else:
        stored = checkpoint.read(name)
        if stored.dtype == np.float64:
            stored = stored.astype(np.float32)
        array = jax.device_put(stored, may_alias=False).astype(dtype)
    count = int(_not_finite(array))
    if count:
        raise ModelError(
            f"{count} of {array.size} values are NaN or infinite in {dtype}",
            where=f"{checkpoint.folder}, {name}",
            fix="download the file again; if it stays so, the model itself is broken",
        )
    return array


# Each of these takes what the one before has rounded to its dtype: fused into one
# program, XLA may leave the rounding out.


@jax.jit
def _not_finite(array: Array) -> Array:
    return jnp.sum(~jnp.isfinite(array), dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames=("layout",))
def _relaid(array: Array, *, layout: Layout) -> Array:
    return relaid(array, layout)


@functools.partial(jax.jit, static_argnames=("packed",))
def _quantised(array: Float[Array, "O I"], *, packed: PackedFormat) -> PackedArray:
    return packed.pack(array.T)
