"""Adaptive forecasts on pipelines: what is measured, what follows from it, and that all else stays."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import any_pipelines as ap
import pipelines
import pytest
import torch
import transformer_pipelines as tp
from diffusers import EulerAncestralDiscreteScheduler, HeunDiscreteScheduler
from pydantic import ValidationError
from rows import rows_of
from waiting import NoWaiting

import regrow
from regrow.control import ErrorControl
from regrow.core.controlled import LAG
from regrow.core.recipe import Recipe, recipe_of
from regrow.methods import base
from regrow.methods.adaptive import Adaptive
from regrow.methods.base import About, MethodConfig, Role
from regrow.methods.names import method_of
from regrow.schedule import FULL, HEAD, LAYERS, Step

STEPS = 12
BUDGET = Adaptive(budget=6)
BOUND = Adaptive(bound=0.3)


def generated(pipe: Any, **options: Any) -> torch.Tensor:
    return pipelines.generate(pipe, **{"num_inference_steps": STEPS, **options})


def replayed(config: Adaptive, rows: Any, total: int) -> list[str]:
    """Of each call, what follows from the errors of the report: the largest of a step, two steps later."""
    control: Any = recipe_of(config).plan
    errors, steps = defaultdict[int, list[float]](list), sorted({row.step for row in rows})
    for row in rows:
        if row.error is not None:
            errors[row.step].append(row.error)
    state, depths = control.start(total, steps[0]), dict[int, str]()
    for step in steps:
        known = {s: max(e) for s, e in errors.items() if s <= step - LAG}
        decided, state = control.next(state, step, known)
        depths[step] = "full" if decided.depth == FULL else "0"
    return [depths[row.step] for row in rows]


@pytest.mark.parametrize(
    ("depth", "module"),
    [(0, "unet"), (HEAD, "unet.up_blocks.1"), (LAYERS, "unet.down_blocks.0.attentions.0")],
)
def test_the_error_is_that_of_the_forecast_of_a_recorded_run(pipe: Any, depth: int, module: str) -> None:
    """Under a bound that nothing keeps all calls are full, so that they are those of the plain run."""
    watched = pipe.unet.get_submodule(module.removeprefix("unet").lstrip("."))
    if depth == LAYERS:
        watched = watched.transformer_blocks[0].attn1
    recorded: list[torch.Tensor] = []
    handle = watched.register_forward_hook(
        lambda module, given, made: recorded.append((made if torch.is_tensor(made) else made[0]).double())
    )
    plain = generated(pipe)
    handle.remove()
    run = regrow.apply(pipe, Adaptive(bound=1e-6, depth=depth, recovery="taylor2"))
    with pytest.warns(UserWarning, match="saved nothing"):
        found = generated(pipe)
    assert torch.equal(found, plain)
    rows = rows_of(run)
    y = recorded
    wanted = [y[0], 2 * y[1] - y[0], *(3 * y[i] - 3 * y[i - 1] + y[i - 2] for i in range(2, STEPS - 1))]
    assert [row.error for row in rows[:1]] == [None]
    for i, forecast in enumerate(wanted, 1):
        assert rows[i].error == pytest.approx(float((y[i] - forecast).norm() / y[i].norm()), rel=1e-3)


@pytest.mark.parametrize("config", [BUDGET, BOUND], ids=["budget", "bound"])
def test_what_calls_do_follows_from_the_reported_errors(pipe: Any, config: Adaptive) -> None:
    plain = generated(pipe)
    with regrow.apply(pipe, config) as run:
        found, report = generated(pipe), run.report()
        depths = [row.depth for row in report.calls]
        assert depths == replayed(config, report.calls, STEPS)
        assert torch.equal(generated(pipe), found)
        # Another picture has other errors.
        generated(pipe, seed=1, prompt="a pizza")
        other = run.report()
        assert [row.depth for row in other.calls] == replayed(config, other.calls, STEPS)
    assert 2 < depths.count("full") < STEPS
    assert not torch.equal(found, plain)
    assert torch.equal(generated(pipe), plain)
    assert len(re.findall(r"forecast off by \d", str(report))) == depths.count("full") - 1
    assert {row.recovery for row in report.calls if row.depth == "0"} == {"taylor(1)"}


@pytest.mark.parametrize("family", ["qwen-image", "ltx-video", "kandinsky2"])
def test_both_calls_of_guidance_do_the_same_on_any_denoiser(family: str) -> None:
    kind, config = ap.FAMILIES[family], Adaptive(bound=0.5)
    pipe = kind.make()
    plain = ap.generate(family, pipe, steps=8)
    denoiser = getattr(pipe, kind.denoiser)
    with regrow.apply(pipe, config) as run:
        found = ap.generate(family, pipe, steps=8)
        rows, frozen = rows_of(run), run.frozen()
    total = max(row.step for row in rows) + 1
    depths = [row.depth for row in rows]
    assert depths == replayed(config, rows, total)
    assert "0" in depths
    assert len(rows) == kind.calls * total
    assert torch.equal(ap.generate(family, pipe, steps=8), plain)
    with regrow.apply(pipe, frozen):
        assert torch.equal(ap.generate(family, pipe, steps=8), found)
    assert not any("_call_impl" in vars(module) for module in denoiser.modules())


def test_a_step_follows_the_branch_of_the_larger_error() -> None:
    config, pipe = Adaptive(bound=0.5), tp.KINDS["flux"]()
    with regrow.apply(pipe, config) as run:
        tp.generate(pipe, num_inference_steps=STEPS, **tp.TWO_CALLS)
        rows = rows_of(run)
    errors = [[row.error for row in rows if row.step == step] for step in range(STEPS)]
    assert any(None not in pair and pair[0] != pair[1] for pair in errors)
    assert [row.depth for row in rows] == replayed(config, rows, STEPS)
    assert all(rows[2 * i].depth == rows[2 * i + 1].depth for i in range(STEPS))


SAMPLERS = {
    "ancestral": (EulerAncestralDiscreteScheduler, STEPS),
    "two calls a step": (HeunDiscreteScheduler, 2 * STEPS - 1),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_other_samplers(name: str) -> None:
    kind, calls = SAMPLERS[name]
    pipe = pipelines.sd(sampler=pipelines.scheduler(kind))
    config = Adaptive(budget=7)
    with regrow.apply(pipe, config) as run:
        found, rows, frozen = generated(pipe), rows_of(run), run.frozen()
    depths = [row.depth for row in rows]
    assert (len(depths), depths.count("full")) == (calls, 7)
    assert depths == replayed(config, rows, calls)
    with regrow.apply(pipe, frozen):
        assert torch.equal(generated(pipe), found)


@pytest.mark.parametrize("first", [1, 3])
def test_a_run_that_starts_late_spends_its_budget_on_its_own_calls(first: int) -> None:
    pipe, config = pipelines.make("img2img"), Adaptive(budget=5, first=first, longest=3)
    with regrow.apply(pipe, config) as run:
        found = generated(pipe, kind="img2img")
        rows, frozen = rows_of(run), run.frozen()
    assert rows[0].step > 0
    depths = [row.depth for row in rows]
    assert depths.count("full") == 5
    assert depths[:2] == ["full", "full"]
    assert depths == replayed(config, rows, STEPS)
    assert not any(row.reason for row in rows)
    assert frozen.depth[: rows[0].step] == (FULL,) * rows[0].step
    with regrow.apply(pipe, frozen):
        assert torch.equal(generated(pipe, kind="img2img"), found)


def test_a_budget_that_can_not_last_is_refused_before_the_first_call(pipe: Any) -> None:
    plain = generated(pipe)
    with regrow.apply(pipe, Adaptive(budget=3, longest=4)) as run:
        with pytest.raises(ValueError, match=r"^budget: 3 is not allowed for 12 calls .*must be >= 4$"):
            generated(pipe)
        with pytest.raises(RuntimeError, match="nothing to report"):
            run.report()
        assert generated(pipe, num_inference_steps=7).isfinite().all()
        assert [row.depth for row in rows_of(run)].count("full") == 3
    assert torch.equal(generated(pipe), plain)


def test_bound_zero_changes_nothing_and_says_so(pipe: Any) -> None:
    plain = generated(pipe)
    with pytest.warns(UserWarning, match="prunes nothing and reuses nothing"):
        run = regrow.apply(pipe, "adaptive:0")
    with run:
        assert torch.equal(generated(pipe), plain)
    assert {row.error for row in rows_of(run)} == {None}


def test_a_run_after_an_interrupted_one_begins_anew(pipe: Any) -> None:
    with regrow.apply(pipe, BUDGET) as run:
        found = generated(pipe)

        def stop(pipe: Any, step: int, *rest: Any) -> Any:
            if step == 6:
                raise KeyboardInterrupt
            return rest[-1]

        with pytest.raises(KeyboardInterrupt):
            generated(pipe, callback_on_step_end=stop, seed=1)
        cut = run.frozen()
        assert len(cut) == STEPS
        assert set(cut.depth[7:]) == {FULL}
        assert torch.equal(generated(pipe), found)


def test_a_denoiser_stepped_by_hand(pipe: Any) -> None:
    config = Adaptive(budget=4)
    run = regrow.apply(pipe.unet, config)
    for _ in range(2):
        with run.generation(8) as clock, torch.no_grad():
            for step in range(8):
                for text in (1, 2):
                    inputs = pipelines.unet_inputs(pipe.unet, seed=step, timestep=900 - 100 * step)
                    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"] * text
                    pipe.unet(**inputs)
                clock.step()
        rows = rows_of(run)
        assert [row.depth for row in rows] == replayed(config, rows, 8)
        assert sum(row.depth == "full" for row in rows) == 8
    run.remove()


def test_calls_wait_for_no_device(pipe: Any) -> None:
    with regrow.apply(pipe, BUDGET):
        whole, calls = pipe.unet._call_impl, 0

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                return whole(*args, **kwargs)
            with NoWaiting():
                return whole(*args, **kwargs)

        pipe.unet._call_impl = call
        generated(pipe)
        pipe.unet._call_impl = whole
    assert calls == STEPS


@pytest.mark.parametrize(
    "name",
    ["adaptive:budget=6", "adaptive:0.4:depth=1", "adaptive:0.4:depth=head:recovery=reuse", "fora:3"],
)
def test_what_a_run_did_is_a_schedule(pipe: Any, tmp_path: Path, name: str) -> None:
    with regrow.apply(pipe, name) as run:
        with pytest.raises(RuntimeError, match="nothing to keep"):
            run.frozen()
        found, rows = generated(pipe), rows_of(run)
        run.frozen().save(tmp_path / "plan.yaml")
    assert len({row.depth for row in rows}) == 2
    with regrow.apply(pipe, str(tmp_path / "plan.yaml")) as run:
        assert torch.equal(generated(pipe), found)
        assert [row.depth for row in rows_of(run)] == [row.depth for row in rows]
        # A schedule's own is itself.
        assert run.frozen().depth == regrow.Schedule.load(tmp_path / "plan.yaml").depth


@pytest.mark.parametrize("name", ["sito:d", "dato:b1", "tome:0.5", "deepcache:3+tome:0.5"])
def test_chosen_tokens_are_no_schedule(pipe: Any, name: str) -> None:
    with regrow.apply(pipe, name) as run:
        generated(pipe, num_inference_steps=2)
        with pytest.raises(ValueError, match="can't be kept as a schedule: its calls leave out tokens"):
            run.frozen()


def test_it_is_no_half_of_a_pair() -> None:
    with pytest.raises(ValueError, match=r"one side of the '\+' must be"):
        method_of("adaptive:0.1+tome:0.5")


class Controlling(MethodConfig):
    """A caching method that decides as it goes."""

    ABOUT: ClassVar[About] = About("Controlling", "decide", role=Role.CACHES)
    method: Literal["controlling"] = "controlling"


@recipe_of.register
def _(config: Controlling) -> Recipe:
    return Recipe(ErrorControl(Step(1, 0.0), bound=0.1))


def test_a_pair_takes_no_method_that_decides_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base._METHODS, "controlling", Controlling)
    with pytest.raises(ValueError, match=r"caching: .* measured errors is not allowed in a pair"):
        method_of("controlling+tome:0.5")


def test_names() -> None:
    assert method_of("adaptive:0.05") == Adaptive(bound=0.05)
    assert method_of("adaptive:budget=12") == Adaptive(budget=12)
    assert method_of("adaptive:budget=12:longest=9:first=1") == Adaptive(budget=12, longest=9, first=1)
    assert method_of("adaptive:0.1:depth=head").depth == HEAD
    for text, said in (
        ("adaptive", "bound, budget: exactly one of them"),
        ("adaptive:0.1:budget=9", "bound, budget: exactly one of them"),
        ("adaptive:fast", "a bound, such as 0.05, or budget=N"),
        ("adaptive:budget=x", "a whole number"),
        ("adaptive:nan", "bound: .* must be"),
    ):
        with pytest.raises(ValueError, match=said):
            method_of(text)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "bound, budget"),
        ({"bound": 0.1, "budget": 9}, "bound, budget"),
        ({"bound": -0.1}, "bound"),
        ({"bound": 2.0}, "bound"),
        ({"budget": 2}, "budget: 2 is not allowed, it must be > 2"),
        ({"budget": 3, "first": 4}, "budget: 3 is not allowed, it must be > 4"),
        ({"bound": 0.1, "depth": "full"}, "depth"),
        ({"bound": 0.1, "depth": "sites"}, "depth"),
        ({"bound": 0.1, "longest": 0}, "longest"),
        ({"bound": 0.1, "first": 0}, "first"),
        ({"bound": 0.1, "recovery": "tailor"}, "recovery"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Adaptive(**fields)
