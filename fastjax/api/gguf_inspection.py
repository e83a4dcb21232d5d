"""What GGUF files of llama.cpp hold, for people."""

import collections
from collections.abc import Iterator
from pathlib import Path

from conversions.gguf.header import GGUFHeader, read_header

_GIB = 2**30
_DOWN = ".lora_a"
_ROPES = {"rope_freqs.weight": "llama3", "rope_factors_long.weight": "longrope"}


def gguf_facts(path: Path) -> Iterator[tuple[str, str]]:
    """Yields name and value of what a file is.

    Raises:
      ModelError: It is no GGUF file, or broken.
    """
    header = read_header(path)
    values = header.values
    family = values.get("general.architecture", "unknown")
    is_adapter = values.get("general.type") == "adapter"
    kind = "adapter for llama.cpp" if is_adapter else "model for llama.cpp"
    yield "GGUF", f"{path.name}: {family} {kind}"
    if is_adapter:
        ranks = {
            shape[0]
            for name, (shape, _) in header.tensors.items()
            if name.endswith(_DOWN)
        }
        shown = ", ".join(map(str, sorted(ranks)))
        yield "adapter", f"rank {shown}, alpha {values.get('adapter.lora.alpha')}"
    yield "weights", _weights(header, path.stat().st_size)
    if is_adapter:
        return
    names = ("block_count", "embedding_length")
    layers, wide = (values.get(f"{family}.{name}") for name in names)
    yield "sizes", f"{layers} layers of {wide}"
    rope = values.get(f"{family}.rope.scaling.type", "default")
    by_tensor = (kind for name, kind in _ROPES.items() if name in header.tensors)
    rope = next(by_tensor, rope)
    yield "context", f"{values.get(f'{family}.context_length')} tokens, RoPE {rope}"
    template = "with" if "tokenizer.chat_template" in values else "without"
    yield (
        "tokenizer",
        f"{values.get('tokenizer.ggml.tokens', 0)} tokens, "
        f"{values.get('tokenizer.ggml.model')} {values.get('tokenizer.ggml.pre', '')}, "
        f"{template} chat template",
    )


def _weights(header: GGUFHeader, size: int) -> str:
    kinds = collections.Counter(kind for _, kind in header.tensors.values())
    parts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{len(header.tensors)} tensors ({parts}), {size / _GIB:.2f} GiB"
