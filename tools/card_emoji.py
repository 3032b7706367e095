"""Write the model card of the bundled model, its loss curve and a sheet of its pictures.

    python tools/card_emoji.py --log work/emoji --check check.json

With `--model DIR` that pipeline first replaces the bundled one, so that card, curve and weights
come from one run. Without it the card says that the curve is another run's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import torch
from check_emoji import draw, pick
from PIL import Image, ImageDraw
from train_emoji import keep_freed_memory, read_log

from regrow import zoo
from regrow.measure.images import to_picture

matplotlib.use("agg")
import matplotlib.pyplot as plt

STAGES = ("vae", "decoder", "denoiser")
COLUMNS = 8
PROMPTS = 64

FIRST_RUN = (
    "95 minutes on two CPU cores with AMX (about 17.6 pictures/s in bf16): 7 for the autoencoder, "
    "4 for its decoder, the rest for U-Net and text encoder"
)


def loss_curves(log: Path, target: Path) -> None:
    """One panel a stage: loss against minutes of training."""
    figure, axes = plt.subplots(1, len(STAGES), figsize=(10, 3), layout="constrained")
    for axis, stage in zip(axes, STAGES, strict=True):
        records = read_log(log / f"{stage}.log.jsonl")
        minutes = [r["seconds"] / 60 for r in records]
        axis.semilogy(minutes, [r["loss"] for r in records], linewidth=1.2)
        axis.set(title=stage, xlabel="minutes")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("mean squared error")
    figure.savefig(target, dpi=90)
    plt.close(figure)


def contact_sheet(
    pictures: torch.Tensor, captions: list[str], target: Path, columns: int = COLUMNS
) -> None:
    """Pictures (N, 3, H, W) in [0, 1] in a grid, each over its caption."""
    height, width = pictures.shape[-2:]
    cell, row = width + 48, height + 26
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * row), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % columns * cell, i // columns * row
        sheet.paste(to_picture(picture), (x + (cell - width) // 2, y + 4))
        pen.text((x + cell // 2, y + height + 8), shortened(caption), "black", anchor="mt")
    sheet.save(target, optimize=True)


def shortened(caption: str, length: int = 18) -> str:
    """A caption that fits under its picture."""
    return caption if len(caption) <= length else caption[: length - 1] + "…"


def percent(share: float) -> str:
    """A share with one decimal."""
    return f"{100 * share:.1f}%"


def results(check: dict[str, Any]) -> str:
    """The figures of the bar as a table."""
    rows = [
        ("own emoji nearest", percent(check["top1"])),
        ("own emoji among the 5 nearest", percent(check["top5"])),
        ("autoencoder PSNR", f"{check['vae_psnr']:.1f} dB"),
    ]
    for steps, value in check.get("trajectory_psnr", {}).items():
        rows.append((f"{steps} steps against its own 50-step pictures", f"{value:.1f} dB"))
    lines = ["| figure | value |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    versions = ", ".join(f"{name} {v}" for name, v in check["versions"].items())
    lines += [
        "",
        f"{check['captions']} captions, {check['steps']} DDIM steps, guidance {check['guidance']:g}, "
        f"{check['precision']}; {check['candidates']} candidates (all emoji without skin-tone "
        "variants), nearest by cosine of EfficientNet-Lite0 features.",
    ]
    if "trajectory_psnr" in check:
        lines.append(f"Fewer steps: median over {check['trajectory_captions']} captions.")
    lines.append(
        f"Measured {check['date']} on {check['processor']}, {check['threads']} threads; {versions}."
    )
    return "\n".join(lines)


def run_summary(log: Path) -> str:
    """The run behind the loss curve in one sentence."""
    settings = json.loads((log / "run.json").read_text())
    parts = []
    for stage in STAGES:
        records = read_log(log / f"{stage}.log.jsonl")
        minutes, steps = records[-1]["seconds"] / 60, int(records[-1]["step"])
        parts.append(f"{stage} {minutes:.0f} minutes, {steps:,} steps")
    return (
        f"{'; '.join(parts)}; {settings['threads']} threads of {settings['processor']}, "
        f"torch {settings['torch']}"
    )


def card(check: dict[str, Any], log: Path, same_run: bool, parameters: dict[str, int]) -> str:
    """The model card."""
    sizes = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parameters.items())
    summary = run_summary(log)
    if same_run:
        origin = f"Weights and loss curve come from one run of `tools/train_emoji.py`: {summary}."
    else:
        origin = (
            f"The weights come from a first run of this recipe: {FIRST_RUN}. The loss curve is "
            "**not** that run's: it shows a later run of `tools/train_emoji.py`, on a slower, "
            f"shared machine ({summary}). Minutes are processor time per thread. That later run is far "
            "too short to converge; its weights are not used."
        )
    return f"""# emoji

A small, complete text-to-image pipeline for tests, demos and benchmarks without a download: it draws
the {len(zoo.captions("emoji"))} emoji of the categories "Food & Drink" and "Animals & Nature" at
64x64. An ordinary `StableDiffusionPipeline` folder: {sizes} parameters.
U-Net and autoencoder are stored in fp16, the text encoder in fp32, so that plain `from_pretrained`
gives parts of one precision.

```python
from regrow import zoo

pipe = zoo.load("emoji")
pipe("red apple", num_inference_steps=50, guidance_scale=2.0).images[0]
```

![64 prompts](contact.png)

## Does it draw what it is told?

{results(check)}

## What it cannot show

It has memorised its pictures: the caption decides the whole picture, so its sampling trajectories are
nearly straight, and fewer steps come very near to its own 50-step pictures. "Fewer steps" therefore
beats every cache on it, and it can't tell acceleration methods apart by quality. Use it to see that a
method runs, is exact where it says so, and how long it takes. It knows only the words in
`captions.json`, ignores all others, and draws one object on white.

## Data

Noto emoji as 64x64 pictures, from the npm package `emoji-datasource-google` 16.0.0 (the pictures are
Apache-2.0, by Google), on white. The autoencoder saw all base emoji; the captions are the official
names in lower case.

## How it was trained

1. An `AutoencoderTiny` (64x64 to 32x32x4), on mean squared error.
2. Its latents are normalised per channel; the factors are folded into its first and last
   convolutions, and the decoder is trained on.
3. U-Net and a two-layer CLIP text encoder from scratch together: v-prediction, Stable Diffusion's
   noise levels, stratified timesteps, 10% of the captions dropped, batch 16, bf16 autocast; Muon on
   inner matrices and convolutions, AdamW on the rest, the learning rate falling over the second
   half, averaged weights (0.998).

{origin}

![loss of the three stages](loss.png)

Retrain with one command (resumable; `--data` also takes the tarball of
`npm pack emoji-datasource-google@16.0.0`), then measure:

```
python tools/train_emoji.py --data emoji64.zip --out work/emoji --export work/emoji/model
python tools/check_emoji.py --data emoji64.zip --model work/emoji/model --bf16 --trajectory
```

On a machine shared with others, set `OMP_WAIT_POLICY=PASSIVE`, so that waiting threads don't spin.
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", type=Path, required=True, help="work folder of train_emoji.py")
    parser.add_argument("--check", type=Path, required=True, help="JSON of check_emoji.py")
    parser.add_argument("--model", type=Path, help="bundle this pipeline, trained in --log")
    parser.add_argument("--same-run", action="store_true", help="the bundled weights were trained in --log")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    """Write card, curve and sheet into the bundled model's folder."""
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    folder = zoo.path("emoji")
    if args.model:
        shutil.copytree(args.model, folder, dirs_exist_ok=True)
    pipe = zoo.load("emoji")
    captions = pick(zoo.captions("emoji"), PROMPTS, seed=1)
    pictures = draw(pipe, captions, args.steps, 2.0, 16, 0, True, f"{PROMPTS} pictures")
    contact_sheet(pictures, captions, folder / "contact.png")
    loss_curves(args.log, folder / "loss.png")
    parts = {"U-Net": pipe.unet, "text encoder": pipe.text_encoder, "autoencoder": pipe.vae}
    parameters = {name: sum(p.numel() for p in m.parameters()) for name, m in parts.items()}
    check = json.loads(args.check.read_text())
    same_run = bool(args.model) or args.same_run
    (folder / "README.md").write_text(card(check, args.log, same_run, parameters))


if __name__ == "__main__":
    main()
