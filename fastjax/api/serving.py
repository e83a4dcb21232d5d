"""What servers will not load, said before anything is trained."""

from typing import get_args

from fastjax.config import LoRAConfig, Table

_VLLM_LARGEST_RANK = 512
_MERGE = "merge it with `fastjax export` to serve it there"


def serving_notes(lora: LoRAConfig) -> list[str]:
    """Returns a sentence for each choice that keeps an adapter from a server."""
    notes = []
    if lora.use_dora:
        notes.append(f"vLLM and llama.cpp load no DoRA adapters: {_MERGE}")
    if lora.init_lora_weights == "loftq":
        notes.append(
            "an adapter that started with LoftQ is right on its 4-bit base alone: "
            "elsewhere export a merged model with --base_precision dequantised"
        )
    if lora.lora_bias != "none" or lora.lora_b_bias:
        notes.append(f"vLLM and llama.cpp load no adapters with biases: {_MERGE}")
    targets = lora.lora_target_modules
    names = () if isinstance(targets, str) else targets
    on_tables = any(name.rpartition(".")[2] in get_args(Table) for name in names)
    if on_tables or lora.modules_to_save or lora.trainable_token_indices:
        notes.append(
            f"vLLM and llama.cpp load no adapters with trained embeddings: {_MERGE}"
        )
    patterns = (entry.rpartition("=")[2] for entry in lora.rank_pattern)
    rank = max([lora.lora_r, *(int(float(number)) for number in patterns)])
    if rank > _VLLM_LARGEST_RANK:
        largest = _VLLM_LARGEST_RANK
        notes.append(f"vLLM loads no rank above {largest}, this is {rank}")
    return notes
