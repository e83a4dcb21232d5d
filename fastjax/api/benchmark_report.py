"""What every measured result says of where and how it was measured."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax")
_GIB = 2**30


def gib(count: int | None) -> float | None:
    """Returns bytes as GiB."""
    return None if count is None else count / _GIB


def environment() -> dict[str, Any]:
    """Returns device, versions, commit and command of this process."""
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "commit": os.environ.get("GIT_COMMIT") or _commit(),
        "command": " ".join(sys.argv),
    }


def write_json(out: str | None, result: Any) -> None:
    """Writes the result to the file `out`, unless it is None."""
    if out is None:
        return
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def _commit() -> str | None:
    """Returns the commit of the checkout, None outside of one (set `GIT_COMMIT`)."""
    git = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
