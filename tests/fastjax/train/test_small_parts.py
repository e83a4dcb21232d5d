"""Lock, signals, metrics file, evaluation, progress."""

import errno
import fcntl
import io
import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from fastjax.errors import ConfigError, DataError, StorageError
from fastjax.train.batches import DeviceBatch, put_batch
from fastjax.train.evaluate import EvalResult, evaluate, make_eval_step
from fastjax.train.lock import output_lock
from fastjax.train.metrics import MetricsLog, Totals, stamped
from fastjax.train.progress import Progress
from fastjax.train.signals import StopRequest

STEP = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "num_tokens": 4.0}


def one_batch(tiny: SimpleNamespace) -> DeviceBatch:
    return put_batch(tiny.TinyLoader(), 0)


def test_lock_is_freed_and_removed(tmp_path: Path) -> None:
    with output_lock(tmp_path, pytest.fail):
        owner = json.loads((tmp_path / ".lock").read_text())
        assert owner["pid"] == os.getpid()
        with pytest.raises(ConfigError, match=str(os.getpid())):
            output_lock(tmp_path, pytest.fail).__enter__()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("text", ['{"pid": 99999999, "host": "h"}', "garbage"])
def test_stale_lock_is_taken_over_with_a_note(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    notes: list[str] = []
    with output_lock(tmp_path, notes.append):
        assert "took over the lock" in notes[0]


def test_a_lock_that_vanishes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, fstat = [], os.fstat

    def vanishing(descriptor: int) -> os.stat_result:
        looks.append(descriptor)
        if len(looks) == 1:
            (tmp_path / ".lock").unlink()
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", vanishing)
    with output_lock(tmp_path, pytest.fail):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert len(looks) == 2


def test_a_disk_without_locks_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match="No locks available"):
        output_lock(tmp_path, pytest.fail).__enter__()


def test_first_signal_asks_and_the_second_stops() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.is_requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def make_log(folder: Path, steps: int = 6) -> MetricsLog:
    return MetricsLog(folder, logging_steps=2, total_steps=steps)


def test_window_loss_is_weighted_by_tokens(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    log, batch = make_log(tmp_path), one_batch(tiny)
    metrics = {**STEP, "skipped": 0.0}
    assert log.add(1, metrics, batch, epoch=0.5, seconds=1.0) is None
    heavier = {**metrics, "loss": 5.0, "num_tokens": 8.0}
    record = log.add(2, heavier, batch, epoch=1.0, seconds=1.0)
    assert record is not None
    assert record["loss"] == 4.0
    assert record["num_trained_tokens"] == 12
    assert record["num_tokens"] == 2 * batch.num_tokens
    assert record["tokens_per_second"] == batch.num_tokens


def test_half_a_window_survives_in_the_checkpoint(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    batch, metrics = one_batch(tiny), {**STEP, "loss": 0.1, "skipped": 0.0}
    log = make_log(tmp_path)
    log.add(1, metrics, batch, epoch=0.5, seconds=1.0)
    other = make_log(tmp_path)
    other.restore(json.loads(json.dumps(log.state())))
    ends = [one.add(2, metrics, batch, epoch=1.0, seconds=1.0) for one in (log, other)]
    assert ends[0] is not None
    assert {k: v for k, v in ends[0].items() if k != "tokens_per_second"} == {
        k: v for k, v in (ends[1] or {}).items() if k != "tokens_per_second"
    }


def test_lines_beyond_the_step_and_a_torn_line_are_cut(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    for step in (2, 4, 6):
        log.write({"step": step, "loss": math.nan})
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
    log.truncate(4)
    assert log.path.read_text() == (
        '{"step": 2, "loss": null}\n{"step": 4, "loss": null}\n'
    )


def test_no_tokens_is_no_loss() -> None:
    assert math.isnan(Totals().loss)


def test_peak_memory_is_left_out_where_unknown() -> None:
    assert "peak_memory_bytes" not in stamped({}, None)
    assert stamped({}, 5)["peak_memory_bytes"] == 5


def test_evaluation_weighs_by_tokens(tiny: SimpleNamespace) -> None:
    def loss(trainable, frozen, batch, *, dropout_key):
        is_trained = batch["targets"] != -100
        tokens = jnp.sum(is_trained.astype(jnp.float32))
        return tokens * tokens * trainable, tokens

    loader = tiny.TinyLoader(micro_batches=3, steps_per_epoch=5)
    result = evaluate(make_eval_step(loss), jnp.float32(0.5), {}, loader)
    counts = np.concatenate(
        [(loader.batch(i)["targets"] != -100).sum(axis=(1, 2)) for i in range(5)]
    )
    assert result.num_tokens == counts.sum()
    expected = 0.5 * (counts**2).sum() / counts.sum()
    assert result.loss == pytest.approx(expected)
    assert result.metrics()["eval_perplexity"] == pytest.approx(math.exp(expected))


def test_evaluation_without_tokens_is_an_error(tiny: SimpleNamespace) -> None:
    def loss(trainable, frozen, batch, *, dropout_key):
        return jnp.float32(0.0), jnp.float32(0.0)

    with pytest.raises(DataError, match="no token of the evaluation set"):
        evaluate(make_eval_step(loss), {}, {}, tiny.TinyLoader())


def test_perplexity_of_a_huge_loss_is_infinite() -> None:
    assert (
        EvalResult(loss=1e3, num_tokens=1, runtime_seconds=0.0).perplexity == math.inf
    )


def test_plain_lines_are_never_wrapped() -> None:
    console = Console(file=io.StringIO(), width=20)
    with Progress(console, 10) as progress:
        progress.start(0)
        progress.note("[bold] is no markup " + "x" * 40)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert text == "[bold] is no markup " + "x" * 40 + "\n"


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_terminal_keeps_each_line_and_always_the_counter(width: int) -> None:
    screen = io.StringIO()
    record = {"epoch": 1.0, "tokens_per_second": 27100.0, "roofline_share": 0.5}
    with Progress(Console(file=screen, force_terminal=True, width=width), 1000) as bar:
        bar.start(0)
        bar.record({**STEP, **record, "step": 10, "peak_memory_bytes": 2**34})
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert shown.count("step 10/1000  epoch 1.00  loss 2.0000  grad_norm 1") == 1
    *_, live = shown.strip().splitlines()
    assert live.strip().startswith("10/1000 ")
    assert ("━" in live) == (width == 160)
    assert ("ETA" in live) == (width >= 80)
