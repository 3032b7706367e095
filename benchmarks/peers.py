"""Public accelerators as rows of a comparison, each called as its own documentation calls it.

What is not said here is left at the package's default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from regrow.lab.measure.variants import Variant
from regrow.models import module_of


@dataclass(frozen=True)
class Kind:
    """A public accelerator.

    Args:
        package: its distribution.
        number: what the number after the colon means.
        default: the number of its documentation's example, or its default.
        apply: puts it on a pipeline, given the number and the sampler's steps; leaving takes it off.
    """

    package: str
    number: str
    default: float
    apply: Callable[[Any, Any, int], AbstractContextManager[None]]


@dataclass(frozen=True)
class Peer(Variant):
    """A row by a public accelerator; ``config`` is its number.

    Args:
        kind: the accelerator.
    """

    kind: Kind

    def applied(self, pipeline: Any) -> AbstractContextManager[None]:
        """The pipeline with the accelerator on it for one generation, and wholly off it afterwards.

        Raises:
            ImportError: if its package is not installed.
        """
        return self._applied(pipeline)

    @contextmanager
    def _applied(self, pipeline: Any) -> Iterator[None]:
        with _restored(module_of(pipeline)), self.kind.apply(pipeline, self.config, self.steps):
            yield

    def settings(self) -> Any:
        """Its package, version and number."""
        kind = self.kind
        return {
            "package": kind.package,
            "version": metadata.version(kind.package),
            kind.number: self.config,
        }


def peer(spec: str, steps: int) -> Peer:
    """A row by its name: ``tomesd``, or ``tomesd:0.5`` with the number that matters most.

    Args:
        spec: the name.
        steps: sampler steps.

    Raises:
        ValueError: if there is no such peer, or the number is none it takes.
    """
    name, colon, text = spec.partition(":")
    if name not in PEERS:
        raise ValueError(f"peers: {spec!r} is not known; before the colon comes one of {', '.join(PEERS)}")
    kind = PEERS[name]
    whole = isinstance(kind.default, int)
    try:
        number = type(kind.default)(text) if colon else kind.default
    except ValueError:
        number = 0
    if number <= 0:
        allowed = "a whole number >= 1" if whole else "a number > 0"
        raise ValueError(f"peers: {spec!r} is not allowed; after the colon comes {kind.number}, {allowed}")
    return Peer(spec, number, steps, kind)


@contextmanager
def tomesd(pipeline: Any, ratio: float, steps: int) -> Iterator[None]:
    """Token merging by tomesd, in the blocks at full resolution. It takes its random numbers from where
    torch's global generator is, which is the same place each time here."""
    try:
        import tomesd
    except ImportError as error:
        raise _missing("tomesd") from error
    denoiser = module_of(pipeline)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            tomesd.apply_patch(denoiser, ratio=ratio)
            yield
        finally:
            tomesd.remove_patch(denoiser)


@contextmanager
def deep_cache(pipeline: Any, interval: int, steps: int) -> Iterator[None]:
    """DeepCache at its shallowest branch, a full call every so many. All it changes are attributes of
    modules, which `Peer` puts back; its own removal fails where it got only half on."""
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError as error:
        raise _missing("DeepCache") from error
    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    yield


@contextmanager
def cache_dit(
    pipeline: Any, threshold: float, steps: int, calibrator: Callable[[Any], Any] | None = None
) -> Iterator[None]:
    """cache-dit's dual block cache.

    Args:
        calibrator: takes the package, gives the class of its calibrator's settings; None for reuse.
    """
    try:
        import cache_dit
    except ImportError as error:
        raise _missing("cache-dit") from error
    first = always_computed(module_of(pipeline), cache_dit.DBCacheConfig().Fn_compute_blocks)
    try:
        cache_dit.enable_cache(
            pipeline,
            cache_config=cache_dit.DBCacheConfig(
                residual_diff_threshold=threshold, Fn_compute_blocks=first
            ),
            calibrator_config=None if calibrator is None else calibrator(cache_dit)(),
        )
        yield
    finally:
        cache_dit.disable_cache(pipeline)


def always_computed(denoiser: Any, default: int) -> int:
    """The blocks that cache-dit computes in every call: its default, or half of a list that has fewer than
    twice as many."""
    names = ("transformer_blocks", "single_transformer_blocks", "blocks")
    counts = [len(getattr(denoiser, name)) for name in names if hasattr(denoiser, name)]
    return max(1, min([default, *(count // 2 for count in counts)]))


@contextmanager
def pab(pipeline: Any, interval: int, steps: int) -> Iterator[None]:
    """diffusers' Pyramid Attention Broadcast of self-attention."""
    from diffusers import PyramidAttentionBroadcastConfig
    from diffusers.hooks import apply_pyramid_attention_broadcast

    with _timestep(pipeline) as timestep:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=interval,
            spatial_attention_timestep_skip_range=(100, 800),
            current_timestep_callback=timestep,
        )
        with _hooked(pipeline, config, apply_pyramid_attention_broadcast):
            yield


@contextmanager
def faster_cache(pipeline: Any, interval: int, steps: int) -> Iterator[None]:
    """diffusers' FasterCache, the unconditional half computed every so many calls."""
    from diffusers import FasterCacheConfig
    from diffusers.hooks import apply_faster_cache

    with _timestep(pipeline) as timestep:
        config = FasterCacheConfig(
            unconditional_batch_skip_range=interval,
            # Pictures; the default is for films.
            tensor_format="BCHW",
            is_guidance_distilled=bool(getattr(module_of(pipeline).config, "guidance_embeds", False)),
            current_timestep_callback=timestep,
        )
        with _hooked(pipeline, config, apply_faster_cache):
            yield


def first_block(pipeline: Any, threshold: float, steps: int) -> AbstractContextManager[None]:
    """diffusers' First Block Cache."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    return _hooked(pipeline, FirstBlockCacheConfig(threshold=threshold), apply_first_block_cache)


def taylorseer(pipeline: Any, interval: int, steps: int) -> AbstractContextManager[None]:
    """diffusers' TaylorSeer with the settings of its example."""
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=3,
        max_order=1,
        taylor_factors_dtype=torch.float32,
    )
    return _hooked(pipeline, config, apply_taylorseer_cache)


def sea_cache(pipeline: Any, threshold: float, steps: int) -> AbstractContextManager[None]:
    """diffusers' SeaCache. It has adapters for Wan and Cosmos 3; with another model, or in a pipeline that
    does not tell it the step, it computes everything."""
    from diffusers.hooks import SeaCacheConfig, apply_sea_cache

    return _hooked(pipeline, SeaCacheConfig(threshold=threshold), apply_sea_cache)


def mag_cache(pipeline: Any, threshold: float, steps: int) -> AbstractContextManager[None]:
    """diffusers' MagCache. Its ratios are Flux's, the only ones there are without calibrating."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    config = MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=FLUX_MAG_RATIOS)
    return _hooked(pipeline, config, apply_mag_cache)


PEERS = {
    "tomesd": Kind("tomesd", "ratio", 0.5, tomesd),
    "DeepCache": Kind("DeepCache", "cache_interval", 3, deep_cache),
    "cache-dit": Kind("cache-dit", "residual_diff_threshold", 0.08, cache_dit),
    "cache-dit-taylorseer": Kind(
        "cache-dit",
        "residual_diff_threshold",
        0.08,
        partial(cache_dit, calibrator=attrgetter("TaylorSeerCalibratorConfig")),
    ),
    "cache-dit-foca": Kind(
        "cache-dit",
        "residual_diff_threshold",
        0.08,
        partial(cache_dit, calibrator=attrgetter("FoCaCalibratorConfig")),
    ),
    "cache-dit-dmd": Kind(
        "cache-dit",
        "residual_diff_threshold",
        0.08,
        partial(cache_dit, calibrator=attrgetter("DMDCalibratorConfig")),
    ),
    "pab": Kind("diffusers", "spatial_attention_block_skip_range", 2, pab),
    "fastercache": Kind("diffusers", "unconditional_batch_skip_range", 5, faster_cache),
    "firstblock": Kind("diffusers", "threshold", 0.05, first_block),
    "taylorseer": Kind("diffusers", "cache_interval", 5, taylorseer),
    "seacache": Kind("diffusers", "threshold", 0.25, sea_cache),
    "magcache": Kind("diffusers", "threshold", 0.06, mag_cache),
}
"""The peers by their names."""


@contextmanager
def _hooked(pipeline: Any, config: Any, apply: Callable[[Any, Any], None]) -> Iterator[None]:
    """One of diffusers' caches, by the model's own method where it has one."""
    denoiser: Any = module_of(pipeline)
    before = {module: set(_hooks(module)) for module in denoiser.modules()}
    try:
        if hasattr(denoiser, "enable_cache"):
            denoiser.enable_cache(config)
        else:
            apply(denoiser, config)
        yield
    finally:
        for module, known in before.items():
            for name in _hooks(module):
                if name not in known:
                    module._diffusers_hook.remove_hook(name, recurse=False)


def _hooks(module: nn.Module) -> list[str]:
    """Names of the diffusers hooks on a module, the outermost first."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(reversed(registry.hooks))


@contextmanager
def _timestep(pipeline: Any) -> Iterator[Callable[[], float]]:
    """The timestep: as the pipeline tells it, or, where it does not, as its denoiser is given it."""
    if hasattr(type(pipeline), "current_timestep"):
        yield lambda: pipeline.current_timestep
        return
    last = [0.0]

    def read(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = kwargs["timestep"] if "timestep" in kwargs else args[1]
        last[0] = float(given.flatten()[0]) if hasattr(given, "flatten") else float(given)

    hook = module_of(pipeline).register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield lambda: last[0]
    finally:
        hook.remove()


@contextmanager
def _restored(denoiser: nn.Module) -> Iterator[None]:
    """Put back all modules' attributes and submodules, of which the peers' own removal leaves some changed:
    `forward` set on the instance, new attributes, submodules in another order (which breaks the next
    peer)."""
    before = [(module, dict(vars(module)), dict(module._modules)) for module in denoiser.modules()]
    try:
        yield
    finally:
        for module, attributes, submodules in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(submodules)


def _missing(package: str) -> ImportError:
    return ImportError(f"{package} is not installed: pip install 'regrow[peers]'")
