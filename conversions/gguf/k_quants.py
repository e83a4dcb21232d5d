"""K-quants: made from a GGUF file by llama.cpp's own `llama-quantize`."""

import shutil
import subprocess
from pathlib import Path

from fastjax.errors import EnvironmentFault, printable

PROGRAM = "llama-quantize"
K_QUANTS = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m"),
    *("q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"),
)


def require_llama_quantize() -> str:
    """Returns the path of the program.

    Raises:
      EnvironmentFault: It is not there.
    """
    found = shutil.which(PROGRAM)
    if found is None:
        raise EnvironmentFault(
            f"{PROGRAM}, which makes K-quants, is not on the PATH",
            fix="install llama.cpp (github.com/ggml-org/llama.cpp/releases), or take "
            "q8_0, q5_1, q5_0, q4_1 or q4_0, which need no program",
        )
    return found


def requantise(source: Path, target: Path, kind: str) -> None:
    """Writes a GGUF file of 16 bits again as a K-quant.

    Raises:
      EnvironmentFault: The program is missing or fails.
    """
    program = require_llama_quantize()
    done = subprocess.run(
        [program, str(source), str(target), kind.upper()],
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode or not target.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise EnvironmentFault(
            f"{PROGRAM} failed: {printable(lines[-1])}",
            where=f"{program}, exit code {done.returncode}",
            fix="try a newer llama.cpp, or take q8_0",
        )
