"""Scenes of emoji: a pure function of the seed, captions that speak the truth, right places."""

from __future__ import annotations

import io
import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import emoji_scenes
import pytest
import torch
from emoji_scenes import (
    COLOURS,
    OBJECTS,
    Caption,
    Placed,
    Scene,
    Sprites,
    another,
    compose,
    read_sprites,
    scene,
)
from torch import Tensor

NAMES = OBJECTS[:20]
SEEDS = range(400)
BLUE = (0.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    """Opaque squares of half the side in the middle, each of a colour of its own."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.zeros(len(NAMES), 4, 64, 64, dtype=torch.uint8)
    colours = torch.randint(40, 216, (len(NAMES), 3, 1, 1), generator=g, dtype=torch.uint8)
    pictures[:, :3, 16:48, 16:48] = colours
    pictures[:, 3, 16:48, 16:48] = 255
    return Sprites(pictures)


def single(**changes: Any) -> Scene:
    """One upright object in the middle of a blue ground."""
    placed = replace(Placed(index=3, x=0.5, y=0.5, size=0.5, turn=0.0, mirrored=False), **changes)
    return plain((placed,), BLUE)


def plain(placed: tuple[Placed, ...], *ends: tuple[float, ...]) -> Scene:
    """Objects before a ground, without words."""
    return Scene(placed, ("blue",), (ends[0], ends[-1]), 0.0, Caption((), ()))


def covered(picture: Tensor) -> Tensor:
    """Where a picture is not the blue ground."""
    return (picture - torch.tensor(BLUE).view(3, 1, 1)).abs().sum(0) > 0.05


def test_a_seed_gives_one_scene_and_one_picture(sprites: Sprites) -> None:
    scenes = [scene(s, len(NAMES)) for s in SEEDS]
    assert scenes == [scene(s, len(NAMES)) for s in SEEDS]
    assert len({s.caption.text(NAMES) for s in scenes}) > 300
    together = compose(scenes[:12], sprites)
    alone = torch.cat([compose([s], sprites) for s in scenes[:12]])
    assert torch.equal(together, alone)
    assert together.shape == (12, 3, 128, 128)
    assert together.min() >= 0
    assert together.max() <= 1


def check_truth(s: Scene) -> None:
    """Every word of the caption is true of the scene."""
    text = s.caption.text(NAMES)
    objects = text.split(" on ")[0].split(" and ")
    assert len(objects) == len(s.placed)
    for p in s.placed:
        said = next(o for o in objects if NAMES[p.index] in o)
        words = said.replace(NAMES[p.index], "").split()
        assert "small" not in words or p.size < 0.45
        assert "large" not in words or p.size > 0.75
        assert "left" not in words or p.x < 0.4
        assert "right" not in words or p.x > 0.6
        assert "top" not in words or p.y < 0.4
        assert "bottom" not in words or p.y > 0.6
    if " on " in text:
        named = text.split(" on ")[1].split(" to ")
        assert tuple(named) == s.colours
        for colour, end in zip((named[0], named[-1]), s.ends, strict=True):
            shade = torch.tensor(end) * 255
            distance = {c: (torch.tensor(v) - shade).abs().max() for c, v in COLOURS.items()}
            assert min(distance, key=lambda c: distance[c]) == colour
    assert (s.ends[0] == s.ends[1]) == (len(s.colours) == 1)


def test_what_the_caption_says_is_true_and_what_it_leaves_out_is_open() -> None:
    scenes = [scene(seed, len(NAMES)) for seed in SEEDS]
    for s in scenes:
        check_truth(s)
    captions = [s.caption.text(NAMES) for s in scenes]
    for word in ("small", "large", "left", "top", " on ", " to "):
        assert 0 < sum(word in c for c in captions) < len(captions)


def test_another_scene_of_a_caption_differs_in_what_the_caption_leaves_open() -> None:
    for seed in range(100):
        first = scene(seed, len(NAMES))
        other = another(seed + 1, first.caption)
        assert other.caption == first.caption
        assert other == another(seed + 1, first.caption)
        check_truth(other)
        places = {(p.index, p.x, p.y, p.turn) for p in first.placed}
        assert not places & {(p.index, p.x, p.y, p.turn) for p in other.placed}
        if not first.caption.ground:
            assert {another(i, first.caption).colours for i in range(8)} != {first.colours}


def test_objects_stay_inside_the_stated_ranges() -> None:
    scenes = [scene(seed, len(NAMES)) for seed in SEEDS]
    placed = [p for s in scenes for p in s.placed]
    assert {len(s.placed) for s in scenes} == {1, 2, 3}
    assert all(emoji_scenes.SMALLEST <= p.size <= emoji_scenes.LARGEST for p in placed)
    assert all(abs(p.turn) <= emoji_scenes.MOST_TURN for p in placed)
    assert all(p.size / 2 - 0.05 <= v <= 1 - p.size / 2 + 0.05 for p in placed for v in (p.x, p.y))
    assert all(len({p.index for p in s.placed}) == len(s.placed) for s in scenes)
    assert {len(scene(seed, len(NAMES), 2).placed) for seed in range(20)} == {2}
    near = [math.dist((a.x, a.y), (b.x, b.y)) for s in scenes if len(s.placed) == 2 for a, b in [s.placed]]
    assert min(near) > 0.2


@pytest.mark.parametrize("size", [0.4, 0.9])
@pytest.mark.parametrize("place", [(0.5, 0.5), (0.3, 0.6)])
def test_an_object_is_where_and_as_large_as_its_scene_says(
    sprites: Sprites, size: float, place: tuple[float, float]
) -> None:
    x, y = place
    mask = covered(compose([single(size=size, x=x, y=y)], sprites)[0])
    rows, columns = mask.nonzero(as_tuple=True)
    # The square is half as wide as its sprite.
    for found, centre in ((columns, x), (rows, y)):
        assert abs((found.min() + found.max() + 1) / 2 / 128 - centre) < 0.01
        assert abs((found.max() - found.min() + 1) / 128 - size / 2) < 0.03


def test_turning_is_counter_clockwise_and_mirroring_left_to_right() -> None:
    pictures = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
    pictures[:, 0, 30:34, 32:60] = 255
    pictures[:, 3, 30:34, 32:60] = 255
    pointer = Sprites(pictures)

    def tip(**changes: Any) -> tuple[float, float]:
        placed = replace(Placed(0, 0.5, 0.5, 0.9, 0.0, False), **changes)
        mask = covered(compose([plain((placed,), BLUE)], pointer)[0])
        rows, columns = mask.nonzero(as_tuple=True)
        return columns.float().mean().item() - 63.5, rows.float().mean().item() - 63.5

    right, level = tip()
    assert right > 20
    assert abs(level) < 2
    assert tip(mirrored=True)[0] < -20
    across, down = tip(turn=30.0)
    assert across > 15
    assert down < -8


def test_the_last_object_is_in_front_and_gradients_run_along_their_direction(sprites: Sprites) -> None:
    behind, front = (Placed(i, 0.5, 0.5, 0.5, 0.0, False) for i in (1, 2))
    black, white = (0.0,) * 3, (1.0,) * 3
    picture = compose([plain((behind, front), black, white)], sprites)[0]
    alone = compose([plain((front,), black, white)], sprites)[0]
    assert torch.equal(picture[:, 64, 64], alone[:, 64, 64])
    row = picture[0, 2]
    assert (row.diff() > 0).all()
    assert torch.allclose(picture[0, 2], picture[0, -3])


def test_names_of_objects_are_different_and_shorter_than_the_text_encoder_takes() -> None:
    assert len(set(OBJECTS)) == len(OBJECTS) >= 100
    longest = sorted(OBJECTS, key=lambda name: -len(name.split()))[:3]
    words = sum(len(name.split()) + 2 for name in longest) + 2 + 4
    assert words + 2 <= 24


def test_sprites_are_drawn_from_the_packages_icons(tmp_path: Path) -> None:
    body = '<rect x="0" y="0" width="64" height="128" fill="#ff8000"/>'
    icons = {"width": 128, "height": 128, "icons": {"half-full": {"body": body}}}
    data = json.dumps(icons).encode()
    archive = tmp_path / "noto.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    picture = read_sprites(archive, ["half full"], side=32)
    assert picture.shape == (1, 4, 32, 32)
    assert picture[0, :, 16, 4].tolist() == [255, 128, 0, 255]
    assert picture[0, 3, 16, 28] == 0
    with pytest.raises(ValueError, match="no icon is named 'half empty'"):
        read_sprites(archive, ["half empty"])
