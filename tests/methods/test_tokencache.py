"""TokenCache: its calls against full ones with old updates put back, its steps, shares and files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformer_pipelines
from pydantic import ValidationError
from torch import Tensor
from transformer_pipelines import FORMS, generate

import regrow
from regrow import predictors
from regrow.core.decision import Some
from regrow.core.recipe import CallInfo
from regrow.files import FileError
from regrow.lab.measure.architectures import architecture
from regrow.lab.measure.macs import profile
from regrow.methods import tokencache
from regrow.methods.tokencache import Choice, Counts, Spacing, TokenCache
from regrow.models import UnsupportedModelError, layout_of
from regrow.origin import denoiser_key
from regrow.predictors import (
    UNTRAINED,
    CachePredictor,
    Learned,
    described_by,
    read_learned,
    write_learned,
)
from regrow.recover.time import Taylor
from regrow.schedule import SITES
from regrow.tokens.shares import Table

KINDS = ("dit", "pixart")
SMALL = {"predictor": UNTRAINED, "full_steps": 2, "last_blocks": 1, "ratio": 0.6}
Chosen = Mapping[str, Tensor] | None


def chosen_by(pipe: Any, config: Any, **options: Any) -> tuple[Tensor, list[Chosen], Any]:
    """A generation, the tokens that the blocks of each call computed (None: all), and its run."""
    seen: list[Chosen] = []

    def note(observation: regrow.Observation) -> None:
        sited = observation.record.depth == SITES
        seen.append(dict(observation.refreshed) if sited else None)

    with regrow.apply(pipe, config) as run, run.observed(note):
        out = generate(pipe, **options)
    return out, seen, run


def put_back(old: Tensor, new: Tensor, tokens: Tensor) -> Tensor:
    """The old rows, but for those of the tokens."""
    mixed, batch = old.clone(), torch.arange(len(new))[:, None]
    mixed[batch, tokens] = new[batch, tokens]
    return mixed


@contextmanager
def slow(transformer: Any, calls: list[Chosen], sites: int) -> Iterator[None]:
    """Computes each block for all tokens in every call, then puts back what it should not have known."""
    now, kept = [-1], {}

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        now[0] += 1

    def keys(name: str, block: str, out: Tensor) -> Tensor:
        chosen = calls[now[0]]
        if chosen is not None:
            out = put_back(kept[name], out, chosen[block]) if block in chosen else kept[name]
        kept[name] = out
        return out

    def block(name: str, x: Tensor, out: Tensor) -> Tensor:
        chosen, update = calls[now[0]], out - x
        if chosen is not None:
            update = put_back(kept[name], update, chosen[name]) if name in chosen else kept[name]
        kept[name] = update
        return out if chosen is None else x + update

    hooks = [transformer.register_forward_pre_hook(begin, with_kwargs=True)]
    for i, module in enumerate(transformer.transformer_blocks[:sites]):
        name = f"transformer_blocks.{i}"
        for part in ("to_k", "to_v"):
            own = f"{name}.{part}"
            hooks.append(
                getattr(module.attn1, part).register_forward_hook(
                    lambda m, a, out, own=own, name=name: keys(own, name, out)
                )
            )
        hooks.append(module.register_forward_hook(lambda m, a, out, name=name: block(name, a[0], out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["guided", "unguided", "wide", "batch"])
def test_a_call_is_a_full_one_with_old_updates_put_back(kind: str, form: str) -> None:
    pipe = transformer_pipelines.KINDS[kind]()
    sites = len(pipe.transformer.transformer_blocks) - 1
    ours, chosen, run = chosen_by(pipe, TokenCache(**SMALL), **FORMS[form])
    assert [c is None for c in chosen] == [True, False, False, True, False]
    assert all(len(c) == sites for c in chosen if c)
    with slow(pipe.transformer, chosen, sites):
        expected = generate(pipe, **FORMS[form])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    if form == "guided":
        # Counting takes longer than the run.
        calls = run.report().calls
        assert calls[1].macs < 0.7 * calls[3].macs
        assert calls[1].selection_macs > 0


@pytest.mark.parametrize("choice", [Choice.RANDOM, Choice.TOCA, Choice.TOME])
@pytest.mark.parametrize("form", ["guided", "wide"])
def test_other_choices_are_calls_with_old_updates_put_back(choice: Choice, form: str) -> None:
    pipe = transformer_pipelines.dit()
    sites = len(pipe.transformer.transformer_blocks) - 1
    config = TokenCache(**SMALL | {"choice": choice, "predictor": None})
    ours, chosen, _ = chosen_by(pipe, config, **FORMS[form])
    with slow(pipe.transformer, chosen, sites):
        expected = generate(pipe, **FORMS[form])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_as_many_i_steps_as_calls_are_the_plain_pipeline_bit_for_bit() -> None:
    pipe = transformer_pipelines.dit()
    plain = generate(pipe)
    config = TokenCache(**SMALL | {"full_steps": 50})
    with pytest.warns(UserWarning, match="saved nothing"), regrow.apply(pipe, config):
        assert torch.equal(generate(pipe), plain)


def test_a_ratio_of_1_reuses_every_update() -> None:
    pipe = transformer_pipelines.dit()
    sites = len(pipe.transformer.transformer_blocks) - 1
    ours, chosen, run = chosen_by(pipe, TokenCache(**SMALL | {"ratio": 1.0}))
    assert [c if c is None else len(c) for c in chosen] == [None, 0, 0, None, 0]
    with slow(pipe.transformer, chosen, sites):
        expected = generate(pipe)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert run.report().selection_macs == 0


def test_a_forecast_of_updates_differs_from_their_reuse() -> None:
    pipe = transformer_pipelines.dit()
    with regrow.apply(pipe, TokenCache(**SMALL)):
        reused = generate(pipe, num_inference_steps=8)
    with regrow.apply(pipe, TokenCache(**SMALL, recovery=Taylor(order=1))):
        forecast = generate(pipe, num_inference_steps=8)
    assert not torch.allclose(reused, forecast)


def test_counts_from_the_call_are_the_cut_of_all_alphas() -> None:
    """The paper's: the highest values of all blocks, the mean share in the batch of each block."""
    pipe = transformer_pipelines.dit()
    config = TokenCache(**SMALL | {"counts": Counts.DATA})
    _, chosen, _ = chosen_by(pipe, config, **FORMS["guided"])
    [first] = [c for c in chosen[1:2] if c is not None]
    tokens, sites = 64, len(pipe.transformer.transformer_blocks) - 1
    counts = [t.shape[1] for t in first.values()]
    assert len(set(counts)) > 1
    assert abs(sum(counts) - 0.4 * tokens * sites) <= sites / 2


def learned_file(folder: Path, transformer: Any, **changes: Any) -> Path:
    """A predictor that likes the last block, and tokens in the order of its head's numbers."""
    sites = len(transformer.transformer_blocks)
    torch.manual_seed(3)
    predictor = CachePredictor.of(transformer, sites)
    quantiles = torch.linspace(0, 1, 9).expand(5, sites, 9) * torch.linspace(0.2, 1, sites)[None, :, None]
    tensors = {f"predictor.{k}": v for k, v in predictor.state_dict().items()}
    tensors |= {"quantiles": quantiles.contiguous(), "alpha": torch.linspace(0.2, 0.8, 5)}
    about = Learned(
        kind="predictor", model="a test", denoiser=denoiser_key(transformer), sites=sites
    ).model_copy(update=changes)
    file = folder / "learned.safetensors"
    write_learned(file, about, tensors)
    return file


def test_a_trained_predictor_sets_shares_and_steps(tmp_path: Path) -> None:
    pipe = transformer_pipelines.dit(9)
    file = learned_file(tmp_path, pipe.transformer)
    config = TokenCache(predictor=str(file), full_steps=2, last_blocks=1, ratio=0.8, beta=-3)
    ours, chosen, run = chosen_by(pipe, config)
    counts = [[t.shape[1] for t in c.values()] for c in chosen if c]
    assert all(c == sorted(c) and len(set(c)) > 3 for c in counts)
    assert torch.equal(chosen_by(pipe, config)[0], ours)
    # What is counted without running the model is what ran.
    counted = profile(architecture("cifar10"), None, 1)
    assert counted.macs
    assert sum(c.selection_macs > 0 for c in run.report().calls) == len(counts)


def test_the_choice_is_the_highest_alpha_of_the_block() -> None:
    pipe = transformer_pipelines.dit()
    layout = layout_of(pipe.transformer)
    from regrow.core.decision import Entered
    from regrow.methods.tokencache import _Rule

    decider = _Rule(TokenCache(**SMALL)).on(pipe.transformer, layout)
    x = torch.randn(2, 64, pipe.transformer.inner_dim)
    told = {"timestep": torch.tensor([3, 3]), "class_labels": torch.tensor([1, 2])}
    info = CallInfo(2, False, (), torch.Generator())
    seen = decider.look(decider.begin(), Entered(x, (), told), info)
    assert decider.predictor is not None
    alpha = torch.sigmoid(decider.predictor.head(decider.predictor.block(x, **told)))
    for site in layout.block_sites[:-1]:
        chosen = decider.choose(decider.begin(), seen, site, x, 10, info)
        for b in range(2):
            order = sorted(range(64), key=lambda t: -float(alpha[b, t, site.index]))
            assert set(chosen[b].tolist()) == set(order[:10])


def test_the_predictor_sees_what_enters_the_first_block_also_if_that_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = transformer_pipelines.dit()
    entered: list[Tensor] = []
    looked: list[Tensor] = []
    look = tokencache.TokenCacheDecider.look

    def spy(self: Any, memory: Any, seen: Any, info: Any) -> Any:
        looked.extend([] if seen.x.is_meta else [seen.x])
        return look(self, memory, seen, info)

    monkeypatch.setattr(tokencache.TokenCacheDecider, "look", spy)
    # Its table lets the first blocks compute nothing at this ratio.
    file = learned_file(tmp_path, pipe.transformer)
    config = TokenCache(predictor=str(file), full_steps=2, last_blocks=1, ratio=0.8, beta=-3)
    hook = pipe.transformer.pos_embed.register_forward_hook(lambda m, a, out: entered.append(out))
    chosen = chosen_by(pipe, config)[1]
    hook.remove()
    partly = [x for x, blocks in zip(entered, chosen, strict=True) if blocks is not None]
    assert "transformer_blocks.0" not in next(blocks for blocks in chosen if blocks is not None)
    assert len(looked) == len(partly) == 3
    assert all(torch.equal(a, b) for a, b in zip(looked, partly, strict=True))


def test_blocks_that_cant_compute_some_tokens_are_warned_of_once_with_the_reason() -> None:
    pipe = transformer_pipelines.pixart()
    for block in pipe.transformer.transformer_blocks:
        block.set_chunk_feed_forward(2, 1)
    with warnings.catch_warnings(record=True) as told, regrow.apply(pipe, TokenCache(**SMALL)) as run:
        warnings.simplefilter("always")
        generate(pipe)
        report = run.report()
    assert not [w for w in told if "were not called" in str(w.message)]
    assert [c.depth for c in report.calls] == ["full"] * 5
    assert "disable_forward_chunking" in report.calls[1].reason


def test_counts_from_the_call_are_counted_without_data_by_their_mean() -> None:
    arch = architecture("cifar10")
    fields = SMALL | {"last_blocks": 0}
    data = profile(arch, TokenCache(**fields, counts=Counts.DATA), 6)
    assert data.macs == profile(arch, TokenCache(**fields), 6).macs < data.baseline_macs


def test_a_report_reads_a_predictor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = transformer_pipelines.dit()
    file = learned_file(tmp_path, pipe.transformer)
    config = TokenCache(predictor=str(file), full_steps=2, last_blocks=1, ratio=0.5, beta=-3)
    with regrow.apply(pipe, config) as run:
        generate(pipe)
        read: list[Path] = []
        monkeypatch.setattr(
            predictors, "read_learned", lambda file, kind: read.append(file) or read_learned(file, kind)
        )
        run.report()
    assert len(read) == 1


WRONG: dict[str, tuple[str, Any]] = {
    "no table": ("quantiles", None),
    "of no numbers": ("quantiles", torch.full((5, 9, 9), torch.nan)),
    "of other blocks": ("quantiles", torch.rand(5, 3, 9)),
    "of one row": ("quantiles", torch.rand(9)),
    "endless": ("alpha", torch.full((5,), torch.inf)),
    "no weight": ("predictor.head.bias", None),
    "of another form": ("predictor.head.bias", torch.rand(3)),
    "of another's": ("predictor.other", torch.rand(3)),
}


@pytest.mark.parametrize("what", WRONG)
def test_tensors_that_cant_be_are_refused_in_one_line(tmp_path: Path, what: str) -> None:
    pipe = transformer_pipelines.dit()
    file = learned_file(tmp_path, pipe.transformer)
    learned, (name, tensor) = read_learned(file, "predictor"), WRONG[what]
    tensors = {k: v for k, v in learned.tensors.items() if k != name}
    write_learned(file, learned.about, tensors if tensor is None else tensors | {name: tensor})
    with pytest.raises(FileError, match=f"{re.escape(name)}: this tensor") as error:
        regrow.apply(pipe, TokenCache(predictor=str(file), last_blocks=1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["no such layer", "of another layer", "half of it"])
def test_updates_that_fit_no_layer_are_refused_in_one_line(tmp_path: Path, what: str) -> None:
    pipe = transformer_pipelines.dit()
    transformer = pipe.transformer
    last = f"transformer_blocks.{transformer_pipelines.LAYERS - 1}.attn1.to_q"
    name = last if what != "no such layer" else "transformer_blocks.99.to_q"
    wide = 32 if what != "of another layer" else 24
    tensors = {f"transformer.{name}.lora_A.weight": torch.rand(2, wide)}
    if what != "half of it":
        tensors[f"transformer.{name}.lora_B.weight"] = torch.rand(32, 2)
    about = Learned(
        kind="lora",
        model="a test",
        denoiser=denoiser_key(transformer),
        sites=len(transformer.transformer_blocks),
        settings={"last_blocks": 1},
    )
    file = tmp_path / "lora.safetensors"
    write_learned(file, about, tensors)
    with pytest.raises(FileError, match=f"{re.escape(name)}: this tensor") as error:
        regrow.apply(pipe, TokenCache(**SMALL, lora=str(file)))
    assert "\n" not in str(error.value)


def test_a_name_in_a_file_of_others_is_one_line(tmp_path: Path) -> None:
    file = learned_file(tmp_path, transformer_pipelines.dit().transformer, model="a\n\x1b[31m" * 99)
    with pytest.raises(ValueError, match="not for this PixArt") as error:
        regrow.apply(transformer_pipelines.pixart(), TokenCache(predictor=str(file), last_blocks=1))
    assert str(error.value).isprintable()


def damaged(file: Path, what: str) -> None:
    """Make a file one that must be refused."""
    if what == "cut off":
        file.write_bytes(file.read_bytes()[:-8])
    elif what == "renamed":
        other = file.with_name("other.safetensors")
        file.rename(other)
        described_by(file).rename(described_by(other))
        other.rename(file)
    elif what == "newer":
        text = described_by(file).read_text()
        described_by(file).write_text(text.replace('"version": 1', '"version": 2'))
    elif what == "other fields":
        text = described_by(file).read_text()
        described_by(file).write_text(text.replace('"sites"', '"places"'))
    elif what == "no description":
        described_by(file).write_text("[]")


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("cut off", "cut off, changed"),
        ("renamed", "there is no such file"),
        ("newer", "version: 2 is newer"),
        ("other fields", "not permitted"),
        ("no description", "does not describe"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, what: str, told: str) -> None:
    pipe = transformer_pipelines.dit()
    file = learned_file(tmp_path, pipe.transformer)
    damaged(file, what)
    with pytest.raises((FileError, OSError), match=told) as error:
        regrow.apply(pipe, TokenCache(predictor=str(file), last_blocks=1))
    assert "\n" not in str(error.value)
    assert "learned" in str(error.value)
    generate(pipe)


def test_a_predictor_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    file = learned_file(tmp_path, transformer_pipelines.dit().transformer)
    pipe = transformer_pipelines.pixart()
    with pytest.raises(ValueError, match=r"learned\.safetensors is for a test .* not for this PixArt"):
        regrow.apply(pipe, TokenCache(predictor=str(file), last_blocks=1))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = learned_file(tmp_path, transformer_pipelines.dit().transformer, kind="router")
    with pytest.raises(FileError, match="kind: 'router' is not allowed here"):
        read_learned(file, "predictor")


def test_a_model_without_a_predictor_is_refused() -> None:
    with pytest.raises(ValueError, match="predictor: none is bundled for this DiT"):
        regrow.apply(transformer_pipelines.dit(), TokenCache(last_blocks=1))


def test_too_many_last_blocks_are_refused() -> None:
    pipe = transformer_pipelines.dit()
    blocks = len(pipe.transformer.transformer_blocks)
    with pytest.raises(ValueError, match=f"last_blocks: {blocks} is not allowed, it must be < {blocks}"):
        regrow.apply(pipe, TokenCache(predictor=UNTRAINED, last_blocks=blocks))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_models_whose_blocks_return_more_than_tokens_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match="TokenCache works on DiT, PixArt, Latte and Wan"):
        regrow.apply(transformer_pipelines.KINDS[kind](), TokenCache(predictor=UNTRAINED))


def test_a_share_of_tokens_is_rounded_up() -> None:
    assert Some(0.1, "").count(256) == 26
    assert Some(0.1, "").count(1024) == 103
    assert Some(0.3, "").count(10) == 3
    assert Some(None, "").count(10) is None


@pytest.mark.parametrize("field", ["ratio", "full_steps", "last_blocks", "beta", "spacing", "choice"])
def test_fields_are_checked(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        TokenCache.model_validate({field: -1e9})


PAPER = [
    ("dit-xl-256", 50, "dit-256-50", 11.867, 4.94, 5.26),
    ("dit-xl-512", 20, "dit-512-20", 20.983, 12.89, None),
]


@pytest.mark.parametrize(("arch", "steps", "preset", "whole", "without", "with_it"), PAPER)
def test_macs_are_the_papers(
    arch: str, steps: int, preset: str, whole: float, without: float, with_it: float | None
) -> None:
    """TFLOPs of one picture, two a MAC."""
    counted = profile(architecture(arch), TokenCache.preset(preset), steps)
    assert 2e-12 * counted.baseline_macs == pytest.approx(whole, rel=0.002)
    assert 2e-12 * counted.macs == pytest.approx(without, rel=0.002)
    if with_it is not None:
        assert 2e-12 * (counted.macs + counted.selection_macs) == pytest.approx(with_it, rel=0.002)


def test_macs_of_pixart_are_the_papers() -> None:
    counted = profile(architecture("pixart-alpha-1024"), None, 50)
    assert 2e-12 * counted.baseline_macs == pytest.approx(325.48, rel=0.002)


def test_spacings_differ(tmp_path: Path) -> None:
    from regrow.methods.tokencache import full_calls

    table = Table(np.zeros((5, 3, 9)), np.linspace(0.2, 0.8, 5))
    steps = {
        spacing: full_calls(TokenCache(full_steps=8, beta=-6, spacing=spacing), table, 40)
        for spacing in Spacing
    }
    assert len({frozenset(s) for s in steps.values()}) == 3
    assert steps[Spacing.UNIFORM] == set(range(0, 40, 5))


def test_stale_tokens_take_turns() -> None:
    """With a staleness of 1 any choice computes every token before one comes again."""
    pipe = transformer_pipelines.dit()
    fields = {"ratio": 0.75, "full_steps": 1, "staleness": 1.0, "choice": Choice.RANDOM, "last_blocks": 1}
    _, chosen, _ = chosen_by(pipe, TokenCache(**fields))
    calls = [c for c in chosen if c is not None]
    assert len(calls) == 4
    for name in calls[0]:
        for sample in range(len(calls[0][name])):
            assert sorted(t for c in calls for t in c[name][sample].tolist()) == list(range(64))


def test_a_model_that_is_offloaded_before_is_computed_alike(tmp_path: Path) -> None:
    """Weights that are at hand only while a module runs are not what the predictor is made of."""
    from accelerate import cpu_offload

    pipe = transformer_pipelines.dit()
    config = TokenCache(
        predictor=str(learned_file(tmp_path, pipe.transformer)), last_blocks=1, full_steps=2
    )
    with regrow.apply(pipe, config):
        expected = generate(pipe)
    cpu_offload(pipe.transformer, torch.device("cpu"))
    with regrow.apply(pipe, config):
        assert torch.equal(generate(pipe), expected)
    with pytest.raises(ValueError, match="none is bundled"):
        regrow.apply(pipe, TokenCache(last_blocks=1))


def test_applying_draws_nothing_of_the_callers_chance() -> None:
    pipe = transformer_pipelines.dit()
    before = torch.get_rng_state()
    with regrow.apply(pipe, TokenCache(**SMALL)):
        assert torch.equal(torch.get_rng_state(), before)
        first = generate(pipe)
    torch.rand(3)
    with regrow.apply(pipe, TokenCache(**SMALL)):
        assert torch.equal(generate(pipe), first)
