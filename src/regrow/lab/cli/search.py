"""``regrow search``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from PIL import Image
from pydantic import BaseModel, Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn

from regrow import zoo
from regrow.fields import MOST_SEED
from regrow.files import damaged, read_kept
from regrow.lab.cli.engine import JobEngine, Jobs
from regrow.lab.cli.models import check_room, find_device, load_pipeline
from regrow.lab.cli.requests import OnDevice, Prompted, command, next_command, option, within
from regrow.lab.cli.terminal import Bar, amount, busy, named, output, remarks, table
from regrow.lab.measure.atomic_files import check_writable, write_json
from regrow.lab.measure.lock import locked
from regrow.lab.measure.machine import machine
from regrow.lab.measure.macs import PlanCounter
from regrow.lab.measure.variants import Variant, variant
from regrow.lab.plots import check_matplotlib
from regrow.lab.search.evaluation import Candidate, Evaluator, Facts
from regrow.lab.search.log import Log
from regrow.lab.search.objectives import Cost, Objective, Quality, label
from regrow.lab.search.objectives import objective as known
from regrow.lab.search.page import check_jinja2, page
from regrow.lab.search.plots import draw
from regrow.lab.search.proposals import Operators
from regrow.lab.search.result import Found, figures, found, to_dict, write_front
from regrow.lab.search.search import Algorithm, Budget, Known, Search, SearchProgress, may_give_up
from regrow.lab.search.settings import SearchSettings, doubled
from regrow.models import denoiser_of
from regrow.schedule import FULL
from regrow.words import shown

SHOWN_PLANS, SHOWN_PROMPTS = 6, 4
PATIENCE = 2.0


@dataclass(frozen=True, kw_only=True)
class Again(OnDevice, Jobs):
    """What may be said again of a search that goes on: what its result does not depend on."""

    budget: str = option("30", "Generations of plans such as 30, or minutes such as 30m.")
    beside: str | None = option(None, "Methods to stand beside the front, as deepcache:5,dato:b1.")
    w_ps: float | None = option(
        None, "Pick the plan of least quality + w_ps cost as well.", callback=within(-1e9, 1e9)
    )
    plots: bool = option(True, "Draw plots and a page as well.")
    resume: Path | None = option(None, "Go on with the search in this folder, with its settings.")


@dataclass(frozen=True, kw_only=True)
class SearchRequest(Prompted, Again):
    """What to search."""

    method: str = option("dato", "See [b]regrow methods[/b]; or two, as deepcache+tome.")
    steps: str = option("50", "Sampler steps; 12..50 searches for their number too.")
    objective: tuple[str, ...] = option(
        (),
        "quality:deviation, psnr, features, fd, clip or imagereward; cost:macs, latency or "
        "memory. Give it again for more.",
    )
    algorithm: Algorithm = option(Algorithm.NSGA2, "How plans are proposed.")
    population: int = option(20, "Plans in a generation.", min=2)
    crossover: float = option(0.7, "Probability of crossover.", min=0, max=1)
    crossover_eta: float = option(7.0, "Its distribution index.")
    mutation: float = option(0.4, "Probability of mutation.", min=0, max=1)
    mutation_eta: float = option(15.0, "Its distribution index.")
    uniform: float = option(0.5, "Share of the first generation that is the same at every step.")
    rungs: str | None = option(
        None, "Numbers of prompts of successive halving, as 2,4,8,16; by default doubling."
    )
    patience: float | None = option(
        None, "A plan so many times worse than a cheaper one is given up; 2 if it can be; 0: never."
    )
    choices: tuple[str, ...] = option(
        (),
        "Other choices of a variable, as ratio=0,0.5, depth=0,1,full or recovery=reuse,taylor. "
        "Give it again for another variable.",
    )
    search_seed: int = option(0, "Seed of the search.", min=0, max=MOST_SEED)
    clip: str | None = option(None, "CLIP model of quality:clip.")
    rounds: int = option(3, "Runs in turns for cost:latency.", min=1)
    out: Path = option(Path("search"), "Folder of the search; gone on with.")

    def settings(self) -> SearchSettings:
        """What decides the result.

        Raises:
            ValueError: naming the field, the value and what is allowed.
        """
        names, prompts = self.objective or ("quality:deviation", "cost:macs"), self.texts
        return self.part(
            SearchSettings,
            steps=parse_steps(self.steps),
            prompts=prompts,
            objectives=names,
            operators=self.values(*Operators.model_fields),
            economy=parse_economy(self.rungs, self.patience, len(prompts), names),
            budget=self.budget if self.algorithm is Algorithm.STAGED else None,
            choices=parse_choices(self.choices),
            guidance=self.scale,
        )


@command(SearchRequest)
def search(request: SearchRequest, context: typer.Context) -> None:
    """Find the plans of a method that cost least for each quality. Killed, it goes on where it was.

    A plan of DaTo has for each call a depth of 0, 1 or full, a ratio of 0 or .3 to .7, and a recovery:
    reuse, taylor or taylor2. With [b]--choices depth=0,full --choices ratio=0[/b] it forecasts the output,
    on any denoiser.

    Example: [b]regrow search --model emoji --method dato --budget 30m --beside deepcache:5,dato:b1[/b]
    or [b]regrow search --resume search --budget 60m[/b]
    """
    if request.resume is None:
        settings = request.settings()
    else:
        settings = SearchSettings.of(request.resume)
        request = resumed(request, request.resume, context)
    outcome = run_search(settings, request, request.out)
    if request.as_json:
        print(json.dumps(outcome.result))
    else:
        print_search(outcome, settings, request)
    if outcome.stopped:
        raise KeyboardInterrupt


class _Asked(BaseModel):
    """What was asked of a search besides its settings, kept so that `--resume` needs no more."""

    budget: str = "30"
    beside: tuple[str, ...] = ()
    weight: float | None = Field(None, ge=-1e9, le=1e9)


def resumed(request: SearchRequest, folder: Path, context: typer.Context) -> SearchRequest:
    """What is asked of a search that goes on: what was asked last, but for what is said again.

    Raises:
        ValueError: if an option is given that the search has from its folder.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    for name in sorted(given - {one.name for one in fields(Again)}):
        option = name.replace("_", "-")
        raise ValueError(f"--{option}: not allowed with --resume, the search in that folder has its own")
    file = folder / "asked.json"
    try:
        before = _Asked.model_validate(read_kept(file, "use another folder"))
    except ValidationError as error:
        raise damaged(file, "use another folder") from error
    asked: dict[str, Any] = {
        "budget": before.budget,
        "beside": ",".join(before.beside) or None,
        "w_ps": before.weight,
    }
    return replace(request, out=folder, **{name: old for name, old in asked.items() if name not in given})


@dataclass(frozen=True)
class SearchOutcome:
    """What a search came to.

    Args:
        plans: of the front, dearest first.
        result: everything as plain data.
        stopped: it was stopped from the keyboard.
    """

    plans: list[Found]
    result: dict[str, Any]
    stopped: bool


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
    if rungs is None:
        together = f"quality:{Quality.FD.value}" in objectives
        numbers = (prompts,) if together else doubled(prompts)
    else:
        parts = rungs.split(",")
        if not all(part.isdecimal() and len(part) < 20 for part in parts):
            raise ValueError(
                f"rungs: {shown(rungs)} is not allowed, it must be numbers of prompts such as 2,4,8,16"
            )
        numbers = tuple(int(part) for part in parts)
    return {"prompts": numbers, "patience": patience or None}


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


def run_search(
    settings: SearchSettings, asked: Again, out: Path, opened: Callable[[], Any] | None = None
) -> SearchOutcome:
    """Search, and write what was found: front, ``search.json``, plots and a page.

    Args:
        settings: what decides the result.
        asked: when it ends, what it stands beside, what evaluates.
        out: folder of the search; gone on with.
        opened: opens a pipeline that no name opens, with the settings' model, scheduler and dtype; it
            travels to workers of Ray.

    Raises:
        ValueError: if an option is not allowed, or another process is at work in the folder.
        KeyboardInterrupt: if it was stopped before any plan was measured on all prompts.
    """
    check_writable("--out", out, folder=True)
    with locked("--out", out):
        return _search(settings, asked, out, opened)


def _search(
    settings: SearchSettings, asked: Again, out: Path, opened: Callable[[], Any] | None
) -> SearchOutcome:
    """`run_search` in a folder that nobody else writes."""
    s, console = settings, remarks()
    most, budget = s.steps[1], parse_budget(asked.budget)
    device = find_device(asked.device)
    asked.check_engine(device)
    if opened is None:
        dtype = getattr(torch, s.dtype)
        check_room(s.model, s.height, s.width, min(s.batch, len(s.prompts)), device, dtype)
        # A worker has a working directory of its own.
        opened = partial(load_pipeline, zoo.from_anywhere(s.model), device, dtype, s.scheduler)
    if asked.plots:
        # Missing before the search, not after it.
        check_matplotlib()
        check_jinja2()
    names = tuple(asked.beside.split(",")) if asked.beside else ()
    beside = [variant(name.strip(), most) for name in names]
    s.check(out)
    setting = s.setting
    baseline = out.resolve() / "baseline"
    evaluator = partial(Evaluator, opened, setting, most, s.objectives, baseline, s.clip, s.rounds)
    with busy(console, f"loading {s.model}"):
        here = evaluator()
        facts = here.facts()
    s.claim(out, facts.claim())
    kept = _Asked(budget=asked.budget, beside=names, weight=asked.w_ps)
    write_json(out / "asked.json", kept.model_dump(mode="json"))
    log = Log(out / "evaluations.jsonl")
    local: Callable[[], Any] = (lambda: here) if asked.engine is JobEngine.LOCAL else evaluator
    stopped = False
    try:
        with asked.open(local, device) as workers, _bar(console) as bar:
            task = bar.add_task("comparing", total=1.0, front="")

            def show(step: SearchProgress) -> None:
                words = f"generation {step.generation}, {step.done}/{step.total}, {step.evaluated} plans"
                best = _ends(step, s.objectives)
                bar.update(task, description=words, completed=step.share, front=best)

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
                show,
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
    plans = found(search, facts, setting, asked.w_ps)
    if not plans and stopped:
        raise KeyboardInterrupt
    if not plans:
        errors = [known.error for known in search.known.values() if known.error is not None]
        why = f"; {len(errors)} could not be run, the last one: {errors[-1]}" if errors else ""
        raise ValueError(f"budget: the search ended before any plan was measured on all prompts{why}")
    files = write_front(plans, out / "front")
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
    write_json(out / "search.json", result)
    if asked.plots:
        with busy(console, "drawing"):
            plots = draw(result, out)
        shown_pictures = {} if stopped else _pictures(here, plans, console)
        text = page(result, plots, shown_pictures, s.prompts[:SHOWN_PROMPTS])
        (out / "search.html").write_text(text, encoding="utf-8")
    return SearchOutcome(plans, result, stopped)


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
    rows = [Variant("unaccelerated", None, evaluator.steps)]
    for place in places:
        candidate = plans[place].known.candidate
        rows.append(Variant(plans[place].name, candidate.config, candidate.steps))
    out = {}
    for one in rows:
        with busy(console, f"pictures of {one.name}"), one.applied(evaluator.pipeline):
            out[one.name] = evaluator.setting.make(evaluator.pipeline, 0, SHOWN_PROMPTS, one.steps).images
    return out


def _bar(console: Console) -> Bar:
    """The progress of a search: share of the budget, and the front's ends."""
    front = named("{task.fields[front]}")
    columns = (named("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), front)
    # Times of generations of plans are minutes.
    return Bar(console, *columns, speed_estimate_period=600)


def _ends(step: SearchProgress, objectives: Sequence[Objective]) -> str:
    """Quality and cost at both ends of the front."""
    kinds = [next(one for one in objectives if isinstance(one, kind)) for kind in (Quality, Cost)]
    ends = (step.front[0], step.front[-1]) if step.front else ()
    return " .. ".join(" at ".join(f"{known.value(k):.3g}" for k in kinds) for known in ends)


def print_search(outcome: SearchOutcome, settings: SearchSettings, request: SearchRequest) -> None:
    """The table of the front and of what stands beside it."""
    objectives, result = settings.objectives, outcome.result
    shown = table(
        f"{result['evaluated']} plans, {result['pictures']} pictures; {len(result['history'])} "
        f"generations in {result['seconds']:.0f} s; "
        f"shares are of {settings.steps[1]} unaccelerated steps",
        "plan",
        *(label(kind).replace(":", "\n", 1) for kind in objectives),
        *("steps", "picked for"),
    )
    for plan in outcome.plans:
        values = [amount(value, ".4g") for value in figures(plan.known, objectives).values()]
        shown.add_row(plan.name, *values, str(plan.known.candidate.steps), ", ".join(plan.picked))
    for row in result["beside"]:
        values = [amount(value, ".4g") for value in row["values"].values()]
        shown.add_row(row["name"], *values, "", "", style="dim")
    console = output()
    console.print(shown)
    for row in (*result["beside"], *result["plans"]):
        if row["error"] is not None:
            console.print(f"{row.get('name', row.get('key'))} could not be run: {row['error']}")
    volume = result["hypervolume"]
    if result["beside"]:
        console.print(
            f"hypervolume: front {volume['front']:.4g}, what it is compared with {volume['beside']:.4g}"
        )
    page = request.out / ("search.html" if request.plots else "search.json")
    console.print(f"plans: {request.out / 'front'}\npage:  {page}", soft_wrap=True)
    good = next((plan for plan in outcome.plans if "balanced" in plan.picked), outcome.plans[0])
    file = request.out / result["front"][outcome.plans.index(good)]["file"]
    by = {"method" if file.suffix == ".json" else "schedule": file, "steps": good.known.candidate.steps}
    console.print(f"next:  {next_command(settings, by, settings.prompts[0])}", soft_wrap=True)
