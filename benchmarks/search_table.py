"""A search beside what it has to beat: uniform plans, the paper's, and other searches such as chance.

    python benchmarks/search_table.py nsga2 --against chance staged --plot . --json search.json

The arguments are folders of `regrow search`; what the first stands beside are the plans of its `--beside`.
Hypervolumes are up to one reference point, the worst figures of all fronts and plans that are compared. The
first search is also shown as it was after as many pictures as each of the others made, and when it was
as good as their fronts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from regrow.lab.search.objectives import minimised, objective
from regrow.lab.search.plots import compare
from regrow.lab.search.proposals import hypervolume

Point = tuple[float, ...]


def points(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Point]:
    """Objectives of rows, less is better; those that could not be run are left out."""
    return [
        tuple(minimised(objective(name), row["values"][name]) for name in names)
        for row in rows
        if None not in row["values"].values()
    ]


def group(name: str) -> str:
    """The methods of a name without their settings: ``deepcache+tome`` of ``deepcache:5+tome:0.5``."""
    return "+".join(part.partition(":")[0] for part in name.split("+"))


def dominated(one: Point, front: Sequence[Point]) -> bool:
    """Whether the front has a plan that is nowhere worse and somewhere better."""
    return any(all(a <= b for a, b in zip(p, one, strict=True)) and p != one for p in front)


def front_after(found: Mapping[str, Any], pictures: int) -> list[Point]:
    """The front of a search when it had made so many pictures at most."""
    fronts = [row["front"] for row in found["history"] if row["pictures"] <= pictures]
    return [tuple(point) for point in fronts[-1]] if fronts else []


def reached(found: Mapping[str, Any], volume: float, reference: Sequence[float]) -> dict[str, Any]:
    """Pictures and seconds after which the front of a search had such a hypervolume; none if never."""
    for row in found["history"]:
        if hypervolume([tuple(point) for point in row["front"]], reference) >= volume:
            return {"search_as_good_after": {"pictures": row["pictures"], "seconds": round(row["seconds"])}}
    return {}


def compared(found: Mapping[str, Any], against: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for the front, for each group of plans beside it, and for each other search.

    Args:
        found: ``search.json`` of the search.
        against: those of others, by name.
    """
    names = found["objectives"]
    front = points(found["front"], names)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["beside"]:
        groups.setdefault(group(row["name"]), []).append(row)
    beside = {name: points(rows, names) for name, rows in groups.items()}
    others = {name: points(other["front"], names) for name, other in against.items()}
    everything = [p for ps in (front, *beside.values(), *others.values()) for p in ps]
    reference = [max(column) for column in zip(*everything, strict=True)]

    def row(name: str, plans: list[Point], **more: Any) -> dict[str, Any]:
        volume = round(hypervolume(plans, reference), 5)
        beaten = sum(dominated(p, front) for p in plans)
        return {"name": name, "plans": len(plans), "hypervolume": volume, "dominated": beaten} | more

    def spent(search: Mapping[str, Any]) -> dict[str, int]:
        return {name: round(search[name]) for name in ("evaluated", "pictures", "seconds")}

    rows = [row("the search's front", front, **spent(found))]
    rows += [row(name, plans) for name, plans in beside.items()]
    for name, other in against.items():
        then = round(hypervolume(front_after(found, other["pictures"]), reference), 5)
        more = spent(other) | reached(found, hypervolume(others[name], reference), reference)
        rows.append(row(f"the front of {name}", others[name], **more, search_after_as_many=then))
    return rows


def read(folder: Path) -> dict[str, Any]:
    """What a search found."""
    return json.loads((folder / "search.json").read_text(encoding="utf-8"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("search", type=Path, help="folder of the search")
    parser.add_argument("--against", type=Path, nargs="*", default=[], help="folders of other searches")
    parser.add_argument("--plot", type=Path, help="folder for the plot of their hypervolumes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    found = read(args.search)
    against = {folder.name: read(folder) for folder in args.against}
    rows = compared(found, against)
    table = Table(
        caption="dominated: plans that the front beats in both; then: hypervolume of the first row's "
        "search after as many pictures; as good: after how many it was as good"
    )
    columns = {
        "plans of": "name",
        "number": "plans",
        "hypervolume": "hypervolume",
        "dominated": "dominated",
        "evaluated": "evaluated",
        "pictures": "pictures",
        "then": "search_after_as_many",
    }
    for name in columns:
        table.add_column(name, justify="left" if name == "plans of" else "right")
    table.add_column("as good", justify="right")
    for row in rows:
        good = row.get("search_as_good_after", {})
        table.add_row(*(str(row.get(key, "")) for key in columns.values()), str(good.get("pictures", "")))
    Console().print(table)
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        print(compare({args.search.name: found} | against, args.plot))
    if args.json:
        kept = ("model", "method", "steps", "prompts", "guidance", "algorithm", "economy", "seconds")
        settings = {name: found[name] for name in (*kept, "machine")}
        text = json.dumps({"what": "a search beside others", **settings, "rows": rows}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
