"""Does a model of emoji scenes draw what it is told, anew every time, and does it tell methods apart?

    python tools/check_scenes.py --data noto.tgz --model work/scenes/model --json check.json

*Right picture*: linear classifiers on EfficientNet-Lite0 features, fitted to composed scenes, look for the
named objects and background colours in generated pictures; their accuracy on composed scenes they have not
seen bounds what can be expected. Half of the scenes that they are fitted to went through the model's
autoencoder: a classifier that has not seen its grain misreads the colours even of true scenes that went
through it. How often the border of a picture is nearest the named colour needs no classifier, and is
given as well. *Not memorised*: how far two pictures of a caption are apart, as a share of what two composed
scenes of it are. *Tells methods apart*: fewer steps, and reused outputs, against the model's own 50 steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import training
from diffusers import DDIMScheduler, StableDiffusionPipeline
from emoji_scenes import COLOURS, Caption, Scene, Sprites, another, compose, objects_in, read_sprites, scene
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from training import write_json

import regrow
from regrow import zoo
from regrow.lab.measure.features import EfficientNetFeatures, feature_distance
from regrow.lab.measure.machine import machine
from regrow.lab.memory import keep_freed_memory

# Scenes to fit, to test and to draw from are those of different seeds.
FIT, HELD_OUT, DRAWN = 10**9, 2 * 10**9, 3 * 10**9
REUSE = (2, 5)
FEWER_STEPS = (25, 16, 10, 5)
COLOUR_NAMES = tuple(COLOURS)


def draw(
    pipe: StableDiffusionPipeline,
    captions: list[str],
    steps: int,
    guidance: float,
    batch: int,
    seed: int,
    bf16: bool,
    title: str,
) -> Tensor:
    """One picture a caption, each from its own seed: (N, 3, H, W) in [0, 1]."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    out = []
    for start in track(range(0, len(captions), batch), title):
        part = captions[start : start + batch]
        seeds = [seed + start + i for i in range(len(part))]
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        with torch.autocast(pipe.unet.device.type, torch.bfloat16, enabled=bf16):
            pictures = pipe(
                part,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="pt",
            ).images
        out.append(pictures.float().cpu())
    return torch.cat(out)


@dataclass(frozen=True)
class Seen:
    """What EfficientNet-Lite0 makes of N pictures.

    Args:
        pooled: features ``(N, 1280)`` of unit length, in which objects show.
        spatial: features ``(N, 1960)`` of 14 x 14 places, in which a background's colour shows.
    """

    pooled: Tensor
    spatial: Tensor

    @classmethod
    def of(cls, pictures: Tensor, extractor: EfficientNetFeatures) -> Seen:
        """What it makes of pictures in [0, 1]."""
        parts = [extractor.measured(part)[:2] for part in pictures.split(64)]
        return cls.joined([cls(F.normalize(pooled, dim=-1), spatial) for pooled, spatial in parts])

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """All pictures of some."""
        return cls(torch.cat([p.pooled for p in parts]), torch.cat([p.spatial for p in parts]))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, both in [0, 1]."""
    return -10 * torch.log10((a - b).square().mean((1, 2, 3)).clamp_min(1e-12))


@dataclass
class Probe:
    """Linear classifiers of objects, on pooled features, and of plain backgrounds, on spatial ones.

    Args:
        objects: gives a score for each object.
        colours: gives a score for each colour.
        centre: mean of the spatial features, which are standardised first.
        spread: their standard deviation.
    """

    objects: nn.Linear
    colours: nn.Linear
    centre: Tensor
    spread: Tensor

    @classmethod
    def fit(cls, seen: Seen, scenes: list[Scene], objects: int) -> Probe:
        """Fit by gradient descent on all scenes at once; colours on plain backgrounds only."""
        here = torch.stack([_present(s.caption, objects) for s in scenes])
        plain = torch.tensor([len(s.colours) == 1 for s in scenes])
        shade = torch.tensor([COLOUR_NAMES.index(s.colours[0]) for s in scenes])[plain]
        pooled, spatial = seen.pooled, seen.spatial[plain]
        probe = cls(
            nn.Linear(pooled.shape[1], objects),
            nn.Linear(spatial.shape[1], len(COLOURS)),
            spatial.mean(0),
            spatial.std(0) + 1e-6,
        )
        optimizer = torch.optim.AdamW(
            [
                {"params": probe.objects.parameters(), "lr": 1e-2},
                {"params": probe.colours.parameters(), "lr": 1e-3},
            ],
            weight_decay=1e-2,
        )
        standard = (spatial - probe.centre) / probe.spread
        for _ in track(range(400), "fitting the classifiers"):
            found = F.binary_cross_entropy_with_logits(probe.objects(pooled), here, reduction="sum")
            optimizer.zero_grad()
            (found / len(scenes) + F.cross_entropy(probe.colours(standard), shade)).backward()
            optimizer.step()
        return probe

    @torch.no_grad()
    def right(self, seen: Seen, captions: list[Caption]) -> dict[str, float]:
        """Shares: all named objects are the likeliest ones; the named plain colour is the likeliest."""
        score = self.objects(seen.pooled)
        colour = self.colours((seen.spatial - self.centre) / self.spread).argmax(1).tolist()
        found = [
            set(score[i].topk(len(c.phrases)).indices.tolist()) == {p.index for p in c.phrases}
            for i, c in enumerate(captions)
        ]
        named = [i for i, c in enumerate(captions) if len(c.ground) == 1]
        good = [COLOUR_NAMES[colour[i]] == captions[i].ground[0] for i in named]
        return {
            "objects": sum(found) / len(found),
            "colour": sum(good) / len(good) if good else float("nan"),
            "pictures": len(captions),
            "colours_named": len(named),
        }


def _present(caption: Caption, objects: int) -> Tensor:
    """One where an object is in the scene: ``(objects,)``."""
    out = torch.zeros(objects)
    out[[p.index for p in caption.phrases]] = 1
    return out


class Bench:
    """What all measurements share: model, objects, features.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.names = objects_in(args.model)
        self.sprites = Sprites(read_sprites(args.data, self.names))
        self.extractor = EfficientNetFeatures()
        self.pipe = zoo.load_from(args.model, device=args.device)
        self.pipe.unet.to(memory_format=torch.channels_last)

    def scenes(self, first: int, count: int, objects: int | None) -> list[Scene]:
        """The scenes of consecutive seeds."""
        return [scene(first + i, len(self.names), objects) for i in range(count)]

    def composed(self, scenes: list[Scene], title: str, *, decoded: bool = False) -> Seen:
        """Features of true scenes.

        Args:
            scenes: to compose.
            title: of the progress bar.
            decoded: what the model's autoencoder makes of them instead.
        """
        parts = [scenes[i : i + 64] for i in range(0, len(scenes), 64)]
        out = []
        for part in track(parts, title):
            pictures = compose(part, self.sprites)
            out.append(Seen.of(self.shown(pictures) if decoded else pictures, self.extractor))
        return Seen.joined(out)

    def shown(self, pictures: Tensor) -> Tensor:
        """Pictures as the model's autoencoder shows them."""
        return training.decoded(self.pipe.vae, pictures)

    def drawn(self, captions: list[Caption], steps: int, seed: int, title: str) -> Tensor:
        """Generated pictures."""
        texts = [c.text(self.names) for c in captions]
        a = self.args
        return draw(self.pipe, texts, steps, a.guidance, a.batch, seed, a.bf16, title)


def right_picture(bench: Bench) -> dict[str, Any]:
    """The first bar, with the classifiers' own accuracy."""
    args, objects = bench.args, len(bench.names)
    half = args.fit // 2
    fit = [*bench.scenes(FIT, half, 1), *bench.scenes(FIT + half, half, 2)]
    plain, seen = fit[::2], fit[1::2]
    features = [bench.composed(plain, "composed scenes"), bench.composed(seen, "decoded", decoded=True)]
    probe = Probe.fit(Seen.joined(features), [*plain, *seen], objects)
    out: dict[str, Any] = {"scenes_to_fit": len(fit)}
    for name, count, number in (("one object", 1, args.singles), ("two objects", 2, args.pairs)):
        true = bench.scenes(HELD_OUT, 500, count)
        for kind, decoded in (("composed", False), ("decoded", True)):
            shown = bench.composed(true, f"{kind}, {name}", decoded=decoded)
            out[f"{kind}, {name}"] = probe.right(shown, [s.caption for s in true])
        captions = [s.caption for s in bench.scenes(DRAWN, number, count)]
        pictures = bench.drawn(captions, args.steps, args.seed, name)
        found = probe.right(Seen.of(pictures, bench.extractor), captions)
        out[f"generated, {name}"] = found | {"border": border_right(pictures, captions)}
    return out


def border_right(pictures: Tensor, captions: list[Caption]) -> float:
    """Share of pictures whose border's median colour is nearest the named plain background's.

    Args:
        pictures: ``(N, 3, H, W)`` in [0, 1].
        captions: of each.
    """
    sides = [pictures[:, :, :4], pictures[:, :, -4:], pictures[:, :, :, :4], pictures[:, :, :, -4:]]
    median = torch.cat([side.flatten(2) for side in sides], dim=2).median(2).values
    nearest = torch.cdist(median, torch.tensor(list(COLOURS.values())).float() / 255).argmin(1).tolist()
    named = [i for i, c in enumerate(captions) if len(c.ground) == 1]
    good = [COLOUR_NAMES[nearest[i]] == captions[i].ground[0] for i in named]
    return sum(good) / len(good) if good else float("nan")


def variety(bench: Bench) -> dict[str, Any]:
    """The second bar: mean feature distance of two pictures of a caption, generated and composed."""
    args = bench.args
    captions = [s.caption for s in bench.scenes(DRAWN + 10**6, args.variety, None)]
    drawn = [
        Seen.of(bench.drawn(captions, args.steps, seed, f"seed {seed}"), bench.extractor).pooled
        for seed in (args.seed + 10**4, args.seed + 2 * 10**4)
    ]
    true = [
        bench.composed([another(seed + i, c) for i, c in enumerate(captions)], "composed anew").pooled
        for seed in (FIT, HELD_OUT)
    ]
    generated = feature_distance(*drawn).mean().item()
    composed = feature_distance(*true).mean().item()
    return {
        "captions": len(captions),
        "generated": generated,
        "composed": composed,
        "ratio": generated / composed,
    }


def trajectory(bench: Bench) -> dict[str, Any]:
    """Median PSNR against the model's own 50 steps, of fewer steps and of reused outputs."""
    captions = [s.caption for s in bench.scenes(DRAWN + 2 * 10**6, bench.args.trajectory, None)]
    seed = bench.args.seed
    own = bench.drawn(captions, 50, seed, "50 steps")
    steps = {
        str(n): psnr(bench.drawn(captions, n, seed, f"{n} steps"), own).quantile(0.5).item()
        for n in FEWER_STEPS
    }
    reuse = {}
    for interval in REUSE:
        schedule = regrow.Schedule.every(interval, 50, depth=0)
        with regrow.apply(bench.pipe, regrow.DaTo(schedule=schedule)):
            pictures = bench.drawn(captions, 50, seed, f"reuse 1:{interval}")
        reuse[f"1:{interval}"] = psnr(pictures, own).quantile(0.5).item()
    return {"captions": len(captions), "steps": steps, "reuse": reuse}


def show(result: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table(title=f"{result['objects']} objects, {result['steps']} steps, {result['guidance']:g}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result.get("right_picture", {}).items():
        if isinstance(value, dict):
            table.add_row(f"{name}: named objects found", f"{value['objects']:.1%}")
            table.add_row(f"{name}: named colour found", f"{value['colour']:.1%}")
            if "border" in value:
                table.add_row(f"{name}: border nearest the named colour", f"{value['border']:.1%}")
    if "variety" in result:
        table.add_row(
            "distance of two pictures of a caption, of true ones", f"{result['variety']['ratio']:.2f}"
        )
    for kind, values in result.get("trajectory", {}).items():
        if isinstance(values, dict):
            for name, value in values.items():
                table.add_row(f"{kind} {name} against 50 steps", f"{value:.1f} dB")
    Console().print(table)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="npm tarball of @iconify-json/noto")
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--fit", type=int, default=8000, help="composed scenes for the classifiers")
    parser.add_argument("--singles", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--variety", type=int, default=64)
    parser.add_argument("--trajectory", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=("right", "variety", "trajectory"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=zoo.GUIDANCE["emoji"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--bf16", action="store_true", help="autocast: faster, nearly the same")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Measure a model as the command line says."""
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    result: dict[str, Any] = {
        "objects": len(bench.names),
        "steps": args.steps,
        "guidance": args.guidance,
        "precision": "bf16 autocast" if args.bf16 else "fp32",
        "seed": args.seed,
        "machine": machine(args.device),
    }
    parts = {"right": right_picture, "variety": variety, "trajectory": trajectory}
    keys = {"right": "right_picture"}
    for name, part in parts.items():
        if args.only is None or name in args.only:
            result[keys.get(name, name)] = part(bench)
            if args.json:
                write_json(args.json, result)
    show(result)


if __name__ == "__main__":
    main()
