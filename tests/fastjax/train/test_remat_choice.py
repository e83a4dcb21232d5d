"""The fastest plan that fits."""

import dataclasses
from typing import get_args

import pytest

from fastjax.config import RematPolicy
from fastjax.remat import RematPlan
from fastjax.train.remat_choice import Choice, PolicyCost, fastest, written_out

COSTS: dict[RematPolicy, PolicyCost] = {
    "none": PolicyCost(
        base_seconds=2.0, base_bytes=10.0, layer_seconds=1.0, layer_bytes=8.0
    ),
    "layer": PolicyCost(
        base_seconds=2.0, base_bytes=12.0, layer_seconds=1.5, layer_bytes=1.0
    ),
    "offload": PolicyCost(
        base_seconds=2.5, base_bytes=12.0, layer_seconds=1.4, layer_bytes=0.0
    ),
}


def _choice(limit: float) -> Choice:
    found = fastest(COSTS, num_layers=4, limit_bytes=limit)
    assert found is not None
    return found


def test_all_is_kept_where_it_fits() -> None:
    choice = _choice(42.0)
    assert choice.remat.policies == ("none",) * 4
    assert (choice.seconds, choice.bytes) == (6.0, 42.0)


def test_a_layer_gives_way_before_its_neighbours_do() -> None:
    # One layer of the other policies frees 7 bytes, or 8 and costs the graphs too.
    assert _choice(41.0).remat.policies == ("layer", "none", "none", "none")
    assert str(_choice(41.0).remat) == "1 x layer, 3 x none"


@pytest.mark.parametrize("policy", get_args(RematPolicy))
def test_every_policy_may_be_chosen(policy: RematPolicy) -> None:
    choice = fastest({policy: COSTS["layer"]}, num_layers=2, limit_bytes=99.0)
    assert choice is not None
    assert choice.remat.policies == (policy,) * 2


def test_the_host_has_its_limit_too() -> None:
    costs = dict(COSTS)
    costs["offload"] = dataclasses.replace(costs["offload"], layer_host_bytes=3.0)
    choice = fastest(costs, num_layers=4, limit_bytes=14.0, host_limit_bytes=7.0)
    assert choice is not None
    assert str(choice.remat) == "2 x offload, 2 x layer"
    assert fastest(costs, num_layers=4, limit_bytes=13.0, host_limit_bytes=7.0) is None


def test_the_leanest_plan_is_the_last_to_fit() -> None:
    assert set(_choice(12.0).remat.policies) == {"offload"}
    assert fastest(COSTS, num_layers=4, limit_bytes=11.0) is None
    assert fastest({}, num_layers=4, limit_bytes=99.0) is None


def test_runs_write_layers_out_that_are_long_enough_to_gain_by_it() -> None:
    plan = RematPlan(policies=("layer", "none", "none", "none"))
    choice = Choice(remat=plan, seconds=1.0, bytes=0.0)
    # Compiling three layers takes 1.5 s, a step gains 5.5 % of their 0.75 s.
    for micro_batches in (0, 36):
        assert written_out(choice, micro_batches=micro_batches) is choice
    gained = written_out(choice, micro_batches=37)
    assert str(gained.remat) == "1 x layer, 3 x none, written out"
    assert gained.seconds == pytest.approx(1 - 0.055 * 0.75)
