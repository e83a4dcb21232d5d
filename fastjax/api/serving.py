"""What servers will not load, said before anything is trained."""

from fastjax.config import LoRAConfig

_VLLM_LARGEST_RANK = 512
_MERGE = "merge it with `fastjax export` to serve it there"


def serving_notes(lora: LoRAConfig) -> list[str]:
    """Returns a sentence for each choice that keeps an adapter from a server."""
    notes = []
    if lora.use_dora:
        notes.append(f"vLLM and llama.cpp load no DoRA adapters: {_MERGE}")
    if lora.lora_bias != "none":
        notes.append(f"vLLM and llama.cpp load no adapters with biases: {_MERGE}")
    if lora.lora_r > _VLLM_LARGEST_RANK:
        largest = _VLLM_LARGEST_RANK
        notes.append(f"vLLM loads no rank above {largest}, this is {lora.lora_r}")
    return notes
