"""Which branch of guidance a call of the denoiser belongs to: known by what it is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What branches of guidance differ in: the text, whole and pooled, the picture, the class.
CONDITIONS = (
    "encoder_hidden_states",
    "encoder_hidden_states_image",
    "pooled_projections",
    "class_labels",
    "added_cond_kwargs",
    # Of denoisers of no known family.
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
    """What a call of the denoiser is given besides the latent and the time.

    Args:
        tensors: those of its `CONDITIONS`.
        versions: of their contents, which writing to one changes; -1 where that is not known.
        options: its arguments that are plain data, such as the layers that skip-layer guidance leaves out.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Condition:
        """The condition of a call with these arguments."""
        named = tuple(tensor for name in CONDITIONS for tensor in _tensors_in(inputs.get(name)))
        # Of a denoiser that calls them otherwise, all that it is given.
        tensors = named or tuple(_tensors_in(inputs))
        # A tensor made in inference mode does not tell.
        versions = tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)
        plain = ((k, _plain(v)) for k, v in sorted(inputs.items()))
        return cls(tensors, versions, tuple((k, v) for k, v in plain if v is not None))

    def is_very(self, other: Condition) -> bool:
        """Whether both have the very same tensors, unchanged, and equal options."""
        same = self.options == other.options and self.versions == other.versions
        return same and [*map(_place, self.tensors)] == [*map(_place, other.tensors)]

    def equals(self, other: Condition) -> bool:
        """Whether both have tensors of equal contents, and equal options. That waits for the device."""
        if self.options != other.options or len(self.tensors) != len(other.tensors):
            return False
        both = zip(self.tensors, other.tensors, self.versions, other.versions, strict=True)
        return all(_equal(*pair) for pair in both)


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


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an argument: itself, or those of a list or a mapping."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from _tensors_in(value[key])
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors_in(one)


def _equal(mine: Tensor, others: Tensor, version: int, before: int) -> bool:
    """Whether two tensors hold the same; of one that was written to, what it held is not known."""
    if _place(mine) == _place(others):
        return version == before
    if (mine.shape, mine.dtype, mine.device) != (others.shape, others.dtype, others.device):
        return False
    return mine.is_meta or bool(torch.equal(mine, others))


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
