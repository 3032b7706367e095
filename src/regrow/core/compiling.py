"""Compile a denoiser's blocks, so that what a call computes can still change from step to step."""

from __future__ import annotations

from typing import Any

import torch

from regrow.models import known_layout

GRAPHS = 64


def compile_blocks(denoiser: Any, **options: Any) -> None:
    """Compile the transformer blocks of a denoiser, also of those for which diffusers names none.

    Sets ``torch._dynamo.config.recompile_limit`` to 64 if it is lower: a method that picks single layers
    makes a graph for each, and at torch's own limit of 8 the rest would stay uncompiled. Every
    `regrow.apply` puts on new hooks, which are compiled anew: apply once, and generate often.

    Args:
        denoiser: a model of diffusers, such as ``pipe.transformer``.
        options: of ``torch.compile``.

    Raises:
        UnsupportedModelError: if neither diffusers nor a table of regrow's tells which they are.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    try:
        denoiser.compile_repeated_blocks(**options)
    except ValueError:
        # SD3, PixArt and DiT.
        for path in {site.block for site in known_layout(denoiser).layer_sites}:
            denoiser.get_submodule(path).compile(**options)
