"""The default by measured times: the nearest case, the device's table, its file."""

import collections
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kernels import benchmarking, choice, dispatch
from kernels.attention import attention
from kernels.attention.api import _implementations, choice_case
from kernels.choice import fastest_first
from kernels.device import HOPPER, assume_compute_capability
from kernels.program import Program
from kernels.programs import all_programs
from kernels.results import write_table

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks/results/nvidia-h200/kernels.json"
WRITTEN = {"kernel": 1, "xla": 2, "reference": 3}
CHOICES = [
    {"op": "op", "case": {"size": 10}, "ms": {"xla": 1.0, "kernel": 2.0}},
    {"op": "op", "case": {"size": 1000}, "ms": {"kernel": 1.0, "xla": 2.0}},
    {"op": "op", "case": {"size": 1000, "kind": "odd"}, "ms": {"xla": 1.0}},
]


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    path = tmp_path / choice.table_name("Some GPU 80GB")
    write_table(path, {"compute_capability": HOPPER}, CHOICES)
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    return path


def order(case, capability=HOPPER, op="op"):
    with assume_compute_capability(capability):
        return list(fastest_first(op, case, WRITTEN))


@pytest.mark.parametrize(
    ("size", "fastest"), [(1, "xla"), (99, "xla"), (101, "kernel"), (9999, "kernel")]
)
def test_the_nearest_case_by_ratio_decides(size, fastest):
    assert order({"size": size})[0] == fastest


def test_those_not_timed_follow_as_written():
    assert order({"size": 10}) == ["xla", "kernel", "reference"]
    assert order({"size": 5, "kind": "odd"}) == ["xla", "kernel", "reference"]


@pytest.mark.parametrize(
    ("case", "op", "capability"),
    [
        ({"size": 10}, "another", HOPPER),
        ({"length": 10}, "op", HOPPER),
        ({"size": 10, "kind": "even"}, "op", HOPPER),
        ({"size": 10}, "op", (8, 0)),
        ({"size": 10}, "op", (10, 0)),
    ],
)
def test_without_a_measurement_the_order_is_as_written(case, op, capability):
    assert order(case, capability, op) == list(WRITTEN)


def test_a_device_with_a_table_of_its_own_takes_that(table, monkeypatch):
    other = [{"op": "op", "case": {"size": 10}, "ms": {"reference": 1.0}}]
    path = table.with_name(choice.table_name("Other GPU"))
    write_table(path, {"compute_capability": HOPPER}, other)
    monkeypatch.setattr(choice.device, "kind", lambda: "Other GPU")
    assert order({"size": 10})[0] == "reference"
    monkeypatch.setattr(choice.device, "kind", lambda: "Some GPU 80GB")
    assert order({"size": 10})[0] == "xla"


def test_times_of_one_choice_are_added_up(monkeypatch):
    def program(name, milliseconds):
        return Program(
            name=name,
            run=lambda x, *, implementation: x + milliseconds[implementation],
            arguments=lambda: (jnp.zeros(()),),
            bytes_moved=0,
            decides=("op", {"size": 3}),
        )

    def seconds(run, arguments, timer):
        return float(run(*arguments)) / 1e3

    monkeypatch.setattr(benchmarking, "seconds", seconds)
    forward = program("forward", {"mosaic_gpu": 2, "xla": 1})
    backward = program("backward", {"mosaic_gpu": 3, "xla": 5})
    (found,) = benchmarking.choices([forward, backward], "wall")
    assert found == {
        "op": "op",
        "case": {"size": 3},
        "ms": {"mosaic_gpu": 5.0, "xla": 6.0},
    }
    assert next(iter(found["ms"])) == "mosaic_gpu"


def test_the_h200_has_a_time_for_every_choice(monkeypatch):
    monkeypatch.undo()
    written = json.loads((choice.FOLDER / "nvidia_h200.json").read_text())["choices"]
    known = [(entry["op"], entry["case"]) for entry in written]
    decided = [program.decides for program in all_programs() if program.decides]
    missing = [dict(case) for op, case in decided if (op, dict(case)) not in known]
    assert not missing
    assert all(entry["ms"] for entry in written)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("window", [7, jnp.int32(7)])
@pytest.mark.parametrize("head_size", [64, 256])
def test_windows_over_documents_take_times_of_their_own(
    head_size, window, softcap, table
):
    q = jax.ShapeDtypeStruct((1, 128, 2, head_size), jnp.bfloat16)
    ids = jnp.ones((1, 128), jnp.int32)

    def default():
        def op(*arrays):  # a new one, which JAX has not traced
            return attention(*arrays, segment_ids=ids, window=window, softcap=softcap)

        with assume_compute_capability(HOPPER), dispatch.record() as chosen:
            jax.eval_shape(op, q, q, q)
        return chosen["attention"]

    def time(rows, **ms):
        case = {"rows": rows, "head_size": str(head_size), "tokens": 4096}
        timed = {"op": "attention", "case": case, "ms": ms}
        write_table(table, {"compute_capability": HOPPER}, [timed])
        choice._read.cache_clear()

    assert default() == {"xla"}
    cap = "" if softcap is None else " softcap"
    time(f"packed{cap}", mosaic_gpu=1.0, xla=2.0)
    assert default() == {"mosaic_gpu"}  # as without a window, until it is timed
    time(f"packed window{cap}", mosaic_gpu=2.0, xla=1.0)
    assert default() == {"xla"}


@pytest.mark.parametrize("tokens", [1, 4096, 1_000_000])
def test_attention_takes_kernels_where_they_were_timed_alone(tokens, monkeypatch):
    monkeypatch.undo()
    written = json.loads((choice.FOLDER / "nvidia_h200.json").read_text())["choices"]
    fastest = collections.defaultdict(set)
    for timed in written:
        if timed["op"] == "attention":
            kind = timed["case"]["rows"], timed["case"]["head_size"]
            fastest[kind].add(min(timed["ms"], key=timed["ms"].get))
    facts = ("is_packed", "has_window", "has_softcap", "keeps_dscores")
    for size, *holds in itertools.product(
        (40, 64, 80, 96, 128, 192, 256), *[(False, True)] * len(facts)
    ):
        case = choice_case(size, tokens, **dict(zip(facts, holds, strict=True)))
        with assume_compute_capability(HOPPER):
            order = list(_implementations(case, visits=None, keeps_dscores=False))
        alike = case["rows"].replace("packed window", "packed")
        kinds = (case["rows"], case["head_size"]), (alike, case["head_size"])
        if kernels := next((fastest[kind] for kind in kinds if kind in fastest), None):
            assert order[0] in kernels
        else:
            assert order[:2] == ["cudnn", "xla"]


def test_every_row_of_the_benchmark_is_of_a_program_that_exists():
    rows = json.loads(BENCHMARK.read_text())["results"]
    assert {row["program"] for row in rows} <= {p.name for p in all_programs()}


@pytest.mark.parametrize("tokens", [1024, 2048, 8192])
@pytest.mark.parametrize(
    ("head_size", "keeps_dscores", "fastest"),
    [
        (64, True, "cudnn"),
        (64, False, "cudnn"),
        (80, False, "mosaic_gpu"),
        (96, True, "mosaic_gpu"),
        (96, False, "mosaic_gpu_cudnn"),
        (128, True, "mosaic_gpu"),
        (256, False, "mosaic_gpu_cudnn"),
    ],
)
def test_heads_take_the_times_of_their_own_size(
    head_size, keeps_dscores, fastest, tokens, monkeypatch
):
    monkeypatch.undo()
    case = choice_case(
        head_size,
        tokens,
        is_packed=False,
        has_window=False,
        has_softcap=False,
        keeps_dscores=keeps_dscores,
    )
    times = {"xla": 0, "cudnn": 0, "mosaic_gpu_cudnn": 0, "mosaic_gpu": 0}
    with assume_compute_capability(HOPPER):
        assert next(iter(fastest_first("attention", case, times))) == fastest
