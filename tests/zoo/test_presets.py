"""The plans that were searched on the bundled model."""

import warnings

import pytest

from regrow import DaTo, zoo
from regrow.apply import apply

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


def test_searched_plans_cost_what_they_say_on_the_bundled_model() -> None:
    pipeline = zoo.load("emoji")
    costs = []
    for name in NAMES:
        config = DaTo.preset(name)
        assert config.schedule.origin is not None
        with warnings.catch_warnings():
            # Applied where they were found, they have nothing to warn of.
            warnings.simplefilter("error", UserWarning)
            with apply(pipeline, config) as run:
                pipeline(
                    "penguin",
                    num_inference_steps=50,
                    guidance_scale=1.0,
                    output_type="latent",
                )
        report = run.report()
        said = config.schedule.origin.cost["macs"]
        assert report.macs / report.full_macs == pytest.approx(said, abs=1e-5)
        costs.append(report.macs)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] < report.full_macs
