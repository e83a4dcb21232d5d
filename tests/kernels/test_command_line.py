"""What the commands refuse before they look for a device."""

import sys

import pytest

from kernels.command_line import bench_kernels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["0"], "--sustained 0 must be above 0 seconds"),
        (["-1"], "--sustained -1 must be above 0 seconds"),
        (["0.3", "--timer", "wall"], "--sustained times with cupti alone"),
    ],
)
def test_a_comparison_without_time_or_by_another_timer(
    options, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--sustained", *options])
    with pytest.raises(SystemExit, match="2"):
        bench_kernels()
    assert message in capsys.readouterr().err
