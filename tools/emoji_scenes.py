"""Compose pictures of emoji, with captions that leave much of them open.

A scene is a pure function of its seed: one to three objects at random places, sizes and turns, before a
plain colour, a gradient of two, or white. Its caption names the objects, and only by chance the
background, a place or a size; what it does not name is random.
"""

from __future__ import annotations

import io
import json
import math
import random
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIDE = 128
SMALLEST, LARGEST = 0.35, 0.95
MOST_TURN = 30.0
# Above this size a sprite is sampled at full resolution, below it at half, so that nothing aliases.
HALF_BELOW = 0.6
COLOURS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "grey": (150, 150, 150),
    "red": (215, 40, 40),
    "orange": (245, 145, 35),
    "yellow": (250, 220, 60),
    "green": (60, 165, 75),
    "blue": (45, 100, 205),
    "purple": (130, 70, 170),
    "pink": (245, 160, 195),
    "brown": (125, 80, 45),
}
JITTER = 14

_NAMES = """
    penguin; pizza; cat; sunflower; octopus; strawberry; owl; cactus; tropical fish; doughnut; turtle;
    mushroom; butterfly; watermelon; frog; ice cream; dog; elephant; snail; honeybee; spouting whale;
    crab; duck; rooster; flamingo; tiger; monkey; pig; cow; koala; hedgehog; snake; dolphin; rose;
    tulip; palm tree; evergreen tree; maple leaf; red apple; banana; grapes; pineapple; lemon; cherries;
    carrot; broccoli; tomato; avocado; bread; croissant; cheese wedge; hamburger; french fries; hot dog;
    taco; sushi; cookie; birthday cake; lollipop; popcorn; pretzel; teapot; wine glass; beer mug; bat;
    spider; lady beetle; lobster; peacock; parrot; swan; eagle; rabbit; mouse; horse; camel; gorilla;
    kangaroo; crocodile; shark; squid; scorpion; worm; hibiscus; cherry blossom; four leaf clover;
    potted plant; deciduous tree; green apple; pear; peach; mango; coconut; eggplant; potato; bell
    pepper; garlic; onion; peanuts; chestnut; bagel; waffle; bacon; poultry leg; sandwich; burrito; egg;
    shrimp; cupcake; chocolate bar; candy; honey pot; hot beverage; cocktail glass; tropical drink;
    lion; giraffe; zebra; panda; fox; wolf; unicorn; t rex"""
OBJECTS = tuple(" ".join(name.split()) for name in _NAMES.split(";"))
"""Names of the objects, in the order in which a larger model takes them up."""


@dataclass(frozen=True)
class Placed:
    """One object of a scene.

    Args:
        index: which object.
        x: its centre, as a share of the picture's width.
        y: its centre, as a share of the picture's height.
        size: its side, as a share of the picture's.
        turn: degrees, counter-clockwise.
        mirrored: whether left and right are exchanged.
    """

    index: int
    x: float
    y: float
    size: float
    turn: float
    mirrored: bool


SIZES: dict[str, Callable[[Placed], bool]] = {
    "small": lambda p: p.size < 0.45,
    "large": lambda p: p.size > 0.75,
}
PLACES: dict[str, Callable[[Placed], bool]] = {
    "left": lambda p: p.x < 0.4,
    "right": lambda p: p.x > 0.6,
    "top": lambda p: p.y < 0.4,
    "bottom": lambda p: p.y > 0.6,
}


@dataclass(frozen=True)
class Phrase:
    """What a caption says of one object: which, and by chance its size or place."""

    index: int
    size: str | None
    place: str | None

    def fits(self, placed: Placed) -> bool:
        """Whether it is true of an object."""
        return (
            placed.index == self.index
            and (self.size is None or SIZES[self.size](placed))
            and (self.place is None or PLACES[self.place](placed))
        )

    def text(self, names: Sequence[str]) -> str:
        """Such as "small penguin left"."""
        return " ".join(word for word in (self.size, names[self.index], self.place) if word)


@dataclass(frozen=True)
class Caption:
    """What is said of a scene.

    Args:
        phrases: one for each object.
        ground: names of the background's colours: none if left open, one, or two of a gradient.
    """

    phrases: tuple[Phrase, ...]
    ground: tuple[str, ...]

    def text(self, names: Sequence[str]) -> str:
        """Such as "small penguin left and pizza on blue"."""
        objects = " and ".join(phrase.text(names) for phrase in self.phrases)
        return f"{objects} on {' to '.join(self.ground)}" if self.ground else objects


@dataclass(frozen=True)
class Scene:
    """What is in a picture, and what its caption says of it.

    Args:
        placed: the objects, the last one in front.
        colours: names of the background's colours: one, or two of a gradient.
        ends: its colours, RGB in [0, 1], at the two ends; equal for a plain ground.
        direction: of the gradient, in radians.
        caption: what is said.
    """

    placed: tuple[Placed, ...]
    colours: tuple[str, ...]
    ends: tuple[tuple[float, ...], tuple[float, ...]]
    direction: float
    caption: Caption


def scene(seed: int, objects: int, count: int | None = None) -> Scene:
    """The scene of a seed, with its caption.

    Args:
        seed: any integer.
        objects: how many different objects there are.
        count: number of objects in the scene, 1 to 3; by chance if None.
    """
    rng = random.Random(seed)
    count = count or rng.choices((1, 2, 3), (0.4, 0.5, 0.1))[0]
    placed = _place(rng, rng.sample(range(objects), count))
    colours = _colours(rng)
    phrases = [_phrase(rng, p) for p in placed]
    rng.shuffle(phrases)
    caption = Caption(tuple(phrases), colours if rng.random() < 0.6 else ())
    return _scene(rng, placed, colours, caption)


def captions(names: Sequence[str], count: int, first: int = 5 * 10**9) -> list[str]:
    """Different captions: those of the scenes of consecutive seeds, without repetitions."""
    found: dict[str, None] = {}
    seed = first
    while len(found) < count:
        found[scene(seed, len(names)).caption.text(names)] = None
        seed += 1
    return list(found)


def objects_in(folder: Path) -> list[str]:
    """The objects that a model of scenes draws, from its folder."""
    found: list[str] = json.loads((folder / "objects.json").read_text(encoding="utf-8"))
    return found


def another(seed: int, caption: Caption) -> Scene:
    """A scene of the same caption; what it leaves open is drawn anew.

    Raises:
        ValueError: if no random layout fits the caption.
    """
    rng = random.Random(seed)
    for _ in range(2000):
        placed = _place(rng, [phrase.index for phrase in rng.sample(caption.phrases, len(caption.phrases))])
        if all(any(phrase.fits(p) for p in placed) for phrase in caption.phrases):
            return _scene(rng, placed, caption.ground or _colours(rng), caption)
    raise ValueError(f"caption: {caption} fits no layout")


def _scene(
    rng: random.Random, placed: tuple[Placed, ...], colours: tuple[str, ...], caption: Caption
) -> Scene:
    """A scene with shades of its background's colours."""
    shades = [shade(rng, colour) for colour in colours]
    return Scene(placed, colours, (shades[0], shades[-1]), rng.uniform(0, 2 * math.pi), caption)


def _colours(rng: random.Random) -> tuple[str, ...]:
    """White, a plain colour or the two of a gradient."""
    kind = rng.choices(("white", "plain", "gradient"), (0.15, 0.6, 0.25))[0]
    if kind == "white":
        return ("white",)
    return tuple(rng.sample(list(COLOURS), 1 if kind == "plain" else 2))


def _place(rng: random.Random, objects: list[int]) -> tuple[Placed, ...]:
    """Objects that overlap little: the best of some random places for each."""
    top = {1: LARGEST, 2: 0.6, 3: 0.45}[len(objects)]
    placed: list[Placed] = []
    for index in objects:
        size = rng.uniform(SMALLEST, top)
        low, high = size / 2 - 0.04, 1 - size / 2 + 0.04
        places = [(rng.uniform(low, high), rng.uniform(low, high)) for _ in range(40 if placed else 1)]
        x, y = max(places, key=lambda p: _room(p, size, placed))
        turn = rng.uniform(-MOST_TURN, MOST_TURN)
        placed.append(Placed(index, x, y, size, turn, rng.random() < 0.5))
    return tuple(placed)


def _room(place: tuple[float, float], size: float, others: list[Placed]) -> float:
    """How far a place is from overlapping; every place without overlap is as good."""
    gaps = (math.dist(place, (o.x, o.y)) - 0.45 * (size + o.size) for o in others)
    return min((0.0, *gaps))


def shade(rng: random.Random, colour: str) -> tuple[float, ...]:
    """A shade of a colour; white is always white."""
    if colour == "white":
        return (1.0, 1.0, 1.0)
    return tuple(min(max(c + rng.uniform(-JITTER, JITTER), 0), 255) / 255 for c in COLOURS[colour])


def _phrase(rng: random.Random, placed: Placed) -> Phrase:
    """An object, by chance with its size and place."""
    said: list[str | None] = []
    for words in (SIZES, PLACES):
        true = [word for word, holds in words.items() if holds(placed)]
        said.append(rng.choice(true) if true and rng.random() < 0.4 else None)
    return Phrase(placed.index, said[0], said[1])


class Sprites:
    """The objects' pictures with transparency, at two resolutions, colours multiplied by opacity.

    Args:
        pictures: uint8 ``(N, 4, S, S)``, RGBA.
        device: where pictures are composed.
    """

    def __init__(self, pictures: Tensor, device: torch.device | str = "cpu") -> None:
        full = pictures.to(device).float() / 255
        full[:, :3] *= full[:, 3:]
        self.levels = (full, F.avg_pool2d(full, 2))
        self.device = full.device

    def __len__(self) -> int:
        return len(self.levels[0])


def compose(scenes: Sequence[Scene], sprites: Sprites, side: int = SIDE) -> Tensor:
    """The pictures of scenes: ``(B, 3, side, side)``, values in [0, 1]."""
    canvas = _grounds(scenes, side, sprites.device)
    for layer in range(max(len(s.placed) for s in scenes)):
        rows = [i for i, s in enumerate(scenes) if layer < len(s.placed)]
        placed = [scenes[i].placed[layer] for i in rows]
        for level, pictures in enumerate(sprites.levels):
            part = [j for j, p in enumerate(placed) if (p.size < HALF_BELOW) == bool(level)]
            if not part:
                continue
            theta = torch.tensor([_to_sprite(placed[j]) for j in part], device=canvas.device)
            grid = F.affine_grid(theta, [len(part), 4, side, side], align_corners=False)
            source = pictures[[placed[j].index for j in part]]
            drawn = F.grid_sample(source, grid, align_corners=False)
            where = torch.tensor([rows[j] for j in part], device=canvas.device)
            canvas[where] = drawn[:, :3] + canvas[where] * (1 - drawn[:, 3:])
    return canvas


def _grounds(scenes: Sequence[Scene], side: int, device: torch.device) -> Tensor:
    """The backgrounds ``(B, 3, side, side)``."""
    ends = torch.tensor([s.ends for s in scenes], device=device).view(len(scenes), 2, 3, 1, 1)
    angle = torch.tensor([s.direction for s in scenes], device=device).view(-1, 1, 1, 1)
    line = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    along = angle.cos() * line.view(1, 1, 1, -1) + angle.sin() * line.view(1, 1, -1, 1)
    share = (along / math.sqrt(2) + 1) / 2
    return ends[:, 0] * (1 - share) + ends[:, 1] * share


def _to_sprite(p: Placed) -> list[list[float]]:
    """The affine map from the picture's coordinates to the sprite's, both in [-1, 1]."""
    cos, sin = math.cos(math.radians(p.turn)), math.sin(math.radians(p.turn))
    x, y = 2 * p.x - 1, 2 * p.y - 1
    flip = -1.0 if p.mirrored else 1.0
    across = [flip * cos / p.size, -flip * sin / p.size]
    down = [sin / p.size, cos / p.size]
    return [
        [*across, -(across[0] * x + across[1] * y)],
        [*down, -(down[0] * x + down[1] * y)],
    ]


def read_sprites(archive: Path, names: Sequence[str], side: int = SIDE) -> Tensor:
    """Draw the objects from the npm tarball of ``@iconify-json/noto``: uint8 ``(N, 4, side, side)``.

    Raises:
        ValueError: if a name is not among its icons.
    """
    import resvg_py

    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None
        icons = json.load(member)
    width, height = icons["width"], icons["height"]
    pictures = []
    for name in names:
        icon = icons["icons"].get(name.replace(" ", "-"))
        if icon is None:
            raise ValueError(f"{archive}: no icon is named {name!r}")
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
        picture = Image.open(io.BytesIO(png)).convert("RGBA")
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.stack(pictures)
