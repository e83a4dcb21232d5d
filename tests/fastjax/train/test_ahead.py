"""The step that a thread compiles on shapes while weights are read."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from fastjax.remat import RematPlan
from fastjax.train.ahead import StepsAhead


def test_a_run_takes_the_steps_made_beforehand(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    graphdef, *weights = tiny.split()
    rescue = str(tmp_path / "rescue")
    settings = tiny.config(fallback_dir=rescue)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    arguments: dict[str, Any] = {
        "config": settings,
        "remat": RematPlan(policies=(settings.remat,)),
        "graphdef": graphdef,
        "train_loader": tiny.TinyLoader(),
        "output_dir": Path(),
    }
    job = tiny.Job(**arguments, trainable=shapes[0], frozen=shapes[1])
    notes: list[str] = []
    ahead = StepsAhead(job, notes.append)

    def adapter(name: str, **changes: Any) -> bytes:
        tiny.train(tmp_path / name, job=changes, fallback_dir=rescue)
        return (tmp_path / name / "adapter_model.bytes").read_bytes()

    taken: list[Any] = []

    def steps(job: Any) -> Any:
        taken.append(ahead.steps(job))
        return taken[-1]

    assert adapter("ahead", steps_ahead=steps) == adapter("plain")
    assert taken[0] is not None
    assert notes == ["compiling the step (about a minute once per shape)"]
    other = {"steps_ahead": steps, "head_is_trainable": True}
    assert adapter("other", **other) == adapter("plain")
    assert taken[1] is None
