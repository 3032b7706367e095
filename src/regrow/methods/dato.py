"""DaTo: dynamics-aware token pruning with feature caching (arXiv 2501.00375)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from regrow import hub
from regrow.core.recipe import CallInfo, Recipe, recipe_of
from regrow.fields import MOST_WEIGHT, Weight
from regrow.methods.base import UNETS, About, DenoiserKind, Options, Role, TextError, register, whole
from regrow.methods.pruning import Features, PatchPruning, PatchRule, check_ratio
from regrow.recover.time import RecoveryField
from regrow.schedule import Schedule
from regrow.space import Space, schedules
from regrow.tokens.alignment import Alignment, align
from regrow.tokens.grid import Grid, best_of_patch
from regrow.tokens.scores import diff_score, noise, random_score
from regrow.tokens.select import Selection, prune_similar
from regrow.words import offer


class Score(str, Enum):
    """What makes a token of a patch its base token."""

    DIFF = "diff"
    """The temporal noise difference (the paper)."""
    RANDOM = "random"
    """Chance: the paper's ablation without DiffScore."""


@register
class DaTo(PatchPruning):
    """Prune tokens where the predicted noise changes least, and reuse deep features, by a schedule.

    The schedule gives every call a cache depth and a pruning ratio. Tokens are pruned in the self-attention
    at the finest level:

    1. Temporal noise difference: ``DiffScore = mean over channels of |eps(t+2) - eps(t+1)|``.
    2. Base tokens: in each patch of s x s tokens the one of the highest score.
    3. Alignment: both halves of a guided batch take the base tokens of one.
    4. Pruned tokens: of the others the ``r N`` of the largest cosine similarity to a base token.
    5. Attention computes the kept tokens; a pruned one takes a copy of what its base token got.

    Defaults are the paper's; the released code's deviations are options.

    Further fields are those of `PatchPruning`.

    Args:
        schedule: depth and ratio of every call, and its recovery.
        time_recovery: instead of the schedule's, how what a call does not compute follows from earlier
            calls; None leaves it to the schedule (the paper: the last value is reused).
        score: what chooses the base tokens.
        alignment: whose base tokens both halves of a guided batch take (the paper: aligned).
        features: what similarity is measured on (both released codes: the block's input).
        from_all_kept: copy from the most similar of all kept tokens (released code) instead of the
            most similar base token (the paper).
        nearby: look for similar base tokens in the surrounding 3 x 3 patches only.
        score_weight: factor on DiffScore (released code: 0.1).
        score_noise: sigma of Gaussian noise added to the score (released code: 0.1).
        sign_flip: turn the score's sign by a fair coin each call (released code).

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    ABOUT: ClassVar[About] = About(
        title="DaTo",
        what="prune tokens where the noise changes least, reuse deep features, by a schedule",
        models=UNETS,
        paper="arXiv 2501.00375",
        note="regrow search finds schedules",
        role=Role.SCHEDULE,
        measured={DenoiserKind.UNET: ("b1", "fast")},
        traced={DenoiserKind.UNET: ("b1",)},
        place=10,
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "b1": {"schedule": "dato-b1"},
        "fast": {"schedule": "dato-fast"},
        "b1-released": {
            "schedule": "dato-b1-released",
            "alignment": Alignment.UNCONDITIONAL,
            "from_all_kept": True,
            "score_weight": 0.1,
            "score_noise": 0.1,
            "sign_flip": True,
        },
        "emoji-quality": {"schedule": "emoji-quality"},
        "emoji-balanced": {"schedule": "emoji-balanced"},
        "emoji-fast": {"schedule": "emoji-fast"},
    }

    method: Literal["dato"] = "dato"
    schedule: Schedule
    time_recovery: RecoveryField | None = None
    score: Score = Score.DIFF
    alignment: Alignment = Alignment.CONDITIONAL
    features: Features = Features.BLOCK_INPUT
    from_all_kept: bool = False
    nearby: bool = False
    score_weight: float = Field(1.0, gt=0, le=MOST_WEIGHT)
    score_noise: Weight = 0.0
    sign_flip: bool = False

    @model_validator(mode="after")
    def _ratios(self) -> Self:
        check_ratio(self.schedule.max_ratio, self.patch)
        return self

    @classmethod
    def of_preset(cls, fields: Mapping[str, Any]) -> Self:
        """The fields, with the bundled schedule of that name."""
        return cls.model_validate({**fields, "schedule": Schedule.bundled(fields["schedule"])})

    @classmethod
    def from_text(cls, text: str, calls: int) -> Self:
        """An interval, with half of the tokens pruned in every call, or a schedule file."""
        if text.isdecimal():
            return cls(schedule=Schedule.every(whole(text), calls, ratio=0.5))
        if not text.startswith(hub.PREFIX) and not text.endswith(hub.PLANS) and not Path(text).exists():
            raise TextError(
                "an interval such as 3, a schedule file, or a preset: "
                f"{', '.join(cls.PRESETS)}{offer(text, cls.PRESETS)}"
            )
        return cls(schedule=hub.load_schedule(text))

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """All."""
        return "preset", "schedule", "ratio", "interval"

    @classmethod
    def from_options(cls, options: Options, calls: int) -> Self:
        """A plan from one of preset, schedule file and interval, or a constant one; and its ratio."""
        plans = [f"--{name}" for name in options.given if name != "ratio"]
        if len(plans) > 1:
            raise ValueError(f"{' and '.join(plans)}: only one of them is allowed")
        if options.preset is not None:
            plan = cls.preset(options.preset).schedule
        elif options.schedule is not None:
            plan = hub.load_schedule(options.schedule)
        elif options.interval is not None:
            plan = Schedule.every(options.interval, calls)
        else:
            plan = Schedule.constant()
        if options.ratio is not None:
            plan = plan.with_ratio(options.ratio)
        return cls(schedule=plan) if options.preset is None else cls.preset(options.preset, schedule=plan)

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """The same with other fields; ``ratio`` is the schedule's."""
        own = dict(changes)
        if "ratio" in own:
            own["schedule"] = self.schedule.with_ratio(own.pop("ratio"))
        return super().changed(own)

    @classmethod
    def space(cls, calls: int) -> Space:
        """All `schedules` (the paper: ratios of .3 to .7, and reuse)."""
        return schedules(calls, lambda plan: cls(schedule=plan))

    def at(self, calls: int) -> Self:
        """The same with the schedule of so many calls."""
        return self.model_copy(update={"schedule": self.schedule.resample(calls)})


@dataclass(frozen=True)
class _Rule(PatchRule[DaTo]):
    """DaTo's token pruning, steps 1 to 5."""

    @property
    def reads_outputs(self) -> bool:
        """DiffScore is of the last two."""
        return self.config.score is Score.DIFF

    def prepare(self, grids: Sequence[Grid], call: CallInfo) -> Mapping[Grid, Tensor]:
        """Steps 1 to 3: the base token of each patch, the same for all layers of a grid."""
        return {grid: best_of_patch(self.score(grid, call), grid) for grid in grids}

    def score(self, grid: Grid, call: CallInfo) -> Tensor:
        """The aligned score ``(B, N)``; random as long as there are no two outputs to compare."""
        c = self.config
        if c.score is Score.RANDOM or len(call.outputs) < 2:
            score = random_score(grid.tokens, call.generator).expand(call.batch, -1)
        else:
            score = c.score_weight * diff_score(call.outputs[-1], call.outputs[-2], grid)
            if c.sign_flip:
                coin = random_score(1, call.generator)
                score = score * (coin < 0.5).to(score.dtype).mul(2).sub(1)
            if c.score_noise:
                score = score + noise(grid.tokens, c.score_noise, call.generator)
        return align(score, c.alignment, call.guided)

    def select(
        self, x: Tensor, grid: Grid, count: int, prepared: Tensor | None, call: CallInfo
    ) -> Selection:
        """Steps 4 and 5: prune what is most similar to a base token."""
        assert prepared is not None
        c = self.config
        options = {"nearby": c.nearby, "from_all_kept": c.from_all_kept, "exact": c.exact}
        return prune_similar(x, prepared, grid, count, **options)


@recipe_of.register
def _(config: DaTo) -> Recipe:
    plan, recovery = config.schedule, config.time_recovery
    plan = plan if recovery is None else plan.with_recovery(recovery)
    # Tokens are chosen alike under every schedule.
    rule = config.model_copy(update={"schedule": Schedule.constant(), "time_recovery": None})
    return Recipe(plan, sites=_Rule(rule))


@recipe_of.register
def _(schedule: Schedule) -> Recipe:
    # As a schedule file is one for DaTo.
    return recipe_of(DaTo(schedule=schedule))
