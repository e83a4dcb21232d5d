"""Makes PEFT adapters of rarer kinds on the tiny families, with the numbers of PEFT.

Usage: make_adapter_fixtures.py FIXTURES, with the oracle's Python. Writes
FIXTURES/adapter_<kind>/: the folder as PEFT saves it, without its card, and
reference.safetensors with input_ids, the logits of base and adapter, the mean loss and
its gradients (grad.*, by PEFT's keys).
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

TOKENS = 20
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "olmo2",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"down_proj": 12, "layers.[01].*q_proj": 5},
        },
    ),
    "tables": (
        "olmo2",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens", "lm_head"],
            "init_lora_weights": "gaussian",
        },
    ),
    "tied_tables": (
        "gemma2",
        {
            "target_modules": ["v_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "tokens": (
        "olmo2",
        {"target_modules": ["o_proj"], "trainable_token_indices": [9, 3, 140]},
    ),
    "tied_tokens": (
        "gemma2",
        {"target_modules": ["o_proj"], "trainable_token_indices": [7, 150]},
    ),
    "up_biases": (
        "granite",
        {"target_modules": ["q_proj", "o_proj", "down_proj"], "lora_bias": True},
    ),
    "ends": (
        "olmo2",
        {
            "target_modules": ["q_proj", "embed_tokens", "lm_head"],
            "rank_pattern": {"lm_head": 3},
            "use_rslora": True,
        },
    ),
    "tied_ends": (
        "gemma2",
        {"target_modules": ["v_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "layers": (
        "gemma2",
        {
            "target_modules": ALL,
            "layers_to_transform": [0, 2],
            "use_dora": True,
            "use_rslora": True,
        },
    ),
}


def main(fixtures: Path) -> None:
    """Writes every adapter."""
    for name, (base, options) in ADAPTERS.items():
        folder = fixtures / f"adapter_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        write_adapter(folder, fixtures / f"tiny_{base}", options)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder.name}: {size:,} bytes")


def write_adapter(folder: Path, base: Path, options: dict[str, Any]) -> None:
    """Writes one adapter, whose every part acts, and what it computes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options)
    adapted = get_peft_model(model, lora).eval()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    ids = torch.randint(6, model.config.vocab_size, (2, TOKENS))
    ids[0, :6] = torch.tensor([3, 9, 7, 140, 150, 3]) % model.config.vocab_size
    output = adapted(ids, labels=ids)
    output.loss.backward()
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": base.name}
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2))
    state = get_peft_model_state_dict(adapted)
    places: dict[int, str] = {}
    for key, value in state.items():
        places.setdefault(value.data_ptr(), key)
    numbers = {"input_ids": ids, "logits": output.logits, "loss": output.loss}
    for parameter in trained.values():
        key = f"grad.{places[parameter.data_ptr()]}"
        # The adapters of tied ends are one memory, but two parameters.
        gradient = parameter.grad
        if key in numbers:
            gradient = numbers[key] + gradient.T
        numbers[key] = gradient
    numbers = {k: v.detach().contiguous().clone() for k, v in numbers.items()}
    save_file(numbers, folder / "reference.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
