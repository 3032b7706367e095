"""All settings of a search, saved in a file with its results."""

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
    """The settings of a search.

    Args:
        model: name, folder or hub id.
        method: short name of the method, or two names with a plus between.
        steps: fewest and most sampler steps; the unaccelerated run makes the most.
        prompts: a prompt for each picture; picture i has seed ``seed + i``.
        objectives: at least one of quality and one of cost; the plots show the first of each.
        algorithm: how plans are proposed.
        budget: budget that the stages of a search in stages divide; None for the others.
        operators: settings of NSGA-II.
        economy: how the search avoids evaluations.
        choices: other choices for a method's variables, by name.
        search_seed: seed of the proposals.
        seed: seed of the first picture.
        scheduler: as `Sampler.parse` takes it; None for the model's own.
        guidance: guidance scale; None for the pipeline's own.
        height: height in pixels; None for the model's own.
        width: width in pixels; None for the model's own.
        dtype: type of the weights.
        batch: pictures in one batch.
        clip: folder or hub id of the CLIP model of ``quality:clip``.
        rounds: number of alternating timed runs for ``cost:latency``.
        version: version of the file; files without one are of version 1, without choices of recoveries.

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
            raise ValueError(f"steps: {least}..{most} is not allowed, it must ascend from >= 1")
        if self.economy.prompts[-1] != len(self.prompts):
            raise ValueError(
                f"economy: its last number of prompts is {self.economy.prompts[-1]}, it must be the "
                f"number of prompts, {len(self.prompts)}"
            )
        if (self.clip is None) == (Quality.CLIP in self.objectives):
            raise ValueError("clip: give a CLIP model if quality:clip is an objective, and only then")
        check_economy(self.economy, self.objectives)
        space = self.space(lambda steps: steps)
        middle = [(size - 1) // 2 for size in space.sizes]
        for i, variable in enumerate(space.variables):
            # The method checks its own choices.
            for gene in range(len(variable.choices)) if variable.name in self.choices else ():
                try:
                    space.config([*middle[:i], gene, *middle[i + 1 :]])
                except ValidationError as error:
                    raise ValueError(f"choices: {explain(error)}") from error
        return self

    @property
    def setting(self) -> Setting:
        """The setting of the pictures."""
        names = ("model", "prompts", "seed", "scheduler", "guidance", "height", "width", "dtype")
        shared = {name: getattr(self, name) for name in names}
        return Setting(**shared, model_key=model_key(self.model), shard=self.batch)

    def space(self, calls_at: Callable[[int], int]) -> Space:
        """Make the space of plans, which decode to a `Candidate`; a range of steps is one more variable.

        Args:
            calls_at: gives the calls of a run by its number of steps, at each branch of guidance.

        Raises:
            ValueError: if the method has no plans, or does not have a choice.
        """
        least, most = self.steps
        space = space_of(self.method, calls_at(most))
        for name, choices in self.choices.items():
            space = space.with_choices(name, choices)

        def decode(config: Any, steps: int) -> Candidate:
            return Candidate(steps, config.at(calls_at(steps)))

        return space.extended(Variable("steps", tuple(range(least, most + 1))), decode)

    def check(self, folder: Path, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Check that the search in a folder, if there is one, has these settings.

        Args:
            folder: folder of the search.
            facts: what else its figures depend on, if that is known.

        Returns:
            the settings and facts as plain data.

        Raises:
            ValueError: naming the field in which they differ.
        """
        file = folder / "settings.json"
        now = {**json.loads(self.model_dump_json()), **({"facts": dict(facts)} if facts else {})}
        before = _kept(file) if file.exists() else now
        # Empty if the model was not on this machine, and in older folders.
        key, known = model_key(self.model), before.get("model_key")
        if key and known and key != known:
            raise ValueError(
                f"model: {self.model} was changed since the search in {folder} began; use another folder"
            )
        for name, value in now.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{name}: the search in {folder} has another value; use another folder, or --resume to "
                    "continue that search"
                )
        return now | {"model_key": key or known or ""}

    def claim(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write the settings into the folder of a search, if `check` allows it."""
        now = self.check(folder, facts)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", now)

    @classmethod
    def of(cls, folder: Path) -> SearchSettings:
        """Read the settings of the search in a folder.

        Raises:
            FileError: if the file is damaged.
            OSError: if there is none.
        """
        file = folder / "settings.json"
        if not file.exists():
            raise FileNotFoundError(f"--resume: {folder} holds no search; give the folder of one")
        fields = _kept(file)
        for known in ("facts", "model_key"):
            fields.pop(known, None)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise FileError(f"{said(file)}: {explain(error)}; use another folder") from error


def _kept(file: Path) -> dict[str, Any]:
    """Read the settings of the search in a folder, as plain data of the present version.

    A search of version 1 continues with the only recovery that it had: reuse.
    """
    fields = read_kept(file, "use another folder")
    if "version" in fields:
        return fields
    choices = fields.get("choices")
    if isinstance(choices, dict) and _chooses_recoveries(fields.get("method")):
        fields["choices"] = {**choices, "recovery": [REUSE.kind]}
    return {**fields, "version": 2}


def _chooses_recoveries(method: Any) -> bool:
    """Whether the plans of a known method have recoveries."""
    try:
        return "recovery" in space_of(str(method), 2).names
    except ValueError:
        return False


def doubled(prompts: int) -> tuple[int, ...]:
    """List an eighth of the prompts, a quarter, a half, all."""
    return tuple(sorted({max(1, prompts // 8), max(1, prompts // 4), max(1, prompts // 2), prompts}))
