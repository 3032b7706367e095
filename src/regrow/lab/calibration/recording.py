"""Record unaccelerated runs: how alike the denoiser's outputs of every two calls are."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, ValidationError, model_validator
from torch import Tensor
from typing_extensions import Self

import regrow
from regrow.core.clock import StepWatch, begins_of, place_of
from regrow.core.install import is_hooked
from regrow.fields import MOST_CALLS, MOST_SEED, Block, Checked, check_within, explain
from regrow.files import FileError, read_kept, said
from regrow.lab.calibration.deep import DeepFeatures, watched_features
from regrow.lab.calibration.influence import influence
from regrow.lab.measure.atomic_files import REMOVE, write_whole
from regrow.lab.measure.sampling import check_prompts, make
from regrow.models import denoiser_of
from regrow.origin import Origin, denoiser_key, scheduler_key
from regrow.recover.fit import Array

# Elements of each output that are multiplied at a time, in float64.
_PART = 1 << 18
DEPTH = 1
"""Of calls that reuse features: these features are recorded."""

Skipped = Annotated[int, Field(ge=0, le=MOST_CALLS)]
Rows = tuple[tuple[float, ...], ...]


class Recording(Checked):
    """What unaccelerated runs of a pipeline tell about plans. No picture and no tensor of them is kept.

    Args:
        version: of this form.
        origin: the pipeline and its runs; its prompts are those recorded so far.
        prompts_key: of all prompts that were asked for, and of the pipeline's further arguments.
        before: timesteps of the sampler before the first call (image-to-image begins late).
        after: timesteps behind the last call.
        influence: of each call's output on the final latent, see `influence`.
        gram: of the guided output, ``(T, T)``: the product of those of two calls, the mean over elements
            and prompts.
        deep: the same of what calls of a depth would reuse, by that depth; empty if it was not asked for.
    """

    version: Literal[1] = 1
    origin: Origin
    prompts_key: str = Field(max_length=64)
    before: Skipped = 0
    after: Skipped = 0
    influence: tuple[float, ...] = Field(min_length=1, max_length=MOST_CALLS)
    gram: Rows
    deep: Mapping[Block, Rows] = {}

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @model_validator(mode="after")
    def _of_one_size(self) -> Self:
        calls = self.origin.calls
        if len(self.influence) != calls:
            raise ValueError(f"influence: {len(self.influence)} entries for {calls} calls")
        grams = {"gram": self.gram} | {f"deep.{depth}": rows for depth, rows in self.deep.items()}
        for name, rows in grams.items():
            if len(rows) != calls or any(len(row) != calls for row in rows):
                raise ValueError(f"{name}: it must have {calls} rows of {calls} numbers")
            if not np.allclose(rows, np.transpose(rows)):
                raise ValueError(f"{name}: it must be the same when rows and columns are exchanged")
        return self

    @property
    def total(self) -> int:
        """Timesteps of the sampler, also those that are not run."""
        return self.before + self.origin.calls + self.after

    @property
    def products(self) -> Array:
        """`gram` as an array."""
        return np.array(self.gram)

    @property
    def moves(self) -> Array:
        """`influence` as an array."""
        return np.array(self.influence)

    def save(self, file: Path) -> None:
        """Write it as JSON, whole or not at all."""
        text = self.model_dump_json() + "\n"
        write_whole(file, lambda to: to.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, file: Path) -> Recording:
        """Read a file of `save`.

        Raises:
            OSError: naming the file, if it can't be read.
            FileError: naming the file, if it is damaged or of another version.
        """
        found = read_kept(file, REMOVE)
        if isinstance(found.get("version"), int) and found["version"] > 1:
            raise FileError(
                f"{said(file)}: it is of a newer version of regrow; update regrow, or record anew"
            )
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            raise FileError(f"{said(file)}: {explain(error)}; {REMOVE}") from error


def record(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    model: str = "",
    batch: int = 1,
    deep: bool = False,
    file: Path | None = None,
    more: Mapping[str, Any] = {},
    on_prompt: Callable[[int], None] | None = None,
) -> Recording:
    """Run a pipeline without acceleration, and keep how alike the outputs of its calls are.

    Watched is what the sampler is given: the guided output, with all that the pipeline did to it.

    Args:
        pipe: a diffusers pipeline; nothing stays on it.
        prompts: one a run; run i has the seed ``seed + i``.
        steps: of the sampler.
        guidance: guidance scale; the pipeline's own if None.
        seed: of the first run.
        height: in pixels; the model's own if None.
        width: in pixels; the model's own if None.
        model: its name, for those who read the recording.
        batch: prompts a run.
        deep: also record the deep features, which calls of depth 1 reuse (of large ones some elements).
        file: written after each run; if it is there, only what it lacks is run.
        more: further arguments of the pipeline's call.
        on_prompt: called after each run with the number of prompts recorded so far.

    Raises:
        ValueError: naming the argument that is out of bounds, or if a method is on the pipeline, or its
            sampler is not linear in the outputs or steps more often than it has timesteps, or ``deep`` is
            asked of a denoiser with layers that are not known.
        FileError: if the file is damaged, or of other runs.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts: a text is not allowed, it must be a list of texts")
    check_within("prompts", len(prompts), 1, MOST_SEED)
    check_within("batch", batch, 1, MOST_SEED)
    check_prompts(pipe, prompts)
    if is_hooked(denoiser_of(pipe)):
        raise ValueError("pipe: a method is applied to it, so its runs are accelerated; remove it first")
    question = json.dumps([list(prompts), sorted((name, _contents(value)) for name, value in more.items())])
    key = hashlib.sha256(question.encode()).hexdigest()[:32]
    asked = {"steps": steps, "guidance": guidance, "height": height, "width": width, "seed": seed}
    kept, done = None, 0
    if file is not None and file.exists():
        kept = Recording.load(file)
        _check_same(kept, key, pipe, asked, file)
        done = kept.origin.prompts
        if deep and not kept.deep:
            warnings.warn(f"{said(file)}: it has no deep features, so none are added", stacklevel=2)
        deep = bool(kept.deep)
    for begin in range(done, len(prompts), batch):
        part = prompts[begin : begin + batch]
        with watched(pipe, deep) as seen:
            options: dict[str, Any] = {**asked, "seed": seed + begin}
            make(pipe, part, latents=True, more=more, **options)
        # By the depth of the calls that would reuse what was multiplied; 0 is the output.
        grams = {0: seen.gram()}
        calls, done = len(seen.outputs), begin + len(part)
        if kept is not None and kept.origin.calls != calls:
            raise ValueError(
                f"pipe: it stepped {calls} times, and {kept.origin.calls} for the prompts before; it "
                "can't be recorded"
            )
        features = None if seen.deep is None else seen.deep.gram()
        if features is not None:
            grams[DEPTH] = features
        elif deep:
            warnings.warn(
                "deep: steps have features of other sizes, since guidance changes within the run; they are "
                "not recorded",
                stacklevel=2,
            )
            deep = False
        if kept is not None:
            before, weight = {0: kept.gram, **kept.deep}, len(part) / done
            grams = {d: (1 - weight) * np.array(before[d]) + weight * gram for d, gram in grams.items()}
        kept = Recording(
            origin=Origin(
                model=model,
                denoiser=denoiser_key(denoiser_of(pipe)),
                scheduler=type(pipe.scheduler).__name__,
                scheduler_key=scheduler_key(pipe.scheduler),
                calls=calls,
                prompts=done,
                regrow=regrow.__version__,
                date=datetime.now(timezone.utc).date().isoformat(),
                **asked,
            ),
            prompts_key=key,
            before=seen.before,
            after=seen.total - seen.before - calls,
            influence=tuple(seen.influence.tolist()),
            gram=_rows(grams.pop(0)),
            deep={depth: _rows(gram) for depth, gram in grams.items()},
        )
        if file is not None:
            kept.save(file)
        if on_prompt is not None:
            on_prompt(done)
    assert kept is not None
    return kept


def _check_same(kept: Recording, key: str, pipe: Any, asked: Mapping[str, Any], file: Path) -> None:
    """Refuse to add runs to a recording of others."""
    own = {name: getattr(kept.origin, name) for name in asked}
    other = [f"{name} {own[name]}, not {asked[name]}" for name in asked if own[name] != asked[name]]
    other += kept.origin.unlike(denoiser_of(pipe), pipe.scheduler)
    other += [] if kept.prompts_key == key else ["it is of other prompts or arguments"]
    if other:
        raise FileError(f"{said(file)}: {'; '.join(other)}; use another file")


def _contents(value: Any) -> str:
    """What an argument holds: the text of a picture says where it lies, that of a tensor a part of it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_contents, value))}]"
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy()
    if isinstance(value, (np.ndarray, Image.Image)):
        held = np.ascontiguousarray(value)
        return f"{held.shape} {held.dtype} {hashlib.sha256(held.tobytes()).hexdigest()}"
    return repr(value)


def _rows(matrix: Array) -> Rows:
    return tuple(map(tuple, matrix.tolist()))


class Seen:
    """What a sampler was given in a run, and the deep features behind it if they are wanted.

    Attributes:
        before: timesteps of the sampler before the first that was run.
        total: all of them.
    """

    def __init__(self, scheduler: Any, deep: DeepFeatures | None = None) -> None:
        self.outputs: list[Tensor] = []
        self.before = self.total = 0
        self.deep = deep
        self._scheduler = scheduler
        self._influence: Array = np.zeros(0)

    def step(self, given: Mapping[str, Any]) -> None:
        """Keep an output; at the first, the scheduler as it was before it."""
        if not self.outputs:
            self.before = place_of(self._scheduler, given["timestep"])
            self.total = len(begins_of(self._scheduler))
            self._scheduler = copy.deepcopy(self._scheduler)
            # Before more is run: a sampler that is not linear in the outputs is refused.
            self._influence = influence(self._scheduler, self.before, self.total)
        self.outputs.append(given["model_output"].detach().clone())
        if self.deep is not None:
            self.deep.end_step()

    @property
    def influence(self) -> Array:
        """That of the outputs, on the latent that the last of them leads to."""
        if len(self.outputs) < len(self._influence):
            self._influence = influence(self._scheduler, self.before, self.before + len(self.outputs))
        return self._influence

    def gram(self) -> Array:
        """``(T, T)``, the mean product of the outputs of two calls over their elements.

        Raises:
            ValueError: if there are none, or more than timesteps.
        """
        steps, most = len(self.outputs), self.total - self.before
        if not 0 < steps <= most:
            raise ValueError(f"pipe: it stepped {steps} times for {most} timesteps; it can't be recorded")
        rows = [output.flatten() for output in self.outputs]
        elements, total = rows[0].numel(), torch.zeros(steps, steps, dtype=torch.float64)
        for part in zip(*(row.split(_PART) for row in rows), strict=True):
            # Not every device has float64.
            stacked = torch.stack(part).cpu().double()
            total += stacked @ stacked.T
        return (total / elements).numpy()


@contextmanager
def watched(pipe: Any, deep: bool = False) -> Iterator[Seen]:
    """See what a scheduler is given, and deep features if they are wanted, until this is left."""
    features = DeepFeatures() if deep else None
    seen = Seen(pipe.scheduler, features)
    with nullcontext() if features is None else watched_features(denoiser_of(pipe), DEPTH, features):
        watch = StepWatch(pipe.scheduler, seen.step, lasting=True)
        try:
            yield seen
        finally:
            watch.remove()
