"""Which parts of the package import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import regrow

SOURCE = Path(__file__).parents[2] / "src" / "regrow"
# Of what methods and the core are made; none of it knows what stands on the public surface.
CORE = ("core", "recover", "tokens", "models", "methods")
SURFACE = ("lab", "apply", "report")
# The type of what a method is fitted to.
ALLOWED = {("methods/l2p.py", "lab")}


def imported(file: Path) -> Iterator[str]:
    """The parts of the package that a file imports when it is loaded."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[1] for name in names if name.startswith("regrow."))


@pytest.mark.parametrize("part", CORE)
def test_the_core_imports_nothing_of_the_surface(part: str) -> None:
    found = {
        (str(file.relative_to(SOURCE)), name)
        for file in (SOURCE / part).rglob("*.py")
        for name in imported(file)
        if name in SURFACE
    }
    assert found <= ALLOWED


BELOW = {"control", "fields", "files", "origin", "schedule", "words"}
ONE_WAY = {
    "tokens": {"tokens"},
    "recover": {"recover", "tokens"} | BELOW - {"control", "schedule"},
    "models": {"models", "recover", "tokens"} | BELOW - {"control"},
    "core": {"core", "models", "recover", "tokens"} | BELOW,
}


@pytest.mark.parametrize("part", ONE_WAY)
def test_parts_are_made_of_what_lies_below_them(part: str) -> None:
    for file in (SOURCE / part).rglob("*.py"):
        assert set(imported(file)) <= ONE_WAY[part], file


@pytest.mark.slow
def test_importing_regrow_brings_no_diffusers() -> None:
    """It takes as long as torch, and workers have no use for it."""
    code = "import sys, regrow; assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_that_are_imported_when_asked_for_are_there() -> None:
    assert set(regrow.__all__) <= set(dir(regrow))
    assert all(hasattr(regrow, name) for name in regrow.__all__)
    with pytest.raises(AttributeError, match="no attribute 'recrod'"):
        _ = regrow.recrod  # type: ignore[attr-defined]


def test_one_name_means_one_class() -> None:
    """A reader who searches for a class finds one."""
    names = Counter(
        node.name
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, count in names.items() if count > 1} == set()
