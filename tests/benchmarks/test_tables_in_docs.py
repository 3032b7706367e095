"""Tables in the documentation are those of the results."""

from __future__ import annotations

from pathlib import Path

import pytest
import tables_in_docs
from tables_in_docs import DOCS, PLACE, README, filled, with_systems

PAGES = [file for file in sorted(DOCS.glob("*.md")) if PLACE.search(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_tables_of_a_page_are_those_of_the_results(page: Path) -> None:
    assert filled(page.read_text(encoding="utf-8")) == page.read_text(encoding="utf-8")


def test_pages_have_their_tables() -> None:
    assert {page.stem for page in PAGES} == {
        "forecasting",
        "quality",
        "quality-transformer",
        "speed",
        "tokencache",
    }


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "new.md").write_text(
        "Said.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n| c |\n|---|\n\n| c d |\n|---|\n"
    )
    monkeypatch.setattr(tables_in_docs, "RESULTS", tmp_path)


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("below", ["\n", "\nBelow | a.\n"])
@pytest.mark.parametrize("before", ["", "\n| a |\n|---|\n| 0 |\n", "| a |\n|---|\n| 0 |\n"])
def test_a_table_is_put_after_its_place_and_nothing_else_changes(before: str, below: str) -> None:
    page = f"Above.\n\n<!-- new.md: a -->\n{before}{below}"
    rest = below if below.strip() else ""
    done = f"Above.\n\n<!-- new.md: a -->\n\n| a | b |\n|---|---|\n| 1 | 2 |\n{rest}"
    assert filled(page) == done
    assert filled(page.rstrip("\n")) == done
    assert filled(done) == done


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("old.md: a", "old.md: it is not allowed"),
        ("new.md: b", "0 tables"),
        ("new.md: c", "2 tables"),
        ("new.md a", "it must be <!-- RESULT.md: TITLE -->"),
    ],
)
def test_a_table_that_is_not_there_is_refused(place: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        filled(f"<!-- {place} -->\n")


def test_the_readmes_table_of_systems_is_the_catalogues() -> None:
    page = README.read_text(encoding="utf-8")
    assert with_systems(page) == page


def test_a_page_without_one_place_for_the_systems_is_refused() -> None:
    table = with_systems("Above.\n<!-- systems -->old<!-- /systems -->\nBelow.")
    assert table.startswith("Above.\n<!-- systems -->\n\n| System |")
    assert "old" not in table
    assert "**partly** on U-Nets" in next(line for line in table.splitlines() if "AT-EDM" in line)
    for page in ("", table + table):
        with pytest.raises(ValueError, match="once each"):
            with_systems(page)
