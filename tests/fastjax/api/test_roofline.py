"""Operations of a step, against numbers counted by hand."""

import pytest

from fastjax.api.roofline import h200_roofline_share, step_flops
from fastjax.models.registry import preset


def test_an_8b_step_of_8192_tokens_takes_278_tera_operations() -> None:
    config = preset("llama3-8b").config
    flops = step_flops(config, batch=2, seq=4096)
    assert flops == pytest.approx(278e12, rel=0.01)
    assert h200_roofline_share(
        config, batch=2, seq=4096, seconds=flops / 395e12
    ) == pytest.approx(0.5)
