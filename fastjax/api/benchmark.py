"""Speed and memory of the training step on random weights of a preset's shapes."""

import dataclasses
import statistics
import time
from typing import Any

from fastjax import runtime
from fastjax.api.benchmark_report import environment, gib, write_json
from fastjax.api.memory import limit_here
from fastjax.api.random_step import RandomStep, StepArgs, planner_of
from fastjax.api.remat_auto import planned_remat
from fastjax.api.roofline import h200_roofline_share
from fastjax.nvidia import sampled_load
from fastjax.train.compiled import device_bytes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkArgs(StepArgs):
    """Times the QLoRA step: NF4 base, adapters on all linears, AdamW, full rows.

    Attributes:
      steps: Timed steps.
      warm_up: Steps before these.
      batches: Random batches that the steps go round, so that there is something to
        learn; 0 draws a new one for each step.
      out: JSON file that is written; None writes none.
    """

    steps: int = 10
    warm_up: int = 3
    batches: int = 0
    out: str | None = None


def run_benchmark(args: BenchmarkArgs) -> dict[str, Any]:
    """Returns, and writes, what one process measured; peak memory is of this run.

    Raises:
      OutOfMemory: The step cannot fit; says what would.
    """
    runtime.configure()
    planner = planner_of(args)
    planner.require_fit(limit_here(planner.config))
    spec, shape = planner.spec, planner.shape
    remat, choice = planned_remat(planner)
    started = time.perf_counter()
    step = RandomStep(planner.config, spec, remat, shape)
    resident = device_bytes("bytes_in_use")
    loaded = time.perf_counter()
    seconds, losses = [], []

    def run(seed: int) -> None:
        start = time.perf_counter()
        losses.append(step(seed % args.batches if args.batches else seed))
        seconds.append(time.perf_counter() - start)

    memory = step.compile()
    for seed in range(args.warm_up):
        run(seed)
    with sampled_load() as load:
        for seed in range(args.warm_up, args.warm_up + args.steps):
            run(seed)
    median = statistics.median(seconds[args.warm_up :])
    result = {
        **dataclasses.asdict(args),
        "tokens_per_second": args.batch * args.seq / median,
        "step_milliseconds": median * 1e3,
        "remat_plan": str(remat),
        "predicted": None
        if choice is None
        else choice.prediction(shape.micro_batch_tokens),
        "share_of_h200_roofline": None
        if args.full_finetuning
        else h200_roofline_share(
            spec.config, batch=args.batch, seq=args.seq, seconds=median
        ),
        "peak_gib": gib(device_bytes("peak_bytes_in_use")),
        "resident_gib": gib(resident),
        "temp_gib": None if memory is None else gib(memory.temp_bytes),
        "compile_seconds": step.compiled.compile_seconds,
        "weights_seconds": loaded - started,
        "load": load,
        "losses": losses,
        "implementations": step.compiled.implementations,
        **environment(),
    }
    write_json(args.out, result)
    return result
