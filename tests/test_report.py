"""The report tells what ran: every call, what it reused, how old that was, and why it did otherwise."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pipelines
import pytest
import torch
import transformer_pipelines
from diffusers import (
    DPMSolverMultistepScheduler,
    LEditsPPPipelineStableDiffusion,
    MarigoldDepthPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionSAGPipeline,
)
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from rows import rows_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import regrow
from regrow.core.meta import meta_copy
from regrow.recover.time import FittedStep

EVERY_SECOND = regrow.DeepCache(interval=2)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def said(seen: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in seen if w.category is UserWarning]


@pytest.mark.parametrize("config", [regrow.FORA(interval=3), regrow.DeepCache(interval=3, branch=1)])
def test_nothing_is_older_than_the_plan_means_where_guidance_comes_and_goes(config: Any) -> None:
    pipe = transformer_pipelines.wan_of_texts(layers=3)

    def guide(pipeline: Any, step: int, *_: Any) -> dict[str, Any]:
        pipeline._guidance_scale = 4.0 if step + 1 >= 7 else 1.0
        return {}

    with regrow.apply(pipe, config) as run:
        pipe(
            prompt="a penguin",
            negative_prompt="a pizza",
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=9,
            guidance_scale=4.0,
            output_type="latent",
            generator=generator(),
            callback_on_step_end=guide,
        )
        rows = rows_of(run)
    assert max(c.age for c in rows) == 2
    late = [c for c in rows if c.branch == 1 and c.step == 7]
    assert [c.depth for c in late] == ["full"]
    assert "older than planned" in late[0].reason
    assert "older than planned" in str(run.report())


def by_hand(unet: Any, order: Callable[[Tensor, Tensor], tuple[Tensor, ...]], config: Any) -> Tensor:
    """A loop with two calls a step, in some order, the second half of it without guidance."""
    g = generator()
    x, positive, negative = (torch.randn(s, generator=g) for s in ((1, 4, 16, 16), (1, 7, 32), (1, 7, 32)))
    sampler = pipelines.scheduler()
    with regrow.apply(unet, config, scheduler=sampler), torch.no_grad():
        sampler.set_timesteps(8)
        for i, t in enumerate(sampler.timesteps):
            texts = order(positive, negative) if i < 3 else (positive,)
            out = [unet(x, t, encoder_hidden_states=text).sample for text in texts]
            noise = out[[torch.equal(text, positive) for text in texts].index(True)]
            if len(out) == 2:
                noise = 6 * noise - sum(out)
            x = sampler.step(noise, t, x).prev_sample
    return x


@pytest.mark.parametrize(
    "config", [EVERY_SECOND, regrow.FORA(interval=2), regrow.SiTo(ratio=0.5, base="V")]
)
def test_a_branch_is_known_by_its_text_and_not_by_its_number(config: Any) -> None:
    unet = narrow()
    first = by_hand(unet, lambda positive, negative: (negative, positive), config)
    assert torch.equal(first, by_hand(unet, lambda positive, negative: (positive, negative), config))
    # Made anew for each step, they are known by what they hold.
    copied = by_hand(unet, lambda positive, negative: (negative.clone(), positive), config)
    assert torch.equal(first, copied)


def test_another_text_is_computed_in_full(pipe: Any) -> None:
    other = torch.randn(2, 7, 32, generator=generator())

    def change(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": other} if step == 2 else {}

    with regrow.apply(pipe, regrow.DeepCache(interval=6)) as run:
        options: dict[str, Any] = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        pipelines.generate(pipe, num_inference_steps=6, callback_on_step_end=change, **options)
        rows = rows_of(run)
    assert [c.depth for c in rows] == ["full", "1", "1", "full", "1", "1"]
    assert [c.age for c in rows] == [0, 1, 2, 0, 1, 2]
    assert rows[3].reason


def test_a_panorama_reuses_in_each_of_its_views() -> None:
    pipe = pipelines.sd(pipelines.unet(layers_per_block=1))
    panorama = pipelines.quiet(
        StableDiffusionPanoramaPipeline(**pipe.components, requires_safety_checker=False)
    )
    options: dict[str, Any] = {
        "height": 64,
        "width": 640,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    with regrow.apply(panorama, EVERY_SECOND) as run, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first = panorama("a penguin", generator=generator(), **options).images
        rows = rows_of(run)
        assert [(c.step, c.depth) for c in rows] == [
            (step, depth) for step, depth in enumerate(["full", "1"] * 2) for _ in range(3)
        ]
        assert [c.branch for c in rows] == [0, 1, 2] * 4
        assert not run._engine.generation.slots  # type: ignore[union-attr]
        assert torch.equal(panorama("a penguin", generator=generator(), **options).images, first)


def test_a_loop_that_never_steps_its_scheduler_is_followed(pipe: Any) -> None:
    x, text = torch.randn(1, 4, 16, 16), torch.ones(1, 7, 32)
    with regrow.apply(pipe, EVERY_SECOND) as run, torch.no_grad():
        pipe.scheduler.set_timesteps(6)
        for t in pipe.scheduler.timesteps:
            x = x - 0.1 * pipe.unet(x, t, encoder_hidden_states=text).sample
        assert [c.depth for c in run.report().calls] == ["full", "1"] * 3


def test_a_transformer_may_be_called_by_position() -> None:
    pipe = transformer_pipelines.sd3(layers=3)
    model, sampler = pipe.transformer, pipe.scheduler
    text, pooled = torch.randn(1, 8, 64, generator=generator()), torch.ones(1, 64)

    def loop(call: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, list[str]]:
        x = torch.randn(1, 4, 16, 16, generator=generator())
        with regrow.apply(model, regrow.FORA(interval=2), scheduler=sampler) as run, torch.no_grad():
            sampler.set_timesteps(4)
            for t in sampler.timesteps:
                x = sampler.step(call(x, t.expand(1)), t, x).prev_sample
            return x, [c.depth for c in run.report().calls]

    by_position = loop(lambda x, t: model(x, text, pooled, t).sample)
    by_name = loop(
        lambda x, t: (
            model(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample
        )
    )
    assert by_position[1] == by_name[1] == ["full", "layers"] * 2
    assert torch.equal(by_position[0], by_name[0])


def sag(base: Any) -> Callable[[], Any]:
    pipe = pipelines.quiet(StableDiffusionSAGPipeline(**base.components, requires_safety_checker=False))
    options: dict[str, Any] = {"height": 64, "width": 64, "output_type": "latent", "num_inference_steps": 4}
    return lambda: pipe("a penguin", sag_scale=0.75, generator=generator(), **options).images


def ledits(base: Any) -> Callable[[], Any]:
    parts = {k: v for k, v in base.components.items() if k != "image_encoder"}
    pipe = pipelines.quiet(LEditsPPPipelineStableDiffusion(**parts, requires_safety_checker=False))
    base.scheduler = pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="sde-dpmsolver++", solver_order=2
    )
    options: dict[str, Any] = {"edit_guidance_scale": 5.0, "edit_threshold": 0.75, "output_type": "latent"}

    def edit() -> Any:
        picture = pipelines.picture()
        pipe.invert(picture, num_inversion_steps=6, skip=0.2, generator=generator(), height=64, width=64)
        return pipe(editing_prompt=["a pizza"], generator=generator(), **options).images

    return edit


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (sag, EVERY_SECOND),
        (ledits, regrow.FORA(interval=2)),
        *((make, regrow.SiTo(ratio=0.5)) for make in (sag, ledits)),
    ],
)
def test_calls_are_whole_where_somebody_reads_attention_maps(make: Any, config: Any) -> None:
    pipe = pipelines.sd(pipelines.sd1_unet(layers_per_block=1))
    edit = make(pipe)
    plain = edit()
    with regrow.apply(pipe, config) as run, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if isinstance(config, regrow.SiTo):
            # They read the middle's maps, or those of the text, and SiTo leaves both alone.
            edit()
            assert not [text for text in said(seen) if "attention maps" in text]
            return
        # Inversion reads no maps and may be accelerated.
        assert torch.equal(edit(), plain) or make is ledits
    assert len([text for text in said(seen) if "attention maps" in text]) == 1
    of_maps = [c for c in rows_of(run) if "attention maps" in c.reason]
    assert of_maps
    assert {(c.depth, c.ratio) for c in of_maps} == {("full", 0.0)}


def test_a_denoiser_swapped_after_apply_is_said(pipe: Any) -> None:
    run = regrow.apply(pipe, EVERY_SECOND)
    pipe.unet = pipelines.sd1_unet()
    pipelines.generate(pipe)
    with pytest.raises(RuntimeError, match=r"UNet2DConditionModel was replaced after regrow\.apply"):
        run.report()
    with pytest.warns(UserWarning, match=r"UNet2DConditionModel was replaced after regrow\.apply"):
        run.remove()


@pytest.mark.parametrize("config", [EVERY_SECOND, regrow.FORA(interval=3)])
@pytest.mark.parametrize("kind", ["sd1", "img2img"])
def test_a_generation_that_saved_nothing_says_so_once(config: Any, kind: str) -> None:
    pipe = pipelines.make(kind)
    short = {"num_inference_steps": 1} if kind == "sd1" else {"num_inference_steps": 6, "strength": 0.2}
    with regrow.apply(pipe, config), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            pipelines.generate(pipe, kind=kind, **short)
    assert len([text for text in said(seen) if "saved nothing: all of its 1 calls" in text]) == 1


def test_a_call_in_which_nothing_took_a_placeholders_place_is_computed_again() -> None:
    pipe = transformer_pipelines.flux(layers=4)
    plain = transformer_pipelines.generate(pipe, num_inference_steps=2)
    with regrow.apply(pipe, regrow.FORA(interval=2)) as run:
        run._installed._places["single_transformer_blocks.1.proj_out"].hooks.clear()
        with pytest.warns(UserWarning, match="is computed again, in full"):
            got = transformer_pipelines.generate(pipe, num_inference_steps=2)
        assert [c.depth for c in rows_of(run) if c.branch == 0] == ["full", "full"]
    assert torch.equal(got, plain)


def marigold() -> Any:
    base = pipelines.sd(pipelines.sd1_unet(in_channels=8, out_channels=4))
    parts = {k: base.components[k] for k in ("unet", "vae", "scheduler", "text_encoder", "tokenizer")}
    return pipelines.quiet(
        MarigoldDepthPipeline(**parts, default_denoising_steps=2, default_processing_resolution=64)
    )


def test_the_report_of_an_ensemble_covers_all_of_its_members() -> None:
    pipe = marigold()
    with regrow.apply(pipe, EVERY_SECOND) as run, torch.no_grad():
        pipe(
            pipelines.picture(), ensemble_size=3, batch_size=1, num_inference_steps=2, generator=generator()
        )
        rows = rows_of(run)
    assert [(c.step, c.depth) for c in rows] == [(0, "full"), (1, "1")] * 3


def counted(denoiser: Any, inputs: dict[str, Any]) -> int:
    """MACs of a call of a denoiser with all that is on it, by another way: on tensors with data."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta_copy(denoiser)(**{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()})
    return counter.get_total_flops() // 2


def test_adapters_and_fused_projections_are_counted() -> None:
    unet = pipelines.unet()
    inputs = pipelines.unet_inputs(unet)
    plain = counted(unet, inputs)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    added = sum(
        # Both halves, all tokens: down to rank 4, and up again.
        2 * tokens * 4 * (layer.in_features + layer.out_features)
        for name, layer in unet.named_modules()
        if name.endswith("to_q")
        for tokens in [tokens_of(name)]
    )
    assert counted(unet, inputs) == plain + added
    with regrow.apply(unet, regrow.FORA(interval=2)) as run, run.generation(1), torch.no_grad():
        unet(**inputs)
    assert run.report().full_macs == plain + added


def tokens_of(name: str) -> int:
    """Of the layer with that path, in a latent of 16 x 16."""
    where, number = name.split(".")[:2] if not name.startswith("mid") else ("mid", "0")
    level = {"down_blocks": int(number), "up_blocks": 1 - int(number), "mid": 1}[where]
    return (16 // 2**level) ** 2


class Own(AttnProcessor):
    """Somebody's own processor."""


def test_processors_that_are_not_of_diffusers_are_named(pipe: Any) -> None:
    with regrow.apply(pipe, EVERY_SECOND) as run:
        pipelines.generate(pipe)
        exact = run.report()
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = Own()
        pipelines.generate(pipe)
        report = run.report()
    assert exact.notes == ()
    assert report.macs == exact.macs
    assert "mid_block.attentions.0.transformer_blocks.0.attn1" in report.notes[0]
    assert "Note: " in str(report)
    assert report.to_dict()["notes"] == list(report.notes)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_the_attention_backend_is_not_the_reports(kind: str) -> None:
    pipe = getattr(transformer_pipelines, kind)(layers=4)
    # What is set is set for the whole process, until this is left.
    with attention_backend("native"), regrow.apply(pipe, regrow.FORA(interval=2)) as run:
        transformer_pipelines.generate(pipe)
        expected = run.report().macs
        # Its kernels take no tensors without data.
        pipe.transformer.set_attention_backend("flex")
        assert run.report().macs == expected


def test_what_is_on_beside_a_method_is_named() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = transformer_pipelines.flux(layers=4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    with pytest.raises(ValueError, match=r"target: diffusers' FirstBlockCache is on"):
        regrow.apply(pipe, regrow.CATPruning(t0=2))
    with pytest.warns(UserWarning, match="FirstBlockCache is on too"):
        run = regrow.apply(pipe, regrow.FORA(interval=2))
    run.remove()
    pipe.transformer.disable_cache()
    with regrow.apply(pipe, regrow.CATPruning(t0=2, alpha=0.5)) as run:
        transformer_pipelines.generate(pipe)
        assert run.report().macs < run.report().full_macs
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
        with pytest.warns(UserWarning, match="computed in full: diffusers' FirstBlockCache is on"):
            transformer_pipelines.generate(pipe)
        assert {(c.depth, c.ratio) for c in run.report().calls} == {("full", 0.0)}


def lora(model: Any) -> None:
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_out"], init_lora_weights=False))


def chunk(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(4, dim=1)


def boxes(model: Any) -> dict[str, Any]:
    """What GLIGEN's pipelines give beside the text."""
    given = {
        "boxes": torch.rand(2, 3, 4, generator=generator()),
        "positive_embeddings": torch.randn(2, 3, model.config.cross_attention_dim, generator=generator()),
        "masks": torch.ones(2, 3),
    }
    return {"cross_attention_kwargs": {"gligen": given}}


def narrow(**changes: Any) -> Any:
    return pipelines.unet(**changes)


CHANGED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "plain": (narrow, lambda model: None),
    "adapter": (narrow, lora),
    "fused": (narrow, lambda model: model.fuse_qkv_projections()),
    "chunked": (narrow, chunk),
    "boxes": (lambda: narrow(attention_type="gated"), lambda model: None),
    "attention by hand": (narrow, lambda model: model.set_attn_processor(AttnProcessor())),
}


@pytest.mark.parametrize("config", [EVERY_SECOND, regrow.FORA(interval=2)])
@pytest.mark.parametrize("kind", CHANGED)
def test_the_report_counts_what_ran(kind: str, config: Any) -> None:
    """The products of matrices and convolutions of the calls themselves, counted while they run."""
    make, change = CHANGED[kind]
    model = make()
    change(model)
    inputs = pipelines.unet_inputs(model) | (boxes(model) if kind == "boxes" else {})
    grounding = [m for m in model.modules() if type(m).__name__ == "GatedSelfAttentionDense"]
    with (
        torch.no_grad(),
        regrow.apply(model, config) as run,
        run.generation(4) as clock,
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        for step in range(4):
            for module in grounding:
                module.enabled = step < 2
            model(**inputs)
            clock.step()
    report = run.report()
    assert not report.notes
    assert report.macs == counter.get_total_flops() // 2
    assert report.macs < report.full_macs


def test_fused_projections_of_a_transformer_are_counted_as_they_ran() -> None:
    """The text's keys and values are then made in every call."""
    pipe = transformer_pipelines.pixart(num_layers=3)
    model, got = pipe.transformer, {}
    text = {
        "encoder_hidden_states": torch.randn(2, 6, model.config.caption_channels, generator=generator()),
        "timestep": torch.tensor([500, 500]),
    }
    latents = torch.randn(2, 4, model.config.sample_size, model.config.sample_size, generator=generator())
    for fused in (False, True):
        if fused:
            model.fuse_qkv_projections()
        with (
            torch.no_grad(),
            regrow.apply(model, regrow.FORA(interval=2)) as run,
            run.generation(4) as clock,
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            for _ in range(4):
                model(latents, added_cond_kwargs={"resolution": None, "aspect_ratio": None}, **text)
                clock.step()
        assert run.report().macs == counter.get_total_flops() // 2
        got[fused] = run.report().macs
    assert got[True] >= got[False]


def test_processors_for_the_time_of_a_generation_are_counted() -> None:
    """Perturbed-attention guidance puts its own on for a call of the pipeline, and takes them off."""
    pipe = transformer_pipelines.sd3_perturbed()
    with regrow.apply(pipe, regrow.FORA(interval=2)) as run:
        transformer_pipelines.generate(pipe, max_sequence_length=16, pag_scale=3.0)
        report = run.report()
        assert "perturbed" not in str(pipe.transformer.attn_processors).lower()
    assert not report.notes
    assert report.calls[1].macs < report.calls[1].full_macs


@pytest.mark.parametrize("config", [EVERY_SECOND, regrow.FORA(interval=2)])
def test_modules_that_somebody_listens_to_are_computed(pipe: Any, config: Any) -> None:
    """As those who edit or keep deep features do."""
    heard: list[torch.Size] = []
    module = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1

    def listen(_: Any, args: Any, output: Tensor) -> Tensor:
        heard.append(output.shape)
        return output + 0.1

    hook = module.register_forward_hook(listen)
    plain = pipelines.generate(pipe)
    with regrow.apply(pipe, config) as run:
        with pytest.warns(UserWarning, match="has a forward hook, which would get no output"):
            assert torch.equal(pipelines.generate(pipe), plain)
        assert len(heard) == 8
        assert {c.depth for c in rows_of(run)} == {"full"}
        hook.remove()
        pipelines.generate(pipe)
        assert {c.depth for c in rows_of(run)} != {"full"}


@pytest.mark.parametrize("by_position", [False, True])
def test_what_a_controlnet_adds_may_be_given_by_position(by_position: bool) -> None:
    unet = pipelines.sd1_unet()
    inputs = pipelines.unet_inputs(unet)
    shapes: list[torch.Size] = []
    hooks = [
        block.register_forward_hook(lambda m, a, out: shapes.extend(x.shape for x in out[1]))
        for block in unet.down_blocks
    ]
    with torch.no_grad():
        unet(**inputs)
    for hook in hooks:
        hook.remove()
    added = tuple(0.1 * torch.ones(shape) for shape in (torch.Size((2, 16, 16, 16)), *shapes))
    middle = torch.zeros_like(added[-1])
    given = (inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
    out = []
    with torch.no_grad(), regrow.apply(unet, EVERY_SECOND) as run, run.generation(4) as clock:
        for _ in range(4):
            if by_position:
                out.append(unet(*given, None, None, None, None, None, added, middle).sample)
            else:
                names = {"down_block_additional_residuals": added, "mid_block_additional_residual": middle}
                out.append(unet(*given, **names).sample)
            clock.step()
        assert [c.depth for c in rows_of(run)] == ["full", "1"] * 2
    assert all(x.isfinite().all() for x in out)


def test_branches_that_differ_in_their_pooled_text_alone_are_two() -> None:
    unet = pipelines.sdxl_unet()
    inputs = pipelines.unet_inputs(unet, batch=1)
    other = inputs | {
        "added_cond_kwargs": inputs["added_cond_kwargs"]
        | {"text_embeds": 1 + inputs["added_cond_kwargs"]["text_embeds"]}
    }
    with torch.no_grad(), regrow.apply(unet, regrow.FORA(interval=9)) as run, run.generation(4) as clock:
        for order in ((inputs, other), (other, inputs), (other,), (inputs,)):
            for one in order:
                unet(**one)
            clock.step()
        rows = [(c.step, c.branch, c.depth) for c in rows_of(run)]
    assert rows == [
        (0, 0, "full"),
        (0, 1, "full"),
        (1, 1, "layers"),
        (1, 0, "layers"),
        (2, 1, "layers"),
        (3, 0, "layers"),
    ]


def test_a_generation_holds_nothing_of_the_pipelines_call_when_it_is_over(pipe: Any) -> None:
    alive: list[weakref.ref[Any]] = []

    def look(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        return {}

    names = ["latents", "prompt_embeds"]
    gc.collect()
    gc.disable()
    try:
        with regrow.apply(pipe, EVERY_SECOND):
            pipelines.generate(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
            assert len(alive) == 8
            assert not [ref for ref in alive if ref() is not None]
    finally:
        gc.enable()


def test_a_strength_of_an_adapter_set_within_a_generation_reaches_the_texts_layers() -> None:
    pipe = transformer_pipelines.wan_of_texts(layers=3)
    config = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name="a")

    def stronger(pipeline: Any, step: int, *_: Any) -> dict[str, Any]:
        pipeline.transformer.set_adapters(["a"], [1.0 + 4.0 * (step > 0)])
        return {}

    def made() -> Tensor:
        pipe.transformer.set_adapters(["a"], [1.0])
        return pipe(
            prompt="a penguin",
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=4,
            output_type="latent",
            generator=generator(),
            callback_on_step_end=stronger,
        ).frames

    plain = made()
    with pytest.warns(UserWarning, match="prunes nothing"), regrow.apply(pipe, regrow.FORA(interval=1)):
        assert torch.equal(made(), plain)


def recoveries(config: Any) -> list[str]:
    pipe = pipelines.sd()
    with regrow.apply(pipe, config) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipelines.generate(pipe, num_inference_steps=6)
    return [call.recovery for call in rows_of(run)]


def schedule(recovery: Any, depth: int = 0) -> regrow.Schedule:
    full = regrow.Schedule.every(6, 6).depth[0]
    depths = (full, depth, full, depth, full, depth)
    return regrow.Schedule(depth=depths, ratio=(0.0,) * 6, recovery=(recovery,))


def test_it_tells_what_filled_in_what_was_not_computed() -> None:
    assert recoveries(regrow.DeepCache(interval=2)) == ["", "reuse"] * 3
    line = ["", "reuse", "", "taylor(1)", "", "taylor(1)"]
    assert recoveries(schedule(regrow.Taylor(order=1))) == line
    assert recoveries(schedule(regrow.Taylor(order=2), depth=1)) == [*line[:-1], "taylor(2)"]
    chebyshev = recoveries(schedule(regrow.Chebyshev(degree=3)))
    assert chebyshev == ["", "reuse", "", "chebyshev(3)", "", "chebyshev(3)"]
    assert recoveries(regrow.SiTo(ratio=0.5)) == ["copy"] * 6
    assert recoveries(regrow.ToMeSD(ratio=0.5)) == ["mean"] * 6
    pruned = schedule("reuse").model_copy(update={"ratio": (0.5,) * 6})
    assert recoveries(pruned) == ["copy", "reuse"] * 3
    pipe = pipelines.sd()
    with regrow.apply(pipe, schedule(regrow.Taylor(order=1))) as run:
        pipelines.generate(pipe, num_inference_steps=6)
    report = run.report()
    assert [call.recovery for call in report.calls] == line
    assert [call["recovery"] for call in report.to_dict()["calls"]] == line
    assert all(word in str(report) for word in line)


def test_fitted_weights_that_do_not_fit_are_not_called_so() -> None:
    fitted = regrow.Fitted(
        total=6,
        steps=tuple(FittedStep(step=step, sources=(step - 1,), weights=(1.1,)) for step in (1, 3, 5)),
    )
    assert recoveries(schedule(fitted)) == ["", "fitted"] * 3
    elsewhere = fitted.model_copy(update={"total": 7})
    assert recoveries(schedule(elsewhere)) == ["", "reuse", "", "taylor(1)", "", "taylor(1)"]
