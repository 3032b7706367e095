"""Trainings from data to the file that a method takes, on transformers of a few blocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformer_pipelines
from PIL import Image
from transformer_pipelines import generate

import regrow
from regrow.lab.train.loop import Curve, Training
from regrow.lab.train.run import (
    Data,
    Workplace,
    forget,
    train_predictor,
    train_refinement,
    train_router,
    workplace,
)
from regrow.methods.l2c import L2C
from regrow.methods.tokencache import TokenCache
from regrow.predictors import UNTRAINED, read_learned, table_of

BLOCKS = 3
SMALL = Data(pictures=8, steps=2, batch=4)
FEW = Training(steps=6, lr=1e-2, batch=2, every=3, sampler_steps=5, held_out=1)


def small(kind: str = "dit") -> Any:
    return transformer_pipelines.KINDS[kind](num_layers=BLOCKS)  # type: ignore[operator]


def place_of(folder: Path, pipe: Any, training: Training = FEW, data: Data = SMALL) -> Workplace:
    prompts = ("a penguin",) if type(pipe).__name__ != "DiTPipeline" else ("1", "2")
    return workplace(pipe, "a test", data, prompts, training, folder, cpu=True)


def points(curve: Curve) -> Any:
    return curve.rows()


def test_a_run_that_was_killed_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    def run(folder: str, steps: int) -> Any:
        training = FEW.model_copy(update={"steps": steps})
        place = place_of(tmp_path / folder, small(), training)
        trained = train_predictor(place, 1, samples=2, pictures=False)
        return points(trained.curve), read_learned(trained.file, "predictor").tensors

    whole, weights = run("whole", 6)
    run("killed", 3)
    resumed, again = run("killed", 6)
    assert resumed == whole
    assert len(whole["train"]) == 6
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert json.loads((tmp_path / "killed" / "loss.json").read_text()) == whole


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    place = place_of(tmp_path, small())
    train_router(place, pictures=False)
    with pytest.raises(ValueError, match=r"checkpoint.safetensors is of a training with other price; give"):
        train_router(place, price=0.5, pictures=False)
    forget(tmp_path)
    assert train_router(place, price=0.5, pictures=False).curve.train


def test_two_hundred_steps_lower_the_loss_of_held_out_examples(tmp_path: Path) -> None:
    training = FEW.model_copy(update={"steps": 200, "every": 100, "held_out": 4})
    pipe = transformer_pipelines.dit(num_layers=2, sample_size=8)
    held = train_predictor(place_of(tmp_path, pipe, training), 1, samples=2).curve.held_out
    assert [p.step for p in held] == [0, 100, 200]
    assert held[-1].loss < 0.8 * held[0].loss
    for name in ("loss.png", "alpha.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100


@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_a_predictor_goes_into_the_method(tmp_path: Path, kind: str) -> None:
    trained = train_predictor(place_of(tmp_path, small(kind)), 1, samples=2, pictures=False)
    table = table_of(read_learned(trained.file, "predictor"))
    assert table.quantiles.shape == (25, BLOCKS, 17)
    assert (np.diff(table.quantiles, axis=2) >= 0).all()
    config = TokenCache(predictor=str(trained.file), full_steps=2, last_blocks=1, ratio=0.6, beta=-1)
    pipe = small(kind)
    plain = generate(pipe)
    with regrow.apply(pipe, config) as run:
        out = generate(pipe)
    assert torch.isfinite(out).all()
    assert not torch.equal(out, plain)
    assert sum(call.selection_macs > 0 for call in run.report().calls) == 3
    assert torch.equal(generate(pipe), plain)


def test_updates_of_the_last_blocks_work_in_p_steps_and_leave_no_trace(tmp_path: Path) -> None:
    trained = train_refinement(place_of(tmp_path, small()), UNTRAINED, 1, 0.6, rank=2, pictures=False)
    learned = read_learned(trained.file, "lora")
    assert {name.split(".lora_")[0].split(".")[2] for name in learned.tensors} == {str(BLOCKS - 1)}
    settings: dict[str, Any] = {
        "predictor": UNTRAINED,
        "full_steps": 2,
        "last_blocks": 1,
        "ratio": 0.6,
        "lora": str(trained.file),
    }
    pipe = small()
    plain = generate(pipe)
    without = accelerated(pipe, TokenCache(**settings | {"lora": None}))
    refined = accelerated(pipe, TokenCache(**settings))
    assert torch.isfinite(refined).all()
    assert not torch.equal(refined, without)
    assert torch.equal(generate(pipe), plain)
    with pytest.warns(UserWarning, match="saved nothing"):
        assert torch.equal(accelerated(pipe, TokenCache(**settings | {"full_steps": 50})), plain)
    with pytest.raises(ValueError, match="is for last_blocks=1, not 2"):
        regrow.apply(pipe, TokenCache(**settings | {"last_blocks": 2}))


def test_an_update_is_that_of_peft(tmp_path: Path) -> None:
    """The hooks give what the denoiser with peft's own layers gives."""
    pipe = small()
    place = place_of(tmp_path, pipe)
    trained = train_refinement(place, UNTRAINED, 1, 1.0, rank=2, pictures=False)
    settings: dict[str, Any] = {"predictor": UNTRAINED, "full_steps": 1, "last_blocks": 1, "ratio": 1.0}
    other = small()
    ours = accelerated(other, TokenCache(**settings, lora=str(trained.file)))
    layers = [m for m in pipe.transformer.modules() if hasattr(m, "enable_adapters")]
    calls = [0]

    def first_without(module: Any, args: Any) -> None:
        for layer in layers:
            layer.enable_adapters(calls[0] > 0)
        calls[0] += 1

    hook = pipe.transformer.register_forward_pre_hook(first_without)
    theirs = accelerated(pipe, TokenCache(**settings))
    hook.remove()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def accelerated(pipe: Any, config: Any) -> torch.Tensor:
    with regrow.apply(pipe, config):
        return generate(pipe)


def test_a_router_goes_into_the_method_at_its_own_number_of_steps(tmp_path: Path) -> None:
    place = place_of(tmp_path, small())
    trained = train_router(replace(place), price=1.0, threshold=0.879, pictures=False)
    learned = read_learned(trained.file, "router")
    assert learned.tensors["table"].shape == (5, 2 * BLOCKS)
    assert learned.tensors["table"][::2].all()
    assert learned.about.steps == 5
    config = L2C(router=str(trained.file))
    assert config.sampler_steps == 5
    pipe = small()
    with regrow.apply(pipe, config):
        assert torch.isfinite(generate(pipe)).all()
        with pytest.raises(ValueError, match=r"trained for 5 steps, not for 7; .*--sampler-steps 7"):
            generate(pipe, num_inference_steps=7)


def test_pictures_of_a_folder_have_the_captions_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for name in ("1/a.png", "1/b.png", "7/c.png"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (200, 10, 90)).save(file)
    place = place_of(tmp_path / "out", small(), data=Data(folder=str(folder), batch=2))
    assert place.examples.given["class_labels"].tolist() == [1, 1]
    assert place.held_out.given["class_labels"].tolist() == [7]
    assert place.examples.nothing["class_labels"].tolist() == [1000, 1000]
    assert place.examples.latents.shape == (2, 4, 16, 16)
    (folder / "d.png").write_bytes((folder / "1" / "a.png").read_bytes())
    with pytest.raises(ValueError, match=r"d.png has no caption; put it into a folder of its class's name"):
        place_of(tmp_path / "out", small(), data=Data(folder=str(folder)))


def test_dropped_examples_have_no_condition(tmp_path: Path) -> None:
    place = place_of(tmp_path, small())
    draw = torch.Generator().manual_seed(0)
    batch = place.examples.batch(place.frozen.steps, [2], 64, 0.25, draw)
    share = (batch.given["class_labels"] == 1000).float().mean()
    assert 0.05 < share < 0.5
    assert set(batch.index.tolist()) == {2}


def test_models_whose_blocks_return_more_than_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SD3Transformer2DModel is not allowed in training"):
        place_of(tmp_path, transformer_pipelines.sd3())


def test_a_block_must_be_left_to_decide_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="last_blocks: 3 is not allowed, it must be >= 0 and < 3"):
        train_predictor(place_of(tmp_path, small()), BLOCKS)
