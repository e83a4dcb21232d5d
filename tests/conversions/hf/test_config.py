"""config.json of transformers 4 and 5, good and bad."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversions.hf import read_config, write_config
from conversions.hf.config import parse_config
from fastjax.errors import ConfigError, FastJaxError, ModelError
from fastjax.models.transformer_config import RopeConfig, TransformerConfig

MODELS = ("tiny_llama3", "tiny_llama_tied", "tiny_mistral", "tiny_qwen2", "tiny_qwen3")
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def parse(family: str, **values) -> TransformerConfig:
    values = {"model_type": family, **SIZES, **values}
    return parse_config(values, where="config.json")


def test_llama3_is_read_exactly(fixtures: Path):
    assert read_config(fixtures / "tiny_llama3") == TransformerConfig(
        family="llama",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope=RopeConfig(
            kind="llama3",
            theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        bos_token_id=0,
        eos_token_ids=(4,),
        pad_token_id=5,
    )


def test_families_differ_where_they_do(fixtures: Path):
    mistral, qwen2, qwen3 = (read_config(fixtures / name) for name in MODELS[2:])
    assert mistral.layer_windows == (8,)
    assert (qwen2.attention_bias, qwen2.attention_out_bias) == (True, False)
    assert (qwen3.qk_norm, qwen3.head_dim) == ("head", 32)
    assert qwen2.tie_word_embeddings
    assert qwen3.layer_windows == (None,)


@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_mistral", "tiny_qwen3"])
def test_transformers_4_and_5_say_the_same(fixtures: Path, name: str):
    assert read_config(fixtures / name) == read_config(fixtures / f"{name}_v4")


NEWER = ("gemma2", "gemma3_text", "granite", "olmo2", "olmo3", "phi3", "smollm3")


@pytest.mark.parametrize("name", [*MODELS, *(f"tiny_{name}" for name in NEWER)])
def test_written_configs_read_back(fixtures: Path, tmp_path: Path, name: str):
    config = read_config(fixtures / name)
    write_config(tmp_path, config, dtype="bfloat16")
    assert read_config(tmp_path) == config
    values = json.loads((tmp_path / "config.json").read_text())
    if config.local_rope is not None:
        return
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"]
    for key in ("rope_parameters", "rope_theta", "rope_scaling"):
        one_version = {k: v for k, v in values.items() if k != key}
        if key == "rope_parameters" or config.rope.kind == "default":
            assert parse_config(one_version, where="x").rope == config.rope


def test_a_config_that_the_family_cannot_say_is_refused(tmp_path: Path):
    config = parse("llama")
    broken = {"qk_norm": "head", "layer_windows": (4,)}
    fields = {name: getattr(config, name) for name in TransformerConfig.__slots__}
    with pytest.raises(ConfigError, match="qk_norm, layer_windows"):
        write_config(tmp_path, TransformerConfig(**(fields | broken)), dtype="bfloat16")


def test_end_tokens_of_the_generation_config_count(tmp_path: Path):
    values = {"model_type": "llama", **SIZES, "eos_token_id": 4}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 4, 9]}')
    assert read_config(tmp_path).eos_token_ids == (4, 7, 9)


def test_windows_by_layer():
    options = {"use_sliding_window": True, "sliding_window": 8}
    assert parse("qwen2", **options, max_window_layers=2).windows == (None, None, 8, 8)
    assert parse("qwen2", sliding_window=8, max_window_layers=2).layer_windows == (
        None,
    )
    kinds = ["sliding_attention", "full_attention"] * 2
    assert parse("qwen3", **options, layer_types=kinds).windows == (8, None, 8, None)
    assert parse("mistral").layer_windows == (4096,)
    assert parse("mistral", sliding_window=None).layer_windows == (None,)


def test_mixed_windows_are_written(tmp_path: Path):
    options = {"use_sliding_window": True, "sliding_window": 8}
    config = parse("qwen2", **options, max_window_layers=2)
    write_config(tmp_path, config, dtype="float32")
    assert read_config(tmp_path).windows == config.windows


def test_defaults_of_the_families():
    llama = parse("llama", num_key_value_heads=None)
    assert (llama.num_key_value_heads, llama.head_dim) == (4, 16)
    assert llama.rope == RopeConfig()
    assert (llama.bos_token_id, llama.eos_token_ids) == (1, (2,))
    assert parse("qwen3").head_dim == 128
    assert parse("llama", attention_bias=True).attention_out_bias


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("values", "reasons"),
    [
        ({"hidden_size": 65}, ["hidden_size=65", "multiple"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "divide"]),
        ({"hidden_size": -1}, ["hidden_size=-1", "at least 1"]),
        ({"hidden_size": "64"}, ["hidden_size='64'", "integer"]),
        ({"hidden_size": 64.0}, ["hidden_size=64.0"]),
        ({"hidden_size": True}, ["hidden_size=True"]),
        ({"vocab_size": 2**40}, ["vocab_size", "2**31"]),
        ({"head_dim": 15}, ["head_dim=15", "even"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps=0", "positive"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps", "positive"]),
        ({"hidden_act": "relu"}, ["hidden_act='relu'", "silu"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings=1", "true or false"]),
        ({"eos_token_id": "x"}, ["eos_token_id='x'", "token ids"]),
        ({"rope_scaling": {"type": "x", "factor": 2}}, ["type='x'", "linear"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor is missing"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor=0.5"]),
        ({"rope_scaling": "x"}, ["rope_scaling='x'", "object"]),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 9}}, ["low_freq_factor=9"]),
        ({"rope_theta": "10"}, ["rope_theta='10'"]),
        ({"rope_parameters": {"full_attention": {}, "rope_type": 3}}, ["rope_type=3"]),
        ({"rope_parameters": {"partial_rotary_factor": 2}}, ["partial_rotary"]),
        ({"rope_scaling": {"type": "longrope"}}, ["short_factor is missing"]),
        (
            {"rope_scaling": LONGROPE | {"long_factor": [1, 2]}},
            ["longrope needs 8", "not 8 and 2"],
        ),
        (
            {"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0},
            ["rope_parameters", "the same"],
        ),
        (
            {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 4.0}},
            ["rope_parameters", "the same"],
        ),
        ({"model_type": "lama"}, ["'lama'", "llama", "gemma2, gemma3_text"]),
        ({"model_type": "mixtral"}, ["mixture of experts", "one is mistral"]),
        ({"model_type": None}, ["model_type=None"]),
        (
            {"model_type": "foo", "n_routed_experts": 8, "kv_lora_rank": 2},
            ["it has mixture of experts and latent attention", "one is llama"],
        ),
        ({"auto_map": {"AutoModel": "x.Y"}}, ["runs code"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq", "bitsandbytes"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["fp8"]),
        ({"quantization_config": "x"}, ["None"]),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            ["quantised by 'bitsandbytes'"],
        ),
    ],
)
def test_bad_values_are_named(values: dict, reasons: list[str]):
    with pytest.raises(ModelError) as caught:
        parse("llama", **values)
    for reason in reasons:
        assert reason in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_missing_keys_are_named(key: str):
    values = {"model_type": "llama", **SIZES}
    del values[key]
    with pytest.raises(ModelError, match=f"{key} is missing"):
        parse_config(values, where="config.json")


@pytest.mark.parametrize(
    "kinds", [["full_attention"], ["sliding_attention"] * 4, ["x"] * 4, 3]
)
def test_bad_layer_types_are_refused(kinds):
    with pytest.raises(ModelError, match="layer_types"):
        parse("qwen3", layer_types=kinds)


def test_bitsandbytes_configs_are_read(fixtures: Path):
    expected = read_config(fixtures / "tiny_llama3")
    assert read_config(fixtures / "bnb_nf4_dq_dynamic") == expected


def test_config_over_a_megabyte_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(" " * 1_000_001)
    with pytest.raises(ModelError, match="larger than"):
        read_config(tmp_path)


KEYS = st.sampled_from(
    (
        *SIZES,
        *("head_dim", "rope_theta", "rope_scaling", "rope_parameters", "layer_types"),
        *("sliding_window", "eos_token_id", "hidden_act", "quantization_config"),
        *("use_sliding_window", "rms_norm_eps", "rope_type", "factor", "type"),
    )
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.integers()
    | st.floats(allow_nan=True)
    | st.sampled_from(["llama3", "linear", "silu", "x"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5)
    ),
    max_leaves=8,
)


@given(
    family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]) | VALUES,
    values=st.dictionaries(KEYS, VALUES, max_size=6),
)
def test_random_configs_are_read_or_refused(family, values: dict):
    values = SIZES | values | {"model_type": family}
    with contextlib.suppress(FastJaxError):
        assert parse_config(values, where="x").head_dim % 2 == 0


def test_gemma_3_of_transformers_4_is_the_same(fixtures: Path):
    config = read_config(fixtures / "tiny_gemma3_text")
    values = json.loads((fixtures / "tiny_gemma3_text" / "config.json").read_text())
    del values["rope_parameters"], values["tie_word_embeddings"]
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    old["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    assert parse_config(values | old, where="config.json") == config


def test_first_names_of_longrope_are_known():
    options = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
    ropes = [
        parse("phi3", rope_scaling=LONGROPE | {"type": name}, **options).rope
        for name in ("longrope", "su", "yarn")
    ]
    assert ropes[0].kind == "longrope"
    assert ropes == [ropes[0]] * 3
    assert ropes[0].factor == 4.0
