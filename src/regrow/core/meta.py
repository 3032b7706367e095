"""A denoiser's copy without weights, and the shapes in its calls, for counting."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regrow.core.others import is_of_diffusers

# Attributes that others, and torch, set on modules, and that do not change what they compute.
_WRAPPINGS = (
    "forward",
    "_old_forward",
    "_hf_hook",
    "_diffusers_hook",
    "_call_impl",
    "_compiled_call_impl",
    "_regrow_compiled",
)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def meta_copy(denoiser: Any) -> Any:
    """Copy a model to the meta device, in float32, with adapters, fused projections and processors.

    Hooks, offload, compiled code and attention backends are left out. A processor that is not of diffusers
    is replaced by the model's original one: see `unknown_attentions`.

    Args:
        denoiser: a model of diffusers; it is not changed.
    """
    # Imports of diffusers take as long as those of torch: only here.
    from diffusers.models.attention_dispatch import AttentionBackendName

    memo: dict[int, Any] = {}
    for module in denoiser.modules():
        state = module.__dict__
        memo |= {id(state[name]): None for name in _WRAPPINGS if name in state}
        memo |= {id(state[name]): OrderedDict() for name in _HOOKS if name in state}
        memo |= {id(tensor): _bare(tensor) for tensor in _tensors(state)}
    memo |= {id(attention.processor): _stock(attention) for _, attention in _with_unknown(denoiser)}
    model = copy.deepcopy(denoiser, memo)
    for module in model.modules():
        for name in _WRAPPINGS:
            if name in module.__dict__:
                del module.__dict__[name]
        processor = module.__dict__.get("processor")
        if hasattr(processor, "_attention_backend"):
            # Kernels of backends take no tensors without data; they do the same number of products.
            processor._attention_backend = AttentionBackendName.NATIVE
    return model.eval()


class KnownShapes:
    """Computes an operation's result on the meta device once for all inputs of the same shapes.

    PyTorch computes it in Python, which takes longer than a small operation with data, and a model's blocks
    repeat the same operations. Operations that write to their inputs or return views of them run each time.
    So do those with a tensor without dimensions: it may be a Python number, which does not set the type of
    the result.
    """

    def __init__(self) -> None:
        self._gives_new: dict[Any, bool] = {}
        self._known: dict[Any, tuple[type, list[_Form]]] = {}
        self._counts: dict[Any, int] = {}

    def result(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation of a dispatch mode, or look up its result without data."""
        if func not in self._gives_new:
            self._gives_new[func] = _gives_new(func)
        if not self._gives_new[func] or any(isinstance(x, Tensor) and not x.dim() for x in args):
            return func(*args, **kwargs)
        key = func, _key(args), _key(tuple(kwargs.items()))
        if key in self._known:
            kind, forms = self._known[key]
            again = [form.empty() for form in forms]
            return again[0] if kind is Tensor else kind(again)
        given = func(*args, **kwargs)
        kind, every = (Tensor, [given]) if isinstance(given, Tensor) else (type(given), given)
        if kind in (Tensor, tuple, list) and all(isinstance(x, Tensor) and x.is_meta for x in every):
            self._known[key] = kind, [_Form(x.shape, x.stride(), x.dtype) for x in every]
        return given

    def counted(self, formula: Callable[..., int], *args: Any, **kwargs: Any) -> int:
        """Call an operation's formula, or look up what it gave; it reads shapes alone."""
        key = formula, _key(args), _key(tuple(kwargs.items()))
        if key not in self._counts:
            self._counts[key] = formula(*args, **kwargs)
        return self._counts[key]


class _Form(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


def _gives_new(operation: Any) -> bool:
    """Whether an operation does not write to its inputs, and its result shares no memory with them."""
    schema = operation._schema
    return not schema.is_mutable and all(given.alias_info is None for given in schema.returns)


def _key(value: Any) -> Any:
    """Describe what an operation's result depends on, without data; 1, 1.0 and True differ."""
    if isinstance(value, Tensor):
        lazily = value.is_conj(), value.is_neg()
        return value.shape, value.stride(), value.dtype, value.device, lazily
    if isinstance(value, (list, tuple)):
        return tuple(_key(x) for x in value)
    return type(value), value


def unknown_attentions(denoiser: nn.Module) -> list[str]:
    """List the attentions with processors that are not of diffusers, whose computation is unknown."""
    return [name for name, attention in _with_unknown(denoiser) if not _is_xformers(attention.processor)]


def _with_unknown(denoiser: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in denoiser.named_modules():
        processor = getattr(module, "processor", None)
        if processor is not None and (not is_of_diffusers(processor) or _is_xformers(processor)):
            yield name, module


def _is_xformers(processor: Any) -> bool:
    """Whether a processor does the same products in kernels that need tensors with data."""
    return is_of_diffusers(processor) and "XFormers" in type(processor).__name__


def _stock(attention: Any) -> Any:
    """Make the processor that an attention has by default."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    return getattr(type(attention), "_default_processor_cls", AttnProcessor2_0)()


def _tensors(state: dict[str, Any]) -> Iterator[Tensor]:
    """List the tensors of a module: parameters, buffers, and plain attributes."""
    for value in (*state.values(), *state["_parameters"].values(), *state["_buffers"].values()):
        held = value if isinstance(value, (list, tuple)) else (value,)
        yield from (tensor for tensor in held if isinstance(tensor, Tensor))


def _bare(tensor: Tensor) -> Tensor:
    # Models without weights are float32.
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    bare = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
