"""Models whose layers or inputs differ from those of their family: SD 3.5, PixArt-Sigma, and with sizes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import product
from typing import Any

import pytest
import test_atedm
import test_cat
import test_cat_blocks
import test_toca
import torch
from rows import rows_of
from torch import Tensor
from transformer_pipelines import FORMS, SKIP_LAYER, VARIETIES, generate

import regrow
from regrow import ATEDM, FORA, CATPruning, Combined, DeepCache, ToCa

EVERYWHERE = {"self_attention": 1.0, "cross_attention": 1.0}
FULL = ("full", 0.0)

pytestmark = pytest.mark.filterwarnings("ignore:SD3T.* has no", "ignore:the method prunes nothing")
every_kind = pytest.mark.parametrize("kind", VARIETIES)

ALL_TOKENS = {
    "cat": test_cat.Everything(),
    "cat+deepcache": test_cat_blocks.Everything(interval=1),
    "toca": ToCa(ratio=0, layer_weight=0, step_weight=0, **EVERYWHERE),
    "atedm": test_atedm.Everything(),
}
"""Methods whose calls compute all tokens on the way of some."""

SOME = {
    "cat": (CATPruning(alpha=0.4, t0=2), [FULL, FULL, ("full", 0.6), ("full", 0.6)]),
    "cat+deepcache": (
        Combined(caching=DeepCache(interval=2), tokens=CATPruning(alpha=0.4, t0=2)),
        [FULL, FULL, ("full", 0.6), ("1", 0.6)],
    ),
    "toca": (
        ToCa(interval=2, ratio=0.6, step_weight=0, **EVERYWHERE),
        [FULL, ("layers", 0.6), FULL, ("layers", 0.6)],
    ),
    "fora": (FORA(interval=2), [FULL, ("layers", 0.0), FULL, ("layers", 0.0)]),
    "deepcache": (DeepCache(interval=2), [FULL, ("1", 0.0), FULL, ("1", 0.0)]),
    "atedm": (ATEDM.preset("reuse", early=0), [FULL, FULL, ("full", 0.7), ("full", 0.7)]),
}
"""Methods that leave something out, with depth and ratio of each call."""


VARIETY_FORMS = FORMS | {"skip-layer": SKIP_LAYER}


def latents(pipe: Any, form: str) -> Tensor:
    if form == "skip-layer" and type(pipe.transformer).__name__ != "SD3Transformer2DModel":
        pytest.skip("Stable Diffusion 3 has this guidance")
    return generate(pipe, num_inference_steps=4, **VARIETY_FORMS[form])


@cache
def plain(kind: str, form: str) -> Tensor:
    return latents(VARIETIES[kind](), form)


def met(methods: Iterable[str], kind: str, form: str) -> list[str]:
    """The methods that a model meets in a form. Each meets every model, and every form; so do these."""
    if form == "skip-layer":
        return list(methods)
    turn = list(VARIETY_FORMS).index(form) + list(VARIETIES).index(kind)
    return list(methods)[turn % len(VARIETIES) :: len(VARIETIES)]


def test_each_method_meets_every_model_and_every_form() -> None:
    for methods in (ALL_TOKENS, SOME):
        cases = [(n, k, f) for k in VARIETIES for f in FORMS for n in met(methods, k, f)]
        assert {(name, kind) for name, kind, _ in cases} == set(product(methods, VARIETIES))
        assert {(name, form) for name, _, form in cases} == set(product(methods, FORMS))
        assert {(kind, form) for _, kind, form in cases} == set(product(VARIETIES, FORMS))


@pytest.mark.parametrize("form", VARIETY_FORMS)
@every_kind
def test_all_tokens_on_the_way_of_some_are_bit_for_bit_the_plain_pipeline(kind: str, form: str) -> None:
    pipe = VARIETIES[kind]()
    for name in met(ALL_TOKENS, kind, form):
        with regrow.apply(pipe, ALL_TOKENS[name]):
            assert torch.equal(latents(pipe, form), plain(kind, form)), name


@pytest.mark.parametrize("name", SOME)
@every_kind
def test_calls_are_those_planned(kind: str, name: str) -> None:
    pipe = VARIETIES[kind]()
    config, planned = SOME[name]
    with regrow.apply(pipe, config) as run:
        latents(pipe, "guided")
    calls = rows_of(run)
    assert [c.depth for c in calls] == [c.planned for c in calls] == [depth for depth, _ in planned]
    assert [c.ratio for c in calls] == pytest.approx([ratio for _, ratio in planned])
    if name not in ("cat+deepcache", "toca"):
        # Counting takes longer than the run.
        return
    calls = list(run.report().calls)
    # The first full call also projects the text.
    full = [call.macs for call in calls if (call.depth, call.ratio) == FULL]
    lean = [call.macs for call in calls if (call.depth, call.ratio) != FULL]
    assert max(lean) < 0.85 * full[1]
    assert full[1] <= full[0] == calls[0].full_macs


@every_kind
def test_tokens_left_out_have_their_old_rows(kind: str) -> None:
    pipe = VARIETIES[kind]()
    seen: list[Any] = []
    with regrow.apply(pipe, CATPruning(alpha=0.4, t0=2)) as run, run.observed(seen.append):
        ours = latents(pipe, "batch")
    with test_cat.slow(pipe.transformer, [o.tokens for o in seen]):
        expected = latents(pipe, "batch")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_tokens_that_layers_left_out_have_their_old_rows(kind: str) -> None:
    pipe = VARIETIES[kind]()
    config = ToCa(interval=2, ratio=0.6, step_weight=0, **EVERYWHERE)
    ours, chosen, _ = test_toca.chosen_by(pipe, config, num_inference_steps=4, **FORMS["wide"])
    with test_toca.slow(pipe.transformer, chosen):
        expected = latents(pipe, "wide")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_sizes_are_conditions(kind: str) -> None:
    """Two wide pictures, each with both halves of guidance."""
    given: list[Any] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given.append(kwargs.get("added_cond_kwargs"))

    pipe = VARIETIES[kind]()
    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    generate(pipe, count=2, width=24, num_inference_steps=1)
    sizes = (given[0] or {}).get("resolution")
    assert (sizes is not None) == (kind == "pixart-sized")
    if sizes is not None:
        assert sizes.tolist() == [[32, 48]] * 4
