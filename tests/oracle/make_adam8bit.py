"""Writes what AdamW with 8-bit states does in bitsandbytes: maps, states, weights.

Usage: make_adam8bit.py OUT.safetensors, with the oracle's Python. The committed file is
tests/fixtures/adam8bit.safetensors. The update is bitsandbytes' own in plain PyTorch;
its CPU operator differs from CUDA's, because it rounds the states by a coarser table.
"""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from bitsandbytes.functional import create_dynamic_map
from safetensors.torch import save_file

try:
    import triton  # noqa: F401
except ModuleNotFoundError:  # the module holds Triton kernels too, which do not run
    sys.modules.update({"triton": MagicMock(), "triton.language": MagicMock()})
from bitsandbytes.backends.triton.kernels_optim import (
    optimizer_update_8bit_blockwise_pytorch,
)

STEPS = 4
ELEMENTS = 256 * 16 + 90  # the last block is not full
HYPERPARAMETERS = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01}
BETAS = {"beta1": 0.9, "beta2": 0.999}


def main(out: Path) -> None:
    """Runs a few steps; block 3 never has a gradient, block 5 a huge spread."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ELEMENTS, generator=generator)
    gradients = torch.randn(STEPS, ELEMENTS, generator=generator)
    gradients *= 10 ** torch.linspace(-5, 2, ELEMENTS)
    gradients[:, 3 * 256 : 4 * 256] = 0
    gradients[:, 5 * 256 : 6 * 256] *= 10 ** torch.linspace(-6, 0, 256)
    maps = [create_dynamic_map(signed=True), create_dynamic_map(signed=False)]
    blocks = -(-ELEMENTS // 256)
    # As `Optimizer2State.init_state`: codes 0 and scales 0, which stand for 0.
    codes = [torch.zeros(ELEMENTS, dtype=torch.uint8) for _ in maps]
    absmax = [torch.zeros(blocks) for _ in maps]
    saved = {"gradients": gradients, "signed_map": maps[0], "unsigned_map": maps[1]}
    saved["weight_0"] = weight.clone()
    for step in range(1, STEPS + 1):
        optimizer_update_8bit_blockwise_pytorch(
            weight,
            gradients[step - 1],
            *codes,
            **BETAS,
            beta3=0.0,
            alpha=0.0,
            step=step,
            qmap1=maps[0],
            qmap2=maps[1],
            absmax1=absmax[0],
            absmax2=absmax[1],
            gnorm_scale=1.0,
            skip_zeros=False,
            optimizer_name="adam",
            **HYPERPARAMETERS,
        )
        saved[f"weight_{step}"] = weight.clone()
        for name, code, scale in zip(("mu", "nu"), codes, absmax, strict=True):
            saved[f"{name}_codes_{step}"] = code.clone()
            saved[f"{name}_absmax_{step}"] = scale.clone()
    save_file(saved, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
