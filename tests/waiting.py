"""What makes a GPU's queue wait, seen on a CPU."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class NoWaiting(TorchDispatchMode):
    """Refuses values that are read by Python, and shapes that depend on values."""

    WAITING = frozenset(
        {
            *("_local_scalar_dense", "item", "equal", "is_nonzero"),
            *("nonzero", "masked_select", "_unique2", "unique_dim"),
        }
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.WAITING, func
        return func(*args, **(kwargs or {}))
