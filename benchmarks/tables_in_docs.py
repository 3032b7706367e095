"""Put tables of results, and the table of systems, into the documentation.

    python benchmarks/tables_in_docs.py

The README has between ``<!-- systems -->`` and ``<!-- /systems -->`` what `regrow.methods.catalogue` says.
Where a page says ``<!-- RESULT.md: TITLE -->``, the table after it is replaced by that table of
benchmarks/results/RESULT.md whose first cell begins with TITLE.
"""

from __future__ import annotations

import re
from pathlib import Path

from regrow.methods.base import Status
from regrow.methods.catalogue import System, systems

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- systems -->", "<!-- /systems -->"
PLACE = re.compile(r"<!-- (\S+\.md): (.+?) -->\n*(?:\|.*(?:\n|$))*\n*")


def table(result: str, title: str) -> str:
    """A table of a result.

    Raises:
        ValueError: if there is no such result, or not one such table in it.
    """
    file = RESULTS / result
    if not file.exists():
        raise ValueError(f"{result}: it is not allowed, it must be in {RESULTS}")
    blocks = file.read_text(encoding="utf-8").split("\n\n")
    found = [block.strip("\n") for block in blocks if block.startswith(f"| {title}")]
    if len(found) != 1:
        raise ValueError(f"{result}: {len(found)} tables begin with {title!r}, there must be one")
    return found[0]


def filled(page: str) -> str:
    """A page with its tables as they are in the results.

    Raises:
        ValueError: if a place is not written as it must be, or its table is not in the results.
    """
    for comment in re.findall(r"<!--.*?-->", page):
        if ".md" in comment and not PLACE.match(comment):
            raise ValueError(f"{comment}: it is not allowed, it must be <!-- RESULT.md: TITLE -->")
    tables = PLACE.sub(lambda at: f"<!-- {at[1]}: {at[2]} -->\n\n{table(at[1], at[2])}\n\n", page)
    return tables.rstrip("\n") + "\n"


def with_systems(page: str) -> str:
    """A page with its table of systems as the catalogue has them.

    Raises:
        ValueError: if it has not one place for it.
    """
    if (page.count(BEGIN), page.count(END)) != (1, 1):
        raise ValueError(f"README.md: it must have {BEGIN} and {END} once each")
    head, rest = page.split(BEGIN)
    tail = rest.split(END)[1]
    rows = "\n".join(map(row, systems()))
    return f"{head}{BEGIN}\n\n| System | What it does | State |\n|---|---|---|\n{rows}\n\n{END}{tail}"


def row(system: System) -> str:
    """The row of a system."""
    about = system.about
    number = about.paper.removeprefix("arXiv ")
    link = about.paper if number == about.paper else f"[{number}](https://arxiv.org/abs/{number})"
    title = f"{about.title} ({link})" if link else about.title
    state = about.status.value
    if about.status is not Status.NOT_YET:
        state = f"**{state}** on {about.models}" + (f"; {about.note}" if about.note else "")
    return f"| {title} | {about.what} | {state} |"


def main() -> None:
    """Write all pages."""
    page = README.read_text(encoding="utf-8")
    if with_systems(page) != page:
        README.write_text(with_systems(page), encoding="utf-8")
        print(README)
    for file in sorted(DOCS.glob("*.md")):
        page = file.read_text(encoding="utf-8")
        new = filled(page)
        if new != page:
            file.write_text(new, encoding="utf-8")
            print(file)


if __name__ == "__main__":
    main()
