"""Diffusion transformers: reuse of layers and of blocks against slow references, state, removal."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
import transformer_pipelines
from peft import LoraConfig, inject_adapter_in_model
from rows import rows_of
from test_exactness import assert_untouched_module
from torch import Tensor
from transformer_pipelines import (
    CASES,
    FORMS,
    KINDS,
    SKIP_LAYER,
    STEPS,
    TWO_CALLS,
    controlled,
    generate,
    in_turn,
)
from transformer_pipelines import plain as plain_of

import regrow
from regrow import ATEDM, FORA, CATPruning, DeepCache, ToCa

LAYERS = ("attn", "attn1", "attn2", "ff", "ff_context", "proj_mlp", "proj_out")
BRANCHES = (0, 1, 2)


@pytest.fixture(params=transformer_pipelines.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipe(kind: str) -> Any:
    return transformer_pipelines.KINDS[kind]()


def stacks(transformer: Any) -> list[Any]:
    """All blocks in order."""
    singles = getattr(transformer, "single_transformer_blocks", [])
    return [*transformer.transformer_blocks, *singles]


@contextmanager
def replaced(transformer: Any, cached: Any, act: Any) -> Iterator[None]:
    """Call ``act(key, module, inputs, output, whether the call is cached)`` after modules that it names."""
    count = [-1]

    def begin(*_: Any) -> None:
        count[0] += 1

    hooks = [transformer.register_forward_pre_hook(begin)]
    for key, module in act.places(transformer):

        def after(m: Any, args: Any, kwargs: Any, out: Any, key: Any = key) -> Any:
            return act(key, args, kwargs, out, cached(count[0]))

        hooks.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class SlowFORA:
    """Computes every layer, and throws the output away in cached calls."""

    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}

    def places(self, transformer: Any) -> Iterator[tuple[Any, Any]]:
        for i, block in enumerate(stacks(transformer)):
            for name in LAYERS:
                if getattr(block, name, None) is not None:
                    yield (i, name), getattr(block, name)

    def __call__(self, key: Any, args: Any, kwargs: Any, out: Any, cached: bool) -> Any:
        if cached:
            return self.kept[key]
        self.kept[key] = out
        return None


class SlowBlocks:
    """Computes every block; in cached calls those between only hand on, the last adds what was kept."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.entered: list[Any] = []
        self.added: list[Any] = []

    def places(self, transformer: Any) -> Iterator[tuple[Any, Any]]:
        yield from list(enumerate(stacks(transformer)))[self.first : self.last]

    def __call__(self, key: int, args: Any, kwargs: Any, out: Any, cached: bool) -> Any:
        joint = isinstance(out, tuple)
        given = [kwargs["encoder_hidden_states"], kwargs["hidden_states"]] if joint else [args[0]]
        made = list(out) if joint else [out]
        if key == self.first:
            self.entered = given
        if not cached:
            if key == self.last - 1:
                pairs = zip(self.entered, made, strict=True)
                self.added = [None if y is None else y - x for x, y in pairs]
            return None
        new = given
        if key == self.last - 1:
            pairs = zip(self.entered, self.added, strict=True)
            new = [x if d is None else x + d for x, d in pairs]
        return tuple(new) if joint else new[0]


def is_cached(interval: int, calls_a_step: int = 1) -> Any:
    return lambda call: (call // calls_a_step) % interval != 0


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_fora_is_that_of_full_computation_thrown_away(kind: str, pipe: Any, form: str) -> None:
    with replaced(pipe.transformer, is_cached(3), SlowFORA()):
        expected = generate(pipe, **FORMS[form])
    with regrow.apply(pipe, FORA(interval=3)) as run:
        ours = generate(pipe, **FORMS[form])
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, plain_of(kind, form))
    assert [c.depth for c in rows_of(run)] == ["full", "layers", "layers", "full", "layers"]
    if form == "guided":
        # Counting takes longer than the run.
        calls = run.report().calls
        assert calls[1].macs < 0.25 * calls[0].macs


@pytest.mark.parametrize(("kind", "form", "branch"), in_turn(BRANCHES))
def test_block_caching_adds_what_the_blocks_between_added(pipe: Any, form: str, branch: int) -> None:
    count = len(stacks(pipe.transformer))
    first, last = (branch + 2) // 2, count - (branch + 1) // 2
    with replaced(pipe.transformer, is_cached(2), SlowBlocks(first, last)):
        expected = generate(pipe, **FORMS[form])
    with regrow.apply(pipe, DeepCache(interval=2, branch=branch)) as run:
        ours = generate(pipe, **FORMS[form])
    torch.testing.assert_close(ours, expected)
    assert [c.depth for c in rows_of(run)] == ["full", str(branch + 1)] * 2 + ["full"]
    if form == "guided":
        calls = run.report().calls
        assert calls[1].macs < calls[0].macs * (branch + 3) / count


@pytest.mark.parametrize(
    ("choices", "forms"), [((0, 1, 4), tuple(FORMS)), ((0, 1), ("guided", "batch", "wide"))]
)
def test_choices_in_turn_meet_every_family_and_every_form(
    choices: tuple[int, ...], forms: tuple[str, ...]
) -> None:
    cases = in_turn(choices, forms)
    assert [case[:2] for case in cases] == [case for case in CASES if case[1] in forms]
    assert {(kind, choice) for kind, _, choice in cases} == set(product(KINDS, choices))
    assert {(form, choice) for _, form, choice in cases} == set(product(forms, choices))


def test_depth_0_hands_on_the_last_output(pipe: Any) -> None:
    outputs = []
    hook = pipe.transformer.register_forward_hook(lambda m, i, out: outputs.append(out[0].clone()))
    plan = regrow.Schedule(depth=("full", 0, 0, "full", 0), ratio=(0.0,) * 5)
    with regrow.apply(pipe, regrow.DaTo(schedule=plan)):
        generate(pipe)
    hook.remove()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[3], outputs[4])
    assert not torch.equal(outputs[0], outputs[3])


REUSING = {
    "fora": FORA(interval=2),
    "blocks": DeepCache(interval=2, branch=2),
    "toca": ToCa(interval=2, ratio=0.6, self_attention=1),
}


def inputs_of(pipe: Any) -> tuple[Any, dict[str, Any]]:
    """The arguments of the first call of a generation."""
    calls: list[Any] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))

    hook = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    generate(pipe)
    hook.remove()
    return calls[0]


@pytest.mark.parametrize("depth", [0, 1, "layers"])
def test_another_text_between_full_calls_is_not_mixed_up_with_the_old_one(depth: Any) -> None:
    """A cached call would skip the modules that read it, and the next full one would trust them."""
    pipe = transformer_pipelines.pixart()
    args, kwargs = inputs_of(pipe)
    other = kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"].flip(1) + 1}
    plan = regrow.Schedule(depth=("full", depth, "full"), ratio=(0.0,) * 3)
    with torch.no_grad():
        first, expected = (pipe.transformer(*args, **words)[0] for words in (kwargs, other))
        with regrow.apply(pipe.transformer, regrow.DaTo(schedule=plan)) as run, run.generation(3) as clock:
            found = []
            for words in (kwargs, other, other):
                found.append(pipe.transformer(*args, **words)[0])
                clock.step()
    assert not torch.equal(first, expected)
    assert all(map(torch.equal, found, (first, expected, expected)))


def test_a_text_of_another_length_begins_anew() -> None:
    pipe = transformer_pipelines.sd3()
    args, kwargs = inputs_of(pipe)
    short = kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"][:, :20]}
    with torch.no_grad():
        expected = pipe.transformer(*args, **short)[0]
        with regrow.apply(pipe.transformer, FORA(interval=3)) as run, run.generation(3) as clock:
            pipe.transformer(*args, **kwargs)
            clock.step()
            assert torch.equal(pipe.transformer(*args, **short)[0], expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_chunked_feed_forwards_hand_on_every_chunk(dim: int) -> None:
    pipe = transformer_pipelines.sd3()
    with regrow.apply(pipe, FORA(interval=3)):
        expected = generate(pipe, guidance_scale=4.0)
    pipe.transformer.enable_forward_chunking(1, dim)
    with regrow.apply(pipe, FORA(interval=3)):
        torch.testing.assert_close(generate(pipe, guidance_scale=4.0), expected)


def test_of_fluxs_single_blocks_only_what_is_read_is_kept() -> None:
    pipe = transformer_pipelines.flux()
    kept: set[str] = set()

    def look(_: Any, step: int, *__: Any) -> dict[str, Any]:
        slots = run._engine.generation.slots.values()
        kept.update(*(slot.store for slot in slots))
        return {}

    with regrow.apply(pipe, FORA(interval=2)) as run:
        generate(pipe, callback_on_step_end=look)
    singles = {name.split(".", 2)[2] for name in kept if name.startswith("single")}
    assert singles == {"proj_out"}


def test_macs_count_a_text_that_is_new() -> None:
    pipe = transformer_pipelines.pixart()
    args, kwargs = inputs_of(pipe)
    other = kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"] + 1}
    with (
        torch.no_grad(),
        regrow.apply(pipe.transformer, DeepCache(interval=9, branch=1)) as run,
        run.generation(3) as clock,
    ):
        for words in (kwargs, kwargs, other):
            pipe.transformer(*args, **words)
            clock.step()
    calls = run.report().calls
    assert [call.depth for call in calls] == ["full", "2", "full"]
    assert calls[1].macs < calls[2].macs == calls[0].macs


@pytest.mark.parametrize("kind", ["sd3", "sd35"])
def test_skip_layer_guidance_has_a_memory_of_its_own(kind: str) -> None:
    """SD3's third call leaves layers out, in some of the steps only."""
    pipe = getattr(transformer_pipelines, kind)()
    options = SKIP_LAYER
    plain = generate(pipe, **options)
    for config in REUSING.values():
        with regrow.apply(pipe, config) as run:
            images = generate(pipe, **options)
        assert images.isfinite().all()
        assert not torch.equal(images, plain)
        calls = rows_of(run)
        assert {c.branch for c in calls} == {0, 1}
        full = [[c.depth == "full" for c in calls if c.branch == branch] for branch in (0, 1)]
        # The third call begins at the second step, at which nothing of its own is cached yet.
        assert full == [[True, False, True, False, True], [True, True, False, True]]


@pytest.mark.parametrize(
    "make", [transformer_pipelines.sd3_controlled, transformer_pipelines.flux_controlled]
)
def test_beside_a_controlnet_layers_and_blocks_are_reused_and_tokens_are_all_computed(make: Any) -> None:
    pipe = make()
    plain = controlled(pipe)
    with replaced(pipe.transformer, is_cached(2), SlowFORA()):
        expected = controlled(pipe)
    with regrow.apply(pipe, FORA(interval=2)) as run:
        assert torch.equal(controlled(pipe), expected)
    calls = run.report().calls
    assert calls[1].macs < 0.25 * calls[0].macs
    for config in (DeepCache(interval=2), ToCa(interval=2)):
        with regrow.apply(pipe, config) as run:
            ours = controlled(pipe)
        assert ours.isfinite().all()
        assert not torch.equal(ours, plain)
        assert [c.depth == "full" for c in rows_of(run)] == [True, False, True, False, True]
    for config in (CATPruning(alpha=0.4, t0=2), ATEDM.preset("reuse", early=0)):
        with (
            regrow.apply(pipe, config) as run,
            pytest.warns(
                UserWarning, match="a ControlNet adds to all tokens; its calls are computed in full"
            ),
        ):
            assert torch.equal(controlled(pipe), plain)
        assert {(c.depth, c.ratio) for c in rows_of(run)} == {("full", 0)}
    assert torch.equal(controlled(pipe), plain)


def test_the_two_calls_of_flux_are_kept_apart() -> None:
    pipe = transformer_pipelines.flux()
    with replaced(pipe.transformer, is_cached(2, 2), SlowTwo()):
        expected = generate(pipe, **TWO_CALLS)
    with regrow.apply(pipe, FORA(interval=2)) as run:
        assert torch.equal(generate(pipe, **TWO_CALLS), expected)
    assert len(rows_of(run)) == 2 * STEPS


@pytest.mark.filterwarnings("ignore:the method prunes nothing")
def test_the_two_calls_of_flux_keep_blocks_apart() -> None:
    pipe = transformer_pipelines.flux()
    plain = generate(pipe, **TWO_CALLS)
    with replaced(pipe.transformer, is_cached(2, 2), SlowTwoBlocks(2, transformer_pipelines.LAYERS - 2)):
        expected = generate(pipe, **TWO_CALLS)
    with regrow.apply(pipe, DeepCache(interval=2, branch=3)) as run:
        ours = generate(pipe, **TWO_CALLS)
    torch.testing.assert_close(ours, expected)
    assert not torch.allclose(ours, plain)
    depths = ["full", "full", "4", "4"]
    assert [c.depth for c in rows_of(run)] == [*depths * 2, *depths[:2]]
    with regrow.apply(pipe, DeepCache(interval=1)):
        assert torch.equal(generate(pipe, **TWO_CALLS), plain)
    assert torch.equal(generate(pipe, **TWO_CALLS), plain)


class SlowTwoBlocks(SlowBlocks):
    """As SlowBlocks, with calls in turn for two branches."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__(first, last)
        self.branches = [SlowBlocks(first, last) for _ in range(2)]
        self.calls = 0

    def __call__(self, key: int, args: Any, kwargs: Any, out: Any, cached: bool) -> Any:
        if key == self.first:
            self.calls += 1
        return self.branches[self.calls % 2](key, args, kwargs, out, cached)


class SlowTwo(SlowFORA):
    """As SlowFORA, with calls in turn for two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, int] = {}

    def __call__(self, key: Any, args: Any, kwargs: Any, out: Any, cached: bool) -> Any:
        turn = self.calls.get(key, 0)
        self.calls[key] = turn + 1
        return super().__call__((*key, turn % 2), args, kwargs, out, cached)


def test_bfloat16_timesteps_of_flux_are_recognised() -> None:
    pipe = transformer_pipelines.flux().to(torch.bfloat16)
    with regrow.apply(pipe, FORA(interval=2)) as run:
        generate(pipe, num_inference_steps=30)
    assert [c.depth for c in rows_of(run)] == ["full", "layers"] * 15


TEXT = {
    "sd3": ("context_embedder",),
    "pixart": (
        "caption_projection",
        "transformer_blocks.3.attn2.to_k",
        f"transformer_blocks.{transformer_pipelines.LAYERS - 1}.attn2.to_v",
    ),
    "flux": ("context_embedder",),
}


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.filterwarnings("ignore:the method prunes nothing")
def test_what_depends_on_the_text_alone_is_computed_once_a_generation(kind: str, pipe: Any) -> None:
    plain = {seed: generate(pipe, seed=seed, count=1 + seed) for seed in (0, 1)}
    counts = dict.fromkeys(TEXT[kind], 0)
    for name in TEXT[kind]:

        def count(*_: Any, name: str = name) -> None:
            counts[name] += 1

        # A layer's own modules run only if the layer does.
        inner = pipe.transformer.get_submodule(name)
        inner = getattr(inner, "linear_1", inner)
        original = inner.forward
        inner.forward = lambda *a, f=original, c=count: (c(), f(*a))[1]
    with regrow.apply(pipe, FORA(interval=1)) as run:
        for turn, seed in enumerate((0, 1, 0), 1):
            assert torch.equal(generate(pipe, seed=seed, count=1 + seed), plain[seed])
            assert set(counts.values()) == {turn}
    macs = [c.macs for c in run.report().calls]
    assert macs[0] > macs[1] == macs[-1]


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.filterwarnings("ignore:the method prunes nothing")
def test_the_text_is_computed_in_every_call_if_that_is_asked_for(kind: str, pipe: Any) -> None:
    plain = generate(pipe)
    with regrow.apply(pipe, FORA(interval=1), keep_text=False) as run:
        assert torch.equal(generate(pipe), plain)
    macs = {c.macs for c in run.report().calls}
    assert len(macs) == 1
    assert run.report().macs == run.report().full_macs


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", TEXT)
def test_full_calls_read_the_text_that_they_are_given(pipe: Any, mode: Any) -> None:
    """Also one that comes back after another, and one that is written to, which inference mode hides."""
    args, kwargs = inputs_of(pipe)

    def read(text: Tensor) -> Tensor:
        return pipe.transformer(*args, **kwargs | {"encoder_hidden_states": text})[0]

    plan = regrow.Schedule(depth=("full", "full", "full", "full", 1), ratio=(0.0,) * 5)
    with mode():
        mine, found = kwargs["encoder_hidden_states"].clone(), []
        other = mine.flip(1) + 1
        expected = [read(text) for text in (mine, other, mine, mine + 1)]
        with regrow.apply(pipe.transformer, regrow.DaTo(schedule=plan)) as run, run.generation(5) as clock:
            for step, text in enumerate((mine, other, mine, mine)):
                if step == 3:
                    text += 1
                found.append(read(text))
                clock.step()
    assert all(map(torch.equal, found, expected))


def test_adapters_set_before_a_cached_call_reach_the_texts_layers_in_the_full_one_behind_it() -> None:
    """The cached call leaves out most of the layers that read the text."""
    pipe = transformer_pipelines.pixart()
    args, kwargs = inputs_of(pipe)
    config = LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False)
    model = inject_adapter_in_model(config, pipe.transformer, "a")
    adapters = [module for module in model.modules() if hasattr(module, "set_scale")]
    assert adapters
    plan = regrow.Schedule(depth=("full", 1, "full"), ratio=(0.0,) * 3)
    with torch.no_grad(), regrow.apply(model, regrow.DaTo(schedule=plan)) as run:
        with run.generation(3) as clock:
            for strength in (1.0, 5.0, 5.0):
                for adapter in adapters:
                    adapter.set_scale("a", strength)
                found = model(*args, **kwargs)[0]
                clock.step()
        assert [c.depth for c in rows_of(run)] == ["full", "1", "full"]
    with torch.no_grad():
        assert torch.equal(found, model(*args, **kwargs)[0])


def test_a_text_that_was_written_to_is_a_new_one(pipe: Any, kind: str) -> None:
    if kind not in TEXT:
        pytest.skip("DiT reads no text")
    args, kwargs = inputs_of(pipe)
    text = kwargs["encoder_hidden_states"]
    with torch.no_grad():
        before = pipe.transformer(*args, **kwargs)[0]
        with regrow.apply(pipe.transformer, FORA(interval=2)) as run, run.generation(4) as clock:
            assert torch.equal(pipe.transformer(*args, **kwargs)[0], before)
            clock.step()
            clock.step()
            text += 1
            again = pipe.transformer(*args, **kwargs)[0]
        assert torch.equal(again, pipe.transformer(*args, **kwargs)[0])
        assert not torch.equal(again, before)


@pytest.mark.parametrize("config", REUSING.values(), ids=REUSING)
def test_in_inference_mode_the_pictures_are_the_same(pipe: Any, config: Any) -> None:
    with regrow.apply(pipe, config):
        expected = generate(pipe)
        with torch.inference_mode():
            ours = generate(pipe)
    torch.testing.assert_close(ours.clone(), expected)


COPIED = {
    "fora": FORA(interval=2),
    "blocks": DeepCache(interval=2),
    "toca": ToCa(interval=2, ratio=0.6),
    "cat": CATPruning(alpha=0.4, t0=2),
    "atedm": ATEDM.preset("reuse", early=0),
}


@pytest.mark.parametrize(("kind", "name"), [*(("flux", name) for name in COPIED), ("pixart", "fora")])
def test_deepcopy_and_pickle_work_after_removal_alone(pipe: Any, name: str) -> None:
    plain = generate(pipe)
    with regrow.apply(pipe, COPIED[name]):
        generate(pipe)
        for target in (pipe, pipe.transformer):
            with pytest.raises(TypeError, match="remove"):
                copy.deepcopy(target)
        with pytest.raises(TypeError, match="remove"):
            pickle.dumps(pipe.transformer)
    copied = copy.deepcopy(pipe)
    pickled = pickle.loads(pickle.dumps(pipe.transformer))
    with torch.no_grad():
        for weight in pipe.transformer.parameters():
            weight.zero_()
    assert torch.equal(generate(copied), plain)
    pipe.transformer = pickled
    assert torch.equal(generate(pipe), plain)


def test_methods_that_prune_are_refused_by_name(pipe: Any) -> None:
    with pytest.raises(regrow.UnsupportedModelError, match="tokens can't be left out"):
        regrow.apply(pipe, regrow.SiTo.preset("d"))
    assert_untouched_module(pipe.transformer)
