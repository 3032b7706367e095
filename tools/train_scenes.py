"""Train the text-to-image model of emoji scenes, on a CPU or one CUDA GPU.

    npm pack @iconify-json/noto@1.2.9
    python tools/train_scenes.py --data noto.tgz --out work/scenes --export work/scenes/model

Three stages run one after the other, each under its own budget of minutes: an autoencoder, its decoder on
the latents, and the U-Net with its text encoder; every picture is composed anew. Killed at any moment, the
same command goes on from the last checkpoint. `--start DIR` begins with the U-Net and the words of another
pipeline of the same shape; if its autoencoder is one of pictures of half the size, ours is held to the same
latents, so that its U-Net keeps what it knows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from emoji_scenes import (
    COLOURS,
    OBJECTS,
    PLACES,
    SIDE,
    SIZES,
    Sprites,
    captions,
    compose,
    read_sprites,
    scene,
)
from torch import Tensor, nn
from training import (
    Recipe,
    Stage,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    check_same_run,
    describe,
    encode,
    export,
    half_precision,
    normalise_latents,
    processor_seconds,
    token_ids,
    train,
    trainable,
    write_json,
)
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from regrow import zoo
from regrow.lab.memory import keep_freed_memory

WORDS = (*SIZES, *PLACES, "and", "on", "to")
SEEDS = 2**62
STATISTICS = 256
PROMPTS = 2048


class Scenes:
    """Draws pictures and captions, each from a seed of its own.

    Args:
        sprites: pictures of the objects.
        names: their names.
    """

    def __init__(self, sprites: Sprites, names: tuple[str, ...]) -> None:
        self.sprites, self.names = sprites, names

    def draw(self, count: int, rng: torch.Generator) -> tuple[list[str], Tensor]:
        """Captions and their pictures ``(count, 3, H, W)`` in [-1, 1], channels last."""
        seeds = torch.randint(SEEDS, (count,), generator=rng).tolist()
        scenes = [scene(seed, len(self.names)) for seed in seeds]
        pictures = compose(scenes, self.sprites, SIDE).mul(2).sub(1)
        texts = [s.caption.text(self.names) for s in scenes]
        return texts, pictures.contiguous(memory_format=torch.channels_last)


def build_vae() -> AutoencoderTiny:
    """A small autoencoder: 128x128 pictures to 32x32 latents of four channels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(0, 1, 3),
        num_decoder_blocks=(3, 2, 0),
        latent_channels=4,
        upsampling_scaling_factor=2,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def vae_stage(
    vae: AutoencoderTiny, scenes: Scenes, recipe: Recipe, teacher: AutoencoderTiny | None = None
) -> Stage:
    """Encoder and decoder; a teacher's latents are those of the picture at half its size."""

    def loss(rng: torch.Generator) -> Tensor:
        x = scenes.draw(recipe.batch, rng)[1]
        with half_precision(x.device):
            latents = vae.encoder(x)
            error = F.mse_loss(vae.decoder(latents).float(), x)
            if teacher is not None:
                with torch.no_grad():
                    taught = teacher.encoder(F.avg_pool2d(x, 2))
                error = error + F.mse_loss(latents.float(), taught.float())
        return error

    return Stage("vae", trainable("vae", vae), loss, recipe.vae_lr, recipe.ema, recipe.seed + 1)


def decoder_stage(vae: AutoencoderTiny, scenes: Scenes, recipe: Recipe) -> Stage:
    """The decoder alone, on the normalised latents that the denoiser will produce."""

    def loss(rng: torch.Generator) -> Tensor:
        x = scenes.draw(recipe.batch, rng)[1]
        with half_precision(x.device):
            with torch.no_grad():
                latents = vae.encoder(x)
            y = vae.decoder(latents)
        return F.mse_loss(y.float(), x)

    names = trainable("decoder", vae.decoder)
    return Stage("decoder", names, loss, recipe.vae_lr, recipe.ema, recipe.seed + 2)


def denoiser_stage(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderTiny,
    tokenizer: PreTrainedTokenizerFast,
    scenes: Scenes,
    recipe: Recipe,
) -> Stage:
    """U-Net and text encoder together: v-prediction at stratified noise levels."""
    kept = build_scheduler().alphas_cumprod
    device, batch = scenes.sprites.device, recipe.batch

    def loss(rng: torch.Generator) -> Tensor:
        captions, pictures = scenes.draw(batch, rng)
        with torch.no_grad(), half_precision(device):
            clean = vae.encoder(pictures).float()
        strata = (torch.rand(1, generator=rng) + torch.arange(batch) / batch) % 1
        t = (strata * len(kept)).long()[torch.randperm(batch, generator=rng)]
        noise = torch.randn(clean.shape, generator=rng).to(device)
        dropped = (torch.rand(batch, generator=rng) < recipe.caption_dropout).tolist()
        texts = ["" if d else caption for d, caption in zip(dropped, captions, strict=True)]
        ids = token_ids(tokenizer, texts).to(device)
        signal = kept[t].sqrt().view(-1, 1, 1, 1).to(device)
        grain = (1 - kept[t]).sqrt().view(-1, 1, 1, 1).to(device)
        noisy = (signal * clean + grain * noise).contiguous(memory_format=torch.channels_last)
        with half_precision(device):
            words = text_encoder(ids).last_hidden_state
            velocity = unet(noisy, t.to(device), words).sample
        return F.mse_loss(velocity.float(), signal * noise - grain * clean)

    names = trainable("unet", unet) | trainable("text_encoder", text_encoder)
    return Stage("denoiser", names, loss, recipe.lr, recipe.ema, recipe.seed + 3)


@torch.no_grad()
def start_from(
    pipe: StableDiffusionPipeline,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Take over a pipeline's U-Net, and its text encoder with the words that both know."""
    unet.load_state_dict(pipe.unet.state_dict())
    known, ours = pipe.tokenizer.get_vocab(), tokenizer.get_vocab()
    theirs, target = pipe.text_encoder.state_dict(), text_encoder.state_dict()
    for name, value in target.items():
        if name.endswith("token_embedding.weight"):
            for word, row in ours.items():
                if word in known:
                    value[row] = theirs[name][known[word]]
        elif name.endswith("position_embedding.weight"):
            shared = min(len(value), len(theirs[name]))
            value[:shared] = theirs[name][:shared]
        elif value.shape == theirs[name].shape:
            value.copy_(theirs[name])
    text_encoder.load_state_dict(target)


def same_shape(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same parameters, but for their values."""
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (one, other)]
    return shapes[0] == shapes[1]


def inherit(vae: AutoencoderTiny, teacher: AutoencoderTiny) -> None:
    """Begin with the layers of a 2x autoencoder; new are the outermost of encoder and decoder."""
    inner = zip([*vae.encoder.layers][2:], [*teacher.encoder.layers][1:], strict=True)
    outer = zip([*vae.decoder.layers][:8], [*teacher.decoder.layers][:8], strict=True)
    for ours, theirs in (*inner, *outer):
        ours.load_state_dict(theirs.state_dict())


def run(
    data: Path,
    out: Path,
    minutes: dict[str, float],
    recipe: Recipe,
    objects: int,
    start: Path | None = None,
    export_to: Path | None = None,
    device: torch.device | None = None,
    timer: Callable[[], float] | None = None,
    checkpoint_seconds: float = 120.0,
) -> None:
    """All stages, resuming whatever of them already exists in `out`."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = OBJECTS[:objects]
    settings = describe(recipe, minutes, len(names), device)
    check_same_run(out / "run.json", settings)
    timer = timer or (time.perf_counter if device.type == "cuda" else processor_seconds)
    loop: dict[str, Any] = {"timer": timer, "checkpoint_seconds": checkpoint_seconds}
    scenes = Scenes(Sprites(read_sprites(data, names, SIDE), device), names)

    torch.manual_seed(recipe.seed)
    layout: dict[str, Any] = {"device": device, "memory_format": torch.channels_last}
    vae = build_vae().to(**layout)
    tokenizer = build_tokenizer([*OBJECTS, *COLOURS, *WORDS], recipe.tokens)
    text_encoder = build_text_encoder(recipe, len(tokenizer)).to(device)
    unet = build_unet(recipe).to(**layout)
    pictures = scenes.draw(STATISTICS, torch.Generator().manual_seed(recipe.seed))[1]
    first = zoo.load_from(start) if start else None
    if first:
        start_from(first, unet, text_encoder, tokenizer)
    if first and same_shape(vae, first.vae):
        vae.load_state_dict(first.vae.state_dict())
    else:
        teacher = first.vae.to(**layout).requires_grad_(False) if first else None
        if teacher:
            inherit(vae, teacher)
        train(vae_stage(vae, scenes, recipe, teacher), out, minutes["vae"], recipe.batch, **loop)
        if not teacher:
            normalise_latents(vae, pictures)
        train(decoder_stage(vae, scenes, recipe), out, minutes["decoder"], recipe.batch, **loop)
    report(vae, pictures)
    vae.requires_grad_(False)
    stage = denoiser_stage(unet, text_encoder, vae, tokenizer, scenes, recipe)
    train(stage, out, minutes["denoiser"], recipe.batch, **loop)
    if export_to:
        export(export_to, vae, unet, text_encoder, tokenizer, captions(names, PROMPTS))
        write_json(export_to / "objects.json", list(names))


@torch.no_grad()
def report(vae: AutoencoderTiny, pictures: Tensor) -> None:
    """Print how well the autoencoder gives pictures back, and how its latents are spread."""
    latents = encode(vae, pictures)
    again = torch.cat([vae.decoder(z) for z in latents.split(64)])
    error = (again.clamp(-1, 1) - pictures).square().mean((1, 2, 3)) / 4
    psnr = (-10 * error.log10()).mean()
    print(f"autoencoder {psnr:.1f} dB, latents {latents.mean():.2f} +- {latents.std():.2f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="npm tarball of @iconify-json/noto")
    parser.add_argument("--out", type=Path, required=True, help="work folder, resumed if it exists")
    parser.add_argument("--export", type=Path, help="write the finished pipeline here")
    parser.add_argument("--start", type=Path, help="pipeline to begin with")
    parser.add_argument("--objects", type=int, default=len(OBJECTS), help="how many of the objects")
    parser.add_argument("--minutes", type=float, default=180.0, help="for U-Net and text encoder")
    parser.add_argument("--vae-minutes", type=float, default=12.0)
    parser.add_argument("--decoder-minutes", type=float, default=4.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, help="cpu or cuda; default: cuda if any")
    return parser.parse_args()


def main() -> None:
    """Train as the command line says."""
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    minutes = {"vae": args.vae_minutes, "decoder": args.decoder_minutes, "denoiser": args.minutes}
    recipe = Recipe(seed=args.seed, lr=args.lr)
    run(args.data, args.out, minutes, recipe, args.objects, args.start, args.export, args.device)


if __name__ == "__main__":
    main()
