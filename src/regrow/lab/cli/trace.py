"""``regrow trace``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

from regrow import zoo
from regrow.lab.cli.models import best_device, check_device, check_room, load_pipeline
from regrow.lab.cli.terminal import Bar, busy, named, output, remarks, table
from regrow.lab.cli.trace_plots import draw
from regrow.lab.measure.atomic_files import check_writable
from regrow.lab.measure.machine import machine, model_key
from regrow.lab.measure.trace import Trace, trace
from regrow.lab.measure.variants import variant
from regrow.lab.plots import check_matplotlib


@dataclass(frozen=True)
class Request:
    """What to look at; fields are the options of the command, the prompts as texts."""

    methods: tuple[str, ...]
    model: str
    prompts: tuple[str, ...]
    modules: tuple[str, ...]
    steps: int
    scheduler: str | None
    seed: int
    guidance: float | None
    height: int | None
    width: int | None
    device: str | None
    dtype: str
    batch: int
    out: Path
    plots: bool


def run_trace(request: Request, as_json: bool) -> None:
    """Look, save ``trace.json`` and the plots, and print a table."""
    variants = [variant(spec.strip(), request.steps) for spec in request.methods]
    prompts = request.prompts
    check_writable("--out", request.out, folder=True)
    if request.plots:
        # Missing before the pictures are made, not after it.
        check_matplotlib()
    console = remarks()
    device = check_device(request.device) if request.device else best_device()
    dtype = getattr(torch, request.dtype)
    pictures = min(request.batch, len(prompts))
    check_room(request.model, request.height, request.width, pictures, device, dtype)
    key = model_key(request.model)
    with busy(console, f"loading {request.model}"):
        pipeline = load_pipeline(request.model, device, dtype, request.scheduler)
    guidance = zoo.guidance_of(request.model, request.guidance)
    columns = (named("{task.description:24}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(console, *columns) as bar:
        tasks = {one.name: bar.add_task(one.name, total=1.0) for one in variants}
        found = trace(
            pipeline,
            variants,
            prompts,
            modules=request.modules,
            guidance=guidance,
            seed=request.seed,
            height=request.height,
            width=request.width,
            batch=request.batch,
            on_step=lambda name, done: bar.update(tasks[name], completed=done),
        )
    request.out.mkdir(parents=True, exist_ok=True)
    if request.plots:
        with busy(console, "drawing"):
            files = draw(found, prompts, request.out)
    else:
        files = []
    result: dict[str, Any] = {
        "what": "inside generations",
        "model": request.model,
        "model_key": key,
        "prompts": list(prompts),
        "seed": request.seed,
        "steps": request.steps,
        "guidance": guidance,
        "dtype": request.dtype,
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_given": request.scheduler,
        "machine": machine(device),
        **found.to_dict(),
    }
    text = json.dumps(result)
    file = request.out / "trace.json"
    file.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
        return
    print_trace(found)
    for written in (file, *files):
        print(written)


def prompts_of(model: str, texts: Sequence[str], count: int | None) -> tuple[str, ...]:
    """The prompts given, or so many of the model's own, again from the first if there are fewer."""
    if texts and count is not None:
        raise ValueError("--prompt, --prompts: only one of them is allowed")
    if texts:
        return tuple(texts)
    return zoo.prompts_of(model, 1 if count is None else count, "give --prompt")


def print_trace(found: Trace) -> None:
    """The table of a trace: where each method ends, and where it expected something else on the way."""
    shown = table(
        f"mean absolute error to {found.baseline}; computed: tokens at the finest level",
        *("method", "x_t at the end", "x_0 at worst", "at timestep", "computed"),
    )
    for one in found.variants:
        d = one.deviation
        worst = max(zip(d.x0 or (), d.timestep, strict=False), default=None)
        share = None if one.computed is None else float(one.computed[min(one.computed)].mean())
        shown.add_row(
            one.name,
            f"{d.x[-1]:.4f}",
            "-" if worst is None else f"{worst[0]:.4f}",
            "-" if worst is None else f"{worst[1]:.0f}",
            "all" if share is None else f"{share:.1%}",
        )
    console = output()
    console.print(shown)
    if found.x0_unknown is not None:
        console.print(f"no predicted x_0: {found.x0_unknown}", soft_wrap=True)
