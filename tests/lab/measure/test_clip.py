"""The CLIP score against its definition, on a small real CLIPModel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_evaluate import PROMPTS, SETTING, VARIANTS, Colours, PictureFolder, made
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from regrow.lab.measure.clip import ClipScore
from regrow.lab.measure.evaluate import compare

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_model(folder: Path, seed: int = 0) -> Path:
    """A complete CLIP with random weights, as the public ones are saved."""
    torch.manual_seed(seed)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokens = {token: i for i, token in enumerate(vocabulary)}
    last = len(tokens) - 1
    ends = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    text = CLIPTextConfig(vocab_size=len(tokens), max_position_embeddings=77, **SMALL, **ends)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **SMALL)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    model = CLIPModel(config)
    for parameter in model.parameters():
        # Larger than they come, so that different prompts differ.
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=tokens, merges=[], model_max_length=77).save_pretrained(folder)
    sides = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=sides).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("clip"))


def reference(folder: Path, images: torch.Tensor, prompts: list[str]) -> list[float]:
    """One picture at a time: both towers by hand, the projections from the file."""
    whole = CLIPModel.from_pretrained(folder).eval()
    weights = load_file(folder / "model.safetensors")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    out = []
    for image, prompt in zip(images, prompts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids[:, :77]
        if ids.shape[1] == 77:
            ids[0, -1] = tokenizer.eos_token_id
        pixels = ((image.float() / 255 - mean) / std)[None]
        with torch.no_grad():
            text = whole.text_model(input_ids=ids).pooler_output @ weights["text_projection.weight"].T
            seen = (
                whole.vision_model(pixel_values=pixels).pooler_output
                @ weights["visual_projection.weight"].T
            )
        cosine = float((text @ seen.T) / (text.norm() * seen.norm()))
        out.append(100 * max(cosine, 0))
    return out


MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def test_the_score_is_a_hundred_cosines_cut_at_zero(model: Path) -> None:
    # As large as the model takes them, so that nothing is resized; one prompt is too long.
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(3))
    prompts = ["a cat", "dog", "an owl on a tree", "x", "pizza and salad", "word " * 60]
    score = ClipScore(str(model))
    found = score(images.to(torch.uint8), prompts)
    expected = reference(model, images, prompts)
    assert found.tolist() == pytest.approx(expected, abs=100 * 1e-6)
    assert max(expected) > 0
    assert min(expected) == 0


def test_the_row_has_the_mean_over_all_pictures(model: Path, tmp_path: Path) -> None:
    pictures = made(tmp_path)
    score = ClipScore(str(model))
    rows = compare(pictures, VARIANTS, Colours(), clip=score)
    every = [
        float(score(picture[None], [prompt]))
        for picture, prompt in zip(
            torch.cat([pictures.shard(VARIANTS[2], n) for n in range(3)]), PROMPTS, strict=True
        )
    ]
    assert rows[2].clip_score == pytest.approx(sum(every) / 5, rel=1e-4)
    assert any(every)
    assert compare(PictureFolder(tmp_path, SETTING), VARIANTS, Colours())[2].clip_score is None
    # Kept figures are those of one model's weights.
    other = ClipScore(str(save_model(tmp_path / "other", seed=5)))
    assert compare(pictures, VARIANTS, Colours(), clip=other)[2].clip_score != rows[2].clip_score
    assert compare(pictures, VARIANTS, Colours(), clip=score) == rows


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    CLIPTextConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model of kind 'clip_text_model', it must be 'clip'"):
        ClipScore(str(tmp_path))
    with pytest.raises(OSError, match="nowhere"):
        ClipScore(str(tmp_path / "nowhere"))
