"""Shapes that are known from an operation before are those that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pipelines
import pytest
import torch
import transformer_pipelines
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from regrow.core.inputs import without_data
from regrow.core.macs import Flops, PlainCounter
from regrow.core.meta import KnownShapes, meta_copy
from regrow.models import module_of

MODELS: dict[str, Callable[[], Any]] = {
    "sd": pipelines.sd,
    "sdxl": pipelines.sdxl,
    "sd3": lambda: transformer_pipelines.sd3(layers=4),
    "pixart": lambda: transformer_pipelines.pixart(num_layers=4),
    "dit": lambda: transformer_pipelines.dit(num_layers=4),
    "flux": lambda: transformer_pipelines.flux(layers=4),
}


def form(value: Any) -> Any:
    """What is compared of an operation's result."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return type(value), [form(x) for x in value] if isinstance(value, (list, tuple)) else value


class Compared(TorchDispatchMode):
    """Does every operation once more, without the modes around this one."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _disable_current_modes():
            expected = form(func(*args, **kwargs or {}))
        found = func(*args, **kwargs or {})
        assert form(found) == expected, func
        self.operations += 1
        return found


@pytest.mark.parametrize("name", MODELS)
def test_every_operation_of_a_model_gives_what_it_gives_by_itself(name: str) -> None:
    pipe, calls = MODELS[name](), []
    denoiser = module_of(pipe)
    hook = denoiser.register_forward_pre_hook(lambda m, *call: calls.append(call), with_kwargs=True)
    (pipelines if name in ("sd", "sdxl") else transformer_pipelines).generate(pipe, num_inference_steps=2)
    hook.remove()
    args, kwargs = without_data(calls[-1])
    model, shapes, compared = meta_copy(denoiser), KnownShapes(), Compared()
    with torch.no_grad(), Flops(shapes=shapes), compared:
        model(*args, **kwargs)
        model(*args, **kwargs)
    assert compared.operations > 200
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    assert 2 * PlainCounter(denoiser).count([(args, kwargs)]) == counter.get_total_flops()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_operations_are_counted_as_pytorch_counts_them(mode: Callable[[], Any]) -> None:
    """Inference mode hands a linear layer on whole; elsewhere it comes as the product it is."""
    model, x = torch.nn.Linear(8, 4), torch.ones(3, 8)
    with mode(), FlopCounterMode(display=False) as expected:
        model(x)
    with mode(), Flops() as found:
        model(x)
    assert found.total == expected.get_total_flops() == 2 * 3 * 8 * 4


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
NUMBERS = [1, 1.0, True, 2, 1j]


@settings(max_examples=40)
@given(st.data())
def test_an_operation_of_other_inputs_is_another(data: st.DataObject) -> None:
    """One memory for all draws of an example: what is taken for the same shows."""
    sizes = st.lists(st.sampled_from([1, 3]), min_size=0, max_size=3)
    with Flops(shapes=KnownShapes()), Compared():
        for _ in range(data.draw(st.integers(2, 6))):
            x, y = (
                torch.empty(data.draw(sizes), dtype=data.draw(st.sampled_from(DTYPES)), device="meta")
                for _ in range(2)
            )
            if data.draw(st.booleans()):
                x = x.permute(list(range(x.dim()))[::-1])
            _ = x + data.draw(st.sampled_from(NUMBERS))
            _ = x * y
            _ = torch.cat([x.flatten(), y.flatten()])
            _ = torch.full_like(x, 1, dtype=data.draw(st.sampled_from(DTYPES)))
            _ = x.unbind() if x.dim() else x.clone()


def test_what_writes_or_looks_at_its_input_still_does() -> None:
    with Flops(shapes=KnownShapes()):
        for _ in range(2):
            x = torch.empty(2, 3, device="meta")
            assert x.view(6)._base is x
            assert x.add_(1) is x
            assert x.add(1) is not x
            # Values are there on other devices.
            assert torch.equal(torch.ones(2) + torch.arange(2), torch.tensor([1.0, 2.0]))
            assert torch.ones(3).sum().item() == 3
