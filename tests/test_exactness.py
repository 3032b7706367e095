"""Nothing to save is nothing changed, and taking a method off leaves no trace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pipelines
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import nn

import regrow

ALL_DEEP = regrow.Schedule(depth=(99,) * 4, ratio=(0.0,) * 4)
PRUNE = regrow.SiTo(ratio=0.5)
REUSE = regrow.DaTo(schedule=regrow.Schedule.every(2, 4, ratio=0.5))
BOTH = regrow.Combined(caching=regrow.DeepCache(interval=2), tokens=regrow.ToMeSD(ratio=0.5))

IDLE = {
    "sito-everywhere-ratio-0": regrow.SiTo(
        ratio=0, cross_attention=True, feed_forward=True, max_downsample=8
    ),
    "dato-deeper-than-the-model": regrow.DaTo(schedule=ALL_DEEP),
}


def assert_untouched(pipe: Any) -> None:
    assert_untouched_module(pipe.unet)
    assert "step" not in pipe.scheduler.__dict__


def assert_untouched_module(denoiser: nn.Module) -> None:
    for name, module in denoiser.named_modules():
        assert not {"forward", "_call_impl"} & module.__dict__.keys(), name
        assert not hasattr(module, "_diffusers_hook"), name
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks_always_called, name
        assert not module._forward_hooks_with_kwargs, name
        assert not module._forward_pre_hooks_with_kwargs, name


@pytest.mark.filterwarnings("ignore:the schedule prunes nothing")
@pytest.mark.parametrize("guidance", [5.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_nothing_to_save_is_bit_for_bit_the_plain_output(kind: str, guidance: float) -> None:
    pipe = pipelines.make(kind)
    expected = pipelines.generate(pipe, kind=kind, guidance_scale=guidance)
    for name, config in IDLE.items():
        with regrow.apply(pipe, config):
            found = pipelines.generate(pipe, kind=kind, guidance_scale=guidance)
        assert torch.equal(found, expected), name


def test_a_schedule_that_saves_nothing_warns(pipe: Any) -> None:
    with pytest.warns(UserWarning, match="prunes nothing and reuses nothing"):
        regrow.apply(pipe, regrow.SiTo(ratio=0)).remove()


def test_leaving_with_removes(pipe: Any) -> None:
    expected = pipelines.generate(pipe)
    with regrow.apply(pipe, REUSE):
        pipelines.generate(pipe)
    assert_untouched(pipe)
    assert torch.equal(pipelines.generate(pipe), expected)


def test_an_exception_inside_with_removes_and_passes_through(pipe: Any) -> None:
    expected = pipelines.generate(pipe)

    def stop(*_: Any) -> Any:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"), regrow.apply(pipe, REUSE):
        pipelines.generate(pipe, callback_on_step_end=stop)
    assert_untouched(pipe)
    assert torch.equal(pipelines.generate(pipe), expected)


def test_an_exception_inside_the_denoiser_removes_and_passes_through(pipe: Any) -> None:
    expected = pipelines.generate(pipe)
    with pytest.raises(RuntimeError), regrow.apply(pipe, REUSE):
        pipelines.generate(pipe, prompt_embeds=torch.zeros(1, 77, 3), prompt=None)
    assert_untouched(pipe)
    assert torch.equal(pipelines.generate(pipe), expected)


@pytest.mark.parametrize("config", [PRUNE, REUSE, BOTH], ids=["sito", "dato", "deepcache+tome"])
def test_deepcopy_and_pickle_work_after_removal(pipe: Any, config: Any) -> None:
    inputs = pipelines.unet_inputs(pipe.unet)
    with torch.no_grad():
        expected = pipe.unet(**inputs).sample
    with regrow.apply(pipe, config):
        pipelines.generate(pipe)
    copied = copy.deepcopy(pipe.unet)
    pickled = pickle.loads(pickle.dumps(pipe.unet))
    with torch.no_grad():
        nn.init.zeros_(pipe.unet.conv_out.weight)
        assert torch.equal(copied(**inputs).sample, expected)
        assert torch.equal(pickled(**inputs).sample, expected)


def test_removing_twice_is_allowed(pipe: Any) -> None:
    run = regrow.apply(pipe, REUSE)
    run.remove()
    run.remove()
    assert_untouched(pipe)


@pytest.mark.parametrize("again", ["pipeline", "unet", "another pipeline"])
def test_a_second_apply_is_refused_and_changes_nothing(pipe: Any, again: str) -> None:
    target = {"pipeline": pipe, "unet": pipe.unet, "another pipeline": pipelines.sd(pipe.unet)}[again]
    expected_plain = pipelines.generate(pipe)
    with regrow.apply(pipe, REUSE):
        expected = pipelines.generate(pipe)
        with pytest.raises(ValueError, match=r"applied to this denoiser already.*remove\(\)"):
            regrow.apply(target, PRUNE)
        assert torch.equal(pipelines.generate(pipe), expected)
    assert torch.equal(pipelines.generate(pipe), expected_plain)


def test_apply_after_remove_works(pipe: Any) -> None:
    with regrow.apply(pipe, REUSE):
        expected = pipelines.generate(pipe)
    with regrow.apply(pipe, PRUNE):
        assert not torch.equal(pipelines.generate(pipe), expected)
    with regrow.apply(pipe, REUSE):
        assert torch.equal(pipelines.generate(pipe), expected)


def test_hooks_that_were_there_before_stay(pipe: Any) -> None:
    seen = []
    handle = pipe.unet.register_forward_hook(lambda *_: seen.append(1))
    with regrow.apply(pipe, REUSE):
        pipelines.generate(pipe)
    pipelines.generate(pipe)
    assert len(seen) == 8
    handle.remove()
    assert_untouched(pipe)


def test_diffusers_hooks_that_were_there_before_stay(pipe: Any) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    registry = HookRegistry.check_if_exists_or_initialize(attention)
    hook = Count()
    registry.register_hook(hook, "count")
    expected = pipelines.generate(pipe)
    with regrow.apply(pipe, PRUNE):
        pipelines.generate(pipe)
    assert torch.equal(pipelines.generate(pipe), expected)
    assert hook.calls == 12
    assert list(registry.hooks) == ["count"]


def test_the_users_attention_processors_are_kept(pipe: Any) -> None:
    before = {name: id(p) for name, p in pipe.unet.attn_processors.items()}
    with regrow.apply(pipe, PRUNE):
        pipelines.generate(pipe)
    assert {name: id(p) for name, p in pipe.unet.attn_processors.items()} == before


def test_copying_an_accelerated_denoiser_is_refused_clearly(pipe: Any) -> None:
    with regrow.apply(pipe, REUSE):
        with pytest.raises(TypeError, match="remove"):
            copy.deepcopy(pipe.unet)
        with pytest.raises(TypeError, match="remove"):
            pickle.dumps(pipe.unet)


def test_a_forward_method_put_on_after_apply_is_called_and_stays(pipe: Any) -> None:
    with regrow.apply(pipe, REUSE):
        expected = pipelines.generate(pipe)
    counted = []
    run = regrow.apply(pipe, REUSE)
    module = pipe.unet.up_blocks[-1].resnets[-1]
    plain = module.forward

    def counting(*args: Any) -> Any:
        counted.append(1)
        return plain(*args)

    module.forward = counting
    assert torch.equal(pipelines.generate(pipe), expected)
    assert len(counted) == 4
    run.remove()
    assert module.forward is counting
    del module.forward
    assert_untouched(pipe)


def test_nothing_is_on_the_modules_and_the_scheduler_between_calls(pipe: Any) -> None:
    def look(*_: Any) -> dict[str, Any]:
        assert not [name for name, m in pipe.unet.named_modules() if "forward" in m.__dict__]
        assert "step" not in pipe.scheduler.__dict__
        assert pickle.loads(pickle.dumps(pipe.scheduler)).config == pipe.scheduler.config
        return {}

    with regrow.apply(pipe, REUSE) as run:
        look()
        pipelines.generate(pipe, callback_on_step_end=look)
        look()
        report = run.report()
        assert report.macs < report.full_macs


def test_an_interrupt_leaves_nothing_on_the_modules(pipe: Any) -> None:
    """An interrupt lands in the middle of a call, and others wrap the modules before the next one."""

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with regrow.apply(pipe, REUSE):
        expected = pipelines.generate(pipe)
    plain = pipelines.generate(pipe)
    run = regrow.apply(pipe, REUSE)
    hook = pipe.unet.mid_block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pipelines.generate(pipe)
    hook.remove()
    assert not [m for m in pipe.unet.modules() if "forward" in m.__dict__]
    cpu_offload(pipe.unet, torch.device("cpu"))
    assert torch.equal(pipelines.generate(pipe), expected)
    run.remove()
    assert torch.equal(pipelines.generate(pipe), plain)
    remove_hook_from_module(pipe.unet, recurse=True)
    assert torch.equal(pipelines.generate(pipe), plain)
    with regrow.apply(pipe, REUSE):
        assert torch.equal(pipelines.generate(pipe), expected)
