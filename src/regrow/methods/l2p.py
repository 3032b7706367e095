"""L2P, the learnable linear predictor (arXiv 2604.26365)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import Self

from regrow.core.recipe import Recipe, recipe_of
from regrow.fields import MOST_CALLS, check_within
from regrow.methods.base import About, MethodConfig, TextError, register
from regrow.recover.fit import fitted
from regrow.recover.time import Fitted
from regrow.schedule import FULL, Schedule

if TYPE_CHECKING:
    from regrow.lab.calibration.recording import Recording


@register
class L2P(MethodConfig):
    """Forecast the output of the calls that are left out by weights fitted to unaccelerated runs.

    1. Record unaccelerated runs (`regrow.record`), and fix the calls that are computed.
    2. For each other call fit by least squares the linear combination of computed outputs that is nearest.
    3. Sample with these weights.

    Args:
        fitted: the weights; the output of the steps that it has weights for is forecast.
    """

    ABOUT: ClassVar[About] = About(
        title="L2P",
        what="forecast the output by weights fitted to unaccelerated runs",
        models="any model",
        paper="arXiv 2604.26365",
        note="regrow.L2P.fit(regrow.record(pipe, prompts, steps=50), interval=4)",
        place=66,
    )

    method: Literal["l2p"] = "l2p"
    fitted: Fitted

    @classmethod
    def fit(cls, recording: Recording, interval: int, *, last: int | None = None) -> Self:
        """Compute every so many calls, and fit the others to a recording.

        Args:
            recording: of unaccelerated runs.
            interval: distance of the computed calls.
            last: how many of the last computed outputs one is made of; all if None, as in the paper.

        Raises:
            ValueError: naming what is not allowed.
        """
        check_within("interval", interval, 1, MOST_CALLS)
        full = range(0, recording.origin.calls, interval)
        weights = fitted(recording.products, full, last=last)
        origin = recording.origin.model_copy(update={"calls": recording.total})
        return cls(fitted=weights.moved(recording.before, recording.total), origin=origin)

    @classmethod
    def from_text(cls, text: str, calls: int) -> Self:
        """There is none by name: the weights are of a model."""
        raise TextError("nothing: its weights are of a model, fit them with regrow.L2P.fit")


@recipe_of.register
def _(config: L2P) -> Recipe:
    skipped = {one.step for one in config.fitted.steps}
    depth = tuple(0 if step in skipped else FULL for step in range(config.fitted.total))
    return Recipe(Schedule(depth=depth, ratio=(0.0,) * len(depth), recovery=(config.fitted,)))
