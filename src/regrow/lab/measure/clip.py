"""The CLIP score: how well pictures fit their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regrow.lab.measure.atomic_files import digest


class ClipScore:
    """``100 max(cos(image, text), 0)`` of a CLIP model's embeddings, as diffusion papers report it.

    Hessel et al. (2021) multiply the cosine by 2.5 instead of 100. Prompts are cut at the length of the
    model's text encoder (77 tokens for the public ones).

    Args:
        name: folder or hub id of a `transformers.CLIPModel` with its tokenizer and image processor, such as
            ``openai/clip-vit-large-patch14``. Papers use different ones: compare scores of one model only.
        device: where it runs.

    Raises:
        OSError: if there is no such model.
        ValueError: if it is of another kind.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        from transformers import AutoConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "clip":
            raise ValueError(f"clip: {name} is a model of kind {kind!r}, it must be 'clip'")
        model: Any = CLIPModel.from_pretrained(name, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(name)
        self.processor: Any = CLIPImageProcessorPil.from_pretrained(name)
        self.name, self.device = name, device
        self.key = digest(self.model.state_dict().values())
        """Fingerprint of the weights."""

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each picture with its prompt.

        Args:
            images: ``(B, 3, H, W)`` uint8.
            prompts: ``B`` texts.

        Returns:
            ``(B,)`` float32, 0 to 100.
        """
        text = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        pixels = self.processor([image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")
        found = self.model(**text.to(self.device), pixel_values=pixels["pixel_values"].to(self.device))
        cosine = torch.cosine_similarity(found.image_embeds, found.text_embeds)
        return 100 * cosine.clamp_min(0).cpu()
