"""What commands are asked: frozen classes whose fields are the options, with their defaults and help.

Options of several commands are in classes here and in `engine`, `options` and `default_methods`, from which
the classes of the commands inherit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import torch
import typer
from rich.console import Console

from regrow import zoo
from regrow.fields import MOST_COUNT, MOST_GUIDANCE, MOST_PIXELS, MOST_SEED, check_within
from regrow.lab.cli.models import check_room, find_device, load_pipeline
from regrow.lab.cli.terminal import busy
from regrow.lab.measure.prompts import read_prompts
from regrow.lab.measure.samplers import Sampler
from regrow.words import offer, shown

Made = TypeVar("Made")

# Names are those of diffusers, so that a user can look them up there.
DTYPES = ("float32", "bfloat16", "float16")

SIDE = 8
"""Pixels of which a picture's sides are multiples."""


def option(default: Any, help: str, *names: str, **settings: Any) -> Any:
    """Make a field of a request that is an option.

    Args:
        default: of the field. A class that inherits the field may give another one, and nothing more.
        help: what the option means.
        names: of the option, if not that of the field.
        settings: others of `typer.Option`.
    """
    return field(default=default, metadata={"option": typer.Option(*names, help=help, **settings)})


def argument(default: Any, help: str) -> Any:
    """Make a field of a request that is an argument, as `option` does."""
    return field(default=default, metadata={"option": typer.Argument(help=help)})


def command(kind: type[Request]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function that takes a request, and `typer.Context` if it names a ``context``.

    The options are the fields of the request's class, those that no other command shares first. One of a
    field that is a tuple may be given again.
    """
    hints, defaults = get_type_hints(kind), {one.name: one.default for one in fields(kind)}
    several = {name for name in defaults if get_origin(hints[name]) is tuple}
    options: dict[str, Any] = {}
    for base in kind.__mro__:
        for name in inspect.get_annotations(base):
            inherited = base.__dataclass_fields__[name].metadata.get("option")  # type: ignore[attr-defined]
            options[name] = options.get(name) or inherited
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name, one in options.items():
        typed, default = hints[name], defaults[name]
        if name in several:
            typed, default = list[get_args(typed)[0]] | None, None  # type: ignore[misc]
        parameters.append(
            parameters[0].replace(name=name, default=default, annotation=Annotated[typed, one])
        )

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        takes_context = "context" in inspect.signature(run).parameters

        def called(context: typer.Context, **given: Any) -> None:
            given |= {name: tuple(given[name] or ()) for name in several}
            run(kind(**given), *([context] if takes_context else []))

        called.__name__, called.__doc__ = run.__name__, run.__doc__
        called.__annotations__ = {one.name: one.annotation for one in parameters}
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def within(least: float, most: float) -> Callable[[typer.CallbackParam, Any], Any]:
    """Refuse an option's number outside of bounds, if it is given."""

    def check(option: typer.CallbackParam, value: Any) -> Any:
        if value is not None:
            check_within(str(option.name), value, least, most)
        return value

    return check


def _known_side(option: typer.CallbackParam, value: int | None) -> int | None:
    within(SIDE, MOST_PIXELS)(option, value)
    if value is not None and value % SIDE:
        raise ValueError(
            f"{option.name}: {value} is not allowed, it must be a multiple of {SIDE}, such as "
            f"{value - value % SIDE}"
        )
    return value


def _known_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype: {shown(dtype)} is not allowed; allowed are {', '.join(DTYPES)}{offer(dtype, DTYPES)}"
        )
    return dtype


def _known_scheduler(text: str | None) -> str | None:
    if text is not None:
        Sampler.parse(text)
    return text


@dataclass(frozen=True, kw_only=True)
class Request:
    """What every command is asked."""

    as_json: bool = option(False, "Print JSON instead of a table.", "--json")

    def part(self, kind: Callable[..., Made], **others: Any) -> Made:
        """Make an object of another class from the fields that are named alike in both.

        Args:
            kind: the class.
            others: its fields that are not named alike, or mean something else.
        """
        alike = {one.name for one in fields(self)} & inspect.signature(kind).parameters.keys()
        return kind(**self.values(*alike) | others)

    def values(self, *names: str) -> dict[str, Any]:
        """Some of the fields, by their names."""
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Seeded(Request):
    """Which noise pictures begin with."""

    seed: int = option(
        0,
        "Seed of the first prompt; the others follow.",
        # Those of the pictures follow it.
        callback=within(0, MOST_SEED - MOST_COUNT),
    )


@dataclass(frozen=True, kw_only=True)
class PictureSize(Request):
    """How large pictures are."""

    height: int | None = option(None, "Height in pixels; the model's own.", callback=_known_side)
    width: int | None = option(None, "Width in pixels; the model's own.", callback=_known_side)


@dataclass(frozen=True, kw_only=True)
class OnDevice(Request):
    """What computes."""

    device: str | None = option(None, "cpu, cuda, mps; the best there is.")


@dataclass(frozen=True, kw_only=True)
class Sampling(PictureSize, OnDevice):
    """How pictures are sampled."""

    dtype: str = option("float32", " or ".join(DTYPES) + ".", callback=_known_dtype)

    scheduler: str | None = option(
        None,
        "Scheduler of diffusers instead of the model's: EulerDiscrete, PNDM:skip_prk_steps=true.",
        callback=_known_scheduler,
    )
    guidance: float | None = option(
        None, "Guidance scale; the pipeline's own.", callback=within(0, MOST_GUIDANCE)
    )

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True, kw_only=True)
class FromModel(Sampling, Seeded):
    """Which model makes pictures, and in which batches."""

    model: str = option("emoji", "Bundled name, folder, file of weights, or hub id.")
    batch: int = option(16, "Pictures in one batch.", min=1, max=MOST_COUNT)

    @property
    def scale(self) -> float | None:
        """The guidance scale that was asked for, or suits a bundled model; None for the pipeline's own."""
        return zoo.guidance_of(self.model, self.guidance)

    def load(self, console: Console, prompts: int, *, own_size: bool = False, videos: bool = False) -> Any:
        """The pipeline, if a batch has room in memory.

        Args:
            console: is told.
            prompts: how many there are.
            own_size: the pictures have the model's size, whatever was asked for.
            videos: a pipeline of videos is allowed.
        """
        device = find_device(self.device)
        height, width = (None, None) if own_size else (self.height, self.width)
        check_room(self.model, height, width, min(self.batch, prompts), device, self.torch_dtype)
        with busy(console, f"loading {self.model}"):
            return load_pipeline(self.model, device, self.torch_dtype, self.scheduler, videos=videos)


@dataclass(frozen=True, kw_only=True)
class Prompted(FromModel):
    """Of which prompts a plan is found."""

    prompts: str = option("16", "A file of prompts, or a number of the model's own.")

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts themselves; see `prompts_of`."""
        return prompts_of(self.model, self.prompts)


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


def next_command(made: Any, plan: dict[str, Any], prompt: str) -> str:
    """What to type to see a picture by a plan beside the unaccelerated one.

    Args:
        made: how the pictures were made that it was found on: has ``model``, ``scheduler``, ``guidance``,
            ``height``, ``width``, ``dtype``.
        plan: options that give the plan.
        prompt: of the picture.
    """
    own = {"guidance": zoo.guidance_of(made.model), "dtype": "float32"}
    names = ("scheduler", "guidance", "height", "width", "dtype")
    given = {
        name: getattr(made, name) for name in names if getattr(made, name) not in (None, own.get(name))
    }
    options = {"model": made.model, **plan, **given, "prompt": prompt}
    words = (word for name, value in options.items() for word in (f"--{name}", str(value)))
    return f"regrow generate {' '.join(map(quote, words))} --compare"
