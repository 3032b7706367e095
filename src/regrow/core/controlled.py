"""A control at work: errors on their way from the device, and what was decided by them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regrow.control import Control
from regrow.schedule import Step

LAG = 2
"""Steps after which an error is read: the device has long computed it, and nobody waits."""


class Reading:
    """A number on its way from a device to Python.

    Args:
        value: of no dimension; from a GPU it is copied while the GPU goes on.
    """

    def __init__(self, value: Tensor) -> None:
        self._value, self._arrived = value, None
        if value.is_cuda:
            pinned = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value = pinned.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        """The number; waits until it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        number: Any = self._value.tolist()
        return float(number)


class Controlled:
    """A control in one generation.

    Args:
        control: it.
        total: steps of the generation.
        begin: the one that it begins with.
    """

    def __init__(self, control: Control, total: int, begin: int) -> None:
        self._control, self._state = control, control.start(total, begin)
        self._readings: dict[int, list[Reading]] = {}
        self._errors: dict[int, float] = {}
        self._decided: tuple[int, Step] | None = None

    def step(self, index: int) -> Step:
        """What the calls of a step do: decided at its first call, by errors of two steps ago and before."""
        if self._decided is None or self._decided[0] != index:
            for known in [step for step in self._readings if step <= index - LAG]:
                self._errors[known] = largest([one.read() for one in self._readings.pop(known)])
            step, self._state = self._control.next(self._state, index, self._errors)
            self._decided = index, step
        return self._decided[1]

    def add(self, index: int, reading: Reading) -> None:
        """Take the error of a full call, one of each branch of a step."""
        self._readings.setdefault(index, []).append(reading)


def largest(errors: list[float]) -> float:
    """The largest of some errors; infinite if one is no finite number."""
    return max(errors) if all(map(math.isfinite, errors)) else math.inf
