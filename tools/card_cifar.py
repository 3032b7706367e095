"""Write the card of a model of small photographs and its loss curve into its folder.

python tools/card_cifar.py --model work/cifar/model --log work/cifar --check check.json

The contact sheet is check_cifar.py's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar import CLASSES
from training import read_log

from regrow import zoo
from regrow.lab.plots import add_grid, new_figure, save


def loss_curve(log: Path, target: Path) -> None:
    """Loss against minutes of training."""
    records = read_log(log / "denoiser.log.jsonl")
    figure = new_figure(6, 3)
    axis = figure.subplots()
    axis.semilogy([r["seconds"] / 60 for r in records], [r["loss"] for r in records], linewidth=1.2)
    axis.set(xlabel="minutes", ylabel="mean squared error of the velocity")
    add_grid(axis)
    save(figure, target, dpi=90)


def by_class(name: str, accuracy: dict[str, Any]) -> str:
    """A row of the share found of each class."""
    own = accuracy["accuracy by class"]
    return f"| {name} | " + " | ".join(f"{100 * own[c]:.0f}%" if c in own else "" for c in CLASSES) + " |"


def figures(check: dict[str, Any]) -> str:
    """What check_cifar.py measured, a row a setting, with its command."""
    columns = "| DDIM steps | guidance | FD-EffNet | classifier finds the class |"
    lines = [f"Of {check['images']:,} pictures each:", "", columns, "|---|---|---|---|"]
    rows = sorted(check["settings"], key=lambda row: (-row["guidance"], -row["steps"]))
    for row in rows:
        guidance = "none" if row["guidance"] == 1 else f"{row['guidance']:g}"
        lines.append(f"| {row['steps']} | {guidance} | {row['fd']:.1f} | {100 * row['accuracy']:.1f}% |")
    least, most = check["fd of training photographs"], check["test photographs"]
    lines.append(f"| photographs | | {least:.1f} | {100 * most['accuracy']:.1f}% |")
    first = check["settings"][0]
    lines += [
        "",
        f"| found, of | {' | '.join(CLASSES)} |",
        "|---|" + "---|" * len(CLASSES),
        by_class(f"{first['steps']} steps, guidance {first['guidance']:g}", first),
        by_class("photographs", most),
    ]
    count, machine = check["images"], check["settings"][0]["machine"]
    options = f" --batch {check['batch']}" + ("" if check["precision"] == "fp32" else " --bf16")
    options += "" if check["device"] == "cpu" else f" --device {check['device']}"
    settings = " ".join(f"{row['steps']}:{row['guidance']:g}" for row in check["settings"])
    lines += [
        "",
        f"{count:,} pictures each, {check['precision']}, beside the first {count:,} test photographs. "
        "FD-EffNet is the Fréchet distance of EfficientNet-Lite0 features (not FID); its last row is that "
        "of as many training photographs. The classifier is linear on the same features, fitted to "
        f"{check['fit']:,} training photographs; its last row is on the test photographs.",
        f"Measured {machine['date']} on {machine['gpu'] or machine['processor']}, {machine['threads']} "
        f"threads; {', '.join(f'{name} {v}' for name, v in machine['versions'].items())}.",
        "",
        "```",
        "python tools/check_cifar.py --data cifar-10-binary.tar.gz --model src/regrow/zoo/cifar10 \\",
        f"    --images {count}{options} --json check.json \\",
        f"    --settings {settings}",
        "```",
    ]
    return "\n".join(lines)


def trained(log: Path) -> str:
    """How it was trained."""
    run = json.loads((log / "run.json").read_text())
    last, recipe = read_log(log / "denoiser.log.jsonl")[-1], run["recipe"]
    epochs = last["step"] * recipe["batch"] / 50_000
    where = "one GPU" if run["device"] == "cuda" else f"{run['threads']} CPU threads"
    small = (
        "" if run["device"] == "cuda" else " That is little for photographs: expect shapes, not details."
    )
    minutes, shape = run["minutes"]["denoiser"], f"--layers {recipe['layers']} --heads {recipe['heads']}"
    return f"""{last["seconds"] / 60:.0f} minutes on {where} ({run["processor"]}, torch {run["torch"]};
processor time per thread if not on a GPU): {int(last["step"]):,} steps of {recipe["batch"]} pictures,
{epochs:.1f} times through the photographs.{small}

v-prediction at stratified noise levels, pictures mirrored at random, {recipe["class_dropout"]:.0%} of the
classes dropped, bf16 autocast; Muon on inner matrices, AdamW on the rest, learning rate {recipe["lr"]:g},
falling after a fifth of the time, averaged weights ({recipe["ema"]:g}).

![loss](loss.png)

```
python tools/train_cifar.py --data cifar-10-binary.tar.gz --out work/cifar --export work/cifar/model \\
    --minutes {minutes:g} {shape} --batch {recipe["batch"]}
```
"""


def card(checks: Sequence[dict[str, Any]], log: Path, config: dict[str, Any], parameters: int) -> str:
    """The model card.

    Args:
        checks: what check_cifar.py measured, on different numbers of pictures.
        log: work folder of train_cifar.py.
        config: of the transformer.
        parameters: number of the transformer's.
    """
    guidance, measured = zoo.GUIDANCE["cifar10"], "\n\n".join(map(figures, checks))
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    return f"""# cifar10

A small class-conditional diffusion transformer of photographs of 32x32: an ordinary `DiTPipeline` folder.
{parameters / 1e6:.2f} M parameters in fp16, {config["num_layers"]} layers of {heads} heads of {size}.
Patches of 2x2 on the pixels: 256 tokens, as many as DiT-XL/2 has at 256x256. Its autoencoder is one in
closed form whose latents are the pixels.

```python
from regrow import zoo

pipe = zoo.load("cifar10")
pipe(pipe.get_label_ids(["ship", "horse"]), num_inference_steps=50, guidance_scale={guidance}).images
```

Classes: {", ".join(CLASSES)}. A row each:

![Twelve pictures of each class](contact.png)

## Are they like the photographs?

{measured}

## Data

The 50,000 training photographs of CIFAR-10 (Krizhevsky, Learning Multiple Layers of Features from Tiny
Images, 2009).

## How it was trained

{trained(log)}"""


def main() -> None:
    """Write card and curve into the model's folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--log", type=Path, required=True, help="work folder of train_cifar.py")
    parser.add_argument("--check", type=Path, nargs="+", required=True, help="JSON of check_cifar.py")
    args = parser.parse_args()
    transformer = zoo.load_from(args.model).transformer
    loss_curve(args.log, args.model / "loss.png")
    parameters = sum(p.numel() for p in transformer.parameters())
    checks = [json.loads(file.read_text()) for file in args.check]
    text = card(checks, args.log, dict(transformer.config), parameters)
    (args.model / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
