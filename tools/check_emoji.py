"""Does a model draw what its captions say? Compare its pictures with all emoji.

    python tools/check_emoji.py --data emoji64.zip --json check.json

Each caption is drawn once; its own emoji has to be among the 5 nearest of all base emoji, by cosine
between EfficientNet-Lite0 features. `--trajectory` adds how near fewer steps come to the model's
own 50-step pictures: a model whose every number there is high has nothing to tell methods apart by.
"""

from __future__ import annotations

import argparse
import datetime
import random
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from emoji_data import EmojiSet, read_emoji
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from train_emoji import keep_freed_memory, processor_name, write_json

from regrow import zoo
from regrow.measure.features import EfficientNetFeatures

FEWER_STEPS = (25, 16, 10, 5)


def pick(captions: list[str], count: int, seed: int) -> list[str]:
    """A fixed draw of captions, in the order of the file; all of them when there are no more."""
    if count >= len(captions):
        return captions
    drawn = random.Random(seed).sample(range(len(captions)), count)
    return [captions[i] for i in sorted(drawn)]


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


def features_of(pictures: Tensor, extractor: EfficientNetFeatures) -> Tensor:
    """Unit-length features of pictures in [0, 1]."""
    parts = [extractor(part) for part in pictures.split(64)]
    return F.normalize(torch.cat(parts), dim=-1)


def ranks(drawn: Tensor, captions: list[str], emoji: EmojiSet) -> Tensor:
    """How many emoji are nearer to each drawn picture than the caption's own."""
    extractor = EfficientNetFeatures()
    reference = features_of(emoji.pictures.float() / 255, extractor)
    similarity = features_of(drawn, extractor) @ reference.T
    place = {caption: i for i, caption in enumerate(emoji.captions)}
    own = torch.tensor([place[c] for c in captions])
    return (similarity > similarity.gather(1, own[:, None])).sum(1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, both in [0, 1]."""
    return -10 * torch.log10((a - b).square().mean((1, 2, 3)).clamp_min(1e-12))


@torch.no_grad()
def vae_psnr(pipe: StableDiffusionPipeline, pictures: Tensor) -> float:
    """Mean over pictures of what the autoencoder alone keeps."""
    x = pictures.to(pipe.vae.device).float() / 255
    parts = []
    for part in x.split(64):
        latents = pipe.vae.encoder((part * 2 - 1).to(pipe.vae.dtype))
        again = pipe.vae.decoder(latents).float().add(1).div(2).clamp(0, 1)
        parts.append(psnr(again, part))
    return torch.cat(parts).mean().item()


def measure(pipe: StableDiffusionPipeline, emoji: EmojiSet, args: argparse.Namespace) -> dict:
    """All figures as plain data."""
    known = zoo.captions_in(args.model)
    captions = pick(known, args.captions, args.seed)
    pipe.unet.to(memory_format=torch.channels_last)
    settings = (args.guidance, args.batch, args.seed, args.bf16)
    drawn = draw(pipe, captions, args.steps, *settings, f"{args.steps} steps")
    rank = ranks(drawn, captions, emoji)
    place = {caption: i for i, caption in enumerate(emoji.captions)}
    result: dict[str, Any] = {
        "captions": len(captions),
        "candidates": len(emoji),
        "steps": args.steps,
        "guidance": args.guidance,
        "precision": "bf16 autocast" if args.bf16 else "fp32",
        "seed": args.seed,
        "top1": (rank < 1).float().mean().item(),
        "top5": (rank < 5).float().mean().item(),
        "missed": [c for c, r in zip(captions, rank.tolist(), strict=True) if r >= 5],
        "vae_psnr": vae_psnr(pipe, emoji.pictures[[place[c] for c in known]]),
        "processor": processor_name(pipe.unet.device),
        "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers")},
        "date": datetime.date.today().isoformat(),
    }
    if args.trajectory:
        some = captions[: args.trajectory]
        own = drawn[: len(some)]
        if args.steps != 50:
            own = draw(pipe, some, 50, *settings, "50 steps")
        result["trajectory_captions"] = len(some)
        result["trajectory_psnr"] = {
            str(steps): psnr(draw(pipe, some, steps, *settings, f"{steps} steps"), own).median().item()
            for steps in FEWER_STEPS
        }
    return result


def show(result: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table(title=f"{result['processor']}, {result['threads']} threads")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("captions", str(result["captions"]))
    table.add_row("candidates", str(result["candidates"]))
    table.add_row("own emoji nearest", f"{result['top1']:.1%}")
    table.add_row("own emoji among 5 nearest", f"{result['top5']:.1%}")
    table.add_row("autoencoder PSNR", f"{result['vae_psnr']:.1f} dB")
    for steps, value in result.get("trajectory_psnr", {}).items():
        table.add_row(f"{steps} steps against 50", f"{value:.1f} dB")
    Console().print(table)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="zip or npm tarball of emoji")
    parser.add_argument("--model", type=Path, default=zoo.path("emoji"), help="pipeline folder")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--captions", type=int, default=300)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--bf16", action="store_true", help="autocast: faster, nearly the same")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trajectory", type=int, nargs="?", const=16, default=0, metavar="CAPTIONS")
    return parser.parse_args()


def main() -> None:
    """Measure a model as the command line says."""
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    pipe = zoo.load_from(args.model, device=args.device)
    result = measure(pipe, read_emoji(args.data), args)
    show(result)
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
