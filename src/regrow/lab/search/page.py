"""The results of a search on one self-contained page."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from regrow import zoo
from regrow.lab.search.plots import SPEEDS, WORDS, Result, axes_of

SIDE = 192
"""Largest width or height of a picture on the page, in pixels."""
CAPTIONS = {
    "front": "What was tried, the front, and what it is compared with.",
    "evolution": "How the front came about.",
    "hypervolume": "The volume of objectives that the front dominates, against what was spent on it.",
    "plans": "The plans of the front, dearest first, call by call.",
}
ALGORITHMS = {
    "nsga2": "NSGA-II, all choices at once",
    "staged": "NSGA-II, one kind of choice after the other",
    "random": "by chance",
}


def check_jinja2() -> None:
    """Refuse early if the page can't be written.

    Raises:
        ImportError: if jinja2 is not installed (extra ``search``).
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ImportError("the page needs jinja2: run pip install 'regrow[search]'") from error


def page(
    result: Result,
    plots: Sequence[Path],
    pictures: Mapping[str, Sequence[Image.Image]],
    prompts: Sequence[str],
) -> str:
    """Make a page in HTML that contains its pictures.

    Args:
        result: result of a search, as plain data.
        plots: PNG files, in the order in which they are shown.
        pictures: by plan, a picture for each prompt, the unaccelerated ones first; large ones are made
            smaller.
        prompts: prompts of the pictures.

    Raises:
        ImportError: if jinja2 is not installed.
        ValueError: if a plan does not have one picture for each prompt.
    """
    check_jinja2()
    from jinja2 import Environment, StrictUndefined

    for name, own in pictures.items():
        if len(own) != len(prompts):
            raise ValueError(
                f"pictures: {len(own)} of {name!r} is not allowed, it must be one for each prompt, "
                f"{len(prompts)}"
            )
    cost, _ = axes_of(result)
    example = _example(result)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = _figure
    template = (resources.files("regrow.lab") / "search" / "page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        result=result,
        settings=_settings(result),
        words=WORDS,
        plots=[(CAPTIONS.get(file.stem, file.stem), _data(file.read_bytes())) for file in plots],
        cost=cost,
        speed=SPEEDS.get(cost),
        pictures=list(pictures),
        rows=[
            (prompt, [_data(_png(own[i])) for own in pictures.values()]) for i, prompt in enumerate(prompts)
        ],
        example=example,
        command=None if example is None else _command(result, example, prompts),
        code=None if example is None else _code(result, example, prompts),
    )


def _settings(result: Result) -> dict[str, str]:
    """Describe in words what was searched."""
    least, most = result["steps"]
    steps = f"{most}" if least == most else f"{least} to {most}"
    failed = [plan["error"] for plan in result["plans"] if plan["error"] is not None]
    given_up = sum(plan["given_up"] for plan in result["plans"]) - len(failed)
    patience = result["economy"]["patience"]
    reference = ", ".join(f"{value:.3g}" for value in result["hypervolume"]["reference"])
    out = {
        "model": f"{result['model']} ({result['denoiser']}, {result['dtype']})",
        "method": result["method"],
        "sampler": f"{result['scheduler']}, {steps} steps; unaccelerated, {_many(result['calls'], 'call')}",
        "guidance": "the pipeline's own" if result["guidance"] is None else f"{result['guidance']:g}",
        "objectives": "; ".join(f"{name}: {WORDS[name]}" for name in result["objectives"]),
        "pictures a plan": f"{_many(result['prompts'], 'prompt')}, seeds from {result['seed']} on; "
        + _economy(result["economy"]["prompts"]),
        "proposals": f"{ALGORITHMS.get(result['algorithm'], result['algorithm'])}, seed "
        f"{result['search_seed']}; " + ", ".join(f"{k} {v}" for k, v in result["operators"].items()),
        "tried": f"{_many(result['evaluated'], 'plan')} in {_many(len(result['history']), 'generation')}, "
        f"{_many(result['pictures'], 'picture')}, {_duration(result['seconds'])}",
        "given up early": "none",
        "hypervolume": f"{result['hypervolume']['front']:.3g} up to ({reference})",
    }
    if given_up:
        why = "figures that are no numbers"
        if patience is not None:
            why = f"{patience:g} times further off than one that costs no more"
        out["given up early"] = f"{_many(given_up, 'plan')}, {why}"
    if failed:
        out["could not be run"] = f"{_many(len(failed), 'plan')}, the last one: {failed[-1]}"
    if result["beside"]:
        out["hypervolume"] += f"; of what it is compared with, {result['hypervolume']['beside']:.3g}"
    return out | {"machine": _machine(result["machine"])}


def _economy(prompts: Sequence[int]) -> str:
    if len(prompts) == 1:
        return "every plan on all of them"
    return f"every plan on {prompts[0]}, the promising on {', '.join(map(str, prompts[1:]))}"


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = machine["gpu"] or f"{machine['processor']}, {_many(machine['threads'], 'thread')}"
    return f"{where}; Python {machine['python']}, {versions}; {machine['date']}"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _figure(value: float | None, name: str) -> str:
    """Format a value of an objective; shares in percent."""
    if value is None:
        return "-"
    return f"{value:.1%}" if name in SPEEDS else f"{value:.3g}"


def _example(result: Result) -> Mapping[str, Any] | None:
    """Choose a plan for the example of use: the balanced one, if there is one."""
    plans = result["front"]
    return next((plan for plan in plans if "balanced" in plan["picked"]), plans[0] if plans else None)


def _prompt(prompts: Sequence[str]) -> str:
    return prompts[0] if prompts else "large owl on blue"


def _command(result: Result, plan: Mapping[str, Any], prompts: Sequence[str]) -> str:
    """Write the command that generates with a plan."""
    option = "--schedule" if _is_schedule(plan) else "--method"
    words = ["--model", result["model"], "--prompt", _prompt(prompts), option, plan["file"]]
    words += ["--steps", f"{plan['steps']}"]
    words += [] if result["scheduler_given"] is None else ["--scheduler", result["scheduler_given"]]
    words += [] if result["guidance"] is None else ["--guidance", f"{result['guidance']}"]
    return shlex.join(["regrow", "generate", *words, "--compare"])


def _code(result: Result, plan: Mapping[str, Any], prompts: Sequence[str]) -> str:
    """Write the Python code that generates with a plan."""
    file, model = json.dumps(plan["file"]), json.dumps(result["model"])
    if zoo.bundles(result["model"]):
        pipeline, imports = f"regrow.zoo.load({model})", ["import regrow.zoo"]
    else:
        pipeline = f"DiffusionPipeline.from_pretrained({model})"
        imports = ["import regrow", "from diffusers import DiffusionPipeline"]
    if _is_schedule(plan):
        config = f"regrow.DaTo(schedule=regrow.Schedule.load({file}))"
    else:
        config = f"regrow.hub.load({file})"
        imports.append("import regrow.hub")
    sampler = []
    if result["scheduler_given"] is not None:
        imports.append("from regrow.lab.measure.samplers import Sampler")
        sampler = [f"Sampler.parse({json.dumps(result['scheduler_given'])}).put_into(pipe)"]
    guidance = "" if result["guidance"] is None else f", guidance_scale={result['guidance']}"
    call = f"pipe({json.dumps(_prompt(prompts))}, num_inference_steps={plan['steps']}{guidance})"
    return "\n".join(
        [
            *imports,
            "",
            f"pipe = {pipeline}",
            *sampler,
            f"with regrow.apply(pipe, {config}) as run:",
            f"    image = {call}.images[0]",
            "print(run.report())",
        ]
    )


def _is_schedule(plan: Mapping[str, Any]) -> bool:
    """Whether a plan's file is a schedule's, not a configuration's."""
    return Path(plan["file"]).suffix != ".json"


def _png(picture: Image.Image) -> bytes:
    """Encode a picture of at most `SIDE` as PNG, which adds no artefacts to a plan's picture."""
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = BytesIO()
    small.save(out, "PNG", optimize=True)
    return out.getvalue()


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
