"""No method waits for the device in a call of the denoiser, but for the timestep of Flux."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pipelines
import pytest
import torch
import transformer_pipelines
from waiting import NoWaiting

import regrow
from regrow import ATEDM, FORA, Adaptive, CATPruning, Combined, DaTo, DeepCache, SiTo, ToCa, ToMeSD

STEPS = 5

UNET_METHODS = {
    "adaptive": Adaptive(budget=4),
    "sito": SiTo(ratio=0.5),
    "dato": DaTo.preset("b1"),
    "tome": ToMeSD(ratio=0.5),
    "deepcache": DeepCache(interval=2),
    "fora": FORA(interval=2),
    "atedm": ATEDM(ratio=0.5),
    "deepcache+tome": Combined(caching=DeepCache(interval=2), tokens=ToMeSD(ratio=0.5)),
}
TRANSFORMER_METHODS = {
    "adaptive": Adaptive(bound=1.0),
    "cat": CATPruning(alpha=0.4, t0=2),
    "toca": ToCa(interval=2, ratio=0.6),
    "fora": FORA(interval=2),
    "deepcache": DeepCache(interval=2),
    "atedm": ATEDM.preset("reuse", early=0),
    "cat+deepcache": Combined(caching=DeepCache(interval=2, branch=3), tokens=CATPruning(alpha=0.4, t0=2)),
}


@functools.cache
def pipe_of(kind: str) -> Any:
    """What tests share that forbid waiting for a while only."""
    return (pipelines.KINDS[kind][0] if kind in pipelines.KINDS else transformer_pipelines.KINDS[kind])()


@contextmanager
def not_waiting(denoiser: Any) -> Iterator[None]:
    forbid_waiting(denoiser)
    try:
        yield
    finally:
        del denoiser.forward


def forbid_waiting(denoiser: Any) -> None:
    plain = denoiser.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with NoWaiting():
            return plain(*args, **kwargs)

    denoiser.forward = forward


@pytest.mark.parametrize("kind", ["sd1-four-levels", "sdxl"])
@pytest.mark.parametrize("name", UNET_METHODS)
def test_a_unet_waits_in_no_call(kind: str, name: str) -> None:
    pipe = pipe_of(kind)
    with regrow.apply(pipe, UNET_METHODS[name]), not_waiting(pipe.unet):
        pipelines.generate(pipe, kind=kind, num_inference_steps=STEPS)


@pytest.mark.filterwarnings("ignore:SD3T.* has no")
@pytest.mark.parametrize("kind", transformer_pipelines.KINDS)
@pytest.mark.parametrize("name", TRANSFORMER_METHODS)
def test_a_transformer_waits_in_no_call(kind: str, name: str) -> None:
    pipe = pipe_of(kind)
    with regrow.apply(pipe, TRANSFORMER_METHODS[name]), not_waiting(pipe.transformer):
        transformer_pipelines.generate(pipe, num_inference_steps=STEPS)


@pytest.mark.filterwarnings("ignore:SD3T.* has no")
@pytest.mark.parametrize(
    "kind",
    [
        "sd3",
        "pixart",
        "dit",
        pytest.param(
            "flux",
            marks=pytest.mark.xfail(strict=True, reason="FluxPipeline makes a new timestep for each call"),
        ),
    ],
)
def test_hooks_around_calls_wait_only_at_the_first(kind: str) -> None:
    pipe = transformer_pipelines.KINDS[kind]()
    regrow.apply(pipe, TRANSFORMER_METHODS["cat"])
    whole, calls = pipe.transformer._call_impl, 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        with NoWaiting() if calls > 1 else nullcontext():
            return whole(*args, **kwargs)

    pipe.transformer._call_impl = call
    transformer_pipelines.generate(pipe, num_inference_steps=STEPS)
    assert calls >= STEPS


WAYS = {
    "read": lambda x: float(x.max()),
    "compare": lambda x: torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "fill": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "repeat": lambda x: x.flatten().repeat_interleave((x.flatten() > 0).int()),
}


@pytest.mark.parametrize("way", WAYS)
def test_waiting_is_seen(way: str) -> None:
    pipe = pipelines.sd()
    regrow.apply(pipe, ToMeSD(ratio=0.5))
    forbid_waiting(pipe.unet)

    def look(module: Any, given: Any, made: Any) -> None:
        WAYS[way](made)

    pipe.unet.conv_out.register_forward_hook(look)
    with pytest.raises(AssertionError, match="aten"):
        pipelines.generate(pipe)
