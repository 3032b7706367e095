"""Train the class-conditional transformer of moving emoji, on a CPU or one CUDA GPU.

    npm pack @iconify-json/noto@1.2.9
    python tools/train_video.py --data noto.tgz --out work/video --export work/video/model

Latte (Ma et al., 2024) on the pixels of small videos: one emoji of ten moves before a plain ground, and
borders send it back. Spatial blocks see the tokens of a frame, temporal blocks those of a place in all
frames. A class is a prompt of one word. Killed at any moment, the same command goes on from the last
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import LattePipeline, LatteTransformer3DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from emoji_scenes import Caption, Placed, Scene, Sprites, compose, read_sprites, shade
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from train_cifar import build_scheduler, pixel_vae
from training import (
    Stage,
    check_same_run,
    describe,
    half_precision,
    processor_seconds,
    strip_local_paths,
    train,
    trainable,
    write_json,
)
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from regrow.lab.memory import keep_freed_memory

SIDE = 32
CLASSES = ("penguin", "pizza", "cat", "sunflower", "octopus", "strawberry", "owl", "frog", "turtle", "crab")
GROUNDS = ("white", "grey", "yellow", "green", "blue", "purple", "pink")
SEEDS = 2**62
SMALLEST, LARGEST = 0.4, 0.7
# Shares of the picture, and degrees, that an object moves from a frame to the next.
FASTEST, MOST_TURN = 0.12, 12.0
TEXT_WIDTH = 64
# What LattePipeline pads texts to.
MOST_TOKENS = 120


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights, apart from the pictures and the time given."""

    batch: int = 8
    lr: float = 2e-3
    ema: float = 0.999
    class_dropout: float = 0.1
    frames: int = 8
    patch: int = 4
    pairs: int = 4
    heads: int = 2
    head_size: int = 64
    seed: int = 0


def clip(seed: int, frames: int) -> tuple[int, list[Scene]]:
    """The class and the frames of a seed: an object moves on and turns; borders send it back."""
    rng = random.Random(seed)
    index, size = rng.randrange(len(CLASSES)), rng.uniform(SMALLEST, LARGEST)
    low, high = size / 2 - 0.04, 1 - size / 2 + 0.04
    starts = [rng.uniform(0, high - low) for _ in range(2)]
    speeds = [rng.uniform(-FASTEST, FASTEST) for _ in range(2)]
    turn, spin, mirrored = rng.uniform(-20, 20), rng.uniform(-MOST_TURN, MOST_TURN), rng.random() < 0.5
    ground = rng.choice(GROUNDS)
    colour = shade(rng, ground)
    scenes = []
    for frame in range(frames):
        x, y = (
            low + fold(start + speed * frame, high - low)
            for start, speed in zip(starts, speeds, strict=True)
        )
        placed = Placed(index, x, y, size, turn + spin * frame, mirrored)
        scenes.append(Scene((placed,), (ground,), (colour, colour), 0.0, Caption((), ())))
    return index, scenes


def fold(way: float, length: float) -> float:
    """Where something is behind a way between two borders that send it back."""
    around = way % (2 * length)
    return min(around, 2 * length - around)


def draw(sprites: Sprites, count: int, frames: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Classes ``(count,)`` and videos ``(count, 3, frames, SIDE, SIDE)`` in [-1, 1], each of a seed."""
    clips = [clip(seed, frames) for seed in torch.randint(SEEDS, (count,), generator=rng).tolist()]
    pictures = compose([scene for _, scenes in clips for scene in scenes], sprites, SIDE)
    videos = pictures.unflatten(0, (count, frames)).transpose(1, 2).mul(2).sub(1)
    return torch.tensor([index for index, _ in clips]), videos


def build_transformer(recipe: Recipe) -> LatteTransformer3DModel:
    """The denoiser; every block begins as the identity (adaLN-Zero)."""
    width = recipe.heads * recipe.head_size
    transformer = LatteTransformer3DModel(
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.head_size,
        in_channels=3,
        # The pipeline takes the first half.
        out_channels=6,
        num_layers=recipe.pairs,
        cross_attention_dim=width,
        attention_bias=True,
        sample_size=SIDE,
        patch_size=recipe.patch,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_WIDTH,
        video_length=recipe.frames,
    )
    still = [transformer.proj_out, transformer.adaln_single.linear]
    still += [block.attn2.to_out[0] for block in transformer.transformer_blocks]
    for linear in still:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    for block in (*transformer.transformer_blocks, *transformer.temporal_transformer_blocks):
        # Shift, scale and gate of the attention, then of the feed-forward.
        nn.init.zeros_(block.scale_shift_table)
    return transformer.eval()


def build_text_encoder(seed: int) -> T5EncoderModel:
    """A T5 of one layer that is never trained: all it has to do is to tell the classes apart."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=3 + len(CLASSES), d_model=TEXT_WIDTH, d_kv=16, d_ff=TEXT_WIDTH, num_layers=1, num_heads=4
    )
    return T5EncoderModel(config).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a class, and one for the end."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *CLASSES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MOST_TOKENS,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


@torch.no_grad()
def read_texts(text_encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """The classes' texts and the empty one, last, as the pipeline makes them of one prompt and of several.

    Returns:
        Cut to the tokens of a class ``(classes + 1, 2, C)``; of full length ``(classes + 1, 120, C)``, zero
        behind the tokens of a class.
    """
    words = tokenizer([*CLASSES, ""], padding="max_length", max_length=MOST_TOKENS, return_tensors="pt")
    read = text_encoder(words.input_ids, attention_mask=words.attention_mask)[0]
    kept = int(words.attention_mask[0].sum())
    mask = words.attention_mask.clone()
    # The text of no class is not masked.
    mask[-1] = 1
    return read[:, :kept], read * mask[..., None]


def denoiser_stage(
    transformer: LatteTransformer3DModel, sprites: Sprites, texts: Sequence[Tensor], recipe: Recipe
) -> Stage:
    """The transformer: v-prediction at stratified noise levels, every video drawn anew."""
    kept = build_scheduler().alphas_cumprod
    device, batch = sprites.device, recipe.batch

    def loss(rng: torch.Generator) -> Tensor:
        labels, clean = draw(sprites, batch, recipe.frames, rng)
        strata = (torch.rand(1, generator=rng) + torch.arange(batch) / batch) % 1
        t = (strata * len(kept)).long()[torch.randperm(batch, generator=rng)]
        noise = torch.randn(clean.shape, generator=rng).to(device)
        dropped = torch.rand(batch, generator=rng) < recipe.class_dropout
        form = texts[int(torch.randint(len(texts), (1,), generator=rng))]
        words = form[torch.where(dropped, len(CLASSES), labels)].to(device)
        signal = kept[t].sqrt().view(-1, 1, 1, 1, 1).to(device)
        grain = (1 - kept[t]).sqrt().view(-1, 1, 1, 1, 1).to(device)
        with half_precision(device):
            noisy = signal * clean + grain * noise
            made = transformer(noisy, t.to(device), words).sample
        return F.mse_loss(made[:, :3].float(), signal * noise - grain * clean)

    return Stage(
        "denoiser", trainable("transformer", transformer), loss, recipe.lr, recipe.ema, recipe.seed
    )


def export(
    folder: Path,
    transformer: LatteTransformer3DModel,
    text_encoder: T5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Write an ordinary pipeline folder, all but the text encoder in fp16."""
    pipe = LattePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=pixel_vae().half(),
        transformer=transformer.half(),
        scheduler=build_scheduler(),
    )
    pipe.save_pretrained(folder)
    index = folder / "model_index.json"
    # The one name of this tokenizer class that both transformers 4 and 5 know.
    entries = json.loads(index.read_text())
    write_json(index, entries | {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]})
    for weights in folder.glob("*/*.safetensors"):
        weights.chmod(0o644)
    strip_local_paths(folder)
    write_json(folder / "captions.json", list(CLASSES))


def run(
    sprites: Tensor,
    out: Path,
    minutes: float,
    recipe: Recipe,
    export_to: Path | None = None,
    device: torch.device | None = None,
    timer: Callable[[], float] | None = None,
    checkpoint_seconds: float = 120.0,
) -> None:
    """Train, resuming whatever already exists in `out`."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_same_run(out / "run.json", describe(recipe, {"denoiser": minutes}, len(CLASSES), device))
    timer = timer or (time.perf_counter if device.type == "cuda" else processor_seconds)
    text_encoder, tokenizer = build_text_encoder(recipe.seed), build_tokenizer()
    texts = read_texts(text_encoder, tokenizer)
    torch.manual_seed(recipe.seed)
    transformer = build_transformer(recipe).to(device)
    if device.type == "cpu":
        # PyTorch's fused attention takes twice as long here, there and back.
        for module in transformer.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())
    stage = denoiser_stage(transformer, Sprites(sprites, device), texts, recipe)
    train(stage, out, minutes, recipe.batch, timer=timer, checkpoint_seconds=checkpoint_seconds)
    if export_to:
        export(export_to, transformer, text_encoder, tokenizer)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="tarball of @iconify-json/noto")
    parser.add_argument("--out", type=Path, required=True, help="work folder, resumed if it exists")
    parser.add_argument("--export", type=Path, help="write the finished pipeline here")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--frames", type=int, default=Recipe.frames)
    parser.add_argument("--patch", type=int, default=Recipe.patch, help="pixels a token spans")
    parser.add_argument("--pairs", type=int, default=Recipe.pairs, help="of a spatial and a temporal block")
    parser.add_argument("--heads", type=int, default=Recipe.heads, help="of 64 channels each")
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, help="cpu or cuda; default: cuda if any")
    return parser.parse_args()


def main() -> None:
    """Train as the command line says."""
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    recipe = Recipe(
        args.batch,
        args.lr,
        frames=args.frames,
        patch=args.patch,
        pairs=args.pairs,
        heads=args.heads,
        seed=args.seed,
    )
    sprites = read_sprites(args.data, CLASSES, SIDE)
    run(sprites, args.out, args.minutes, recipe, args.export, args.device)


if __name__ == "__main__":
    main()
