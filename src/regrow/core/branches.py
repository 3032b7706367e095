"""Branches of guidance: a call of the denoiser belongs to the branch with its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Arguments that differ between branches: the text, whole and pooled, the picture, the class.
CONDITIONS = (
    "encoder_hidden_states",
    "encoder_hidden_states_image",
    "pooled_projections",
    "class_labels",
    "added_cond_kwargs",
    # In denoisers of no known family.
    "encoder_hidden_states_1",
    "encoder_hidden_states_2",
    "encoder_hidden_states_t5",
    "encoder_hidden_states_llama3",
    "encoder_hidden_states_mask",
    "encoder_attention_mask",
    "audio_encoder_hidden_states",
    "pooled_embeds",
    "proj_embedding",
    "image_embeds",
    "image_embeddings",
    "prior_token_id",
    "prior_token_drop",
    "input_ids",
    "text_bth",
    "cap_feats",
    "clip_text",
    "clip_text_pooled",
    "clip_img",
    "global_hidden_states",
)


@dataclass(frozen=True)
class Condition:
    """The arguments of a call of the denoiser besides the latent and the time.

    Args:
        tensors: its arguments named in `CONDITIONS`.
        versions: version of each tensor, which changes when it is written to; -1 if not known.
        options: its arguments that are plain data, such as the layers that skip-layer guidance skips.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Condition:
        """Make the condition of a call with these arguments."""
        named = tuple(tensor for name in CONDITIONS for tensor in _tensors_in(inputs.get(name)))
        # A denoiser with other argument names: all tensors that it is given.
        tensors = named or tuple(_tensors_in(inputs))
        # Tensors made in inference mode have no version.
        versions = tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)
        plain = ((k, _plain(v)) for k, v in sorted(inputs.items()))
        return cls(tensors, versions, tuple((k, v) for k, v in plain if v is not None))

    def is_very(self, other: Condition) -> bool:
        """Whether both have the same tensor objects, unchanged, and equal options."""
        same = self.options == other.options and self.versions == other.versions
        return same and [*map(_place, self.tensors)] == [*map(_place, other.tensors)]

    def equals(self, other: Condition) -> bool:
        """Whether both have tensors with equal contents, and equal options; waits for the device."""
        if self.options != other.options or len(self.tensors) != len(other.tensors):
            return False
        both = zip(self.tensors, other.tensors, self.versions, other.versions, strict=True)
        return all(_equal(*pair) for pair in both)


@dataclass
class Branch:
    """A branch of guidance, or a view of a panorama.

    Args:
        number: number of the branch, in the order of first calls.
        condition: the condition of its last call.
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
        """Find the number of the branch that a call belongs to.

        Branches without a call in this step are searched for the same tensor objects, then for equal
        contents. If none matches, it is a new branch.
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
        """The branches that may have more calls."""
        return frozenset(b.number for b in self._known)

    def _drop_unused(self) -> None:
        """Forget branches without calls, if they are the majority: their texts were replaced."""
        if len(self._known) > 2 * max(len(self._seen), 1):
            self._known = list(self._seen)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """List the tensors of an argument: itself, or those in a list or mapping."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from _tensors_in(value[key])
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors_in(one)


def _equal(mine: Tensor, others: Tensor, version: int, before: int) -> bool:
    """Whether two tensors have equal contents; False if memory that they share was written to."""
    if _place(mine) == _place(others):
        return version == before
    if (mine.shape, mine.dtype, mine.device) != (others.shape, others.dtype, others.device):
        return False
    return mine.is_meta or bool(torch.equal(mine, others))


def _plain(value: Any) -> Any:
    """Return an argument that is a truth value, whole number, name, or several of these; else None."""
    if isinstance(value, (list, tuple)):
        parts = tuple(_plain(v) for v in value)
        return None if None in parts else parts
    return value if isinstance(value, (bool, int, str)) else None


def _place(x: Tensor) -> tuple[Any, ...]:
    """Describe where a tensor is in memory; equal for two views of the same elements."""
    if x.is_meta:
        return (id(x),)
    return x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride()
