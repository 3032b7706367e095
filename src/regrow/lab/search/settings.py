"""All that decides what a search finds, as a file beside what it found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from regrow.fields import Calls, Checked, Count, Guidance, Pixels, Seed, explain
from regrow.files import FileError, read_kept, said
from regrow.lab.measure.atomic_files import write_json
from regrow.lab.measure.evaluate import Setting
from regrow.lab.measure.machine import model_key
from regrow.lab.search.evaluation import Candidate
from regrow.lab.search.objectives import Cost, Objective, Quality, check_objectives, label, objective
from regrow.lab.search.proposals import Operators
from regrow.lab.search.search import Algorithm, Economy, check_economy
from regrow.methods.catalogue import space_of
from regrow.recover.time import REUSE
from regrow.space import Space, Variable

Named = Annotated[
    Objective,
    BeforeValidator(lambda value: objective(value) if ":" in str(value) else value),
    PlainSerializer(label),
]


class SearchSettings(Checked):
    """What is searched, and how.

    Args:
        model: name, folder or hub id.
        method: its short name, or two with a plus between.
        steps: fewest and most sampler steps; the unaccelerated run makes the most.
        prompts: one a picture; picture i has seed ``seed + i``.
        objectives: at least one of quality and one of cost; the plots show the first of each.
        algorithm: how plans are proposed.
        budget: of a search in stages, which divide it among themselves; None for the others.
        operators: settings of NSGA-II.
        economy: how evaluations are saved.
        choices: other choices for a method's variables, by name.
        search_seed: of the proposals.
        seed: of the first picture.
        scheduler: as `Sampler.parse` takes it; None for the model's own.
        guidance: guidance scale; None for the pipeline's own.
        height: in pixels; None for the model's own.
        width: likewise.
        dtype: of the weights.
        batch: pictures made at once.
        clip: folder or hub id of the CLIP model of ``quality:clip``.
        rounds: runs in turns for ``cost:latency``.
        version: of the file; the first, which names none, knew no recoveries to choose.

    Raises:
        pydantic.ValidationError: naming the field, the value and what is allowed.
    """

    model: str = "emoji"
    method: str = "dato"
    steps: tuple[Calls, Calls] = (50, 50)
    prompts: tuple[str, ...] = Field(min_length=1)
    objectives: tuple[Named, ...] = (Quality.DEVIATION, Cost.MACS)
    algorithm: Algorithm = Algorithm.NSGA2
    budget: str | None = None
    operators: Operators = Operators()
    economy: Economy
    choices: Mapping[str, tuple[Any, ...]] = {}
    search_seed: Seed = 0
    seed: Seed = 0
    scheduler: str | None = None
    guidance: Guidance | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    dtype: str = "float32"
    batch: Count = 16
    clip: str | None = None
    rounds: Count = 3
    version: Literal[2] = 2

    @model_validator(mode="after")
    def _consistent(self) -> SearchSettings:
        check_objectives(self.objectives)
        least, most = self.steps
        if not 1 <= least <= most:
            raise ValueError(f"steps: {least}..{most} is not allowed, it must go from >= 1 up")
        if self.economy.prompts[-1] != len(self.prompts):
            raise ValueError(
                f"economy: its last number of prompts is {self.economy.prompts[-1]}, it must be that of "
                f"the prompts, {len(self.prompts)}"
            )
        if (self.clip is None) == (Quality.CLIP in self.objectives):
            raise ValueError("clip: a CLIP model must be given with quality:clip, and only with it")
        check_economy(self.economy, self.objectives)
        space = self.space(lambda steps: steps)
        middle = [(size - 1) // 2 for size in space.sizes]
        for i, variable in enumerate(space.variables):
            # A method's own choices are allowed.
            for gene in range(len(variable.choices)) if variable.name in self.choices else ():
                try:
                    space.config([*middle[:i], gene, *middle[i + 1 :]])
                except ValidationError as error:
                    raise ValueError(f"choices: {explain(error)}") from error
        return self

    @property
    def setting(self) -> Setting:
        """What pictures are made of."""
        names = ("model", "prompts", "seed", "scheduler", "guidance", "height", "width", "dtype")
        shared = {name: getattr(self, name) for name in names}
        return Setting(**shared, model_key=model_key(self.model), shard=self.batch)

    def space(self, calls_at: Callable[[int], int]) -> Space:
        """The plans, which decode to a `Candidate`; where steps are open, they are one more variable.

        Args:
            calls_at: calls of the denoiser in a run of so many steps, at each branch of guidance.

        Raises:
            ValueError: if the method has no plans, or a choice is none of its own.
        """
        least, most = self.steps
        space = space_of(self.method, calls_at(most))
        for name, choices in self.choices.items():
            space = space.with_choices(name, choices)

        def decode(config: Any, steps: int) -> Candidate:
            return Candidate(steps, config.at(calls_at(steps)))

        return space.extended(Variable("steps", tuple(range(least, most + 1))), decode)

    def check(self, folder: Path, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Look whether the search in a folder, if there is one, is this one.

        Args:
            folder: of the search.
            facts: what else its figures depend on, if that is known.

        Returns:
            all of it as plain data.

        Raises:
            ValueError: naming the field in which they differ.
        """
        file = folder / "settings.json"
        now = {**json.loads(self.model_dump_json()), **({"facts": dict(facts)} if facts else {})}
        before = _kept(file) if file.exists() else now
        # Empty where the model was not at hand, and in folders from before it was kept.
        key, known = model_key(self.model), before.get("model_key")
        if key and known and key != known:
            raise ValueError(
                f"model: {self.model} was changed since the search in {folder} began; use another folder"
            )
        for name, value in now.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{name}: the search in {folder} has another one; use another folder, or --resume to "
                    "go on with that one"
                )
        return now | {"model_key": key or known or ""}

    def claim(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write the settings into the folder of a search, as `check` allows."""
        now = self.check(folder, facts)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", now)

    @classmethod
    def of(cls, folder: Path) -> SearchSettings:
        """Those of the search in a folder.

        Raises:
            FileError: if they are damaged.
            OSError: if there are none.
        """
        file = folder / "settings.json"
        if not file.exists():
            raise FileNotFoundError(f"--resume: {folder} holds no search")
        fields = _kept(file)
        for known in ("facts", "model_key"):
            fields.pop(known, None)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise FileError(f"{said(file)}: {explain(error)}; use another folder") from error


def _kept(file: Path) -> dict[str, Any]:
    """The settings of the search in a folder, as plain data of the present version.

    A search of version 1 goes on with what it could choose: to reuse.
    """
    fields = read_kept(file, "use another folder")
    if "version" in fields:
        return fields
    choices = fields.get("choices")
    if isinstance(choices, dict) and _chooses_recoveries(fields.get("method")):
        fields["choices"] = {**choices, "recovery": [REUSE.kind]}
    return {**fields, "version": 2}


def _chooses_recoveries(method: Any) -> bool:
    """Whether the plans of a method, if it is known, have recoveries."""
    try:
        return "recovery" in space_of(str(method), 2).names
    except ValueError:
        return False


def doubled(prompts: int) -> tuple[int, ...]:
    """An eighth of the prompts, a quarter, half of them, all."""
    return tuple(sorted({max(1, prompts // 8), max(1, prompts // 4), max(1, prompts // 2), prompts}))
