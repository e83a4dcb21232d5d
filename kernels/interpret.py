"""Runs Mosaic GPU kernels on CPUs, for tests, and reports races.

JAX's own GPU interpreter simulates warpgroups, barriers and asynchronous copies. It
lacks what real kernels need: machine code with results, `pl.run_state`, stores to
accumulators and `wgmma` with its left operand in registers. The class below adds them.

All of it is private JAX API of one version. A program blocks one thread of XLA's pool
for each warpgroup that waits: set NPROC=16 before jax is imported, or kernels with
several warpgroups hang on machines of few cores.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, no_type_check
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src import core
from jax._src.pallas.mosaic.interpret import race_detection_state
from jax._src.pallas.mosaic_gpu import core as mosaic_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    jaxpr_interpret,
    shared_memory,
)
from jax._src.state import discharge
from jax._src.state.types import AbstractRef, TransformedRef
from jax.experimental.pallas import mosaic_gpu as plgpu

from .device import HOPPER, assume_compute_capability
from .stand_in import stand_in_of

JAX_VERSION = "0.11.2"

Values = Sequence[Any]
Step = tuple[jax.Array, list[Any]]
"""A token, which orders the callbacks, and the results of an equation."""


class RaceFound(AssertionError):
    """Two accesses of a kernel to the same memory are not ordered."""


@contextlib.contextmanager
def interpreted(*, detect_races: bool = True) -> Iterator[None]:
    """Runs the Mosaic GPU kernels traced inside on the CPU, as for a Hopper GPU.

    Raises:
      RuntimeError: The installed JAX is not the one that this file was written for.
      RaceFound: On leaving: a kernel raced; the accesses stand on stdout.
    """
    if jax.__version__ != JAX_VERSION:
        raise RuntimeError(
            f"kernels/interpret.py uses private parts of JAX {JAX_VERSION}; this is "
            f"{jax.__version__}: review it and move its JAX_VERSION"
        )
    gpu_callbacks.reset_gpu_interpret_mode_state()
    params = plgpu.InterpretGPUParams(detect_races=detect_races)
    races = race_detection_state.RaceDetectionState
    try:
        with (
            mock.patch.object(jaxpr_interpret, "JaxprInterpreter", _Interpreter),
            mock.patch.object(races, "check_read", _shared_only(races.check_read)),
            mock.patch.object(races, "check_write", _shared_only(races.check_write)),
            assume_compute_capability(HOPPER),
            plgpu.force_gpu_interpret_mode(params),
        ):
            yield
            jax.effects_barrier()
        if detect_races and _has_races():
            raise RaceFound("the accesses were printed as they were found")
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


def _shared_only(check: Callable[..., None]) -> Callable[..., None]:
    """Returns a race check that lets registers pass.

    They belong to one thread, but the blocks of a grid run one after another under
    the same names, and the detector takes them for unordered.
    """
    registers = shared_memory.get_memory_space_idx(mosaic_core.MemorySpace.REGS)

    def check_shared(
        state: Any, thread: Any, clock: Any, key: Any, *args: Any, **kwargs: Any
    ) -> None:
        if getattr(key, "memory_space_id", None) != registers:
            check(state, thread, clock, key, *args, **kwargs)

    return check_shared


def _has_races() -> bool:
    races = gpu_callbacks._races  # None where no kernel ran
    return races is not None and races.races_found


@no_type_check  # its base is given None where its annotations promise a mapping
class _Interpreter(jaxpr_interpret.JaxprInterpreter):
    """JAX's interpreter of one warpgroup with the missing primitives."""

    def interpret(self, jaxpr: Any, token: jax.Array, *args: Any) -> Step:
        added = {
            discharge.run_state_p: self._run_state,
            primitives.wgmma_accumulator_store_p: self._store_accumulator,
        }
        if not any(eqn.primitive in added for eqn in jaxpr.eqns):
            return super().interpret(jaxpr, token, *args)
        variables = [*jaxpr.constvars, *jaxpr.invars]
        env = dict(zip(variables, args, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            if eqn.primitive in added:
                values = [read(atom) for atom in eqn.invars]
                token, results = added[eqn.primitive](eqn, token, values)
            else:
                token, results = self._stock(jaxpr, eqn, token, read)
            env.update(zip(eqn.outvars, results, strict=True))
        return token, [read(atom) for atom in jaxpr.outvars]

    def _stock(
        self, jaxpr: Any, eqn: Any, token: jax.Array, read: Callable[[Any], Any]
    ) -> Step:
        """Lets JAX's interpreter run one equation."""
        inputs = [atom for atom in eqn.invars if not isinstance(atom, core.Literal)]
        inputs = list(dict.fromkeys(inputs))
        debug_info = jaxpr.debug_info.with_unknown_names()
        alone = core.Jaxpr(
            (), inputs, eqn.outvars, [eqn], eqn.effects, debug_info=debug_info
        )
        return super().interpret(alone, token, *map(read, inputs))

    def _run_state(self, eqn: Any, token: jax.Array, values: Values) -> Step:
        """Runs the body on references; an outer reference stays the same one."""
        body = eqn.params["jaxpr"]
        keys, is_new = [], []
        for inner, outer, value in zip(body.invars, eqn.invars, values, strict=True):
            new = isinstance(inner.aval, AbstractRef)
            new = new and not isinstance(outer.aval, AbstractRef)
            if new:
                token, value = self._allocate(eqn, token, value)
            keys.append(value)
            is_new.append(new)
        token, _ = self.interpret(body, token, *body.consts, *keys)
        results = []
        for var, key, new in zip(body.invars, keys, is_new, strict=True):
            result = key
            if new:
                token, result = self._get(eqn, token, key, var.aval.inner_aval)
                token = self._free(eqn, token, key)
            results.append(result)
        return token, results

    def _store_accumulator(self, eqn: Any, token: jax.Array, values: Values) -> Step:
        key, value = values
        token, previous = gpu_callbacks.call_swap(
            token=token,
            result_shape_and_dtype=eqn.outvars[0].aval,
            allocation_key_as_array=key,
            transforms=(),
            val=value,
            mask=None,
            **self._where(eqn),
        )
        return token, [previous]

    def _interpret_wgmma_ref_p(
        self, eqn: Any, token: jax.Array, get_invals: Callable[[], Values]
    ) -> Step:
        """Keeps a left operand that is a value in a buffer for the instruction."""
        run = super()._interpret_wgmma_ref_p
        if isinstance(eqn.invars[1].aval, AbstractRef):
            return run(eqn, token, get_invals)
        acc, a, *rest = get_invals()
        token, key = self._allocate(eqn, token, a)
        token, results = run(eqn, token, lambda: [acc, key, *rest])
        return self._free(eqn, token, key), results

    def _interpret_inline_mgpu_p(
        self, eqn: Any, token: jax.Array, get_invals: Callable[[], Values]
    ) -> Step:
        """Calls the stand-in of the machine code."""
        in_jnp = stand_in_of(eqn.params["mgpu_fn"])
        if in_jnp is None:
            return super()._interpret_inline_mgpu_p(eqn, token, get_invals)
        tree = eqn.params["pytree_args"]
        values = get_invals()
        transforms = eqn.params["pytree_ref_transforms"].unflatten(
            values[tree.num_leaves :]
        )
        args = []
        for var, value, transform in zip(
            eqn.invars[: tree.num_leaves],
            values[: tree.num_leaves],
            transforms,
            strict=True,
        ):
            if isinstance(var.aval, AbstractRef):
                aval = TransformedRef(var.aval, tuple(transform)).type
                token, value = self._get(eqn, token, value, aval, tuple(transform))
            args.append(value)
        result = in_jnp(*tree.unflatten(args))
        return token, jax.tree.leaves(result)

    def _where(self, eqn: Any) -> dict[str, Any]:
        return {
            "mesh_location": self.mesh_location,
            "thread": self.thread,
            "source_info": eqn.source_info,
        }

    def _allocate(
        self, eqn: Any, token: jax.Array, value: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the key of a new buffer in registers."""
        registers = shared_memory.get_memory_space_idx(mosaic_core.MemorySpace.REGS)
        token, request = gpu_callbacks.call_make_allocation_request_array(
            token=token, compute_unit=self.thread, memory_space_id=registers
        )
        return gpu_callbacks.call_allocate_buffer(
            token=token,
            allocation_request_as_array=request,
            value=jnp.asarray(value),
            **self._where(eqn),
        )

    def _free(self, eqn: Any, token: jax.Array, key: jax.Array) -> jax.Array:
        return gpu_callbacks.call_deallocate_buffer(
            token=token, allocation_key_as_array=key, **self._where(eqn)
        )

    def _get(
        self,
        eqn: Any,
        token: jax.Array,
        key: jax.Array,
        aval: Any,
        transforms: Any = (),
    ) -> tuple[jax.Array, jax.Array]:
        shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        return gpu_callbacks.call_get(
            token=token,
            result_shape_and_dtype=shape,
            allocation_key_as_array=key,
            transforms=transforms,
            **self._where(eqn),
        )
