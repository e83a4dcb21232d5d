"""What a run will need, told before any weight is read, and what to do if too much."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax

from fastjax import lora as adapters
from fastjax import runtime
from fastjax.config import DType, QuantConfig, RematPolicy, TrainConfig
from fastjax.errors import OutOfMemory
from fastjax.files import binary_size
from fastjax.models.build import DecoderSpec, linear_names
from fastjax.models.transformer_config import TransformerConfig
from fastjax.nn.linear import PackedFormat
from fastjax.quantize import wanted_format
from fastjax.rank_allocation import probe_of
from fastjax.remat import RematPlan
from fastjax.train.compiled import device_bytes
from fastjax.train.memory_plan import (
    BatchShape,
    MemoryPlan,
    ModelBytes,
    memory_plan,
)

_GIB = 2**30
_FORMULA_ERROR = 0.1
_LEANER: tuple[RematPolicy, ...] = (
    "none",
    "norms",
    "attention",
    "layer",
    "offload",
    "layer_offload",
)
_MOST_ROWS, _TOKEN_UNIT, _MOST_TOKENS = 4096, 256, 2**22
_ADVICES = 4


def planned_spec(config: TrainConfig, sizes: TransformerConfig) -> DecoderSpec:
    """Returns the structure that a run gives a model of these sizes."""
    spec = planned_base_spec(config, sizes)
    return spec if config.full_finetuning else adapters.adapted_spec(spec, config.lora)


def planned_base_spec(config: TrainConfig, sizes: TransformerConfig) -> DecoderSpec:
    """Returns that structure before any adapter.

    All linears are taken as packed where 4 bits are asked for; a checkpoint that is
    quantised already may hold some of them in 16 bits.
    """
    return DecoderSpec(
        config=sizes,
        param_dtype="float32" if config.full_finetuning else config.dtype,
        compute_dtype=config.dtype,
        trains_weights=config.full_finetuning,
        packed=_packed(config.quant, sizes, config.dtype),
        implementations=config.implementations,
    )


def memory_limit(config: TrainConfig) -> int | None:
    """Returns the bytes that a run may take of the device; None when not known."""
    if config.memory_gib > 0:
        return int(config.memory_gib * _GIB)
    return device_bytes("bytes_limit")


def limit_here(config: TrainConfig) -> int | None:
    """Returns `memory_limit`; where the machine computes itself, a share of its own."""
    limit = memory_limit(config)
    if limit is None and jax.default_backend() == "cpu":
        return runtime.usable_host_bytes()
    return limit


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Planner:
    """Foretells the memory of a run, and of runs like it.

    Attributes:
      config: Of the run.
      spec: Structure of the model.
      shape: Of the batches.
      model: Bytes that do not depend on the batch.
      probe: Structure and bytes while ranks are measured; None where none are.
    """

    config: TrainConfig
    spec: DecoderSpec
    shape: BatchShape
    model: ModelBytes
    probe: tuple[DecoderSpec, ModelBytes] | None = None

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        spec: DecoderSpec,
        *,
        tokens: int | None = None,
        documents: int = 1,
    ) -> "Planner":
        """Returns the planner of a run.

        Args:
          config: Of the run.
          spec: Structure of its model; see `planned_spec`.
          tokens: Of a row; None takes the longest that the run allows.
          documents: Most of a row.
        """
        shape = BatchShape(
            rows=config.per_device_train_batch_size,
            tokens=tokens or config.data.max_length,
            accumulation=config.gradient_accumulation_steps,
            documents=documents,
        )
        return cls(
            config=config,
            spec=spec,
            shape=shape,
            model=ModelBytes.of(spec, config.optimizer),
            probe=_probe(config, spec),
        )

    def remat(self, policy: RematPolicy) -> RematPlan:
        """Returns the plan with one policy for all layers."""
        layers = self.spec.config.num_hidden_layers
        return RematPlan(
            policies=(policy,) * layers, is_unrolled=bool(self.config.unroll_layers)
        )

    @property
    def policy(self) -> RematPolicy:
        """The policy to plan with; that of "auto" is the leanest it may choose."""
        return "offload" if self.config.remat == "auto" else self.config.remat

    def plan(
        self,
        policy: RematPolicy | None = None,
        *,
        rows: int | None = None,
        tokens: int | None = None,
    ) -> MemoryPlan:
        """Returns the bytes of a step with some of its settings changed.

        Where ranks are measured first and that takes more, those of measuring.
        """
        shape = dataclasses.replace(
            self.shape, rows=rows or self.shape.rows, tokens=tokens or self.shape.tokens
        )
        remat = self.remat(policy or self.policy)
        plan = memory_plan(self.spec, self.model, remat, shape)
        if self.probe is None:
            return plan
        measuring = memory_plan(*self.probe, remat, shape)
        return max(plan, measuring, key=lambda plan: plan.peak)

    def most_rows(self, limit: int, policy: RematPolicy | None = None) -> int:
        """Returns the most rows of a micro-batch that fit, 0 when not even one does."""
        return _most(lambda n: _fits(self.plan(policy, rows=n), limit), _MOST_ROWS)

    def most_tokens(self, limit: int, policy: RematPolicy | None = None) -> int:
        """Returns the longest row that fits at this batch, in steps of 256 tokens."""
        most = _MOST_TOKENS // _TOKEN_UNIT
        return _TOKEN_UNIT * _most(
            lambda n: _fits(self.plan(policy, tokens=n * _TOKEN_UNIT), limit), most
        )

    def lines(self, limit: int | None) -> Iterator[str]:
        """Yields what the plan says, for people."""
        plan, shape = self.plan(), self.shape
        leanest = (
            f" at its leanest, {self.policy}" if self.config.remat == "auto" else ""
        )
        yield (
            f"memory of a step of {shape.rows} x {shape.tokens:,} tokens, "
            f"remat {self.config.remat}{leanest}:"
        )
        for name, count in dataclasses.asdict(plan).items():
            if count or name != "host":
                yield f"  {_NAMES[name]:24} {binary_size(count)}"
        yield f"  {'peak on the device':24} {binary_size(plan.peak)}"
        if self.probe is not None:
            yield "  where measuring ranks takes more than a step, that is counted"
        if limit is None:
            yield "no GPU here: --memory_gib N says what would fit into N GiB"
            return
        yield f"within {binary_size(limit)} at most:"
        for policy in _LEANER:
            rows, tokens = (
                self.most_rows(limit, policy),
                self.most_tokens(limit, policy),
            )
            yield (
                f"  remat {policy:10} {rows:,} rows of {shape.tokens:,} tokens, or "
                f"{shape.rows} of {tokens:,}"
                + self._host_bound(policy, limit, rows, tokens)
            )

    def _host_bound(
        self, policy: RematPolicy, limit: int, rows: int, tokens: int
    ) -> str:
        """Returns that host memory, not the device, forbids more than these."""
        host = runtime.host_limit_bytes()
        more = (
            self.plan(policy, rows=rows + 1),
            self.plan(policy, tokens=tokens + _TOKEN_UNIT),
        )
        if not any(plan.peak <= limit and plan.host > host for plan in more):
            return ""
        return f"; limited by {binary_size(host)} of pinned host memory here"

    def require_fit(self, limit: int | None) -> None:
        """Stops a run that cannot fit, with what would.

        Raises:
          OutOfMemory: The formula's error aside, the step needs more than the limit, or
            more pinned host memory than XLA may take.
        """
        if limit is None:
            return
        plan = self.plan()
        if plan.peak * (1 - _FORMULA_ERROR) > limit:
            self.refuse(limit, need=plan.peak)
        # "auto" offloads no more layers than there is room for beside the states.
        host = self.model.host if self.config.remat == "auto" else plan.host
        if host > runtime.host_limit_bytes():
            self._refuse_host(host)

    def _refuse_host(self, need: int) -> NoReturn:
        """Says that so much pinned host memory is not there, and what needs less."""
        most, states = runtime.host_limit_bytes(), self.model.host
        fix = (
            "--remat layer_offload keeps a quarter of it there, --remat auto what fits"
        )
        if states > most or 2 * states > need:
            fix = (
                f"without --offload_optimizer {binary_size(states)} stay on the device"
            )
            if self.config.optimizer.optim != "adamw_8bit":
                fix += "; --optim adamw_8bit needs a quarter"
        raise OutOfMemory(
            f"the run needs {binary_size(need)} of pinned host memory, and "
            f"{binary_size(most)} may be taken",
            where=self._place,
            fix=f"{fix}; more is taken by XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB",
        )

    def refuse(self, limit: int, *, need: int) -> NoReturn:
        """Says that the run does not fit, and what would.

        Args:
          limit: Bytes of the device that the run may take.
          need: Bytes that it would take.

        Raises:
          OutOfMemory: Always.
        """
        advice = list(self.advice(limit))[:_ADVICES]
        none = "a smaller model, or a GPU with more memory: not even a row of 256 fits"
        raise OutOfMemory(
            f"the run needs about {binary_size(need)}, "
            f"and {binary_size(limit)} are there",
            where=self._place,
            fix="\n         or ".join(advice) if advice else none,
        )

    @property
    def _place(self) -> str:
        shape = self.shape
        return (
            f"{shape.rows} rows of {shape.tokens:,} tokens, remat {self.config.remat}"
        )

    def advice(self, limit: int) -> Iterator[str]:
        """Yields changes that make the run fit, those that cost least time first."""
        rows, steps = self.shape.rows, self.shape.accumulation
        if fitting := min(self.most_rows(limit), rows - 1):
            fitting = 1 << (fitting.bit_length() - 1)
            more = -(-rows * steps // fitting)
            yield (
                f"--per_device_train_batch_size {fitting} "
                f"--gradient_accumulation_steps {more}: "
                f"{binary_size(self.plan(rows=fitting).peak)}, the same steps"
            )
        for policy in _LEANER[_LEANER.index(self.policy) + 1 :]:
            if _fits(plan := self.plan(policy), limit):
                yield f"--remat {policy}: {binary_size(plan.peak)}"
        if not self.config.full_finetuning and not self.spec.packed:
            packed = dataclasses.replace(self.config, quant=QuantConfig())
            spec = planned_spec(packed, self.spec.config)
            other = Planner.of(packed, spec, tokens=self.shape.tokens)
            if (peak := other.plan().peak) <= limit:
                yield f"--load_in_4bit: {binary_size(peak)}"
        if tokens := self.most_tokens(limit):
            need = self.plan(tokens=tokens).peak
            yield f"--max_length {tokens}: {binary_size(need)}, shorter rows"
        elif fitting := self.most_rows(limit, "offload"):
            need = self.plan("offload", rows=fitting).peak
            rows = f"--per_device_train_batch_size {fitting}"
            yield f"--remat offload {rows}: {binary_size(need)}"


_NAMES = {
    "weights": "frozen weights",
    "trained": "trained weights",
    "optimizer": "optimiser",
    "saved": "saved activations",
    "workspace": "workspace",
    "host": "in host memory",
}


def _probe(
    config: TrainConfig, spec: DecoderSpec
) -> tuple[DecoderSpec, ModelBytes] | None:
    """Returns what measures ranks: larger adapters, and a sum in the optimiser's place.

    The adapters of the run, and all else that trains, come afterwards.
    """
    if config.full_finetuning or not config.lora.auto_rank:
        return None
    plain = adapters.plain_spec(spec)
    probe = adapters.adapted_spec(plain, probe_of(config.lora))
    model = ModelBytes.of(probe, config.optimizer)
    return probe, dataclasses.replace(model, optimizer=model.trained)


def _packed(
    quant: QuantConfig, sizes: TransformerConfig, dtype: DType
) -> dict[str, PackedFormat]:
    packed = wanted_format(quant, dtype)
    return {} if packed is None else dict.fromkeys(linear_names(sizes), packed)


def _fits(plan: MemoryPlan, limit: int) -> bool:
    return plan.peak <= limit and plan.host <= runtime.host_limit_bytes()


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """Returns the largest number up to the limit that fits; 0 fits always."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
