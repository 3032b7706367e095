"""Short names mean the same in the library and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rows import rows_of

import regrow
from regrow.lab.cli.options import method_config
from regrow.methods.catalogue import default_of, systems
from regrow.methods.names import CALLS, method_of, named
from regrow.schedule import Schedule


def test_apply_takes_a_short_name(pipe: Any) -> None:
    with regrow.apply(pipe, "dato:b1") as run:
        assert run.config == regrow.DaTo.preset("b1")
    with pytest.raises(ValueError, match=r"'steps:5' is not allowed.*num_inference_steps"):
        regrow.apply(pipe, "steps:5")
    assert not hasattr(pipe.unet, "_diffusers_hook")


def test_an_interval_is_planned_for_the_usual_number_of_calls_and_resampled(pipe: Any) -> None:
    with regrow.apply(pipe, "dato:5") as run:
        assert run.config.schedule == Schedule.every(5, CALLS, ratio=0.5)
        pipe("a", num_inference_steps=10, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert [call.depth for call in rows_of(run)].count("full") == 2


def test_a_name_alone_means_its_one_obvious_default() -> None:
    assert method_of("cat") == default_of("cat") == regrow.CATPruning.preset("paper")
    assert method_of("toca") == regrow.ToCa.preset("paper")
    assert method_of("fora+tome") == regrow.Combined(caching=regrow.FORA(), tokens=regrow.ToMeSD())
    for name in ("dato", "sito", "atedm"):
        with pytest.raises(ValueError, match=f"'{name}' alone is not allowed, it needs a choice such as"):
            method_of(name)


def test_the_command_line_has_the_same_names() -> None:
    for system in systems():
        for preset in system.config.presets() if system.config is not None else ():
            name = f"{system.name}:{preset}"
            assert method_of(name) == method_config(system.name, preset=preset, steps=CALLS)
            assert method_of(name) == method_config(name, steps=CALLS) == named(name, CALLS).config


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "dat0:b1",
            "'dat0:b1' is not known; before the colon comes one of steps, .*dato, .*did you mean 'dato'",
        ),
        ("dato:b2", "after the colon comes an interval, a schedule file or b1, fast"),
        ("sito:x", "'sito:x' is not allowed; after the colon comes a ratio or a, b, c, d, e"),
        ("sito:2", "method: 'sito:2': ratio: "),
        ("sito:d:colour=3", "method: 'sito:d:colour=3': colour: "),
        ("tome:0.5:patch", "'patch' is not of the form field=value"),
        ("tome:0.5:patch=2:patch=3", "patch is there twice"),
        ("steps:2+steps:3", "steps: comes once"),
        ("fora+tome+sito:d", "at most two methods"),
        ("fora+deepcache", "one side of the '.' must be"),
    ],
)
def test_what_is_no_name_is_refused_in_one_line(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        named(name, CALLS)
    assert "\n" not in str(refused.value)


def test_a_file_of_two_methods_goes_with_no_third(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(method_of("deepcache:2+tome:0.5").dump())
    for name in (f"{file}+tome:0.5", f"fora:3+{file}"):
        with pytest.raises(ValueError, match=r"one side of the '.' must be deepcache, fora"):
            method_of(name)


def test_a_name_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    Schedule.every(2, 4).save(file)
    assert method_of(str(file)) == method_of(f"dato:{file}") == regrow.DaTo(schedule=Schedule.load(file))
