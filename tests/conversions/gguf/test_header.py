"""Headers of GGUF files: any numbers are a header or an error."""

import contextlib
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversions.gguf.header import read_header
from fastjax.errors import ModelError

BEGINNING = 1200
NUMBERS = st.integers(0, 2**64 - 1) | st.sampled_from([2**63 - 1, 2**63, 2**64 - 1])


@pytest.fixture(scope="module")
def path(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file."""
    path = tmp_path_factory.mktemp("headers") / "model.gguf"
    shutil.copyfile(fixtures / "peft_lora_default.gguf", path)
    return path


@given(place=st.integers(4, BEGINNING), number=NUMBERS)
def test_a_file_with_another_number_parses_or_is_refused(
    path: Path, place: int, number: int
) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        before = file.read(8)
        file.seek(place)
        file.write(number.to_bytes(8, "little"))
    with contextlib.suppress(ModelError):
        read_header(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(before)


@pytest.mark.parametrize("count", [2**63, 2**64 - 1])
def test_an_array_of_no_possible_length_is_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "long.gguf"
    words = [(3, 4), (0, 8), (1, 8), (1, 8), (ord("k"), 1), (9, 4), (4, 4), (count, 8)]
    path.write_bytes(b"GGUF" + b"".join(n.to_bytes(w, "little") for n, w in words))
    with pytest.raises(ModelError, match="ends within its header"):
        read_header(path)
