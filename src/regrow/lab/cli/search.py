"""``regrow search``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch
import typer
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

from regrow import zoo
from regrow.fields import MOST_COUNT, check_within, explain
from regrow.files import damaged, read_kept
from regrow.lab.cli.engine import Engine, Where
from regrow.lab.cli.models import best_device, check_device, check_room, load_pipeline
from regrow.lab.cli.terminal import Bar, busy, named, output, remarks, table
from regrow.lab.measure.atomic_files import check_writable, write_json
from regrow.lab.measure.lock import locked
from regrow.lab.measure.machine import machine
from regrow.lab.measure.macs import PlanCounter
from regrow.lab.measure.prompts import read_prompts
from regrow.lab.measure.variants import applied, variant
from regrow.lab.plots import check_matplotlib
from regrow.lab.search.evaluation import Candidate, Evaluator, Facts
from regrow.lab.search.log import Log
from regrow.lab.search.objectives import Cost, Objective, Quality, label
from regrow.lab.search.objectives import objective as known
from regrow.lab.search.page import check_jinja2, page
from regrow.lab.search.plots import draw
from regrow.lab.search.result import Found, figures, found, to_dict, write_front
from regrow.lab.search.search import Budget, Known, Search, may_give_up
from regrow.lab.search.search import Progress as Step
from regrow.lab.search.settings import SearchSettings, doubled
from regrow.models import denoiser_of
from regrow.schedule import FULL
from regrow.words import shown

SHOWN_PLANS, SHOWN_PROMPTS = 6, 4
PATIENCE = 2.0


@dataclass(frozen=True)
class Request:
    """What to search; fields are the options of the command.

    Args:
        settings: what decides the result.
        asked: when it ends, and what it stands beside.
        where: what evaluates.
        device: it computes on; None for the best there is.
        out: folder of the search; gone on with.
        plots: draw pictures and a page as well.
        opened: opens a pipeline that no name opens, with the settings' model, scheduler and dtype; it
            travels to workers of Ray.
    """

    settings: SearchSettings
    asked: Asked
    where: Where
    device: str | None
    out: Path
    plots: bool
    opened: Callable[[], Any] | None = None

    def opening(self, device: str) -> Callable[[], Any]:
        """What opens the pipeline, here or in a worker, which has a working directory of its own."""
        s = self.settings
        dtype = getattr(torch, s.dtype)
        return self.opened or partial(load_pipeline, zoo.from_anywhere(s.model), device, dtype, s.scheduler)


@dataclass(frozen=True)
class Outcome:
    """What a search came to.

    Args:
        plans: of the front, dearest first.
        result: everything as plain data.
        stopped: it was stopped from the keyboard.
    """

    plans: list[Found]
    result: dict[str, Any]
    stopped: bool


@dataclass(frozen=True)
class Asked:
    """What was asked of a search besides its settings, kept so that `--resume` needs no more.

    Args:
        budget: as `parse_budget` takes it.
        beside: short names of methods.
        weight: w_ps.
    """

    budget: str = "30"
    beside: tuple[str, ...] = ()
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.weight is not None:
            check_within("w_ps", self.weight, -1e9, 1e9)

    def save(self, folder: Path) -> None:
        """Keep it in the folder of a search."""
        write_json(folder / "asked.json", asdict(self))

    @classmethod
    def of(cls, folder: Path) -> Asked:
        """What was asked last."""
        file = folder / "asked.json"
        fields = read_kept(file, "use another folder")
        try:
            return _ASKED.validate_python(fields)
        except ValidationError as error:
            raise damaged(file, "use another folder") from error


_ASKED = TypeAdapter(Asked)

# What may be said again of a search that goes on.
_AGAIN = (
    "resume",
    "budget",
    "beside",
    "w_ps",
    "device",
    "engine",
    "workers",
    "address",
    "plots",
    "as_json",
)


def resumed(context: typer.Context, before: Asked, now: Asked) -> Asked:
    """What is asked of a search that goes on: what was asked last, but for what is said again.

    Raises:
        ValueError: if an option is given that the search has from its folder.
    """
    given = {name for name in context.params if _is_given(context, name)}
    for name in sorted(given - {*_AGAIN}):
        option = name.replace("_", "-")
        raise ValueError(f"--{option}: not allowed with --resume, the search in that folder has its own")
    return Asked(
        now.budget if "budget" in given else before.budget,
        now.beside if "beside" in given else before.beside,
        now.weight if "w_ps" in given else before.weight,
    )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def parse_budget(text: str) -> Budget:
    """``30`` generations, or ``30m`` minutes.

    Raises:
        ValueError: if it is neither.
    """
    number, minutes = text.removesuffix("m"), text.endswith("m")
    # A million minutes are two years.
    if not number.isdecimal() or len(number) > 6 or int(number) < 1:
        raise ValueError(
            f"budget: {shown(text)} is not allowed, it must be a number of generations such as 30, or "
            "minutes such as 30m"
        )
    return Budget(seconds=60.0 * int(number)) if minutes else Budget(generations=int(number))


def parse_steps(text: str) -> tuple[int, int]:
    """``50``, or ``12..50``.

    Raises:
        ValueError: if it is neither.
    """
    parts = text.split("..")
    if len(parts) > 2 or not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise ValueError(f"steps: {shown(text)} is not allowed, it must be a number such as 50, or 12..50")
    return int(parts[0]), int(parts[-1])


def parse_economy(
    rungs: str | None, patience: float | None, prompts: int, objectives: Sequence[str]
) -> dict[str, Any]:
    """Numbers of prompts such as ``2,4,8,16``, by default doubling up to all, and patience.

    Args:
        rungs: the numbers.
        patience: 0 for none; by default 2 where plans can be given up.
        prompts: all.
        objectives: by name.

    Raises:
        ValueError: if they are no numbers.
    """
    if patience is None:
        patience = PATIENCE if may_give_up([known(text) for text in objectives]) else 0
    patience = patience or None
    if rungs is None:
        together = f"quality:{Quality.FD.value}" in objectives
        return {"prompts": (prompts,) if together else doubled(prompts), "patience": patience}
    parts = rungs.split(",")
    if not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise ValueError(
            f"rungs: {shown(rungs)} is not allowed, it must be numbers of prompts such as 2,4,8,16"
        )
    return {"prompts": tuple(int(part) for part in parts), "patience": patience}


def prompts_of(model: str, text: str) -> tuple[str, ...]:
    """The prompts of a file, or so many of the model's own.

    Raises:
        ValueError: if the model has none, or the file is empty.
        OSError: if it can't be read.
    """
    if not text.isdecimal():
        return tuple(read_prompts(Path(text), "{}", 1))
    check_within("prompts", int(text[:20]), 1, MOST_COUNT)
    return zoo.prompts_of(model, int(text), "give a file")


def parse_choices(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """``depth=0,1,full`` or ``recovery=reuse,taylor2`` as the choices of a variable.

    Raises:
        ValueError: if one is not of that form.
    """
    named = {"full": FULL, "none": None}
    out = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ValueError(f"choices: {shown(text)} is not allowed, it must be of the form ratio=0,0.5")
        out[name] = tuple(named[v] if v in named else _value(v) for v in values.split(","))
    return out


def _value(text: str) -> float | int | str:
    """A number, or a name that the method's space reads."""
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        return text


def settings_of(**fields: Any) -> SearchSettings:
    """Settings from the options.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    try:
        return SearchSettings(**fields)
    except ValidationError as error:
        raise ValueError(explain(error)) from error


def run_search(request: Request) -> Outcome:
    """Search, and write what was found: front, ``search.json``, plots and a page.

    Raises:
        ValueError: if an option is not allowed, or another process is at work in the folder.
        KeyboardInterrupt: if it was stopped before any plan was measured on all prompts.
    """
    check_writable("--out", request.out, folder=True)
    with locked("--out", request.out):
        return _search(request)


def _search(request: Request) -> Outcome:
    """`run_search` in a folder that nobody else writes."""
    s = request.settings
    most, budget = s.steps[1], parse_budget(request.asked.budget)
    console = remarks()
    device = check_device(request.device) if request.device else best_device()
    request.where.check(device)
    if request.opened is None:
        pictures = min(s.batch, len(s.prompts))
        check_room(s.model, s.height, s.width, pictures, device, getattr(torch, s.dtype))
    if request.plots:
        # Missing before the search, not after it.
        check_matplotlib()
        check_jinja2()
    beside = [variant(spec.strip(), most) for spec in request.asked.beside]
    s.check(request.out)
    setting = s.setting
    baseline = request.out.resolve() / "baseline"
    opened = request.opening(device)
    evaluator = partial(Evaluator, opened, setting, most, s.objectives, baseline, s.clip, s.rounds)
    with busy(console, f"loading {s.model}"):
        here = evaluator()
        facts = here.facts()
    s.claim(request.out, facts.claim())
    request.asked.save(request.out)
    log = Log(request.out / "evaluations.jsonl")
    local: Callable[[], Any] = (lambda: here) if request.where.engine is Engine.LOCAL else evaluator
    stopped = False
    try:
        with request.where.open(local, device) as workers, _Shown(console, s.objectives) as shown:
            search = Search(
                s.space(facts.calls_at),
                s.objectives,
                _macs(here, facts),
                workers,
                log,
                s.economy,
                s.algorithm,
                s.operators,
                s.search_seed,
                shown.update,
            )
            compared: dict[str, Known] = {}
            try:
                candidates = [
                    Candidate(v.steps, v.config and v.config.at(facts.calls_at(v.steps))) for v in beside
                ]
                compared = dict(zip((v.name for v in beside), search.compare_with(candidates), strict=True))
                search.run(budget)
            except KeyboardInterrupt:
                stopped = True
    finally:
        log.close()
    plans = found(search, facts, setting, request.asked.weight)
    if not plans and stopped:
        raise KeyboardInterrupt
    if not plans:
        errors = [known.error for known in search.known.values() if known.error is not None]
        why = f"; {len(errors)} could not be run, the last one: {errors[-1]}" if errors else ""
        raise ValueError(f"budget: the search ended before any plan was measured on all prompts{why}")
    files = write_front(plans, request.out / "front")
    result = {
        "what": "search",
        **json.loads(s.model_dump_json(exclude={"economy", "objectives", "prompts", "scheduler"})),
        "model_key": setting.model_key,
        "prompts": len(s.prompts),
        "calls": facts.calls,
        "scheduler": facts.scheduler,
        "scheduler_given": s.scheduler,
        "scheduler_settings": json.loads(facts.settings),
        "denoiser": facts.denoiser,
        "machine": machine(device),
        **to_dict(search, plans, files, compared),
    }
    write_json(request.out / "search.json", result)
    if request.plots:
        with busy(console, "drawing"):
            plots = draw(result, request.out)
        shown_pictures = {} if stopped else _pictures(here, plans, console)
        text = page(result, plots, shown_pictures, s.prompts[:SHOWN_PROMPTS])
        (request.out / "search.html").write_text(text, encoding="utf-8")
    return Outcome(plans, result, stopped)


def _macs(evaluator: Evaluator, facts: Facts) -> Callable[[Candidate], float]:
    """MACs of a plan as a share of the unaccelerated run, over all branches of guidance."""
    denoiser = denoiser_of(evaluator.pipeline)
    counters = [PlanCounter(denoiser, inputs) for inputs in facts.inputs]
    full = sum(counter.full().denoiser for counter in counters) * facts.calls

    def share(candidate: Candidate) -> float:
        calls = facts.calls_at(candidate.steps)
        plans = (counter.calls(candidate.config, calls) for counter in counters)
        return sum(macs.denoiser for plan in plans for _, macs in plan) / full

    return share


def _pictures(
    evaluator: Evaluator, plans: Sequence[Found], console: Console
) -> Mapping[str, Sequence[Image.Image]]:
    """Pictures of some plans, evenly over the front, beside the unaccelerated ones."""
    count = min(SHOWN_PLANS, len(plans))
    places = sorted({round(i * (len(plans) - 1) / max(count - 1, 1)) for i in range(count)})
    rows: list[tuple[str, Candidate]] = [("unaccelerated", Candidate(evaluator.steps, None))]
    rows += [(plans[i].name, plans[i].known.candidate) for i in places]
    out = {}
    for name, candidate in rows:
        with busy(console, f"pictures of {name}"), applied(evaluator.pipeline, candidate.config):
            made = evaluator.setting.make(evaluator.pipeline, 0, SHOWN_PROMPTS, candidate.steps)
            out[name] = made.images
    return out


class _Shown:
    """The progress of a search: share of the budget, and the front's ends."""

    def __init__(self, console: Console, objectives: Sequence[Objective]) -> None:
        columns = (
            named("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            named("{task.fields[front]}"),
        )
        # Times of generations of plans are minutes.
        self._bar = Bar(console, *columns, speed_estimate_period=600)
        self._task = self._bar.add_task("comparing", total=1.0, front="")
        self._objectives = objectives

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, step: Step) -> None:
        """Show how far a search is."""
        words = f"generation {step.generation}, {step.done}/{step.total}, {step.evaluated} plans"
        best = ""
        if step.front:
            kinds = (_first(self._objectives, Quality), _first(self._objectives, Cost))
            ends = (step.front[0], step.front[-1])
            best = " .. ".join(" at ".join(f"{known.value(k):.3g}" for k in kinds) for known in ends)
        self._bar.update(self._task, description=words, completed=step.share, front=best)


def _first(objectives: Sequence[Objective], kind: type) -> Objective:
    return next(o for o in objectives if isinstance(o, kind))


def print_search(outcome: Outcome, request: Request) -> None:
    """The table of the front and of what stands beside it."""
    objectives = request.settings.objectives
    result = outcome.result
    shown = table(
        f"{result['evaluated']} plans, {result['pictures']} pictures; {len(result['history'])} "
        f"generations in {result['seconds']:.0f} s; "
        f"shares are of {request.settings.steps[1]} unaccelerated steps",
        "plan",
        *(label(kind).replace(":", "\n", 1) for kind in objectives),
        *("steps", "picked for"),
    )
    for plan in outcome.plans:
        row = figures(plan.known, objectives)
        shown.add_row(
            plan.name, *map(_shown, row.values()), str(plan.known.candidate.steps), ", ".join(plan.picked)
        )
    for row in result["beside"]:
        shown.add_row(row["name"], *map(_shown, row["values"].values()), "", "", style="dim")
    console = output()
    console.print(shown)
    _print_failed(result, console)
    volume = result["hypervolume"]
    if result["beside"]:
        console.print(
            f"hypervolume: front {volume['front']:.4g}, what it is compared with {volume['beside']:.4g}"
        )
    page = request.out / ("search.html" if request.plots else "search.json")
    console.print(f"plans: {request.out / 'front'}\npage:  {page}", soft_wrap=True)
    good = next((plan for plan in outcome.plans if "balanced" in plan.picked), outcome.plans[0])
    console.print(f"next:  {_next_command(request, _file(request, outcome, good), good)}", soft_wrap=True)


def _file(request: Request, outcome: Outcome, plan: Found) -> Path:
    """The file of a plan of the front."""
    return request.out / outcome.result["front"][outcome.plans.index(plan)]["file"]


def _next_command(request: Request, file: Path, plan: Found) -> str:
    """What to type to see pictures by a plan."""
    s = request.settings
    option = "--method" if file.suffix == ".json" else "--schedule"
    given = {"scheduler": s.scheduler, "guidance": s.guidance, "height": s.height, "width": s.width}
    own = zoo.guidance_of(s.model)
    words = [
        "regrow generate --model",
        s.model,
        option,
        str(file),
        "--steps",
        str(plan.known.candidate.steps),
    ]
    for name, value in given.items():
        if value is not None and (name, value) != ("guidance", own):
            words += [f"--{name}", str(value)]
    words += [] if s.dtype == "float32" else ["--dtype", s.dtype]
    head, *rest = words
    return " ".join((head, *map(quote, rest), "--prompt", quote(s.prompts[0]), "--compare"))


def _print_failed(result: Mapping[str, Any], console: Console) -> None:
    """Name the plans that could not be run, and say why."""
    for row in (*result["beside"], *result["plans"]):
        if row["error"] is not None:
            console.print(f"{row.get('name', row.get('key'))} could not be run: {row['error']}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
