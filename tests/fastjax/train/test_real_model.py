"""The promises of training, kept by a whole Llama with NF4 weights and adapters."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastjax.api import load_model
from fastjax.api.loading import add_adapter
from fastjax.config import DType, LoRAConfig, OptimizerConfig, QuantConfig
from fastjax.data import Loader
from fastjax.data.tokenization import Document
from fastjax.losses import cross_entropy
from fastjax.train import init_state, make_optimizer, make_train_step
from fastjax.train.faults import VARIABLE
from fastjax.train.metrics import CLOCK_FIELDS
from fastjax.train.step import summed_gradients

ROOT = Path(__file__).parents[3]
ROWS = 8


def split(folder: Path, dtype: DType = "float32") -> tuple:
    """Returns (graphdef, trainable, frozen); no adapter of it is zero."""
    model = load_model(str(folder), dtype=dtype, quant=QuantConfig())
    add_adapter(model, LoRAConfig(lora_r=8), seed=0)
    graphdef, trainable, frozen = model.split()
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return (
        graphdef,
        jax.tree.map(
            lambda leaf: 0.05 * jax.random.normal(next(keys), leaf.shape), trainable
        ),
        frozen,
    )


def loader(accumulation: int) -> Loader:
    """Returns batches of eight rows that share documents of unequal lengths."""
    bits = np.random.default_rng(7)
    documents = [
        Document(
            input_ids=bits.integers(6, 512, length).astype(np.int32),
            trained=bits.random(length) < 0.7,
        )
        for length in bits.integers(4, 32, 40)
    ]
    return Loader(
        documents,
        batch_size=ROWS // accumulation,
        accumulation=accumulation,
        max_length=64,
        packing=True,
        seed=3,
    )


def loss_of(graphdef: nnx.GraphDef, batches: Loader) -> Any:
    return functools.partial(cross_entropy, graphdef, max_segments=batches.max_segments)


def test_every_split_of_the_rows_gives_the_same_gradient(fixtures: Path) -> None:
    graphdef, trainable, frozen = split(fixtures / "tiny_llama3")

    def gradient(accumulation: int) -> tuple[Any, float, int]:
        batches = loader(accumulation)
        batch = batches.batch(0)
        assert batch["input_ids"].shape[:2] == (accumulation, ROWS // accumulation)
        tokens_of_rows = np.sum(batch["targets"] != -100, axis=-1)
        assert len(np.unique(tokens_of_rows)) > 2
        assert batch["segment_ids"].max() > 2
        summed = jax.jit(
            functools.partial(summed_gradients, loss_of(graphdef, batches))
        )
        sums, loss, tokens = summed(trainable, frozen, batch, factor=jnp.float32(1.0))
        return sums, float(loss), int(tokens)

    expected, loss, tokens = gradient(1)
    for accumulation in (2, 8):
        actual, other_loss, other_tokens = gradient(accumulation)
        assert other_tokens == tokens
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for one, other in zip(
            jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True
        ):
            difference = np.linalg.norm(np.asarray(one - other))
            assert np.linalg.norm(one) > 0
            assert difference < 1e-6 * np.linalg.norm(one)


def test_float16_trains_as_float32_does(fixtures: Path) -> None:
    losses: dict[str, list[float]] = {}
    batches = loader(2)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=1e-2, lr_scheduler_type="constant"), 3
    )
    for dtype in ("float32", "float16"):
        graphdef, trainable, frozen = split(fixtures / "tiny_llama3", dtype)
        step = make_train_step(
            loss_of(graphdef, batches), optimizer, seed=0, dtype=dtype
        )
        state = init_state(trainable, optimizer, dtype)
        losses[dtype] = []
        for _ in range(3):
            state, metrics = step(state, frozen, batches.batch(0))
            assert float(metrics["skipped"]) == 0.0
            losses[dtype].append(float(metrics["loss"]))
    assert losses["float32"][-1] < losses["float32"][0] - 0.1
    np.testing.assert_allclose(losses["float16"], losses["float32"], rtol=2e-3)


@pytest.fixture(scope="session")
def command(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a run of eight steps, without its output folder."""
    folder = tmp_path_factory.mktemp("real")
    model, data = folder / "model", folder / "data.jsonl"
    shutil.copytree(fixtures / "tiny_llama3", model)
    shutil.copytree(fixtures / "tokenizer_v5", model, dirs_exist_ok=True)
    texts = ["count: " + " ".join(map(str, range(n, n + n % 7 + 3))) for n in range(40)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = {
        "model": model,
        "dataset_name": data,
        "dtype": "float32",
        "lora_dropout": 0.1,
        "neftune_noise_alpha": 5,
        "learning_rate": 1e-2,
        "max_length": 64,
        "max_steps": 8,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    script = ROOT / "scripts" / "train.py"
    return [sys.executable, str(script), *map(str, words), "--packing"]


def run(command: list[str], output: Path, fault: str = "") -> int:
    """Returns the exit code of the command; no run takes another one's programs."""
    environment = {name: v for name, v in os.environ.items() if name != VARIABLE}
    environment["FASTJAX_CACHE"] = str(output.parent / "cache")
    if fault:
        environment[VARIABLE] = fault
    done = subprocess.run(
        [*command, "--output_dir", str(output)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def outcome(output: Path) -> tuple[bytes, list[dict[str, Any]]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [
        {k: v for k, v in json.loads(line).items() if k not in CLOCK_FIELDS}
        for line in lines
    ]
    return (output / "adapter_model.safetensors").read_bytes(), records


def test_a_killed_command_given_again_ends_the_same(
    command: list[str], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fault = f"kill@step@{random.Random().randrange(3, 9)}"
    assert run(command, whole) == 0
    assert run(command, killed, fault) == -signal.SIGKILL
    assert not (killed / "adapter_model.safetensors").exists()
    assert run(command, killed) == 0
    adapter, records = outcome(whole)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert outcome(killed) == (adapter, records), fault
