"""Compose true pictures of emoji scenes with their captions, as a reference for generated ones.

    python tools/compose_scenes.py --data noto.tgz --model work/scenes/model --count 5000 --out reference

Writes ``000000.png`` and so on, and ``captions.txt``, a caption a line. With ``--decoded`` the pictures go
through the model's autoencoder: what is left between them and generated ones is the denoiser's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from emoji_scenes import Sprites, compose, objects_in, read_sprites, scene
from rich.progress import track
from torch import Tensor
from training import decoded

from regrow import zoo
from regrow.lab.measure.images import to_picture

# Other scenes than those a model is tested on.
FIRST = 4 * 10**9
BATCH = 64


def write_scenes(
    sprites: Sprites,
    names: list[str],
    count: int,
    out: Path,
    through: Callable[[Tensor], Tensor] = lambda pictures: pictures,
) -> None:
    """The scenes of `count` consecutive seeds, in a folder that is made.

    Args:
        sprites: pictures of the objects.
        names: their names.
        count: of scenes.
        out: folder.
        through: what becomes of pictures ``(B, 3, H, W)`` in [0, 1] before they are written.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for start in track(range(0, count, BATCH), "composing"):
        scenes = [scene(FIRST + i, len(names)) for i in range(start, min(start + BATCH, count))]
        for i, picture in enumerate(through(compose(scenes, sprites)), start):
            to_picture(picture).save(out / f"{i:06d}.png")
        lines += [s.caption.text(names) for s in scenes]
    (out / "captions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Write as many as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="npm tarball of @iconify-json/noto")
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder: its objects are drawn")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--decoded", action="store_true", help="as the model's autoencoder shows them")
    args = parser.parse_args()
    names = objects_in(args.model)
    through = {"through": partial(decoded, zoo.load_from(args.model).vae)} if args.decoded else {}
    write_scenes(Sprites(read_sprites(args.data, names)), names, args.count, args.out, **through)


if __name__ == "__main__":
    main()
