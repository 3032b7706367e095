"""The photographs of CIFAR-10 as tensors or pictures, from the archives in which they are published.

    python tools/cifar.py --data cifar-10-binary.tar.gz --count 1000 --out work/cifar-test

writes test photographs as PNG, and their classes as ``captions.txt``, a line each, as prompts.
Either the binary version (``cifar-10-binary.tar.gz``) or files in the public Parquet form, which need
pyarrow. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from regrow.lab.measure.images import to_picture

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32


def read_cifar(files: Sequence[Path], *, test: bool) -> tuple[Tensor, Tensor]:
    """Photographs uint8 ``(N, 3, 32, 32)`` and the numbers of their classes ``(N,)``.

    Args:
        files: one tar archive of the binary version, or Parquet files; of those the ones with "test" in
            their name are the test photographs.
        test: those for testing, not those to train on.

    Raises:
        ValueError: if the files have no such photographs.
    """
    wanted = [f for f in files if f.suffix != ".parquet" or ("test" in f.name) == test]
    parts = [_parquet(f) if f.suffix == ".parquet" else _binary(f, test) for f in wanted]
    if not parts:
        kind = "test" if test else "training"
        raise ValueError(f"files: {', '.join(map(str, files)) or 'none'} hold no {kind} photographs")
    pictures, labels = zip(*parts, strict=True)
    return torch.cat(pictures), torch.cat(labels)


def _binary(archive: Path, test: bool) -> tuple[Tensor, Tensor]:
    """Records of one byte of label and 3,072 bytes of picture, channel by channel."""
    rows = []
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            name = Path(member.name).name
            if name.endswith(".bin") and (name == "test_batch.bin") == test:
                file = tar.extractfile(member)
                assert file is not None
                rows.append(np.frombuffer(file.read(), np.uint8).reshape(-1, 1 + 3 * SIDE * SIDE))
    if not rows:
        raise ValueError(f"files: {archive} holds no binary batches of CIFAR-10")
    table = torch.from_numpy(np.concatenate(rows).copy())
    return table[:, 1:].reshape(-1, 3, SIDE, SIDE).clone(), table[:, 0].long()


def _parquet(file: Path) -> tuple[Tensor, Tensor]:
    """Columns ``img`` with the coded picture and ``label``."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file, columns=["img", "label"]).to_pydict()
    pictures = [np.array(Image.open(io.BytesIO(img["bytes"])).convert("RGB")) for img in table["img"]]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(table["label"])


def write(files: Sequence[Path], count: int, out: Path) -> None:
    """The first test photographs and the names of their classes.

    Raises:
        ValueError: if there are fewer, or the folder holds anything.
    """
    pictures, labels = read_cifar(files, test=True)
    if not 1 <= count <= len(pictures):
        raise ValueError(f"count: {count} is not allowed, it must be from 1 to {len(pictures)}")
    # A killed run leaves its first photographs, which are written again.
    if {file.name for file in out.glob("*")} - {f"{i:05d}.png" for i in range(count)}:
        raise ValueError(f"out: {out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    for i in track(range(count), "photographs"):
        to_picture(pictures[i].float() / 255).save(out / f"{i:05d}.png")
    names = (CLASSES[label] for label in labels[:count].tolist())
    (out / "captions.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def main() -> None:
    """Write the test photographs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="tar archive or Parquet files")
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write(args.data, args.count, args.out)


if __name__ == "__main__":
    main()
