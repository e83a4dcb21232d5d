"""What the driver tells of a GPU at work."""

import time
from pathlib import Path

import pytest

from fastjax.nvidia import sampled_load

_PROGRAM = """#!/bin/sh
case "$*" in
*name*)
    echo "NVIDIA H200, 580.65.06, 9.0, 143360, 20480, GPU-0a1b"
    echo "NVIDIA H200, 580.65.06, 9.0, 143360, 20480, GPU-2c3d"
    exit ;;
*--id=GPU-2c3d*) ;;
*) exit 6 ;;
esac
echo "600.00, 1500"
echo "[N/A], [N/A]"
echo "[N/A], 1700"
echo "700.00, 1700"
echo "690.00, 1600"
exec sleep 60
"""


def test_the_load_is_the_median_of_what_the_driver_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(_PROGRAM)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    with sampled_load() as load:
        assert load == {}
        time.sleep(0.3)
    assert load == {"watts": 690.0, "sm_megahertz": 1600.0}
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with sampled_load() as load:
        pass
    assert load == {}
