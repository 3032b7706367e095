"""Looking at what attentions multiply, on its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regrow.core.call import Call
from regrow.core.recipe import Attention

if TYPE_CHECKING:
    from regrow.core.engine import Engine

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Watched:
    """An attention that is looked at.

    Args:
        name: its path.
        module: it.
        wanted: whether a call looks at it.
        tell: what is done with its input ``(B, N, C)`` and what it multiplied, when it has run.
    """

    name: str
    module: nn.Module
    wanted: Callable[[Call], bool]
    tell: Callable[[Call, Tensor, Attention], None]


class CatchHook:
    """Keeps what a projection of a watched attention, or the norm behind it, gives until that is done.

    Args:
        engine: of the denoiser.
        watched: the attention.
        projection: name of the projection.
        turned: it is turned by position, so it is the norm's, with the heads together or not.
    """

    def __init__(self, engine: Engine, watched: Watched, projection: str, *, turned: bool) -> None:
        self.engine, self.watched, self.turned = engine, watched, turned
        self.key = f"{watched.name}.{projection}"

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = forward(*args, **kwargs)
        call, watched = self.engine.call, self.watched
        if call is not None and watched.wanted(call):
            attention: Any = watched.module
            apart = self.turned and output.ndim == 3
            call.caught[self.key] = output.unflatten(-1, (attention.heads, -1)) if apart else output
        return output


class ObserveHook:
    """Tells the choice of tokens what an attention multiplied."""

    def __init__(self, engine: Engine, watched: Watched) -> None:
        self.engine, self.watched = engine, watched

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        call, watched = self.engine.call, self.watched
        if call is None or not watched.wanted(call):
            return out
        caught = {name: call.caught.pop(f"{watched.name}.{name}", None) for name, _ in (*QUERIES, *KEYS)}
        x = args[0] if args else kwargs["hidden_states"]
        tokens = x.shape[1] if call.slot.grid is None else call.slot.grid.tokens
        text = x.shape[1] - tokens
        query, key = (_heads(module, caught, names, text) for names in (QUERIES, KEYS))
        if query is None or key is None or {len(query), len(key)} != {len(x)}:
            self.engine.warn_once(
                "observe",
                "attentions that tokens are chosen by can't be looked at, because their projections were "
                "fused (call unfuse_qkv_projections()), or their processors project a part of the batch "
                "only (perturbed-attention guidance)",
            )
            return out
        bias = kwargs.get("attention_mask")
        bias = bias[:, None] if bias is not None and bias.ndim == 3 else bias
        watched.tell(call, x, Attention(query, key, tokens, bias))
        return out


# Of the image's tokens and of the text's, by name: the projection, and the norm of its heads.
QUERIES = (("to_q", "norm_q"), ("add_q_proj", "norm_added_q"))
KEYS = (("to_k", "norm_k"), ("add_k_proj", "norm_added_k"))


def _heads(
    attention: Any, caught: Mapping[str, Tensor | None], names: Sequence[tuple[str, str]], text: int
) -> Tensor | None:
    """Queries or keys ``(B, heads, n, D)``, the image's tokens first; None if those are missing.

    Args:
        attention: whose.
        caught: by the name of a projection, what it gave, or the norm behind it ``(B, n, heads, D)``.
        names: of these.
        text: number of text tokens that come first in what the image's projection gave.
    """
    found = []
    for projection, norm in names:
        x = caught[projection]
        if x is not None:
            scale = getattr(attention, norm, None)
            if x.ndim == 3:
                x = x.unflatten(-1, (attention.heads, -1))
                x = x if scale is None else scale(x)
            found.append(x.transpose(1, 2))
    if caught[names[0][0]] is None:
        return None
    both = torch.cat(found, dim=2)
    return both.roll(-text, 2) if text else both
