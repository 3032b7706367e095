"""TokenCache's refinement: low-rank updates (LoRA) of the last K blocks, with a trained predictor.

The last blocks are computed in every call. They learn to make of cached tokens what the full call makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow.lab.train.examples import Batch
from regrow.lab.train.frozen import Past, of_sequences, past, relaxed, truth
from regrow.lab.train.objective import Losses, Objective, mean_square
from regrow.lab.train.predictor import on_sites
from regrow.models.table import Site
from regrow.predictors import CachePredictor
from regrow.tokens.shares import Table

ADAPTER = "regrow"
PROJECTIONS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "ffn.net.0.proj", "ffn.net.2"),
)
"""Of a block's attentions and its feed-forward."""


def add_adapter(denoiser: nn.Module, sites: tuple[Site, ...], rank: int) -> None:
    """Put untrained updates on the projections of blocks, by peft; they change nothing yet.

    Raises:
        ImportError: if peft is not installed (extra ``train``).
        ValueError: if a block has none of the projections.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("regrow train refine needs peft: pip install 'regrow[train]'") from error

    names = [name for site in sites for name in _projections(site)]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=True)
    inject_adapter_in_model(config, denoiser, adapter_name=ADAPTER)


def _projections(site: Site) -> list[str]:
    """Paths of a block's projections."""
    found = [
        f"{site.name}.{name}"
        for name, module in site.module.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(PROJECTIONS)
    ]
    if not found:
        raise ValueError(
            f"model: {site.name} has nothing that could learn, a block must have linear layers named "
            f"{', '.join(PROJECTIONS)}"
        )
    return found


def adapter_weights(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """What of a denoiser with updates learns, by name."""
    return {name: p for name, p in denoiser.named_parameters() if "lora_" in name}


def adapter_state(denoiser: nn.Module) -> dict[str, Tensor]:
    """The updates as diffusers names them: ``transformer.BLOCK.PROJECTION.lora_A.weight``, ``lora_B``."""
    return {
        f"transformer.{name.replace(f'.{ADAPTER}.', '.')}": p
        for name, p in adapter_weights(denoiser).items()
    }


@dataclass(frozen=True, eq=False)
class RefineObjective(Objective):
    """Bring the output of a cached call, tokens chosen as in use, to that of the full call.

    The model has updates on its last blocks. Keys and values are of the present tokens, as in the
    predictor's training.

    Args:
        predictor: it stays as it is.
        table: of the predictor, for each block's share.
        last_blocks: K.
        ratio: r, share of all updates that are not computed.
    """

    predictor: CachePredictor
    table: Table
    last_blocks: int
    ratio: float

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        return adapter_weights(self.frozen.denoiser)

    def losses(self, batch: Batch) -> Losses:
        """The mean square between both outputs."""
        sites = self.frozen.layout.block_sites
        decided = sites[: len(sites) - self.last_blocks]
        with without_adapter(self.frozen.denoiser):
            before = past(self.frozen, sites, batch)
            full = truth(self.frozen, sites, before, batch.given)
        with torch.no_grad():
            alpha = self.predictor.of_samples(full.entered, len(batch.x))
        weights = self._chosen(on_sites(alpha, decided, before), decided, before)
        output, _ = relaxed(self.frozen, sites, before, batch.given, weights)
        error = mean_square(output, full.output)
        return Losses(error, torch.zeros_like(error))

    def _chosen(
        self, alpha: Mapping[str, Tensor], sites: Sequence[Site], before: Past
    ) -> dict[str, Tensor]:
        """By site ``(S, n, 1)``: 1 for the tokens of each sequence that it computes, 0 for the others."""
        total = len(self.frozen.steps)
        shares = [
            self.table.shares(index / total, len(sites), self.ratio) for index in before.index.tolist()
        ]
        chosen = {}
        for own, site in zip(zip(*shares, strict=True), sites, strict=True):
            score = alpha[site.name]
            counts = (torch.tensor(own, device=score.device) * score.shape[1] - 1e-6).ceil()
            rank = score.argsort(1, descending=True).argsort(1)
            chosen[site.name] = (rank < of_sequences(counts, len(score))[:, None, None]).to(score.dtype)
        return chosen


@contextmanager
def without_adapter(denoiser: nn.Module) -> Iterator[None]:
    """Leave the updates out for as long as this lasts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
