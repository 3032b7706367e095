"""A cached call is the last layers of the up path on what they would read from the last full call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pipelines
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import apply_freeu
from pipelines import CROSS_DOWN, CROSS_UP, PLAIN_DOWN, PLAIN_UP, sd1_unet, sdxl_unet, unet
from rows import rows_of
from torch import Tensor

import regrow
from regrow import FULL

UNETS: dict[str, Callable[[], UNet2DConditionModel]] = {
    "sd1": sd1_unet,
    "sdxl": sdxl_unet,
    "one-layer-a-block": lambda: unet(
        layers_per_block=1,
        block_out_channels=(16, 16, 32),
        down_block_types=(CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN),
        up_block_types=(PLAIN_UP, CROSS_UP, CROSS_UP),
    ),
    "layers-differ": lambda: unet(layers_per_block=(1, 2)),
    "without-middle": lambda: unet(mid_block_type=None),
    "nine-channels": lambda: unet(in_channels=9),
}
DEPTHS = {
    "sd1": range(1, 12),
    "sdxl": range(1, 6),
    "one-layer-a-block": range(1, 6),
    "layers-differ": range(1, 5),
    "without-middle": range(1, 4),
    "nine-channels": range(1, 4),
}


class Plain:
    """A U-Net's own modules called one after another, on as much of the two paths as is asked for."""

    def __init__(self, model: UNet2DConditionModel) -> None:
        self.model = copy.deepcopy(model)
        self.up = [(block, i) for block in self.model.up_blocks for i in range(len(block.resnets))]

    def embeddings(self, sample: Tensor, timestep: Tensor, text: Tensor, added: Any) -> Tensor:
        m = self.model
        emb = m.time_embedding(m.get_time_embed(sample=sample, timestep=timestep))
        extra = m.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
        return emb if extra is None else emb + extra

    def skips(
        self, sample: Tensor, emb: Tensor, text: Tensor, units: int, intrablock: Any, outside: Any
    ) -> list[Tensor]:
        """The outputs of the first units of the down path."""
        x = self.model.conv_in(sample)
        out = [x]
        for b, block in enumerate(self.model.down_blocks):
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            for i, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
                x = resnet(x, emb)
                if attention is not None:
                    x = attention(x, encoder_hidden_states=text).sample
                    if intrablock is not None and i == len(block.resnets) - 1:
                        x = x + intrablock[b]
                out.append(x)
            for module in block.downsamplers or []:
                x = module(x)
                out.append(x)
            if intrablock is not None and not hasattr(block, "attentions"):
                x = out[-1] = x + intrablock[b]
        out = out[:units]
        return out if outside is None else [s + r for s, r in zip(out, outside, strict=False)]

    def __call__(
        self,
        depth: int,
        feature: Tensor,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Any = None,
        down_intrablock_additional_residuals: Any = None,
        down_block_additional_residuals: Any = None,
        mid_block_additional_residual: Any = None,
    ) -> Tensor:
        """The output of the last ``depth`` layers on ``feature``."""
        text = encoder_hidden_states
        emb = self.embeddings(sample, timestep, text, added_cond_kwargs)
        skips = self.skips(
            sample,
            emb,
            text,
            depth,
            down_intrablock_additional_residuals,
            down_block_additional_residuals,
        )
        x = feature
        for block, i in self.up[-depth:]:
            skip = skips.pop()
            if getattr(block, "b1", None):
                x, skip = apply_freeu(
                    block.resolution_idx,
                    x.clone(),
                    skip.clone(),
                    s1=block.s1,
                    s2=block.s2,
                    b1=block.b1,
                    b2=block.b2,
                )
            x = block.resnets[i](torch.cat([x, skip], dim=1), emb)
            if hasattr(block, "attentions"):
                x = block.attentions[i](x, encoder_hidden_states=text).sample
            if i == len(block.resnets) - 1:
                for module in block.upsamplers or []:
                    x = module(x, skips[-1].shape[-2:])
        m = self.model
        return m.conv_out(m.conv_act(m.conv_norm_out(x)))

    @torch.no_grad()
    def features(self, inputs: dict[str, Any]) -> dict[int, Tensor]:
        """By depth, what that layer from the end reads from below in a full call."""
        seen: dict[int, Tensor] = {}
        handles = []
        for depth in range(1, len(self.up)):
            block, i = self.up[-depth]
            if i == 0:
                # The block's input, before FreeU changes it in place.
                before, watch = block, read_input(seen, depth)
                handles.append(before.register_forward_pre_hook(watch, with_kwargs=True))
            else:
                before, watch = getattr(block, "attentions", block.resnets)[i - 1], read_output(seen, depth)
                handles.append(before.register_forward_hook(watch))
        self.model(**fresh(inputs))
        for handle in handles:
            handle.remove()
        return seen


def read_input(seen: dict[int, Tensor], depth: int) -> Callable[..., None]:
    def watch(_: Any, args: Any, kwargs: Any) -> None:
        seen[depth] = kwargs["hidden_states"].clone()

    return watch


def read_output(seen: dict[int, Tensor], depth: int) -> Callable[..., None]:
    def watch(_: Any, args: Any, out: Any) -> None:
        seen[depth] = (out if isinstance(out, Tensor) else out[0]).clone()

    return watch


def fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs again; U-Nets pop from the list of T2I-Adapter residuals and add in place."""
    return {k: copy.deepcopy(v) for k, v in inputs.items()}


def plan(*depths: int) -> regrow.DaTo:
    return regrow.DaTo(schedule=regrow.Schedule(depth=depths, ratio=(0.0,) * len(depths)))


@torch.no_grad()
def calls(model: UNet2DConditionModel, depths: list[int], inputs: list[Any]) -> list[Tensor]:
    """The outputs of a generation of these depths."""
    outputs = []
    with regrow.apply(model, plan(*depths)) as run, run.generation(len(depths)) as clock:
        for one in inputs:
            outputs.append(model(**fresh(one)).sample.clone())
            clock.step()
    return outputs


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_report_tells_the_depth_of_every_call() -> None:
    model = unet()
    inputs = pipelines.unet_inputs(model)
    with regrow.apply(model, plan(FULL, 0, 2, 99, 1)) as run, run.generation(5) as clock:
        for _ in range(5):
            with torch.no_grad():
                model(**inputs)
            clock.step()
        calls = run.report().calls
    assert [c.depth for c in calls] == ["full", "0", "2", "full", "1"]
    assert calls[1].macs < calls[1].full_macs / 1000
    assert calls[0].macs == calls[0].full_macs > calls[2].macs > calls[4].macs > 0


def two_inputs(model: UNet2DConditionModel, **changes: Any) -> list[dict[str, Any]]:
    return [
        pipelines.unet_inputs(model, seed=seed, timestep=700 - 100 * seed, **changes) for seed in range(2)
    ]


SIZES = [*((name, (15, 19)) for name in UNETS), ("sdxl", (16, 16)), ("layers-differ", (24, 16))]


@pytest.mark.parametrize(("name", "size"), SIZES, ids=[f"{name}-{w}x{h}" for name, (w, h) in SIZES])
def test_a_cached_call_is_the_plain_computation(name: str, size: tuple[int, int]) -> None:
    model = UNETS[name]()
    old, new = two_inputs(model, height=size[0], width=size[1])
    plain = Plain(model)
    with torch.no_grad():
        whole, other = model(**old).sample, model(**new).sample
    features = plain.features(old)
    for depth in DEPTHS[name]:
        full, cached = calls(model, [FULL, depth], [old, new])
        assert torch.equal(full, whole), depth
        with torch.no_grad():
            assert_near(cached, plain(depth, features[depth], **new))
        assert not torch.allclose(cached, other, atol=1e-4), depth


@pytest.mark.parametrize("name", UNETS)
def test_a_cached_call_on_the_same_inputs_is_the_full_call(name: str) -> None:
    model = UNETS[name]()
    inputs = pipelines.unet_inputs(model)
    depths = [FULL, *DEPTHS[name]]
    full, *cached = calls(model, depths, [inputs] * len(depths))
    for output in cached:
        assert_near(output, full)


@pytest.mark.parametrize("name", UNETS)
def test_every_depth_at_or_above_the_models_is_a_full_call(name: str) -> None:
    model = UNETS[name]()
    depths = len(Plain(model).up)
    old, new = two_inputs(model)
    with torch.no_grad():
        expected = model(**new).sample
    for depth in (depths, 99):
        with pytest.warns(UserWarning, match="prunes nothing and reuses nothing"):
            run = regrow.apply(model, plan(FULL, depth))
        with run, run.generation(2) as clock, torch.no_grad():
            model(**old)
            clock.step()
            assert torch.equal(model(**new).sample, expected)


@pytest.mark.parametrize("last", [FULL, 1, 2], ids=["full", "depth-1", "depth-2"])
def test_depth_0_is_the_last_output_whole(last: int) -> None:
    model = sd1_unet()
    old, new = two_inputs(model)
    other = pipelines.unet_inputs(model, seed=5)
    outputs = calls(model, [FULL, last, 0, 0], [old, new, other, other])
    assert torch.equal(outputs[2], outputs[1])
    assert torch.equal(outputs[3], outputs[1])


@pytest.mark.parametrize("return_dict", [True, False])
def test_depth_0_is_not_changed_by_who_writes_to_an_output(return_dict: bool) -> None:
    model = sd1_unet()
    inputs = pipelines.unet_inputs(model) | {"return_dict": return_dict}
    with regrow.apply(model, plan(FULL, 0, 0)) as run, run.generation(3) as clock:
        seen = []
        for _ in range(3):
            with torch.no_grad():
                output = model(**inputs)[0]
            seen.append(output.clone())
            output.zero_()
            clock.step()
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_features_are_those_of_the_last_full_call_alone() -> None:
    model = sd1_unet()
    inputs = [pipelines.unet_inputs(model, seed=s, timestep=900 - 100 * s) for s in range(5)]
    depths = [FULL, 5, 2, FULL, 2]
    outputs = calls(model, depths, inputs)
    plain = Plain(model)
    with torch.no_grad():
        for call, source in ((1, 0), (2, 0), (4, 3)):
            feature = plain.features(inputs[source])[depths[call]]
            assert_near(outputs[call], plain(depths[call], feature, **inputs[call]))


def test_all_depths_in_one_run_share_one_full_call() -> None:
    model = sd1_unet()
    old, new = two_inputs(model)
    depths = [FULL, *range(11, 0, -1)]
    outputs = calls(model, depths, [old] + [new] * 11)
    plain = Plain(model)
    features = plain.features(old)
    with torch.no_grad():
        for depth, output in zip(depths[1:], outputs[1:], strict=True):
            assert_near(output, plain(depth, features[depth], **new))


def test_nothing_but_the_layers_asked_for_runs() -> None:
    model = sd1_unet()
    ran: list[str] = []
    watched = {
        name: module
        for name, module in model.named_modules()
        if name.split(".")[-2:-1] == ["resnets"] or name == "mid_block"
    }
    for name, module in watched.items():
        child = module.conv1 if name != "mid_block" else module.resnets[0].conv1
        child.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    old, new = two_inputs(model)
    with regrow.apply(model, plan(FULL, 1, 0)) as run, run.generation(3) as clock, torch.no_grad():
        model(**old)
        ran.clear()
        clock.step()
        model(**new)
        assert ran == ["up_blocks.3.resnets.2"]
        clock.step()
        model(**new)
        assert ran == ["up_blocks.3.resnets.2"]


def shapes_of_skips(model: UNet2DConditionModel, inputs: dict[str, Any]) -> list[Tensor]:
    plain = Plain(model)
    with torch.no_grad():
        emb = plain.embeddings(
            inputs["sample"],
            inputs["timestep"],
            inputs["encoder_hidden_states"],
            inputs.get("added_cond_kwargs"),
        )
        return plain.skips(inputs["sample"], emb, inputs["encoder_hidden_states"], 99, None, None)


def controlnet(model: UNet2DConditionModel, inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    skips = shapes_of_skips(model, inputs)
    return inputs | {
        "down_block_additional_residuals": [torch.randn_like(s) for s in skips],
        "mid_block_additional_residual": torch.randn_like(skips[-1]),
    }


def adapter(model: UNet2DConditionModel, inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """One residual a down block, of the shape of its last layer or, without attention, its output."""
    torch.manual_seed(seed)
    skips = shapes_of_skips(model, inputs)
    residuals, end = [], 0
    for block in model.down_blocks:
        end += len(block.resnets)
        layer = end
        end += len(block.downsamplers or [])
        residuals.append(torch.randn_like(skips[layer if hasattr(block, "attentions") else end]))
    return inputs | {"down_intrablock_additional_residuals": residuals}


@pytest.mark.parametrize("residuals", [controlnet, adapter])
def test_residuals_from_outside_enter_as_in_the_plain_computation(
    residuals: Callable[..., dict[str, Any]],
) -> None:
    """Of odd sizes; they come and go in those that halve evenly."""
    model = sd1_unet()
    old, new = two_inputs(model, height=15, width=19)
    old, new = residuals(model, old, 1), residuals(model, new, 2)
    plain = Plain(model)
    features = plain.features(old)
    depths = [depth for depth in DEPTHS["sd1"] for _ in range(2)]
    full, *cached = calls(model, [FULL, *depths], [old] + [new] * len(depths))
    with torch.no_grad():
        assert torch.equal(full, model(**fresh(old)).sample)
        for depth, first, second in zip(DEPTHS["sd1"], cached[::2], cached[1::2], strict=True):
            expected = plain(depth, features[depth], **fresh(new))
            assert_near(first, expected)
            assert_near(second, expected)


@pytest.mark.parametrize("residuals", [controlnet, adapter])
@pytest.mark.parametrize("name", ["sdxl", "one-layer-a-block"])
def test_residuals_may_come_and_go_within_a_generation(
    name: str, residuals: Callable[..., dict[str, Any]]
) -> None:
    model = UNETS[name]()
    old, new = two_inputs(model)
    guided = residuals(model, new, 2)
    plain = Plain(model)
    features = plain.features(old)
    depths = [depth for depth in DEPTHS[name] for _ in range(3)]
    outputs = calls(model, [FULL, *depths], [old] + [new, guided, new] * len(DEPTHS[name]))
    for i, depth in enumerate(DEPTHS[name]):
        without, with_them, again = outputs[1 + 3 * i : 4 + 3 * i]
        with torch.no_grad():
            assert_near(without, plain(depth, features[depth], **new))
            assert_near(with_them, plain(depth, features[depth], **fresh(guided)))
        assert torch.equal(again, without)


def test_freeu_does_not_corrupt_the_stored_feature() -> None:
    model = sd1_unet()
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    old, new = two_inputs(model)
    plain = Plain(model)
    features = plain.features(old)
    depths = [depth for depth in DEPTHS["sd1"] for _ in range(2)]
    full, *cached = calls(model, [FULL, *depths], [old] + [new] * len(depths))
    with torch.no_grad():
        assert torch.equal(full, model(**old).sample)
        for depth, first, second in zip(DEPTHS["sd1"], cached[::2], cached[1::2], strict=True):
            expected = plain(depth, features[depth], **new)
            assert_near(first, expected)
            assert_near(second, expected)


def test_another_batch_shape_is_computed_in_full() -> None:
    model = sd1_unet()
    old = pipelines.unet_inputs(model, batch=2)
    new = pipelines.unet_inputs(model, batch=4, seed=1)
    with torch.no_grad():
        expected = model(**new).sample
        with regrow.apply(model, plan(FULL, 1)) as run, run.generation(2) as clock:
            model(**old)
            clock.step()
            assert torch.equal(model(**new).sample, expected)
            assert [c.depth for c in rows_of(run)] == ["full", "full"]


def test_sample_may_be_positional_or_a_keyword() -> None:
    model = sd1_unet()
    old, new = two_inputs(model)
    by_name = calls(model, [FULL, 1], [old, new])[1]
    with regrow.apply(model, plan(FULL, 1)) as run, run.generation(2) as clock, torch.no_grad():
        model(old["sample"], old["timestep"], old["encoder_hidden_states"])
        clock.step()
        output = model(new["sample"], new["timestep"], new["encoder_hidden_states"]).sample
    assert torch.equal(output, by_name)


@pytest.mark.parametrize("middle", ["UNetMidBlock2D", None])
def test_a_middle_without_attention_or_none_at_all(middle: str | None) -> None:
    model = unet(mid_block_type=middle)
    old, new = two_inputs(model)
    plain = Plain(model)
    cached = calls(model, [FULL, 2], [old, new])[1]
    with torch.no_grad():
        assert_near(cached, plain(2, plain.features(old)[2], **new))
