"""From the table and a configuration follows exactly what a checkpoint holds."""

from pathlib import Path

import numpy as np
import pytest

from conversions.hf import Checkpoint, checkpoint_tensors, read_config
from conversions.rules import relaid


@pytest.mark.parametrize(
    "name",
    ["tiny_llama3", "tiny_llama_tied", "tiny_mistral", "tiny_qwen2", "tiny_qwen3"],
)
def test_tables_name_what_transformers_writes(fixtures: Path, name: str):
    tensors = checkpoint_tensors(read_config(fixtures / name))
    stored = Checkpoint(fixtures / name).tensors
    assert {t.hf: t.shape for t in tensors} == {n: s.shape for n, s in stored.items()}
    assert len({t.name for t in tensors}) == len(tensors)
    assert sum(t.is_linear for t in tensors) == 14


def test_tensors_come_layer_by_layer(fixtures: Path):
    names = [t.name for t in checkpoint_tensors(read_config(fixtures / "tiny_llama3"))]
    layers = [name.split(".")[1] for name in names if name.startswith("layers.")]
    assert names[0] == "embed_tokens.weight"
    assert names[-2:] == ["norm.weight", "lm_head.weight"]
    assert layers == sorted(layers)


@pytest.mark.parametrize("layout", ["identity", "transpose"])
def test_layouts_are_their_own_inverse(layout):
    array = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(relaid(relaid(array, layout), layout), array)
