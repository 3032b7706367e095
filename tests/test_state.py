"""What is cached belongs to one generation and never reaches another."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pipelines
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from pipelines import generate
from rows import rows_of
from torch import Tensor

import regrow
from regrow import FULL

METHODS = {
    "sito": regrow.SiTo(ratio=0.6),
    "dato": regrow.DaTo(schedule=regrow.Schedule(depth=(FULL, 1, 2, FULL, 0, 1), ratio=(0.5,) * 6)),
    "deepcache+tome": regrow.Combined(
        caching=regrow.DeepCache(interval=2, branch=1), tokens=regrow.ToMeSD(ratio=0.5)
    ),
}
CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "size": {"height": 96, "width": 64},
    "portrait": {"height": 64, "width": 96},
    "levels of odd size": {"height": 72, "width": 56},
    "batch": {"prompt": ["a penguin", "a pizza"]},
    "images per prompt": {"num_images_per_prompt": 3},
    "unguided": {"guidance_scale": 1.0},
    "steps": {"num_inference_steps": 7},
    "seed": {"seed": 1},
}


MADE: dict[tuple[Any, str], Tensor] = {}


def fresh(config: Any, **changes: Any) -> Tensor:
    """What a pipeline that never did anything else makes. Not to be written to."""
    key = config, repr(changes)
    if key not in MADE:
        pipe = pipelines.sd()
        with regrow.apply(pipe, config):
            MADE[key] = generate(pipe, **changes)
    return MADE[key]


def slots(run: regrow.Run) -> Any:
    return run._engine.generation.slots


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_a_second_generation_is_as_if_it_were_the_first(pipe: Any, config: Any) -> None:
    """Each change follows another, and at the end comes the first generation again."""
    with regrow.apply(pipe, config):
        for name, change in (*CHANGES.items(), ("the first", {})):
            assert torch.equal(generate(pipe, **change), fresh(config, **change)), name


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_sizes_and_batches_give_pictures_of_their_shape(pipe: Any, config: Any) -> None:
    with regrow.apply(pipe, config):
        images = generate(pipe, num_images_per_prompt=2, height=64, width=96, output_type="np")
    assert images.shape == (2, 64, 96, 3)


class StopError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_an_exception_between_steps_leaves_nothing_behind(pipe: Any, config: Any, after: int) -> None:
    def stop(_: Any, step: int, *__: Any) -> dict[str, Any]:
        if step == after:
            raise StopError
        return {}

    with regrow.apply(pipe, config):
        with pytest.raises(StopError):
            generate(pipe, seed=3, callback_on_step_end=stop)
        assert torch.equal(generate(pipe), fresh(config))


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_an_interrupted_generation_leaves_nothing_behind(pipe: Any, config: Any) -> None:
    def interrupt(pipeline: Any, step: int, *_: Any) -> dict[str, Any]:
        pipeline._interrupt = step == 1
        return {}

    with regrow.apply(pipe, config):
        generate(pipe, seed=3, callback_on_step_end=interrupt)
        assert torch.equal(generate(pipe), fresh(config))


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
def test_pipelines_that_share_all_components_do_not_share_a_generation(
    pipe: Any, config: Any, kind: str
) -> None:
    cls = {
        "img2img": StableDiffusionImg2ImgPipeline,
        "inpaint": StableDiffusionInpaintPipeline,
    }[kind]
    other = pipelines.quiet(cls(**pipe.components, requires_safety_checker=False))
    alone = pipelines.make(kind)
    with regrow.apply(alone, config):
        expected = generate(alone, kind=kind)
    with regrow.apply(pipe, config):
        first = generate(pipe)
        assert torch.equal(generate(other, kind=kind), expected)
        assert torch.equal(generate(pipe), first)
        generate(pipe, callback_on_step_end=lambda p, *_: setattr(p, "_interrupt", True) or {})
        assert torch.equal(generate(other, kind=kind), expected)


def test_cached_tensors_are_released_at_the_end(pipe: Any) -> None:
    held = []

    def look(_: Any, step: int, *__: Any) -> dict[str, Any]:
        held.append(sum(len(s.store) + len(s.outputs) for s in slots(run).values()))
        return {}

    with regrow.apply(pipe, METHODS["dato"]) as run:
        generate(pipe, num_inference_steps=6, callback_on_step_end=look)
        assert min(held[:-1]) > 0
        assert not slots(run)
        assert len(run._engine.generation.records) == 6


def test_cached_tensors_of_an_interrupted_run_are_released_by_remove(pipe: Any) -> None:
    def stop(*_: Any) -> Any:
        raise StopError

    with regrow.apply(pipe, METHODS["dato"]) as run, pytest.raises(StopError):
        generate(pipe, callback_on_step_end=stop)
    assert not slots(run)


def test_nothing_is_cached_that_the_schedule_does_not_use(pipe: Any) -> None:
    held = []

    def look(*_: Any) -> dict[str, Any]:
        held.extend(len(s.store) + len(s.outputs) for s in slots(run).values())
        return {}

    with regrow.apply(pipe, METHODS["sito"]) as run:
        generate(pipe, callback_on_step_end=look)
    assert held == [0] * len(held)


def test_a_batch_that_changes_in_mid_generation_is_computed_in_full(pipe: Any) -> None:
    """Guidance may be switched off half way, as a callback does that lowers the guidance scale."""

    def unguide(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipeline._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    schedule = regrow.Schedule(depth=(FULL, 1, 1, 1), ratio=(0.0,) * 4)
    options = {
        "callback_on_step_end": unguide,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    with regrow.apply(pipe, regrow.DaTo(schedule=schedule)) as run:
        assert generate(pipe, **options).isfinite().all()
        calls = rows_of(run)
    assert [c.depth for c in calls] == ["full", "1", "full", "1"]
    assert [c.planned for c in calls] == ["full", "1", "1", "1"]


def in_a_thread(work: Callable[[], Tensor]) -> Any:
    """What another thread makes, or the exception it ends with."""
    out: list[Any] = []

    def run() -> None:
        torch.set_num_threads(1)
        try:
            out.append(work())
        except Exception as error:
            out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return out[0]


def sharing(pipe: Any) -> Any:
    """A pipeline with the same U-Net and scheduler; tokenizers don't serve two threads at once."""
    return pipelines.sd(pipe.unet, sampler=pipe.scheduler)


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_two_threads_at_once_give_a_right_picture_or_a_clear_error(pipe: Any, config: Any) -> None:
    """Right is also a picture computed in full: what a call outside the generation gets."""
    right = {seed: (fresh(config, seed=seed), generate(pipe, seed=seed)) for seed in range(2)}
    pipes = (pipe, sharing(pipe))
    results: dict[int, Any] = {}
    together = threading.Barrier(2)

    def work(seed: int) -> None:
        torch.set_num_threads(1)
        together.wait()
        try:
            results[seed] = generate(pipes[seed], seed=seed)
        except Exception as error:
            results[seed] = error

    with regrow.apply(pipe, config), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for seed, result in results.items():
            if isinstance(result, Tensor):
                assert any(torch.equal(result, r) for r in right[seed])
            else:
                assert isinstance(result, regrow.ConcurrentGenerationError)
        assert torch.equal(generate(pipe), right[0][0])


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_a_generation_begun_while_another_thread_is_inside_is_refused(pipe: Any, config: Any) -> None:
    """The second thread has set the scheduler's timesteps by then; the first goes on undisturbed."""
    expected = fresh(config)
    other = sharing(pipe)
    results: list[Any] = []

    def cut_in(*_: Any) -> None:
        if len(results) < 2:
            results.append(None)
            if len(results) == 2:
                results[1] = in_a_thread(lambda: generate(other, seed=1))

    pipe.unet.conv_in.register_forward_pre_hook(cut_in)
    with regrow.apply(pipe, config):
        assert torch.equal(generate(pipe), expected)
        assert isinstance(results[1], regrow.ConcurrentGenerationError)
        assert torch.equal(generate(pipe), expected)


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_a_generation_of_another_thread_between_two_calls_mixes_with_nothing(
    pipe: Any, config: Any
) -> None:
    """Either goes wrong by a clear error only."""
    expected = {seed: fresh(config, seed=seed) for seed in range(2)}
    other = sharing(pipe)
    results: dict[int, Any] = {}

    def cut_in(_: Any, step: int, *__: Any) -> dict[str, Any]:
        if step == 1:
            results[1] = in_a_thread(lambda: generate(other, seed=1))
        return {}

    with regrow.apply(pipe, config):
        try:
            results[0] = generate(pipe, callback_on_step_end=cut_in)
        except regrow.ConcurrentGenerationError as error:
            results[0] = error
        for seed, result in results.items():
            if isinstance(result, Tensor):
                assert torch.equal(result, expected[seed])
            else:
                assert isinstance(result, regrow.ConcurrentGenerationError)
        assert any(isinstance(r, Tensor) for r in results.values())
        assert torch.equal(generate(pipe), expected[0])


def test_a_call_while_another_thread_is_inside_is_refused(pipe: Any) -> None:
    inputs = pipelines.unet_inputs(pipe.unet)
    expected = fresh(METHODS["dato"])
    errors: list[Exception] = []

    def intrude() -> None:
        try:
            with torch.no_grad():
                pipe.unet(**inputs)
        except Exception as error:
            errors.append(error)

    def in_the_middle(*_: Any) -> None:
        if not errors:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

    pipe.unet.conv_in.register_forward_pre_hook(in_the_middle)
    with regrow.apply(pipe, METHODS["dato"]):
        assert torch.equal(generate(pipe), expected)
    assert len(errors) == 1
    assert isinstance(errors[0], regrow.ConcurrentGenerationError)
    assert "another thread" in str(errors[0])


def test_generations_one_after_another_may_come_from_different_threads(pipe: Any) -> None:
    expected = fresh(METHODS["dato"])
    results = []
    with regrow.apply(pipe, METHODS["dato"]):
        for _ in range(2):
            thread = threading.Thread(target=lambda: results.append(generate(pipe)))
            thread.start()
            thread.join()
    assert all(torch.equal(r, expected) for r in results)
    assert len(results) == 2


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_it_steps_aside_while_gradients_are_recorded(pipe: Any, config: Any) -> None:
    inputs = pipelines.unet_inputs(pipe.unet)
    expected = pipe.unet(**inputs).sample
    (expected.square().mean()).backward()
    gradient = pipe.unet.conv_in.weight.grad.clone()
    pipe.unet.zero_grad()
    with regrow.apply(pipe, config):
        with pytest.warns(UserWarning, match="steps aside while gradients"):
            output = pipe.unet(**inputs).sample
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            pipe.unet(**inputs)
        output.square().mean().backward()
    assert torch.equal(output, expected)
    assert torch.equal(pipe.unet.conv_in.weight.grad, gradient)


def test_reporting_before_any_generation_is_refused(pipe: Any) -> None:
    with (
        regrow.apply(pipe, METHODS["sito"]) as run,
        pytest.raises(RuntimeError, match="no generation"),
    ):
        run.report()


def test_an_interrupt_inside_the_denoiser_shuts_nobody_out(pipe: Any) -> None:
    expected = fresh(METHODS["dato"])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with regrow.apply(pipe, METHODS["dato"]) as run:
        generate(pipe)
        hook = pipe.unet.mid_block.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe)
        hook.remove()
        assert torch.equal(in_a_thread(lambda: generate(pipe)), expected)
        assert torch.equal(generate(pipe), expected)
        hook = pipe.unet.mid_block.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe)
        hook.remove()
    assert run._engine.call is None
    assert not slots(run)


def test_guidance_of_a_pipeline_that_shares_the_run_is_seen(pipe: Any) -> None:
    """Whether a batch is guided is a property of the batch, not of the pipeline of `apply`."""
    other = sharing(pipe)
    expected = fresh(METHODS["dato"])
    with regrow.apply(pipe, METHODS["dato"]) as run:
        generate(pipe, guidance_scale=1.0)
        assert torch.equal(generate(other), expected)
        generate(pipe, guidance_scale=1.0)

        def look(*_: Any) -> dict[str, Any]:
            # What is cached is dropped with the last step.
            guided.extend(slot.guided for slot in slots(run).values())
            return {}

        guided: list[bool] = []
        generate(other, callback_on_step_end=look)
    assert guided == [True] * 3
