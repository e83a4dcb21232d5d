"""What a layer scan keeps for its backward pass, policy by policy."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fastjax import lora as adapters
from fastjax.config import Implementations, LoRAConfig
from fastjax.losses import cross_entropy
from fastjax.models.build import DecoderSpec, abstract_decoder, linear_names
from fastjax.models.registry import preset
from fastjax.nn.linear import PackedFormat
from fastjax.remat import RematPlan
from fastjax.train.memory_plan import saved_bytes
from kernels.device import HOPPER, assume_compute_capability
from kernels.nf4 import NF4Array

ROWS, LENGTH, RANK = 2, 96, 8


def _spec() -> DecoderSpec:
    config = preset("tiny").config
    plain = DecoderSpec(
        config=config, packed=dict.fromkeys(linear_names(config), PackedFormat())
    )
    return adapters.adapted_spec(plain, LoRAConfig(lora_r=RANK))


def _abstract_parts() -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    return nnx.split(abstract_decoder(_spec()), nnx.Param, ...)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for item in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _gradient(spec: DecoderSpec, remat: str | RematPlan) -> Any:
    """Returns the program of the training loss's gradient."""
    graphdef, trainable, frozen = nnx.split(abstract_decoder(spec), nnx.Param, ...)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = dict.fromkeys(("input_ids", "targets", "positions", "segment_ids"), ids)

    def loss(trainable: Any, frozen: Any, batch: Any) -> jax.Array:
        return cross_entropy(graphdef, trainable, frozen, batch, remat=remat)[0]

    return jax.make_jaxpr(jax.grad(loss))(trainable, frozen, batch).jaxpr


@functools.cache
def _layer_scans(remat: str) -> tuple[Any, Any]:
    """Returns the forward and the backward scan over layers of the training loss."""
    layers = preset("tiny").config.num_hidden_layers
    scans = [
        equation
        for equation in _equations(_gradient(_spec(), remat))
        if equation.primitive.name == "scan" and equation.params["length"] == layers
    ]
    assert [scan.params["reverse"] for scan in scans] == [False, True]
    return scans[0], scans[1]


def test_layers_may_differ_in_policy() -> None:
    plan = RematPlan(policies=("none",) * 5 + ("layer", "offload", "offload"))
    assert list(plan.groups(range(3, 8))) == [
        (range(3, 5), "none"),
        (range(5, 6), "layer"),
        (range(6, 8), "offload"),
    ]


def _saved(remat: str) -> list[Any]:
    """Returns the stacked residuals; the first output is the hidden state itself."""
    return [variable.aval for variable in _layer_scans(remat)[0].outvars[1:]]


def _products(scan: Any) -> int:
    body = scan.params["jaxpr"].jaxpr
    return sum(e.primitive.name == "dot_general" for e in _equations(body))


@pytest.mark.parametrize("remat", ["none", "attention", "layer"])
def test_no_dequantised_weight_is_saved(remat: str) -> None:
    _, _, frozen = _abstract_parts()
    packed = [
        v.get_value()
        for _, v in nnx.to_flat_state(frozen)
        if isinstance(v.get_value(), NF4Array)
    ]
    sizes = {weight.codes.shape[0] * weight.size for weight in packed}
    assert len(packed) == 7
    saved = _saved(remat)
    assert not [aval for aval in saved if aval.size in sizes]
    shapes = {weight.shape for weight in packed} | {w.shape[::-1] for w in packed}
    assert not [aval for aval in saved if aval.shape[-2:] in shapes]


def test_policies_save_the_bytes_that_they_state() -> None:
    layers, tokens = preset("tiny").config.num_hidden_layers, ROWS * LENGTH
    for remat in ("layer", "attention", "none"):
        saved = sum(aval.size * aval.dtype.itemsize for aval in _saved(remat))
        # Under "attention" the skinny products of q, k, v and o are saved as well.
        expected, on_host = saved_bytes(_spec(), 0, remat)
        assert (saved / layers / tokens, on_host) == (expected, 0), remat


@pytest.mark.parametrize("is_full", [False, True])
def test_passes_of_a_written_out_layer_share_adapters_alone(is_full: bool) -> None:
    """Of what has no barrier, XLA may keep all terms from the first pass on."""
    spec = _spec()
    if is_full:
        spec = DecoderSpec(config=spec.config, trains_weights=True)
    layers = spec.config.num_hidden_layers
    plan = RematPlan(policies=("attention",) * layers, is_unrolled=True)
    found = [e for e in _equations(_gradient(spec, plan)) if "prevent_cse" in e.params]
    shared = {
        value.aval.shape
        for equation in found
        for value, has_barrier in zip(
            equation.invars, equation.params["prevent_cse"], strict=True
        )
        if not has_barrier and value.aval.ndim == 2 and value.aval.dtype == jnp.float32
    }
    assert len(found) == layers
    assert bool(shared) is not is_full
    assert all(RANK in shape for shape in shared)


def test_gradients_of_written_out_layers_are_joined_once() -> None:
    """Added up with zeros, they are one kernel that XLA compiles for half a minute."""
    spec = _spec()
    layers = spec.config.num_hidden_layers
    plan = RematPlan(policies=("attention",) * layers, is_unrolled=True)
    graphdef, trainable, _ = nnx.split(abstract_decoder(spec), nnx.Param, ...)
    del graphdef
    stacks = [leaf.shape for leaf in jax.tree.leaves(trainable)]
    made = [
        (equation.primitive.name, value.aval.shape)
        for equation in _gradient(spec, plan).eqns
        for value in equation.outvars
        if value.aval.shape in stacks
    ]
    assert sorted(shape for _, shape in made) == sorted(stacks)
    assert {name for name, _ in made} == {"concatenate"}


def test_each_policy_recomputes_only_what_it_must() -> None:
    forward = _products(_layer_scans("none")[0])
    backward = {
        r: _products(_layer_scans(r)[1]) for r in ("none", "attention", "layer")
    }
    assert all(_products(_layer_scans(r)[0]) == forward for r in backward)
    assert backward["none"] < backward["attention"] < backward["layer"]
    # Recomputing a whole layer repeats its products once, save the last one's result.
    assert backward["layer"] - backward["none"] <= forward


@pytest.mark.parametrize(
    ("remat", "kernel"), [("none", "attention_dq_product"), ("layer", "attention_dq")]
)
def test_which_blocks_attention_visits_is_found_once(remat: str, kernel: str) -> None:
    """The ranges of blocks, for which `argmax` looks, are inputs of the layers.

    And gradients of scores are kept in memory where time counts more than memory.
    """
    xla = dict.fromkeys(("lora_matmul", "rms_norm", "cross_entropy"), "xla")
    spec = dataclasses.replace(
        _spec(),
        config=dataclasses.replace(preset("tiny").config, head_dim=64),
        implementations=Implementations(attention="mosaic_gpu", **xla),
    )
    with assume_compute_capability(HOPPER):
        equations = list(_equations(_gradient(spec, remat)))
    assert sum(e.primitive.name == "argmax" for e in equations) == 3
    scans = [e for e in equations if e.primitive.name == "scan"]
    inner = [e for s in scans for e in _equations(s.params["jaxpr"].jaxpr)]
    assert not [e for e in inner if e.primitive.name == "argmax"]
    names = [e.params.get("name") for e in inner]
    assert [x for x in names if "attention_dq" in str(x)] == [kernel], set(names)
    stacked = [v.aval for s in scans for v in s.outvars if v.aval.dtype == jnp.int32]
    assert not [aval for aval in stacked if aval.ndim > 2]
