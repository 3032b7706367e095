"""Train the class-conditional transformer of small photographs, on a CPU or one CUDA GPU.

    python tools/train_cifar.py --data cifar-10-binary.tar.gz --out work/cifar --export work/cifar/model

A diffusion transformer (Peebles and Xie, 2023) on the pixels of CIFAR-10: patches of 2 x 2, 256 tokens, as
many as DiT-XL/2 has at 256 x 256. Killed at any moment, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar import CLASSES, SIDE, read_cifar
from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
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

from regrow.lab.memory import keep_freed_memory

# The class that DiTPipeline hands on for "no class".
NO_CLASS = 1000
# Hinges with which the decoder undoes the tanh of AutoencoderTiny.
HINGES = 16


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights, apart from the pictures and the time given."""

    batch: int = 32
    lr: float = 2e-3
    ema: float = 0.999
    class_dropout: float = 0.1
    layers: int = 10
    heads: int = 4
    head_size: int = 64
    seed: int = 0


def build_transformer(recipe: Recipe) -> DiTTransformer2DModel:
    """The denoiser; every block begins as the identity (adaLN-Zero)."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.head_size,
        in_channels=3,
        out_channels=3,
        num_layers=recipe.layers,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=NO_CLASS,
    )
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(transformer.proj_out_2.weight)
    nn.init.zeros_(transformer.proj_out_2.bias)
    # In training mode every block would drop classes by itself, drawn from the global generator.
    return transformer.eval()


@torch.no_grad()
def pixel_vae() -> AutoencoderTiny:
    """An autoencoder whose latents are the pixels in [-1, 1], in closed form.

    Its decoder is a sum of hinges that undoes the tanh in front of it, exactly at the hinges.
    """
    vae = AutoencoderTiny(
        encoder_block_out_channels=(3,),
        decoder_block_out_channels=(3 * HINGES,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        latent_channels=3,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    for parameter in vae.parameters():
        parameter.zero_()
    enter, leave = vae.encoder.layers
    for c in range(3):
        enter.weight[c, c, 1, 1] = 1.0
        # The encoder is given pixels in [0, 1].
        leave.weight[c, c, 1, 1], leave.bias[c] = 2.0, -1.0
    bend, _, add = vae.decoder.layers
    pixels = torch.linspace(-1.05, 1.05, HINGES + 1, dtype=torch.float64)
    squeezed = torch.tanh(pixels / 3) * 3
    slopes = pixels.diff() / squeezed.diff()
    turns = torch.cat([slopes[:1], slopes.diff()]) / 2
    for c in range(3):
        rows = slice(c * HINGES, (c + 1) * HINGES)
        bend.weight[rows, c, 1, 1], bend.bias[rows] = 1.0, -squeezed[:-1].float()
        add.weight[c, rows, 1, 1], add.bias[c] = turns.float(), float(pixels[0] + 1) / 2
    return vae.eval()


def build_scheduler() -> DDIMScheduler:
    """DiT's noise levels with v-prediction."""
    return DDIMScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def denoiser_stage(
    transformer: DiTTransformer2DModel, pictures: Tensor, labels: Tensor, recipe: Recipe
) -> Stage:
    """The transformer: v-prediction at stratified noise levels, pictures mirrored at random."""
    kept = build_scheduler().alphas_cumprod
    device, batch = pictures.device, recipe.batch

    def loss(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(pictures), (batch,), generator=rng)
        mirrored = (torch.rand(batch, 1, 1, 1, generator=rng) < 0.5).to(device)
        clean = pictures[rows.to(device)].float().div(127.5).sub(1)
        clean = torch.where(mirrored, clean.flip(-1), clean)
        strata = (torch.rand(1, generator=rng) + torch.arange(batch) / batch) % 1
        t = (strata * len(kept)).long()[torch.randperm(batch, generator=rng)]
        noise = torch.randn(clean.shape, generator=rng).to(device)
        dropped = torch.rand(batch, generator=rng) < recipe.class_dropout
        classes = torch.where(dropped, NO_CLASS, labels[rows]).to(device)
        signal = kept[t].sqrt().view(-1, 1, 1, 1).to(device)
        grain = (1 - kept[t]).sqrt().view(-1, 1, 1, 1).to(device)
        with half_precision(device):
            velocity = transformer(signal * clean + grain * noise, t.to(device), classes).sample
        return F.mse_loss(velocity.float(), signal * noise - grain * clean)

    return Stage(
        "denoiser", trainable("transformer", transformer), loss, recipe.lr, recipe.ema, recipe.seed
    )


def export(folder: Path, transformer: DiTTransformer2DModel) -> None:
    """Write an ordinary pipeline folder, weights in fp16."""
    pipe = DiTPipeline(
        transformer=transformer.half(),
        vae=pixel_vae().half(),
        scheduler=build_scheduler(),
    )
    pipe.save_pretrained(folder)
    index = folder / "model_index.json"
    names = {str(number): name for number, name in enumerate(CLASSES)}
    write_json(index, json.loads(index.read_text()) | {"id2label": names})
    for weights in folder.glob("*/*.safetensors"):
        weights.chmod(0o644)
    strip_local_paths(folder)
    write_json(folder / "captions.json", list(CLASSES))


def run(
    data: list[Path],
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
    pictures, labels = read_cifar(data, test=False)
    torch.manual_seed(recipe.seed)
    transformer = build_transformer(recipe).to(device)
    if device.type == "cpu":
        # PyTorch's fused attention takes twice as long here, there and back.
        for block in transformer.transformer_blocks:
            block.attn1.set_processor(AttnProcessor())
    stage = denoiser_stage(transformer, pictures.to(device), labels, recipe)
    train(stage, out, minutes, recipe.batch, timer=timer, checkpoint_seconds=checkpoint_seconds)
    if export_to:
        export(export_to, transformer)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="tar archive or Parquet files")
    parser.add_argument("--out", type=Path, required=True, help="work folder, resumed if it exists")
    parser.add_argument("--export", type=Path, help="write the finished pipeline here")
    parser.add_argument("--minutes", type=float, default=180.0)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--layers", type=int, default=Recipe.layers)
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
    recipe = Recipe(args.batch, args.lr, layers=args.layers, heads=args.heads, seed=args.seed)
    run(args.data, args.out, args.minutes, recipe, args.export, args.device)


if __name__ == "__main__":
    main()
