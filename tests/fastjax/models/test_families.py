"""Each family against transformers and PEFT: logits, a LoRA step, decoding, packing."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from conversions.hf.config import parse_config
from fastjax import lora as adapters
from fastjax.api import LanguageModel, load_model
from fastjax.api.loading import add_adapter
from fastjax.config import LoRAConfig
from fastjax.losses import cross_entropy
from fastjax.nn.rope import RotaryEmbedding, document_lengths
from kernels.numerics import relative_error

FAMILIES = ("gemma2", "gemma3_text", "granite", "olmo2", "olmo3", "phi3", "smollm3")
FAMILIES += ("odd_llama", "odd_mistral", "odd_qwen2", "odd_qwen3")
LORA = LoRAConfig(lora_r=2, lora_alpha=6.0)
PREFIX = "base_model.model.model."


@functools.cache
def numbers_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "reference.safetensors")


def lora_arrays(numbers: dict[str, np.ndarray], group: str) -> dict[str, jax.Array]:
    """Arrays of a group by our names and in our layout."""
    found = {}
    for key, value in numbers.items():
        if key.startswith(f"{group}.{PREFIX}"):
            name = key.removeprefix(f"{group}.{PREFIX}").removesuffix(".weight")
            leaf = name.lower() if name.endswith(("lora_A", "lora_B")) else name
            found[leaf] = jnp.asarray(value.T)
    return found


def batch_of(ids: np.ndarray) -> dict[str, jax.Array]:
    rows, length = ids.shape
    targets = np.concatenate([ids[:, 1:], np.full((rows, 1), -100)], axis=1)
    positions = np.broadcast_to(np.arange(length), ids.shape)
    batch = {"input_ids": ids, "targets": targets, "positions": positions}
    batch["segment_ids"] = np.ones_like(ids)
    return {key: jnp.asarray(value, jnp.int32) for key, value in batch.items()}


def packed(*documents: np.ndarray) -> dict[str, jax.Array]:
    """One row of several documents."""
    lengths = [len(document) for document in documents]
    row = {
        "input_ids": np.concatenate(documents),
        "positions": np.concatenate([np.arange(length) for length in lengths]),
        "segment_ids": np.repeat(np.arange(1, len(lengths) + 1), lengths),
    }
    return {key: jnp.asarray(value[None], jnp.int32) for key, value in row.items()}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, fixtures: Path) -> Path:
    return fixtures / f"tiny_{request.param}"


@pytest.fixture
def model(folder: Path) -> LanguageModel:
    return load_model(str(folder), dtype="float32")


def test_logits_match_transformers(folder: Path, model: LanguageModel) -> None:
    """Also of a document that shares its row with another."""
    numbers = numbers_of(folder)
    first, second = numbers["input_ids"]
    expected = [numbers["logits"][0], numbers["short_logits"][1]]
    graphdef, state = nnx.split(model.decoder)

    @jax.jit
    def logits(state: nnx.State, row: dict[str, jax.Array]) -> jax.Array:
        decoder = nnx.merge(graphdef, state)
        return decoder.logits(decoder(row.pop("input_ids"), **row))[0]

    actual = np.asarray(logits(state, packed(first, second[: len(expected[1])])))
    np.testing.assert_allclose(actual, np.concatenate(expected), atol=1e-4)


def test_lora_step_matches_peft(folder: Path, model: LanguageModel) -> None:
    numbers = numbers_of(folder)
    add_adapter(model, LORA, seed=0)
    adapters.set_adapter_weights(
        model.decoder, model.spec, lora_arrays(numbers, "lora")
    )
    batch = batch_of(numbers["input_ids"].astype(np.int32))
    graphdef, trainable, frozen = model.split()

    @jax.jit
    def loss_and_gradients(trainable: nnx.State) -> tuple:
        def mean_loss(trainable: nnx.State) -> jax.Array:
            total, tokens = cross_entropy(
                graphdef, trainable, frozen, batch, max_segments=1, remat="layer"
            )
            return total / tokens

        return jax.value_and_grad(mean_loss)(trainable)

    loss, gradients = loss_and_gradients(trainable)
    np.testing.assert_allclose(float(loss), numbers["loss"], rtol=1e-5)
    model.update(gradients)
    actual = adapters.adapter_weights(model.decoder, model.spec)
    expected = lora_arrays(numbers, "grad")
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert relative_error(actual[key], value) < 1e-5, key


def test_decoding_computes_the_same(folder: Path, model: LanguageModel) -> None:
    """A prompt, then one token that sees it in the cache."""
    numbers = numbers_of(folder)
    ids = jnp.asarray(numbers["input_ids"], jnp.int32)
    cut, slots = numbers["short_logits"].shape[1], ids.shape[1]
    graphdef, state = nnx.split(model.decoder)

    @jax.jit
    def logits(state: nnx.State, ids: jax.Array) -> jax.Array:
        decoder = nnx.merge(graphdef, state)
        cache = decoder.empty_cache(len(ids), slots)
        places = jnp.broadcast_to(jnp.arange(slots)[None], ids.shape)
        before, cache = decoder.decode(
            ids[:, :cut], positions=places[:, :cut], cache=cache, is_prefill=True
        )
        new = slice(cut, cut + 1)
        after, _ = decoder.decode(ids[:, new], positions=places[:, new], cache=cache)
        return decoder.logits(jnp.concatenate([before, after], axis=1))

    expected = numbers["logits"][:, : cut + 1]
    np.testing.assert_allclose(np.asarray(logits(state, ids)), expected, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("default", "linear", "dynamic", "llama3", "yarn, 4", "yarn, 5"),
        *("longrope", "partial"),
    ],
)
def test_rope_tables_match_transformers(name: str, fixtures: Path) -> None:
    case = json.loads((fixtures / "rope_tables.json").read_text())[name]
    config = parse_config(case["config"], where=name)
    rotary = RotaryEmbedding(config.head_dim, config.ropes[:1])
    for length, table in case["lengths"].items():
        positions = np.arange(int(length))
        cos, sin = rotary(jnp.asarray(positions[None], jnp.int32))
        angles = positions[:, None] * np.asarray(table["inv_freq"])
        for actual, function in ((cos, np.cos), (sin, np.sin)):
            expected = table["scale"] * function(angles)
            np.testing.assert_allclose(actual[0, 0], expected, atol=1e-4)


def test_a_document_is_as_long_as_its_positions_rise() -> None:
    positions = jnp.asarray([[0, 1, 2, 0, 1, 9, 9], [0, 0, 1, 2, 3, 4, 5]], jnp.int32)
    assert document_lengths(positions).tolist() == [
        [3, 3, 3, 2, 2, 10, 10],
        [1, 6, 6, 6, 6, 6, 6],
    ]
