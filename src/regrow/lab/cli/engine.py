"""Where a command's jobs are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from regrow.lab.cli.requests import Request, option
from regrow.lab.workers import LocalWorkers, RayWorkers, Workers, import_ray


class JobEngine(Enum):
    """What does the jobs."""

    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True, kw_only=True)
class Jobs(Request):
    """What does the jobs, and where."""

    engine: JobEngine = option(JobEngine.LOCAL, "What does the work: this process, or a Ray cluster.")
    workers: int | None = option(None, "Workers on the cluster; as many as fit.", min=1)
    address: str | None = option(
        None, "Address of the cluster, or auto; one is started on this machine if none."
    )

    def check_engine(self, device: str) -> None:
        """Look before any work whether it can be done so.

        Raises:
            ValueError: if an option is not allowed.
            ImportError: if ray is not installed.
        """
        if self.engine is JobEngine.RAY:
            import_ray()
            if torch.device(device).index is not None:
                raise ValueError(
                    f"--device: {device!r} is not allowed with --engine ray, it must be without a number: "
                    "each worker has its own GPU"
                )
        elif self.workers is not None or self.address is not None:
            raise ValueError("--workers, --address: they go with --engine ray")

    def open(self, make: Callable[[], Callable[[Any], Any]], device: str) -> Workers[Any, Any]:
        """The workers; a GPU for each if that is the device.

        Args:
            make: builds one; see `RayWorkers`.
            device: it computes on.
        """
        if self.engine is JobEngine.LOCAL:
            return LocalWorkers(make)
        gpus = 1 if torch.device(device).type == "cuda" else 0
        return RayWorkers(make, self.workers, self.address, gpus=gpus)
