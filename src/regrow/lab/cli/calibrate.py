"""``regrow calibrate``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import torch
from PIL import Image

from regrow.lab.calibration.calibrate import Calibration, Progress, Settings, Wish, plan_for
from regrow.lab.calibration.search import FewerSteps
from regrow.lab.cli.models import best_device, check_device, check_room, load_pipeline
from regrow.lab.cli.terminal import Bar, busy, output, remarks, table
from regrow.lab.measure import contact_sheet
from regrow.lab.measure.atomic_files import check_writable, write_whole
from regrow.lab.measure.images import on_white
from regrow.lab.measure.lock import locked
from regrow.lab.measure.machine import machine
from regrow.methods.calibrated import Calibrated

SHOWN_PROMPTS, SHOWN_PLANS = 4, 3


@dataclass(frozen=True)
class Request:
    """What to calibrate; fields are the options of the command.

    Args:
        settings: how pictures are made.
        prompts: of which half are fitted on.
        scheduler: instead of the model's own.
        device: it computes on; None for the best there is.
        dtype: of the weights.
        out: folder of the plan and what was tried.
    """

    settings: Settings
    prompts: tuple[str, ...]
    scheduler: str | None
    device: str | None
    dtype: str
    out: Path

    @property
    def file(self) -> Path:
        """Of the plan."""
        return self.out / "plan.json"


def run_calibrate(request: Request, wish: Wish, as_json: bool) -> None:
    """Find the plan, write it, and say what was tried.

    Raises:
        ValueError: naming what is not allowed, or if no plan gives what is wished for.
    """
    check_writable("--out", request.out, folder=True)
    with locked("--out", request.out):
        _calibrate(request, wish, as_json)


def _calibrate(request: Request, wish: Wish, as_json: bool) -> None:
    """`run_calibrate` in a folder that nobody else writes."""
    s, console = request.settings, remarks()
    device = check_device(request.device) if request.device else best_device()
    dtype = getattr(torch, request.dtype)
    check_room(s.model, s.height, s.width, s.batch, device, dtype)
    with busy(console, f"loading {s.model}"):
        pipeline = load_pipeline(s.model, device, dtype, request.scheduler)
    with Bar(console) as bar:
        task = bar.add_task("", total=None)

        def told(progress: Progress) -> None:
            bar.update(task, description=progress.what, completed=progress.done, total=progress.total)

        request.out.mkdir(parents=True, exist_ok=True)
        recording = request.out / "recording.json"
        calibration = Calibration(pipeline, request.prompts, s, told, recording)
        plan = plan_for(calibration, wish)
    write_whole(request.file, lambda to: to.write_text(plan.dump(), encoding="utf-8"))
    sheet = _sheet(calibration, plan)
    files = [request.file]
    if sheet is not None:
        files.append(request.out / "compare.png")
        sheet.save(files[-1])
    if as_json:
        result = {
            "files": [str(file) for file in files],
            "steps": plan.steps,
            "speedup": plan.speedup,
            "tried": [one.model_dump(mode="json") for one in plan.tried],
            "machine": machine(device),
        }
        print(json.dumps(result, indent=1))
        return
    _print(plan)
    said = output()
    for file in files:
        said.print(str(file), soft_wrap=True)
    said.print(f"next: {_next_command(request)}", soft_wrap=True)


def _print(plan: Calibrated) -> None:
    """What was tried, and which of it is the plan."""
    best = plan.tried[0]
    few = min(one.prompts for one in plan.tried)
    caption = (
        f"Compared with {plan.instead_of} steps on {best.prompts} prompts that nothing was fitted on"
        + (f", on {few} of them where the first were far behind" if few < best.prompts else "")
        + "; behind: how much nearer the plan is to the unaccelerated pictures. Both with standard errors."
    )
    shown = table(caption, "plan", "PSNR\ndB", "behind\ndB")
    for one in plan.tried:
        behind = "" if one is best else f"{one.behind:.1f} +- {one.behind_error:.1f}"
        shown.add_row(one.name, f"{one.psnr:.1f} +- {one.error:.1f}", behind)
    said = output()
    said.print(shown)
    chosen = f"the plan: {best.name}"
    if not plan.leaves_out:
        chosen += ", since nothing that was tried is nearer at this speed"
    measured = "" if plan.speedup is None else f"; measured {plan.speedup:.2f}x faster"
    said.print(f"{chosen}{measured}", soft_wrap=True)


def _sheet(calibration: Calibration, plan: Calibrated) -> Image.Image | None:
    """The unaccelerated pictures, fewer steps and the nearest plans, side by side; None of videos."""
    assert calibration.answer is not None
    plans = [one.plan for one in calibration.answer.outcomes]
    fewer = [one for one in plans if isinstance(one, FewerSteps)][:1]
    shown = list(dict.fromkeys([*fewer, calibration.answer.best.plan, *plans]))[:SHOWN_PLANS]
    columns = {f"{plan.instead_of} steps": calibration.plain(min(SHOWN_PROMPTS, len(calibration.compared)))}
    columns |= {f"{i}. {one.name}": calibration.pictures[one] for i, one in enumerate(shown, 1)}
    rows = [row[:SHOWN_PROMPTS] for row in columns.values()]
    if not all(isinstance(picture, Image.Image) for row in rows for picture in row):
        return None
    pictures = [[on_white(picture) for picture in row] for row in rows]
    labels = list(calibration.compared[: len(pictures[0])])
    return contact_sheet(list(zip(*pictures, strict=False)), columns=list(columns), labels=labels)


def _next_command(request: Request) -> str:
    """How to use the plan."""
    s = request.settings
    words = ["regrow", "generate", "--model", s.model, "--method", str(request.file)]
    words += [] if request.scheduler is None else ["--scheduler", request.scheduler]
    words += [] if s.guidance is None else ["--guidance", f"{s.guidance:g}"]
    words += [] if s.height is None else ["--height", str(s.height), "--width", str(s.width)]
    words += [] if request.dtype == "float32" else ["--dtype", request.dtype]
    return " ".join(map(quote, [*words, "--prompt", request.prompts[-1], "--compare"]))
