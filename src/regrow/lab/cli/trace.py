"""``regrow trace``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

from regrow import zoo
from regrow.lab.cli.default_methods import USUAL, Compared, usual
from regrow.lab.cli.requests import FromModel, command, option
from regrow.lab.cli.terminal import Bar, amount, busy, named, output, remarks, table_of
from regrow.lab.cli.trace_plots import draw
from regrow.lab.measure.atomic_files import check_writable
from regrow.lab.measure.machine import machine, model_key
from regrow.lab.measure.trace import Trace, Traced
from regrow.lab.measure.trace import trace as look
from regrow.lab.measure.variants import Variant
from regrow.lab.plots import check_matplotlib


@dataclass(frozen=True, kw_only=True)
class TraceRequest(FromModel, Compared):
    """What to look at."""

    methods: str | None = option(None, f"Comma-separated; the first is unaccelerated. {USUAL}")
    prompt: tuple[str, ...] = option((), "Prompt; give it again for more.")
    prompts: int | None = option(None, "Instead: so many of the model's own.", min=1)
    module: tuple[str, ...] = option(
        (), "Module whose output's change is shown, instead of the pruned blocks' inputs."
    )
    batch: int = 4
    out: Path = option(Path("trace"), "Folder for trace.json and the plots.")
    plots: bool = option(True, "Draw PNGs as well.")


@command(TraceRequest)
def trace(request: TraceRequest) -> None:
    """Look inside generations: deviation at each step, change of features, how often tokens are computed.

    Example: [b]regrow trace --methods steps:50,sito:d,dato:b1 --prompt "large owl on blue" --out trace[/b]
    """
    if request.prompt and request.prompts is not None:
        raise ValueError("--prompt, --prompts: only one of them is allowed")
    texts = request.prompt or zoo.prompts_of(request.model, request.prompts or 1, "give --prompt")
    run_trace(request, request.variants(lambda: usual(request.model).traced), texts)


def run_trace(request: TraceRequest, variants: Sequence[Variant], prompts: tuple[str, ...]) -> None:
    """Look, save ``trace.json`` and the plots, and print a table."""
    check_writable("--out", request.out, folder=True)
    if request.plots:
        # Missing before the pictures are made, not after it.
        check_matplotlib()
    console, key = remarks(), model_key(request.model)
    pipeline = request.load(console, len(prompts))
    columns = (named("{task.description:24}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(console, *columns) as bar:
        tasks = {one.name: bar.add_task(one.name, total=1.0) for one in variants}
        found = look(
            pipeline,
            variants,
            prompts,
            modules=request.module,
            guidance=request.scale,
            **request.values("seed", "height", "width", "batch"),
            on_step=lambda name, done: bar.update(tasks[name], completed=done),
        )
    request.out.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    if request.plots:
        with busy(console, "drawing"):
            files = draw(found, prompts, request.out)
    result: dict[str, Any] = {
        "what": "inside generations",
        **request.values("model", "seed", "steps", "dtype"),
        "model_key": key,
        "prompts": list(prompts),
        "guidance": request.scale,
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_given": request.scheduler,
        "machine": machine(pipeline.device),
        **found.to_dict(),
    }
    text = json.dumps(result)
    file = request.out / "trace.json"
    file.write_text(text + "\n", encoding="utf-8")
    if request.as_json:
        print(text)
        return
    print_trace(found)
    for written in (file, *files):
        print(written)


def print_trace(found: Trace) -> None:
    """The table of a trace: where each method ends, and where it expected something else on the way."""

    def worst(one: Traced) -> tuple[float | None, float | None]:
        return max(zip(one.deviation.x0 or (), one.deviation.timestep, strict=False), default=(None, None))

    def share(one: Traced) -> str:
        return f"{float(one.computed[min(one.computed)].mean()):.1%}" if one.computed is not None else "all"

    shown = table_of(
        found.variants,
        [
            ("method", lambda one: one.name),
            ("x_t at the end", lambda one: f"{one.deviation.x[-1]:.4f}"),
            ("x_0 at worst", lambda one: amount(worst(one)[0], ".4f")),
            ("at timestep", lambda one: amount(worst(one)[1], ".0f")),
            ("computed", share),
        ],
        f"mean absolute error to {found.baseline}; computed: tokens at the finest level",
    )
    console = output()
    console.print(shown)
    if found.x0_unknown is not None:
        console.print(f"no predicted x_0: {found.x0_unknown}", soft_wrap=True)
