"""Target modules match as in PEFT."""

import pytest

from fastjax.errors import ConfigError
from fastjax.target_modules import ends_with_module, matched_modules

NAMES = tuple(
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("all-linear", NAMES),
        (("q_proj",), (NAMES[0], NAMES[3])),
        (("up_proj", "q_proj"), (NAMES[0], NAMES[2], NAMES[3], NAMES[5])),
        (("model.layers.1.self_attn.v_proj",), (NAMES[4],)),
        (("self_attn.v_proj",), (NAMES[1], NAMES[4])),
        (r".*\.1\..*", NAMES[3:]),
        (r".*\.0\.(self_attn|mlp)\.(q|up)_proj", (NAMES[0], NAMES[2])),
    ],
)
def test_matched_modules(target, expected):
    assert matched_modules(target, NAMES) == expected


@pytest.mark.parametrize(
    "target", ["q_proj", r"layers\..*", ("proj",), ("x", "q_proj")]
)
def test_targets_that_match_nothing_list_those_that_exist(target):
    with pytest.raises(ConfigError, match="q_proj, up_proj, v_proj"):
        matched_modules(target, NAMES)


def test_broken_expressions_are_config_errors():
    with pytest.raises(ConfigError, match="not a regular expression"):
        matched_modules("(", NAMES)


def test_an_end_must_start_at_a_module():
    assert ends_with_module("a.q_proj", "q_proj")
    assert not ends_with_module("a.q_proj", "proj")
