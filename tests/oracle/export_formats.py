"""Writes models for bitsandbytes and llama.cpp, and the logits they must give.

Usage: export_formats.py OUT, with fastjax's Python, after export.py OUT.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import flax as jax_files
from safetensors import numpy as numpy_files

from conversions.hf import Checkpoint, read_config, stream_weights
from fastjax.api import load_model, run_export
from fastjax.config import QuantConfig
from kernels.nf4 import NF4Array, dequantize

VOCABULARY = 512
FIXTURES = Path(__file__).parents[1] / "fixtures"
GGUF_MODELS = (
    "tiny_llama3",
    "tiny_llama_tied",
    "tiny_mistral",
    "tiny_qwen2",
    "tiny_qwen3",
)
GGUF_TYPES = {"tiny_llama3": ("f32", "f16", "bf16", "q8_0", "q4_0", "q5_1")}
# llama.cpp fixes these by the family; the other numbers stay those of the fixtures.
SIX_LAYERS = [*["sliding_attention"] * 5, "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "gemma2": ("tiny_gemma2", 1, {"query_pre_attn_scalar": 16}),
    "gemma3": (
        "tiny_gemma3_text",
        2,
        {
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 6,
            "layer_types": SIX_LAYERS,
        },
    ),
    # llama.cpp wants the tokens of Phi-3 in every model with "phi3" in its name.
    "fused-longrope": ("tiny_phi3", 1, {"sliding_window": None}),
    "qwen2-yarn": (
        "tiny_qwen2",
        1,
        {"rope_parameters": YARN | {"original_max_position_embeddings": 16}},
    ),
}
WINDOWS = {"tiny_mistral": 8}  # llama.cpp sees beyond it
ADAPTERS = ("peft_lora_default", "peft_lora_rslora")
MERGES = ("peft_lora_dora", "peft_lora_bias")
PREQUANTISED = ("bnb_nf4_dq_bf16", "bnb_nf4_dq_dynamic", "bnb_nf4_nodq_fp16")


def main(out: Path) -> None:
    """Writes gguf/, bnb/ and formats.json to `out`."""
    bases, work = out / "format_bases", out / "formats"
    work.mkdir()
    for name in (*GGUF_MODELS, *PREQUANTISED):
        shutil.copytree(FIXTURES / name, bases / name)
        shutil.copytree(FIXTURES / "tokenizer_v5", bases / name, dirs_exist_ok=True)
    for name, (fixture, copies, values) in VARIANTS.items():
        write_variant(FIXTURES / fixture, bases / name, copies, values)
    for name in (*ADAPTERS, *MERGES):
        write_adapter(FIXTURES / name, bases / name)
    ids = np.random.default_rng(1).integers(6, 400, (1, 48)).astype(np.int32)
    cases = [*gguf_cases(bases, work, ids), *bnb_cases(bases, work, ids)]
    manifest = {"input_ids": ids.tolist(), "cases": cases}
    (out / "formats.json").write_text(json.dumps(manifest, indent=2))


def write_adapter(fixture: Path, folder: Path) -> None:
    """Copies an adapter that names its base by the path of here."""
    shutil.copytree(fixture, folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    base = folder.parent / Path(config["base_model_name_or_path"]).name
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))


def write_variant(
    fixture: Path, folder: Path, copies: int, values: dict[str, Any]
) -> None:
    """Writes a fixture with other settings, and its layers several times over.

    The vocabulary grows to that of the tokenizer by repeating rows.
    """
    shutil.copytree(FIXTURES / "tokenizer_v5", folder)
    config = json.loads((fixture / "config.json").read_text()) | values
    tensors = dict(jax_files.load_file(fixture / "model.safetensors"))
    layers = config["num_hidden_layers"] // copies
    for name in list(tensors):
        head, mark, tail = name.partition("layers.")
        layer, _, tail = tail.partition(".")
        for copy in range(1, copies if mark else 1):
            place = int(layer) + copy * layers
            tensors[f"{head}{mark}{place}.{tail}"] = tensors[name]
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
        rows = jnp.arange(VOCABULARY) % len(tensors[name])
        # Rows that are alike would leave the likeliest token open.
        tensors[name] = tensors[name][rows] * (1 + 1e-2 * (rows[:, None] % 7))
    config["vocab_size"] = VOCABULARY
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = folder / "model.safetensors"
    jax_files.save_file(tensors, weights, metadata={"format": "pt"})


def export(source: Path, target: Path, **options: Any) -> None:
    """Runs the export and prints what it says."""
    for line in run_export(str(source), target, **options):
        print(line, flush=True)


def gguf_cases(bases: Path, work: Path, ids: np.ndarray) -> list[dict[str, Any]]:
    """Writes GGUF models and adapters; returns their entries of the manifest."""
    cases = []
    for name in (*GGUF_MODELS, *MERGES, *VARIANTS):
        for kind in GGUF_TYPES.get(name, ("f32",)):
            target = work / f"{name}-{kind}"
            export(bases / name, target, output_format="gguf", gguf_type=kind)
            file = str(target / "model.gguf")
            expected = logits(bases / name, work / f"{name}.logits", ids)
            cases.append(
                {"kind": "gguf", "name": f"{name} {kind}", "model": file}
                | {"logits": expected, "is_exact": kind == "f32"}
                | {"tokens": WINDOWS.get(name, ids.size)}
            )
    for name in ADAPTERS:
        target = work / f"{name}-lora"
        export(bases / name, target, output_format="gguf-lora")
        cases.append(
            {"kind": "gguf", "name": f"{name} beside base", "is_exact": True}
            | {"model": str(work / "tiny_llama3-f32" / "model.gguf")}
            | {"tokens": ids.size, "lora": str(target / "adapter.gguf")}
            | {"logits": logits(bases / name, work / f"{name}.logits", ids)}
        )
    return cases


def bnb_cases(bases: Path, work: Path, ids: np.ndarray) -> list[dict[str, Any]]:
    """Writes 4-bit folders, their dequantised weights and logits."""
    cases = []
    sources = [bases / n for n in ("tiny_llama3", "tiny_qwen2", *PREQUANTISED)]
    for source in (*sources, bases / "peft_lora_default"):
        target = work / f"{source.name}-bnb"
        dtype = "float16" if source.name.endswith("fp16") else "bfloat16"
        export(source, target, output_format="bnb-4bit", dtype=dtype)
        config = read_config(target)
        dense = {}
        for name, value in stream_weights(Checkpoint(target), config, dtype=dtype):
            if isinstance(value, NF4Array):
                dense[f"model.{name}"] = jnp.asarray(dequantize(value).T)
        weights = str(target) + ".weights"
        jax_files.save_file(dense, weights)
        cases.append(
            {"kind": "bnb", "name": source.name, "model": str(target)}
            | {"weights": weights, "dtype": dtype}
            | {"logits": logits(target, work / f"{target.name}.logits", ids)}
        )
    return cases


def logits(source: Path, file: Path, ids: np.ndarray) -> str:
    """Writes our float32 logits of a folder, on its dense or stored weights."""
    if not file.exists():
        quant = QuantConfig(load_in_4bit=False)
        model = load_model(str(source), dtype="float32", quant=quant)
        numpy_files.save_file({"logits": np.asarray(model.logits(ids))}, file)
    return str(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
