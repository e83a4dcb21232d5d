"""Writes what bitsandbytes, llama.cpp, PEFT and transformers must load, with logits.

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
from fastjax import FastLanguageModel, add_new_tokens
from fastjax import lora as adapters
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
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
# llama.cpp wants these in every model with "phi3" in its name, and blanks dropped after
# all other control tokens.
PHI3_TOKENS = {"</s>": True, "<unk>": False, "<s>": False, "<|endoftext|>": False}
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
    "phi3": ("tiny_phi3", 1, {"sliding_window": None}),
    "phi3-plain": (
        "tiny_phi3",
        1,
        {"sliding_window": None, "rope_parameters": PLAIN},
    ),
    "qwen2-yarn": (
        "tiny_qwen2",
        1,
        {"rope_parameters": YARN | {"original_max_position_embeddings": 16}},
    ),
}
WINDOWS = {"tiny_mistral": 8}  # llama.cpp sees beyond it
ADAPTERS = ("peft_lora_default", "peft_lora_rslora")
MERGES = ("peft_lora_dora", "peft_lora_bias")
# Adapters of ours by name: base, how it is loaded, what `get_peft_model` is told.
LORA_BASES = (*GGUF_MODELS, "gemma2", "gemma3", "phi3")
STRETCHES = ("linear", "dynamic", "yarn")
NEW_TOKENS = [f"<new {n}>" for n in range(150)]
ENDS = ["embed_tokens", "lm_head"]
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
        if name.startswith("phi3"):
            add_phi3_tokens(bases / name / "tokenizer.json")
    for name in (*ADAPTERS, *MERGES):
        write_adapter(FIXTURES / name, bases / name)
    ids = np.random.default_rng(1).integers(6, 400, (1, 48)).astype(np.int32)
    cases = [
        *gguf_cases(bases, work, ids),
        *bnb_cases(bases, work, ids),
        *peft_cases(bases, work),
    ]
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


def add_phi3_tokens(path: Path) -> None:
    """Gives a tokenizer the control tokens of Phi-3."""
    values = json.loads(path.read_text())
    added = {token["content"]: token for token in values["added_tokens"]}
    first = max(
        *(token["id"] for token in added.values()), *values["model"]["vocab"].values()
    )
    for text in PHI3_TOKENS.keys() - added.keys():
        first += 1
        added[text] = next(iter(added.values())) | {"id": first, "content": text}
    for text, token in added.items():
        token["rstrip"] = PHI3_TOKENS.get(text, True)
    values["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    path.write_text(json.dumps(values))


def write_random_adapter(
    base: Path,
    folder: Path,
    *,
    tokens: list[str] | None = None,
    load: dict[str, Any] | None = None,
    **lora: Any,
) -> Any:
    """Writes an adapter with random weights on a base of ours; returns its model."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base), dtype="float32", load_in_4bit=False, **(load or {})
    )
    if tokens:
        add_new_tokens(model, tokenizer, tokens)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, **lora)
    held = adapters.adapter_weights(model.decoder, model.spec)
    random = np.random.default_rng(0)
    drawn = {
        name: jnp.asarray(
            value + 0.1 * random.standard_normal(value.shape), jnp.float32
        )
        for name, value in held.items()
    }
    adapters.set_adapter_weights(model.decoder, model.spec, drawn)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


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
    beside = dict.fromkeys(ADAPTERS, "tiny_llama3")
    for base in LORA_BASES:
        write_random_adapter(bases / base, bases / f"lora-{base}")
        beside[f"lora-{base}"] = base
    for name, base in beside.items():
        target = work / f"{name}-lora"
        export(bases / name, target, output_format="gguf-lora")
        cases.append(
            {"kind": "gguf", "name": f"{name} beside base", "is_exact": True}
            | {"model": str(work / f"{base}-f32" / "model.gguf")}
            | {"tokens": WINDOWS.get(base, ids.size)}
            | {"lora": str(target / "adapter.gguf")}
            | {"logits": logits(bases / name, work / f"{name}.logits", ids)}
        )
    return cases


def peft_cases(bases: Path, work: Path) -> list[dict[str, Any]]:
    """Writes adapters whose base is not as its files say, and merged models of them.

    The context is stretched, or tokens are new. Texts are longer than the context.
    """
    ids = np.random.default_rng(2).integers(6, 400, (1, 600)).astype(np.int32)
    cases = []
    for scaling in STRETCHES:
        folder = bases / f"stretched-{scaling}"
        load = {"max_seq_length": 1024, "rope_scaling": scaling}
        model = write_random_adapter(bases / "tiny_qwen2", folder, load=load)
        case = {"kind": "peft", "name": folder.name, "keys": model.stretch.keys}
        cases.append(case | {"base": str(bases / "tiny_qwen2")})
    new = {"tokens": NEW_TOKENS, "target_modules": ["q_proj"]}
    for name, base, tables in (
        ("new-tokens", "tiny_llama3", ENDS),
        ("new-tokens-tied", "tiny_qwen2", ENDS[:1]),
    ):
        write_random_adapter(bases / base, bases / name, **new, modules_to_save=tables)
        cases.append({"kind": "peft", "name": name})
    for case in cases:
        folder = bases / case["name"]
        merged = work / f"{folder.name}-merged"
        export(folder, merged, dtype="float32")
        case |= {"adapter": str(folder), "merged": str(merged)}
        count = 540 if "new" in folder.name else 400
        case["input_ids"] = (ids % count).tolist()
        if "new" in folder.name:
            case["input_ids"][0][-10:] = range(count - 10, count)
        file = work / f"{folder.name}.logits"
        case["logits"] = logits(folder, file, np.asarray(case["input_ids"], np.int32))
    return cases


def bnb_cases(bases: Path, work: Path, ids: np.ndarray) -> list[dict[str, Any]]:
    """Writes 4-bit folders, their dequantised weights and logits."""
    cases = []
    sources = [bases / n for n in ("tiny_llama3", "tiny_qwen2", *PREQUANTISED)]
    sources += [bases / n for n in ("gemma2", "phi3", "peft_lora_default")]
    formats = [(source, "bnb-4bit") for source in sources]
    for source, output_format in (*formats, (bases / "tiny_llama3", "bnb-dynamic")):
        target = work / f"{source.name}-{output_format}"
        dtype = "float16" if source.name.endswith("fp16") else "bfloat16"
        export(source, target, output_format=output_format, dtype=dtype)
        config = read_config(target)
        dense = {}
        for name, value in stream_weights(Checkpoint(target), config, dtype=dtype):
            if isinstance(value, NF4Array):
                dense[f"model.{name}"] = jnp.asarray(dequantize(value).T)
        weights = str(target) + ".weights"
        jax_files.save_file(dense, weights)
        cases.append(
            {"kind": "bnb", "name": target.name, "model": str(target)}
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
