"""How evaluations scale with the workers of a simulated Ray cluster of many nodes.

An evaluation is a sleep, so that the cores of this machine don't count: what is measured is how long
workers wait for jobs, and their results for the caller. Each worker is there for so many evaluations; the
ideal time is what these take, and efficiency is its share of the measured time. Every node is a process of
Ray's own on this machine with logical CPUs. The workers are all up before the clock starts.

    python benchmarks/ray_scaling.py --json benchmarks/results/ray-scaling.json
"""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from regrow.lab.measure.atomic_files import write_json
from regrow.lab.measure.machine import PACKAGES, machine
from regrow.lab.workers import RayWorkers

TARGET = 0.9


class Sleeper:
    """Takes a fixed time for an evaluation."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.name = seconds, uuid.uuid4().hex

    def __call__(self, evaluation: int) -> tuple[str, str]:
        """This worker's name and its node's."""
        time.sleep(self.seconds)
        return self.name, ray.get_runtime_context().get_node_id()


@dataclass(frozen=True)
class Row:
    """One number of workers.

    Args:
        workers: how many.
        nodes: that they were on.
        seconds: for all evaluations.
        ideal: seconds if nobody ever waited.
        efficiency: ``ideal / seconds``.
    """

    workers: int
    nodes: int
    seconds: float
    ideal: float
    efficiency: float


@contextmanager
def cluster(nodes: int, cpus: int) -> Iterator[None]:
    """A cluster of so many nodes on this machine, connected to."""
    found = Cluster()
    try:
        for _ in range(nodes):
            found.add_node(num_cpus=cpus, include_dashboard=False)
        found.wait_for_nodes()
        ray.init(found.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        found.shutdown()


def measure(count: int, each: int, seconds: float) -> Row:
    """Time so many evaluations a worker."""
    evaluations = each * count
    with RayWorkers(partial(Sleeper, seconds), count) as workers:
        up: set[str] = set()
        while len(up) < count:
            up |= {name for _, (name, _) in workers.run(range(count))}
        begin = time.perf_counter()
        found = dict(workers.run(range(evaluations)))
        taken = time.perf_counter() - begin
    assert sorted(found) == list(range(evaluations)), "every evaluation is done once"
    ideal = seconds * each
    return Row(count, len({node for _, node in found.values()}), taken, ideal, ideal / taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--cpus", type=int, default=4, help="logical CPUs of a node")
    parser.add_argument("--each", type=int, default=4, help="evaluations for each worker")
    parser.add_argument("--seconds", type=float, default=2.0, help="of an evaluation")
    parser.add_argument("--json", type=Path, default=None, help="file for the result")
    args = parser.parse_args()

    rows = []
    with cluster(args.nodes, args.cpus), Progress(console=Console(stderr=True)) as progress:
        for count in progress.track(args.workers, description="workers"):
            rows.append(measure(count, args.each, args.seconds))

    table = Table("workers", "nodes", "s", "ideal s", "efficiency", "target")
    for r in rows:
        row = (f"{r.seconds:.2f}", f"{r.ideal:.2f}", f"{r.efficiency:.1%}", f"{TARGET:.0%}")
        table.add_row(str(r.workers), str(r.nodes), *row)
    Console().print(table)
    if args.json is not None:
        result = {
            "what": "evaluations that sleep, on a simulated cluster of Ray nodes on one machine",
            "nodes": args.nodes,
            "cpus": args.cpus,
            "evaluations_a_worker": args.each,
            "seconds": args.seconds,
            "target": TARGET,
            "machine": machine(packages=(*PACKAGES, "ray")),
            "rows": [vars(r) for r in rows],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, result)
        print(args.json)


if __name__ == "__main__":
    main()
