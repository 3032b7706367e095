"""What a branch keeps of a site gives what everything that was ever computed would give."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pipelines
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import BaseOutput
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import regrow
from regrow.core.store import Store, copied
from regrow.methods.taylorseer import Differences
from regrow.recover.time import REUSE, Chebyshev, Taylor, TimeRecovery
from regrow.schedule import FULL

TOTAL = 50

recoveries = st.lists(
    st.one_of(
        st.just(REUSE),
        st.builds(Taylor, order=st.integers(1, 4)),
        st.builds(Differences, order=st.integers(1, 3)),
        st.builds(Chebyshev, degree=st.integers(1, 4), ridge=st.floats(0.01, 1), mix=st.floats(0, 1)),
    ),
    min_size=1,
    max_size=4,
)
steps = st.lists(st.integers(0, TOTAL - 1), min_size=2, max_size=14, unique=True).map(sorted)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def add(store: Store, key: str, step: int, value: Any) -> None:
    """A call of a step that computes one value."""
    store.begin(step)
    store.add(key, value)
    store.end()


def added(
    store: Store, times: Sequence[int], *shape: int, key: str = "site", first: int = 0
) -> list[Tensor]:
    values = [drawn(first + time, *shape) for time in times]
    for time, value in zip(times, values, strict=True):
        add(store, key, time, value)
    return values


def summed(recovery: TimeRecovery, times: Sequence[int], t: int, values: Sequence[Tensor]) -> Tensor:
    """Of all values, each by its weight."""
    weights = torch.tensor(recovery.weights(times, t, TOTAL), dtype=torch.float64)
    return (weights[:, None, None] * torch.stack([v.double() for v in values])).sum(0)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())


@given(recoveries, steps)
def test_the_store_gives_the_sum_of_everything_that_was_added(
    used: list[TimeRecovery], given_steps: list[int]
) -> None:
    *times, t = given_steps
    store = Store(used, TOTAL)
    values = added(store, times, 2, 3)
    for recovery in used:
        assert_near(store.at("site", t, recovery), summed(recovery, times, t, values))


@given(recoveries, steps)
def test_forecasts_between_full_steps_change_nothing_that_is_kept(
    used: list[TimeRecovery], given_steps: list[int]
) -> None:
    store = Store(used, TOTAL)
    values: list[Tensor] = []
    for n, step in enumerate(given_steps):
        if n:
            for recovery in used:
                wanted = summed(recovery, given_steps[:n], step, values)
                assert_near(store.at("site", step, recovery), wanted)
        values += added(store, [step], 2, 3)


def test_sites_are_apart() -> None:
    store = Store([Taylor()], TOTAL)
    mine, other = added(store, (0, 1), 2, 3), added(store, (0, 2), 2, 3, key="other", first=100)
    assert_near(store.at("site", 3, Taylor()), summed(Taylor(), (0, 1), 3, mine))
    assert_near(store.at("other", 3, Taylor()), summed(Taylor(), (0, 2), 3, other))
    store.drop("site", "unknown")
    assert "site" not in store
    assert "other" in store


def tensors_alive() -> int:
    while gc.collect():
        pass
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize(
    ("used", "values", "sums"),
    [
        ([REUSE], 1, 0),
        ([Taylor(order=3)], 4, 0),
        ([REUSE, Taylor(order=1)], 2, 0),
        ([Chebyshev(degree=4)], 2, 5),
        ([Chebyshev(degree=4), Chebyshev(degree=2), Taylor(order=2)], 3, 8),
    ],
)
def test_memory_does_not_grow_with_the_run(used: list[TimeRecovery], values: int, sums: int) -> None:
    store, given_values = Store(used, TOTAL), []
    before = tensors_alive()
    for step in range(40):
        value = drawn(step, 2, 3)
        given_values.append(weakref.ref(value))
        add(store, "site", step, value)
        del value
    assert tensors_alive() - before == values + sums
    assert [ref() is not None for ref in given_values] == [False] * (40 - values) + [True] * values


def test_values_of_a_call_that_was_interrupted_are_forgotten() -> None:
    """Else a value would be taken for one of the step before."""
    store = Store([Taylor(order=1)], TOTAL)
    added(store, (0, 1), 2, 3)
    store.begin(2)
    store.add("site", drawn(9, 2, 3))
    store.begin(2)
    assert "site" not in store
    store.add("site", drawn(2, 2, 3))
    store.end()
    assert torch.equal(store.at("site", 3, Taylor(order=1)), drawn(2, 2, 3))


def test_values_of_another_shape_begin_anew() -> None:
    store = Store([Taylor(order=2), Chebyshev()], TOTAL)
    added(store, (0, 1, 2), 2, 3)
    later = added(store, (3, 4), 4, 3)
    for recovery in (Taylor(order=2), Chebyshev()):
        assert_near(store.at("site", 5, recovery), summed(recovery, (3, 4), 5, later))


def test_a_step_that_is_computed_again_begins_anew() -> None:
    store = Store([Taylor(), Chebyshev()], TOTAL)
    added(store, (0, 1, 2), 2, 3)
    again = added(store, (1, 4), 2, 3, first=100)
    for recovery in (Taylor(), Chebyshev()):
        assert_near(store.at("site", 5, recovery), summed(recovery, (1, 4), 5, again))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recovery", [Taylor(order=3), Differences(order=3), Chebyshev(mix=0.5)])
def test_half_precision_is_summed_in_float32_and_rounded_once(
    recovery: TimeRecovery, dtype: torch.dtype
) -> None:
    store, values = Store([recovery], TOTAL), []
    for step in range(0, 40, 2):
        values.append(drawn(step, 16, 16).to(dtype))
        add(store, "site", step, values[-1])
    found = store.at("site", 40, recovery)
    exact = summed(recovery, range(0, 40, 2), 40, values)
    assert found.dtype == dtype
    # Half of the distance of neighbours, and float32's rounding of sums that cancel.
    half = torch.finfo(dtype).eps / 2 * exact.abs()
    assert bool(((found.double() - exact).abs() <= 1.01 * half + 1e-4).all())


@dataclass
class Pair(BaseOutput):
    """An output of two tensors and more."""

    sample: Tensor
    extra: Any = None


def test_nested_values_are_summed_part_by_part() -> None:
    def value(step: int) -> Any:
        return (
            drawn(step, 2, 3),
            None,
            [drawn(100 + step, 4), {"a": drawn(200 + step, 1), "n": step}],
            torch.tensor([step]),
        )

    store = Store([Taylor()], TOTAL)
    for step in (0, 1):
        add(store, "site", step, value(step))
    found = store.at("site", 3, Taylor())
    # The line through the values at 0 and 1.
    first, last = value(0), value(1)
    assert isinstance(found, tuple)
    assert torch.allclose(found[0], 3 * last[0] - 2 * first[0])
    assert found[1] is None
    assert isinstance(found[2], list)
    assert torch.allclose(found[2][0], 3 * last[2][0] - 2 * first[2][0])
    assert torch.allclose(found[2][1]["a"], 3 * last[2][1]["a"] - 2 * first[2][1]["a"])
    # What is no tensor of floating point is of the last value.
    assert found[2][1]["n"] == 1
    assert torch.equal(found[3], last[3])


def test_outputs_of_diffusers_keep_their_type() -> None:
    store = Store([Taylor()], TOTAL)
    for step in (0, 1):
        add(store, "plain", step, Transformer2DModelOutput(sample=drawn(step, 2)))
        add(store, "pair", step, Pair(sample=drawn(step, 2), extra=[drawn(50 + step, 1)]))
    plain, pair = store.at("plain", 2, Taylor()), store.at("pair", 2, Taylor())
    assert type(plain) is Transformer2DModelOutput
    assert type(pair) is Pair
    wanted = 2 * drawn(1, 2) - drawn(0, 2)
    assert torch.allclose(plain.sample, wanted)
    assert torch.allclose(pair.sample, wanted)
    assert torch.allclose(pair.extra[0], 2 * drawn(51, 1) - drawn(50, 1))


@given(recoveries, steps)
def test_a_forecast_is_a_tensor_of_its_own(used: list[TimeRecovery], given_steps: list[int]) -> None:
    """Whoever writes to it changes nothing that is kept; only a reused value is the kept one itself."""
    *times, t = given_steps
    store = Store(used, TOTAL)
    added(store, times, 2, 3)
    for recovery in used:
        before = store.at("site", t, recovery).clone()
        found = store.at("site", t, recovery)
        if found is not store.last("site"):
            found.zero_()
        assert torch.equal(store.at("site", t, recovery), before)
        weights = recovery.weights(times, t, TOTAL)
        if any(weights[:-1]) or recovery == REUSE:
            assert (found is store.last("site")) == (recovery == REUSE)


def test_a_copy_shares_no_tensor() -> None:
    value = (drawn(0, 2), None, {"a": drawn(1, 2)})
    copy = copied(value)
    copy[0].zero_()
    copy[2]["a"].zero_()
    assert torch.equal(value[0], drawn(0, 2))
    assert torch.equal(value[2]["a"], drawn(1, 2))
    assert copy[1] is None


@pytest.mark.parametrize(
    "depths", [(FULL, 0, 0, FULL, 0, 0), (FULL, 1, 0, FULL, 1, 0), (FULL, 2, 2, 0, 0, 1)]
)
@pytest.mark.parametrize("recovery", [REUSE, Taylor(), Chebyshev()])
def test_the_caller_of_a_denoiser_may_write_to_its_outputs(
    depths: tuple[int, ...], recovery: TimeRecovery
) -> None:
    def outputs(*, spoil: bool) -> list[Tensor]:
        unet = pipelines.unet()
        plan = regrow.Schedule(depth=depths, ratio=(0.0,) * len(depths), recovery=(recovery,))
        run, found = regrow.apply(unet, regrow.DaTo(schedule=plan)), []
        with run, torch.no_grad(), run.generation(len(depths)) as clock:
            for step in range(len(depths)):
                inputs = pipelines.unet_inputs(unet, seed=step, timestep=900 - 100 * step)
                out = unet(**inputs, return_dict=False)[0]
                found.append(out.clone())
                if spoil:
                    out.zero_()
                clock.step()
        return found

    for plain, spoiled in zip(outputs(spoil=False), outputs(spoil=True), strict=True):
        assert torch.equal(plain, spoiled)


def test_a_value_computed_twice_in_a_call_is_compared_with_none() -> None:
    store = Store([Taylor(order=1)], TOTAL)
    added(store, (0, 1), 2, 3)
    store.begin(2)
    store.add("site", drawn(2, 2, 3))
    assert store.deviation("site", 2, Taylor(order=1), drawn(3, 2, 3)) is None
