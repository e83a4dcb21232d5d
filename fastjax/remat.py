"""What the backward pass recomputes, or fetches: named `jax.checkpoint` policies.

Bytes kept per token and layer for Llama-3-8B in bfloat16 (D 4096, F 14336, 32 query
and 8 key heads of 128):

| policy | kept on the device besides the layer's input | bytes |
| --- | --- | --- |
| none | all of the next row, and the normed inputs | 109 K |
| norms | q, k, v, attention's output and statistics, residual, gate, up | 93 K |
| attention | residual, gate, up | 73 K |
| layer | nothing | 8 K |
| offload | nothing, and the input is in host memory | 0 K |
| layer_offload | the same | 0 K |

`x @ lora_a`, 2 R bytes a token and linear, is kept by the first three as well. No
policy ever keeps a dequantised weight: the matmul's own VJP keeps the packed one.

"offload" also holds in host memory q, k and v, the residual after the attention, kept
by the layer after (`fastjax.nn.feed_forward.hand_back`), and, where the implementation
names them (all but "cudnn"), the attention's output and statistics: 37 KB a token and
layer, so that gate and up alone are projected again. cuDNN's attention has no names for
what it saves and is computed again. "layer_offload" holds the input alone there, 8 KB,
for rows so long that the host's memory is what ends.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from fastjax.config import RematPolicy
from kernels.attention import RESIDUAL_NAMES as ATTENTION_RESIDUALS
from kernels.attention import SAVED_PRIMITIVES as ATTENTION_PRIMITIVES
from kernels.gated_mlp import RESIDUAL_NAMES as MLP_RESIDUALS
from kernels.lora_matmul import RESIDUAL_NAMES as LORA_RESIDUALS

LAYER_INPUT = "layer_input"
QUERY, KEY, VALUE = "query", "key", "value"
QUERY_RAW, KEY_RAW = "query_raw", "key_raw"
ATTENTION_RESIDUAL = "attention_residual"
NORMED = "normed"
HANDED = "handed"

KEEPING: tuple[RematPolicy, ...] = ("none", "norms", "attention")
"""Policies that keep what the feed-forward half is made of on the device."""

_MLP_NAMES = (ATTENTION_RESIDUAL, *MLP_RESIDUALS, *LORA_RESIDUALS)
_PROJECTION_NAMES = (QUERY, KEY, VALUE, QUERY_RAW, KEY_RAW)
_ATTENTION_NAMES = (*_PROJECTION_NAMES, *ATTENTION_RESIDUALS)
_OFFLOADED_NAMES: dict[RematPolicy, tuple[str, ...]] = {
    "offload": (LAYER_INPUT, HANDED, *_ATTENTION_NAMES),
    "layer_offload": (LAYER_INPUT,),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RematPlan:
    """What the backward pass does again, layer by layer.

    Attributes:
      policies: Of each layer of the decoder.
      is_unrolled: Layers that keep much are written out in the program instead of
        being scanned: no copies into and out of stacks, and a longer compilation.
    """

    policies: tuple[RematPolicy, ...]
    is_unrolled: bool = False

    def writes_out(self, policy: RematPolicy) -> bool:
        """Whether layers of that policy are written out.

        The others keep so little that a scan copies next to nothing, and of what is
        written out XLA moves hardly anything to the host.
        """
        return self.is_unrolled and policy in KEEPING

    def __str__(self) -> str:
        counts = collections.Counter(self.policies)
        parts = [f"{count} x {policy}" for policy, count in counts.items()]
        text = ", ".join(parts) if len(parts) > 1 else self.policies[0]
        is_written_out = any(map(self.writes_out, self.policies))
        return text + (", written out" if is_written_out else "")

    def groups(self, layers: range) -> Iterator[tuple[range, RematPolicy]]:
        """Yields the runs of consecutive layers with one policy, and that policy.

        Args:
          layers: Layers to group, counted from the decoder's first.
        """
        runs = itertools.groupby(layers, key=lambda layer: self.policies[layer])
        for _, run in runs:
            found = list(run)
            yield range(found[0], found[-1] + 1), self.policies[found[0]]


type Remat = RematPolicy | RematPlan
"""A plan, or one policy for all layers."""


def remat_plan(remat: Remat | None, num_layers: int) -> RematPlan | None:
    """Returns the plan of a decoder of so many layers; None stays None."""
    if remat is None or isinstance(remat, RematPlan):
        return remat
    return RematPlan(policies=(remat,) * num_layers)


def rematerialised(
    body: Callable[..., Any],
    policy: RematPolicy,
    *,
    is_scanned: bool = True,
    own_barrier: Any = True,
) -> Callable[..., Any]:
    """Returns a layer's function that keeps what `policy` names, no more.

    Args:
      body: Of one layer: its place, its input, what trains of it, stacks of the rest.
      policy: What its backward pass finds.
      is_scanned: Forward and backward pass are loops of their own. In one program XLA
        would else find the same terms in both and keep them all.
      own_barrier: A tree like what trains: what the second pass makes terms of anew.
    """
    keeps = _saveable(policy)
    if is_scanned:
        return jax.checkpoint(body, policy=keeps, prevent_cse=False)
    # The place stays a constant to XLA, so that kernels read stacks where they lie. The
    # inner jit holds the body's constants, for which a tuple has no entries.
    prevent_cse = (False, True, own_barrier, True)
    return jax.checkpoint(jax.jit(body), policy=keeps, prevent_cse=prevent_cse)


def _saveable(policy: RematPolicy) -> Callable[..., Any]:
    policies = jax.checkpoint_policies
    if policy == "layer":
        return policies.nothing_saveable
    if policy == "attention":
        return policies.save_only_these_names(*_MLP_NAMES)
    if policy in _OFFLOADED_NAMES:
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(_OFFLOADED_NAMES[policy]),
            offload_src="device",
            offload_dst="pinned_host",
        )
    own = (NORMED,) if policy == "none" else ()
    names = policies.save_only_these_names(*own, *_MLP_NAMES, *_ATTENTION_NAMES)

    def saveable(primitive: Any, *args: Any, **params: Any) -> bool:
        fused_attention = str(primitive) in ATTENTION_PRIMITIVES
        return fused_attention or names(primitive, *args, **params)

    return saveable
