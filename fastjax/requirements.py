"""The packages that fastjax needs: are those installed of tested versions?"""

import importlib.metadata
import re
import shlex
import sys
from pathlib import Path

from fastjax.errors import EnvironmentFault

_NAME = re.compile(r"[\w.-]+")
_BOUND = re.compile(r"(>=|<)([\d.]+)")


def faults() -> list[EnvironmentFault]:
    """Returns what is missing, outside its tested range, or hides a package of ours.

    A fastjax that runs from its sources, without being installed, states no ranges.
    """
    found = [fault for line in _requirements() if (fault := _fault(line)) is not None]
    if "kernels" in {dist.name for dist in importlib.metadata.distributions()}:
        found.append(
            EnvironmentFault(
                "Hugging Face's package `kernels` has the name of one of fastjax's",
                fix="pip uninstall kernels, then install fastjax again",
                code="FJ-ENV-PACKAGE",
            )
        )
    return found


def install_command(extra: str) -> str:
    """Returns the line that brings an extra to the environment that runs.

    A fastjax that runs from its sources is installed from there.
    """
    root = Path(__file__).parents[1]
    from_sources = (root / "pyproject.toml").is_file()
    what = (
        f"-e {shlex.quote(f'{root}[{extra}]')}"
        if from_sources
        else f"'fastjax[{extra}]'"
    )
    return f"{shlex.quote(sys.executable)} -m pip install {what}"


def _requirements() -> list[str]:
    """Returns the lines of pyproject.toml that hold without an extra."""
    try:
        lines = importlib.metadata.requires("fastjax") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [line for line in lines if ";" not in line]


def _fault(requirement: str) -> EnvironmentFault | None:
    match = _NAME.match(requirement)
    assert match is not None
    name = match.group()
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        what = f"{name} is not installed"
    else:
        if all(_holds(version, *bound) for bound in _BOUND.findall(requirement)):
            return None
        what = f"{name} {version} is outside the tested range, {requirement}"
    fix = f"pip install '{requirement}'"
    return EnvironmentFault(what, fix=fix, code="FJ-ENV-PACKAGE")


def _holds(version: str, relation: str, bound: str) -> bool:
    given, limit = _numbers(version), _numbers(bound)
    return given >= limit if relation == ">=" else given < limit


def _numbers(version: str) -> tuple[int, ...]:
    """Returns the release of a version: (0, 11, 2) for "0.11.2.dev3"."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()
