"""Makes a tiny random checkpoint of each family, with the numbers of transformers.

Usage: make_family_fixtures.py FIXTURES, with the oracle's Python. Sizes are chosen to
hurt: odd vocabularies, heads of another size than D / N, one key head, windows shorter
than the row, a row longer than the trained context. Writes FIXTURES/tiny_<family>/ with
config.json, model.safetensors and reference.safetensors: input_ids, logits, logits of
the first SHORT tokens alone, and with a LoRA on every linear its start (lora.*), the
gradients of the mean loss (grad.*) and the logits (lora_logits). Also rope_tables.json:
the frequencies of every kind of RoPE, from the keys of transformers 4 and 5; and
stretched_context.safetensors: logits of some of these models with their context of 64
tokens stretched to LONG, at every tenth place of a text of LONG tokens.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

TOKENS, SHORT, LONG = 20, 12, 160
SIZES = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 4,
    "pad_token_id": 5,
}
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 8}
GEMMA = {
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 24,
    "hidden_activation": "gelu_pytorch_tanh",
}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 5e5,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
}
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "vocab_size": 151,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        **GEMMA,
        **MIXED,
    },
    "gemma3_text": {
        "vocab_size": 157,
        "rope_parameters": {FULL: LINEAR, SLIDING: PLAIN},
        **GEMMA,
        **MIXED,
    },
    "granite": {
        "vocab_size": 131,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 3.3,
        "attention_multiplier": 0.17,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.5,
    },
    "olmo2": {"vocab_size": 149, "num_hidden_layers": 2},
    "olmo3": {
        "vocab_size": 129,
        "rope_parameters": {FULL: YARN, SLIDING: PLAIN},
        **MIXED,
    },
    "phi3": {
        "vocab_size": 137,
        "hidden_size": 64,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "original_max_position_embeddings": 16,
        "rope_parameters": LONGROPE,
        "sliding_window": 8,
    },
    "smollm3": {
        "vocab_size": 163,
        "no_rope_layers": [1, 0, 1],
        "tie_word_embeddings": True,
    },
}
# The older families a second time, with sizes that hurt.
MODELS |= {
    "odd_llama": {"vocab_size": 139},
    "odd_mistral": {"vocab_size": 127, "sliding_window": 8},
    "odd_qwen2": {
        "vocab_size": 133,
        "hidden_size": 64,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        **MIXED,
    },
    "odd_qwen3": {"vocab_size": 141, "tie_word_embeddings": True},
}
LORA = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
QWEN_YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 5e5},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "yarn, 4": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **QWEN_YARN}},
    "yarn, 5": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.8,
            "mscale_all_dim": 0.5,
            "truncate": False,
            **QWEN_YARN,
        }
    },
    "longrope": {
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + i / 8 for i in range(16)],
            "long_factor": [1.0 + i for i in range(16)],
        },
    },
    "partial": {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
}

# Model, and what its RoPE and context become.
STRETCHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "linear": ("odd_llama", {"rope_type": "linear", "factor": 2.5}, 64),
    "dynamic": ("odd_qwen3", {"rope_type": "dynamic", "factor": 2.5}, 64),
    "yarn": (
        "granite",
        {
            "rope_type": "yarn",
            "factor": 2.5,
            "original_max_position_embeddings": 64,
        },
        LONG,
    ),
    "linear again": ("gemma3_text", LINEAR | {"factor": 20.0}, LONG),
    "yarn again": ("olmo3", YARN | {"factor": 10.0}, LONG),
}


def main(fixtures: Path) -> None:
    """Writes every fixture."""
    for name, values in MODELS.items():
        folder = fixtures / f"tiny_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        write_model(folder, name, SIZES | values)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder.name}: {size:,} bytes")
    tables = {name: rope_tables(values) for name, values in ROPES.items()}
    (fixtures / "rope_tables.json").write_text(json.dumps(tables, indent=1) + "\n")
    write_stretched(fixtures)


def write_model(folder: Path, model_type: str, values: dict[str, Any]) -> None:
    """Writes one random model and what it computes."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type.removeprefix("odd_"), **values)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    excite(model)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    ids = torch.randint(6, config.vocab_size, (2, TOKENS))
    with torch.no_grad():
        numbers = {
            "input_ids": ids,
            "logits": model(ids).logits,
            "short_logits": model(ids[:, :SHORT].contiguous()).logits,
        }
    numbers |= lora_step(model, ids)
    numbers = {key: value.contiguous().clone() for key, value in numbers.items()}
    save_file(numbers, folder / "reference.safetensors")


def excite(model: PreTrainedModel) -> None:
    """Makes every weight matter: larger matrices, norms and biases of all sizes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            else:
                parameter.mul_(4.0)


def lora_step(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns start and gradients of a LoRA on every linear, by PEFT's keys."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    output = adapted(ids, labels=ids)
    output.loss.backward()
    numbers = {"lora_logits": output.logits.detach(), "loss": output.loss.detach()}
    for name, parameter in trained.items():
        key = name.replace(".default", "")
        numbers[f"lora.{key}"] = parameter.detach()
        numbers[f"grad.{key}"] = parameter.grad
    return numbers


def write_stretched(fixtures: Path) -> None:
    """Writes what models of longer contexts compute."""
    ids = torch.randint(6, 120, (1, LONG), generator=torch.Generator().manual_seed(1))
    numbers = {"input_ids": ids}
    for name, (model_type, rope, context) in STRETCHED.items():
        folder = fixtures / f"tiny_{model_type}"
        config = AutoConfig.from_pretrained(folder)
        config.max_position_embeddings = context
        parameters = config.rope_parameters
        if FULL in parameters:
            config.rope_parameters = {**parameters, FULL: rope}
        else:
            config.rope_parameters = {"rope_theta": parameters["rope_theta"], **rope}
        model = AutoModelForCausalLM.from_pretrained(folder, config=config)
        with torch.no_grad():
            numbers[name] = model.eval()(ids).logits[:, ::10].contiguous()
    save_file(numbers, fixtures / "stretched_context.safetensors")


def rope_tables(values: dict[str, Any]) -> dict[str, Any]:
    """Returns keys of config.json and the frequencies that they mean."""
    model_type = "phi3" if "original_max_position_embeddings" in values else "llama"
    sizes = SIZES | {"hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4}
    sizes |= {"max_position_embeddings": 256, "vocab_size": 64, "rms_norm_eps": 1e-5}
    given = json.loads(json.dumps(sizes | values))
    config = AutoConfig.for_model(model_type, **json.loads(json.dumps(given)))
    kind = config.rope_parameters["rope_type"]
    found = {}
    for length in (100, 300):
        if kind == "default":
            share = config.rope_parameters.get("partial_rotary_factor") or 1.0
            dim = int(config.head_dim * share)
            powers = torch.arange(0, dim, 2).float() / dim
            table, scale = 1 / config.rope_parameters["rope_theta"] ** powers, 1.0
        else:
            table, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        found[str(length)] = {"inv_freq": table.tolist(), "scale": scale}
    return {"config": {"model_type": model_type, **given}, "lengths": found}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
