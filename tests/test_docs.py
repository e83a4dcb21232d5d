"""What the documentation says exists: tests, codes of errors, pages and settings."""

import ast
import re
from pathlib import Path

import pytest

from fastjax.cli_help import settings_page

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CASES = [
    f"{group}{number}"
    for group, count in zip("ABCD", (22, 27, 24, 24), strict=True)
    for number in range(1, count + 1)
]


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_fault_has_a_test_that_exists_or_a_reason() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    held, _, others = page.partition("## Not held by a test")
    rows = dict(re.findall(r"^\| ([A-D]\d+) \| .* \| (.*) \|$", held, re.MULTILINE))
    reasons = re.findall(r"^\| ([A-D]\d+) \| .* \| .+ \|$", others, re.MULTILINE)
    assert sorted([*rows, *reasons]) == sorted(CASES)
    missing = []
    for case, cell in rows.items():
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", cell)
        assert named, case
        missing += [
            f"{case}: {file}::{name}"
            for file, name in named
            if name not in functions_of(ROOT / "tests" / file)
        ]
    assert not missing


def test_every_code_of_an_error_is_explained() -> None:
    used = set()
    for package in ("fastjax", "kernels", "conversions"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    used |= set(re.findall(r"^FJ-[A-Z0-9-]*[A-Z0-9]$", node.value))
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`(FJ-[A-Z0-9-]+)`", page))
    assert explained == used


def test_the_transcript_is_of_the_commands_of_the_quickstart() -> None:
    pages = ROOT / "docs" / "quickstart.md", ROOT / "docs" / "first_half_hour.md"
    quickstart, transcript = (page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"^```bash\n(.*?)^```$", quickstart, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert [line for line in lines if line not in transcript] == []
    assert re.search(r"Linux-\d", transcript) is None  # a kernel of some machine


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = []
    for link in links:
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        path = (page.parent / target) if target else page
        is_page = path.exists() and path.suffix == ".md"
        if not path.exists() or (is_page and anchor and anchor not in anchors_of(path)):
            broken.append(link)
    assert not broken


def anchors_of(path: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_the_page_of_settings_is_that_of_the_dataclasses() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page(), "run `make docs`"
