"""Schedules on the Hugging Face hub: one file in a repository of models."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from regrow.schedule import Schedule

PREFIX = "hub:"


def push(schedule: Schedule, repository: str, file: str, *, endpoint: str | None = None) -> str:
    """Put a schedule into a repository, which is made if it is not there.

    Args:
        schedule: what to share; one that a search found says where.
        repository: ``owner/name``.
        file: its name there, ending in .yaml or .json.
        endpoint: address of the hub, if it is another one.

    Returns:
        the address of the commit.

    Raises:
        ValueError: if the file's name has another ending.
        huggingface_hub.errors.HfHubHTTPError: if the hub refuses it.
    """
    if not file.endswith((".yaml", ".yml", ".json")):
        raise ValueError(f"file: {file!r} is not allowed, it must end in .yaml or .json")
    api = HfApi(endpoint=endpoint)
    api.create_repo(repository, exist_ok=True)
    text = schedule.dump(as_json=file.endswith(".json"))
    done = api.upload_file(
        path_or_fileobj=text.encode(),
        path_in_repo=file,
        repo_id=repository,
        commit_message=f"Add {file}",
    )
    return str(done.commit_url)


def pull(
    repository: str, file: str, *, revision: str | None = None, endpoint: str | None = None
) -> Schedule:
    """Read a schedule from a repository.

    Args:
        repository: ``owner/name``.
        file: its name there.
        revision: branch, tag or commit; the main branch if None.
        endpoint: address of the hub, if it is another one.

    Raises:
        ScheduleError: if the file is no schedule.
        huggingface_hub.errors.HfHubHTTPError: if it is not there.
    """
    return Schedule.load(Path(hf_hub_download(repository, file, revision=revision, endpoint=endpoint)))


def load(place: str | Path) -> Schedule:
    """Read a schedule from a file, or from the hub: ``hub:owner/name/plan.yaml``, ``...@revision``.

    Raises:
        ValueError: if what follows ``hub:`` is not of that form.
        ScheduleError: if the file is no schedule.
        OSError: if it can't be read.
    """
    text = str(place)
    if not text.startswith(PREFIX):
        return Schedule.load(text)
    where, _, revision = text.removeprefix(PREFIX).partition("@")
    parts = where.split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise ValueError(
            f"schedule: {text!r} is not allowed, it must be of the form hub:owner/name/plan.yaml"
        )
    return pull("/".join(parts[:2]), parts[2], revision=revision or None)
