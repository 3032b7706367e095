"""``regrow bench``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import typer

from regrow import zoo
from regrow.core.compiling import compile_blocks
from regrow.lab.cli.default_methods import Compared, usual
from regrow.lab.cli.models import check_room, find_device, load_pipeline
from regrow.lab.cli.requests import Sampling, command, option
from regrow.lab.cli.terminal import amount, busy, output, progress, remarks, table
from regrow.lab.measure.atomic_files import check_writable, write_json
from regrow.lab.measure.bench import BenchRow
from regrow.lab.measure.bench import bench as measure
from regrow.lab.measure.machine import PACKAGES, machine, model_key
from regrow.lab.measure.random_weights import random_pipeline
from regrow.lab.measure.samplers import Sampler
from regrow.lab.measure.sampling import takes_classes
from regrow.lab.measure.variants import Variant
from regrow.lab.plots import check_ending, new_figure, save
from regrow.models import module_of


@dataclass(frozen=True, kw_only=True)
class BenchRequest(Sampling, Compared):
    """What to time; a model or an architecture."""

    model: str | None = option(None, "Bundled name, folder, or hub id.")
    arch: str | None = option(
        None, "sd15, sdxl, sd3-1024 and others, random weights, without text encoder and decoder."
    )
    images: int | None = option(None, "Made in one batch; by default one a prompt.", min=1)
    rounds: int = option(3, "Timed rounds.", min=1)
    prompt: tuple[str, ...] = option((), "Prompt; the model's own if none.")
    frames: int | None = option(None, "Of a video; its own if none.", min=1)
    compiled: bool = option(False, "Compile the transformer blocks.", "--compile")
    out: Path | None = option(None, "JSON file for the result.")
    plot: Path | None = option(None, "Bar chart of the speed-ups, PNG or SVG.")


@command(BenchRequest)
def bench(request: BenchRequest) -> None:
    """Time methods on one pipeline in turns: latency, memory, MACs, efficiency.

    Methods: steps:25, sito:d, tome:0.5, deepcache:5, dato:b1, dato:FILE, deepcache:5+tome:0.5. Also of a
    pipeline of videos from text.

    What is known is printed after each timed generation, and --out holds it. --json prints one object: its
    "timed" grows by a line a generation, its "rows" come last; "complete" is false if it was stopped.

    Example: [b]regrow bench --model emoji --methods steps:50,sito:d,dato:b1 --images 4[/b]
    """
    if request.model is not None and request.arch is not None:
        raise ValueError("--arch, --model: only one of them is allowed")
    if request.arch is not None and request.prompt:
        raise ValueError(
            "--prompt: --arch has random weights, whose text is random too; it must not be given"
        )
    images = request.images or max(len(request.prompt), 1)
    if len(request.prompt) > images:
        raise ValueError(f"--prompt: {len(request.prompt)} are not allowed with --images {images}")
    model = request.model if request.arch is not None else request.model or "emoji"
    request = replace(request, model=model, images=images)
    rows = run_bench(request, request.variants(lambda: usual(model, request.arch).measured))
    if all(row.error is not None for row in rows):
        raise typer.Exit(1)


def run_bench(
    request: BenchRequest, variants: Sequence[Variant], packages: Sequence[str] = PACKAGES
) -> list[BenchRow]:
    """Measure, save, and print a table; returns its rows.

    Each timed generation is printed, and the file written anew, as soon as it is known.

    Args:
        request: what to measure.
        variants: the methods; the first is the baseline.
        packages: whose versions go with the result.
    """
    # What is missing or not allowed is so before the measurement, not after it.
    if request.plot is not None:
        check_ending("--plot", request.plot)
    for name, file in (("--out", request.out), ("--plot", request.plot)):
        if file is not None:
            check_writable(name, file)
    console, images = remarks(), request.images or 1
    device, dtype = find_device(request.device), request.torch_dtype
    if request.model is not None:
        check_room(request.model, request.height, request.width, images, device, dtype)
    with busy(console, f"loading {request.model or request.arch}"):
        if request.model is None:
            pipeline = random_pipeline(request.arch or "", device, dtype)
        else:
            pipeline = load_pipeline(request.model, device, dtype, videos=True)
        if request.scheduler is not None:
            Sampler.parse(request.scheduler).put_into(pipeline)
        if request.compiled:
            compile_blocks(module_of(pipeline))
    known: Sequence[str] = ("0",) if takes_classes(pipeline) else ("a photo",)
    if request.model is not None and zoo.bundles(request.model):
        known = zoo.captions(request.model)
    sampled = request.values("frames", "height", "width", "rounds")
    sampled["guidance"] = zoo.guidance_of(request.model, request.guidance)
    head: dict[str, Any] = {
        "what": "time and memory of generations",
        "model": request.model or f"{request.arch}, random weights",
        "model_key": "" if request.model is None else model_key(request.model),
        "images": images,
        **sampled,
        **request.values("dtype", "compiled"),
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_given": request.scheduler,
        "machine": machine(device, packages),
    }
    total = len(variants) * (request.rounds + 2)
    with (
        Written(head, request.out, request.as_json) as written,
        progress(console, "warming up", total) as update,
    ):
        rows = measure(
            pipeline,
            variants,
            list(islice(cycle(request.prompt or known), images)),
            **sampled,
            on_generation=lambda name: update(advance=1, description=name),
            on_timed=written.timed,
        )
        written.all(rows)
    if request.plot is not None:
        draw_bars(rows, request.plot)
    if not request.as_json:
        print_rows(rows, variants[0].name)
    return rows


class Written:
    """The result of a measurement, written as it is known.

    As JSON it is one object: what was measured, ``timed``, a line for each timed generation as soon as it
    is known, whether it is ``complete``, and ``rows``. Stopped by Ctrl-C, it is ended with the rows so far.
    The file is whole at any moment.

    Args:
        head: what was measured.
        file: written anew after each generation, if given.
        as_json: print the object instead of a line a generation.
    """

    def __init__(self, head: Mapping[str, Any], file: Path | None, as_json: bool) -> None:
        self._head, self._file, self._as_json = head, file, as_json
        self._timed: list[dict[str, Any]] = []
        self._rows: dict[str, BenchRow] = {}
        self._complete = False

    def __enter__(self) -> Written:
        if self._as_json:
            begun = json.dumps(self._head, indent=1).removesuffix("\n}")
            print(f'{begun},\n "timed": [', end="", flush=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._save()
        if self._as_json:
            end = json.dumps({"complete": self._complete, "rows": self._plain()}, indent=1)
            print("\n ],\n" + end.removeprefix("{\n"), flush=True)

    def timed(self, number: int, row: BenchRow) -> None:
        """A variant was timed in a round, or failed.

        Args:
            number: of the round, from 0.
            row: of the variant, as far as it is known.
        """
        before = self._rows.get(row.name)
        if row.error is not None and before is not None and before.error is not None:
            return
        self._rows[row.name] = row
        failed = row.error is not None
        said = {
            "round": number + 1,
            "method": row.name,
            "seconds": None if failed else row.rounds[-1],
            "speedup": None if failed else row.speedup,
            "error": row.error,
        }
        self._timed.append(said)
        if self._as_json:
            print(f"{',' if len(self._timed) > 1 else ''}\n  {json.dumps(said)}", end="", flush=True)
        else:
            figures = f"{row.seconds_per_image:.3f} s each, {amount(row.speedup, '.2f', 'x')}"
            print(f"round {number + 1}  {row.name}: {row.error or figures}", flush=True)
        self._save()

    def all(self, rows: Sequence[BenchRow]) -> None:
        """Everything was measured."""
        self._rows, self._complete = {row.name: row for row in rows}, True

    def _plain(self) -> list[dict[str, Any]]:
        return [row.to_dict() for row in self._rows.values()]

    def _save(self) -> None:
        if self._file is None or not self._timed:
            return
        whole = {**self._head, "timed": self._timed, "complete": self._complete, "rows": self._plain()}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, whole)


def print_rows(rows: list[BenchRow], baseline: str) -> None:
    """The table of a measurement."""
    times = table(
        f"speed-up over {baseline}",
        "method",
        *("s each", "images\na minute", "spread", "speed-up"),
        *("fewer\nMACs", "efficiency\nof calls", "peak\nMiB"),
    )
    for row in rows:
        if row.error is not None:
            times.add_row(row.name, "failed")
            continue
        times.add_row(
            row.name,
            f"{row.seconds_per_image:.3f}",
            f"{60 * row.images_per_second:.1f}",
            f"{row.spread:.2f}",
            amount(row.speedup, ".2f", "x"),
            amount(row.macs_ratio, ".2f", "x"),
            amount(row.efficiency, ".2f"),
            amount(row.peak_mib, ".0f"),
        )
    console = output()
    console.print(times)
    for row in rows:
        if row.error is not None:
            console.print(f"{row.name}: {row.error}", soft_wrap=True)
        elif noted(row) != row.name:
            console.print(noted(row), soft_wrap=True)
    calls = table("", "method", "calls", "depth", "pruned", "ms a call")
    for row in rows:
        for kind in row.calls:
            pruned, milliseconds = amount(kind.ratio, ".0%"), f"{kind.seconds * 1e3:.1f}"
            calls.add_row(row.name, str(kind.count), kind.depth or "-", pruned, milliseconds)
    console.print(calls)


def noted(row: BenchRow) -> str:
    """The name with what is to be known of the row."""
    notes = {"changes nothing": row.changes_nothing, "disturbed": row.disturbed}
    seen = ", ".join(note for note, holds in notes.items() if holds)
    return f"{row.name} ({seen})" if seen else row.name


def draw_bars(rows: list[BenchRow], file: Path) -> None:
    """Speed-ups as bars, with what the MACs promise beside them; what failed has a place without a bar."""
    figure = new_figure(7, 0.6 + 0.42 * len(rows))
    axis = figure.subplots()
    place = range(len(rows))
    axis.barh([i + 0.2 for i in place], [r.macs_ratio or 0 for r in rows], 0.36, color="0.8", label="MACs")
    bars = axis.barh([i - 0.2 for i in place], [r.speedup or 0 for r in rows], 0.36, label="measured")
    labels = ["failed" if r.error is not None else amount(r.speedup, ".2f", "x") for r in rows]
    axis.bar_label(bars, labels, padding=3)
    axis.set_yticks(list(place), [r.name for r in rows])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel(f"speed-up over {rows[0].name}")
    axis.legend(loc="lower right", frameon=False)
    save(figure, file)
