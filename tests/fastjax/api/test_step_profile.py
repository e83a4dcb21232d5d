"""The time of a step, sorted by kind of kernel."""

import pytest

from fastjax.api.step_profile import Kernel, covered_ns, instructions, summary


def _line(name: str, shape: str, scopes: str) -> str:
    return f'%{name} = {shape} fusion(%a), metadata={{op_name="jit(s)/{scopes}/dot"}}'


_PROGRAM = "\n".join(
    [
        _line("gemm.1", "bf16[8192,4096]{1,0}", "lora_matmul"),
        _line("gemm.2", "bf16[8192,16]{1,0}", "lora_matmul"),
        "ROOT " + _line("fusion.1", "(bf16[4096,64]{1,0}, f32[2])", "lora_matmul/nf4"),
        _line("fusion.2", "bf16[8192,64]{1,0}", "transpose(jvp(rope))"),
    ]
)


def test_time_is_sorted_by_the_innermost_op() -> None:
    kernels = [
        Kernel("nvjet_sm90", "gemm.1", 0.0, 5e6),
        Kernel("nvjet_sm90", "gemm.2", 5e6, 2e6),
        Kernel("fusion_1", "fusion.1", 7e6, 1e6),
        Kernel("fusion_2", "fusion.2", 8e6, 1e6),
        Kernel("MemcpyD2D", "", 9e6, 3e6),
        Kernel("MemcpyD2H", "", 0.0, 20e6),
    ]
    result = summary(kernels, instructions(_PROGRAM), 15.0, listed=2)
    assert result["milliseconds_by_kind"] == pytest.approx(
        {
            "host copies": 20.0,
            "matmul": 5.0,
            "copies": 3.0,
            "adapter matmul": 2.0,
            "dequantise": 1.0,
            "rope": 1.0,
            "gaps": 3.0,
        }
    )
    assert [row["kind"] for row in result["busiest"]] == ["host copies", "matmul"]


def test_overlapping_spans_count_once() -> None:
    assert covered_ns([(0.0, 4.0), (1.0, 2.0), (3.0, 6.0), (8.0, 9.0)]) == 7.0
