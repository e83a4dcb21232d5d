"""config.json <-> TransformerConfig, as transformers 4 and 5 write it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from conversions.hf.config_fields import ConfigFields
from conversions.hf.eight_bit import BLOCK
from conversions.hf.families import find_family
from conversions.hf.family import Family
from conversions.strict_json import read_json_object
from fastjax.config import DType
from fastjax.errors import ConfigError, ModelError, printable
from fastjax.files import new_file
from fastjax.models.transformer_config import TransformerConfig

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
MAX_CONFIG_BYTES = 1_000_000

_BNB = "bitsandbytes"
_BNB_SWITCHES = ("load_in_4bit", "load_in_8bit")
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "head_dim": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_theta": None,
    "partial_rotary_factor": None,
}


def read_config(folder: Path) -> TransformerConfig:
    """Returns what the model of a folder is.

    End tokens of generation_config.json are added to those of config.json: the first
    holds every token that ends a turn, the second often only one.

    Raises:
      ModelError: Names key, value and what is allowed.
    """
    path = folder / CONFIG_NAME
    values = read_json_object(path, limit_bytes=MAX_CONFIG_BYTES)
    config = parse_config(values, where=str(path))
    path = folder / GENERATION_NAME
    if not path.exists():
        return config
    values = read_json_object(path, limit_bytes=MAX_CONFIG_BYTES)
    fields = ConfigFields(values, where=str(path), defaults={"eos_token_id": None})
    more = fields.token_ids("eos_token_id")
    return dataclasses.replace(
        config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more))
    )


def parse_config(values: Mapping[str, Any], *, where: str) -> TransformerConfig:
    """Returns what the model of a parsed config.json is."""
    _refuse_code_and_foreign_quantisation(values, where)
    family = find_family(values.get("model_type"), where=where, values=values)
    fields = ConfigFields(values, where=where, defaults=_DEFAULTS | family.defaults)
    try:
        return _transformer_config(fields, family)
    except ConfigError as error:
        raise ModelError(error.what, where=where) from error


def write_config(folder: Path, config: TransformerConfig, *, dtype: DType) -> None:
    """Writes a config.json that transformers 4 and 5 read alike.

    For checkpoints that start here; those that come from elsewhere keep their own.

    Raises:
      ConfigError: The family's config.json cannot say what `config` says.
    """
    where = str(folder / CONFIG_NAME)
    values = _config_keys(config, dtype)
    readback = parse_config(values, where=where)
    lost = [
        field.name
        for field in dataclasses.fields(config)
        if field.name != "layer_windows"
        and getattr(config, field.name) != getattr(readback, field.name)
    ]
    if readback.windows != config.windows:
        lost.append("layer_windows")
    if lost:
        raise ConfigError(f"{config.family} models cannot have this {', '.join(lost)}")
    with new_file(folder / CONFIG_NAME) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode("utf-8"))


def stretched_keys(
    config: TransformerConfig, base: TransformerConfig
) -> dict[str, Any]:
    """Returns the keys of config.json of a model whose context is not its base's."""
    if config.rope == base.rope:
        return {}
    family = find_family(config.family, where="TransformerConfig.family")
    context = {"max_position_embeddings": config.max_position_embeddings}
    return context | family.rope_keys(config)


def _transformer_config(fields: ConfigFields, family: Family) -> TransformerConfig:
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers")
    head_dim = fields.optional_integer("head_dim")
    if head_dim is None and hidden % heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads={heads}")
    first = fields.token_ids("bos_token_id")
    pad = fields.token_ids("pad_token_id")
    act = cast(
        Literal["silu", "gelu_pytorch_tanh"],
        fields.choice(family.activation_key, _ACTIVATIONS),
    )
    return TransformerConfig(
        family=fields.get("model_type"),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.optional_integer("num_key_value_heads") or heads,
        head_dim=head_dim or hidden // heads,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        hidden_act=act,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        layer_windows=family.windows(fields, layers),
        bos_token_id=first[0] if first else None,
        eos_token_ids=fields.token_ids("eos_token_id"),
        pad_token_id=pad[0] if pad else None,
        **family.ropes(fields),
        **family.switches(fields),
    )


def _config_keys(config: TransformerConfig, dtype: DType) -> dict[str, Any]:
    family = find_family(config.family, where="TransformerConfig.family")
    ends = list(config.eos_token_ids)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    same += ("num_attention_heads", "num_key_value_heads", "head_dim")
    same += ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    same += ("bos_token_id", "pad_token_id")
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        **{key: getattr(config, key) for key in same},
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        family.activation_key: config.hidden_act,
        **family.rope_keys(config),
        **family.keys(config),
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _refuse_code_and_foreign_quantisation(
    values: Mapping[str, Any], where: str
) -> None:
    if values.get("auto_map"):
        raise ModelError(
            "auto_map: this model runs code from its repository; that is not supported",
            where=where,
            fix="use a model that transformers supports without trust_remote_code",
        )
    quantisation = values.get("quantization_config")
    if quantisation is None:
        return
    fields = ConfigFields(
        quantisation if isinstance(quantisation, dict) else {"quant_method": None},
        where=f"{where}, quantization_config",
        defaults={"quant_method": None},
    )
    method = fields.get("quant_method")
    is_bnb = any(fields.values.get(key) is True for key in _BNB_SWITCHES)
    if method in (_BNB, None) and is_bnb:
        return
    block = fields.values.get("weight_block_size")
    if method == "fp8" and block == [BLOCK, BLOCK]:
        return
    shown = printable(repr(method))
    kind = f"fp8 with weight_block_size={block}" if method == "fp8" else shown
    raise ModelError(
        f"weights quantised by {kind} are not supported",
        where=fields.where,
        fix="use the 16-bit model that these were made of (load_in_4bit quantises it "
        "on the way), or one of bitsandbytes (4 or 8 bits) or FP8 in blocks of "
        f"{BLOCK} x {BLOCK}",
    )
