"""Compile a denoiser's blocks, so that what a call computes can still change from step to step."""

from __future__ import annotations

from typing import Any

import torch

from regrow.core.install import COMPILED
from regrow.models import known_layout

GRAPHS = 32
"""Most kinds of calls that a block is compiled for; methods that choose single layers need the most."""


class _Wrappers(dict[str, Any]):
    """By path, what lies around modules; copies and pickles of the denoiser begin without."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return dict, ()


def compile_blocks(denoiser: Any, **options: Any) -> None:
    """Compile the transformer blocks of a denoiser, even if diffusers does not name its blocks.

    A block is compiled once for each kind of call: the first full one, other full ones, cached ones.
    A method that is removed and applied again is not compiled again. Blocks share their code, of which
    torch compiles 8 variants: ``torch._dynamo.config.recompile_limit`` and
    ``accumulated_recompile_limit`` are raised to 32 for each block.

    Args:
        denoiser: a model of diffusers, such as ``pipe.transformer``.
        options: options of ``torch.compile``.

    Raises:
        UnsupportedModelError: if neither diffusers nor a table of regrow names the blocks.
    """
    try:
        denoiser.compile_repeated_blocks(**options)
    except ValueError:
        # SD3, PixArt and DiT.
        for path in {site.block for site in known_layout(denoiser).layer_sites}:
            denoiser.get_submodule(path).compile(**options)
    blocks = sum(module._compiled_call_impl is not None for module in denoiser.modules())
    config: Any = torch._dynamo.config
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, limit, max(getattr(config, limit), GRAPHS * blocks))
    denoiser.__dict__.setdefault(COMPILED, _Wrappers())
