"""The command line: finds the command, turns errors into four lines and an exit code.

Nothing heavy is imported before a command needs it, so that `--help` is quick.
"""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType, TracebackType

from fastjax import runtime
from fastjax.cli_flags import Call
from fastjax.errors import (
    ConfigError,
    FastJaxError,
    Interrupted,
    OutOfMemory,
    StorageError,
    printable,
)
from fastjax.files import DISK_FULL

# Each is a module of fastjax.commands; `-` becomes `_`.
_COMMANDS = {
    "train": "train adapters, or every weight, on a data file",
    "sweep": "train several adapters at once and compare them",
    "plan": "tell what memory a run needs, before anything is loaded",
    "check-data": "show what a data file holds and which of its tokens are trained",
    "eval": "measure the loss of a model or adapter on a data file",
    "generate": "answer prompts",
    "chat": "talk with a model or adapter, turn by turn",
    "export": "write a model or merged adapter: Hugging Face, 4-bit, GGUF",
    "combine": "make one adapter of several of one base",
    "inspect": "show what a model or adapter folder holds, and what is wrong",
    "push": "upload an adapter or model to the Hugging Face hub",
    "models": "list the presets",
    "doctor": "check the installation, the GPU and every op",
    "make-random-checkpoint": "write random weights of a preset's shapes",
    "bench-train": "time the training step on random weights",
    "profile-step": "time one training step by kind of kernel",
    "demo": "train a tiny model, then a QLoRA adapter on it",
}
_OTHER_NAMES = {"evaluate": "eval", "merge": "export"}
_BROKEN_PIPE_CODE = 128 + 13
"""As a shell reports a program that died of SIGPIPE."""


def main() -> int:
    """Runs the command named first on the command line; returns the exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if words[0] in ("-V", "--version"):
        import fastjax

        sys.stdout.write(f"fastjax {fastjax.__version__}\n")
        return 0
    if "--debug" not in words:
        sys.excepthook = _report_fault
    runtime.own_process()
    return run(words[0], words[1:])


def usage() -> str:
    """Returns the list of commands."""
    rows = [f"  {name:22}  {role}\n" for name, role in _COMMANDS.items()]
    return (
        f"usage: fastjax COMMAND [flags]\n\n{''.join(rows)}\n"
        "`fastjax COMMAND --help` lists the flags of a command. `--debug` shows "
        "tracebacks.\n"
    )


def run(command: str, words: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
      command: A name of the usage text.
      words: Its flags; None takes those of this process, a script of `scripts/`.
    """
    if words is None:
        runtime.own_process()
    program = ["fastjax", command] if words is not None else ["python", sys.argv[0]]
    words = list(sys.argv[1:] if words is None else words)
    is_debugging = "--debug" in words
    call = Call(
        command=command,
        program=tuple(program),
        words=tuple(w for w in words if w != "--debug"),
    )
    try:
        _module_of(command).run(call)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has left, as `head` does; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE_CODE
    except (FastJaxError, OSError, MemoryError) as error:
        told = _told(error)
        sys.stderr.write(traceback.format_exc() if is_debugging else f"{told}\n")
        return told.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return Interrupted.exit_code
    except SystemExit as stop:  # help was shown
        return stop.code if isinstance(stop.code, int) else 2
    return 0


def _module_of(command: str) -> ModuleType:
    name = _OTHER_NAMES.get(command, command)
    if name in _COMMANDS:
        return importlib.import_module(f"fastjax.commands.{name.replace('-', '_')}")
    near = difflib.get_close_matches(command, [*_COMMANDS, *_OTHER_NAMES], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"there is no command {printable(command)!r}{hint}",
        fix=f"use one of: {', '.join(_COMMANDS)}",
    )


def _told(error: FastJaxError | OSError | MemoryError) -> FastJaxError:
    """Returns the error as people are told of it."""
    if isinstance(error, FastJaxError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemory(
            "the machine's memory is full",
            fix="use a smaller model or data set, or a machine with more memory",
            code="FJ-MEMORY-HOST",
        )
    is_full = error.errno in DISK_FULL
    return StorageError(
        f"a file operation failed: {printable(error.strerror or error)}",
        where=printable(error.filename or ""),
        fix="free some space there" if is_full else "check that path and try again",
    )


def _report_fault(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Tells of an error that nobody foresaw in four lines."""
    last = traceback.extract_tb(trace)[-1]
    told = FastJaxError(
        f"a fault of fastjax: {kind.__name__}: {printable(error)}",
        where=f"{last.filename}:{last.lineno}",
        fix="run it again with --debug and report what it shows",
    )
    sys.stderr.write(f"{told}\n")
