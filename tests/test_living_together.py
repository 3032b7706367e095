"""Whatever is switched on and off beside a method, in any order: what is on works, what is off is gone.

Random sequences of steps are taken on three equal pipelines at once. One has a method on and off in
between; the others tell what is right: one never sees a method, one sees it as the last thing put on and
the first taken off, for a single generation.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pipelines
import pytest
import tomesd
import torch
import transformer_pipelines
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from DeepCache import DeepCacheSDHelper
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import HookRegistry, apply_pyramid_attention_broadcast
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import AttnProcessor
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

import regrow

SEQUENCES = int(os.environ.get("REGROW_SEQUENCES", "16"))
CPU = torch.device("cpu")
PAB = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2,
    spatial_attention_timestep_skip_range=(0, 1000),
    current_timestep_callback=lambda: 500,
)
SCHEDULE = regrow.Schedule(depth=("full", 1, 2, 0), ratio=(0.5, 0.3, 0.5, 0.0))
UNET_METHODS = (
    regrow.DaTo(schedule=SCHEDULE),
    regrow.DeepCache(interval=2),
    regrow.FORA(interval=2),
    regrow.SiTo(ratio=0.5, base="V"),
    regrow.Combined(caching=regrow.DeepCache(interval=2, branch=2), tokens=regrow.ToMeSD(ratio=0.5)),
)
FLUX_METHODS = (
    regrow.FORA(interval=2),
    regrow.DeepCache(interval=2, branch=1),
    regrow.CATPruning(alpha=0.5, t0=2),
    regrow.ToCa(interval=2),
    regrow.ATEDM(recovery="reuse", early=1),
)


def denoiser_of(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def is_ours(module: nn.Module) -> bool:
    """Whether a method's hooks are on a module."""
    return type(module.__dict__.get("forward")).__module__.startswith("regrow")


def adapter(make: Callable[[], Any], prefix: str) -> dict[str, Tensor]:
    """The weights of an adapter that changes what a pipeline gives, also in its outermost layers."""
    model = denoiser_of(make())
    targets = ["to_q", "to_k", "proj_out", "conv_out", "x_embedder"]
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    weights = get_peft_model_state_dict(model)
    return {f"{prefix}.{name}": 0.1 * weight for name, weight in weights.items()}


def unet_pipe() -> Any:
    return pipelines.sd(pipelines.unet(layers_per_block=1))


def flux_pipe() -> Any:
    return transformer_pipelines.flux(layers=3)


UNET_ADAPTER = adapter(unet_pipe, "unet")
FLUX_ADAPTER = adapter(flux_pipe, "transformer")


def image_adapter(unet: Any) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter's weights, for image embeddings of eight numbers."""
    g, text, tokens = torch.Generator().manual_seed(0), unet.config.cross_attention_dim, 2
    attentions = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    keys = {
        f"{2 * i + 1}.to_{what}_ip.weight": torch.randn(m.to_k.out_features, text, generator=g)
        for i, m in enumerate(attentions)
        for what in "kv"
    }
    projection = {
        "proj.weight": torch.randn(tokens * text, 8, generator=g),
        "proj.bias": torch.zeros(tokens * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    return {"image_proj": projection, "ip_adapter": keys}


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Together(RuleBasedStateMachine):
    """Steps that any pipeline knows."""

    methods: tuple[Any, ...]

    def __init__(self) -> None:
        super().__init__()
        self.pipe, self.plain, self.last = (self.make() for _ in range(3))
        self.run: regrow.Run | None = None
        self.config: Any = None
        self.on: set[str] = set()

    @staticmethod
    def make() -> Any:
        raise NotImplementedError

    def pictures(self, pipe: Any, **changes: Any) -> Tensor:
        raise NotImplementedError

    @property
    def everywhere(self) -> tuple[Any, ...]:
        return self.pipe, self.plain, self.last

    def each(self, step: Callable[[Any], None]) -> None:
        """Take a step on all three; what one can't do, none can."""
        errors = []
        for pipe in self.everywhere:
            try:
                with quiet():
                    step(pipe)
                errors.append(None)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}"[:200])
        assert len(set(errors)) == 1, errors

    def outcome(self, pipe: Any, **changes: Any) -> Tensor | str:
        """What a pipeline gives, or the error it ends with."""
        # Diffusers' caches begin nothing anew by themselves.
        for module in denoiser_of(pipe).modules():
            if hasattr(module, "_diffusers_hook"):
                module._diffusers_hook.reset_stateful_hooks(recurse=False)
        try:
            with quiet(), torch.no_grad():
                return self.pictures(pipe, **changes)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:200]

    def expected(self, **changes: Any) -> Tensor | str:
        """What the method gives if it is put on last and taken off first; without it, the plain one's."""
        if self.run is not None:
            try:
                with quiet(), regrow.apply(self.last, self.config):
                    return self.outcome(self.last, **changes)
            except ValueError:
                # It does not go with what is on now, which came later: then everything is computed.
                pass
        return self.outcome(self.plain, **changes)

    def check(self, **changes: Any) -> None:
        got, expected = self.outcome(self.pipe, **changes), self.expected(**changes)
        if isinstance(expected, str) or isinstance(got, str):
            assert str(got).partition(":")[0] == str(expected).partition(":")[0], (got, expected, self.on)
            return
        assert torch.equal(got, expected), (float((got - expected).abs().max()), self.on, self.config)
        assert got.isfinite().all() == expected.isfinite().all()

    @precondition(lambda self: self.run is None)
    @rule(data=st.data())
    def put_a_method_on(self, data: st.DataObject) -> None:
        config = data.draw(st.sampled_from(self.methods))
        refusals = []
        for pipe in (self.last, self.pipe):
            try:
                with quiet():
                    run = regrow.apply(pipe, config)
                refusals.append(None)
            except ValueError as error:
                refusals.append(str(error))
                continue
            if pipe is self.last:
                run.remove()
            else:
                self.run, self.config = run, config
        assert refusals[0] == refusals[1]

    @precondition(lambda self: self.run is not None)
    @rule()
    def take_it_off(self) -> None:
        assert self.run is not None
        self.run.remove()
        self.run = None
        self.check()

    @rule(steps=st.integers(2, 3))
    def generate(self, steps: int) -> None:
        self.check(num_inference_steps=steps)

    @rule()
    def stop_in_the_middle(self) -> None:
        def stop(*_: Any) -> Any:
            raise KeyError

        for pipe in self.everywhere:
            assert isinstance(self.outcome(pipe, callback_on_step_end=stop), str)

    @rule()
    def copy_the_scheduler(self) -> None:
        """Another pipeline around the same parts, with a copy: it is no generation of the method's."""
        got = []
        for pipe in (self.pipe, self.plain):
            whole = pipe.scheduler
            other = pipelines.quiet(
                type(pipe)(**pipe.components | {"scheduler": copy.copy(whole)}, **self.extra)
            )
            assert "step" not in other.scheduler.__dict__
            got.append(self.outcome(other))
        if isinstance(got[0], Tensor) and isinstance(got[1], Tensor):
            assert torch.equal(got[0], got[1])
        else:
            assert type(got[0]) is type(got[1])

    extra: ClassVar[dict[str, Any]] = {}

    @rule()
    def copy_the_denoiser(self) -> None:
        if self.run is not None:
            with pytest.raises(TypeError, match=r"call run.remove\(\) first"):
                copy.deepcopy(denoiser_of(self.pipe))
            return
        if not self.on:
            twin = copy.deepcopy(denoiser_of(self.pipe))
            assert not [m for m in twin.modules() if is_ours(m)]

    @precondition(lambda self: "offload" not in self.on)
    @rule()
    def offload_models(self) -> None:
        self.each(lambda pipe: pipe.enable_model_cpu_offload(device="cpu"))
        self.on.add("offload")

    @precondition(lambda self: "offload" in self.on and "sequential" not in self.on)
    @rule()
    def offload_no_models(self) -> None:
        self.each(lambda pipe: pipe.remove_all_hooks())
        self.on.discard("offload")

    @precondition(lambda self: not self.on & {"sequential", "group", "offload"})
    @rule()
    def offload_layer_by_layer(self) -> None:
        self.each(lambda pipe: cpu_offload(denoiser_of(pipe), CPU))
        self.on.add("sequential")

    @precondition(lambda self: "sequential" in self.on)
    @rule()
    def offload_no_layers(self) -> None:
        self.each(lambda pipe: remove_hook_from_module(denoiser_of(pipe), recurse=True))
        self.on.discard("sequential")

    @precondition(lambda self: not self.on & {"sequential", "group", "offload"})
    @rule(kind=st.sampled_from(["leaf_level", "block_level"]))
    def offload_groups(self, kind: str) -> None:
        groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        self.each(lambda p: denoiser_of(p).enable_group_offload(CPU, CPU, offload_type=kind, **groups))
        self.on.add("group")

    @precondition(lambda self: "group" in self.on)
    @rule()
    def offload_no_groups(self) -> None:
        def off(pipe: Any) -> None:
            registry = HookRegistry.check_if_exists_or_initialize(denoiser_of(pipe))
            for name in ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"):
                registry.remove_hook(name, recurse=True)

        self.each(off)
        self.on.discard("group")

    @precondition(lambda self: not self.on & {"fp8", "sequential", "group", "lora", "fused qkv"})
    @rule()
    def cast_layers(self) -> None:
        self.each(
            lambda pipe: denoiser_of(pipe).enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
            )
        )
        self.on.add("fp8")

    @precondition(lambda self: not self.on & {"lora", "fp8", "sequential", "fused qkv"})
    @rule()
    def load_an_adapter(self) -> None:
        self.each(lambda pipe: pipe.load_lora_weights(dict(self.adapter)))
        self.on.add("lora")

    adapter: dict[str, Tensor]

    @precondition(lambda self: "lora" in self.on and not self.on & {"fused lora", "sequential", "group"})
    @rule()
    def fuse_the_adapter(self) -> None:
        self.each(lambda pipe: pipe.fuse_lora())
        self.on.add("fused lora")

    @precondition(lambda self: "fused lora" in self.on and "sequential" not in self.on)
    @rule()
    def unfuse_the_adapter(self) -> None:
        self.each(lambda pipe: pipe.unfuse_lora())
        self.on.discard("fused lora")

    @precondition(lambda self: "lora" in self.on and not self.on & {"fused lora", "sequential"})
    @rule()
    def unload_the_adapter(self) -> None:
        self.each(lambda pipe: pipe.unload_lora_weights())
        self.on.discard("lora")

    @precondition(lambda self: not self.on & {"lora", "fused qkv", "fp8", "sequential", "group", "image"})
    @rule()
    def fuse_projections(self) -> None:
        self.each(lambda pipe: denoiser_of(pipe).fuse_qkv_projections())
        self.on.add("fused qkv")

    @precondition(lambda self: "fused qkv" in self.on)
    @rule()
    def unfuse_projections(self) -> None:
        self.each(lambda pipe: denoiser_of(pipe).unfuse_qkv_projections())
        self.on.discard("fused qkv")

    def teardown(self) -> None:
        if self.run is not None:
            self.run.remove()
            self.run = None
            self.check()
        model, plain = denoiser_of(self.pipe), denoiser_of(self.plain)
        assert not [m for m in model.modules() if is_ours(m)]
        assert len(model._forward_hooks) == len(plain._forward_hooks)
        assert len(model._forward_pre_hooks) == len(plain._forward_pre_hooks)
        assert "_call_impl" not in model.__dict__
        assert "step" not in self.pipe.scheduler.__dict__


class WithUnet(Together):
    """Stable Diffusion."""

    methods = UNET_METHODS
    adapter = UNET_ADAPTER
    extra: ClassVar[dict[str, Any]] = {"requires_safety_checker": False}

    @staticmethod
    def make() -> Any:
        return unet_pipe()

    def pictures(self, pipe: Any, **changes: Any) -> Tensor:
        if "image" in self.on:
            changes["ip_adapter_image_embeds"] = [torch.ones(2, 1, 8)]
        return pipelines.generate(pipe, **{"num_inference_steps": 2, "height": 32, "width": 32} | changes)

    @precondition(lambda self: "pab" not in self.on)
    @rule()
    def broadcast_attention(self) -> None:
        self.each(lambda pipe: apply_pyramid_attention_broadcast(pipe.unet, PAB))
        self.on.add("pab")

    @precondition(lambda self: "pab" in self.on)
    @rule()
    def broadcast_nothing(self) -> None:
        def off(pipe: Any) -> None:
            registry = HookRegistry.check_if_exists_or_initialize(pipe.unet)
            registry.remove_hook("pyramid_attention_broadcast", recurse=True)

        self.each(off)
        self.on.discard("pab")

    @precondition(lambda self: "tomesd" not in self.on)
    @rule()
    def merge_tokens(self) -> None:
        # By chance it merges other tokens in every call.
        self.each(lambda pipe: tomesd.apply_patch(pipe, ratio=0.5, use_rand=False))
        self.on.add("tomesd")

    @precondition(lambda self: "tomesd" in self.on)
    @rule()
    def merge_no_tokens(self) -> None:
        self.each(tomesd.remove_patch)
        self.on.discard("tomesd")

    @precondition(lambda self: "DeepCache" not in self.on)
    @rule()
    def cache_deep_features(self) -> None:
        def on(pipe: Any) -> None:
            pipe.helper = DeepCacheSDHelper(pipe=pipe)
            pipe.helper.set_params(cache_interval=2, cache_branch_id=0)
            pipe.helper.enable()

        self.each(on)
        self.on.add("DeepCache")

    @precondition(lambda self: "DeepCache" in self.on)
    @rule()
    def cache_no_deep_features(self) -> None:
        self.each(lambda pipe: pipe.helper.disable())
        self.on.discard("DeepCache")

    @precondition(lambda self: not self.on & {"image", "fused qkv"})
    @rule(plain=st.booleans())
    def attend_otherwise(self, plain: bool) -> None:
        def swap(pipe: Any) -> None:
            if plain:
                pipe.unet.set_attn_processor(AttnProcessor())
            else:
                pipe.unet.set_default_attn_processor()

        self.each(swap)

    @precondition(
        lambda self: not self.on & {"image", "fused qkv", "lora", "sequential", "group", "fp8", "offload"}
    )
    @rule()
    def look_at_an_image(self) -> None:
        def on(pipe: Any) -> None:
            pipe.load_ip_adapter(
                image_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None
            )

        self.each(on)
        self.on.add("image")

    @precondition(lambda self: "image" in self.on)
    @rule()
    def look_at_no_image(self) -> None:
        self.each(lambda pipe: pipe.unload_ip_adapter())
        self.on.discard("image")


class WithFlux(Together):
    """Flux."""

    methods = FLUX_METHODS
    adapter = FLUX_ADAPTER

    @staticmethod
    def make() -> Any:
        return flux_pipe()

    def pictures(self, pipe: Any, **changes: Any) -> Tensor:
        return transformer_pipelines.generate(pipe, **{"num_inference_steps": 3} | changes)

    @precondition(lambda self: "cache" not in self.on)
    @rule(config=st.sampled_from([PAB, FirstBlockCacheConfig(threshold=0.05)]))
    def enable_cache(self, config: Any) -> None:
        self.each(lambda pipe: pipe.transformer.enable_cache(config))
        self.on.add("cache")

    @precondition(lambda self: "cache" in self.on)
    @rule()
    def disable_cache(self) -> None:
        self.each(lambda pipe: pipe.transformer.disable_cache())
        self.on.discard("cache")

    @rule(backend=st.sampled_from(["_native_math", "native", None]))
    def attend_otherwise(self, backend: str | None) -> None:
        def swap(pipe: Any) -> None:
            if backend is None:
                pipe.transformer.reset_attention_backend()
            else:
                pipe.transformer.set_attention_backend(backend)

        self.each(swap)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [WithUnet, WithFlux])
def test_each_that_is_on_works_and_each_that_is_off_is_gone(machine: type[Together]) -> None:
    # What is set on one model is set for the whole process, until this is left.
    with attention_backend("native"):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=SEQUENCES // 2,
                stateful_step_count=9,
                deadline=None,
                derandomize="REGROW_SEQUENCES" not in os.environ,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.generate, Phase.shrink)
                if "REGROW_SHRINK" in os.environ
                else (Phase.generate,),
            ),
        )
