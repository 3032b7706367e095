"""The table of a search beside others compares by one reference point."""

from __future__ import annotations

from typing import Any

import pytest
from search_table import compared, front_after, group, reached

NAMES = ["quality:deviation", "cost:macs"]


def rows(*points: tuple[float | None, float], name: str = "plan") -> list[dict[str, Any]]:
    return [{"name": name, "values": dict(zip(NAMES, p, strict=True))} for p in points]


def search(*points: tuple[float, float], **more: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"objectives": NAMES, "front": rows(*points), "evaluated": 9, "pictures": 40}
    return own | {"beside": [], "history": [], "seconds": 60.4} | more


def test_hypervolumes_are_up_to_the_worst_of_all() -> None:
    history = [
        {"pictures": 10, "seconds": 12.2, "front": [[0.4, 0.4]]},
        {"pictures": 40, "seconds": 60.4, "front": [[0.1, 0.5], [0.4, 0.25]]},
    ]
    beside = rows((0.5, 0.5), (None, 0.3), name="deepcache:2") + rows((0.05, 0.75), name="steps:25")
    found = search((0.1, 0.5), (0.4, 0.25), history=history, beside=beside)
    first, cached, fewer, chance = compared(found, {"chance": search((0.2, 1.0), pictures=20)})
    # Up to (0.5, 1.0).
    assert first["hypervolume"] == pytest.approx(0.4 * 0.5 + 0.1 * 0.25)
    assert (cached["name"], cached["plans"], cached["dominated"]) == ("deepcache", 1, 1)
    assert cached["hypervolume"] == 0
    assert (fewer["name"], fewer["dominated"]) == ("steps", 0)
    assert fewer["hypervolume"] == pytest.approx(0.45 * 0.25)
    assert (chance["name"], chance["dominated"], chance["pictures"]) == ("the front of chance", 1, 20)
    assert chance["search_after_as_many"] == pytest.approx(0.1 * 0.6)
    assert chance["search_as_good_after"] == {"pictures": 10, "seconds": 12}
    assert chance["seconds"] == 60


def test_a_search_may_never_become_as_good() -> None:
    history = [{"pictures": 10, "seconds": 5.0, "front": [[0.4, 0.4]]}]
    assert reached({"history": history}, 0.36, (1.0, 1.0)) == {
        "search_as_good_after": {"pictures": 10, "seconds": 5}
    }
    assert reached({"history": history}, 0.37, (1.0, 1.0)) == {}


def test_a_search_after_so_many_pictures_is_its_last_whole_generation() -> None:
    history = [{"pictures": 10, "front": [[1, 2]]}, {"pictures": 20, "front": [[0, 2]]}]
    found = {"history": history}
    assert front_after(found, 9) == []
    assert front_after(found, 19) == [(1, 2)]
    assert front_after(found, 20) == [(0, 2)]


def test_groups_are_methods_without_settings() -> None:
    assert group("deepcache:5+tome:0.5") == "deepcache+tome"
    assert group("dato:b1") == "dato"
