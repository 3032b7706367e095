"""Plans on the Hugging Face hub: each is one file in a repository of models."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from regrow.methods.base import MethodConfig
from regrow.methods.catalogue import load_plan
from regrow.schedule import Schedule

PREFIX = "hub:"
PLANS = (".json", ".yaml", ".yml")
"""Endings of files of plans."""


def push(plan: Schedule | MethodConfig, repository: str, file: str, *, endpoint: str | None = None) -> str:
    """Put a plan into a repository, which is made if it is not there.

    Args:
        plan: what to share; one that a search found says where.
        repository: ``owner/name``.
        file: its name there, ending in .yaml or .json; a method's configuration is JSON.
        endpoint: address of the hub, if it is another one.

    Returns:
        the address of the commit.

    Raises:
        ValueError: if the file's name has another ending.
        huggingface_hub.errors.HfHubHTTPError: if the hub refuses it.
    """
    endings = (".yaml", ".yml", ".json") if isinstance(plan, Schedule) else (".json",)
    if not file.endswith(endings):
        raise ValueError(f"file: {file!r} is not allowed, it must end in {' or '.join(endings)}")
    api = HfApi(endpoint=endpoint)
    api.create_repo(repository, exist_ok=True)
    text = plan.dump(as_json=file.endswith(".json")) if isinstance(plan, Schedule) else plan.dump()
    done = api.upload_file(
        path_or_fileobj=text.encode(),
        path_in_repo=file,
        repo_id=repository,
        commit_message=f"Add {file}",
    )
    return str(done.commit_url)


def pull(
    repository: str, file: str, *, revision: str | None = None, endpoint: str | None = None
) -> Schedule | MethodConfig:
    """Read a plan from a repository.

    Args:
        repository: ``owner/name``.
        file: its name there.
        revision: branch, tag or commit; the main branch if None.
        endpoint: address of the hub, if it is another one.

    Raises:
        ValueError: if the file is neither a schedule nor a method's configuration.
        huggingface_hub.errors.HfHubHTTPError: if it is not there.
    """
    return load_plan(Path(hf_hub_download(repository, file, revision=revision, endpoint=endpoint)))


def load(place: str | Path) -> Schedule | MethodConfig:
    """Read a plan from a file, or from the hub: ``hub:owner/name/plan.yaml``, ``...@revision``.

    Raises:
        ValueError: if what follows ``hub:`` is not of that form, or the file is neither a schedule nor a
            method's configuration.
        OSError: if it can't be read.
    """
    text = str(place)
    if not text.startswith(PREFIX):
        return load_plan(Path(text))
    where, _, revision = text.removeprefix(PREFIX).partition("@")
    parts = where.split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise ValueError(f"plan: {text!r} is not allowed, it must be of the form hub:owner/name/plan.yaml")
    return pull("/".join(parts[:2]), parts[2], revision=revision or None)


def load_schedule(place: str | Path) -> Schedule:
    """As `load`, of a schedule.

    Raises:
        ValueError: if it is a method's configuration.
    """
    plan = load(place)
    if not isinstance(plan, Schedule):
        raise ValueError(
            f"schedule: {place} is the configuration of a method; give it as the method itself"
        )
    return plan
