"""Commands whose options are the fields of a request's class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from regrow import zoo
from regrow.lab.cli.default_methods import Compared
from regrow.lab.cli.requests import FromModel, Request, argument, command, next_command, option, within
from regrow.lab.measure.evaluate import Setting


@dataclass(frozen=True, kw_only=True)
class Fruit(Request):
    """Options that baskets share."""

    count: int = option(3, "How many.", min=1)
    ripe: bool = option(False, "Ready to eat.", "--ripe")


@dataclass(frozen=True, kw_only=True)
class Basket(Fruit):
    """The options of a command."""

    name: str | None = argument(None, "Of the basket.")
    kind: tuple[Path, ...] = option((), "Of fruit.")
    weight: float | None = option(None, "In kg.", callback=within(0, 5))
    count: int = 7


def run(*words: str, settings: dict[str, Any] | None = None) -> tuple[Any, list[Basket], list[str]]:
    """What the command printed or raised, what it was asked, and which options it did not know."""
    app, asked, others = typer.Typer(), list[Basket](), list[str]()

    @app.command(context_settings=settings)
    @command(Basket)
    def pick(request: Basket, context: typer.Context) -> None:
        """Pick fruit."""
        asked.append(request)
        others.extend(context.args)

    return CliRunner(env={"COLUMNS": "100"}).invoke(app, [*words]), asked, others


def test_a_request_has_the_defaults_of_its_fields() -> None:
    assert run()[1] == [Basket()]
    assert Basket() == Basket(count=7, ripe=False, name=None, kind=(), weight=None, as_json=False)


def test_options_set_the_fields_also_those_that_are_inherited() -> None:
    words = ("red", "--kind", "a", "--kind", "b", "--weight", "2", "--count", "2", "--ripe", "--json")
    kinds = (Path("a"), Path("b"))
    assert run(*words)[1] == [Basket(name="red", kind=kinds, weight=2.0, count=2, ripe=True, as_json=True)]


def test_another_default_leaves_an_inherited_option_as_it_is() -> None:
    refused, asked, _ = run("--count", "0")
    assert refused.exit_code == 2
    assert not asked


def test_a_number_outside_of_bounds_is_named() -> None:
    found, _, _ = run("--weight", "6")
    assert str(found.exception) == "weight: 6.0 is not allowed, it must be >= 0 and <= 5"


def test_help_has_the_own_options_first_with_their_help_and_defaults() -> None:
    shown = run("--help")[0].output
    assert "Pick fruit." in shown
    for said in ("How many.", "[default: 7]", "In kg.", "Of the basket."):
        assert said in shown
    places = [shown.index(name) for name in ("--kind", "--weight", "--count", "--ripe", "--json")]
    assert places == sorted(places)


def test_a_command_may_see_options_that_are_no_fields() -> None:
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    _, asked, others = run("red", "--count", "4", "--colour=green", settings=settings)
    assert asked == [Basket(count=4, name="red")]
    assert others == ["--colour=green"]


@dataclass(frozen=True, kw_only=True)
class Asked(FromModel, Compared):
    """What a command that makes pictures is asked."""


def test_settings_are_made_of_the_fields_that_are_named_alike() -> None:
    asked = Asked(seed=5, height=64, width=32, guidance=3.0)
    setting = asked.part(Setting, prompts=("owl",), shard=asked.batch)
    assert setting == Setting("emoji", ("owl",), seed=5, guidance=3.0, height=64, width=32, shard=16)
    assert asked.values("seed", "height") == {"seed": 5, "height": 64}


def test_the_next_command_says_what_is_not_the_default() -> None:
    same = next_command(Asked(), {"method": "a b.json"}, "red owl")
    assert same == "regrow generate --model emoji --method 'a b.json' --prompt 'red owl' --compare"
    other = Asked(model="m", scheduler="PNDM", guidance=7.5, height=64, width=32, dtype="float16")
    assert next_command(other, {"steps": 4}, "owl").split()[4:] == [
        *("--steps", "4", "--scheduler", "PNDM", "--guidance", "7.5"),
        *("--height", "64", "--width", "32", "--dtype", "float16", "--prompt", "owl", "--compare"),
    ]


def test_a_bundled_model_has_its_guidance() -> None:
    assert Asked().scale == zoo.GUIDANCE["emoji"]
    assert Asked(guidance=2.0).scale == 2.0
    assert Asked(model="owner/name").scale is None
