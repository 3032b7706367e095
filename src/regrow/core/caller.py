"""Whether two generations are of one call of a pipeline, as the members of an ensemble are."""

from __future__ import annotations

import inspect
import sys
import weakref
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor


class Caller:
    """The call of a pipeline that is in progress, known by tensors that live no longer than it."""

    def __init__(self) -> None:
        self._made = {name: weakref.ref(tensor) for name, tensor in _made_by(_pipeline_call()).items()}

    def is_same(self) -> bool:
        """Whether that call is still in progress, and the caller."""
        now = _made_by(_pipeline_call())
        return any(now.get(name) is ref() is not None for name, ref in self._made.items())


def _pipeline_call() -> FrameType | None:
    """The nearest frame that a pipeline runs in."""
    # From the caller on: a frame that asks itself for its variables keeps them, and all below it.
    frame: FrameType | None = sys._getframe().f_back
    while frame is not None and not _is_of_a_pipeline(frame):
        frame = frame.f_back
    return frame


def _is_of_a_pipeline(frame: FrameType) -> bool:
    method = frame.f_code.co_varnames[:1] == ("self",)
    return method and isinstance(frame.f_locals.get("self"), DiffusionPipeline)


def _made_by(frame: FrameType | None) -> dict[str, Any]:
    """The tensors that a function has made, by the names it gave them; not those it was given."""
    if frame is None:
        return {}
    given = inspect.getargvalues(frame)
    # Those of a scheduler are as old as its timesteps.
    passed = {*given.args, given.varargs, given.keywords, "timesteps", "t"}
    tensors = {k: v for k, v in given.locals.items() if isinstance(v, Tensor)}
    theirs = {v.untyped_storage().data_ptr() for k, v in tensors.items() if k in passed}
    return {
        k: v for k, v in tensors.items() if k not in passed and v.untyped_storage().data_ptr() not in theirs
    }
