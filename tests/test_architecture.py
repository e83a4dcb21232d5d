"""What the house must stay: sizes, names, docstrings, clean imports."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fastjax", "kernels", "conversions")
# (folder, lines of a file, lines of a function)
LIMITS = [
    ("fastjax", 400, 60),
    ("conversions", 400, 60),
    ("scripts", 400, 60),
    ("kernels", 600, 150),
    ("tests", 600, 60),
]
VAGUE = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}
# What a module may do when it is imported, besides defining names.
DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(folder: str) -> list[Path]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    return paths


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> Iterator[Function]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return (node for node in ast.walk(tree) if isinstance(node, kinds))


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter that stands in the repository."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(("folder", "file_lines", "function_lines"), LIMITS)
def test_files_and_functions_are_small(
    folder: str, file_lines: int, function_lines: int
) -> None:
    long_files, long_functions = [], []
    for path in sources(folder):
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > file_lines:
            long_files.append(f"{name_of(path)}: {count} lines")
        for node in functions(tree_of(path)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            docstring = ast.get_docstring(node, clean=False) or ""
            lines -= len(docstring.splitlines())
            if lines > function_lines:
                where = f"{name_of(path)}:{node.lineno} {node.name}"
                long_functions.append(f"{where}: {lines} lines")
    assert not long_files
    assert not long_functions


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_have_a_role_and_a_name_that_says_it(package: str) -> None:
    for path in sources(package):
        assert ast.get_docstring(tree_of(path)), f"{name_of(path)} has no docstring"
        assert path.name not in VAGUE


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_public_is_documented(package: str) -> None:
    missing = []
    for path in sources(package):
        for owner, node in _definitions(tree_of(path)):
            if _is_public(node.name) and not ast.get_docstring(node):
                missing.append(f"{name_of(path)}:{node.lineno} {owner}{node.name}")
    assert not missing


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Yields the functions and classes of a module, and methods of public classes."""
    for node in tree.body:
        if not isinstance(node, DOCUMENTED):
            continue
        yield "", node
        if isinstance(node, ast.ClassDef) and _is_public(node.name):
            is_protocol = any("Protocol" in ast.unparse(base) for base in node.bases)
            methods = [n for n in node.body if isinstance(n, DOCUMENTED)]
            yield from ((f"{node.name}.", n) for n in methods if not is_protocol)


def _is_public(name: str) -> bool:
    return not name.startswith("_")


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_do_not_print_catch_everything_or_run_text(package: str) -> None:
    found = []
    for path in sources(package):
        tree = tree_of(path)
        for node in ast.walk(tree):
            if _is_forbidden(node):
                found.append(f"{name_of(path)}:{getattr(node, 'lineno', 0)}")
    assert not found


def _is_forbidden(node: ast.AST) -> bool:
    if isinstance(node, ast.ExceptHandler):
        caught = ast.unparse(node.type) if node.type else "everything"
        is_silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
        is_blanket = caught in ("everything", "Exception", "BaseException")
        cleans_up = isinstance(node.body[-1], ast.Raise) and not node.body[-1].exc
        return is_silent or (is_blanket and not cleans_up)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("print", "exec", "eval", "breakpoint")
    if isinstance(node, ast.ImportFrom):
        is_star = any(alias.name == "*" for alias in node.names)
        return node.module == "__future__" or is_star
    return False


@pytest.mark.parametrize("package", ["fastjax", "conversions"])
def test_public_functions_take_few_positions(package: str) -> None:
    """At most four positional arguments; those of an op are its operands."""
    crowded = []
    for path in sources(package):
        for owner, node in _definitions(tree_of(path)):
            if isinstance(node, ast.ClassDef) or not _is_public(node.name):
                continue
            taken = [*node.args.posonlyargs, *node.args.args]
            names = [a.arg for a in taken if a.arg not in ("self", "cls")]
            if len(names) > 4:
                crowded.append(f"{name_of(path)}:{node.lineno} {owner}{node.name}")
    assert not crowded


def test_settings_of_the_process_are_made_in_one_place() -> None:
    """No other module writes the environment or JAX's configuration."""
    found = []
    for package in PACKAGES:
        for path in sources(package):
            if path == ROOT / "fastjax" / "runtime.py":
                continue
            for node in ast.walk(tree_of(path)):
                if _changes_the_process(node):
                    found.append(f"{name_of(path)}:{getattr(node, 'lineno', 0)}")
    assert not found


def _changes_the_process(node: ast.AST) -> bool:
    if isinstance(node, ast.Assign | ast.Delete):
        return any(ast.unparse(t).startswith("os.environ[") for t in node.targets)
    if isinstance(node, ast.Call):
        calls = ("jax.config.update", "os.environ.setdefault", "os.environ.update")
        return ast.unparse(node.func) in (*calls, "os.putenv")
    return False


def test_the_package_that_shares_its_name_is_a_docstring() -> None:
    body = tree_of(ROOT / "kernels" / "__init__.py").body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert ast.get_docstring(tree_of(ROOT / "kernels" / "__init__.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_inner_packages_only_re_export(package: str) -> None:
    for path in sources(package):
        if path.name != "__init__.py" or path.parent.parent == ROOT:
            continue
        kinds = (ast.Expr, ast.ImportFrom)
        other = [node for node in tree_of(path).body if not isinstance(node, kinds)]
        assert not other, f"{name_of(path)} holds code"


@pytest.mark.parametrize("path", sources("scripts"), ids=name_of)
def test_scripts_hold_no_logic(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree)
    assert not list(functions(tree))
    imported = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    entrances = {"fastjax.api", "fastjax.cli", "kernels.command_line"}
    assert set(imported) <= entrances


@pytest.mark.parametrize(
    "code",
    [
        "import kernels, transformers; transformers.AutoTokenizer",
        "import transformers, kernels.rope",
        "import conversions",
        "import conversions.hf, conversions.peft, conversions.bnb",
        "import fastjax.api",
        "import kernels.nf4, sys; assert 'fastjax' not in sys.modules",
    ],
)
def test_any_door_may_be_opened_first(code: str) -> None:
    done = fresh(code)
    assert done.returncode == 0, done.stderr


def test_imports_are_light_and_start_no_device() -> None:
    code = (
        "import sys, fastjax; assert 'jax' not in sys.modules;"
        "import fastjax.api, jax;"
        "from jax._src import xla_bridge;"
        "assert not xla_bridge.backends_are_initialized();"
        "assert 'torch' not in sys.modules"
    )
    done = fresh(code)
    assert done.returncode == 0, done.stderr


def test_no_test_folder_is_a_package() -> None:
    """Else tests/kernels would hide kernels."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_version_is_not_one_that_transformers_takes_for_its_own() -> None:
    import fastjax

    assert not fastjax.__version__.startswith("0.18.")
