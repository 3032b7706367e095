"""Calls of one counter share full calls, and the values that these keep; no figure depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from random import Random
from typing import Any, NamedTuple

import pipelines
import pytest
import transformer_pipelines

import regrow
from regrow.core.decision import Decision, View
from regrow.core.inputs import without_data
from regrow.core.macs import CallCounter, Macs
from regrow.core.recipe import recipe_of
from regrow.models import layout_of, module_of
from regrow.schedule import FULL, SITES, Step

MODELS = {
    "sd": lambda: pipelines.sd(pipelines.unet(layers_per_block=1)),
    "pixart": partial(transformer_pipelines.pixart, num_layers=3),
    "sd3": partial(transformer_pipelines.sd3, 3),
}
CAT = regrow.CATPruning(alpha=0.4, t0=2)


class Asked(NamedTuple):
    """A kind of call."""

    depth: int
    ratio: float
    knows_text: bool
    plan: Mapping[str, Decision]


@pytest.fixture
def _shapes() -> None:
    """Each counter has shapes of its own."""


def first_call(kind: str, pipe: Any) -> Any:
    """The arguments of a generation's first call, without data."""
    calls: list[Any] = []
    hook = module_of(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    (pipelines if kind == "sd" else transformer_pipelines).generate(pipe, num_inference_steps=1)
    hook.remove()
    args, kwargs = calls[0]
    return without_data(args), without_data(kwargs)


def kinds(kind: str, denoiser: Any, config: Any) -> list[Asked]:
    """Full and cached calls, and those that leave tokens or sites out, with a text known and not."""
    sites, texts = recipe_of(config).sites, (False,) if kind == "sd" else (False, True)
    asked = [Asked(depth, 0.0, known, {}) for known in texts for depth in (FULL, 1, 0)]
    if kind == "sd":
        asked += [Asked(depth, 0.5, False, {}) for depth in (FULL, 2)]
    elif sites is not None:
        step = Step(FULL, 0.5) if sites.by_ratio else Step(SITES, 0.0)
        plan = sites.on(denoiser, layout_of(denoiser)).plan(View(1, 6, step))
        asked += [Asked(step.depth, step.ratio, known, plan) for known in texts]
    return asked


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("sd", regrow.SiTo(ratio=0.5)),
        ("sd", regrow.DeepCache(interval=2)),
        ("pixart", regrow.Combined(caching=regrow.DeepCache(interval=2), tokens=CAT)),
        ("sd3", regrow.ToCa(interval=2)),
    ],
    ids=["sito", "deepcache", "cat+deepcache", "toca"],
)
def test_a_call_costs_the_same_whatever_was_counted_before(kind: str, config: Any) -> None:
    pipe = MODELS[kind]()
    denoiser, inputs, sites = module_of(pipe), first_call(kind, pipe), recipe_of(config).sites
    asked = kinds(kind, denoiser, config)

    def count(counter: CallCounter, one: Asked) -> Macs:
        return counter.count(one.depth, one.ratio, inputs, knows_text=one.knows_text, plan=one.plan)

    expected = [count(CallCounter(denoiser, sites), one) for one in asked]
    chance = Random(0)
    for depths in ((), {0, 1}, {0, 1, 2}):
        counter = CallCounter(denoiser, sites, depths)
        order = chance.sample(range(len(asked)), len(asked))
        for i in order:
            assert count(counter, asked[i]) == expected[i], (order, asked[i][:3])
