"""Find whether two generations are part of one pipeline call, as the members of an ensemble are."""

from __future__ import annotations

import inspect
import sys
import weakref
from types import FrameType
from typing import Any

from torch import Tensor


class Caller:
    """The pipeline call in progress, known by tensors that exist only while it runs."""

    def __init__(self) -> None:
        self._made = {name: weakref.ref(tensor) for name, tensor in _made_by(_pipeline_call()).items()}

    def is_same(self) -> bool:
        """Whether that pipeline call is still in progress, and makes the present call too."""
        now = _made_by(_pipeline_call())
        return any(now.get(name) is ref() is not None for name, ref in self._made.items())


def _pipeline_call() -> FrameType | None:
    """Find the nearest frame that a pipeline runs in."""
    # Begin at the caller: a frame that reads its own variables keeps them alive, and all frames below.
    frame: FrameType | None = sys._getframe().f_back
    while frame is not None and not _is_of_a_pipeline(frame):
        frame = frame.f_back
    return frame


def _is_of_a_pipeline(frame: FrameType) -> bool:
    if frame.f_code.co_varnames[:1] != ("self",):
        return False
    # Without importing diffusers, which takes as long as torch.
    kinds = type(frame.f_locals.get("self")).__mro__
    return any(k.__name__ == "DiffusionPipeline" and k.__module__.startswith("diffusers.") for k in kinds)


def _made_by(frame: FrameType | None) -> dict[str, Any]:
    """List the tensors that a function made, by its names for them; not its arguments."""
    if frame is None:
        return {}
    given = inspect.getargvalues(frame)
    # Tensors of a scheduler are as old as its timesteps, so they do not identify the call.
    passed = {*given.args, given.varargs, given.keywords, "timesteps", "t"}
    tensors = {k: v for k, v in given.locals.items() if isinstance(v, Tensor)}
    theirs = {v.untyped_storage().data_ptr() for k, v in tensors.items() if k in passed}
    return {
        k: v for k, v in tensors.items() if k not in passed and v.untyped_storage().data_ptr() not in theirs
    }
