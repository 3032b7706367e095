"""TokenCache's cut: how many of its tokens each block computes, and which steps are full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Table:
    """What a trained predictor said in many calls, by their place in the run.

    Args:
        quantiles: ``(T, L, Q)``: of alpha, at the levels 0 to 1, for T places in the run, the first first,
            and each of L blocks.
        alpha: ``(T,)``: its mean over blocks and tokens.
    """

    quantiles: np.ndarray[Any, np.dtype[np.float64]]
    alpha: np.ndarray[Any, np.dtype[np.float64]]

    def shares(self, place: float, sites: int, ratio: float) -> tuple[float, ...]:
        """The share of its tokens that each of the first so many blocks computes, ``1 - r`` in the mean.

        They are the parts of each block's alpha above one threshold for all, as the cut of the highest
        values of all blocks gives.

        Args:
            place: in the run, 0 for its beginning, below 1.
            sites: blocks that are decided for.
            ratio: r.
        """
        rows = self.quantiles[min(int(place * len(self.quantiles)), len(self.quantiles) - 1), :sites]
        levels = np.linspace(0, 1, rows.shape[1])
        # Equal quantiles tell nothing apart: a little is added, so that each value has one level.
        ascending = np.maximum.accumulate(rows, 1) + np.arange(rows.shape[1]) * 1e-9
        low, high = 0.0, 1.0
        for _ in range(50):
            threshold = (low + high) / 2
            below = [np.interp(threshold, row, levels, left=0.0, right=1.0) for row in ascending]
            above = 1 - np.array(below)
            low, high = (threshold, high) if above.mean() > 1 - ratio else (low, threshold)
        scale = (1 - ratio) / max(float(above.mean()), 1e-12)
        return tuple(np.minimum(above * scale, 1.0).tolist())

    def means(self, calls: int) -> Any:
        """The mean alpha of each of so many calls."""
        places = (np.arange(calls) + 0.5) / calls * len(self.alpha) - 0.5
        return np.interp(places, np.arange(len(self.alpha)), self.alpha)


def i_steps(means: Any, full: int, beta: float) -> set[int]:
    """The I-steps (Eq. 13): where ``v_t = sum_(s < t) exp(beta mean(alpha_s))`` passes even parts of all.

    Args:
        means: of each step the mean alpha, in the order of the run.
        full: how many.
        beta: how strongly steps follow alpha; 0 spreads them evenly.

    Returns:
        The indices of ``min(full, len(means))`` steps; 0 is one of them.
    """
    full = min(full, len(means))
    exponent = beta * (np.asarray(means, dtype=np.float64) - np.min(means))
    weights = np.exp(exponent - exponent.max())
    passed = np.concatenate([[0.0], np.cumsum(weights)[:-1]]) / weights.sum()
    chosen: set[int] = set()
    for part in range(full):
        # The small term keeps 3 / 10 of a sum from being missed by rounding.
        step = int(np.searchsorted(passed, part / full - 1e-9))
        free_steps = [s for s in (*range(step, len(means)), *range(step - 1, -1, -1)) if s not in chosen]
        chosen.add(free_steps[0])
    return chosen


def shares_of_call(alpha: Tensor, ratio: float) -> list[float]:
    """The paper's shares (section III-C): the part of each block's alphas that is among the highest of all.

    The device is waited for.

    Args:
        alpha: ``(B, N, L)``.
        ratio: r, share of all that is not among them.
    """
    _, tokens, sites = alpha.shape
    keep = max(round((1 - ratio) * tokens * sites), 1)
    least = alpha.flatten(1).topk(keep, dim=1).values[:, -1:, None]
    shares: list[float] = (alpha >= least).float().mean((0, 1)).tolist()
    return shares
