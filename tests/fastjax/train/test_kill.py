"""kill -9 at any point: the next start ends where an undisturbed run ends."""

import json
import multiprocessing
import os
import random
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastjax.train.faults import VARIABLE
from fastjax.train.metrics import CLOCK_FIELDS

# Each kill strikes the run that goes on from the one before.
KILLS = [
    "kill@save:after_state@2",
    "kill@save:after_manifest@2",
    "kill@save:after_rename@4",
    f"kill@step@{random.Random().randrange(5, 7)}",
    "kill@save:before_delete@6",
    f"kill@step@{random.Random().randrange(7, 9)}",
    "kill@save:after_adapter@8",
    "kill@finish:before_adapter@8",
    "kill@finish:after_adapter@8",
]


def run_process(tiny: SimpleNamespace, output: Path, cache: Path, fault: str) -> int:
    """Returns the exit code of a process that trains; it starts with all imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastjax.train.loop"])
    settings = {
        "output": str(output),
        "environment": {VARIABLE: fault} if fault else {},
        "cache": str(cache),
    }
    names = {"settings": settings}
    process = context.Process(
        target=runpy.run_path, args=(str(tiny.path), names, "killable")
    )
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def outcome(output: Path) -> tuple[bytes, list[dict]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [
        {k: v for k, v in json.loads(line).items() if k not in CLOCK_FIELDS}
        for line in lines
    ]
    return (output / "adapter_model.bytes").read_bytes(), records


def test_a_run_killed_again_and_again_ends_the_same(
    tiny: SimpleNamespace, tmp_path: Path, compiled_programs: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_process(tiny, whole, compiled_programs, "") == 0
    for fault in KILLS:
        code = run_process(tiny, killed, compiled_programs, fault)
        assert code == -signal.SIGKILL, fault
    assert run_process(tiny, killed, compiled_programs, "") == 0
    assert outcome(killed) == outcome(whole), KILLS
    names = {path.name for path in killed.iterdir()}
    assert names == {path.name for path in whole.iterdir()}


def test_a_signal_from_outside_ends_with_a_checkpoint(
    tiny: SimpleNamespace, tmp_path: Path, compiled_programs: Path
) -> None:
    code = run_process(tiny, tmp_path, compiled_programs, "term@step@3")
    assert code == 1
    assert (tmp_path / "checkpoint-000003" / "manifest.json").exists()


@pytest.mark.parametrize("fault", ["nonsense@step", "kill"])
def test_fault_points_are_off_unless_named(fault: str, monkeypatch) -> None:
    from fastjax.train.faults import hit

    monkeypatch.delenv(VARIABLE, raising=False)
    hit("step", 1)
    monkeypatch.setenv(VARIABLE, fault)
    hit("elsewhere", 1)
    assert os.environ[VARIABLE] == fault
