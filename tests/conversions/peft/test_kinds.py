"""Rarer kinds of adapters: files, logits, gradients and merges are those of PEFT."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from conversions.hf import read_config
from conversions.peft import read_adapter, write_adapter
from conversions.peft.names import peft_key
from fastjax import lora as adapters
from fastjax.api import LanguageModel, load_model
from fastjax.api.loading import add_adapter
from fastjax.errors import ModelError
from fastjax.losses import cross_entropy
from kernels.numerics import relative_error

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASES = {
    "patterns": "tiny_olmo2",
    "tables": "tiny_olmo2",
    "tied_tables": "tiny_gemma2",
    "tokens": "tiny_olmo2",
    "tied_tokens": "tiny_gemma2",
    "layers": "tiny_gemma2",
    "up_biases": "tiny_granite",
    "ends": "tiny_olmo2",
    "tied_ends": "tiny_gemma2",
}


@pytest.fixture(params=BASES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def adapted(kind: str, fixtures: Path) -> LanguageModel:
    model = load_model(str(fixtures / BASES[kind]), dtype="float32")
    adapter = read_adapter(fixtures / f"adapter_{kind}", model.config)
    add_adapter(model, adapter.lora, seed=0)
    adapters.set_adapter_weights(model.decoder, model.spec, adapter.weights)
    return model


def test_files_are_bit_equal(kind: str, fixtures: Path, tmp_path: Path) -> None:
    source, base = fixtures / f"adapter_{kind}", BASES[kind]
    config = read_config(fixtures / base)
    adapter = read_adapter(source, config)
    write_adapter(
        tmp_path,
        adapter.weights,
        adapter.lora,
        base_model_name_or_path=base,
        is_tied=config.tie_word_embeddings,
    )
    assert (tmp_path / FILE).read_bytes() == (source / FILE).read_bytes()
    recorded = json.loads((source / CONFIG).read_text())
    values = json.loads((tmp_path / CONFIG).read_text())
    assert list(values) == sorted(values)
    same = set(values) - {"modules_to_save"}
    assert {key: recorded[key] for key in same} == {key: values[key] for key in same}
    assert read_adapter(tmp_path, config).lora == adapter.lora


def test_computes_what_peft_computes(
    kind: str, adapted: LanguageModel, fixtures: Path, tmp_path: Path
) -> None:
    """Logits, merged logits and the gradient of every trained array."""
    numbers = load_file(fixtures / f"adapter_{kind}" / "reference.safetensors")
    ids = numbers["input_ids"].astype(np.int32)
    if kind in ("layers", "tied_tokens", "up_biases", "ends", "tied_ends"):
        merged = adapted.save_pretrained_merged(tmp_path / "merged", dtype="float32")
        actual = load_model(str(merged), dtype="float32").logits(ids)
        np.testing.assert_allclose(actual, numbers["logits"], atol=1e-4)
    logits, gradients = _logits_and_gradients(adapted, ids)
    np.testing.assert_allclose(logits, numbers["logits"], atol=1e-4)
    # Weights under adapted tables are kept with them, but do not train.
    adapted_names = adapted.spec.adapters
    trained = {
        name: value
        for name, value in gradients.items()
        if name.removesuffix(".weight") not in adapted_names
    }
    assert len(trained) == sum(key.startswith("grad.") for key in numbers)
    for name, value in trained.items():
        key, layout = peft_key(name, set(adapted.spec.adapters))
        turned = value.T if layout == "transpose" else value
        expected = jnp.asarray(numbers[f"grad.{key}"])
        assert relative_error(turned, expected) < 1e-5, name


def _logits_and_gradients(
    model: LanguageModel, ids: np.ndarray
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Both in one program; the model's arrays are lost."""
    places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    targets = np.concatenate([ids[:, 1:], np.full((len(ids), 1), -100)], axis=1)
    batch = {
        "input_ids": jnp.asarray(ids),
        "targets": jnp.asarray(targets, jnp.int32),
        "positions": jnp.asarray(places),
        "segment_ids": jnp.ones_like(jnp.asarray(ids)),
    }
    graphdef, trainable, frozen = model.split()

    def mean_loss(trainable: nnx.State) -> tuple[jax.Array, jax.Array]:
        total, tokens = cross_entropy(
            graphdef,
            trainable,
            frozen,
            batch,
            max_segments=1,
            head_is_trainable=model.spec.trains_head,
        )
        decoder = nnx.merge(graphdef, trainable, frozen)
        hidden = decoder(batch["input_ids"], positions=batch["positions"])
        return total / tokens, decoder.logits(hidden)

    gradients, logits = jax.jit(jax.grad(mean_loss, has_aux=True))(trainable)
    model.update(gradients)
    return logits, adapters.adapter_weights(model.decoder, model.spec)


def test_ends_of_tied_embeddings_stay_one(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "adapter_tied_tables"
    config = read_config(fixtures / "tiny_gemma2")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    values = json.loads((source / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(values | {"ensure_weight_tying": False}))
    with pytest.raises(ModelError, match="one end of tied embeddings without"):
        read_adapter(tmp_path, config)
