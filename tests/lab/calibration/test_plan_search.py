"""The search for a plan, on networks whose answers are known, and on a pipeline."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from pipelines import KINDS
from rows import rows_of
from slow_forecasts import drifting_error, foretold

from regrow import DaTo, apply
from regrow.lab.calibration.drift import Growth
from regrow.lab.calibration.positions import evenly
from regrow.lab.calibration.proposals import Proposal, near_the_line, probes, proposals
from regrow.lab.calibration.recording import Recording, record
from regrow.lab.calibration.search import FEW, FewerSteps, Plan, search
from regrow.lab.measure.sampling import make
from regrow.origin import Origin
from regrow.recover.fit import decibels, fitted, weight_matrix
from regrow.schedule import FULL

TOTAL, COUNT, PROMPTS = 20, 6, 12
STILL, AMPLIFIES = Growth(), Growth(logarithms=(6.0, 5.5, 5.0, 4.0, 3.0, 1.5, 0.0))
FEWER = FewerSteps("6 steps", COUNT)


def recording(seed: int = 0) -> Recording:
    """Outputs that change fast at first, as a network's of a guided picture do."""
    rng = np.random.default_rng(seed)
    pace = np.exp(-np.arange(TOTAL) / 5)[:, None]
    values = (pace * rng.normal(size=(TOTAL, 500)).cumsum(0)).cumsum(0) + rng.normal(size=500)
    return Recording(
        origin=Origin(model="m", denoiser="d", scheduler="s", steps=TOTAL, calls=TOTAL, prompts=4),
        prompts_key="k",
        influence=(-0.05,) * TOTAL,
        gram=tuple(map(tuple, (values @ values.T / 500).tolist())),
    )


class Network:
    """Errors of plans that grow; fewer steps have an error of their own."""

    def __init__(self, known: Recording, growth: Growth, plain: float) -> None:
        self.known, self.growth, self.plain = known, growth, plain
        self.ran: list[tuple[Plan, int]] = []

    def __call__(self, plan: Plan, prompts: int) -> np.ndarray:
        self.ran.append((plan, prompts))
        noise = np.random.default_rng(0).normal(size=PROMPTS)[:prompts]
        return self.near(plan) + noise

    def near(self, plan: Plan) -> float:
        if isinstance(plan, FewerSteps):
            return self.plain
        told = drifting_error(self.known.products, self.known.moves, plan.weights, self.growth)
        return 20 + decibels(told)


@pytest.mark.parametrize("growth", [STILL, AMPLIFIES])
def test_it_finds_positions_for_the_growth_in_the_network(growth: Growth) -> None:
    known = recording()
    network = Network(known, growth, plain=-100.0)
    answer = search(known, COUNT, [FEWER], network, PROMPTS)
    assert isinstance(answer.best.plan, Proposal)
    assert answer.best.mean >= max(outcome.mean for outcome in answer.outcomes)
    even = Proposal("even", evenly(TOTAL, COUNT), fitted(known.products, evenly(TOTAL, COUNT)), TOTAL)
    assert network.near(answer.best.plan) > network.near(even) + 1
    # As if the growth had been known.
    best = proposals(known, COUNT, growth)[0]
    assert network.near(answer.best.plan) > network.near(best) - 0.5
    assert len(answer.best.psnr) == PROMPTS
    # All are run on few prompts, and few on all.
    on_all = [plan for plan, prompts in network.ran if prompts == PROMPTS]
    assert len(on_all) == 4
    assert len(network.ran) > 8
    assert {prompts for _, prompts in network.ran} == {FEW, PROMPTS}


def test_fewer_steps_are_the_answer_where_they_are_nearest() -> None:
    known = recording()
    best = search(known, COUNT, [FEWER], Network(known, AMPLIFIES, plain=-100.0), PROMPTS).best
    other = FewerSteps("6 other steps", COUNT, tuple(range(COUNT)))
    fewer = [FEWER, other]
    for plain, plans in ((best.mean + 1, fewer), (best.mean, [FEWER])):
        answer = search(known, COUNT, plans, Network(known, AMPLIFIES, plain), PROMPTS)
        assert isinstance(answer.best.plan, FewerSteps)
        assert any(outcome.plan == plans[-1] for outcome in answer.outcomes)


def test_proposals_are_foretold_in_their_order() -> None:
    known = recording(1)

    def near(plan: Proposal) -> float:
        return foretold(known.products, known.moves, plan.weights, AMPLIFIES)

    first, second = proposals(known, COUNT, AMPLIFIES)
    assert near(first) >= near(second)
    assert near(first) >= max(map(near, probes(known, COUNT)))
    assert near(first) >= near(near_the_line(known, first.full))


def test_a_proposal_as_a_schedule() -> None:
    plan = proposals(recording(), COUNT, AMPLIFIES)[0]
    schedule = plan.schedule()
    assert [i for i, depth in enumerate(schedule.depth) if depth == FULL] == list(plan.full)
    assert schedule.recoveries[0] == plan.recovery
    assert schedule.depth.count(0) == TOTAL - COUNT


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 1}, "count: 1 is not allowed, it must be >= 2 and <= 20"),
        ({"count": 21}, "count: 21 is not allowed"),
        ({"fewer": []}, "fewer: it is empty"),
        ({"prompts": 0}, "prompts: 0 is not allowed"),
    ],
)
def test_what_is_not_allowed(change: dict[str, Any], said: str) -> None:
    known = recording()
    given: dict[str, Any] = {"count": COUNT, "fewer": [FEWER], "prompts": PROMPTS}
    with pytest.raises(ValueError, match=said):
        search(known, measure=Network(known, STILL, 0.0), **given | change)


@pytest.mark.parametrize("kind", ["sd1", "img2img", "sdxl-img2img"])
def test_a_plan_on_a_pipeline_is_its_weighted_sum(kind: str) -> None:
    """What the sampler is given in skipped calls: the weights times what it was given in computed ones.

    Also where the run begins late.
    """
    options: dict[str, Any] = {"steps": 12, "guidance": 3.0, "more": KINDS[kind][1]}
    known = record(pipelines.make(kind), ("a b", "c d"), **options)
    assert known.before == (0 if kind == "sd1" else 4)
    assert known.total == 12
    plan = proposals(known, 4, STILL)[0]
    pipe, given = pipelines.make(kind), []
    step = pipe.scheduler.step

    def listening(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(output.clone().flatten())
        return step(output, *args, **kwargs)

    pipe.scheduler.step = listening
    with apply(pipe, DaTo(schedule=plan.schedule())) as run, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(pipe, ("e f",), latents=True, **options)
    assert [call.depth == "full" for call in rows_of(run)].count(True) == 4
    seen = torch.stack(given).double()
    weights = torch.from_numpy(weight_matrix(plan.full, plan.recovery, plan.total))
    torch.testing.assert_close(weights @ seen, seen, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(seen[-1], seen[plan.full[-1]]) or plan.full[-1] == plan.total - 1
