"""Files of measured rows: what is measured again replaces what was."""

import json

from kernels.results import write_results, write_table


def test_writing_a_table_keeps_the_choices_that_are_not_given(tmp_path):
    path, header = tmp_path / "device.json", {"compute_capability": (9, 0)}
    small = {"op": "op", "case": {"size": 10}, "ms": {"xla": 1.0, "kernel": 2.0}}
    large = {"op": "op", "case": {"size": 1000}, "ms": {"kernel": 1.0, "xla": 2.0}}
    write_table(path, header, [small, large])
    again = {**small, "ms": {"kernel": 0.5, "xla": 1.0}}
    write_table(path, header, [again])
    assert json.loads(path.read_text())["choices"] == [large, again]


def test_a_program_measured_again_replaces_all_its_rows(tmp_path):
    path = tmp_path / "kernels.json"

    def write(*rows, commit):
        found = [{"program": name, "implementation": how} for name, how in rows]
        write_results(path, {"commit": commit}, found)

    write(("b", "xla"), commit=1)
    write(("a", "kernel"), ("a", "xla"), commit=1)
    write(("a", "xla"), commit=2)
    written = json.loads(path.read_text())
    assert written["commit"] == 2
    assert [row["program"] for row in written["results"]] == ["a", "b"]
