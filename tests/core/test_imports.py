"""Which parts of the package import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

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
