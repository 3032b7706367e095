"""Forecasts as their papers have them, slow and plain, and a hand-made way to put them into a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regrow.lab.calibration.drift import Growth, gap_errors
from regrow.recover.fit import decibels


def chebyshev(
    times: Sequence[int], values: Any, t: int, *, total: int, degree: int, ridge: float, mix: float
) -> Any:
    """Spectrum's formula on values ``(n, F)``, one step after the other."""

    def phi(step: int) -> Any:
        tau = 2 * step / total - 1
        row = [1.0, tau]
        while len(row) <= degree:
            row.append(2 * tau * row[-1] - row[-2])
        return np.array(row[: degree + 1])

    x = np.stack([phi(time) for time in times])
    solved = np.linalg.inv(x.T @ x + ridge * np.eye(degree + 1)) @ (x.T @ values)
    spectral = phi(t) @ solved
    slope = (values[-1] - values[-2]) / (times[-1] - times[-2])
    local = values[-1] + slope * (t - times[-1])
    return mix * spectral + (1 - mix) * local


class Factors:
    """TaylorSeer's released code: it keeps the factors of the last full step alone."""

    def __init__(self, order: int) -> None:
        self.order, self.last = order, -1
        self.factors: list[Any] = []

    def full(self, step: int, value: Any) -> None:
        """A value is computed."""
        updated = [value]
        for i in range(self.order):
            if i < len(self.factors):
                updated.append((updated[i] - self.factors[i]) / (step - self.last))
        self.factors, self.last = updated, step

    def forecast(self, step: int) -> Any:
        """The value of a step."""
        x = step - self.last
        return sum(factor * x**i / math.factorial(i) for i, factor in enumerate(self.factors))


class Spectral:
    """Spectrum's forecast from all values, with the interface of `Factors`."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.times: list[int] = []
        self.values: list[Any] = []

    def full(self, step: int, value: Any) -> None:
        """A value is computed."""
        self.times.append(step)
        self.values.append(value)

    def forecast(self, step: int) -> Any:
        """The value of a step."""
        values = np.stack([value.double().flatten().numpy() for value in self.values])
        made = chebyshev(self.times, values, step, **self.options)
        return torch.as_tensor(made).view_as(self.values[-1])


class Calls:
    """Where a generation stands: every call of the denoiser is counted.

    Args:
        a_step: calls of the denoiser a step.
        first: the step of the first call.
    """

    def __init__(self, a_step: int = 1, first: int = 0) -> None:
        self.a_step, self.first, self.count = a_step, first, -1

    @property
    def step(self) -> int:
        """Of the present call."""
        return self.first + self.count // self.a_step

    @property
    def branch(self) -> int:
        """Of the present call: its place in the step."""
        return self.count % self.a_step


@contextmanager
def counted(denoiser: nn.Module, calls: Calls) -> Iterator[None]:
    """Count the calls of a denoiser."""

    def before(*_: Any) -> None:
        calls.count += 1

    hook = denoiser.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def forecast_outputs(
    modules: Sequence[nn.Module], calls: Calls, full: set[int], make: Callable[[], Any]
) -> Iterator[None]:
    """Modules compute in full steps and forecast what they return in the others, branch by branch."""
    kept: dict[tuple[int, int, int], Any] = {}
    hooks = []
    for number, module in enumerate(modules):

        def after(_: nn.Module, __: Any, out: Any, number: int = number) -> Any:
            parts = list(out) if isinstance(out, tuple) else [out]
            for part, value in enumerate(parts):
                parts[part] = None if value is None else told((number, part, calls.branch), value)
            return tuple(parts) if isinstance(out, tuple) else parts[0]

        hooks.append(module.register_forward_hook(after))

    def told(key: tuple[int, int, int], value: Tensor) -> Tensor:
        forecast = kept.setdefault(key, make())
        if calls.step in full:
            forecast.full(calls.step, value.double())
            return value
        made = forecast.forecast(calls.step)
        assert isinstance(made, Tensor)
        return made.to(value.dtype)

    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def drifting_error(gram: np.ndarray, influence: np.ndarray, weights: np.ndarray, growth: Growth) -> float:
    """The sum over gaps of the mean square of each gap's error, as much as it grows until the end."""
    squares, places = gap_errors(gram, influence, weights)
    return float(squares @ growth.at(places))


def foretold(gram: np.ndarray, influence: np.ndarray, weights: np.ndarray, growth: Growth) -> float:
    """The PSNR that a plan is expected to have, in dB."""
    return decibels(drifting_error(gram, influence, weights, growth))
