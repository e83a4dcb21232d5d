"""Reading what ncu reports, and what stands in a comparison with a rival."""

from kernels import profiling
from kernels.programs import all_programs

COLUMNS = ["Kernel Name", "Grid Size", *profiling._METRICS.values()]
STALLS = [
    f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
    for reason in ("wait", "gmma", "barrier", "long_scoreboard", "selected")
]


def _report(*launches: tuple[str, str]) -> list[str]:
    """Makes ncu's lines; every number of a launch is the same."""
    numbers = [[name, "(1, 1, 1)", *[value] * 12, *"12345"] for name, value in launches]
    table = [COLUMNS + STALLS, [""] * (len(COLUMNS) + len(STALLS)), *numbers]
    lines = [",".join(f'"{cell}"' for cell in row) for row in table]
    return ["==PROF== Connected to process 1", *lines]


def test_a_report_is_read_program_by_program():
    mark = ("wrapped_negate", "1")
    kernels = [("a", "1,000.5"), ("b", "7"), ("a", "2,000.5")]
    first, second = profiling.read(_report(mark, *kernels, mark, ("b", "8")))
    assert [kernel["kernel"] for kernel in first] == ["a", "b"]
    assert (first[0]["launches"], first[0]["nanoseconds"]) == (2, 1500.5)
    assert second[0]["registers"] == 8
    stalls = {"selected": 5, "long_scoreboard": 4, "barrier": 3, "gmma": 2}
    assert second[0]["stalls"] == stalls


def test_what_is_profiled_exists_and_each_rival_is_timed_alone_too():
    programs = {program.name: program for program in all_programs()}
    assert set(profiling.PROFILED) <= programs.keys()
    rivals = [program.rival for program in programs.values() if program.rival]
    assert {rival.name for rival in rivals} <= programs.keys()
