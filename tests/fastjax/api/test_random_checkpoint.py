"""Random checkpoints of presets: the right shapes, readable by everything else."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from conversions.hf import read_config
from fastjax.api import load_model, make_random_checkpoint
from fastjax.api.random_checkpoint import random_weights
from fastjax.errors import ConfigError, StorageError
from fastjax.models.registry import PRESETS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of the preset `tiny`."""
    folder = tmp_path_factory.mktemp("random") / "tiny"
    return make_random_checkpoint("tiny", folder, dtype="float32")


def test_it_reads_back_as_the_preset(tiny: Path) -> None:
    assert read_config(tiny) == PRESETS["tiny"].config
    model = load_model(str(tiny), dtype="float32")
    ids = np.arange(8, dtype=np.int32)[None]
    assert model.logits(ids).shape == (1, 8, 4096)
    assert np.isfinite(model.logits(ids)).all()


def test_its_tokenizer_is_complete(tiny: Path) -> None:
    tokenizer = load_model(str(tiny), dtype="float32").tokenizer
    assert tokenizer.chat_template
    assert tokenizer.eos_token_id in PRESETS["tiny"].config.eos_token_ids
    text = "def f(x): return 'naïve 你好'"
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < 4096
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_seeds_and_folders(tiny: Path, tmp_path: Path) -> None:
    same = make_random_checkpoint("tiny", tmp_path / "same", dtype="float32")
    other = make_random_checkpoint("tiny", tmp_path / "other", dtype="float32", seed=1)
    weights = [(f / "model.safetensors").read_bytes() for f in (tiny, same, other)]
    assert weights[0] == weights[1] != weights[2]
    with pytest.raises(StorageError, match="exists already"):
        make_random_checkpoint("tiny", tmp_path / "same")
    make_random_checkpoint("tiny", tmp_path / "other", dtype="float32", overwrite=True)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == weights[0]
    with pytest.raises(ConfigError, match=r"llama3-9b.*llama3-8b|llama3-8b"):
        make_random_checkpoint("llama3-9b", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_names_and_dtype_of_the_file(tmp_path: Path) -> None:
    folder = make_random_checkpoint("tiny", tmp_path / "half")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(folder / "model.safetensors", "np") as file:
        names = set(file.keys())
        entry = file.get_slice("model.layers.3.mlp.up_proj.weight")
        assert entry.get_shape() == [768, 256]
        assert entry.get_dtype() == "BF16"
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen2.5-0.5b", "llama3.2-1b"])
def test_odd_presets_have_their_own_weights(name: str) -> None:
    import jax

    config = PRESETS[name].config
    shapes = jax.eval_shape(
        lambda key: dict(random_weights(config, dtype="bfloat16", key=key)),
        jax.random.key(0),
    )
    first = "layers.0.self_attn"
    inner = config.num_attention_heads * config.head_dim
    assert shapes[f"{first}.q_proj.weight"].shape == (config.hidden_size, inner)
    assert (f"{first}.q_proj.bias" in shapes) == name.startswith("qwen2")
    assert (f"{first}.q_norm.weight" in shapes) == name.startswith("qwen3")
    assert ("lm_head.weight" in shapes) != config.tie_word_embeddings
    last = config.num_hidden_layers - 1
    assert f"layers.{last}.mlp.down_proj.weight" in shapes
    assert f"layers.{last + 1}.mlp.down_proj.weight" not in shapes
