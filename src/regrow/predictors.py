"""What was learned of a model: its weights, and what they were learned of, in two files beside each other.

``NAME.safetensors`` holds tensors, ``NAME.json`` says which model they are for. No code is in either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from regrow import zoo
from regrow.core.decision import Adapter, Entered
from regrow.fields import MOST_BLOCKS, Checked, Count, explain
from regrow.files import FileError, check_file, read_json, said
from regrow.models import known_layout
from regrow.models.transformer import FAMILIES
from regrow.origin import denoiser_key
from regrow.tokens.shares import Table
from regrow.words import one_line, shown

FORMAT = "regrow-learned"
VERSION = 1
LARGEST = 1 << 32
"""Bytes of the tensors; one block of the largest published transformers has about 1 GB."""


UNTRAINED = "untrained"
"""What to name in place of a file to have something of the right size that has learned nothing."""
BUNDLED = "predictor.safetensors"
"""Name of the predictor's file in the folder of a bundled model."""
_COMMANDS = {"predictor": "predictor", "lora": "refine", "router": "router"}


class Learned(Checked):
    """What ``NAME.json`` says.

    Args:
        kind: what was learned: ``"predictor"`` and its refinement ``"lora"`` (TokenCache), or ``"router"``
            (Learning-to-Cache).
        model: name or folder of the model.
        denoiser: `regrow.origin.denoiser_key` of its denoiser.
        sites: how many sites it decides for.
        steps: steps of the sampler that it was learned for; None if for any number.
        trained: steps of training.
        settings: of the training, by name.
        digest: SHA-256 of ``NAME.safetensors``.
    """

    format: Literal["regrow-learned"] = "regrow-learned"
    version: Literal[1] = 1
    kind: Literal["predictor", "lora", "router"]
    model: str
    denoiser: str
    sites: Count
    steps: Count | None = None
    trained: int = 0
    settings: Mapping[str, Any] = {}
    digest: str = ""


@dataclass(frozen=True)
class LearnedFile:
    """Both files.

    Args:
        about: what they say.
        tensors: by name.
        file: ``NAME.safetensors``, for messages.
    """

    about: Learned
    tensors: Mapping[str, Tensor]
    file: Path

    def check(self, denoiser: nn.Module, sites: int) -> None:
        """Refuse a denoiser that they are not for.

        Raises:
            ValueError: naming the model that they are for.
        """
        if self.about.denoiser != denoiser_key(denoiser) or self.about.sites != sites:
            raise ValueError(
                f"{self.about.kind}: {said(self.file)} is for {one_line(self.about.model, 100)} "
                f"({one_line(self.about.denoiser, 100)}), "
                f"not for this {type(denoiser).__name__} ({denoiser_key(denoiser)}); train one for it: "
                f"regrow train {_COMMANDS[self.about.kind]}"
            )

    def wrong(self, name: str) -> FileError:
        """The error of a tensor that is not what it must be."""
        return FileError(
            f"{said(self.file)}: {one_line(name, 100)}: this tensor is missing, of another form, or of "
            "values that can't be; get the file again, or train anew"
        )


def described_by(file: Path) -> Path:
    """``NAME.json`` of ``NAME.safetensors``."""
    return file.with_suffix(".json")


def write_learned(file: Path, about: Learned, tensors: Mapping[str, Tensor]) -> None:
    """Write both files, whole or not at all.

    Args:
        file: ``NAME.safetensors``.
        about: what they are; its digest is set.
        tensors: by name.

    Raises:
        ValueError: if the file has another ending.
    """
    _check_name(file, about.kind)
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    told = about.model_copy(update={"digest": hashlib.sha256(content).hexdigest()})
    for to, data in (
        (file, content),
        (described_by(file), (json.dumps(told.model_dump(mode="json"), indent=1) + "\n").encode()),
    ):
        part = to.with_name(f".{to.name}.part")
        part.write_bytes(data)
        part.replace(to)


def read_learned(file: Path, kind: str) -> LearnedFile:
    """Read both files.

    Args:
        file: ``NAME.safetensors``.
        kind: what it must be, see `Learned`.

    Raises:
        OSError: naming a file that can't be read.
        FileError: naming the file, if it is of another kind or version, damaged, or of other tensors.
    """
    _check_name(file, kind)
    described = described_by(file)
    check_file(file, LARGEST)
    data = read_json(described)
    _check_version(data, described)
    try:
        about = Learned.model_validate(data)
    except ValidationError as error:
        raise FileError(f"{said(described)}: {explain(error)}") from error
    if about.kind != kind:
        raise FileError(f"{said(described)}: kind: {about.kind!r} is not allowed here, it must be {kind!r}")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != about.digest:
        raise FileError(
            f"{said(file)}: it is cut off, changed, or not the file that {described.name} describes; "
            "get both again, or train anew"
        )
    try:
        return LearnedFile(about, load(content), file)
    except SafetensorError as error:
        raise FileError(f"{said(file)}: it is no safetensors file") from error


def _check_name(file: Path, kind: str) -> None:
    if file.suffix != ".safetensors":
        raise ValueError(f"{kind}: {shown(str(file))} is not allowed, it must end in .safetensors")


def _check_version(data: Any, file: Path) -> None:
    """Refuse what is no description, or one of a newer version, before its fields are looked at."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FileError(f"{said(file)}: it does not describe what regrow train wrote")
    version = data.get("version")
    if isinstance(version, int) and version > VERSION:
        raise FileError(
            f"{said(file)}: version: {version} is newer than this regrow knows, it must be <= {VERSION}; "
            "update regrow"
        )


class CachePredictor(nn.Module):
    """TokenCache's cache predictor (section III-B): a block of the model's kind, and a head.

    ``alpha = sigmoid(W block(x, t, c) + b)``: for every token a value in (0, 1) for each block of the
    model, high where the block's update of that token should be computed.

    Args:
        block: a block of the model's kind.
        channels: C of the tokens.
        sites: L, blocks of the model.
    """

    def __init__(self, block: nn.Module, channels: int, sites: int) -> None:
        super().__init__()
        self.block = block
        parameter = next(block.parameters())
        # Drawn on the CPU, whose generator a caller can set back.
        head = nn.Linear(channels, sites, device="meta" if parameter.is_meta else "cpu")
        self.head = head.to(parameter.device, parameter.dtype)

    @classmethod
    def of(cls, denoiser: nn.Module, sites: int) -> CachePredictor:
        """An untrained one for a transformer with so many blocks, which begins with a copy of the first.

        Args:
            denoiser: a transformer of a known family. Where its weights are at hand only while it runs
                (offload), or are not those of its class (quantised), the block begins with zeros.
            sites: blocks, 1 <= L <= 1000.
        """
        assert 1 <= sites <= MOST_BLOCKS
        first = known_layout(denoiser).block_sites[0].module
        config: Any = denoiser.config
        block = _plain_block(denoiser)
        if not without_data(denoiser):
            given = {k: v for k, v in first.state_dict().items() if not v.is_meta}
            like = next(iter(given.values()), torch.empty(0))
            block = block.to_empty(device=like.device).to(like.dtype)
            own = block.state_dict()
            fits = own.keys() == given.keys() and all(own[k].shape == v.shape for k, v in given.items())
            block.load_state_dict(given if fits else {k: torch.zeros_like(v) for k, v in own.items()})
        return cls(block, config.num_attention_heads * config.attention_head_dim, sites)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """alpha ``(B, N, L)`` of tokens ``(B, N, C)``.

        Args:
            x: what the model's first block is given.
            args: what else it is given.
            kwargs: the same by name.
        """
        return torch.sigmoid(self.head(self.block(x, *args, **kwargs)))

    def of_samples(self, entered: Entered, batch: int) -> Tensor:
        """alpha ``(B, N, L)`` of B samples; of a video, N are the tokens of all frames, frame by frame."""
        like = next(self.parameters())
        if like.device != entered.x.device or like.dtype != entered.x.dtype:
            # The model was moved after `regrow.apply`, or casts what it is given.
            self.to(entered.x.device, entered.x.dtype)
        alpha: Tensor = self(entered.x, *entered.args, **entered.kwargs)
        return alpha.reshape(batch, -1, alpha.shape[-1])


def load_predictor(predictor: CachePredictor, learned: LearnedFile) -> None:
    """Put the weights of a file into a predictor; on the meta device there is nowhere to put them.

    Raises:
        FileError: naming a tensor that is missing, of another form, or not the predictor's.
    """
    if next(predictor.parameters()).is_meta:
        return
    prefix = "predictor."
    weights = {k.removeprefix(prefix): v for k, v in learned.tensors.items() if k.startswith(prefix)}
    own = predictor.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in own or name not in weights or own[name].shape != weights[name].shape:
            raise learned.wrong(f"{prefix}{name}")
    predictor.load_state_dict(weights)


def table_of(learned: LearnedFile) -> Table:
    """The table of a file.

    Raises:
        FileError: naming the tensor that is missing, of another form, or not within 0 to 1.
    """
    tensors = {"quantiles": (3, 2), "alpha": (1, 1)}
    for name, (dimensions, least) in tensors.items():
        tensor = learned.tensors.get(name)
        formed = tensor is not None and tensor.dim() == dimensions and tensor.shape[-1] >= least
        if tensor is None or not formed or not tensor.numel() or not ((tensor >= 0) & (tensor <= 1)).all():
            raise learned.wrong(name)
    if learned.tensors["quantiles"].shape[1] != learned.about.sites:
        raise learned.wrong("quantiles")
    return Table(*(learned.tensors[name].double().numpy() for name in tensors))


def predictor_for(
    denoiser: nn.Module, sites: int, file: str | None, seed: int
) -> tuple[CachePredictor, Table | None]:
    """A predictor for a model, to be used and not trained, and its table if it has learned anything.

    Args:
        denoiser: the model's.
        sites: its blocks.
        file: of a trained one; `UNTRAINED` for one that has learned nothing; None for the bundled one. One
            without data needs none.
        seed: draws what it begins with; the caller's chance stays as it is.

    Raises:
        ValueError: if there is none for the model, or it is of another.
        FileError: naming a tensor that is not what it must be.
    """
    if file is None:
        learned = bundled_for(denoiser)
        if learned is None and not without_data(denoiser):
            raise untrained("predictor", "bundled", denoiser)
    else:
        learned = None if file == UNTRAINED else read_learned(Path(file), "predictor")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        predictor = CachePredictor.of(denoiser, sites).eval().requires_grad_(False)
    if learned is None:
        return predictor, None
    learned.check(denoiser, sites)
    table = table_of(learned)
    load_predictor(predictor, learned)
    return predictor, table


def untrained(kind: str, how: str, denoiser: nn.Module) -> ValueError:
    """The error of a model for which nothing of a kind is bundled, or given."""
    return ValueError(
        f"{kind}: none is {how} for this {type(denoiser).__name__}; train one (regrow train "
        f"{_COMMANDS[kind]}) and name its file, or take {UNTRAINED!r} to measure time alone"
    )


def bundled_for(denoiser: nn.Module) -> LearnedFile | None:
    """The predictor that is bundled with a model, if it is one of those."""
    for name in zoo.MODELS:
        file = zoo.path(name) / BUNDLED
        if file.exists():
            learned = read_learned(file, "predictor")
            if learned.about.denoiser == denoiser_key(denoiser):
                return learned
    return None


def read_adapters(file: Path, denoiser: nn.Module, sites: int, last_blocks: int) -> dict[str, Adapter]:
    """The updates of a file, by the paths of their layers.

    Raises:
        ValueError: if they are of another model, or of more or fewer blocks.
        FileError: if the file is none of theirs.
    """
    learned = read_learned(file, "lora")
    learned.check(denoiser, sites)
    trained = learned.about.settings.get("last_blocks")
    if trained != last_blocks:
        raise ValueError(f"lora: {said(file)} is for last_blocks={trained}, not {last_blocks}")
    down, up = ".lora_A.weight", ".lora_B.weight"
    layers, found = dict(denoiser.named_modules()), dict[str, Adapter]()
    for name in (name.removesuffix(down) for name in learned.tensors if name.endswith(down)):
        path, first = name.removeprefix("transformer."), learned.tensors[name + down]
        second = learned.tensors.get(name + up)
        if second is None or not _fits(layers.get(path), first, second):
            raise learned.wrong(name)
        found[path] = Adapter(first, second)
    return found


def _fits(layer: Any, down: Tensor, up: Tensor) -> bool:
    """Whether a linear layer can have a low-rank update."""
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        return False
    own = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return own == (down.shape[1], up.shape[0])


def without_data(denoiser: nn.Module) -> bool:
    """Whether a denoiser has no weights, as one that calls are counted by; offloaded ones come back."""
    offloaded = any(hasattr(module, "_hf_hook") for module in denoiser.modules())
    return not offloaded and all(parameter.is_meta for parameter in denoiser.parameters())


def _plain_block(denoiser: Any) -> nn.Module:
    """A first block on the meta device as its class makes it, without hooks, adapters or other's layers."""
    kind: Any = next(base for base in type(denoiser).__mro__ if base.__name__ in FAMILIES)
    with torch.device("meta"):
        plain = kind.from_config(denoiser.config, num_layers=1)
    return known_layout(plain).block_sites[0].module
