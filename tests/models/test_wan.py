"""Wan: reuse of layers and of blocks in a video model that is called once for each half of guidance."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformer_pipelines
from rows import rows_of
from test_exactness import assert_untouched_module
from torch import Tensor
from transformer_pipelines import LAYERS, STEPS, TEXT

import regrow
from regrow import FORA, CATPruning, DeepCache
from regrow.lab.measure.architectures import architecture
from regrow.lab.measure.macs import profile

FORMS: dict[str, dict[str, Any]] = {"guided": {}, "unguided-batch": {"guidance_scale": 1.0, "count": 2}}


def generate(pipe: Any, *, seed: int = 0, count: int = 1, **options: Any) -> Tensor:
    """Latents of a video of two latent frames, not square."""
    words = torch.randn(2, 6, TEXT, generator=torch.Generator().manual_seed(9))
    made = pipe(
        prompt_embeds=words[:count],
        negative_prompt_embeds=words.flip(0)[:count],
        height=64,
        width=96,
        num_frames=5,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        **{"num_inference_steps": STEPS, "guidance_scale": 3.0} | options,
    )
    return torch.as_tensor(made.frames)


@pytest.fixture
def pipe() -> Any:
    return transformer_pipelines.wan()


After = Callable[[str, int, bool, Any, Any], Any]


@contextmanager
def replaced(transformer: Any, names: list[str], interval: int, calls: int, after: After) -> Iterator[None]:
    """Call ``after(name, guidance branch, whether the call is cached, input, output)`` behind modules."""
    call = [-1]

    def begin(*_: Any) -> None:
        call[0] += 1

    hooks = [transformer.register_forward_pre_hook(begin)]
    for name in names:

        def behind(m: Any, args: Any, out: Any, name: str = name) -> Any:
            step, branch = divmod(call[0], calls)
            return after(name, branch, step % interval != 0, args[0], out)

        hooks.append(transformer.get_submodule(name).register_forward_hook(behind))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("form", FORMS)
def test_fora_is_that_of_full_computation_thrown_away(pipe: Any, form: str) -> None:
    kept: dict[Any, Any] = {}

    def after(name: str, branch: int, cached: bool, given: Any, out: Any) -> Any:
        return kept[name, branch] if cached else kept.update({(name, branch): out})

    calls = 2 if form == "guided" else 1
    names = [f"blocks.{i}.{layer}" for i in range(LAYERS) for layer in ("attn1", "attn2", "ffn")]
    plain = generate(pipe, **FORMS[form])
    with replaced(pipe.transformer, names, 3, calls, after):
        expected = generate(pipe, **FORMS[form])
    with regrow.apply(pipe, FORA(interval=3)) as run:
        ours = generate(pipe, **FORMS[form])
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, plain)
    rows = run.report().calls
    depths = ("full", "layers", "layers", "full", "layers")
    assert [(c.depth, c.branch) for c in rows] == [(d, b) for d in depths for b in range(calls)]
    assert rows[calls].macs < 0.1 * rows[0].macs


@pytest.mark.parametrize("form", FORMS)
def test_block_caching_adds_what_the_blocks_between_added(pipe: Any, form: str) -> None:
    branch_of_net, first, last = 2, 2, LAYERS - 1
    entered: list[Any] = [None]
    added: dict[int, Any] = {}

    def after(name: str, branch: int, cached: bool, given: Any, out: Any) -> Any:
        if name == f"blocks.{first}":
            entered[0] = given
        if cached:
            return entered[0] + added[branch] if name == f"blocks.{last - 1}" else given
        if name == f"blocks.{last - 1}":
            added[branch] = out - entered[0]
        return None

    calls = 2 if form == "guided" else 1
    names = [f"blocks.{i}" for i in range(first, last)]
    with replaced(pipe.transformer, names, 2, calls, after):
        expected = generate(pipe, **FORMS[form])
    with regrow.apply(pipe, DeepCache(interval=2, branch=branch_of_net)) as run:
        torch.testing.assert_close(generate(pipe, **FORMS[form]), expected)
    rows = run.report().calls
    assert {c.depth for c in rows} == {"full", "3"}
    assert rows[calls].macs < rows[0].macs * 4 / LAYERS


def test_depth_0_hands_on_the_last_output_of_each_half_of_guidance(pipe: Any) -> None:
    outputs: list[Tensor] = []
    plan = regrow.Schedule(depth=("full", 0, 0, "full", 0), ratio=(0.0,) * 5)
    with regrow.apply(pipe, regrow.DaTo(schedule=plan)):
        hook = pipe.transformer.register_forward_hook(lambda m, i, out: outputs.append(out[0].clone()))
        generate(pipe)
        hook.remove()
    for branch in (0, 1):
        own = outputs[branch::2]
        assert torch.equal(own[0], own[1])
        assert torch.equal(own[0], own[2])
        assert torch.equal(own[3], own[4])
        assert not torch.equal(own[0], own[3])
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.filterwarnings("ignore:the method prunes nothing")
def test_the_text_is_projected_once_for_each_half_of_guidance(pipe: Any) -> None:
    plain = generate(pipe)
    counts = dict.fromkeys(("condition_embedder.text_embedder.linear_1", "blocks.4.attn2.to_v"), 0)
    for name in counts:
        inner = pipe.transformer.get_submodule(name)

        def count(*args: Any, name: str = name, forward: Any = inner.forward) -> Any:
            counts[name] += 1
            return forward(*args)

        inner.forward = count
    with regrow.apply(pipe, FORA(interval=1)) as run:
        for turn in (1, 2):
            assert torch.equal(generate(pipe), plain)
            assert set(counts.values()) == {2 * turn}
    macs = [c.macs for c in run.report().calls]
    assert macs[0] == macs[1] > macs[2]


def test_a_second_denoiser_is_named_and_takes_a_method_of_its_own() -> None:
    """Wan 2.2 has one transformer for the noisy steps and one for the others."""
    pipe = transformer_pipelines.wan(boundary_ratio=0.5)
    plain = generate(pipe, num_inference_steps=8)
    with pytest.warns(UserWarning, match="a second denoiser"):
        first = regrow.apply(pipe, FORA(interval=2))
    second = regrow.apply(pipe.transformer_2, FORA(interval=2), scheduler=pipe.scheduler)
    ours = generate(pipe, num_inference_steps=8)
    assert not torch.equal(ours, plain)
    rows = [*rows_of(first), *rows_of(second)]
    assert [c.step for c in rows if c.branch == 0] == list(range(8))
    assert [c.depth for c in rows_of(first)][:4] == ["full", "full", "layers", "layers"]
    # The second one has nothing to hand on at its first step.
    assert rows_of(second)[0].depth == "full"
    assert {c.depth for c in rows_of(second)} == {"full", "layers"}
    first.remove()
    second.remove()
    assert torch.equal(generate(pipe, num_inference_steps=8), plain)


def test_timesteps_of_each_token_are_recognised() -> None:
    """Wan 2.2's smallest model is given a timestep for every token."""
    pipe = transformer_pipelines.wan(expand_timesteps=True)
    with regrow.apply(pipe, FORA(interval=2)) as run:
        generate(pipe)
    depths = [c.depth for c in rows_of(run) if c.branch == 0]
    assert depths == ["full", "layers", "full", "layers", "full"]


@pytest.mark.parametrize("expand_timesteps", [False, True], ids=["beside", "first-frame"])
def test_a_picture_goes_on(expand_timesteps: bool) -> None:
    """Where it is the first frame, its tokens have the timestep 0."""
    pipe = transformer_pipelines.wan_from_picture(expand_timesteps=expand_timesteps)
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(7))
    plain = generate(pipe, image=picture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with regrow.apply(pipe, DeepCache(interval=2)) as run:
            assert not torch.equal(generate(pipe, image=picture), plain)
    depths = [c.depth for c in rows_of(run) if c.branch == 0]
    assert depths == ["full", "1", "full", "1", "full"]
    assert torch.equal(generate(pipe, image=picture), plain)


def test_calls_of_some_tokens_are_refused(pipe: Any) -> None:
    with pytest.raises(regrow.UnsupportedModelError, match="can't compute some of its tokens only"):
        regrow.apply(pipe, CATPruning())
    assert_untouched_module(pipe.transformer)


def test_macs_are_those_counted_by_hand() -> None:
    """Wan 2.1 1.3B, 81 frames of 480 x 832: 32,760 tokens 1,536 wide, 30 blocks."""
    tokens, width, hidden, text, blocks = 21 * 30 * 52, 1536, 8960, 512, 30
    attention = 4 * width**2 + 2 * tokens * width
    cross = 2 * width**2 + 2 * text * width
    block = tokens * (attention + cross + 2 * width * hidden) + 2 * text * width**2
    result = profile(architecture("wan-1.3b-480"), FORA(interval=2), 4)
    full, cached = result.per_call[:2]
    assert result.baseline_macs_per_call == pytest.approx(blocks * block, rel=1e-3)
    assert full == result.baseline_macs_per_call
    assert cached < 0.001 * full
