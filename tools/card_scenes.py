"""Write the card of a model of emoji scenes, its loss curve and a sheet of its pictures, into its folder.

python tools/card_scenes.py --model work/scenes/model --log work/scenes --check check.json \\
    --fewer fewer/result.json

`--log` takes the folders of several rounds of training, each begun with the last, in their order.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from check_scenes import DRAWN, draw
from emoji_scenes import objects_in, scene
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from training import read_log

from regrow import zoo
from regrow.lab.measure.images import to_picture
from regrow.lab.memory import keep_freed_memory
from regrow.lab.plots import add_grid, new_figure, save

STAGES = ("vae", "decoder", "denoiser")
CAPTIONS, SEEDS = 64, 4
SIDE, COLUMNS = 88, 4
NUMBERS = ("one object", "two objects")
UNSCALED = ", noise levels not yet scaled"
FIRST = "work/first"
AS_GOOD = 1.05
TRAINED = "## How it was trained"


def stages_of(log: Path) -> list[str]:
    """The stages that a round had."""
    return [stage for stage in STAGES if (log / f"{stage}.log.jsonl").exists()]


def loss_curves(logs: list[Path], target: Path) -> None:
    """One panel a stage: loss against minutes of training, of all rounds one after the other."""
    figure = new_figure(10, 3)
    axes = figure.subplots(1, len(STAGES))
    for axis, stage in zip(axes, STAGES, strict=True):
        before = 0.0
        for number, log in enumerate(logs, 1):
            records = read_log(log / f"{stage}.log.jsonl")
            minutes = [before + r["seconds"] / 60 for r in records]
            axis.semilogy(minutes, [r["loss"] for r in records], linewidth=1.2, label=f"round {number}")
            before = minutes[-1] if minutes else before
        axis.set(title=stage, xlabel="minutes")
        add_grid(axis)
    axes[0].set_ylabel("mean squared error")
    if len(logs) > 1:
        axes[-1].legend()
    save(figure, target, dpi=90)


def contact_sheet(drawn: list[Tensor], captions: list[str]) -> Image.Image:
    """Every caption over its pictures of all seeds.

    Args:
        drawn: for each seed the captions' pictures ``(N, 3, H, W)`` in [0, 1].
        captions: N texts.
    """
    width, height = len(drawn) * (SIDE + 2) + 12, SIDE + 22
    rows = -(-len(captions) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, rows * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, caption in enumerate(captions):
        x, y = i % COLUMNS * width + 6, i // COLUMNS * height
        pen.text((x, y + 4), shortened(caption, 62), "black", font)
        for seed, pictures in enumerate(drawn):
            picture = to_picture(pictures[i]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(picture, (x + seed * (SIDE + 2), y + 19))
    return sheet


def shortened(caption: str, length: int = 18) -> str:
    """A caption that fits under its picture."""
    return caption if len(caption) <= length else caption[: length - 1] + "…"


def percent(share: float) -> str:
    """A share with one decimal."""
    return f"{100 * share:.1f}%"


def bars(check: dict[str, Any]) -> str:
    """What was measured as a table, with the bars."""
    right, reuse = check["right_picture"], check["trajectory"]["reuse"]
    one, two = right["generated, one object"], right["generated, two objects"]
    true = [
        [percent(right[f"{kind}, {n}"]["objects"]) for kind in ("composed", "decoded")] for n in NUMBERS
    ]
    colours = [
        [percent(right[f"{kind}, {n}"]["colour"]) for kind in ("composed", "decoded")] for n in NUMBERS
    ]
    rows = [
        ("named object found, one object", percent(one["objects"]), ">= 85%", *true[0]),
        ("both objects found, two objects", percent(two["objects"]), ">= 60%", *true[1]),
        ("named plain background found, one object", percent(one["colour"]), ">= 95%", *colours[0]),
        ("named plain background found, two objects", percent(two["colour"]), ">= 95%", *colours[1]),
        ("border nearest the named plain background", percent(one["border"]), "", "", ""),
        ("distance of two pictures of a caption", f"{check['variety']['ratio']:.2f}", ">= .80", "1", ""),
    ]
    for steps, value in check["trajectory"]["steps"].items():
        bar = "<= 32 dB" if steps == "10" else ""
        rows.append((f"{steps} steps against its own 50", f"{value:.1f} dB", bar, "", ""))
    rows += [(f"output reused {k} against its own 50", f"{v:.1f} dB", "", "", "") for k, v in reuse.items()]
    lines = ["| figure | this model | bar | true scenes | decoded ones |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    machine = check["machine"]
    lines += [
        "",
        f"{one['pictures']} and {two['pictures']} captions, {check['steps']} DDIM steps, guidance "
        f"{check['guidance']:g}, {check['precision']}. Linear classifiers on EfficientNet-Lite0 features "
        "(objects on pooled ones, backgrounds on the spatial ones of sFD), "
        f"fitted to {right['scenes_to_fit']:,} composed scenes, half of them as the autoencoder shows "
        'them; "true scenes" is what they find in composed scenes they have not seen, "decoded ones" the '
        "same in those that went through the autoencoder. Distance: mean feature distance of two seeds, "
        f"as a share of that of two composed scenes ({check['variety']['captions']} captions). Fewer steps "
        f"and reuse: median PSNR of {check['trajectory']['captions']} captions, guidance on.",
        f"Measured {machine['date']} on {machine['processor']}, {machine['threads']} threads; "
        + ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
        + ".",
        "",
        "```",
        "npm pack @iconify-json/noto@1.2.9",
        "python tools/check_scenes.py --data iconify-json-noto-1.2.9.tgz --model src/regrow/zoo/emoji \\",
        f"    --steps {check['steps']} --guidance {check['guidance']:g}"
        f"{'' if check['precision'] == 'fp32' else ' --bf16'} --json check.json",
        "```",
    ]
    return "\n".join(lines)


def fewer_steps(result: dict[str, Any]) -> str:
    """What fewer steps cost as a set of pictures.

    Args:
        result: of `regrow eval --methods steps:50,steps:25,...`, beside decoded scenes.
    """
    rows = result["rows"]
    if result["reference"] == "the baseline's pictures" or _steps(rows[-1]) > 10:
        raise SystemExit("--fewer: it must be beside true pictures, and end with 10 steps or fewer")
    lines = ["| steps | FD-EffNet | KD-EffNet | precision | recall |", "|---|---|---|---|---|"]
    for row in rows:
        figures = (
            f"{row['fd']:.2f}",
            f"{row['kd']:.4f}",
            f"{row['precision']:.2f}",
            f"{row['recall']:.2f}",
        )
        lines.append(f"| {_steps(row)} | {' | '.join(figures)} |")
    whole = rows[0]
    good = [f"{_steps(row)}" for row in rows if _steps(row) <= 10 and row["fd"] <= AS_GOOD * whole["fd"]]
    if good:
        verdict = (
            f"{' and '.join(good)} steps can't be told from {_steps(whole)} by FD-EffNet of so few "
            f"pictures (within {AS_GOOD - 1:.0%}). More objects, more of them in a scene and a longer "
            "training would bend the paths more."
        )
    else:
        verdict = (
            f"By FD-EffNet, too, 10 steps or fewer are worse than {_steps(whole)} (by more than "
            f"{AS_GOOD - 1:.0%})."
        )
    said = (
        f"{result['prompts']} captions, beside composed scenes as the autoencoder shows them; the figures "
        "compare only with each other, and with few pictures FD's bias hides small differences."
    )
    commands = [
        "```",
        "python tools/compose_scenes.py --data iconify-json-noto-1.2.9.tgz --model src/regrow/zoo/emoji \\",
        "    --count 1000 --decoded --out decoded",
        f"regrow eval --methods {','.join(row['name'] for row in rows)} --prompts {result['prompts']} \\",
        f"    --dtype {result['dtype']} --reference decoded --out fewer",
        "```",
    ]
    return "\n".join([*lines, "", f"{said} {verdict}", "", *commands])


def _steps(row: dict[str, Any]) -> int:
    """The number of steps of a row."""
    return int(row["name"].removeprefix("steps:"))


def missed_bars(check: dict[str, Any]) -> list[str]:
    """The bars that are missed."""
    right = check["right_picture"]
    one, two = right["generated, one object"], right["generated, two objects"]
    held = {
        "one object": one["objects"] >= 0.85,
        "two objects": two["objects"] >= 0.60,
        "background": min(one["colour"], two["colour"]) >= 0.95,
        "variety": check["variety"]["ratio"] >= 0.80,
        "10 steps": check["trajectory"]["steps"]["10"] <= 32.0,
    }
    return [name for name, good in held.items() if not good]


def run_summary(log: Path) -> str:
    """The run behind the loss curve in one sentence."""
    settings = json.loads((log / "run.json").read_text())
    parts = []
    for stage in stages_of(log):
        records = read_log(log / f"{stage}.log.jsonl")
        minutes, steps = records[-1]["seconds"] / 60, int(records[-1]["step"])
        parts.append(f"{stage} {minutes:.0f} minutes, {steps:,} steps")
    return (
        f"{'; '.join(parts)}; {settings['threads']} threads of {settings['processor']}, "
        f"torch {settings['torch']}"
    )


def command(log: Path, start: str, out: str) -> str:
    """The command of a round."""
    settings = json.loads((log / "run.json").read_text())
    stages, options = (
        stages_of(log),
        {"vae": "--vae-minutes", "decoder": "--decoder-minutes", "denoiser": "--minutes"},
    )
    minutes = " ".join(f"{options[stage]} {settings['minutes'][stage]:g}" for stage in stages)
    return (
        f"python tools/train_scenes.py --data iconify-json-noto-1.2.9.tgz --start {start} \\\n"
        f"    --objects {objects_of(settings)} --lr {settings['recipe']['lr']:g} {minutes} \\\n"
        f"    --out {out} --export {out}/model"
    )


def objects_of(settings: dict[str, Any]) -> int:
    """How many objects a round was trained on; older ones call them pictures."""
    return int(settings.get("objects", settings.get("pictures", 0)))


def trained(logs: list[Path]) -> str:
    """How it was trained: the last section of the card."""
    settings = [json.loads((log / "run.json").read_text()) for log in logs]
    recipe = settings[-1]["recipe"]
    rounds = "\n".join(
        f"- Round {i}, {objects_of(s)} objects{'' if s['recipe'].get('pure_noise', True) else UNSCALED}: "
        f"{run_summary(log)}."
        for i, (log, s) in enumerate(zip(logs, settings, strict=True), 1)
    )
    outs = [f"work/round{i}" for i in range(1, len(logs) + 1)]
    starts = [FIRST, *(f"{out}/model" for out in outs)]
    commands = "\n".join(command(*row) for row in zip(logs, starts, outs, strict=False))
    return f"""{TRAINED}

Begun with a first model, of 290 memorised pictures of 64x64 on white, which the history keeps:

1. An `AutoencoderTiny` (128x128 to 32x32x4) with that model's inner layers, on mean squared error of the
   picture plus that of its latents to those the first model gives the picture at half its size. So the
   first model's U-Net finds the latents that it knows.
2. Its decoder alone.
3. U-Net and a two-layer CLIP text encoder, beginning with those of the first model, or of the round
   before: v-prediction, Stable
   Diffusion's noise levels scaled to end in pure noise, stratified timesteps,
   {recipe["caption_dropout"]:.0%} of the captions dropped, batch {recipe["batch"]}, bf16 autocast; Muon on
   inner matrices and convolutions, AdamW on the rest, learning rate {recipe["lr"]:g}, falling after a fifth
   of the budget, averaged weights ({recipe["ema"]:g}).

{rounds}

Minutes are processor time per thread.

![loss of the three stages](loss.png)

```
npm pack @iconify-json/noto@1.2.9
mkdir -p {FIRST}
git archive 2e49882 src/regrow/zoo/emoji | tar -x -C {FIRST} --strip-components=4
{commands}
```
"""


def told(card: str) -> str:
    """What a card says on how its model was trained."""
    return card[card.index(TRAINED) :]


def card(
    check: dict[str, Any], few: str, training: str, names: list[str], parameters: dict[str, int]
) -> str:
    """The model card.

    Args:
        check: what check_scenes.py measured.
        few: what `fewer_steps` says.
        training: its last section.
        names: of the objects.
        parameters: numbers of, by part.
    """
    sizes = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parameters.items())
    missed = missed_bars(check)
    guidance = zoo.GUIDANCE["emoji"]
    verdict = f"Missed: {', '.join(missed)}." if missed else "All bars are met."
    return f"""# emoji

A small, complete text-to-image pipeline whose captions leave much open: it draws scenes of one to three of
{len(names)} emoji at random places, sizes and turns before a plain colour, a gradient or white, at 128x128.
An ordinary `StableDiffusionPipeline` folder: {sizes} parameters. Latents are 32x32, so the top level has
1,024 tokens. U-Net and autoencoder are stored in fp16, the text encoder in fp32.

```python
from regrow import zoo

pipe = zoo.load("emoji")
pipe("small penguin left and pizza on blue", num_inference_steps=50, guidance_scale={guidance}).images[0]
```

![{CAPTIONS} captions, {SEEDS} seeds each](contact.jpg)

## Does it draw what it is told, anew every time?

{bars(check)}

{verdict}

## Are fewer steps as good?

{few}

## Captions

Objects with "and" between them; by chance each with "small" or "large" before and "left", "right", "top" or
"bottom" after it; by chance "on" and the background's colour, or two of them with "to". The objects:
{", ".join(names)}. It knows no other words.

## Data

Noto emoji, drawn from the SVGs of the npm package `@iconify-json/noto` 1.2.9 (Apache-2.0, by Google) and
composed on the fly: every training picture is new (`tools/emoji_scenes.py`, a pure function of a seed).

{training}"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder")
    parser.add_argument(
        "--log",
        type=Path,
        nargs="+",
        help="work folders of train_scenes.py; without it the card's words on training stay",
    )
    parser.add_argument("--check", type=Path, required=True, help="JSON of check_scenes.py")
    parser.add_argument(
        "--fewer",
        type=Path,
        required=True,
        help="result.json of regrow eval, of steps only, beside decoded scenes",
    )
    parser.add_argument("--sheet", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=zoo.GUIDANCE["emoji"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    """Write card, curve and sheet into the model's folder."""
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    pipe = zoo.load_from(args.model)
    names = objects_in(args.model)
    if args.sheet:
        captions = [scene(DRAWN + 3 * 10**6 + i, len(names)).caption.text(names) for i in range(CAPTIONS)]
        drawn = [
            draw(
                pipe, captions, args.steps, args.guidance, 16, 10**5 * (seed + 1), True, f"seed {seed + 1}"
            )
            for seed in range(SEEDS)
        ]
        contact_sheet(drawn, captions).save(args.model / "contact.jpg", quality=88)
    readme = args.model / "README.md"
    if args.log:
        loss_curves(args.log, args.model / "loss.png")
        training = trained(args.log)
    else:
        training = told(readme.read_text())
    parts = {"U-Net": pipe.unet, "text encoder": pipe.text_encoder, "autoencoder": pipe.vae}
    parameters = {name: sum(p.numel() for p in m.parameters()) for name, m in parts.items()}
    check = json.loads(args.check.read_text())
    few = fewer_steps(json.loads(args.fewer.read_text()))
    readme.write_text(card(check, few, training, names, parameters))


if __name__ == "__main__":
    main()
