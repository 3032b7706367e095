"""The plans that were searched on the bundled model."""

import warnings

import pytest

from regrow import DaTo, zoo
from regrow.apply import apply
from regrow.lab.measure.architectures import architecture
from regrow.lab.measure.macs import profile

NAMES = ("emoji-quality", "emoji-balanced", "emoji-fast")


@pytest.mark.parametrize("name", NAMES)
def test_searched_plans_say_what_they_were_found_on(name: str) -> None:
    schedule = DaTo.preset(name).schedule
    found = schedule.origin
    assert schedule.name == name
    assert len(schedule) == 50
    assert found is not None
    assert (found.model, found.scheduler, found.steps, found.calls) == ("emoji", "DDIMScheduler", 50, 50)
    assert found.guidance == zoo.GUIDANCE["emoji"]
    assert found.prompts == 16
    assert found.quality["deviation"] > 0


def test_searched_plans_cost_what_they_say() -> None:
    arch, costs = architecture("emoji"), []
    for name in NAMES:
        config = DaTo.preset(name)
        assert config.schedule.origin is not None
        counted = profile(arch, config, 50)
        said = config.schedule.origin.cost["macs"]
        assert counted.macs / counted.baseline_macs == pytest.approx(said, abs=1e-5)
        costs.append(said)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] < 1


def test_where_it_was_searched_a_plan_has_nothing_to_warn_of_and_costs_what_it_says() -> None:
    pipeline, config = zoo.load("emoji"), DaTo.preset("emoji-fast")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with apply(pipeline, config) as run:
            pipeline("penguin", num_inference_steps=50, guidance_scale=1.0, output_type="latent")
    report = run.report()
    assert config.schedule.origin is not None
    said = config.schedule.origin.cost["macs"]
    assert report.macs / report.full_macs == pytest.approx(said, abs=1e-5)
