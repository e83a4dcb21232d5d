"""Any settings are a configuration or an error that says why not."""

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastjax.aliases import ALIASES
from fastjax.config import TrainConfig
from fastjax.config_file import read_config_file
from fastjax.errors import ConfigError
from fastjax.flat_config import field_types, train_config

NAMES = st.sampled_from(sorted({*field_types(), *ALIASES})) | st.text(max_size=12)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["1e-5", "all-linear", "steps", "no", "0.1", "a=b", "-1", "inf"])
)
VALUES = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(NAMES, PLAIN, max_size=2)
SETTINGS = st.dictionaries(NAMES, VALUES, max_size=6)
TEXTS = (
    st.binary(max_size=60)
    | st.text("max_steps: 1e-5\n\t!&*[]{}'\"-#%@", max_size=60).map(str.encode)
    | SETTINGS.map(lambda values: yaml.dump(values).encode())
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings")


@given(values=SETTINGS)
def test_any_settings_are_a_configuration_or_an_error(values: dict) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(train_config(values).config, TrainConfig)


@given(text=TEXTS)
def test_any_file_is_a_configuration_or_an_error(folder: Path, text: bytes) -> None:
    path = folder / "run.yaml"
    path.write_bytes(text)
    with contextlib.suppress(ConfigError):
        assert isinstance(read_config_file(path).config, TrainConfig)
