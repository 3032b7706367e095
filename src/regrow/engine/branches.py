"""Which branch of guidance a call of the denoiser belongs to: known by what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What a call of the denoiser is given besides the latent and the time.

    Args:
        text: the text, or the class labels; None if the denoiser is given neither.
        version: of its contents, which writing to it changes; -1 if that is not known.
        options: its arguments that are plain data, such as the layers that skip-layer guidance leaves out.
    """

    text: Tensor | None
    version: int
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Condition:
        """The condition of a call with these arguments."""
        text = inputs.get("encoder_hidden_states")
        text = inputs.get("class_labels") if text is None else text
        text = text if isinstance(text, Tensor) else None
        # A tensor made in inference mode does not tell.
        version = -1 if text is None or text.is_inference() else text._version
        plain = ((k, _plain(v)) for k, v in sorted(inputs.items()) if k != "timestep")
        return cls(text, version, tuple((k, v) for k, v in plain if v is not None))

    def is_very(self, other: Condition) -> bool:
        """Whether both have the very same text, unchanged, and equal options."""
        if self.text is None or other.text is None:
            return self.text is other.text and self.options == other.options
        same = self.options == other.options and self.version == other.version
        return same and _place(self.text) == _place(other.text)

    def equals(self, other: Condition) -> bool:
        """Whether both have texts of equal contents, and equal options. That waits for the device."""
        mine, others = self.text, other.text
        if mine is None or others is None or self.options != other.options:
            return False
        if (mine.shape, mine.dtype, mine.device) != (others.shape, others.dtype, others.device):
            return False
        # Of a text that was written to, what it was before is not known.
        known = _place(mine) != _place(others)
        return known and (mine.is_meta or bool(torch.equal(mine, others)))


@dataclass
class Branch:
    """A branch of guidance, or a view of a panorama.

    Args:
        number: in the order in which branches first came.
        condition: what it was last given.
    """

    number: int
    condition: Condition


class Branches:
    """The branches of a generation."""

    def __init__(self) -> None:
        self._known: list[Branch] = []
        self._seen: list[Branch] = []
        self._step: int | None = None
        self._count = 0

    def find(self, inputs: Mapping[str, Any], step: int) -> int:
        """The number of the branch that a call belongs to.

        Of the branches that have not had their call in this step it is the first that was given the very
        same, or else equal contents; if there is none, it is a new one.
        """
        if step != self._step:
            self._drop_unused()
            self._step, self._seen = step, []
        condition = Condition.of(inputs)
        due = [b for b in self._known if b not in self._seen]
        branch = next((b for b in due if condition.is_very(b.condition)), None)
        branch = branch or next((b for b in due if condition.equals(b.condition)), None)
        if branch is None:
            branch = Branch(self._count, condition)
            self._count += 1
            self._known.append(branch)
        branch.condition = condition
        self._seen.append(branch)
        return branch.number

    @property
    def numbers(self) -> frozenset[int]:
        """The branches that may come again."""
        return frozenset(b.number for b in self._known)

    def _drop_unused(self) -> None:
        """Forget branches that stayed away, if they are more than those that came: of texts that change."""
        if len(self._known) > 2 * max(len(self._seen), 1):
            self._known = list(self._seen)


def _plain(value: Any) -> Any:
    """An argument that is a truth value, a whole number, a name, or several of these; else None."""
    if isinstance(value, (list, tuple)):
        parts = tuple(_plain(v) for v in value)
        return None if None in parts else parts
    return value if isinstance(value, (bool, int, str)) else None


def _place(x: Tensor) -> tuple[Any, ...]:
    """Where in memory a tensor is; equal for two views of the same elements."""
    if x.is_meta:
        return (id(x),)
    return x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride()
