"""The doctor: what it tells, and what it calls a fault."""

import dataclasses
import importlib.metadata
import json
import runpy
import sys
from pathlib import Path

import pytest

from fastjax import cli, nvidia, requirements, runtime
from fastjax.api import doctor
from fastjax.errors import ConfigError, EnvironmentFault
from kernels.self_check import OpCheck

GPU = nvidia.InstalledGpu(
    name="NVIDIA H200",
    driver="580.65.06",
    compute_capability="9.0",
    total_bytes=140 * 2**30,
    free_bytes=20 * 2**30,
    uuid="GPU-0a1b",
)


def check(error: float) -> OpCheck:
    return OpCheck(op="nf4", implementation="xla", error=error, bound=0.0, seconds=0.1)


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, whose ops are right."""
    monkeypatch.setattr(runtime, "configure", lambda **_: None)
    monkeypatch.setattr(nvidia, "installed_gpus", lambda: ())
    monkeypatch.setattr(doctor.self_check, "check_ops", lambda: iter([check(0.0)]))
    chosen = {"nf4": "xla"}
    monkeypatch.setattr(doctor.self_check, "chosen_for_llama3_8b", lambda: chosen)


def test_a_healthy_machine_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("doctor", ["--json"]) == 0
    shown = capsys.readouterr()
    assert "checking" not in shown.err
    told = json.loads(shown.out)
    assert told["problems"] == []
    assert told["versions"]["jax"] == importlib.metadata.version("jax")
    assert told["implementations"] == {"nf4": "xla"}
    assert told["checks"][0]["is_right"]
    assert "llama" in told["models"]


def test_python_dash_m_is_the_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fastjax"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("fastjax", run_name="__main__")
    assert stop.value.code == 0
    assert "relative error on a small tile" in capsys.readouterr().out


def test_all_that_is_wrong_is_told_with_code_5(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(nvidia, "installed_gpus", lambda: (GPU,))
    monkeypatch.setattr(doctor.self_check, "check_ops", lambda: iter([check(0.5)]))
    assert cli.run("doctor", []) == EnvironmentFault.exit_code
    shown = capsys.readouterr()
    assert shown.err.startswith("checking each op")
    assert "nf4 computes wrong numbers here" in shown.err
    assert requirements.install_command("cuda13") in shown.err
    assert "WRONG" in shown.out


def test_an_extra_is_installed_where_fastjax_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    assert f"{sys.executable} -m pip" in requirements.install_command("gguf")
    assert requirements.install_command("gguf").endswith(f"-e '{root}[gguf]'")
    monkeypatch.setattr(requirements, "__file__", str(tmp_path / "a" / "b.py"))
    assert requirements.install_command("gguf").endswith("install 'fastjax[gguf]'")


@pytest.mark.parametrize(
    ("driver", "plugins", "expected"),
    [
        ("580.65.06", {}, requirements.install_command("cuda13")),
        ("550.54.14", {}, requirements.install_command("cuda12")),
        ("470.82.01", {}, "install a driver of version 525 or newer"),
        ("580.65.06", {"jax-cuda13-plugin": "0.11.2"}, "cannot start its CUDA plugin"),
    ],
)
def test_a_gpu_that_jax_does_not_see_stops_a_run(
    monkeypatch: pytest.MonkeyPatch, driver: str, plugins: dict, expected: str
) -> None:
    gpu = nvidia.dataclasses.replace(GPU, driver=driver)
    monkeypatch.setattr(nvidia, "installed_gpus", lambda: (gpu,))
    monkeypatch.setattr(nvidia, "cuda_plugins", lambda: plugins)
    nvidia.require_gpu_in_use()
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(EnvironmentFault, match="JAX_PLATFORMS=cpu") as error:
        nvidia.require_gpu_in_use()
    assert expected in str(error.value)


def test_gpus_are_read_from_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        "echo 'NVIDIA H200, 580.65.06, 9.0, 143360, 20480, GPU-0a1b'\n"
        "echo 'Old, 390.1, [N/A], 2048, [N/A], GPU-2c3d'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    new, old = nvidia.installed_gpus()
    assert new == GPU
    assert (old.compute_capability, old.free_bytes) == ("", 0)
    program.write_text("#!/bin/sh\necho 'no driver' >&2; exit 9\n")
    assert nvidia.installed_gpus() == ()


def test_a_process_takes_its_share_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvidia.memory_share(35.0) is None
    monkeypatch.setattr(nvidia, "installed_gpus", lambda: (GPU,))
    assert nvidia.memory_share(0.0) is None
    assert nvidia.memory_share(35.0) == 0.25
    with pytest.raises(ConfigError, match="more than the GPU has, 140"):
        nvidia.memory_share(141.0)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, 0.5),
        ("1", 0.25),
        ("1,0", 0.25),
        ("GPU-0a", 0.25),
        ("", None),
        ("-1", None),
    ],
)
def test_the_share_is_of_the_card_that_a_run_uses(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: float | None
) -> None:
    small = dataclasses.replace(GPU, total_bytes=70 * 2**30, uuid="GPU-2c3d")
    monkeypatch.setattr(nvidia, "installed_gpus", lambda: (small, GPU))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvidia.memory_share(35.0) == expected


@pytest.mark.parametrize("visible", ["7", "MIG-0a1b"])
def test_a_card_that_is_not_there_has_no_share(
    monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    monkeypatch.setattr(nvidia, "installed_gpus", lambda: (GPU,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvidia.memory_share(0.0) is None
    with pytest.raises(ConfigError, match=visible):
        nvidia.memory_share(35.0)


def test_versions_outside_the_tested_range(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requirements.faults() == []
    lines = ["numpy>=2", "jax<0.11.2,>=0.1", "zzz>=1", "torch>=9; extra == 'x'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    jax_fault, absent = requirements.faults()
    assert "outside the tested range, jax<0.11.2,>=0.1" in jax_fault.what
    assert absent.what == "zzz is not installed"
    assert jax_fault.fix == "pip install 'jax<0.11.2,>=0.1'"
