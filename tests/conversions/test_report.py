"""One error names every difference, layers folded."""

import pytest

from conversions.report import TensorReport, compare_shapes
from fastjax.errors import CheckpointMismatch


def test_no_difference_is_no_error():
    compare_shapes({"a": (1,)}, {"a": (1,)}).check(where="x")


def test_layers_are_folded_and_every_kind_is_named():
    layers = [f"model.layers.{i}.q.weight" for i in (0, 1, 2, 5)]
    expected = dict.fromkeys(layers, (2, 2)) | {"head": (1,)}
    with pytest.raises(CheckpointMismatch) as caught:
        compare_shapes(expected, {"spare": (1,), "head": (3,)}).check(
            where="x", fix="y"
        )
    assert "4 missing, 1 unexpected, 1 misshapen" in caught.value.what
    assert "missing: model.layers.[0-2,5].q.weight" in caught.value.what
    assert "head: shape [3], the model needs [1]" in caught.value.what
    assert (caught.value.where, caught.value.fix) == ("x", "y")


def test_long_lists_are_cut_and_names_escaped():
    names = tuple(f"x{i}\x1b" for i in range(99))
    with pytest.raises(CheckpointMismatch) as caught:
        TensorReport(unexpected=names).check(where="x")
    assert "and 49 more" in caught.value.what
    assert "\x1b" not in caught.value.what
