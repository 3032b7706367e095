"""The result of a search, made up."""

from __future__ import annotations

import random
from typing import Any

from regrow.lab.search.proposals import front

DEPTHS: tuple[int | str, ...] = ("full", "layers", 2, 1, 0)


def result(generations: int = 4, population: int = 6, calls: int = 12, seed: int = 0) -> dict[str, Any]:
    """What a search writes; its first plan changes nothing, the third and each 11th later is given up."""
    chance = random.Random(seed)
    plans: list[dict[str, Any]] = []
    history = []
    for generation in range(generations):
        for _ in range(population):
            number = len(plans)
            cost = chance.uniform(0.15, 0.95) if number else 1.0
            far = 0.02 * (1 / cost - 1) * (1 + chance.expovariate(0.5 + 0.3 * generation))
            up = number % 11 == 2
            plans.append(
                {
                    "key": f"{number:016x}",
                    "steps": calls,
                    "config": {"method": "dato"},
                    "generation": generation,
                    "prompts": 0 if up else 4,
                    "given_up": up,
                    "error": None,
                    "values": {"quality:deviation": None if up else far, "cost:macs": cost},
                    "curve": [far / 4] if up else [far / 4, far / 2, far / 1.5, far],
                }
            )
        done = [p for p in plans if not p["given_up"]]
        values = [list(p["values"].values()) for p in done]
        best = front(values)
        history.append(
            {
                "generation": generation,
                "pictures": 4 * len(plans),
                "seconds": 30.0 * (generation + 1),
                "hypervolume": 0.3 - 0.2 / (generation + 1),
                "front": [values[i] for i in best],
            }
        )
    found = [
        {
            "name": f"plan-{place:02d}",
            "key": done[i]["key"],
            "file": f"front/plan-{place:02d}.yaml",
            "values": done[i]["values"],
            "steps": calls,
            "picked": [],
            "depth": ["full", *chance.choices(DEPTHS, (4, 1, 2, 6, 2), k=calls - 1 - 3 * (place % 2))],
            "ratio": [chance.choice((0.3, 0.4, 0.5, 0.7)) for _ in range(calls - 3 * (place % 2))],
        }
        for place, i in enumerate(best)
    ]
    for place, name in ((1, "quality"), (len(found) // 2, "balanced"), (len(found) - 1, "fast")):
        found[place]["picked"].append(name)
    beside = {
        "steps:12": (0.0, 1.0),
        "deepcache:2": (0.04, 0.6),
        "deepcache:5": (0.09, 0.33),
        "dato:b1": (0.1, 0.4),
    }
    return {
        "what": "search",
        "model": "emoji",
        "method": "dato",
        "algorithm": "nsga2",
        "steps": [calls, calls],
        "calls": calls,
        "prompts": 4,
        "seed": 0,
        "guidance": 3.0,
        "dtype": "float32",
        "scheduler": "DDIMScheduler",
        "scheduler_given": None,
        "scheduler_settings": {"beta_schedule": "linear"},
        "denoiser": "UNet2DConditionModel:ab12cd34ef56",
        "objectives": ["quality:deviation", "cost:macs"],
        "economy": {"prompts": [1, 2, 4], "patience": 2.0},
        "operators": {"population": population, "crossover": 0.7, "mutation_eta": 15.0},
        "search_seed": 0,
        "machine": {
            "processor": "A Processor",
            "gpu": None,
            "threads": 2,
            "python": "3.11.1",
            "versions": {"torch": "2.13.0"},
            "date": "2026-01-02",
        },
        "evaluated": len(plans),
        "pictures": history[-1]["pictures"],
        "seconds": history[-1]["seconds"],
        "plans": plans,
        "front": found,
        "beside": [
            {"name": name, "values": {"quality:deviation": q, "cost:macs": c}}
            for name, (q, c) in beside.items()
        ],
        "hypervolume": {"reference": [0.4, 1.0], "front": history[-1]["hypervolume"], "beside": 0.2},
        "history": history,
    }
