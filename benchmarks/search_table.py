"""A search beside what it has to beat: uniform plans, the paper's, and chance.

    regrow search --method dato --budget 60m --beside deepcache:2,deepcache:3,dato:b1 --out nsga2
    regrow search --method dato --algorithm random --budget 40 --out random
    python benchmarks/search_table.py nsga2 --chance random --json benchmarks/results/search.json

Hypervolumes are up to one reference point, the worst figures of all that is compared. `--curves` draws how
fast searches got there, such as one that measures every plan on all prompts (`--rungs 16 --patience 0`), a
staged one, and a random one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from regrow.search.objectives import minimised, objective
from regrow.search.plots import compare
from regrow.search.proposals import hypervolume

Point = tuple[float, ...]


def points(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Point]:
    """Objectives of rows, less is better."""
    return [tuple(minimised(objective(name), row["values"][name]) for name in names) for row in rows]


def group(name: str) -> str:
    """The methods of a name without their settings: ``deepcache+tome`` of ``deepcache:5+tome:0.5``."""
    return "+".join(part.partition(":")[0] for part in name.split("+"))


def dominated(one: Point, front: Sequence[Point]) -> bool:
    """Whether the front has a plan that is nowhere worse and somewhere better."""
    return any(all(a <= b for a, b in zip(p, one, strict=True)) and p != one for p in front)


def compared(found: Mapping[str, Any], chance: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A row for the front and for each group that it is compared with.

    Args:
        found: ``search.json`` of the search.
        chance: that of a random search.
    """
    names = found["objectives"]
    groups: dict[str, list[Point]] = {"the search's front": points(found["front"], names)}
    beside = [row for row in found["beside"] if None not in row["values"].values()]
    for row, point in zip(beside, points(beside, names), strict=True):
        groups.setdefault(group(row["name"]), []).append(point)
    if chance is not None:
        groups[f"chance, {chance['evaluated']} plans"] = points(chance["front"], names)
    reference = [max(column) for column in zip(*(p for ps in groups.values() for p in ps), strict=True)]
    front = groups["the search's front"]
    return [
        {
            "name": name,
            "plans": len(plans),
            "hypervolume": round(hypervolume(plans, reference), 5),
            "dominated": sum(dominated(p, front) for p in plans),
        }
        for name, plans in groups.items()
    ]


def read(folder: Path) -> dict[str, Any]:
    """What a search found."""
    return json.loads((folder / "search.json").read_text(encoding="utf-8"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("search", type=Path, help="folder of the search")
    parser.add_argument("--chance", type=Path, help="folder of a random search")
    parser.add_argument("--curves", type=Path, nargs="*", default=[], help="folders of other searches")
    parser.add_argument("--plot", type=Path, help="folder for the plot of their hypervolumes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if bool(args.curves) != bool(args.plot):
        parser.error("--curves, --plot: they go together")
    found = read(args.search)
    chance = read(args.chance) if args.chance else None
    rows = compared(found, chance)
    table = Table(caption="dominated: plans that the front beats in both")
    for name in ("plans of", "number", "hypervolume", "dominated"):
        table.add_column(name, justify="left" if name == "plans of" else "right")
    for row in rows:
        table.add_row(row["name"], str(row["plans"]), f"{row['hypervolume']:.4f}", str(row["dominated"]))
    Console().print(table)
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        print(compare({f.name: read(f) for f in (args.search, *args.curves)}, args.plot))
    if args.json:
        kept = ("model", "method", "steps", "prompts", "algorithm", "economy", "evaluated", "pictures")
        settings = {name: found[name] for name in (*kept, "seconds", "machine")}
        text = json.dumps({"what": "a search beside others", **settings, "rows": rows}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
