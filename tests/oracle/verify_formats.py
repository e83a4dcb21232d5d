"""Reads what export_formats.py wrote with llama.cpp, bitsandbytes, PEFT, transformers.

Usage: verify_formats.py OUT [RESULT.json], with the oracle's Python. Exit code 1 when a
row fails; the rows are written to RESULT.json when it is given.

gguf  largest difference of llama.cpp's logits from ours in float32, and the share of
      places with the same likeliest token. The file is exact, so the difference is
      llama.cpp's arithmetic (float16 keys and values): bound 5e-3. Files of fewer bits
      are printed, not bounded, except that they must be near: correlation above 0.95.
bnb   every dequantised weight of transformers + bitsandbytes is ours bit for bit.
peft  an adapter in PEFT, on a base with more tokens or told of a longer context, and
      the merged folder in transformers: bound 1e-4 of the largest logit.
"""

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import llama_cpp
import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

EXACT_BOUND = 5e-3
NEAR = 0.95
LOGIT_BOUND = 1e-4


def main(out: Path, result: Path | None = None) -> int:
    """Returns the exit code: 1 when any row fails."""
    manifest = json.loads((out / "formats.json").read_text())
    ids = manifest["input_ids"][0]
    logging.disable_progress_bar()
    torch.backends.mkldnn.enabled = False
    without_amx()
    failures, rows = 0, []
    for case in manifest["cases"]:
        check = CHECKS[case["kind"]]
        numbers, is_good = check(case, ids)
        row = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        print(
            f"{case['kind']:5} {case['name']:28} {row} {'PASS' if is_good else 'FAIL'}"
        )
        rows.append({"kind": case["kind"], "name": case["name"], **numbers})
        failures += not is_good
    print(f"{failures} rows failed")
    if result is not None:
        write(result, rows)
    return int(failures > 0)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows with what they were made by."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    packages = ("llama-cpp-python", "bitsandbytes", "peft", "transformers", "torch")
    values = {
        "what": "logits of fastjax's files in llama.cpp, and weights and logits of its "
        "4-bit folders in bitsandbytes, adapters in PEFT and merged folders in "
        "transformers, against fastjax in float32; tiny random models",
        "command": "make test-oracle",
        "commit": commit.strip(),
        "device": f"CPU, {platform.machine()}",
        "versions": {name: metadata.version(name) for name in packages},
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n")


def without_amx() -> None:
    """Keeps llama.cpp off AMX, which some virtual machines name but forbid."""
    default = llama_cpp.llama_cpp.llama_model_default_params

    def plain() -> Any:
        params = default()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain


def checked_gguf(case: dict[str, Any], ids: list[int]) -> tuple[dict[str, float], bool]:
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
    numbers = {
        "largest_difference": difference,
        "same_likeliest_token": same,
        "correlation": near,
    }
    return numbers, is_good


@torch.inference_mode()
def checked_bnb(case: dict[str, Any], ids: list[int]) -> tuple[dict[str, float], bool]:
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
    numbers = {
        "quantised_weights": len(quantised),
        "differing_weights": len(differing),
        "largest_difference": difference,
    }
    return numbers, is_good


@torch.inference_mode()
def checked_peft(case: dict[str, Any], ids: list[int]) -> tuple[dict[str, float], bool]:
    """Compares the logits of adapter and merged folder, on a text of its own."""
    del ids
    if "keys" in case:
        base = AutoModelForCausalLM.from_pretrained(case["base"], **case["keys"])
        adapted = PeftModel.from_pretrained(base, case["adapter"])
    else:
        adapted = AutoPeftModelForCausalLM.from_pretrained(case["adapter"])
    merged, info = AutoModelForCausalLM.from_pretrained(
        case["merged"], output_loading_info=True
    )
    expected = load_file(case["logits"])["logits"]
    row = torch.tensor(case["input_ids"])
    differences = [
        float((model.eval()(row).logits - expected).abs().max())
        for model in (adapted, merged)
    ]
    bound = LOGIT_BOUND * float(expected.abs().max())
    is_good = max(differences) < bound and not any(info.values())
    numbers = dict(zip(("largest_difference", "merged"), differences, strict=True))
    return numbers | {"largest_logit": float(expected.abs().max())}, is_good


def _dense(module: Linear4bit) -> torch.Tensor:
    weight = module.weight
    return bnb.dequantize_4bit(weight.data, weight.quant_state).cpu()


CHECKS = {"gguf": checked_gguf, "bnb": checked_bnb, "peft": checked_peft}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(Path, sys.argv[2:3])))
