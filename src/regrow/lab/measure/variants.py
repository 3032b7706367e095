"""Variants in comparisons: a method, or fewer steps of the same sampler, by a short name."""

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
    """Apply a method to a pipeline inside this context; the run reports what was computed.

    Args:
        pipeline: the pipeline.
        config: the method's configuration; None for the unaccelerated pipeline.
    """
    return nullcontext() if config is None else apply(pipeline, config)


def plain_settings(config: Any) -> Any:
    """Convert a method's configuration to plain data; None for the unaccelerated pipeline."""
    return None if config is None else config.model_dump(mode="json")


@dataclass(frozen=True)
class Variant:
    """One row of a comparison; methods of other libraries are subclasses.

    Args:
        name: name, as the user wrote it.
        config: the method's configuration; None for the unaccelerated pipeline.
        steps: number of sampler steps.
    """

    name: str
    config: Any
    steps: int

    def applied(self, pipeline: Any) -> AbstractContextManager[Run | None]:
        """Apply the method to a pipeline inside this context; the run reports what was computed.

        Raises:
            Exception: if the method can't be applied to this pipeline.
        """
        return applied(pipeline, self.config)

    def arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Add the method's arguments for the pipeline to options of `sampling.make`."""
        own = self.config.arguments() if isinstance(self.config, MethodConfig) else {}
        return {**options, "more": {**options.get("more", {}), **own}}

    def check(self, pipeline: Any) -> None:
        """Check that the method can be applied to a pipeline, without its warnings, which come later.

        Raises:
            ValueError: if it can't, with its name and the reason.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with self.applied(pipeline):
                    pass
            except Exception as error:
                raise ValueError(f"methods: {self.name} can't be applied: {error}") from error

    def settings(self) -> Any:
        """List its settings as plain data; variants with the same name may differ in them."""
        return plain_settings(self.config)


def variant(spec: str, steps: int) -> Variant:
    """Make a variant from a name, as `regrow.methods.names.named` takes it.

    Args:
        spec: the name.
        steps: number of sampler steps, if the name has no ``steps:N``.

    Raises:
        ValueError: if it is not such a name, or the file has another content.
        OSError: if a schedule can't be read.
    """
    return Variant(spec, *named(spec, steps))
