"""Output plans on pipelines of families that regrow has no table for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import any_pipelines
import numpy as np
import pytest
import torch
from any_pipelines import FAMILIES, STEPS, generate
from diffusers import DDPMWuerstchenScheduler
from rows import rows_of
from torch import Tensor, nn

import regrow
from regrow.models import UnsupportedModelError
from regrow.recover.time import Chebyshev, Reuse, Taylor, TimeRecovery
from regrow.schedule import FULL

FULL_STEPS = (0, 1, 3)
# Batches of two are forecast by Taylor.
PLANS: dict[str, TimeRecovery] = {"reuse": Reuse(), "chebyshev": Chebyshev()}
# Their calls can't run without data, so that they are not counted.
UNCOUNTED = ("hidream", "lumina2", "mochi")

every_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def pipeline(family: str) -> Any:
    """A family's pipeline, which tests share: each leaves it as it was."""
    return FAMILIES[family].make()


def plan(recovery: TimeRecovery) -> regrow.DaTo:
    """Full, full, 0, full, 0, 0."""
    depth = tuple(FULL if step in FULL_STEPS else 0 for step in range(STEPS))
    return regrow.DaTo(schedule=regrow.Schedule(depth=depth, ratio=(0.0,) * STEPS, recovery=(recovery,)))


def denoiser_of(family: str, pipe: Any) -> nn.Module:
    found: nn.Module = getattr(pipe, FAMILIES[family].denoiser)
    return found


@contextmanager
def forward(denoiser: nn.Module, instead: Callable[..., Any]) -> Iterator[None]:
    """Let ``instead(forward, ...)`` stand in for the forward method of a denoiser's class."""
    kind: Any = type(denoiser)
    own = kind.forward

    @functools.wraps(own)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return instead(functools.partial(own, self), *args, **kwargs)

    kind.forward = wrapped
    try:
        yield
    finally:
        kind.forward = own


class Counted:
    """Counts the calls of a forward method."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return own(*args, **kwargs)


class Reference:
    """Computes at full steps; at others, sums what was computed for the same call of a step.

    Args:
        name: of the recovery.
        calls: of the denoiser a step.
    """

    def __init__(self, name: str, calls: int) -> None:
        self.name, self.calls, self.call = name, calls, 0
        self.known: list[dict[int, list[Tensor]]] = [{} for _ in range(calls)]
        self.pack: Callable[[list[Tensor]], Any] = list

    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        step, known = self.call // self.calls, self.known[self.call % self.calls]
        self.call += 1
        if step in FULL_STEPS:
            out = own(*args, **kwargs)
            values, self.pack = unpacked(out)
            known[step] = [value.clone() for value in values]
            return out
        times = list(known)
        weights = weights_of(self.name, times, step)
        parts = zip(*(known[time] for time in times), strict=True)
        return self.pack([sum_of(part, weights) for part in parts])


def unpacked(out: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors that a denoiser returns, and what returns others as it does."""
    first = out[0]
    several = isinstance(first, list)
    kind: Any = type(out)

    def pack(values: list[Tensor]) -> Any:
        value = values if several else values[0]
        return (value,) if kind is tuple else kind(value)

    return first if several else [first], pack


def weights_of(name: str, times: list[int], step: int) -> list[float]:
    """Each recovery as its definition has it, in float64."""
    if name == "reuse":
        return [0.0] * (len(times) - 1) + [1.0]
    if name == "taylor":
        before, last = times[-2:]
        share = (step - last) / (last - before)
        return [0.0] * (len(times) - 2) + [-share, 1 + share]

    def basis(steps: list[int]) -> Any:
        return np.polynomial.chebyshev.chebvander(2 * np.array(steps) / STEPS - 1, 4)

    x = basis(times)
    fitted = np.linalg.inv(x.T @ x + 0.1 * np.eye(5)) @ x.T
    return list((basis([step]) @ fitted)[0])


def sum_of(values: tuple[Tensor, ...], weights: list[float]) -> Tensor:
    if weights[-1] == 1 and not any(weights[:-1]):
        return values[-1].clone()
    total = sum(value.double() * weight for value, weight in zip(values, weights, strict=True))
    assert isinstance(total, Tensor)
    return total.to(values[-1].dtype)


def expected(family: str, name: str, **options: Any) -> Tensor:
    """What a generation gives by the reference."""
    pipe = pipeline(family)
    with forward(denoiser_of(family, pipe), Reference(name, FAMILIES[family].calls)):
        return generate(family, pipe, **options)


def assert_near(found: Tensor, wanted: Tensor, name: str) -> None:
    """Equal; where sums are of another order, nearly so."""
    if name == "reuse":
        assert torch.equal(found, wanted)
    else:
        assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def assert_counted(family: str, report: Any) -> None:
    """The report counts what was computed, or says why not."""
    if family in UNCOUNTED:
        assert report.macs == report.full_macs == 0
        assert "nothing is counted: the denoiser can't run without data" in report.notes[0]
        return
    assert report.notes == ()
    for row in report.calls:
        assert row.full_macs > 0
        assert row.macs == (row.full_macs if row.depth == "full" else 0)


@pytest.mark.parametrize("name", PLANS)
@every_family
def test_recovered_outputs_are_those_of_a_slow_reference_and_counted(family: str, name: str) -> None:
    wanted = expected(family, name)
    pipe, counted = pipeline(family), Counted()
    with forward(denoiser_of(family, pipe), counted), regrow.apply(pipe, plan(PLANS[name])) as run:
        found = generate(family, pipe)
        assert counted.calls == len(FULL_STEPS) * FAMILIES[family].calls
    assert_near(found, wanted, name)
    rows = rows_of(run)
    assert [(row.step, row.branch) for row in rows] == [
        (step, branch) for step in range(STEPS) for branch in range(FAMILIES[family].calls)
    ]
    assert [row.depth for row in rows] == ["full" if row.step in FULL_STEPS else "0" for row in rows]
    assert not any(row.reason for row in rows)
    if name == "reuse":
        # What is counted is the same in each: takes longer than the rest.
        assert_counted(family, run.report())


@every_family
def test_a_batch_of_two(family: str) -> None:
    wanted = expected(family, "taylor", count=2)
    pipe, counted = pipeline(family), Counted()
    with forward(denoiser_of(family, pipe), counted), regrow.apply(pipe, plan(Taylor())):
        generate(family, pipe)
        counted.calls = 0
        found = generate(family, pipe, count=2)
        assert counted.calls == len(FULL_STEPS) * FAMILIES[family].calls
    assert_near(found, wanted, "taylor")


@pytest.mark.parametrize("family", [name for name, one in FAMILIES.items() if one.calls == 2])
def test_branches_of_equal_texts_are_kept_apart_by_their_order(family: str) -> None:
    """Every branch has its own call in a step, though what both are given is equal."""
    given = FAMILIES[family].arguments(1, 0)
    equal = {f"negative_{k}": v.clone() for k, v in given.items() if f"negative_{k}" in given}
    assert equal
    wanted = expected(family, "taylor", **equal)
    pipe, counted = pipeline(family), Counted()
    with forward(denoiser_of(family, pipe), counted), regrow.apply(pipe, plan(Taylor())) as run:
        found = generate(family, pipe, **equal)
    assert counted.calls == len(FULL_STEPS) * 2
    assert_near(found, wanted, "taylor")
    assert [row.branch for row in rows_of(run)] == [0, 1] * STEPS


@pytest.mark.parametrize("family", ["qwen-image", "animatediff", "stable-cascade"])
def test_what_needs_more_than_the_output_is_refused(family: str) -> None:
    """With what works instead; that all families refuse it, the matrix says."""
    pipe = pipeline(family)
    for method in ("fora", "deepcache:3", "sito:a", "dato:b1", "toca", "taylorseer"):
        with pytest.raises(UnsupportedModelError, match="spectrum, or a schedule of depths 0 and full"):
            regrow.apply(pipe, method)


@every_family
def test_spectrum_says_that_it_forecasts_the_output(family: str) -> None:
    pipe, counted = pipeline(family), Counted()
    spectrum = regrow.Spectrum(full=2, window=2)
    with forward(denoiser_of(family, pipe), counted):
        with pytest.warns(UserWarning, match="recover the output instead"):
            run = regrow.apply(pipe, spectrum)
        with run:
            generate(family, pipe)
    # Full are 0, 1, 3 and 5.
    assert counted.calls == 4 * FAMILIES[family].calls


def test_guidance_in_one_call_and_in_several_are_both_there() -> None:
    assert len(FAMILIES) >= 10
    assert {family.calls for family in FAMILIES.values()} == {1, 2}


@every_family
def test_the_caller_may_write_to_what_it_is_given(family: str) -> None:
    """Somebody who changes an output in place changes nothing that is kept."""
    pipe = pipeline(family)
    with regrow.apply(pipe, plan(Reuse())):
        first = generate(family, pipe)
    with regrow.apply(pipe, plan(Reuse())):
        denoiser = denoiser_of(family, pipe)
        entered = denoiser.__dict__["_call_impl"]

        def spoiled(*args: Any, **kwargs: Any) -> Any:
            out = entered(*args, **kwargs)
            values, pack = unpacked(out)
            mine = [value.clone() for value in values]
            for value in values:
                value.zero_()
            return pack(mine)

        denoiser.__dict__["_call_impl"] = spoiled
        try:
            assert torch.equal(generate(family, pipe), first)
        finally:
            denoiser.__dict__["_call_impl"] = entered


def of_its_own(denoiser: nn.Module, sampler: Any, *, steps: bool) -> list[Tensor]:
    """The outputs in a loop of somebody's own, whose timesteps are no elements of the scheduler's."""
    sampler.set_timesteps(STEPS)
    latents, text = any_pipelines.drawn(1, 1, 4, 8, 8), any_pipelines.drawn(2, 1, 5, any_pipelines.TEXT)
    outputs = []
    with torch.no_grad():
        for t in sampler.timesteps:
            time = torch.tensor([float(t) / 1000])
            outputs.append(
                denoiser(latents, encoder_hidden_states=text, timestep=time, return_dict=False)[0]
            )
            if steps:
                latents = sampler.step(outputs[-1], t, latents, return_dict=False)[0]
            else:
                latents = latents - outputs[-1] / STEPS
    return outputs


def test_a_loop_that_never_steps_is_computed_in_full_and_said_so() -> None:
    pipe = FAMILIES["auraflow"].make()
    plain = of_its_own(pipe.transformer, pipe.scheduler, steps=False)
    run = regrow.apply(pipe.transformer, plan(Reuse()), scheduler=pipe.scheduler)
    with run, pytest.warns(UserWarning, match=r"computed in full.*without scheduler\.step"):
        found = of_its_own(pipe.transformer, pipe.scheduler, steps=False)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert [row.depth for row in rows_of(run)] == ["full"] * STEPS


def test_a_loop_with_another_scheduler_is_computed_in_full_and_said_so() -> None:
    pipe = FAMILIES["auraflow"].make()
    other = any_pipelines.flow()
    plain = of_its_own(pipe.transformer, other, steps=True)
    with regrow.apply(pipe, plan(Reuse())):
        generate("auraflow", pipe)
        with pytest.warns(UserWarning, match="of another pipeline with its own scheduler"):
            found = of_its_own(pipe.transformer, other, steps=True)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_a_run_that_starts_late_knows_its_first_step() -> None:
    """By what the scheduler was told, though the denoiser is given ``1 - t / 1000``."""
    pipe = FAMILIES["lumina2"].make()
    sampler, model = pipe.scheduler, pipe.transformer
    text = {
        "encoder_hidden_states": any_pipelines.drawn(2, 1, 5, any_pipelines.TEXT),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
    }
    with regrow.apply(pipe, plan(Reuse())) as run, torch.no_grad():
        sampler.set_timesteps(STEPS, mu=0.5)
        sampler.set_begin_index(2)
        latents = any_pipelines.drawn(1, 1, 4, 8, 8)
        for t in sampler.timesteps[2:]:
            out = model(latents, 1 - t[None] / 1000, **text, return_dict=False)[0]
            latents = sampler.step(out, t, latents, return_dict=False)[0]
    # The third call is the first of this run, so that it is full whatever the plan says.
    assert [(row.step, row.depth) for row in rows_of(run)] == [
        (2, "full"),
        (3, "full"),
        (4, "0"),
        (5, "0"),
    ]


def test_a_second_denoiser_is_named() -> None:
    prior = FAMILIES["stable-cascade"].make().prior
    pipe = any_pipelines.bare(
        "StableCascadeCombinedPipeline",
        decoder=FAMILIES["stable-cascade"].make().prior,
        prior_prior=prior,
        scheduler=DDPMWuerstchenScheduler(),
    )
    with pytest.warns(
        UserWarning, match=r"a second denoiser, prior_prior.*regrow\.apply\(pipeline\.prior_prior"
    ):
        run = regrow.apply(pipe, plan(Reuse()))
    assert run._engine.denoiser is pipe.decoder
    run.remove()


class Plain(nn.Module):
    """A denoiser of no library, which calls its condition as nobody else does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return x * 0 + condition


def test_guidance_that_ends_midway_leaves_the_right_branch() -> None:
    model, one = Plain(), torch.ones(1)
    plan = regrow.Schedule.every(2, 6, depth=0)
    with torch.no_grad(), regrow.apply(model, plan) as run, run.generation(6) as clock:
        for step in range(6):
            for condition in (-one, one) if step < 3 else (one,):
                assert float(model(one, torch.tensor(step), condition)) == float(condition)
            clock.step()
