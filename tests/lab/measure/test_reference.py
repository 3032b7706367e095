"""The data's features, from a folder of pictures or a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_evaluate import Colours

from regrow.lab.measure.extractors import EffNet
from regrow.lab.measure.images import to_tensor
from regrow.lab.measure.reference import load, of_pictures, pictures_in


def folder_of(root: Path, count: int = 5) -> Path:
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        folder = root / ("class-a", "class-b")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        values = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(folder / f"{i}.png")
    (root / "readme.txt").write_text("no picture")
    return root


def test_features_are_those_of_every_picture_in_order_and_are_kept(tmp_path: Path) -> None:
    files = pictures_in(folder_of(tmp_path / "data"))
    assert [file.stem for file in files] == ["0", "2", "4", "1", "3"]
    seen = []
    found = of_pictures("data", files, Colours(), on_picture=lambda: seen.append(1))
    together = Colours()(torch.stack([to_tensor(Image.open(file)) for file in files]).float() / 255)
    assert torch.equal(found.pooled, together.pooled)
    assert torch.equal(found.spatial, together.spatial)
    assert len(seen) == 5
    kept = tmp_path / "new" / "data.safetensors"
    found.save(kept, Colours())
    again = load(kept, Colours())
    assert again.name == "data"
    assert torch.equal(again.pooled, found.pooled)
    assert torch.equal(again.spatial, found.spatial)
    with pytest.raises(ValueError, match="holds features of 'colours', it must be those of 'effnet'"):
        load(kept, EffNet())


def test_what_pictures_show_through_is_white(tmp_path: Path) -> None:
    values = torch.zeros(8, 8, 4, dtype=torch.uint8)
    values[4:, :, 3] = 255
    values[:4, :, 0] = 200
    Image.fromarray(values.numpy(), "RGBA").save(tmp_path / "a.png")
    Image.fromarray(values[..., 3].numpy(), "L").save(tmp_path / "grey.png")
    found = of_pictures("data", [tmp_path / "a.png", tmp_path / "grey.png"], Colours())
    white, black = torch.ones(3, 1, 2), torch.zeros(3, 1, 2)
    assert torch.equal(found.pooled[0].view(3, 2, 2), torch.cat([white, black], 1))
    assert torch.equal(found.pooled[1].view(3, 2, 2), torch.cat([black, white], 1))


@pytest.mark.parametrize("rest", [0, 20, 100])
def test_a_broken_picture_is_named(tmp_path: Path, rest: int) -> None:
    file = folder_of(tmp_path, 1) / "class-a" / "0.png"
    file.write_bytes(file.read_bytes()[:rest])
    with pytest.raises(OSError, match=r"reference: .*0\.png can't be read as a picture"):
        of_pictures("data", [file], Colours())


def test_what_is_no_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 3 pictures, it must hold >= 4"):
        pictures_in(folder_of(tmp_path / "few", 3))
    with pytest.raises(FileNotFoundError, match="must be a folder or"):
        pictures_in(tmp_path / "nowhere")
    plain = tmp_path / "plain.safetensors"
    save_file({"pooled": torch.zeros(4, 4)}, plain)
    with pytest.raises(ValueError, match="was not written by --save-reference"):
        load(plain, Colours())
    plain.write_text("text")
    with pytest.raises(ValueError, match=r"it is damaged .*; write it by --save-reference"):
        load(plain, Colours())
