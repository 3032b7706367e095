"""Plans under compiled blocks: what is compiled when, and what it is worth.

    python benchmarks/compiled.py --model cifar10 --methods fora:2 fora:3 toca deepcache:3

Each method runs on a bundled model as it is and with its blocks compiled. Graphs are counted after the
first generation (of fewer steps than the others), after the second, and after the method was taken off and
applied again. Then generations of all variants are timed in turns; figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch._dynamo.utils import counters

import regrow
from regrow import zoo
from regrow.lab.measure.atomic_files import write_whole
from regrow.lab.measure.machine import machine
from regrow.lab.measure.sampling import make

RESULTS = Path(__file__).parent / "results"
UNACCELERATED = "unaccelerated"


@dataclass
class Row:
    """A method.

    Args:
        method: its short name, or `UNACCELERATED`.
        graphs: compiled in the first generation, in the second, which has more steps, and after the method
            was applied again.
        breaks: of graphs.
        plain: seconds of a generation without compiling, the median.
        compiled: likewise with blocks compiled.
    """

    method: str
    graphs: tuple[int, int, int]
    breaks: int
    plain: float = 0.0
    compiled: float = 0.0


class Timed:
    """A bundled model, as it is or with its blocks compiled."""

    def __init__(self, model: str, *, compiled: bool) -> None:
        self.pipe, self.prompt = zoo.load(model), zoo.prompts_of(model, 1, "")
        self.guidance = zoo.guidance_of(model)
        self.denoiser: Any = getattr(self.pipe, "transformer", None) or self.pipe.unet
        if compiled:
            regrow.compile_blocks(self.denoiser)

    @contextmanager
    def with_method(self, method: str) -> Iterator[None]:
        """The pipeline with a method on it, or as it is."""
        if method == UNACCELERATED:
            yield
            return
        with regrow.apply(self.pipe, method):
            yield

    def generate(self, steps: int) -> float:
        """Make a picture's latents; the seconds that it took."""
        before = time.perf_counter()
        make(self.pipe, self.prompt, steps=steps, guidance=self.guidance, latents=True)
        return time.perf_counter() - before


def compiled_row(timed: Timed, method: str, steps: int) -> Row:
    """Count the graphs of a method."""
    counters.clear()
    graphs = []
    with timed.with_method(method):
        for count in (max(steps // 2, 2), steps):
            timed.generate(count)
            graphs.append(counters["stats"]["unique_graphs"])
    with timed.with_method(method):
        timed.generate(steps)
    graphs.append(counters["stats"]["unique_graphs"])
    first, second, again = graphs
    breaks = sum(counters["graph_break"].values())
    return Row(method, (first, second - first, again - second), breaks)


def table_of(rows: list[Row]) -> str:
    """The result in Markdown."""
    lines = [
        "| method | graphs of the first generation | of a second one of more steps "
        "| after applying again | graph breaks | seconds | compiled | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, second, again = row.graphs
        lines.append(
            f"| {row.method} | {first} | {second} | {again} | {row.breaks} | {row.plain:.3f} "
            f"| {row.compiled:.3f} | {row.plain / row.compiled:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cifar10")
    parser.add_argument("--methods", nargs="+", default=["fora:2", "fora:3", "toca", "deepcache:3"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    methods = [UNACCELERATED, *args.methods]
    plain, compiled = (Timed(args.model, compiled=how) for how in (False, True))
    rows = [compiled_row(compiled, method, args.steps) for method in track(methods, "compiling")]
    seconds: dict[tuple[str, bool], list[float]] = {}
    for _ in track(range(args.rounds), "timing"):
        for method in methods:
            for how, timed in ((False, plain), (True, compiled)):
                with timed.with_method(method):
                    timed.generate(2)
                    seconds.setdefault((method, how), []).append(timed.generate(args.steps))
    for row in rows:
        row.plain, row.compiled = (statistics.median(seconds[row.method, how]) for how in (False, True))
    out = args.out or RESULTS / f"compiled-{args.model}.json"
    data = {
        "model": args.model,
        "steps": args.steps,
        "rounds": args.rounds,
        "machine": machine("cpu"),
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(data, indent=1) + "\n"
    write_whole(out, lambda to: to.write_text(text, encoding="utf-8"))
    write_whole(out.with_suffix(".md"), lambda to: to.write_text(table_of(rows), encoding="utf-8"))
    shown = Table("method", "graphs", "breaks", "s", "compiled s", "ratio")
    for row in rows:
        ratio = f"{row.plain / row.compiled:.2f}"
        shown.add_row(
            row.method, str(row.graphs), str(row.breaks), f"{row.plain:.3f}", f"{row.compiled:.3f}", ratio
        )
    Console().print(shown)
    print(out)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
