"""Deep features of unaccelerated runs, beside hooks of our own, and the plans that are fitted to them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from any_pipelines import FAMILIES
from pipelines import sd
from transformer_pipelines import dit, wan_of_texts

from regrow import DaTo, apply
from regrow.lab.calibration.deep import DeepFeatures
from regrow.lab.calibration.drift import Growth
from regrow.lab.calibration.proposals import deep_proposals
from regrow.lab.calibration.recording import Recording, record
from regrow.lab.measure.sampling import make
from regrow.recover.fit import offline_error

STEPS = 4
PROMPTS = ("a b", "c", "d e f")


def unet_features(pipe: Any, prompt: str, seed: int) -> torch.Tensor:
    """What the last layer of the up path takes from below, ``(T, elements)``."""
    kept: list[torch.Tensor] = []
    channels = pipe.unet.config.block_out_channels[0]

    def see(module: Any, args: Any) -> None:
        kept.append(args[0][:, :channels].clone())

    hook = pipe.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(see)
    make(pipe, (prompt,), steps=STEPS, guidance=4.0, seed=seed, latents=True)
    hook.remove()
    return torch.stack(kept).flatten(1).double()


def dit_features(pipe: Any, prompt: str, seed: int) -> torch.Tensor:
    """What all blocks but the first add, ``(T, elements)``."""
    ends: dict[int, list[torch.Tensor]] = {0: [], -1: []}
    blocks = pipe.transformer.transformer_blocks
    hooks = [
        blocks[i].register_forward_hook(lambda module, args, out, i=i: ends[i].append(out.clone()))
        for i in ends
    ]
    make(pipe, (prompt,), steps=STEPS, guidance=4.0, seed=seed, latents=True)
    for hook in hooks:
        hook.remove()
    return (torch.stack(ends[-1]) - torch.stack(ends[0])).flatten(1).double()


@pytest.mark.parametrize(
    ("kind", "features", "prompts"), [(sd, unet_features, PROMPTS), (dit, dit_features, ("1", "2"))]
)
def test_gram_matrix_of_what_calls_of_depth_1_reuse(kind: Any, features: Any, prompts: Any) -> None:
    found = record(kind(), prompts, steps=STEPS, guidance=4.0, seed=7, deep=True)
    runs = [features(kind(), prompt, 7 + i) for i, prompt in enumerate(prompts)]
    slow = sum(run @ run.T / run.shape[1] for run in runs) / len(runs)
    np.testing.assert_allclose(found.deep[1], np.asarray(slow), rtol=1e-4, atol=1e-7)
    plain = record(kind(), prompts, steps=STEPS, guidance=4.0, seed=7)
    assert found.gram == plain.gram
    assert not plain.deep


def test_guidance_in_two_calls_is_one_step() -> None:
    size = {"height": 16, "width": 16, "more": {"num_frames": 5}}
    found = record(wan_of_texts(), ("a penguin",), steps=STEPS, guidance=3.0, deep=True, **size)
    assert np.shape(found.deep[1]) == (STEPS, STEPS)


def test_some_elements_tell_of_all() -> None:
    whole, some = DeepFeatures(), DeepFeatures(most=2000)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(STEPS, 40_000, generator=generator).cumsum(0) + 1
    for value in values:
        for features in (whole, some):
            features.add([value[:30_000], value[30_000:]])
            features.end_step()
    np.testing.assert_allclose(whole.gram(), values.double() @ values.double().T / 40_000, rtol=1e-9)
    np.testing.assert_allclose(some.gram(), whole.gram(), rtol=0.1)
    assert not np.allclose(some.gram(), whole.gram(), rtol=1e-4)


class KilledError(Exception):
    """The process was killed."""


def test_a_killed_recording_goes_on(tmp_path: Path) -> None:
    def kill(done: int) -> None:
        if done == 2:
            raise KilledError

    given: dict[str, Any] = {"prompts": PROMPTS, "steps": STEPS, "deep": True}
    with pytest.raises(KilledError):
        record(sd(), **given, file=tmp_path / "r.json", on_prompt=kill)
    found = record(sd(), **given, file=tmp_path / "r.json")
    assert found == Recording.load(tmp_path / "r.json")
    np.testing.assert_allclose(found.deep[1], record(sd(), **given).deep[1], rtol=1e-12)


def test_a_file_of_before_goes_on_without_them(tmp_path: Path) -> None:
    file = tmp_path / "r.json"

    def kill(done: int) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        record(sd(), PROMPTS, steps=STEPS, file=file, on_prompt=kill)
    with pytest.warns(UserWarning, match="it has no deep features, so none are added"):
        found = record(sd(), PROMPTS, steps=STEPS, file=file, deep=True)
    assert not found.deep
    assert found.origin.prompts == len(PROMPTS)


def test_guidance_that_ends_within_the_run_is_said() -> None:
    def end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 1.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}
        return tensors

    more = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.warns(UserWarning, match="guidance changes within the run; they are not recorded"):
        found = record(sd(), PROMPTS[:2], steps=STEPS, guidance=4.0, deep=True, more=more)
    assert not found.deep
    assert found.origin.prompts == 2


def test_a_denoiser_of_which_the_output_alone_is_known_is_refused() -> None:
    with pytest.raises(ValueError, match="deep: True is not allowed, QwenImageTransformer2DModel has no"):
        record(FAMILIES["qwen-image"].make(), ("a",), steps=STEPS, deep=True)


def test_nothing_stays_on_the_denoiser() -> None:
    pipe = sd()
    record(pipe, PROMPTS[:1], steps=STEPS, deep=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_plans_of_deep_features_are_fitted_to_them() -> None:
    steps, count = 10, 4
    known = record(sd(), PROMPTS, steps=steps, guidance=3.0, deep=True)
    features, moves = np.array(known.deep[1]), known.moves
    found = list(deep_proposals(known, count, Growth()))
    assert all(plan.depth == 1 and len(plan.full) == count for plan in found)
    lines = {plan.full: plan for plan in found if "on the line" in plan.name}
    fits = {plan.full: plan for plan in found if "fitted" in plan.name}
    assert set(lines) < set(fits)

    def missed(plan: Any) -> float:
        """The mean square by which the features of skipped calls are missed."""
        rest = np.eye(steps) - plan.weights
        return float(np.einsum("ti,ij,tj->", rest, features, rest))

    for full, line in lines.items():
        assert missed(fits[full]) < missed(line)
    searched = next(plan for plan in found if "searched" in plan.name)
    assert offline_error(features, moves, searched.weights) <= min(
        offline_error(features, moves, plan.weights) for plan in fits.values()
    )


def test_without_a_recording_of_them_they_are_on_the_line() -> None:
    known = record(sd(), PROMPTS[:1], steps=10)
    assert all("on the line" in plan.name for plan in deep_proposals(known, 4, Growth()))


def test_a_plan_on_a_pipeline_reuses_the_weighted_sum() -> None:
    """What the last layer takes from below in cached calls: the weights times that of full calls."""
    known = record(sd(), PROMPTS, steps=8, guidance=3.0, deep=True)
    plan = next(plan for plan in deep_proposals(known, 3, Growth()) if "fitted" in plan.name)
    pipe, kept = sd(), []
    resnet = pipe.unet.up_blocks[-1].resnets[-1]
    hook = resnet.register_forward_pre_hook(lambda module, args: kept.append(args[0][:, :16].clone()))
    with apply(pipe, DaTo(schedule=plan.schedule())), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(pipe, ("e f",), steps=8, guidance=3.0, latents=True)
    hook.remove()
    seen = torch.stack(kept).flatten(1).double()
    torch.testing.assert_close(torch.from_numpy(plan.weights) @ seen, seen, rtol=1e-3, atol=1e-3)
