"""What makes a GPU's queue wait, seen on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoWaiting(TorchDispatchMode):
    """Refuses values that are read by Python, and shapes that depend on values.

    What copies a whole tensor to Python (``tolist``, ``numpy``, ``cpu``) calls nothing on a CPU, and is not
    seen.
    """

    WAITING = frozenset(
        {
            *("_local_scalar_dense", "item", "equal", "is_nonzero"),
            *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
            *("repeat_interleave", "bincount"),
        }
    )
    INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, func
        if name in self.INDEXING:
            assert all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1]), func
        return func(*args, **(kwargs or {}))
