"""``regrow profile``."""

from __future__ import annotations

import json
from dataclasses import dataclass

import typer

from regrow.fields import MOST_CALLS
from regrow.lab.cli.models import config_of
from regrow.lab.cli.options import Accelerated
from regrow.lab.cli.requests import PictureSize, command, option
from regrow.lab.cli.terminal import amount, busy, output, remarks, table_of
from regrow.lab.measure.architectures import architecture, architecture_of
from regrow.lab.measure.macs import profile as count


@dataclass(frozen=True, kw_only=True)
class ProfileRequest(PictureSize, Accelerated):
    """What to count."""

    arch: str | None = option(None, "sd15, sdxl, emoji, sd3-1024 and others.")
    model: str | None = option(None, "Folder or hub id instead; no weights read.")
    steps: int = option(50, "Calls of the denoiser.", min=1, max=MOST_CALLS)
    exclude_attention: bool = option(
        False, "Leave out products of queries, keys and values.", "--exclude-attention"
    )
    per_guided_image: bool = option(
        False, "Count both halves of a guided batch, as papers do.", "--per-guided-image"
    )
    text_in_full_calls: bool | None = option(
        None,
        "Count what depends on the text alone in every full call, or once a generation, as it is "
        "computed; once, or as papers do with --per-guided-image in every full call.",
        "--text-in-full-calls/--text-once",
    )


@command(ProfileRequest)
def profile(request: ProfileRequest, context: typer.Context) -> None:
    """Count MACs of a generation on the meta device: no weights, a few seconds.

    Per image, batch 1, attention counted unless told otherwise, choosing tokens counted apart.

    Example: [b]regrow profile --arch sd15 --method dato --preset b1 --ratio 0.5[/b]
    or [b]regrow profile --arch sd3-1024 --steps 28 --exclude-attention --per-guided-image[/b]
    The second is how the CAT Pruning paper counts.
    """
    config, label = request.configured(request.steps, context.args)
    if (request.arch is None) == (request.model is None):
        raise ValueError("--arch, --model: give exactly one of them")
    arch = architecture(request.arch) if request.arch else architecture_of(config_of(request.model or ""))
    guided, in_full = request.per_guided_image, request.text_in_full_calls
    with busy(remarks(), "counting MACs"):
        result = count(
            arch,
            config,
            request.steps,
            name=label,
            **request.values("height", "width"),
            attention=not request.exclude_attention,
            guided=guided,
            text_once=not (guided if in_full is None else in_full),
        )
    if request.as_json:
        print(json.dumps(result.to_dict(), indent=1))
        return
    shown = table_of(
        result.kinds,
        [
            ("calls", lambda kind: str(kind.count)),
            ("depth", lambda kind: kind.depth),
            ("pruned", lambda kind: f"{kind.ratio:.0%}"),
            ("GMACs a call", lambda kind: f"{kind.macs / 1e9:.2f}"),
            ("of full", lambda kind: f"{kind.macs / result.baseline_macs_per_call:.2%}"),
            ("choosing tokens", lambda kind: amount(kind.selection_macs / 1e9 or None, ".2f")),
        ],
    )
    output().print(shown)
    print(
        f"{result.arch}, {result.method}: {result.macs / 1e9:.1f} of {result.baseline_macs / 1e9:.1f} "
        f"GMACs in {result.calls} calls, {result.macs_ratio:.2f}x fewer"
    )
