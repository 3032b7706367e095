"""L2P on a pipeline, beside least squares over tensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import sd
from rows import rows_of

from regrow import L2P, apply, record
from regrow.lab.calibration.recording import Recording
from regrow.lab.measure.sampling import make
from regrow.methods.catalogue import load_plan

STEPS, INTERVAL = 9, 3
PROMPTS = ("a b", "c d")


@cache
def recording() -> Recording:
    return record(sd(), PROMPTS, steps=STEPS, guidance=3.0, seed=5)


def given(pipe: Any, prompts: tuple[str, ...], seed: int) -> torch.Tensor:
    """What the sampler is given at each call, ``(T, elements)``."""
    found, step = [], pipe.scheduler.step

    def listening(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(output.clone().flatten())
        return step(output, *args, **kwargs)

    pipe.scheduler.step = listening
    make(pipe, prompts, steps=STEPS, guidance=3.0, seed=seed, latents=True)
    del pipe.scheduler.step
    return torch.stack(found).double()


@pytest.mark.parametrize("last", [None, 1])
def test_skipped_outputs_are_the_least_squares_combination(last: int | None) -> None:
    recorded = torch.cat([given(sd(), (prompt,), 5 + i) for i, prompt in enumerate(PROMPTS)], 1)
    pipe, config = sd(), L2P.fit(recording(), INTERVAL, last=last)
    with apply(pipe, config) as run:
        outputs = given(pipe, ("e f",), 8)
        calls = rows_of(run)
    assert [call.depth for call in calls] == ["full", "0", "0"] * 3
    for step in range(STEPS):
        computed = list(range(0, step + 1, INTERVAL))[-(last or STEPS) :]
        if step % INTERVAL:
            weights = torch.linalg.lstsq(recorded[computed].T, recorded[step].unsqueeze(1)).solution
            torch.testing.assert_close(
                outputs[step], weights[:, 0] @ outputs[computed], rtol=1e-3, atol=1e-3
            )


def test_every_call_computed_changes_nothing() -> None:
    pipe = sd()
    plain = given(pipe, PROMPTS, 0)
    with apply(pipe, L2P.fit(recording(), 1)):
        assert torch.equal(given(pipe, PROMPTS, 0), plain)


def test_it_is_a_file(tmp_path: Path) -> None:
    config, file = L2P.fit(recording(), INTERVAL), tmp_path / "l2p.json"
    file.write_text(config.dump())
    loaded = load_plan(file)
    assert loaded == config
    assert loaded.origin == recording().origin


def test_it_has_no_name() -> None:
    with pytest.raises(ValueError, match=r"fit them with regrow\.L2P\.fit"):
        apply(sd(), "l2p:3")


def test_interval() -> None:
    with pytest.raises(ValueError, match="interval: 0 is not allowed"):
        L2P.fit(recording(), 0)
