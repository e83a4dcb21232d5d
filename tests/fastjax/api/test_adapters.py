"""Adapters beyond plain LoRA, through the calls of the API."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastjax.api import FastLanguageModel, load_model, run_export
from fastjax.api.loading import load_text_side
from fastjax.config import QuantConfig, TrainConfig
from fastjax.errors import ConfigError, FastJaxError
from fastjax.loftq import low_rank_start
from fastjax.nn.linear import AdapterSpec, Linear, LinearSpec

pytestmark = pytest.mark.usefixtures("optimised")

IDS = np.arange(6, 30, dtype=np.int32)[None]


def test_the_start_is_nearly_the_best_of_its_rank() -> None:
    lost = jax.random.normal(jax.random.key(0), (48, 80), jnp.float32)
    down, up = low_rank_start(lost, jax.random.key(1), rank=8)
    values = np.linalg.svd(lost, compute_uv=False)
    best = np.sqrt(np.sum(values[8:] ** 2))
    assert np.linalg.norm(lost - down @ up) < 1.01 * best


def test_loftq_makes_up_for_4_bits(small_model: Path, tmp_path: Path) -> None:
    exact = np.asarray(load_model(str(small_model), dtype="float32").logits(IDS))
    model = load_model(str(small_model), dtype="float32", quant=QuantConfig())
    before = np.abs(np.asarray(model.logits(IDS)) - exact).mean()
    model = FastLanguageModel.get_peft_model(
        model, r=32, lora_alpha=16, init_lora_weights="loftq"
    )
    logits = np.asarray(model.logits(IDS))
    assert np.abs(logits - exact).mean() < 0.6 * before
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), dtype="float32", quant=QuantConfig())
    np.testing.assert_allclose(again.logits(IDS), logits, atol=1e-5)
    with pytest.raises(FastJaxError, match="belongs to the 4-bit weights"):
        load_model(str(tmp_path), dtype="float32")
    with pytest.raises(FastJaxError, match="add that twice"):
        again.save_pretrained_merged(tmp_path / "merged")
    with pytest.raises(FastJaxError, match="add that twice"):
        list(run_export(str(tmp_path), tmp_path / "g", output_format="gguf-lora"))


def test_tables_start_as_they_are_and_train_in_float32(small_model: Path) -> None:
    model = load_model(str(small_model), quant=QuantConfig())
    plain = np.asarray(model.logits(IDS))
    model = FastLanguageModel.get_peft_model(model, modules_to_save=["lm_head"])
    np.testing.assert_array_equal(model.logits(IDS), plain)
    assert model.split()[1]["lm_head"]["weight"].get_value().dtype == jnp.float32
    with pytest.raises(FastJaxError, match="load the base model again"):
        model.base_decoder()


def test_nothing_puts_an_adapter_on_weights_that_train(
    small_model: Path, tmp_path: Path
) -> None:
    model = load_model(str(small_model), dtype="float32", full_finetuning=True)
    with pytest.raises(ConfigError, match="an adapter beside them would do nothing"):
        FastLanguageModel.get_peft_model(model, r=4)
    assert model.lora is None
    adapted = load_model(str(small_model), dtype="float32")
    FastLanguageModel.get_peft_model(adapted, r=4).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="fastjax export --model"):
        load_model(str(tmp_path), dtype="float32", full_finetuning=True)
    quant = QuantConfig(load_in_4bit=False)
    config = TrainConfig(model=str(tmp_path), full_finetuning=True, quant=quant)
    with pytest.raises(ConfigError, match="trains a model without one"):
        load_text_side(config)
    spec = LinearSpec(
        dtype=jnp.dtype(jnp.float32),
        adapter=AdapterSpec(rank=4, scaling=1.0),
        trains_weight=True,
    )
    with pytest.raises(AssertionError):
        Linear(8, 8, has_bias=False, spec=spec)(jnp.ones((2, 8)))


def test_an_8_bit_base_computes_what_its_weights_say(
    small_model: Path, tmp_path: Path
) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        str(small_model), dtype="float32", load_in_8bit=True
    )
    assert "int8" in repr(model)
    dense = np.asarray(load_model(str(small_model), dtype="float32").logits(IDS))
    logits = np.asarray(model.logits(IDS))
    assert 0 < np.abs(logits - dense).max() < 0.05 * np.ptp(dense)
    model = FastLanguageModel.get_peft_model(model, r=4)
    folder = model.save_pretrained_merged(tmp_path / "m", base_precision="dequantised")
    again = load_model(str(folder), dtype="float32").logits(IDS)
    np.testing.assert_allclose(again, logits, atol=1e-5)
