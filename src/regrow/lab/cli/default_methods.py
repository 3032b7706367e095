"""Methods of commands that are told none: those that the denoiser can run."""

from __future__ import annotations

from typing import NamedTuple

from regrow.methods.base import DenoiserKind, methods
from regrow.models.transformer import FAMILIES


class Usual(NamedTuple):
    """Beside all steps and half of them.

    Args:
        measured: by ``bench`` and ``eval``.
        traced: by ``trace``, whose plots show few well.
    """

    measured: tuple[str, ...]
    traced: tuple[str, ...]


_UNET = "UNet2DConditionModel"
_KINDS = dict.fromkeys(FAMILIES, DenoiserKind.TRANSFORMER) | {
    _UNET: DenoiserKind.UNET,
    "WanTransformer3DModel": DenoiserKind.VIDEO,
}


def usual_of(kind: DenoiserKind) -> Usual:
    """What runs on a kind of denoiser, by short names."""
    known = methods().items()
    measured = (f"{name}:{text}" for name, one in known for text in one.ABOUT.measured.get(kind, ()))
    traced = (f"{name}:{text}" for name, one in known for text in one.ABOUT.traced.get(kind, ()))
    return Usual(tuple(measured), tuple(traced))


def usual(model: str | None, arch: str | None = None) -> Usual:
    """What runs on a denoiser, told by its class, without its weights; nothing on one of others.

    Args:
        model: bundled name, folder, or hub id.
        arch: instead, name of an architecture.

    Raises:
        ValueError: if there is no such architecture or model.
    """
    from regrow.lab.cli.models import index_of
    from regrow.lab.measure.architectures import CONFIGS, NAMES, TRANSFORMERS

    if arch is not None and arch not in NAMES:
        raise ValueError(f"arch: {arch!r} is not known; known are {', '.join(NAMES)}")
    if arch is not None and arch in CONFIGS:
        name = _UNET
    elif arch is not None and arch in TRANSFORMERS:
        name = TRANSFORMERS[arch][0]
    else:
        index = index_of(arch or model or "")
        name = (index.get("unet") or index.get("transformer") or ("", ""))[1]
    return usual_of(_KINDS[name]) if name in _KINDS else Usual((), ())
