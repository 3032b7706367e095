"""Methods of commands that are told none: those that the denoiser can run."""

from __future__ import annotations

from typing import NamedTuple

from regrow.models.transformer import FAMILIES


class Usual(NamedTuple):
    """Beside all steps and half of them.

    Args:
        measured: by ``bench`` and ``eval``.
        traced: by ``trace``, whose plots show few well.
    """

    measured: tuple[str, ...]
    traced: tuple[str, ...]


_CACHING = ("deepcache:3", "fora:3")
UNET = Usual(
    ("sito:d", "dato:b1", "dato:fast", "deepcache:5", "tome:0.5"), ("sito:d", "dato:b1", "deepcache:5")
)
TRANSFORMER = Usual((*_CACHING, "toca:3", "cat:0.5"), ("deepcache:3", "toca:3", "cat:0.5"))
VIDEO = Usual(_CACHING, _CACHING)
_UNET = "UNet2DConditionModel"
_USUAL = dict.fromkeys(FAMILIES, TRANSFORMER) | {_UNET: UNET, "WanTransformer3DModel": VIDEO}


def usual(model: str | None, arch: str | None = None) -> Usual:
    """What runs on a denoiser, told by its class, without its weights; nothing on one of others.

    Args:
        model: bundled name, folder, or hub id.
        arch: instead, name of an architecture.

    Raises:
        ValueError: if there is no such architecture or model.
    """
    from regrow.cli.models import index_of
    from regrow.measure.architectures import CONFIGS, NAMES, TRANSFORMERS

    if arch is not None and arch not in NAMES:
        raise ValueError(f"arch: {arch!r} is not known; known are {', '.join(NAMES)}")
    if arch is not None and arch in CONFIGS:
        kind = _UNET
    elif arch is not None and arch in TRANSFORMERS:
        kind = TRANSFORMERS[arch][0]
    else:
        index = index_of(arch or model or "")
        kind = (index.get("unet") or index.get("transformer") or ("", ""))[1]
    return _USUAL.get(kind, Usual((), ()))
