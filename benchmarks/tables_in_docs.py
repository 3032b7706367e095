"""Put tables of results into the documentation.

    python benchmarks/tables_in_docs.py

Where a page says ``<!-- RESULT.md: TITLE -->``, the table after it is replaced by that table of
benchmarks/results/RESULT.md whose first cell begins with TITLE.
"""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
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


def main() -> None:
    """Write all pages."""
    for file in sorted(DOCS.glob("*.md")):
        page = file.read_text(encoding="utf-8")
        new = filled(page)
        if new != page:
            file.write_text(new, encoding="utf-8")
            print(file)


if __name__ == "__main__":
    main()
