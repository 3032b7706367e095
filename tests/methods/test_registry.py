"""A method that registers itself is known everywhere; nothing else names methods."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, Any, ClassVar, Literal

import pipelines
import pytest
from pydantic import ValidationError
from rows import rows_of

import regrow
from regrow.core.recipe import Recipe, recipe_of
from regrow.fields import explain
from regrow.lab import cli
from regrow.lab.cli.default_methods import usual_of
from regrow.lab.cli.options import method_config
from regrow.methods import catalogue, pruning
from regrow.methods.base import (
    About,
    DenoiserKind,
    MethodConfig,
    Role,
    Status,
    methods,
    methods_of,
    register,
)
from regrow.methods.catalogue import config_from, load_plan, space_of, systems
from regrow.methods.names import method_of, named
from regrow.recover.time import TimeRecovery, recovery_from
from regrow.schedule import Schedule, Spaced
from regrow.space import Searched, Space, Variable, free


class Mine(MethodConfig):
    """A method of a user: a full call every so many, the others of depth 1.

    Args:
        interval: one call in so many is full.
    """

    ABOUT: ClassVar[About] = About(
        title="Mine",
        what="reuse as DeepCache does",
        paper="arXiv 1234.56789",
        default="often",
        value="interval",
        role=Role.CACHES,
        measured={DenoiserKind.UNET: ("4", "2")},
        traced={DenoiserKind.UNET: ("4",)},
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"often": {"interval": 2}}

    method: Literal["mine"] = "mine"
    interval: Annotated[int, Searched((2, 3, 4))] = 3


class Some(MethodConfig):
    """A method of a user that chooses tokens, by SiTo's rule.

    Args:
        share: share of the tokens that is pruned.
    """

    ABOUT: ClassVar[About] = About("Some", "prune some tokens", value="share", role=Role.CHOOSES)

    method: Literal["some"] = "some"
    share: float = 0.5

    @classmethod
    def space(cls, calls: int) -> Space:
        return free((Variable("share", (0.25, 0.5)),), cls)


@recipe_of.register
def _(config: Mine) -> Recipe:
    return Recipe(Spaced(config.interval, 1))


@recipe_of.register
def _(config: Some) -> Recipe:
    return recipe_of(regrow.SiTo(ratio=config.share))


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr("regrow.methods.base._METHODS", dict(methods()))
    monkeypatch.setattr("regrow.recover.time._KINDS", dict(regrow.recover.time._KINDS))


@pytest.fixture
def both() -> None:
    register(Mine)
    register(Some)


@pytest.mark.usefixtures("both")
def test_a_name_means_the_method_everywhere(pipe: Any) -> None:
    with regrow.apply(pipe, "mine:2") as run:
        assert run.config == Mine(interval=2)
        pipelines.generate(pipe)
    assert [call.depth for call in rows_of(run)] == ["full", "1", "full", "1"]
    assert method_of("mine") == Mine.preset("often")
    assert method_of("mine:often") == method_of("mine:3:interval=2") == Mine(interval=2)
    assert named("steps:7+some:0.25", 50) == (Some(share=0.25), 7)
    for name, said in (
        ("mine:often-er", "after the colon write a whole number"),
        ("mine:0", "after the colon write a whole number >= 1"),
        ("some:x", "after the colon write a ratio"),
        ("mune:3", "one of steps, .*dato, .*mine, some; did you mean 'mine'"),
    ):
        with pytest.raises(ValueError, match=said):
            method_of(name)


@pytest.mark.usefixtures("both")
def test_options_of_the_command_line_are_its_fields_and_presets() -> None:
    assert method_config("mine", interval=4, steps=50) == Mine(interval=4)
    assert method_config("mine", preset="often", steps=50) == Mine(interval=2)
    assert method_config("mine", steps=50) == Mine(interval=2)
    with pytest.raises(
        ValueError, match=r"--ratio: mine does not have this option; it has --preset, --interval"
    ):
        method_config("mine", ratio=0.5, steps=50)
    with pytest.raises(ValueError, match="--ratio: some does not have this option; it has none"):
        method_config("some", ratio=0.5, steps=50)


@pytest.mark.usefixtures("both")
def test_it_goes_with_others_by_its_role(pipe: Any) -> None:
    pairs = {
        "mine:2+some:0.5": (Mine(interval=2), Some()),
        "some:0.25+deepcache:2": (regrow.DeepCache(interval=2), Some(share=0.25)),
        "mine+sito:a": (Mine(interval=2), regrow.SiTo.preset("a")),
    }
    for name, (caching, tokens) in pairs.items():
        config = method_of(name)
        assert config == regrow.Combined(caching=caching, tokens=tokens)
        assert config_from(config.model_dump(mode="json")) == config
        assert hash(config_from(config.model_dump())) == hash(config)
        with regrow.apply(pipe, config) as run:
            pipelines.generate(pipe)
        assert run.report().macs < run.report().full_macs
    assert len(space_of("mine+some", 10).uniform) == 6
    assert method_of("dato:5+some").caching == Schedule.every(5, 50, ratio=0.5)
    for name in ("mine+deepcache", "some+tome", "mine+toca"):
        with pytest.raises(ValueError, match=r"'\+' must be .*deepcache.*mine.* the other .*sito.*some$"):
            space_of(name, 10)


@pytest.mark.usefixtures("both")
def test_a_pair_refuses_other_roles_and_names_the_wrong_field() -> None:
    good = {"caching": {"method": "mine"}, "tokens": {"method": "some"}}
    assert regrow.Combined.model_validate(good) == regrow.Combined(caching=Mine(), tokens=Some())
    for wrong, said in (
        ({"caching": Some()}, "caching: .* it must be one of deepcache, fora, .*mine, schedule"),
        ({"tokens": Mine()}, "tokens: .* it must be one of .*, some"),
        ({"caching": {"method": "mine", "interval": "x"}}, "caching.mine.interval: 'x' is not allowed"),
        ({"tokens": {"method": "some", "shore": 1}}, "tokens.some.shore: not permitted, the fields are"),
        ({"tokens": {"share": 1}}, "tokens: .* it must be a method"),
    ):
        with pytest.raises(ValidationError) as refused:
            regrow.Combined.model_validate(good | wrong)
        assert re.search(said, explain(refused.value)), explain(refused.value)


def test_a_pair_takes_no_method_that_is_not_registered() -> None:
    with pytest.raises(ValidationError, match="must be one of deepcache, fora"):
        regrow.Combined(caching=Mine(), tokens=regrow.ToMeSD())


@pytest.mark.usefixtures("both")
def test_files_of_it_are_plans(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(Mine(interval=7).dump())
    assert load_plan(file) == method_of(str(file)) == Mine(interval=7)
    file.write_text(regrow.Combined(caching=Mine(), tokens=Some()).dump())
    assert load_plan(file) == method_of("mine:3+some")
    with pytest.raises(
        ValueError, match=r"'minne' is not known; .*mine, some, combined; did you mean 'mine'"
    ):
        config_from({"method": "minne"})


@pytest.mark.usefixtures("both")
def test_the_command_line_lists_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["regrow", "methods", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows)[-3:] == ["mine", "some", "steps"]
    assert rows["mine"]["presets"] == ["often"]
    assert rows["mine"]["status"] == "works"
    monkeypatch.setattr("sys.argv", ["regrow", "methods", "mine"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    assert "mine: Mine (arXiv 1234.56789), works" in said
    assert "one call in so many is full" in said
    assert usual_of(DenoiserKind.UNET).measured[-2:] == ("mine:4", "mine:2")
    assert usual_of(DenoiserKind.UNET).traced[-1] == "mine:4"
    assert not any("mine" in name for name in usual_of(DenoiserKind.VIDEO).measured)


def test_a_method_takes_the_place_of_what_was_not_built_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(MethodConfig):
        ABOUT: ClassVar[About] = About("Later", "to come")
        method: Literal["later"] = "later"

    monkeypatch.setitem(catalogue._OTHERS, "later", About("Later", "to come", status=Status.NOT_YET))
    with pytest.raises(ValueError, match="'later' is not built yet"):
        alone("later")
    register(Later)
    assert alone("later") == Later()
    assert [system.config for system in systems() if system.name == "later"] == [Later]


def alone(name: str) -> Any:
    return method_config(name, steps=50)


def test_a_class_that_is_defined_again_replaces_itself() -> None:
    def defined(default: int) -> type[MethodConfig]:
        @register
        class Again(MethodConfig):
            ABOUT: ClassVar[About] = About("Again", "nothing")
            method: Literal["again"] = "again"
            count: int = default

        return Again

    for count in (1, 2):
        kind = defined(count)
        assert method_of("again") == kind(count=count)


def test_what_can_not_be_a_method_is_refused() -> None:
    about = About("X", "nothing")

    class Twice(MethodConfig):
        ABOUT: ClassVar[About] = about
        method: Literal["sito"] = "sito"

    class Steps(MethodConfig):
        ABOUT: ClassVar[About] = about
        method: Literal["steps"] = "steps"

    class Colon(MethodConfig):
        ABOUT: ClassVar[About] = about
        method: Literal["a:b"] = "a:b"

    class Silent(MethodConfig):
        method: Literal["silent"] = "silent"

    class Nameless(MethodConfig):
        ABOUT: ClassVar[About] = about
        method: str = "nameless"

    class Wrong(MethodConfig):
        ABOUT: ClassVar[About] = About("X", "nothing", value="rotio")
        method: Literal["wrong"] = "wrong"

    class Planned(MethodConfig):
        ABOUT: ClassVar[About] = About("X", "nothing", role=Role.SCHEDULE)
        method: Literal["planned"] = "planned"

    before = methods()
    for kind, said in (
        (Twice, "'sito' is not allowed for Twice, SiTo of regrow.methods.sito has that name"),
        (Steps, "'steps' is not allowed, it means something else"),
        (Colon, "'a:b' is not allowed, it must be of a-z"),
        (Silent, "ABOUT: Silent has none"),
        (Nameless, "Nameless has no field of the form method: Literal"),
        (Wrong, "Wrong has no field 'rotio'"),
        (Planned, "Planned has no field 'schedule'"),
        (dict, "must be a subclass of MethodConfig or TimeRecovery"),
        (Mine(), "must be a subclass of MethodConfig or TimeRecovery"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            register(kind)  # type: ignore[type-var]
    assert methods() == before


def test_recoveries_are_registered_by_the_same_decorator() -> None:
    @register
    class Half(TimeRecovery):
        kind: Literal["half"] = "half"

    class Clash(TimeRecovery):
        kind: Literal["reuse"] = "reuse"

    assert recovery_from("half") == Half()
    assert "half" not in methods()
    with pytest.raises(ValueError, match="'reuse' is not allowed, Reuse has that name"):
        register(Clash)


def test_every_method_of_the_library_is_registered_and_says_what_pairs_need() -> None:
    files = [import_module(f"regrow.methods.{one.name}") for one in iter_modules(regrow.methods.__path__)]
    found = {
        one
        for file in files
        for one in vars(file).values()
        if isinstance(one, type) and issubclass(one, MethodConfig) and one.__module__ == file.__name__
    }
    bases = {MethodConfig, pruning.PatchPruning, pruning.LayerPruning}
    assert found == {*methods().values(), regrow.Combined, *bases}
    for name, kind in methods().items():
        assert kind.ABOUT.default is None or kind.ABOUT.default in kind.presets()
        usual = [text for texts in kind.ABOUT.measured.values() for text in texts]
        assert all(isinstance(method_of(f"{name}:{text}"), kind) for text in usual)
        assert all(set(kind.ABOUT.traced[k]) <= set(kind.ABOUT.measured[k]) for k in kind.ABOUT.traced)
    assert {*methods_of(Role.CACHES)} >= {"deepcache", "fora"}
    assert {*methods_of(Role.CHOOSES)} == {"sito", "tome", "cat", "atedm"}
    assert [*methods_of(Role.SCHEDULE)] == ["dato"]


FILE = '''
from typing import ClassVar, Literal
from regrow.methods.base import About, MethodConfig, register
from regrow.core.recipe import Recipe, recipe_of
from regrow.schedule import Spaced

@register
class Dropped(MethodConfig):
    """Nothing."""
    ABOUT: ClassVar[About] = About("Dropped", "nothing")
    method: Literal["dropped"] = "dropped"

@recipe_of.register
def _(config: Dropped) -> Recipe:
    return Recipe(Spaced(2, 1))
'''


@pytest.mark.slow
def test_a_file_in_the_folder_is_all_that_a_new_method_needs(tmp_path: Path) -> None:
    package, copy = Path(regrow.__file__).parent, tmp_path / "regrow"
    (copy / "methods").mkdir(parents=True)
    for one in (*package.iterdir(), *(package / "methods").iterdir()):
        if one.name not in ("methods", "__pycache__"):
            (copy / one.relative_to(package)).symlink_to(one)
    (copy / "methods" / "dropped.py").write_text(FILE)
    done = subprocess.run(
        [sys.executable, "-m", "regrow", "methods", "--json"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    names = [row["name"] for row in json.loads(done.stdout)]
    assert names == [*methods(), "dropped", "steps"]
