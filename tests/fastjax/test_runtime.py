"""Process-wide settings: where the cache lies, and that imports stay light."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastjax import runtime


def python(code: str, **environment: str) -> str:
    """Returns what a fresh interpreter prints."""
    inherited = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"JAX_PLATFORMS": "cpu", **inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.strip()


def test_cache_folder_obeys_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTJAX_CACHE", str(tmp_path / "own"))
    assert runtime.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("FASTJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.cache_folder() == tmp_path / "fastjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert runtime.cache_folder() == Path.home() / ".cache" / "fastjax"


def test_configure_sets_the_cache_and_keeps_the_users_flags(tmp_path: Path) -> None:
    code = """
import os
from fastjax import runtime
runtime.configure(full_determinism=True, memory_share=0.25)
import jax
print(jax.config.jax_compilation_cache_dir)
print(os.environ["XLA_FLAGS"])
print(jax.numpy.ones(2).sum(), runtime.is_deterministic())
print(os.environ["XLA_CLIENT_MEM_FRACTION"])
"""
    mine = "--xla_force_host_platform_device_count=2"
    shown = python(code, FASTJAX_CACHE=str(tmp_path), XLA_FLAGS=mine).splitlines()
    assert shown[0] == str(tmp_path / "xla")
    assert mine in shown[1]
    assert "nondeterministic" in shown[1]
    assert shown[2] == "2.0 True"
    assert shown[3] == "0.2500"


def test_commands_that_need_no_gpu_leave_it_alone() -> None:
    code = """
import os
from fastjax import runtime
runtime.configure(gpu="none")
import jax
print(jax.config.jax_platforms, "XLA_PYTHON_CLIENT_PREALLOCATE" in os.environ)
"""
    assert python(code, JAX_PLATFORMS="cuda") == "cpu False"


def test_a_home_that_cannot_be_written_turns_the_cache_off(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    code = """
from fastjax import runtime
runtime.configure()
import jax
print(jax.config.jax_compilation_cache_dir)
"""
    assert python(code, FASTJAX_CACHE=str(file)) == "None"


def test_threads_take_shorter_turns_on_the_command_line_alone() -> None:
    code = """
import sys
import fastjax.api
from fastjax import cli
print(sys.getswitchinterval())
sys.argv = ["fastjax", "models"]
cli.main()
print(sys.getswitchinterval())
"""
    first, *_, last = python(code).splitlines()
    assert (float(first), float(last)) == (0.005, 0.0005)


def test_an_interrupt_that_python_drops_still_stops_a_run() -> None:
    code = """
        import gc, os, signal
        from fastjax import runtime
        from fastjax.train.signals import StopRequest

        def interrupt(phase, info):
            if phase == "start":
                os.kill(os.getpid(), signal.SIGINT)

        runtime.own_process()
        gc.callbacks.append(interrupt)
        gc.collect()
        gc.callbacks.remove(interrupt)
        print("went on", flush=True)
        with StopRequest():
            print("started", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stdout == "went on\n"
    assert ended.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fastjax", ("jax", "numpy", "transformers", "tyro", "yaml")),
        ("import fastjax.cli", ("jax", "numpy", "transformers", "tyro", "datasets")),
        ("import fastjax.config", ("jax", "numpy", "transformers")),
        ("import fastjax.commands.train", ("jax", "numpy", "fastjax.api")),
    ],
)
def test_light_imports(statement: str, absent: tuple[str, ...]) -> None:
    code = f"{statement}\nimport sys\nprint([n for n in {absent} if n in sys.modules])"
    assert python(code) == "[]"


def test_the_package_gives_its_public_names_when_asked() -> None:
    import fastjax

    for name in fastjax.__all__:
        assert getattr(fastjax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastjax.nothing
