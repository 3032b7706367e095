"""What is compared: a method, or fewer steps of the same sampler, by a short name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from regrow.apply import Run, apply
from regrow.methods.base import MethodConfig
from regrow.methods.names import named


def applied(pipeline: Any, config: Any) -> AbstractContextManager[Run | None]:
    """A pipeline with a method on it for one generation; the run tells what it computed.

    Args:
        pipeline: the pipeline.
        config: the method's configuration; None for the pipeline as it is.
    """
    return nullcontext() if config is None else apply(pipeline, config)


def plain_settings(config: Any) -> Any:
    """A method's configuration as plain data; None for the pipeline as it is."""
    return None if config is None else config.model_dump(mode="json")


@dataclass(frozen=True)
class Variant:
    """One row of a comparison. What is not regrow's own is a subclass.

    Args:
        name: as it was asked for.
        config: a method's configuration; None for the pipeline as it is.
        steps: sampler steps.
    """

    name: str
    config: Any
    steps: int

    def applied(self, pipeline: Any) -> AbstractContextManager[Run | None]:
        """The pipeline with the method on it for one generation; the run tells what it computed.

        Raises:
            Exception: whatever keeps the method off this pipeline.
        """
        return applied(pipeline, self.config)

    def arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of `sampling.make` with what the method wants the pipeline to be given."""
        own = self.config.arguments() if isinstance(self.config, MethodConfig) else {}
        return {**options, "more": {**options.get("more", {}), **own}}

    def check(self, pipeline: Any) -> None:
        """Look whether the method goes on a pipeline. What it warns of is said when it is applied for good.

        Raises:
            ValueError: if it does not, naming it and the reason.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with self.applied(pipeline):
                    pass
            except Exception as error:
                raise ValueError(f"methods: {self.name} can't be applied: {error}") from error

    def settings(self) -> Any:
        """What tells it from another of its name, as plain data."""
        return plain_settings(self.config)


def variant(spec: str, steps: int) -> Variant:
    """A row by its name, which is one of `regrow.methods.names.named`.

    Args:
        spec: the name.
        steps: sampler steps where no ``steps:N`` says otherwise.

    Raises:
        ValueError: if it is no such name, or the file is not what it should be.
        OSError: if a schedule can't be read.
    """
    return Variant(spec, *named(spec, steps))
