"""Gradients and losses of LoRA training against PEFT and torch, float32."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from fastjax import lora as adapters
from fastjax.api import LanguageModel, load_model
from fastjax.api.loading import add_adapter
from fastjax.config import LoRAConfig, OptimizerConfig, QuantConfig
from fastjax.losses import cross_entropy
from fastjax.remat import RematPlan
from fastjax.train.optimizer import make_optimizer
from kernels.numerics import relative_error

CASES = {
    "train_lora_fp32": {},
    "train_lora_rslora_fp32": {"use_rslora": True},
    "train_lora_dora_fp32": {"use_dora": True},
    "train_qlora_nf4_fp32": {"quantised": True},
}
SUFFIXES = {
    "lora_A.weight": ("lora_a", np.transpose),
    "lora_B.weight": ("lora_b", np.transpose),
    "lora_magnitude_vector.weight": ("lora_magnitude", np.asarray),
    "lora_magnitude_vector": ("lora_magnitude", np.asarray),
}
PREFIX = "base_model.model.model."

MIXED = RematPlan(policies=("layer", "offload"))
INPUTS_ON_HOST = RematPlan(policies=("offload", "layer_offload"))
UNROLLED = RematPlan(policies=("attention", "none"), is_unrolled=True)


def _adapter_arrays(numbers: dict[str, np.ndarray], group: str) -> dict[str, jax.Array]:
    found = {}
    for key, value in numbers.items():
        if not key.startswith(f"{group}/"):
            continue
        name = key.removeprefix(f"{group}/{PREFIX}")
        ending = next(end for end in SUFFIXES if name.endswith(end))
        leaf, layout = SUFFIXES[ending]
        found[name.removesuffix(ending) + leaf] = jnp.asarray(layout(value))
    return found


def _model(name: str, fixtures: Path, numbers: dict[str, np.ndarray]) -> LanguageModel:
    options = dict(CASES[name])
    quant = QuantConfig(load_in_4bit=bool(options.pop("quantised", False)))
    model = load_model(str(fixtures / "tiny_llama3"), dtype="float32", quant=quant)
    add_adapter(model, LoRAConfig(lora_r=4, lora_alpha=8.0, **options), seed=0)
    start = _adapter_arrays(numbers, "init")
    assert set(start) == set(adapters.adapter_weights(model.decoder, model.spec))
    adapters.set_adapter_weights(model.decoder, model.spec, start)
    return model


def _batch(numbers: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    ids, labels = numbers["input_ids"], numbers["labels"]
    targets = np.concatenate([labels[:, 1:], np.full((len(ids), 1), -100)], axis=1)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    batch = {"input_ids": ids, "targets": targets, "positions": positions}
    batch["segment_ids"] = numbers["attention_mask"]
    return {key: jnp.asarray(value, jnp.int32) for key, value in batch.items()}


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        *((name, "none") for name in CASES),
        # But for a factor, rsLoRA is LoRA.
        *(
            (name, remat)
            for name in CASES
            for remat in (MIXED, INPUTS_ON_HOST, UNROLLED)
            if "rslora" not in name
        ),
    ],
)
def test_first_gradients_and_three_losses_match_peft(
    name: str, remat: Any, fixtures: Path
) -> None:
    numbers = load_file(fixtures / f"{name}.safetensors")
    model, batch = _model(name, fixtures, numbers), _batch(numbers)
    graphdef, trainable, frozen = model.split()
    trainable = jax.tree.map(jnp.copy, trainable)

    @jax.jit
    def loss_and_gradients(trainable):
        def mean_loss(trainable):
            total, tokens = cross_entropy(
                graphdef, trainable, frozen, batch, remat=remat
            )
            return total / tokens

        return jax.value_and_grad(mean_loss)(trainable)

    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            warmup_steps=0.0,
            weight_decay=0.01,
            max_grad_norm=0.0,
        ),
        3,
    )
    state, losses = optimizer.init(trainable), []
    for step in range(3):
        loss, gradients = loss_and_gradients(trainable)
        losses.append(float(loss))
        if step == 0:
            model.update(gradients)
            actual = adapters.adapter_weights(model.decoder, model.spec)
            expected = _adapter_arrays(numbers, "grad")
            assert set(actual) == set(expected)
            for key, value in expected.items():
                assert relative_error(actual[key], value) < 1e-5, key
        trainable, state = optimizer.update(
            gradients, state, trainable, jnp.int32(step)
        )
    np.testing.assert_allclose(losses, numbers["losses"], rtol=1e-5)
    model.update(trainable)
    final = adapters.adapter_weights(model.decoder, model.spec)
    for key, value in _adapter_arrays(numbers, "after3").items():
        assert relative_error(final[key], value) < 1e-4, key


def test_adamw_of_the_fixture_is_not_trivial(fixtures: Path) -> None:
    numbers = load_file(fixtures / "train_lora_fp32.safetensors")
    before = _adapter_arrays(numbers, "init")
    after = _adapter_arrays(numbers, "after3")
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, after, before))
    assert float(moved) > 1e-2
