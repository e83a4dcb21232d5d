"""Layers are stacked by structure, documents stay apart, presets are complete."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fastjax.api import load_model
from fastjax.api.loading import add_adapter
from fastjax.config import LoRAConfig, QuantConfig
from fastjax.errors import ConfigError
from fastjax.models.build import (
    DecoderSpec,
    abstract_decoder,
    build_decoder,
    flat_weights,
    weight_places,
)
from fastjax.models.registry import PRESETS, preset

FAMILIES = ("tiny_llama3", "tiny_mistral", "tiny_qwen2", "tiny_qwen3")


@pytest.mark.parametrize("name", FAMILIES)
def test_other_documents_of_a_row_change_nothing(name: str, fixtures: Path) -> None:
    model = load_model(str(fixtures / name), dtype="float32", quant=QuantConfig())
    generator = np.random.default_rng(0)
    row = generator.integers(6, 500, (1, 24)).astype(np.int32)
    other = row.copy()
    other[0, :10] = generator.integers(6, 500, 10)
    positions = np.concatenate([np.arange(10), np.arange(14)])[None].astype(np.int32)
    segments = np.repeat([1, 2], [10, 14])[None].astype(np.int32)

    def second_document(ids: np.ndarray) -> np.ndarray:
        hidden = model.decoder(
            jnp.asarray(ids),
            positions=jnp.asarray(positions),
            segment_ids=jnp.asarray(segments),
        )
        return np.asarray(model.decoder.logits(hidden))[:, 10:]

    assert np.array_equal(second_document(row), second_document(other))
    alone = np.asarray(model.logits(row[:, 10:]))
    np.testing.assert_allclose(second_document(row), alone, rtol=2e-4, atol=2e-4)


def test_adapters_on_some_layers_split_the_stack(fixtures: Path) -> None:
    model = load_model(str(fixtures / "tiny_llama3"), dtype="float32")
    assert model.spec.segments() == [range(2)]
    ids = np.arange(6, 18, dtype=np.int32)[None]
    before = np.asarray(model.logits(ids))
    target = r".*layers\.1\..*q_proj"
    add_adapter(model, LoRAConfig(lora_target_modules=target), seed=0)
    assert model.spec.segments() == [range(1), range(1, 2)]
    np.testing.assert_allclose(np.asarray(model.logits(ids)), before, atol=1e-5)


def test_layers_with_their_own_windows_run_in_one_stack(fixtures: Path) -> None:
    model = load_model(str(fixtures / "tiny_mistral"), dtype="float32")
    ids = np.arange(6, 30, dtype=np.int32)[None]
    same = np.asarray(model.logits(ids))
    for windows, is_same in (((8, 8), True), ((8, None), False), ((8,), True)):
        config = dataclasses.replace(model.config, layer_windows=windows)
        spec = dataclasses.replace(model.spec, config=config)
        weights = dict(flat_weights(model.decoder, model.spec))
        model.decoder, model.spec = build_decoder(spec, weights), spec
        assert np.allclose(np.asarray(model.logits(ids)), same, atol=1e-5) == is_same


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_has_a_decoder(name: str) -> None:
    config = preset(name).config
    spec = DecoderSpec(config=config)
    places = list(weight_places(abstract_decoder(spec), spec))
    sizes = [variable.get_value().size for _, variable in places]
    billions = sum(sizes) / 1e9
    stated = name.split("-")
    size = next((part for part in stated if part[-1] == "b" and part[0].isdigit()), "")
    if size:
        # Names round; embeddings make the small ones larger than they say.
        assert 0.9 * float(size[:-1]) - 0.1 < billions < 1.25 * float(size[:-1]) + 0.3


def test_llama3_8b_has_its_published_size() -> None:
    spec = DecoderSpec(config=preset("llama3-8b").config)
    places = weight_places(abstract_decoder(spec), spec)
    assert sum(v.get_value().size for _, v in places) == 8_030_261_248


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"llama3\.1-8b"):
        preset("llama3.1-8")
