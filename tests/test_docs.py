"""The README and the pages beside it: links lead somewhere, commands and the first snippet are right."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from regrow.lab.cli.main import app
from regrow.lab.measure.variants import variant

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "src" / "regrow" / "zoo").glob("*/README.md")),
)
LINK = re.compile(r"\]\(([^()\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPEN = ("...", "[", "|")
"""What a command has that a reader must fill in first, or that goes on elsewhere."""


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and others make them."""
    names: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        plain = LINK.sub("]", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.append(f"{name}-{names.count(name)}" if name in names else name)
    return set(names)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_what_is_there(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_files_that_are_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:src|tests|tools|benchmarks|docs)/[\w./-]+)`", text)
    assert [file for file in named if not (ROOT / file).exists()] == []


def commands() -> Iterator[str]:
    """The commands of the README and the pages, from their blocks and from code within lines."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = "".join(body for language, body in BLOCK.findall(text) if not language)
        lines = blocks.replace("\\\n", " ").splitlines()
        inline = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
        yield from (c.replace("\n", " ") for c in (*lines, *inline) if re.match(r"regrow [a-z]+ --?\w", c))


@pytest.mark.parametrize("command", sorted({c for c in commands() if not any(o in c for o in OPEN)}))
def test_a_command_has_options_that_there_are(command: str) -> None:
    name, *words = shlex.split(command, comments=True)[1:]
    parsed = typer.main.get_command(app).commands[name].make_context(name, words).params  # type: ignore[attr-defined]
    given = [parsed.get(option) or "" for option in ("method", "methods", "beside")]
    for spec in ",".join(given).split(","):
        assert ":" not in spec or variant(spec, 50)


def test_the_snippet_of_the_readme_makes_a_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    snippet = next(body for language, body in BLOCK.findall(README.read_text(encoding="utf-8")) if language)
    fast = snippet.replace("num_inference_steps=50", "num_inference_steps=2")
    assert fast != snippet
    monkeypatch.chdir(tmp_path)
    exec(compile(fast, "README.md", "exec"), {})
    assert (tmp_path / "owl.png").stat().st_size > 1000
    assert "2 calls" in capsys.readouterr().out


def test_macs_of_the_page_on_choosing_are_those_of_the_result() -> None:
    lines = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").splitlines()
    result = json.loads((ROOT / "benchmarks" / "results" / "profile-choosing.json").read_text())
    for row in result["rows"]:
        words = row["command"].removeprefix(f"regrow profile --arch {row['arch']} ")
        names = (f"`{row['arch']}`", f"`{words}`")
        assert any(
            all(part in line for part in (*names, f"| {row['macs_ratio']:.2f}x |")) for line in lines
        ), row
