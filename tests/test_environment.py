"""What must hold of the environment the project installs into."""

import importlib.util


def test_torchvision_did_not_come_in() -> None:
    assert importlib.util.find_spec("torchvision") is None
