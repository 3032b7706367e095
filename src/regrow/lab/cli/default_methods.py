"""Methods of commands that are told none: those that the denoiser can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from regrow.fields import MOST_CALLS
from regrow.lab.cli.models import index_of
from regrow.lab.cli.requests import Request, option
from regrow.lab.measure.architectures import CONFIGS, NAMES, TRANSFORMERS
from regrow.lab.measure.variants import Variant, variant
from regrow.methods.base import DenoiserKind, methods
from regrow.models.transformer import FAMILIES

USUAL = "By default all steps, half, and what runs on the model."


@dataclass(frozen=True, kw_only=True)
class Compared(Request):
    """Which methods are compared."""

    methods: str | None = option(None, f"Comma-separated; the first is the baseline. {USUAL}")
    steps: int = option(50, "Sampler steps of the methods.", min=1, max=MOST_CALLS)

    def variants(self, usual: Callable[[], tuple[str, ...]]) -> tuple[Variant, ...]:
        """The methods that were named, or all steps, half of them and the usual methods."""
        if self.methods is None:
            fewer = [f"steps:{self.steps // 2}"] if self.steps > 1 else []
            names = [f"steps:{self.steps}", *fewer, *usual()]
        else:
            names = [name.strip() for name in self.methods.split(",")]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(
                        f"--methods: {name} is there {names.count(name)} times, each is allowed once"
                    )
        return tuple(variant(name, self.steps) for name in names)


class DefaultMethods(NamedTuple):
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


def usual_of(kind: DenoiserKind) -> DefaultMethods:
    """What runs on a kind of denoiser, by short names."""
    known = methods().items()
    measured = (f"{name}:{text}" for name, one in known for text in one.ABOUT.measured.get(kind, ()))
    traced = (f"{name}:{text}" for name, one in known for text in one.ABOUT.traced.get(kind, ()))
    return DefaultMethods(tuple(measured), tuple(traced))


def usual(model: str | None, arch: str | None = None) -> DefaultMethods:
    """What runs on a denoiser, told by its class, without its weights; nothing on one of others.

    Args:
        model: bundled name, folder, or hub id.
        arch: instead, name of an architecture.

    Raises:
        ValueError: if there is no such architecture or model.
    """
    if arch is not None and arch not in NAMES:
        raise ValueError(f"arch: {arch!r} is not known; use one of {', '.join(NAMES)}")
    if arch is not None and arch in CONFIGS:
        name = _UNET
    elif arch is not None and arch in TRANSFORMERS:
        name = TRANSFORMERS[arch][0]
    else:
        index = index_of(arch or model or "")
        name = (index.get("unet") or index.get("transformer") or ("", ""))[1]
    return usual_of(_KINDS[name]) if name in _KINDS else DefaultMethods((), ())
