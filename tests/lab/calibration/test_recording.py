"""What is kept of runs, beside outputs seen by a scheduler of our own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from any_pipelines import FAMILIES
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from pipelines import scheduler, sd
from transformer_pipelines import dit

from regrow import DeepCache, apply
from regrow.files import FileError
from regrow.lab.calibration.influence import influence
from regrow.lab.calibration.recording import Recording, record

STEPS = 4
PROMPTS = ("a b", "c", "d e f")


def listening(kind: Any, kept: list[torch.Tensor]) -> Any:
    """A scheduler's subclass that keeps what it is given."""

    class Listening(kind):  # type: ignore[misc]
        def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            kept.append(model_output.clone())
            return super().step(model_output, *args, **kwargs)

    return Listening


def seen(kind: Any, prompt: str, seed: int) -> torch.Tensor:
    """The guided outputs of one run, ``(T, elements)``."""
    kept: list[torch.Tensor] = []
    pipe = sd(sampler=scheduler(listening(kind, kept)))
    generator = torch.Generator().manual_seed(seed)
    pipe(prompt, num_inference_steps=STEPS, guidance_scale=4.0, generator=generator, output_type="latent")
    return torch.stack(kept).flatten(1).double()


@pytest.mark.parametrize("kind", [DDIMScheduler, UniPCMultistepScheduler])
def test_gram_matrix_of_the_guided_output(kind: Any) -> None:
    found = record(sd(sampler=scheduler(kind)), PROMPTS, steps=STEPS, guidance=4.0, seed=7)
    runs = [seen(kind, prompt, 7 + i) for i, prompt in enumerate(PROMPTS)]
    slow = sum(outputs @ outputs.T / outputs.shape[1] for outputs in runs) / len(runs)
    np.testing.assert_allclose(found.products, np.asarray(slow), rtol=1e-5)
    own = scheduler(kind)
    own.set_timesteps(STEPS)
    np.testing.assert_allclose(found.moves, influence(own))
    assert found.origin.prompts == len(PROMPTS)
    assert found.origin.calls == STEPS
    assert found.origin.guidance == 4.0


def test_a_batch_is_as_its_prompts_one_by_one() -> None:
    one, together = (record(sd(), PROMPTS, steps=STEPS, batch=batch) for batch in (1, 2))
    np.testing.assert_allclose(one.products, together.products, rtol=1e-4)


def test_pipelines_of_classes() -> None:
    found = record(dit(), ("1", "2"), steps=STEPS, guidance=2.0)
    assert len(found.gram) == STEPS
    assert min(np.linalg.eigvalsh(found.products)) > -1e-6


class KilledError(Exception):
    """The process was killed."""


def test_a_killed_recording_goes_on(tmp_path: Path) -> None:
    def kill(done: int) -> None:
        if done == 2:
            raise KilledError

    file, counts = tmp_path / "recording.json", []
    with pytest.raises(KilledError):
        record(sd(), PROMPTS, steps=STEPS, file=file, on_prompt=kill)
    assert Recording.load(file).origin.prompts == 2
    found = record(sd(), PROMPTS, steps=STEPS, file=file, on_prompt=counts.append)
    assert counts == [3]
    assert found == Recording.load(file)
    np.testing.assert_allclose(found.products, record(sd(), PROMPTS, steps=STEPS).products, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 5}, "steps 4, not 5"),
        ({"guidance": 2.0}, "guidance None, not 2.0"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"prompts": ("a", "b", "c")}, "it is of other prompts"),
        ({"pipe": sd(sampler=scheduler(UniPCMultistepScheduler))}, "with DDIMScheduler, not UniPC"),
    ],
)
def test_a_file_of_other_runs(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "recording.json"
    given: dict[str, Any] = {"pipe": sd(), "prompts": PROMPTS[:1], "steps": STEPS, "file": file}
    record(**given)
    with pytest.raises(FileError, match=said):
        record(**given | change)


def test_a_picture_is_known_by_what_it_shows(tmp_path: Path) -> None:
    """Not by where it lies in memory, nor by the few numbers that its text shows."""
    pipe, file = pipelines.make("img2img"), tmp_path / "recording.json"
    given: dict[str, Any] = {"prompts": PROMPTS[:1], "steps": STEPS, "file": file}
    shown = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    other = shown.clone()
    other[0, 0, 16, 16] = 1 - other[0, 0, 16, 16]
    assert repr(shown) == repr(other)
    first = record(pipe, more={"image": shown}, **given)
    assert record(pipe, more={"image": shown.clone()}, **given) == first
    with pytest.raises(FileError, match="other prompts or arguments"):
        record(pipe, more={"image": other}, **given)


def test_nothing_stays_on_the_pipeline() -> None:
    pipe = sd()
    before = dict(vars(DDIMScheduler))
    record(pipe, PROMPTS[:1], steps=STEPS)
    with pytest.raises(RuntimeError, match="stop"):
        record(pipe, PROMPTS[:1], steps=STEPS, more={"callback_on_step_end": _stop})
    assert dict(vars(DDIMScheduler)) == before
    assert "step" not in vars(pipe.scheduler)


def _stop(*_: Any) -> Any:
    raise RuntimeError("stop")


def test_a_scheduler_with_a_step_of_its_own() -> None:
    pipe = sd()
    own = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: own(*args, **kwargs)
    step = pipe.scheduler.step
    assert record(pipe, PROMPTS[:1], steps=STEPS).gram == record(sd(), PROMPTS[:1], steps=STEPS).gram
    assert pipe.scheduler.step is step


def test_accelerated_runs_are_refused() -> None:
    pipe = sd()
    with apply(pipe, DeepCache(interval=2)), pytest.raises(ValueError, match="pipe: a method is applied"):
        record(pipe, PROMPTS, steps=STEPS)


def test_prompts_are_needed() -> None:
    with pytest.raises(ValueError, match="prompts: 0 is not allowed"):
        record(sd(), (), steps=STEPS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "newer version"),
        ({"gram": [[1.0]]}, "gram: it must have 4 rows of 4 numbers"),
        ({"influence": [1.0]}, "influence: 1 entries for 4 calls"),
        ({"deep": {"1": [[1.0]]}}, "deep.1: it must have 4 rows"),
        ({"gram": [[1.0, 2.0, 3.0, 4.0]] * 4}, "gram: it must be the same when rows and columns"),
        ({"influence": [float("inf")] * 4}, "finite|no JSON"),
        ({"more": 1}, "more"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "recording.json"
    record(sd(), PROMPTS[:1], steps=STEPS, file=file)
    file.write_text(json.dumps(copy.deepcopy(json.loads(file.read_text())) | change))
    with pytest.raises(FileError, match=said):
        Recording.load(file)


def test_a_pipeline_of_an_unknown_family_without_text_encoder_is_told_what_it_lacks() -> None:
    with pytest.raises(ValueError, match=r"ChromaPipeline has no text encoder, .* give the encoded text"):
        record(FAMILIES["chroma"].make(), PROMPTS[:1], steps=STEPS)


def test_a_pipeline_of_an_unknown_family_is_recorded_with_an_encoded_text() -> None:
    family = FAMILIES["chroma"]
    found = record(family.make(), PROMPTS[:2], steps=STEPS, more=family.arguments(1, 3))
    assert found.products.shape == (STEPS, STEPS)
    assert np.linalg.eigvalsh(found.products)[-1] > 0
    assert found.origin.prompts == 2
