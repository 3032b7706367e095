"""``regrow calibrate``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from regrow.fields import MOST_CALLS, MOST_COUNT
from regrow.lab.calibration.calibrate import Calibration, CalibrationProgress, Settings, Wish, plan_for
from regrow.lab.calibration.search import FewerSteps
from regrow.lab.cli.requests import Prompted, command, next_command, option
from regrow.lab.cli.terminal import output, progress, remarks, table
from regrow.lab.measure.atomic_files import check_writable, write_text
from regrow.lab.measure.images import contact_sheet, on_white
from regrow.lab.measure.lock import locked
from regrow.lab.measure.machine import machine
from regrow.methods.calibrated import Calibrated

SHOWN_PROMPTS, SHOWN_PLANS = 4, 3


@dataclass(frozen=True, kw_only=True)
class CalibrateRequest(Prompted):
    """What to calibrate."""

    speedup: float | None = option(None, "Less time by this factor, as measured on this machine.")
    fewer_macs: float | None = option(None, "Instead: fewer MACs of the denoiser by this factor.")
    psnr: float | None = option(None, "Instead: the fastest plan whose pictures are as near, in dB.")
    steps: int = option(50, "Sampler steps.", min=1, max=MOST_CALLS)
    batch: int = option(4, "Pictures in one batch, also where time is measured.", min=1, max=MOST_COUNT)
    out: Path = option(Path("calibration"), "Folder of the plan and of pictures.")


@command(CalibrateRequest)
def calibrate(request: CalibrateRequest) -> None:
    """Find the plan for a model that is nearest to its unaccelerated pictures at a speed.

    It is never worse than fewer steps: where these are nearest, the plan is fewer steps. Half of the
    prompts are run and recorded, forecasts of skipped calls are fitted to them, and the best are compared
    on the other half. The plan is a file for --method.

    Example: [b]regrow calibrate --model emoji --speedup 3[/b]
    """
    wish, settings = request.part(Wish), request.part(Settings, guidance=request.scale)
    prompts = request.texts
    check_writable("--out", request.out, folder=True)
    with locked("--out", request.out):
        _calibrate(request, prompts, settings, wish)


def _calibrate(request: CalibrateRequest, prompts: tuple[str, ...], settings: Settings, wish: Wish) -> None:
    """Find the plan, write it, and say what was tried, in a folder that nobody else writes."""
    console = remarks()
    pipeline = request.load(console, request.batch)
    with progress(console) as update:

        def told(now: CalibrationProgress) -> None:
            update(description=now.what, completed=now.done, total=now.total)

        request.out.mkdir(parents=True, exist_ok=True)
        recording = request.out / "recording.json"
        calibration = Calibration(pipeline, prompts, settings, told, recording)
        plan = plan_for(calibration, wish)
    files = [request.out / "plan.json"]
    write_text(files[0], plan.dump())
    sheet = _sheet(calibration, plan)
    if sheet is not None:
        files.append(request.out / "compare.png")
        sheet.save(files[-1])
    if request.as_json:
        result = {
            "files": [str(file) for file in files],
            "steps": plan.steps,
            "speedup": plan.speedup,
            "tried": [one.model_dump(mode="json") for one in plan.tried],
            "machine": machine(pipeline.device),
        }
        print(json.dumps(result, indent=1))
        return
    _print(plan)
    said = output()
    for file in files:
        said.print(str(file), soft_wrap=True)
    said.print(f"next: {next_command(request, {'method': files[0]}, prompts[-1])}", soft_wrap=True)


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
