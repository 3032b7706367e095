"""A control in a generation: its errors, read from the device, and its decisions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from regrow.control import Control
from regrow.schedule import Step

LAG = 2
"""Steps after which an error is read: by then the device has computed it, and nothing waits."""


class Reading:
    """A number that is copied from a device to Python.

    Args:
        value: a tensor without dimensions; the GPU continues during the copy.
    """

    def __init__(self, value: Tensor) -> None:
        self._value, self._arrived = value, None
        if value.is_cuda:
            pinned = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value = pinned.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        """Return the number; waits until it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        number: Any = self._value.tolist()
        return float(number)


class Controlled:
    """A control in one generation.

    Args:
        control: the control.
        total: number of steps of the generation.
        begin: index of its first step.
    """

    def __init__(self, control: Control, total: int, begin: int) -> None:
        self._control, self._state = control, control.start(total, begin)
        self._readings: dict[int, list[Reading]] = {}
        self._errors: dict[int, float] = {}
        self._decided: tuple[int, Step] | None = None

    def step(self, index: int) -> Step:
        """Decide what the calls of a step do, at the first of them, by errors at least two steps old."""
        if self._decided is None or self._decided[0] != index:
            for known in [step for step in self._readings if step <= index - LAG]:
                self._errors[known] = largest([one.read() for one in self._readings.pop(known)])
            step, self._state = self._control.next(self._state, index, self._errors)
            self._decided = index, step
        return self._decided[1]

    def add(self, index: int, reading: Reading) -> None:
        """Add the error of a full call; a step has one for each branch."""
        self._readings.setdefault(index, []).append(reading)


def largest(errors: list[float]) -> float:
    """Find the largest error; infinite if one is not a finite number."""
    return max(errors) if all(map(math.isfinite, errors)) else math.inf
