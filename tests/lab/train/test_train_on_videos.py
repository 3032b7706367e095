"""Training on video models: tokens of frames, of places in all frames, and of whole videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformer_pipelines
from PIL import Image
from torch import Tensor, nn
from transformer_pipelines import PAIRS, TEXT

import regrow
from regrow.lab.measure.sampling import make
from regrow.lab.measure.videos import read_clip, save_clip
from regrow.lab.train.examples import Batch, size_of
from regrow.lab.train.frozen import Frozen, Past, past, relaxed, truth
from regrow.lab.train.loop import Training
from regrow.lab.train.predictor import PredictorObjective, on_sites
from regrow.lab.train.refine import RefineObjective, add_adapter
from regrow.lab.train.router import Router, RouterObjective
from regrow.lab.train.run import (
    Data,
    Workplace,
    train_predictor,
    train_refinement,
    train_router,
    workplace,
)
from regrow.lab.train.steps import Steps
from regrow.methods.l2c import L2C
from regrow.methods.tokencache import TokenCache
from regrow.models import layout_of
from regrow.predictors import UNTRAINED, CachePredictor, read_learned, table_of
from regrow.tokens.shares import Table

KINDS = ("latte", "wan")
LAYERS = 4
FRAMES = {"latte": 3, "wan": 2}
ROWS, COLUMNS = 4, 6
SITES = {"latte": 2 * PAIRS, "wan": LAYERS}
SIZES: dict[str, dict[str, int]] = {"latte": {}, "wan": {"height": 32, "width": 48, "frames": 5}}
SMALL = {"pictures": 3, "steps": 1, "batch": 2}
FEW = Training(steps=2, lr=1e-2, batch=2, every=1, sampler_steps=5, held_out=1)
CACHED: dict[str, Any] = {"full_steps": 2, "last_blocks": 2, "ratio": 0.6}


def frozen_of(kind: str, dtype: torch.dtype = torch.float32) -> Frozen:
    pipe = transformer_pipelines.wan(layers=LAYERS) if kind == "wan" else transformer_pipelines.latte()
    denoiser = pipe.transformer.to(dtype).requires_grad_(False)
    return Frozen(denoiser, layout_of(denoiser), Steps.of(pipe.scheduler, 10))


def batch_of(kind: str, dtype: torch.dtype = torch.float32) -> Batch:
    torch.manual_seed(5)
    x = torch.randn(2, 4, FRAMES[kind], 2 * ROWS, 2 * COLUMNS, dtype=dtype)
    words = torch.randn(2, 5, TEXT, dtype=dtype)
    return Batch(x, torch.tensor([3, 6]), {"encoder_hidden_states": words})


def alphas(kind: str, value: float | None = None) -> Tensor:
    shape = (2, FRAMES[kind] * ROWS * COLUMNS, SITES[kind])
    return torch.rand(shape) if value is None else torch.full(shape, value)


def slow(kind: str, frozen: Frozen, before: Past, batch: Batch, alpha: Tensor) -> Tensor:
    """The last block's tokens, block by block, each token's weight looked up by its place."""
    given: list[tuple[Tensor, Any]] = []
    hooks = [
        site.module.register_forward_pre_hook(lambda m, args: given.append((args[0], args[1:])))
        for site in frozen.layout.block_sites
    ]
    frozen.call(before.x, before.index, batch.given)
    for hook in hooks:
        hook.remove()
    places = ROWS * COLUMNS
    x = given[0][0]
    for number, (site, (_, others)) in enumerate(zip(frozen.layout.block_sites, given, strict=True)):
        temporal = site.name.startswith("temporal")
        if temporal:
            x = torch.stack(
                [x[s * FRAMES[kind] : (s + 1) * FRAMES[kind], p] for s in range(2) for p in range(places)]
            )
            if number == 1:
                x = x + frozen.denoiser.temp_pos_embed
        weight = torch.empty(*x.shape[:2], 1)
        for row in range(x.shape[0]):
            for token in range(x.shape[1]):
                if temporal:
                    sample, where = row // places, token * places + row % places
                else:
                    sequences = x.shape[0] // 2
                    sample, where = row // sequences, row % sequences * x.shape[1] + token
                weight[row, token] = alpha[sample, where, site.index]
        update = site.module(x, *others) - x
        x = x + weight * update + (1 - weight) * before.kept[site.key]
        if temporal:
            x = torch.stack(
                [x[s * places : (s + 1) * places, f] for s in range(2) for f in range(FRAMES[kind])]
            )
    if kind == "latte":
        return torch.stack(
            [x[s * FRAMES[kind] : (s + 1) * FRAMES[kind], p] for s in range(2) for p in range(places)]
        )
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_1_is_the_full_call_bit_for_bit_and_others_are_mixtures_of_each_token(kind: str) -> None:
    frozen, batch = frozen_of(kind), batch_of(kind)
    sites = frozen.layout.block_sites
    before = past(frozen, sites, batch)
    full = truth(frozen, sites, before, batch.given)
    output, last = relaxed(frozen, sites, before, batch.given, on_sites(alphas(kind, 1.0), sites, before))
    assert torch.equal(output, full.output)
    assert torch.equal(last, full.last)
    zeros = alphas(kind, 0.0)
    _, last = relaxed(frozen, sites, before, batch.given, on_sites(zeros, sites, before))
    torch.testing.assert_close(last, slow(kind, frozen, before, batch, zeros), rtol=0, atol=0)
    assert not torch.allclose(last, full.last)
    mixed = alphas(kind)
    _, last = relaxed(frozen, sites, before, batch.given, on_sites(mixed, sites, before))
    torch.testing.assert_close(last, slow(kind, frozen, before, batch, mixed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_predictor_are_those_of_finite_differences(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # Wan's blocks compute in float32 whatever they are given.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    frozen, batch = frozen_of(kind, torch.float64), batch_of(kind, torch.float64)
    torch.manual_seed(2)
    predictor = CachePredictor.of(frozen.denoiser, SITES[kind]).eval().requires_grad_(True)
    objective = PredictorObjective(frozen, predictor, 1, 0.1)

    def loss() -> Tensor:
        found = objective.losses(batch)
        return found.error + found.cost

    loss().backward()
    head, first = predictor.head.weight, next(p for p in predictor.block.parameters() if p.ndim == 2)
    for weight, place in ((head, (0, 3)), (head, (1, 5)), (head, (SITES[kind] - 2, 0)), (first, (1, 2))):
        assert weight.grad is not None
        with torch.no_grad():
            values = []
            for nudge in (1e-5, -2e-5):
                weight[place] += nudge
                values.append(loss())
            weight[place] += 1e-5
        expected = (values[0] - values[1]) / 2e-5
        assert expected.abs() > 1e-9
        torch.testing.assert_close(weight.grad[place], expected, rtol=1e-4, atol=1e-13)
    # The last block is always computed.
    assert head.grad is not None
    assert not head.grad[-1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_of_ones_is_the_full_call(kind: str) -> None:
    frozen, batch = frozen_of(kind), batch_of(kind)
    router = Router(10, len(frozen.layout.layer_sites))
    with torch.no_grad():
        router.logits.fill_(100.0)
        assert RouterObjective(frozen, router, 0.0).losses(batch).error == 0
        router.logits.fill_(0.0)
        assert RouterObjective(frozen, router, 0.0).losses(batch).error > 0


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_the_router_of_its_own_step(kind: str) -> None:
    frozen, both = frozen_of(kind), batch_of(kind)
    router = Router(10, len(frozen.layout.layer_sites))
    with torch.no_grad():
        router.logits.copy_(torch.randn_like(router.logits))
        objective = RouterObjective(frozen, router, 0.1)
        each = [
            objective.losses(Batch(both.x[i], both.index[i], {n: v[i] for n, v in both.given.items()}))
            for i in (slice(0, 1), slice(1, 2))
        ]
        found = objective.losses(both)
    for part in ("error", "cost"):
        alone = [getattr(one, part) for one in each]
        assert not torch.isclose(*alone, rtol=1e-2, atol=0)
        torch.testing.assert_close(getattr(found, part), sum(alone) / 2, rtol=1e-4, atol=0)


def pipeline(kind: str) -> Any:
    if kind == "wan":
        return transformer_pipelines.wan_of_texts(layers=LAYERS)
    return transformer_pipelines.latte_of_texts()


def place_of(
    folder: Path, kind: str, training: Training = FEW, pipe: Any = None, **changes: Any
) -> Workplace:
    data = Data(**SMALL | SIZES[kind] | changes.pop("data", {}))
    words = ("a penguin", "pizza")
    return workplace(pipe or pipeline(kind), "a test", data, words, training, folder, cpu=True, **changes)


def generated(kind: str, config: Any = None) -> Tensor:
    pipe = pipeline(kind)

    def made() -> Tensor:
        options: dict[str, Any] = SIZES[kind]
        return make(pipe, ["a pizza"], steps=5, guidance=3.0, latents=True, **options).images

    if config is None:
        return made()
    with regrow.apply(pipe, config) as run:
        out = made()
    assert min(call.macs for call in run.report().calls) < max(call.macs for call in run.report().calls)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_goes_on_with_the_same_numbers_and_its_file_runs(
    tmp_path: Path, kind: str
) -> None:
    def run(folder: str, steps: int, **changes: Any) -> Any:
        training = FEW.model_copy(update={"steps": steps})
        place = place_of(tmp_path / folder, kind, training, **changes)
        trained = train_predictor(place, 2, samples=1, pictures=False)
        return trained, trained.curve.rows(), read_learned(trained.file, "predictor").tensors

    trained, whole, weights = run("whole", 2)
    run("killed", 1)
    _, resumed, again = run("killed", 2)
    assert resumed == whole
    assert len(whole["train"]) == 2
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert table_of(read_learned(trained.file, "predictor")).quantiles.shape == (25, SITES[kind], 17)
    ours = generated(kind, TokenCache(predictor=str(trained.file), beta=-1, **CACHED))
    assert torch.isfinite(ours).all()
    assert not torch.equal(ours, generated(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_computed_again_give_the_same_numbers(tmp_path: Path, kind: str) -> None:
    one = FEW.model_copy(update={"steps": 1})
    plain, again = (
        train_predictor(
            place_of(tmp_path / name, kind, one, checkpointing=on), 1, samples=1, pictures=not on
        )
        for name, on in (("plain", False), ("again", True))
    )
    assert plain.curve.rows() == again.curve.rows()
    for name in ("loss.png", "alpha.png"):
        with Image.open(tmp_path / "plain" / name) as picture:
            assert min(picture.size) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_updates_of_the_last_blocks_change_what_they_are_for(tmp_path: Path, kind: str) -> None:
    trained = train_refinement(place_of(tmp_path, kind), UNTRAINED, 2, 0.6, rank=2, pictures=False)
    learned = read_learned(trained.file, "lora")
    blocks = {".".join(name.split(".")[1:3]) for name in learned.tensors}
    last = {f"blocks.{LAYERS - 2}", f"blocks.{LAYERS - 1}"}
    pair = {f"transformer_blocks.{PAIRS - 1}", f"temporal_transformer_blocks.{PAIRS - 1}"}
    assert blocks == (last if kind == "wan" else pair)
    feed_forward = "ffn.net.2" if kind == "wan" else "ff.net.2"
    assert sum(f".{feed_forward}." in name for name in learned.tensors) == 4
    settings = {"predictor": UNTRAINED, **CACHED}
    without = generated(kind, TokenCache(**settings))
    refined = generated(kind, TokenCache(**settings, lora=str(trained.file)))
    assert torch.isfinite(refined).all()
    assert not torch.equal(refined, without)


def test_tokens_are_chosen_in_training_as_in_use() -> None:
    """Each frame computes as many tokens, and each place as many frames: those of the highest alpha."""
    frozen, batch, alpha = frozen_of("latte"), batch_of("latte"), alphas("latte")
    decided = frozen.layout.block_sites[:-2]
    predictor = CachePredictor.of(frozen.denoiser, SITES["latte"])
    even = Table(np.zeros((1, SITES["latte"], 3)), np.zeros(1))
    objective = RefineObjective(frozen, predictor, even, 2, 0.6)
    before = past(frozen, frozen.layout.block_sites, batch)
    chosen = objective._chosen(on_sites(alpha, decided, before), decided, before)
    samples = alpha.unflatten(1, (FRAMES["latte"], ROWS * COLUMNS))
    for site in decided:
        temporal = site.name.startswith("temporal")
        own = samples[..., site.index].transpose(1, 2) if temporal else samples[..., site.index]
        count = 2 if temporal else 10
        least = own.flatten(0, 1).topk(count, 1).values[:, -1:]
        assert torch.equal(chosen[site.name][..., 0], (own.flatten(0, 1) >= least).float())


def test_a_block_without_projections_is_named() -> None:
    pipe = pipeline("latte")
    sites = layout_of(pipe.transformer).block_sites[-2:]
    block = sites[1].module
    for name in ("attn1", "ff"):
        setattr(block, name, nn.Identity())
    with pytest.raises(ValueError, match=rf"{sites[1].name} has nothing that could learn"):
        add_adapter(pipe.transformer, sites, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_goes_into_the_method(tmp_path: Path, kind: str) -> None:
    trained = train_router(place_of(tmp_path, kind), price=1.0, threshold=0.879, pictures=False)
    ours = generated(kind, L2C(router=str(trained.file)))
    assert torch.isfinite(ours).all()
    assert not torch.equal(ours, generated(kind))


def moving(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (40, 24), (60 * i, 255 - 60 * i, 90)) for i in range(count)]


def write(name: str, folder: Path, frames: int = 4) -> Path:
    """A video as a file, or as a folder of frames where its name has no ending."""
    video = folder / name
    video.parent.mkdir(parents=True, exist_ok=True)
    if video.suffix:
        save_clip(video, moving(frames), 8)
        return video
    video.mkdir()
    for number, frame in enumerate(moving(frames)):
        frame.save(video / f"{number:03}.png")
    return video


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a"])
def test_a_video_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    if name.endswith("mp4"):
        pytest.importorskip("imageio_ffmpeg")
    video = write(name, tmp_path)
    for ours, expected in zip(read_clip(video, 3), moving(3), strict=True):
        assert ours.size == expected.size
        apart = [
            abs(a - b) for a, b in zip(ours.getpixel((20, 12)), expected.getpixel((20, 12)), strict=True)
        ]  # type: ignore[arg-type]
        assert max(apart) < (12 if name.endswith("mp4") else 3)
    with pytest.raises(ValueError, match="it must have at least 5 frames; it has 4"):
        read_clip(video, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_videos_of_a_folder_have_the_captions_beside_them(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "videos"
    write("penguin/first.gif", folder, 5)
    write("penguin/second.webp", folder, 6)
    write("third", folder, 5)
    (folder / "third.txt").write_text("a pizza")
    place = place_of(tmp_path / "out", kind, data={"folder": str(folder)})
    assert len(place.examples) == 2
    assert len(place.held_out) == 1
    pipe, latents = pipeline(kind), place.held_out.latents
    size = SIZES[kind] or {"height": 16, "width": 16, "frames": 3}
    frames = [
        frame.crop((8, 0, 32, 24)).resize((16, 16))
        if kind == "latte"
        else frame.crop((2, 0, 38, 24)).resize((48, 32))
        for frame in moving(size["frames"])
    ]
    x = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames])
    x = x / 255 * 2 - 1
    with torch.no_grad():
        if kind == "wan":
            expected = pipe.vae.encode(x.transpose(0, 1)[None]).latent_dist.mode()[0]
        else:
            expected = (
                pipe.vae.encode(x).latent_dist.mode().transpose(0, 1) * pipe.vae.config.scaling_factor
            )
    torch.testing.assert_close(latents[0], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_are_those_of_the_pipeline(tmp_path: Path, kind: str) -> None:
    place = place_of(tmp_path, kind)
    assert place.held_out.latents.shape[1:] == ((4, 3, 8, 8) if kind == "latte" else (4, 2, 4, 6))
    pipe = pipeline(kind)
    words = ["a penguin", "pizza"]
    if kind == "latte":
        yes, no = pipe.encode_prompt(words, negative_prompt="", clean_caption=False)
        # Of the pipeline's own for several texts.
        no = no.expand(2, -1, -1) if len(no) == 1 else no
    else:
        yes, no = pipe.encode_prompt(words, max_sequence_length=512)
    name = "encoder_hidden_states"
    torch.testing.assert_close(place.examples.given[name], yes)
    torch.testing.assert_close(place.examples.nothing[name], no)
    torch.testing.assert_close(place.held_out.given[name], yes[:1])


@pytest.mark.parametrize(
    ("make_pipe", "data", "said"),
    [
        (transformer_pipelines.sd3, {}, "SD3Transformer2DModel is not allowed in training, its blocks"),
        (transformer_pipelines.latte, {}, "LattePipeline is not allowed in training, it must have a VAE"),
        (
            lambda: transformer_pipelines.wan(boundary_ratio=0.5),
            {},
            "it must have one denoiser; this one has transformer_2",
        ),
        (
            lambda: transformer_pipelines.wan_from_picture(expand_timesteps=False),
            {},
            "it must need no picture to begin with",
        ),
        (
            transformer_pipelines.wan_of_texts,
            {"height": 40, "width": 48},
            "height: 40 is not allowed, it must be a multiple of 16",
        ),
        (
            transformer_pipelines.wan_of_texts,
            {"frames": 6},
            "frames: 6 is not allowed, it must be 1 more than a multiple of 4",
        ),
        (
            transformer_pipelines.latte_of_texts,
            {"frames": 6},
            "frames: 6 is not allowed, this model makes 3 frames",
        ),
        (transformer_pipelines.dit, {"frames": 6}, "frames: DiTPipeline makes pictures"),
        (
            transformer_pipelines.latte_of_texts,
            {"folder": "."},
            r"has no videos \(\.mp4, \.gif, \.webp, or folders of frames: \.png",
        ),
    ],
)
def test_what_is_not_allowed_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make_pipe: Callable[[], Any],
    data: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        workplace(make_pipe(), "a test", Data(**data), ("a",), FEW, tmp_path / "none", cpu=True)
    assert not (tmp_path / "none").exists()


def test_a_size_that_is_not_given_is_the_models_or_its_pipelines() -> None:
    for kind, expected in (("latte", (16, 16, 3)), ("wan", (480, 832, 81))):
        pipe = pipeline(kind)
        size = size_of(pipe, layout_of(pipe.transformer), None, None, None)
        assert (size.height, size.width, size.frames) == expected
    pipe = transformer_pipelines.dit()
    size = size_of(pipe, layout_of(pipe.transformer), None, None, None)
    assert (size.height, size.width, size.frames) == (32, 32, None)
