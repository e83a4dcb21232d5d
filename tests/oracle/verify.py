"""Compares what export.py wrote with PEFT and transformers, and prints a table.

Usage: verify.py OUT, with the oracle's Python. Exit code 1 when a row fails.

error  |fastjax - torch| / |torch|, Frobenius norms of all logits
noise  |torch in bfloat16 - torch in float32| / |torch in float32|, PEFT's adapter
bound  float32: 1e-5, or 1e-3 where bitsandbytes quantises the base here: its CPU build
       rounds block scales by a table, fastjax and CUDA to the nearest, so a few differ;
       bfloat16: 2 x noise, for two such errors meet in the difference
effect |with adapter - base| / |base| in torch: what a silent adapter would miss
"""

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

FLOAT32_BOUND = 1e-5
REQUANTISED_BOUND = 1e-3
NOISE_FACTOR = 2.0
SMALLEST_EFFECT = 0.05
DTYPES = ("float32", "bfloat16")
HEADER = (
    f"{'case':32} {'what':8} {'dtype':8} {'max diff':>9} {'error':>9} {'noise':>9} "
    f"{'bound':>9} {'argmax':>7} {'effect':>7}"
)


class Adapted(NamedTuple):
    """Logits of a base with an adapter, and how far the adapter moved them."""

    logits: torch.Tensor
    effect: float
    problems: list[str]


def main(out: Path) -> int:
    """Returns the exit code: 1 when any row fails."""
    manifest = json.loads((out / "manifest.json").read_text())
    input_ids = torch.tensor(manifest["input_ids"])
    logging.disable_progress_bar()
    # oneDNN takes AMX wherever the CPU names it; some virtual machines forbid its use.
    torch.backends.mkldnn.enabled = False
    print(HEADER)
    failures = 0
    for case in manifest["cases"]:
        for row, problems in checked(out, case, input_ids):
            print(row, "; ".join(["FAIL", *problems]) if problems else "PASS")
            failures += bool(problems)
    print(f"{failures} rows failed")
    return int(failures > 0)


def checked(
    out: Path, case: dict[str, Any], input_ids: torch.Tensor
) -> Iterator[tuple[str, list[str]]]:
    """Yields a line of the table and its problems: adapter and merged, each dtype."""
    expected = load_file(out / case["logits"])
    adapted = {dtype: run_adapter(out, case, dtype, input_ids) for dtype in DTYPES}
    exact, rounded = adapted["float32"].logits, adapted["bfloat16"].logits
    noise = relative_error(rounded, exact)
    for dtype in DTYPES:
        merged, merge_problems = run_merged(out / case["merged"][dtype], input_ids)
        for what, actual, problems in (
            ("adapter", adapted[dtype].logits, adapted[dtype].problems),
            ("merged", merged, merge_problems),
        ):
            bound = NOISE_FACTOR * noise
            if dtype == "float32":
                is_requantised = case["nf4"] == "loader" and what == "adapter"
                bound = REQUANTISED_BOUND if is_requantised else FLOAT32_BOUND
            error = relative_error(expected[dtype], actual)
            if not error <= bound:
                problems = [*problems, "error above bound"]
            yield (
                f"{case['name']:32} {what:8} {dtype:8} "
                f"{(expected[dtype] - actual).abs().max():9.2e} {error:9.2e} "
                f"{noise:9.2e} {bound:9.2e} {agreement(expected[dtype], actual):7.1%} "
                f"{adapted[dtype].effect:7.1%}",
                problems,
            )


def load_base(folder: Path, nf4: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a base model that computes in `dtype`, in NF4 where the case wants it."""
    options = {}
    if nf4 == "loader":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    if nf4 == "file" and dtype == torch.float32:
        # bitsandbytes would not round to the dtype of the file, and transformers would
        # keep that dtype for all else.
        model = model.dequantize().float()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            # Else some CPUs re-tile the weight, compute in bfloat16 whatever the dtype,
            # and PEFT's DoRA reads the tiles as if they were rows.
            module.support_avx512bf16_for_cpu = False
    return model


def run_adapter(
    out: Path, case: dict[str, Any], dtype: str, input_ids: torch.Tensor
) -> Adapted:
    """Returns what PEFT computes with the adapter on its base."""
    base = load_base(out / case["base"], case["nf4"], getattr(torch, dtype))
    without = logits_of(base, input_ids)
    folder = out / case["adapter"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder)
    messages = [str(warning.message) for warning in caught]
    problems = [message for message in messages if "adapter keys" in message]
    problems += [f"not the file's: {name}" for name in altered_tensors(model, folder)]
    logits = logits_of(model, input_ids)
    effect = relative_error(logits, without)
    if effect < SMALLEST_EFFECT:
        problems.append("the adapter hardly acts")
    return Adapted(logits, effect, problems)


def altered_tensors(model: PeftModel, folder: Path) -> list[str]:
    """Returns names of tensors that only the file or PEFT has, or that differ."""
    held = get_peft_model_state_dict(model)
    stored = load_file(folder / "adapter_model.safetensors")
    return sorted(
        name
        for name in held.keys() | stored.keys()
        if name not in held
        or name not in stored
        or not torch.equal(held[name], stored[name].to(held[name].dtype))
    )


def run_merged(folder: Path, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """Returns what transformers computes with a merged folder, in its own dtype."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    problems = [f"{kind}: {found}" for kind, found in info.items() if found]
    return logits_of(model, input_ids), problems


@torch.inference_mode()
def logits_of(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Returns the logits as float32."""
    return model.eval()(input_ids=input_ids).logits.float()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns |actual - expected| / |expected|."""
    return float((actual - expected).norm() / expected.norm())


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the share of places with the same likeliest token."""
    return float((a.argmax(-1) == b.argmax(-1)).float().mean())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
