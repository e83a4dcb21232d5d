"""`FastLanguageModel`: loading and adapting by the calls that users know."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from fastjax.api import FastLanguageModel, is_bfloat16_supported, load_model
from fastjax.errors import CheckpointMismatch, ConfigError, ModelError
from kernels.nf4 import NF4Array

pytestmark = pytest.mark.usefixtures("optimised", "compiled_once")

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = np.arange(20, 32, dtype=np.int32)[None]


def test_positions_of_the_usual_arguments(small_model: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(small_model), 96, None, True
    )
    assert model.max_seq_length == 96
    assert model.spec.compute_dtype == "bfloat16"
    linear = model.decoder.segments[0].block.mlp.up_proj
    assert isinstance(linear.weight.get_value(), NF4Array)
    adapted = FastLanguageModel.get_peft_model(model, 8, SEVEN, 16)
    assert adapted is model
    assert model.lora.scaling("q_proj") == 2.0
    assert FastLanguageModel.for_inference(model) is model
    assert FastLanguageModel.for_training(model) is model
    assert len(tokenizer) == 403


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", "float32"),
        ("bf16", "bfloat16"),
        ("torch.float16", "float16"),
        (jnp.float32, "float32"),
        (np.dtype("float16"), "float16"),
        (jnp.bfloat16, "bfloat16"),
    ],
)
def test_dtypes_in_every_spelling(
    small_model: Path, dtype: object, expected: str
) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(small_model), 64, dtype, False)
    assert model.spec.compute_dtype == expected


def test_wrong_dtypes_are_refused(small_model: Path) -> None:
    with pytest.raises(ConfigError, match="one of: bfloat16"):
        FastLanguageModel.from_pretrained(str(small_model), dtype="int8")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"trust_remote_code": True}, "no code"),
        ({"token": "hf_secret"}, "HF_TOKEN"),
        ({"bnb_4bit_quant_type": "int4"}, "nf4, fp4"),
        ({"fast_inference": True}, "vLLM is not used"),
        ({"torch_dtype": "float16"}, "its name here is dtype"),
        ({"max_seq_lenght": 64}, "did you mean 'max_seq_length'"),
        ({"other": 1}, "no argument 'other'$"),
        ({"load_in_8bit": True, "load_in_16bit": True}, "contradict each other"),
    ],
)
def test_options_that_are_refused(
    small_model: Path, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        FastLanguageModel.from_pretrained(str(small_model), **option)
    assert "hf_secret" not in str(caught.value)


def test_options_that_change_nothing(small_model: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        str(small_model),
        dtype="float32",
        device_map="auto",
        load_in_8bit=False,
        load_in_16bit=True,
        use_gradient_checkpointing="unsloth",
        fast_inference=False,
        gpu_memory_utilization=0.6,
        max_lora_rank=64,
    )
    assert model.remat == "layer"
    assert not model.spec.packed


def test_unknown_models_name_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"did you mean .*llama3-8b"):
        FastLanguageModel.from_pretrained("lama3-8b")


def test_the_adapter_of_the_usual_tutorial(
    small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(small_model), dtype="float32")
    plain, base_weights = np.asarray(model.logits(IDS)), model.num_parameters()
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=SEVEN,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    np.testing.assert_array_equal(model.logits(IDS), plain)
    model.print_trainable_parameters()
    shown = capsys.readouterr().out
    assert shown.startswith("trainable params: 32,768 || all params: ")
    assert shown.endswith("\n")
    assert model.num_parameters(only_trainable=True) == 32768
    assert model.num_parameters() == base_weights + 32768


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"modules_to_save": ["norm"]}, "modules_to_save='norm' must be one of"),
        ({"layers_to_transform": [9]}, r"names \[9\]; the model has the layers 0 to 1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern=.* must be NAME=RANK"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern='\\(=2' must be"),
        ({"trainable_token_indices": [999]}, r"names \[999\]; the vocabulary has 512"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' must be one of"),
        ({"target_modules": ["query"]}, "q_proj"),
        ({"r": 0}, "lora_r=0"),
        ({"finetune_mlp_modules": False}, "target_modules names"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
    ],
)
def test_adapters_that_cannot_be(
    model: Any, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        FastLanguageModel.get_peft_model(model, **option)


def test_seeds_choose_the_start(model: Any) -> None:
    def start(seed: int) -> np.ndarray:
        FastLanguageModel.get_peft_model(model, r=4, random_state=seed)
        linear = model.decoder.segments[0].block.mlp.up_proj
        return np.asarray(linear.lora_a.get_value())

    np.testing.assert_array_equal(start(1), start(1))
    assert not np.array_equal(start(1), start(2))


def test_bfloat16_is_asked_of_the_device() -> None:
    assert is_bfloat16_supported() is True


def test_an_adapter_folder_brings_its_base_model(model: Any, tmp_path: Path) -> None:
    linear = model.decoder.segments[0].block.self_attn.q_proj
    linear.lora_b.set_value(jnp.ones_like(linear.lora_b.get_value()))
    model.save_pretrained(tmp_path / "adapter")
    again, tokenizer = FastLanguageModel.from_pretrained(
        str(tmp_path / "adapter"), 64, "float32", load_in_4bit=False
    )
    assert again.spec.adapters == model.spec.adapters
    assert tokenizer is not None
    np.testing.assert_array_equal(again.logits(IDS), model.logits(IDS))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(CheckpointMismatch):
        load_model(str(tmp_path / "adapter"))
