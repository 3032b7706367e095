"""Every number of every method: refused in one line that names it, or it runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pipelines
import pytest
import transformer_pipelines
from pydantic import ValidationError

import regrow
from regrow import (
    ATEDM,
    FORA,
    CATPruning,
    Combined,
    DaTo,
    DeepCache,
    Schedule,
    SiTo,
    ToCa,
    ToMeSD,
)
from regrow.fields import explain
from regrow.methods.atedm import Restored

UNETS: list[Any] = [
    SiTo(ratio=0.5),
    DaTo(schedule=Schedule(depth=("full", "full", 1, 1), ratio=(0.5,) * 4), score_noise=0.1),
    ToMeSD(),
    DeepCache(center=0.3),
    FORA(),
    ATEDM(early=0),
]
TRANSFORMERS: list[Any] = [
    CATPruning(t0=2, balance=0.5),
    ATEDM(recovery=Restored.REUSE, early=0),
    ToCa(cross_attention=0.5, self_attention=0.5),
]
# Numbers of which some are allowed, and no others.
CHOICES = ("version", "max_downsample")
HOSTILE = (
    *(-1, -1e-17, 0, 1e-300, 1e-17, 1, 999_998, 10**9, 2**63, 10**30, 10**400, 1e308),
    *(math.inf, -math.inf, math.nan, "9" * 5000),
)


def numbers(config: Any) -> Iterator[tuple[str, list[Any]]]:
    """The fields that hold numbers, each with hostile values and its own bounds."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name not in CHOICES and isinstance(value, (int, float)) and not isinstance(value, bool):
            bounds = {
                kind: getattr(one, kind)
                for one in field.metadata
                for kind in ("ge", "gt", "le", "lt")
                if hasattr(one, kind)
            }
            assert {"ge", "gt"} & bounds.keys(), f"{name} has no lower bound"
            assert {"le", "lt"} & bounds.keys(), f"{name} has no upper bound"
            yield name, [*HOSTILE, *bounds.values()]


def changed(config: Any, name: str, value: Any) -> tuple[Any, ValidationError | None]:
    """A configuration with another number, or the error that it gives."""
    try:
        return type(config).model_validate(config.model_dump() | {name: value}), None
    except ValidationError as error:
        return None, error


def accepted(config: Any) -> Iterator[Any]:
    """Configurations with one number changed that are allowed; the others are refused as they should."""
    for name, values in numbers(config):
        for value in values:
            one, error = changed(config, name, value)
            if error is None:
                yield one
                continue
            said = explain(error)
            assert name in said
            assert "must be" in said or "not allowed" in said
            assert "\n" not in said
            assert "Input should" not in str(error)
            assert len(said) < 400


@pytest.mark.parametrize("config", [*UNETS, *TRANSFORMERS], ids=lambda c: f"{c.method}-{type(c).__name__}")
def test_every_number_is_refused_by_its_name_or_runs(config: Any) -> None:
    unet = config in UNETS
    # Bounds of numbers are the same with few layers.
    if unet:
        pipe = pipelines.sd(pipelines.unet(layers_per_block=1))
    else:
        pipe = transformer_pipelines.pixart(num_layers=3)
    ran = set()
    for one in accepted(config):
        if one in ran:
            continue
        ran.add(one)
        with regrow.apply(pipe, one):
            made = (
                pipelines.generate(pipe, num_inference_steps=3, height=32, width=32)
                if unet
                else transformer_pipelines.generate(pipe, num_inference_steps=3)
            )
        assert made.isfinite().all(), one
    assert ran


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"caching": {"method": "deepcache", "interval": 0}},
            "caching.deepcache.interval: 0 is not allowed",
        ),
        (
            {"caching": {"method": "witchcraft"}},
            "caching: .* must be one of deepcache, fora, .*schedule",
        ),
        ({"tokens": {"method": "tume"}}, "tokens: .* it must be one of .*; did you mean 'tome'"),
        ({"caching": 3}, "caching.schedule: 3 is not allowed"),
        ({"cashing": 3}, "cashing: not permitted, .*; did you mean 'caching'"),
    ],
)
def test_two_methods_are_refused_by_the_one_that_is_wrong(fields: dict[str, Any], said: str) -> None:
    good = Combined(caching=DeepCache(), tokens=ToMeSD()).model_dump()
    with pytest.raises(ValidationError) as refused:
        Combined.model_validate(good | fields)
    assert re.search(said, explain(refused.value)), explain(refused.value)
