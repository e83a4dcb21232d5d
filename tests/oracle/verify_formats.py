"""Reads what export_formats.py wrote with llama.cpp and bitsandbytes.

Usage: verify_formats.py OUT, with the oracle's Python. Exit code 1 when a row fails.

gguf  largest difference of llama.cpp's logits from ours in float32, and the share of
      places with the same likeliest token. The file is exact, so the difference is
      llama.cpp's arithmetic (float16 keys and values): bound 5e-3. Files of fewer bits
      are printed, not bounded, except that they must be near: correlation above 0.95.
bnb   every dequantised weight of transformers + bitsandbytes is ours bit for bit.
"""

import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import llama_cpp
import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

EXACT_BOUND = 5e-3
NEAR = 0.95


def main(out: Path) -> int:
    """Returns the exit code: 1 when any row fails."""
    manifest = json.loads((out / "formats.json").read_text())
    ids = manifest["input_ids"][0]
    logging.disable_progress_bar()
    torch.backends.mkldnn.enabled = False
    without_amx()
    failures = 0
    for case in manifest["cases"]:
        check = {"gguf": checked_gguf, "bnb": checked_bnb}[case["kind"]]
        row, is_good = check(case, ids)
        print(
            f"{case['kind']:5} {case['name']:32} {row} {'PASS' if is_good else 'FAIL'}"
        )
        failures += not is_good
    print(f"{failures} rows failed")
    return int(failures > 0)


def without_amx() -> None:
    """Keeps llama.cpp off AMX, which some virtual machines name but forbid."""
    default = llama_cpp.llama_cpp.llama_model_default_params

    def plain() -> Any:
        params = default()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain


def checked_gguf(case: dict[str, Any], ids: list[int]) -> tuple[str, bool]:
    """Compares llama.cpp's logits with ours."""
    ids = ids[: case["tokens"]]
    llama = llama_cpp.Llama(
        case["model"],
        n_ctx=len(ids),
        logits_all=True,
        verbose=False,
        lora_path=case.get("lora"),
        n_threads=1,
    )
    llama.eval(ids)
    actual = np.array(llama.scores[: len(ids)])
    expected = load_file(case["logits"])["logits"][0, : len(ids)].numpy()
    difference = float(np.abs(actual - expected).max())
    same = float((actual.argmax(-1) == expected.argmax(-1)).mean())
    near = float(np.corrcoef(actual.ravel(), expected.ravel())[0, 1])
    is_good = near > NEAR and (difference < EXACT_BOUND or not case["is_exact"])
    return f"max diff {difference:9.2e}  argmax {same:7.1%}  corr {near:.6f}", is_good


@torch.inference_mode()
def checked_bnb(case: dict[str, Any], ids: list[int]) -> tuple[str, bool]:
    """Compares the dequantised weights, and prints the difference of logits."""
    dtype = getattr(torch, case["dtype"])
    model, info = AutoModelForCausalLM.from_pretrained(
        case["model"], dtype=dtype, output_loading_info=True
    )
    expected = load_file(case["weights"])
    quantised = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }
    differing = [
        name
        for name, module in quantised.items()
        if name not in expected or not torch.equal(_dense(module), expected[name])
    ]
    is_good = quantised.keys() == expected.keys() and not differing
    is_good = is_good and not any(info.values())
    ours = load_file(case["logits"])["logits"]
    theirs = model.dequantize().float()(torch.tensor([ids])).logits
    difference = float((theirs - ours).abs().max())
    return (
        f"{len(quantised):3} weights, {len(differing)} differ; float32 logits "
        f"{difference:9.2e}",
        is_good,
    )


def _dense(module: Linear4bit) -> torch.Tensor:
    weight = module.weight
    return bnb.dequantize_4bit(weight.data, weight.quant_state).cpu()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
