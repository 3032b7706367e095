"""Jobs done by this process or by processes of a Ray cluster, called in the same way."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from typing_extensions import Self

from regrow.fields import check_within

# Workers, and what one may have of a machine.
_MOST = 10_000

Job = TypeVar("Job", contravariant=True)
Result = TypeVar("Result", covariant=True)


class WorkerDiedError(OSError):
    """The processes of workers died again and again."""


class Workers(Protocol[Job, Result]):
    """What does jobs. As a context manager it closes itself."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
        """Do jobs. Have one iterator at a time; when it is closed, the jobs that are left are dropped.

        Args:
            jobs: plain data.

        Yields:
            The index of a job and its result, as they finish.

        Raises:
            Exception: what a job raised; the other jobs are dropped.
        """
        ...

    def close(self) -> None:
        """End the workers, and free all that they hold."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class LocalWorkers(Workers[Job, Result], Generic[Job, Result]):
    """One worker in this process; results come in the order of the jobs.

    Args:
        make: builds the worker, once the first job is there.
    """

    def __init__(self, make: Callable[[], Callable[[Job], Result]]) -> None:
        self._make = make
        self._work: Callable[[Job], Result] | None = None

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
        for index, job in enumerate(jobs):
            if self._work is None:
                self._work = self._make()
            yield index, self._work(job)

    def close(self) -> None:
        self._work = None


class RayWorkers(Workers[Job, Result], Generic[Job, Result]):
    """Workers in processes of a Ray cluster; each holds its part of the cluster until they are closed.

    If the process of a worker dies, another one takes its place, and its job is done again. Jobs and
    results travel as Ray pickles them; no file is sent. Every node needs regrow and what ``make`` imports.
    Processes on this machine, of a cluster started here, inherit ``PYTHONPATH``.

    torch gets as many threads as the worker has CPUs, at least one, so that workers on one machine leave
    each other theirs. The number of threads may change results by rounding, and by nothing else.

    Args:
        make: picklable; builds the worker inside its process.
        count: how many; None for as many as the cluster has CPUs and GPUs for.
        address: of a running cluster, ``"auto"`` for that of this machine. None for the one that this
            process is connected to, which stays connected, or else for one that is started on this machine
            and ended by closing.
        cpus: for each worker, > 0.
        gpus: for each worker.
        attempts: how many workers one job may lose, >= 1.

    Raises:
        ImportError: if ray is not installed.
        ValueError: naming the argument, if it is out of bounds or the cluster has no room for so many.
        ConnectionError: if no cluster is at the address.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[Job], Result]],
        count: int | None = None,
        address: str | None = None,
        cpus: float = 1,
        gpus: float = 0,
        attempts: int = 3,
    ) -> None:
        if count is not None:
            check_within("count", count, 1, _MOST)
        if not 0 < cpus <= _MOST:
            raise ValueError(f"cpus: {cpus} is not allowed, it must be > 0 and <= {_MOST}")
        check_within("gpus", gpus, 0, _MOST)
        check_within("attempts", attempts, 1, 100)
        ray = import_ray()
        self._own = not ray.is_initialized()
        if address is not None and not self._own:
            raise ValueError(
                f"address: {address!r} is not allowed, it must be None: this process is connected to a "
                "cluster already"
            )
        self._make, self._attempts, self._threads = make, attempts, max(int(cpus), 1)
        self._idle: list[Any] = []
        # Of every call that is not over: the actor, and the index of its job or None while it starts.
        self._calls: dict[Any, tuple[Any, int | None]] = {}
        self._closed = False
        if self._own:
            ray.init(
                # With no address at all, ray joins what somebody left running on this machine.
                address=address or "local",
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        try:
            self._kind = ray.remote(_Actor).options(num_cpus=cpus, num_gpus=gpus)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            room = _room(nodes, cpus, gpus)
            self._count = count or max(room, 1)
            if self._count > room:
                raise ValueError(
                    f"count: {self._count} is not allowed, the cluster has room for {room} workers of "
                    f"{cpus:g} CPUs and {gpus:g} GPUs"
                )
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
        if self._closed:
            raise RuntimeError("these workers are closed")
        import ray
        from ray.exceptions import RayError, RayTaskError

        queue, deaths, left = deque(range(len(jobs))), Counter[int | None](), len(jobs)
        try:
            while left:
                self._start(min(self._count, left))
                self._hand_out(jobs, queue)
                [call], _ = ray.wait(list(self._calls))
                actor, index = self._calls.pop(call)
                try:
                    result = ray.get(call)
                except RayTaskError as error:
                    ray.kill(actor)
                    raise error.cause from error
                except RayError as error:
                    ray.kill(actor)
                    deaths[index] += 1
                    # A node may take all the workers that start with it.
                    if deaths[index] == self._attempts * (self._count if index is None else 1):
                        what = "start" if index is None else f"job {index}, {jobs[index]!r:.200},"
                        raise WorkerDiedError(
                            f"{what}: {deaths[index]} workers died at it; the last: {error}"
                        ) from error
                    if index is not None:
                        queue.append(index)
                    continue
                self._idle.append(actor)
                if index is not None:
                    left -= 1
                    # The next job goes out before the caller takes its time over this result.
                    self._hand_out(jobs, queue)
                    yield index, result
        finally:
            for call, (actor, index) in list(self._calls.items()):
                if index is not None:
                    del self._calls[call]
                    ray.kill(actor)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        import ray

        # Ray starts itself for whoever kills an actor after the cluster is gone.
        if ray.is_initialized():
            for actor in (*self._idle, *(actor for actor, _ in self._calls.values())):
                ray.kill(actor)
            if self._own:
                ray.shutdown()
        self._idle.clear()
        self._calls.clear()

    def _start(self, count: int) -> None:
        """Start workers until there are so many, with those that are still starting."""
        for _ in range(count - len(self._idle) - len(self._calls)):
            actor = self._kind.remote()
            self._calls[actor.start.remote(self._make, self._threads)] = actor, None

    def _hand_out(self, jobs: Sequence[Job], queue: deque[int]) -> None:
        """Give idle workers the next jobs. One that still waits for its place in the cluster gets none."""
        while self._idle and queue:
            actor, index = self._idle.pop(), queue.popleft()
            self._calls[actor.run.remote(jobs[index])] = actor, index


class _Actor:
    """What lives in a process of the cluster."""

    def start(self, make: Callable[[], Callable[[Any], Any]], threads: int) -> None:
        torch.set_num_threads(threads)
        self._work = make()

    def run(self, job: Any) -> Any:
        return self._work(job)


def import_ray() -> Any:
    """The module.

    Raises:
        ImportError: if it is not installed.
    """
    # Under `uv run`, ray would send the working directory to the cluster.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError("workers on a cluster need ray: pip install 'regrow[cluster]'") from error
    return ray


def _room(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """How many workers fit on nodes with these resources."""
    return sum(
        min(int(node.get(name, 0) / each + 1e-6) for name, each in (("CPU", cpus), ("GPU", gpus)) if each)
        for node in nodes
    )
