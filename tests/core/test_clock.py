"""Every call knows its step, whatever the sampler, the pipeline or the loop around it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pipelines
import pytest
import torch
import transformer_pipelines
from pipelines import generate, scheduler
from torch import Tensor

import regrow
from regrow import FULL
from regrow.core.clock import StepWatch
from regrow.schedule import LAYERS

SAMPLERS: dict[str, Callable[[], Any]] = {
    "ddim": scheduler,
    "pndm": lambda: scheduler(diffusers.PNDMScheduler, skip_prk_steps=True),
    "pndm-prk": lambda: scheduler(diffusers.PNDMScheduler, skip_prk_steps=False),
    "euler": lambda: scheduler(diffusers.EulerDiscreteScheduler),
    "euler-ancestral": lambda: scheduler(diffusers.EulerAncestralDiscreteScheduler),
    "dpm++": lambda: scheduler(diffusers.DPMSolverMultistepScheduler),
    "dpm++-karras": lambda: scheduler(diffusers.DPMSolverMultistepScheduler, use_karras_sigmas=True),
    "unipc": lambda: scheduler(diffusers.UniPCMultistepScheduler),
    "heun": lambda: scheduler(diffusers.HeunDiscreteScheduler),
    "lms": lambda: scheduler(diffusers.LMSDiscreteScheduler),
    "kdpm2": lambda: scheduler(diffusers.KDPM2DiscreteScheduler),
}
PRUNE = regrow.SiTo(ratio=0.6)
REUSE = regrow.DaTo(schedule=regrow.Schedule.every(2, 10, ratio=0.5))


def small(**parts: Any) -> Any:
    return pipelines.sd(pipelines.unet(layers_per_block=1), **parts)


@pytest.fixture
def pipe() -> Any:
    """A Stable Diffusion 1 pipeline with one layer a block."""
    return small()


def pipeline(sampler: str, **parts: Any) -> Any:
    return small(sampler=SAMPLERS[sampler](), **parts)


def records(run: regrow.Run) -> Any:
    """The calls of the last generation, without the MACs that take a report a second to count."""
    return run._engine.generation.records


def places(run: regrow.Run) -> list[tuple[int, int]]:
    return [(r.position.index, r.branch) for r in records(run)]


def depths(run: regrow.Run) -> list[int]:
    return [r.depth for r in records(run)]


def count_calls(pipe: Any) -> list[int]:
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_call_of_a_sampler_is_one_step_of_the_plan_in_equal_generations(sampler: str) -> None:
    pipe = pipeline(sampler)
    calls = count_calls(pipe)
    made = []
    with regrow.apply(pipe, REUSE) as run:
        for guidance in (5.0, 1.0, 5.0):
            calls.clear()
            made.append(generate(pipe, num_inference_steps=5, guidance_scale=guidance))
            total = len(pipe.scheduler.timesteps)
            assert len(calls) == total
            assert places(run) == [(i, 0) for i in range(total)]
            assert depths(run) == list(REUSE.schedule.resample(total).depth)
    assert torch.equal(made[0], made[2])


def test_the_report_tells_step_branch_and_depth_of_every_call(texts: list[Tensor]) -> None:
    pipe = small()
    with regrow.apply(pipe, REUSE) as run:
        loop(pipe.unet, pipe.scheduler, texts, 4, lambda: None)
        report = run.report()
    assert [(c.step, c.branch) for c in report.calls] == [(i, b) for i in range(4) for b in (0, 1)]
    assert [c.depth for c in report.calls] == ["full", "full", "1", "1"] * 2
    assert [c.planned for c in report.calls] == [c.depth for c in report.calls]
    assert report.macs == sum(c.macs for c in report.calls) < report.full_macs
    assert len(report.to_dict()["calls"]) == 8
    assert "8 calls" in str(report)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_runs_of_image_to_image_start_late_in_the_plan(sampler: str) -> None:
    pipe = pipeline(sampler, kind=diffusers.StableDiffusionImg2ImgPipeline)
    calls = count_calls(pipe)
    with regrow.apply(pipe, REUSE) as run:
        generate(pipe, kind="img2img", num_inference_steps=6, strength=0.5)
        total = len(pipe.scheduler.timesteps)
        assert 0 < len(calls) < total
        assert places(run) == [(i, 0) for i in range(total - len(calls), total)]
        assert depths(run)[0] == FULL


def test_strengths_one_after_another_each_start_where_they_should() -> None:
    pipe = pipeline("euler", kind=diffusers.StableDiffusionImg2ImgPipeline)
    with regrow.apply(pipe, REUSE) as run:
        for strength, start in ((1.0, 0), (0.5, 3), (0.2, 5), (0.9, 1)):
            generate(pipe, kind="img2img", num_inference_steps=6, strength=strength)
            assert places(run) == [(i, 0) for i in range(start, 6)]


def test_timesteps_of_the_users_own_are_followed(pipe: Any) -> None:
    pipe.scheduler = SAMPLERS["dpm++"]()
    with regrow.apply(pipe, REUSE) as run:
        generate(pipe, timesteps=[900, 700, 400, 200, 50], num_inference_steps=5)
        assert places(run) == [(i, 0) for i in range(5)]


@pytest.mark.parametrize("sampler", ["heun", "pndm", "euler"])
def test_a_scheduler_swapped_between_generations_is_followed(sampler: str) -> None:
    expected_pipe = pipeline(sampler)
    with regrow.apply(expected_pipe, REUSE):
        expected = generate(expected_pipe)
    pipe = pipeline("ddim")
    first = pipe.scheduler
    with regrow.apply(pipe, REUSE) as run:
        generate(pipe)
        pipe.scheduler = SAMPLERS[sampler]()
        assert torch.equal(generate(pipe), expected)
        assert places(run) == [(i, 0) for i in range(len(pipe.scheduler.timesteps))]
        assert "step" not in first.__dict__
    assert "step" not in pipe.scheduler.__dict__


def test_a_scheduler_swapped_in_and_not_used_is_left_alone(pipe: Any) -> None:
    first = pipe.scheduler
    with regrow.apply(pipe, REUSE):
        generate(pipe)
        pipe.scheduler = SAMPLERS["euler"]()
    assert "step" not in first.__dict__
    assert "step" not in pipe.scheduler.__dict__


def test_a_copied_scheduler_steps_itself_and_ticks_nothing(pipe: Any) -> None:
    sample, noise = torch.randn(2, 1, 4, 8, 8)
    pipe.scheduler = SAMPLERS["euler"]()
    with regrow.apply(pipe, REUSE):
        expected = generate(pipe)

        def step_a_copy(pipeline: Any, *_: Any) -> dict[str, Any]:
            other = copy.deepcopy(pipeline.scheduler)
            plain = SAMPLERS["euler"]()
            for one in (other, plain):
                one.set_timesteps(3)
            t = plain.timesteps[0]
            assert torch.equal(
                other.step(noise, t, sample).prev_sample, plain.step(noise, t, sample).prev_sample
            )
            assert other.step_index == 1
            return {}

        assert torch.equal(generate(pipe, callback_on_step_end=step_a_copy), expected)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++"])
def test_a_scheduler_may_be_copied_after_a_call_that_no_step_followed(sampler: str) -> None:
    pipe = pipeline(sampler)
    plain = generate(pipe)
    run = regrow.apply(pipe, REUSE)
    pipe.scheduler.set_timesteps(4)
    inputs = pipelines.unet_inputs(pipe.unet) | {"timestep": pipe.scheduler.timesteps[0]}
    with torch.no_grad():
        pipe.unet(**inputs)
    copies = [copy.copy(pipe.scheduler), copy.deepcopy(pipe.scheduler)]
    copies.append(pickle.loads(pickle.dumps(pipe.scheduler)))
    run.remove()
    for other in copies:
        assert torch.equal(generate(pipelines.sd(pipe.unet, sampler=other), num_inference_steps=4), plain)
    assert "watch" not in vars(type(pipe.scheduler).step)


def test_watches_of_two_clocks_on_one_class_are_taken_off_in_any_order() -> None:
    class Sampler(diffusers.DDIMScheduler):
        """With its step inherited."""

    ticks: list[int] = []
    for order in ((0, 1), (1, 0)):
        both = [Sampler(), Sampler()]
        watches = [StepWatch(one, lambda _, i=i: ticks.append(i)) for i, one in enumerate(both)]
        sample, noise = torch.randn(2, 1, 4, 8, 8)
        for one in both:
            one.set_timesteps(4)
        for i in order:
            both[i].step(noise, both[i].timesteps[0], sample)
        assert ticks == list(order)
        assert "step" not in vars(Sampler)
        ticks.clear()
        for i in order:
            watches[i].remove()
        assert "step" not in vars(Sampler)


def test_a_step_that_somebody_put_on_the_scheduler_is_followed() -> None:
    pipe = transformer_pipelines.flux(layers=3)
    plain = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: plain(*args, **kwargs)
    with regrow.apply(pipe, regrow.FORA(interval=2)) as run:
        transformer_pipelines.generate(pipe, num_inference_steps=4)
        assert {r.depth for r in records(run)} == {FULL, LAYERS}


def test_a_pipelines_options_of_step_still_reach_it(pipe: Any) -> None:
    plain = generate(pipe, eta=0.0)
    noisy = generate(pipe, eta=1.0)
    assert not torch.equal(plain, noisy)
    with pytest.warns(UserWarning, match="prunes nothing"), regrow.apply(pipe, regrow.SiTo(ratio=0)):
        assert torch.equal(generate(pipe, eta=1.0), noisy)


def loop(denoiser: Any, sampler: Any, texts: list[Tensor], steps: int, after: Callable[[], None]) -> Tensor:
    """A hand-written sampler that calls the U-Net once for each text; guidance if there are two."""
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sampler.set_timesteps(steps)
    for t in sampler.timesteps:
        scaled = sampler.scale_model_input(latents, t)
        with torch.no_grad():
            outputs = [denoiser(scaled, t, encoder_hidden_states=text).sample for text in texts]
        noise = outputs[0]
        if len(outputs) == 2:
            noise = outputs[0] + 5 * (outputs[1] - outputs[0])
        latents = sampler.step(noise, t, latents).prev_sample
        after()
    return latents


@pytest.fixture
def texts() -> list[Tensor]:
    return list(torch.randn(2, 1, 7, pipelines.TEXT, generator=torch.Generator().manual_seed(1)))


NO_CHANCE = regrow.DaTo(
    schedule=regrow.Schedule(depth=(FULL, 1, FULL, 1, 0, FULL), ratio=(0.0, 0.0, 0.5, 0.5, 0.5, 0.5))
)


def test_separate_guidance_calls_each_have_their_own_memory(texts: list[Tensor]) -> None:
    """The two branches side by side are what each would be alone on the same latents."""
    pipe = small()
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {0: [], 1: []}

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        branch = 0 if kwargs["encoder_hidden_states"] is texts[0] else 1
        seen[branch].append((args[0].clone(), output.sample.clone()))

    handle = pipe.unet.register_forward_hook(watch, with_kwargs=True)
    with regrow.apply(pipe, NO_CHANCE) as run:
        loop(pipe.unet, pipe.scheduler, texts, 6, lambda: None)
        assert places(run) == [(i, b) for i in range(6) for b in range(2)]
        assert depths(run)[::2] == depths(run)[1::2] == list(NO_CHANCE.schedule.depth)
    handle.remove()
    with regrow.apply(pipe.unet, NO_CHANCE) as run:
        for branch, text in enumerate(texts):
            with run.generation(6) as clock:
                for t, (latents, expected) in zip(pipe.scheduler.timesteps, seen[branch], strict=True):
                    with torch.no_grad():
                        output = pipe.unet(latents, t, encoder_hidden_states=text).sample
                    assert torch.equal(output, expected)
                    clock.step()


def test_a_generation_stepped_by_hand_equals_the_pipelines_own(pipe: Any) -> None:
    """The pipeline's loop written out, on a bare U-Net with `Run.generation`."""
    with regrow.apply(pipe, REUSE):
        expected = generate(pipe, num_inference_steps=6)
    embeds = torch.cat(pipe.encode_prompt("a penguin", "cpu", 1, True, "")[::-1])
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(6)
    with regrow.apply(pipe.unet, REUSE) as run, run.generation(6) as clock, torch.no_grad():
        for t in pipe.scheduler.timesteps:
            both = pipe.unet(torch.cat([latents] * 2), t, encoder_hidden_states=embeds).sample
            unconditional, conditional = both.chunk(2)
            noise = unconditional + 5 * (conditional - unconditional)
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
            clock.step()
        assert places(run) == [(i, 0) for i in range(6)]
    assert torch.equal(latents, expected)


def test_a_bare_unet_with_its_scheduler_needs_no_generation_by_hand(texts: list[Tensor]) -> None:
    pipe = small()
    with regrow.apply(pipe.unet, REUSE) as run, run.generation(6) as clock:
        expected = loop(pipe.unet, pipe.scheduler, texts[:1], 6, clock.step)
    with regrow.apply(pipe.unet, REUSE, scheduler=pipe.scheduler) as run:
        assert torch.equal(loop(pipe.unet, pipe.scheduler, texts[:1], 6, lambda: None), expected)
        assert places(run) == [(i, 0) for i in range(6)]


def test_timesteps_as_plain_numbers_are_found_by_value(texts: list[Tensor]) -> None:
    pipe = small()

    def by_number(x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        return pipe.unet(x, int(t), **kwargs)

    with regrow.apply(pipe, REUSE) as run:
        expected = loop(pipe.unet, pipe.scheduler, texts, 6, lambda: None)
        assert torch.equal(loop(by_number, pipe.scheduler, texts, 6, lambda: None), expected)
        assert places(run) == [(i, b) for i in range(6) for b in range(2)]


@pytest.mark.parametrize("steps", [0, -1])
def test_a_generation_without_steps_is_refused(pipe: Any, steps: int) -> None:
    with (
        regrow.apply(pipe.unet, REUSE) as run,
        pytest.raises(ValueError, match=f"num_steps: {steps} .*>= 1"),
        run.generation(steps),
    ):
        pass


def foreign(seen: list[warnings.WarningMessage], text: str = "computed in full") -> list[str]:
    return [str(w.message) for w in seen if text in str(w.message)]


@pytest.mark.parametrize("method", [PRUNE, REUSE], ids=["sito", "dato"])
def test_a_bare_unet_outside_a_generation_is_computed_in_full_and_warns_once(
    pipe: Any, method: Any
) -> None:
    inputs = pipelines.unet_inputs(pipe.unet)
    with torch.no_grad():
        expected = pipe.unet(**inputs).sample
        with regrow.apply(pipe.unet, method), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(3):
                assert torch.equal(pipe.unet(**inputs).sample, expected)
    assert len(foreign(seen, "outside run.generation(num_steps)")) == 1


@pytest.mark.parametrize("method", [PRUNE, REUSE], ids=["sito", "dato"])
@pytest.mark.parametrize("when", ["before", "after", "interrupted"])
def test_calls_outside_the_pipelines_generations_are_full_and_warn_once(
    pipe: Any, method: Any, when: str
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    inputs = pipelines.unet_inputs(pipe.unet)
    twin = twin_of(pipe.unet)
    with torch.no_grad(), regrow.apply(pipe, method), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if when == "after":
            generate(pipe)
        if when == "interrupted":
            with pytest.raises(KeyboardInterrupt):
                generate(pipe, callback_on_step_end=stop)
        for timestep in (500, 981, 502, 3):
            inputs["timestep"] = torch.tensor(timestep)
            assert torch.equal(pipe.unet(**inputs).sample, twin(**inputs).sample)
    assert len(foreign(seen)) == 1


def twin_of(denoiser: Any) -> Any:
    """An unaccelerated twin."""
    twin = type(denoiser).from_config(denoiser.config).eval()
    twin.load_state_dict(denoiser.state_dict())
    return twin


@pytest.mark.parametrize(
    ("method", "sampler", "when"),
    [
        (PRUNE, "ddim", "before"),
        (PRUNE, "ddim", "interrupted same steps"),
        (REUSE, "euler", "after"),
        (REUSE, "euler", "interrupted"),
        *((REUSE, "heun", when) for when in ("after", "interrupted", "interrupted same steps")),
    ],
)
def test_a_second_pipeline_with_a_scheduler_of_its_own_is_not_accelerated(
    pipe: Any, method: Any, sampler: str, when: str
) -> None:
    def stop(_: Any, step: int, *__: Any) -> Any:
        if step == 1:
            raise KeyboardInterrupt
        return {}

    pipe.scheduler = SAMPLERS[sampler]()
    other = pipelines.sd(pipe.unet, sampler=SAMPLERS[sampler]())
    steps = 4 if when == "interrupted same steps" else 3
    expected = generate(other, num_inference_steps=steps)
    with regrow.apply(pipe, method) as run, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        accelerated = None
        if when != "before":
            accelerated = generate(pipe)
        if when.startswith("interrupted"):
            with pytest.raises(KeyboardInterrupt):
                generate(pipe, callback_on_step_end=stop)
        assert torch.equal(generate(other, num_inference_steps=steps), expected)
        assert "step" not in other.scheduler.__dict__
        again = generate(pipe)
        assert accelerated is None or torch.equal(again, accelerated)
        assert places(run)[0] == (0, 0)
    assert len(foreign(seen)) == 1


def test_another_pipeline_in_the_middle_does_not_disturb_a_generation(pipe: Any) -> None:
    other = pipelines.sd(pipe.unet)
    plain = generate(other, num_inference_steps=2)

    def cut_in(_: Any, step: int, *__: Any) -> dict[str, Any]:
        if step == 1:
            assert torch.equal(generate(other, num_inference_steps=2), plain)
        return {}

    with regrow.apply(pipe, REUSE):
        expected = generate(pipe)
        with pytest.warns(UserWarning, match="computed in full"):
            again = generate(pipe, callback_on_step_end=cut_in)
    assert torch.equal(again, expected)


def test_no_warning_is_given_in_ordinary_use(pipe: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with regrow.apply(pipe, REUSE):
            generate(pipe, num_inference_steps=10)
            generate(pipe, num_inference_steps=5)


def test_a_schedule_resampled_to_less_than_half_says_so_once(pipe: Any) -> None:
    with regrow.apply(pipe, REUSE), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for steps in (5, 4, 3):
            generate(pipe, num_inference_steps=steps)
    assert len(foreign(seen, "is for 10 calls and is resampled to 4")) == 1
    assert not foreign(seen, "resampled to 3")


def test_schedulers_without_step_are_refused(pipe: Any) -> None:
    with pytest.raises(TypeError, match=r"scheduler: Linear has no step"):
        regrow.apply(pipe.unet, REUSE, scheduler=torch.nn.Linear(1, 1))
    inputs = pipelines.unet_inputs(pipe.unet)
    with torch.no_grad():
        assert torch.equal(pipe.unet(**inputs).sample, twin_of(pipe.unet)(**inputs).sample)


@pytest.mark.parametrize("method", [PRUNE, REUSE], ids=["sito", "dato"])
def test_a_generation_before_apply_does_not_let_another_pipeline_in(pipe: Any, method: Any) -> None:
    other = pipelines.sd(pipe.unet)
    expected = generate(other)
    generate(pipe)
    with regrow.apply(pipe, method) as run:
        with pytest.warns(UserWarning, match="computed in full"):
            assert torch.equal(generate(other), expected)
        generate(pipe)
        assert places(run) == [(i, 0) for i in range(4)]


def test_a_loop_whose_timesteps_were_set_before_apply_is_followed(texts: list[Tensor]) -> None:
    pipe = small()
    pipe.scheduler.set_timesteps(6)
    timesteps = pipe.scheduler.timesteps
    for convert in (lambda t: t, int, lambda t: t.clone()):
        with regrow.apply(pipe, REUSE) as run, torch.no_grad():
            latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
            for t in timesteps:
                noise = pipe.unet(latents, convert(t), encoder_hidden_states=texts[0]).sample
                latents = pipe.scheduler.step(noise, t, latents).prev_sample
            assert places(run) == [(i, 0) for i in range(6)]


@pytest.mark.parametrize("steps", [2, 6])
def test_timesteps_may_be_elements_of_a_tensor_made_for_the_step(texts: list[Tensor], steps: int) -> None:
    pipe = small()
    with regrow.apply(pipe, REUSE) as run, torch.no_grad():
        pipe.scheduler.set_timesteps(steps)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        for t in pipe.scheduler.timesteps:
            both = torch.stack([t, t])
            noise = pipe.unet(latents, both[:1], encoder_hidden_states=texts[0]).sample
            noise = noise + pipe.unet(latents, both[1:], encoder_hidden_states=texts[1]).sample
            latents = pipe.scheduler.step(noise / 2, t, latents).prev_sample
    assert places(run) == [(i, b) for i in range(steps) for b in range(2)]


def test_a_loop_over_a_copy_of_the_timesteps_is_followed(texts: list[Tensor]) -> None:
    pipe = small()
    with regrow.apply(pipe, REUSE) as run, torch.no_grad():
        pipe.scheduler.set_timesteps(6)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        for t in pipe.scheduler.timesteps.clone():
            noise = pipe.unet(latents, t, encoder_hidden_states=texts[0]).sample
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
    assert places(run) == [(i, 0) for i in range(6)]


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_runs_on_one_scheduler_leave_it_as_it_was(first_out: int) -> None:
    """As a base and a refiner that share their scheduler, in either order of removal."""
    pipes = [small(), pipelines.sd(pipelines.sd1_unet(seed=5, layers_per_block=1))]
    pipes[1].scheduler = pipes[0].scheduler
    runs = [regrow.apply(pipe, REUSE) for pipe in pipes]
    expected = [generate(pipe) for pipe in pipes]
    runs[first_out].remove()
    left = 1 - first_out
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(generate(pipes[left]), expected[left])
    assert len(records(runs[left])) == 4
    runs[left].remove()
    assert "step" not in pipes[0].scheduler.__dict__


def test_the_state_of_a_scheduler_can_be_copied_and_put_back(pipe: Any) -> None:
    """As panorama pipelines do for each view."""
    with regrow.apply(pipe, REUSE) as run:
        expected = generate(pipe)
        state = copy.deepcopy(pipe.scheduler.__dict__)
        pipe.scheduler.__dict__.update(state)
        assert torch.equal(generate(pipe), expected)
        assert len(records(run)) == 4
    assert "step" not in pipe.scheduler.__dict__
