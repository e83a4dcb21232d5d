"""The memory of a run, told beforehand, against what was measured on a GPU."""

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

from fastjax import cli, runtime
from fastjax.api import load_model, plan_run, remat_auto
from fastjax.api.benchmark import BenchmarkArgs, run_benchmark
from fastjax.api.loaders import in_steps
from fastjax.api.memory import Planner, limit_here, planned_spec
from fastjax.api.random_step import RandomStep, StepArgs, planner_of
from fastjax.api.remat_auto import planned_remat
from fastjax.api.run_plan import planned_run
from fastjax.api.training import load_for_training, prepare_data
from fastjax.config import (
    DataConfig,
    LoRAConfig,
    OptimizerConfig,
    QuantConfig,
    RematChoice,
    RematPolicy,
    TrainConfig,
)
from fastjax.data import load_data
from fastjax.errors import ConfigError, OutOfMemory
from fastjax.models.build import abstract_decoder
from fastjax.models.registry import preset
from fastjax.remat import RematPlan
from fastjax.train.compiled import StepMemory
from fastjax.train.memory_plan import saved_bytes
from fastjax.train.remat_choice import PolicyCost
from kernels.device import HOPPER, assume_compute_capability

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "nvidia-h200"
GIB = 2**30


class _Untimed:
    """A whole step that does not fit beside what the device holds."""

    memory: StepMemory | None = None

    def __init__(self, *_: Any) -> None: ...

    def fits(self, _: int) -> bool:
        return False


@pytest.fixture(scope="module")
def planner() -> Planner:
    """Of Llama-3-8B, 2 rows of 4,096 tokens."""
    config = TrainConfig(
        gradient_accumulation_steps=1,
        data=DataConfig(max_length=4096),
    )
    return Planner.of(config, planned_spec(config, preset("llama3-8b").config))


@pytest.mark.parametrize(
    "case",
    [
        "b2-s4096-none",
        "b2-s4096-attention",
        "b2-s4096-layer",
        "b2-s4096-layer-16-documents",
        "b2-s4096-offload",
        "b1-s32768-offload",
        "b1-s32768-norms-unrolled",
    ],
)
def test_the_formula_meets_measured_peaks(planner: Planner, case: str) -> None:
    measured = json.loads((RESULTS / f"step-llama3-8b-{case}.json").read_text())
    # The policy that was called "none" when some of them were measured.
    policy = "norms" if "norms" in case else measured["remat"]
    planned = planner.plan(policy, rows=measured["batch"], tokens=measured["seq"])
    assert planned.peak == pytest.approx(measured["peak_gib"] * GIB, rel=0.1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("policy", "tokens", "temporary_gib"),
    [
        ("layer", 131_072, 12.0),
        ("offload", 131_072, 9.7),
        ("layer_offload", 344_064, 22.0),
    ],
)
def test_the_formula_meets_what_xla_plans_for_long_rows(
    planner: Planner, policy: RematPolicy, tokens: int, temporary_gib: float
) -> None:
    """By XLA for Hopper, without a device; 4 layers, of the last case all 32."""
    shape = dataclasses.replace(planner.shape, rows=1, documents=2)
    config = dataclasses.replace(planner.spec.config, num_hidden_layers=4)
    spec = dataclasses.replace(planner.spec, config=config)
    few = dataclasses.replace(planner, shape=shape, spec=spec)
    plan = few.plan(policy, tokens=tokens)
    assert plan.saved + plan.workspace == pytest.approx(temporary_gib * GIB, rel=0.1)


def test_longer_rows_never_take_less(planner: Planner) -> None:
    """Gradients of scores are kept of short rows only; longer ones may meet such."""
    lengths = (4096, 4480, 4608, 8192)
    peaks = [planner.plan("attention", tokens=tokens).peak for tokens in lengths]
    assert peaks == sorted(peaks)


def test_the_largest_batch_and_row_just_fit(planner: Planner) -> None:
    limit = 24 * GIB
    rows, tokens = (
        planner.most_rows(limit, "layer"),
        planner.most_tokens(limit, "layer"),
    )
    assert planner.plan("layer", rows=rows).peak <= limit
    assert planner.plan("layer", rows=rows + 1).peak > limit
    assert planner.plan("layer", tokens=tokens).peak <= limit
    assert planner.plan("layer", tokens=tokens + 256).peak > limit


def test_measuring_ranks_is_planned(planner: Planner) -> None:
    lora = dataclasses.replace(planner.config.lora, lora_r=256)
    even = dataclasses.replace(planner.config, lora=lora)
    config = dataclasses.replace(even, lora=dataclasses.replace(lora, auto_rank=True))
    sizes = planner.spec.config
    peaks = [
        Planner.of(c, planned_spec(c, sizes)).plan("layer").peak for c in (even, config)
    ]
    assert peaks[1] - peaks[0] > 4 * GIB


def test_a_run_that_cannot_fit_is_stopped_with_what_would(planner: Planner) -> None:
    planner.require_fit(None)
    planner.require_fit(26 * GIB)
    with pytest.raises(OutOfMemory) as caught:
        planner.require_fit(12 * GIB)
    advice = str(caught.value).split("fix:")[1].splitlines()
    assert "--remat layer" in advice[0]
    assert "--remat offload" in advice[1]
    with pytest.raises(OutOfMemory, match="smaller model"):
        planner.require_fit(5 * GIB)


def test_a_machine_that_computes_itself_is_the_limit(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(planner.config, memory_gib=0.0)
    monkeypatch.setattr(runtime, "host_memory_bytes", lambda: 20 * GIB)
    assert limit_here(config) == 16 * GIB
    with pytest.raises(OutOfMemory, match=r"16\.00 GiB are there"):
        run_benchmark(BenchmarkArgs(model="llama3-8b"))


def test_the_host_has_a_limit_too(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "1")
    config = dataclasses.replace(planner.config, remat="offload")
    with pytest.raises(OutOfMemory, match="of pinned host memory"):
        dataclasses.replace(planner, config=config).require_fit(80 * GIB)
    assert planner.most_tokens(80 * GIB, "offload") < 4096


def test_the_command_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny", "--memory_gib", "1"]
    assert cli.run("train", [*words, "--plan"]) == 0
    said = capsys.readouterr().out
    assert cli.run("plan", words) == 0
    assert capsys.readouterr().out == said
    assert "frozen weights" in said
    assert "within 1.00 GiB" in said
    assert "MiB" in said
    assert " 0.0" not in said
    report = plan_run(TrainConfig(model="tiny", memory_gib=1.0))
    assert str(report) == said.strip()
    assert "frozen weights" in report._repr_html_()
    assert cli.run("plan", ["--model", "tiny", "--memory_gib", "0.001"]) == 6


def test_what_a_run_refuses_has_no_plan(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"base_model_name_or_path": str(small_model), "peft_type": "LORA"}
    facts |= {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    words = ["--model", str(tmp_path), "--full_finetuning"]
    assert cli.run("plan", words) == 2
    assert "this is an adapter" in capsys.readouterr().err


def test_the_plan_of_an_adapter_is_of_its_own_rank_and_targets(
    small_model: Path, tmp_path: Path
) -> None:
    lora = LoRAConfig(lora_r=512, lora_target_modules=("q_proj", "up_proj"))
    fresh = TrainConfig(model=str(small_model), lora=lora)
    model = load_for_training(fresh)
    folder = model.save_pretrained(tmp_path / "adapter")
    plain = TrainConfig(model=str(small_model))
    again = TrainConfig(model=str(folder))
    assert str(plan_run(again)) == str(plan_run(fresh)) != str(plan_run(plain))

    def need(config: TrainConfig) -> str:
        config = dataclasses.replace(config, memory_gib=1e-4)
        data = prepare_data(config, model, train_source=[{"text": "one two three"}])
        with pytest.raises(OutOfMemory) as caught:
            planned_run(config, data, sizes=model.config, note=str)
        return caught.value.what

    assert need(again) == need(fresh) != need(plain)


def test_the_plan_knows_the_rows_of_named_data(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a b", "completion": "c"}\n' * 20)
    words = ["--model", str(small_model), "--dataset_name", str(path)]
    assert cli.run("plan", words) == 0
    said = capsys.readouterr().out
    assert "20 rows of 64 tokens at most, 2 steps an epoch" in said
    assert "a step of 2 x 64 tokens" in said


@pytest.mark.parametrize("remat", ["auto", "layer"])
def test_auto_wants_to_know_the_memory(planner: Planner, remat: RematChoice) -> None:
    config = TrainConfig(remat=remat)
    other = Planner(
        config=config, spec=planner.spec, shape=planner.shape, model=planner.model
    )
    if remat == "auto":
        with pytest.raises(ConfigError, match="how much memory"):
            planned_remat(other)
    else:
        assert planned_remat(other) == (other.remat("layer"), None)


def test_the_planned_step_has_the_states_of_the_run() -> None:
    sizes = {}
    for optim in ("adamw", "adamw_8bit", "sgd"):
        config = TrainConfig(
            model="tiny",
            full_finetuning=True,
            quant=QuantConfig(load_in_4bit=False),
            optimizer=OptimizerConfig(optim=optim),
        )
        planner = Planner.of(config, planned_spec(config, preset("tiny").config))
        parts = nnx.split(abstract_decoder(planner.spec), nnx.Param, ...)
        remat = planner.remat("none")
        step = RandomStep(config, planner.spec, remat, planner.shape, parts=parts)
        sizes[optim] = sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(step.state.opt_state)
        )
    assert sizes["sgd"] < sizes["adamw_8bit"] < sizes["adamw"] / 2


@pytest.mark.parametrize("layers", [-1, 33])
def test_a_model_is_not_made_longer(layers: int) -> None:
    with pytest.raises(ConfigError, match="has 32"):
        planner_of(StepArgs(layers=layers))


def test_what_host_memory_forbids_is_said_to_be_so(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
    said = "limited by 16.00 GiB of pinned host memory here"
    for memory, is_limited in ((20 * GIB, True), (10_000 * GIB, False)):
        monkeypatch.setattr(runtime, "host_memory_bytes", lambda memory=memory: memory)
        shown = {line.split()[1]: line for line in planner.lines(24 * GIB)}
        assert (said in shown["offload"]) == is_limited, shown["offload"]
        assert "limited" not in shown["layer"]


@pytest.mark.parametrize("remat", ["auto", "layer"])
def test_states_in_host_memory_are_not_mended_by_another_policy(
    monkeypatch: pytest.MonkeyPatch, remat: RematChoice
) -> None:
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "4")
    config = TrainConfig(
        remat=remat,
        full_finetuning=True,
        quant=QuantConfig(load_in_4bit=False),
        optimizer=OptimizerConfig(offload_optimizer=True),
    )
    spec = planned_spec(config, preset("llama3.2-1b").config)
    with pytest.raises(OutOfMemory, match="of pinned host memory") as caught:
        Planner.of(config, spec).require_fit(80 * GIB)
    assert "without --offload_optimizer" in str(caught.value)
    assert "--remat" not in str(caught.value)


def test_auto_leaves_the_host_to_the_states_of_the_optimiser(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "4")
    tokens = planner.shape.micro_batch_tokens
    costs: dict[RematPolicy, PolicyCost] = {
        policy: PolicyCost(
            base_seconds=0.0,
            base_bytes=0.0,
            layer_seconds=seconds,
            layer_bytes=0.0,
            layer_host_bytes=float(saved_bytes(planner.spec, 0, policy)[1] * tokens),
        )
        for policy, seconds in (("offload", 0.1), ("layer", 0.2))
    }
    monkeypatch.setattr(remat_auto, "_measured", lambda *_: costs)
    monkeypatch.setattr(remat_auto, "_Trial", _Untimed)
    config = dataclasses.replace(planner.config, remat="auto", memory_gib=20.0)
    hosted = []
    for states in (0, 3 * GIB):
        model = dataclasses.replace(planner.model, host=states)
        auto = dataclasses.replace(planner, config=config, model=model)
        remat, _ = planned_remat(auto)
        kept = [saved_bytes(auto.spec, 0, policy)[1] for policy in remat.policies]
        hosted.append(sum(kept) * tokens)
    assert GIB < hosted[0] <= 4 * GIB
    assert hosted[1] <= GIB


def test_auto_scans_what_fits_only_so(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = PolicyCost(
        base_seconds=0.1,
        base_bytes=0.0,
        layer_seconds=0.1,
        layer_bytes=0.0,
    )
    tried = []

    class Trial(_Untimed):
        def __init__(self, *arguments: Any) -> None:
            remat: RematPlan = arguments[2]
            tried.append(remat.is_unrolled)
            need = 200 * GIB if remat.is_unrolled else 30 * GIB
            self.memory = StepMemory(
                argument_bytes=need, output_bytes=0, alias_bytes=0, temp_bytes=0
            )

    monkeypatch.setattr(remat_auto, "_measured", lambda *_: {"none": cost})
    monkeypatch.setattr(remat_auto, "_Trial", Trial)
    config = dataclasses.replace(planner.config, remat="auto", memory_gib=140.0)
    auto = dataclasses.replace(planner, config=config)
    remat, choice = planned_remat(auto, steps=10_000)
    assert (str(remat), tried) == ("none", [True, False])
    assert choice is not None
    assert choice.bytes == 30 * GIB


@pytest.mark.parametrize(
    ("remat", "flag", "steps", "expected"),
    [
        ("attention", None, 3_500, "attention, written out"),
        ("attention", None, 3_000, "attention"),
        ("attention", None, 0, "attention"),
        ("attention", False, 10**6, "attention"),
        ("attention", True, 1, "attention, written out"),
        ("none", None, 1_000, "none, written out"),
        ("layer", None, 10**6, "layer"),
    ],
)
def test_long_runs_write_layers_out(
    planner: Planner,
    remat: RematPolicy,
    flag: bool | None,
    steps: int,
    expected: str,
) -> None:
    config = dataclasses.replace(planner.config, remat=remat, unroll_layers=flag)
    asked = dataclasses.replace(planner, config=config)
    notes: list[str] = []
    with assume_compute_capability(HOPPER):
        plan, _ = planned_remat(asked, steps=steps, note=notes.append)
    assert str(plan) == expected
    assert len(notes) == (flag is None and plan.is_unrolled)


@pytest.mark.parametrize(("shorter", "expected"), [(4096, True), (64, False)])
def test_rows_of_two_lengths_compile_twice_and_gain_less(
    planner: Planner, small_model: Path, shorter: int, expected: bool
) -> None:
    config = dataclasses.replace(planner.config, max_steps=5_000, memory_gib=80)
    rows = [{"input_ids": [5] * tokens} for tokens in (4096, shorter) * 20]
    tokenizer = load_model(str(small_model)).tokenizer
    data = load_data(config.data, tokenizer, seed=0, train_source=rows)
    with assume_compute_capability(HOPPER):
        planned = planned_run(config, data, spec=planner.spec, note=str)
    assert planned.remat.is_unrolled == expected


def test_devices_without_the_kernels_scan_layers(planner: Planner) -> None:
    config = dataclasses.replace(planner.config, remat="none", unroll_layers=None)
    asked = dataclasses.replace(planner, config=config)
    with assume_compute_capability((8, 0)):
        plan, _ = planned_remat(asked, steps=10**6)
    assert not plan.is_unrolled


@pytest.mark.parametrize("seconds", [3.0, 3000.0])
def test_auto_predicts_what_the_whole_step_takes(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    cost = PolicyCost(
        base_seconds=seconds, base_bytes=0.0, layer_seconds=0.0, layer_bytes=0.0
    )
    monkeypatch.setattr(remat_auto, "_WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(remat_auto, "_measured", lambda *_: {"none": cost})
    args = StepArgs(model="tiny", batch=1, seq=64, remat="auto", memory_gib=8.0)
    _, choice = planned_remat(planner_of(args))
    assert choice is not None
    assert choice.seconds is not None
    if seconds == 3.0:
        assert choice.seconds < seconds / 2
    else:
        assert choice.seconds == seconds  # too long to be tried


def test_auto_keeps_nothing_of_what_it_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remat_auto, "_WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(remat_auto, "_TIMED", 1)
    args = StepArgs(model="tiny", batch=1, seq=64, remat="auto", memory_gib=8.0)
    tiny = planner_of(args)

    def held() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    gc.collect()
    gc.disable()
    try:
        before = held()
        _, choice = planned_remat(tiny)
        after = held()
    finally:
        gc.enable()
    assert choice is not None
    assert choice.seconds is not None
    assert after - before < 2**16


@pytest.mark.parametrize("steps", [4, 5])
def test_a_warmup_beyond_the_last_epoch_is_refused(steps: int) -> None:
    config = TrainConfig(
        num_train_epochs=2.0, optimizer=OptimizerConfig(warmup_steps=10)
    )
    if 2 * steps < 10:
        with pytest.raises(ConfigError, match="warmup_steps=10 is more than the 8 st"):
            in_steps(config, steps)
    else:
        assert in_steps(config, steps).optimizer == config.optimizer
