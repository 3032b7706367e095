"""Two pictures that begin at the same noise are no halves of guidance."""

from __future__ import annotations

from typing import Any

import pipelines
import pytest
import torch
import transformer_pipelines
from rows import rows_of
from torch import Tensor

import regrow
from regrow import CATPruning, DaTo, Schedule
from regrow.tokens.alignment import Alignment

STEPS = 6
# Before there are two outputs to compare, tokens are drawn, for a batch at a time.
SCHEDULE = Schedule(depth=("full",) * STEPS, ratio=(0.0, 0.0) + (0.5,) * (STEPS - 2))
DATO = DaTo(schedule=SCHEDULE, alignment=Alignment.CONDITIONAL)
CAT = CATPruning(alpha=0.4, t0=2, choice="noise")
METHODS: dict[str, Any] = {"sd": DATO, **dict.fromkeys(("sd3", "pixart", "dit", "flux"), CAT)}
MAKE = {"sd": pipelines.sd, **transformer_pipelines.KINDS}


def generate(pipe: Any, kind: str, which: tuple[int, ...], guidance: float = 1.0) -> Tensor:
    """Pictures of these prompts, all from the same seed."""
    prompts = {"class_labels": [3, 7]} if kind == "dit" else {"prompt": ["a penguin", "a pizza"]}
    size = {} if kind in ("dit", "sd") else {"height": 32, "width": 32}
    return pipe(
        **{name: [values[i] for i in which] for name, values in prompts.items()},
        **size,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(0) for _ in which],
        output_type="pt",
    ).images


@pytest.mark.parametrize("kind", METHODS)
def test_a_picture_does_not_depend_on_another_of_the_same_seed(kind: str) -> None:
    pipe = MAKE[kind]()
    plain = generate(pipe, kind, (0, 1))
    with regrow.apply(pipe, METHODS[kind]) as run:
        both = generate(pipe, kind, (0, 1))
        alone = torch.cat([generate(pipe, kind, (i,)) for i in (0, 1)])
    assert max(call.ratio for call in rows_of(run)) > 0.4
    error, effect = ((both - other).abs().max() for other in (alone, plain))
    assert error < 1e-4 < effect / 5


@pytest.mark.parametrize("kind", [kind for kind in METHODS if kind != "flux"])
def test_halves_of_guidance_are_aligned(kind: str) -> None:
    pipe, method = MAKE[kind](), METHODS[kind]
    with regrow.apply(pipe, method):
        aligned = generate(pipe, kind, (0,), guidance=4.0)
    with regrow.apply(pipe, method.model_copy(update={"alignment": Alignment.OFF})):
        each = generate(pipe, kind, (0,), guidance=4.0)
    assert (aligned - each).abs().max() > 1e-4
