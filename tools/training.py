"""What it takes to train a small text-to-image pipeline: its parts, stages that resume, Muon, export."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from regrow.lab.measure.machine import machine

PAUSE_SECONDS = 20.0
# Share of the budget at the full learning rate.
CONSTANT = 0.2


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights, apart from the pictures and the time given."""

    batch: int = 16
    lr: float = 2e-3
    vae_lr: float = 4e-3
    ema: float = 0.998
    caption_dropout: float = 0.1
    channels: tuple[int, int, int] = (64, 128, 256)
    text_width: int = 128
    tokens: int = 24
    seed: int = 0


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz steps (Jordan et al., 2024)."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].mul_(momentum).add_(p.grad)
                nesterov = p.grad.add(average, alpha=momentum)
                update = orthogonalised(nesterov.reshape(p.shape[0], -1))
                scale = 0.2 * max(update.shape) ** 0.5
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update.reshape(p.shape).to(p.dtype), alpha=-lr * scale)


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of a matrix towards one, in bf16."""
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.T if tall else x


def takes_muon(name: str, p: nn.Parameter) -> bool:
    """Inner matrices and convolutions; embeddings, tables and what is outermost go to AdamW."""
    outer = ("embedding", "conv_in", "conv_out", "pos_embed", "proj_out_2")
    outer += ("transformer.proj_out.weight", "scale_shift_table")
    return p.ndim >= 2 and not any(part in name for part in outer)


class Stage:
    """One network in training: parameters, their average, optimisers, random numbers, clock."""

    def __init__(
        self,
        name: str,
        parameters: dict[str, nn.Parameter],
        loss: Callable[[torch.Generator], Tensor],
        lr: float,
        ema: float,
        seed: int,
    ) -> None:
        self.name = name
        self.parameters = parameters
        self.loss = loss
        self.lr = lr
        self.ema_decay = ema
        self.average = {n: p.detach().clone() for n, p in parameters.items()}
        self.step = 0
        self.seconds = 0.0
        self.rng = torch.Generator().manual_seed(seed)
        muon = [p for n, p in parameters.items() if takes_muon(n, p)]
        self.rest = [p for n, p in parameters.items() if not takes_muon(n, p)]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(muon, lr),
            torch.optim.AdamW(self.rest, lr, betas=(0.9, 0.99), weight_decay=0.01),
        ]

    def advance(self, fraction: float) -> float:
        """One training step at this fraction of the budget; returns the loss."""
        lr = self.lr * min(1.0, (self.step + 1) / 100) * decay(fraction)
        loss = self.loss(self.rng)
        loss.backward()
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        keep = min(self.ema_decay, (1 + self.step) / (20 + self.step))
        current = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - keep)
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged weights into the network."""
        for name, p in self.parameters.items():
            p.copy_(self.average[name])

    def tensors(self) -> dict[str, Tensor]:
        """Everything with a shape that a resumed run needs."""
        out = {"rng": self.rng.get_state()}
        names = {p: n for n, p in self.parameters.items()}
        out |= {f"weight/{n}": p.detach() for n, p in self.parameters.items()}
        out |= {f"average/{n}": t for n, t in self.average.items()}
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                out |= {f"optimizer/{names[p]}/{key}": t for key, t in state.items()}
        return {name: t.contiguous() for name, t in out.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        self.rng.set_state(tensors["rng"])
        for name, p in self.parameters.items():
            p.copy_(tensors[f"weight/{name}"])
            self.average[name].copy_(tensors[f"average/{name}"])
        owners = {id(p): o for o in self.optimizers for g in o.param_groups for p in g["params"]}
        for path, t in tensors.items():
            if path.startswith("optimizer/"):
                name, key = path.removeprefix("optimizer/").rsplit("/", 1)
                p = self.parameters[name]
                kept = torch.empty_like(p).copy_(t) if t.shape == p.shape else t
                owners[id(p)].state[p][key] = kept


def decay(fraction: float) -> float:
    """Learning-rate factor: constant for a fifth of the budget, then falling to 2%."""
    return 1.0 if fraction < CONSTANT else max(0.02, (1 - fraction) / (1 - CONSTANT))


class Checkpoints:
    """The newest state of one stage in a folder: a JSON file naming a safetensors file."""

    def __init__(self, folder: Path, stage: str) -> None:
        self.folder = folder
        self.stage = stage
        self.index = folder / f"{stage}.json"
        self.log = folder / f"{stage}.log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, stage: Stage, done: bool) -> None:
        """Write the tensors, then switch the index over, so that a kill never leaves half a file."""
        name = f"{self.stage}-{stage.step:07d}.safetensors"
        partial = self.folder / f"{name}.partial"
        save_file(stage.tensors(), partial)
        os.replace(partial, self.folder / name)
        scalars = {"tensors": name, "step": stage.step, "seconds": stage.seconds, "done": done}
        write_json(self.index, scalars)
        for old in self.folder.glob(f"{self.stage}-*.safetensors*"):
            if old.name != name:
                old.unlink()

    def restore(self, stage: Stage) -> bool:
        """Load the newest state, if any, and forget what was logged after it; True when done."""
        if not self.index.exists():
            self.log.unlink(missing_ok=True)
            return False
        scalars = json.loads(self.index.read_text())
        stage.load(load_file(self.folder / scalars["tensors"]))
        stage.step, stage.seconds = scalars["step"], scalars["seconds"]
        records = [r for r in read_log(self.log) if r["step"] <= stage.step]
        self.log.write_text("".join(json.dumps(r) + "\n" for r in records))
        return bool(scalars["done"])

    def record(self, **values: float) -> None:
        """Append one line to the log."""
        with self.log.open("a") as file:
            file.write(json.dumps(values) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one go."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of a JSONL log; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def train(
    stage: Stage,
    folder: Path,
    minutes: float,
    batch: int,
    timer: Callable[[], float] = time.perf_counter,
    checkpoint_seconds: float = 120.0,
    log_steps: int = 50,
) -> None:
    """Run or resume a stage until its active seconds are spent, then use its averaged weights."""
    files = Checkpoints(folder, stage.name)
    budget = minutes * 60
    # Given more minutes, a finished stage goes on.
    done = files.restore(stage) and stage.seconds >= budget
    saved = stage.seconds
    seen = (stage.step, stage.seconds)
    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task(stage.name, total=budget, completed=stage.seconds, state="")
        while not done:
            start = timer()
            losses.append(stage.advance(stage.seconds / budget))
            lap = timer() - start
            # A step this long was a stopped process, not work.
            stage.seconds += lap if lap <= PAUSE_SECONDS else 0.0
            done = stage.seconds >= budget
            if stage.step % log_steps == 0 or done:
                rate = (stage.step - seen[0]) * batch / max(stage.seconds - seen[1], 1e-9)
                loss = sum(losses) / len(losses)
                files.record(
                    step=stage.step,
                    seconds=round(stage.seconds, 2),
                    images_per_second=round(rate, 2),
                    loss=round(loss, 6),
                )
                state = f"step {stage.step}  {rate:.1f} img/s  loss {loss:.4f}"
                progress.update(task, completed=stage.seconds, state=state)
                seen, losses = (stage.step, stage.seconds), []
            if done or stage.seconds - saved >= checkpoint_seconds:
                files.save(stage, done)
                saved = stage.seconds
    stage.use_average()


def processor_seconds() -> float:
    """Processor time per thread: on a machine shared with others, waiting is not training."""
    return time.process_time() / torch.get_num_threads()


def build_unet(recipe: Recipe) -> UNet2DConditionModel:
    """The denoiser."""
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=recipe.channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=recipe.text_width,
    )


def build_text_encoder(recipe: Recipe, vocabulary: int) -> CLIPTextModel:
    """A two-layer CLIP text transformer, trained together with the denoiser."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=recipe.text_width,
            intermediate_size=2 * recipe.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=recipe.tokens,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            projection_dim=recipe.text_width,
        )
    )


def build_tokenizer(captions: list[str], tokens: int) -> PreTrainedTokenizerFast:
    """One token a word of the captions; an unknown word reads as the end token."""
    split = pre_tokenizers.Split(Regex(r"\w+"), "removed", invert=True)
    words = sorted({w for c in captions for w, _ in split.pre_tokenize_str(c.lower())})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=tokens,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="</s>",
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Token ids as the pipeline makes them, (N, tokens)."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise levels, scaled to end in pure noise (Lin et al., 2024), with v-prediction.

    Unscaled, the last level shows the mean colour, which sampling from pure noise then gets wrong.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def trainable(prefix: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module under prefixed names."""
    return {f"{prefix}.{n}": p for n, p in module.named_parameters()}


def half_precision(device: torch.device) -> torch.autocast:
    """bf16 autocast on this device."""
    return torch.autocast(device.type, torch.bfloat16)


@torch.no_grad()
def encode(vae: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """Latents of all pictures, in fp32."""
    return torch.cat([vae.encoder(x) for x in pictures.split(64)])


@torch.no_grad()
def normalise_latents(vae: AutoencoderTiny, pictures: Tensor) -> None:
    """Give each latent channel mean 0 and deviation 1, inside the outer convolutions."""
    z = encode(vae, pictures)
    mean, deviation = z.mean((0, 2, 3)), z.std((0, 2, 3))
    last, first = vae.encoder.layers[-1], vae.decoder.layers[0]
    last.weight.div_(deviation.view(-1, 1, 1, 1))
    last.bias.sub_(mean).div_(deviation)
    first.bias.add_((first.weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3)))
    first.weight.mul_(deviation.view(1, -1, 1, 1))


def export(
    folder: Path,
    vae: AutoencoderTiny,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: PreTrainedTokenizerFast,
    captions: list[str],
) -> None:
    """Write an ordinary pipeline folder: U-Net and VAE in fp16, the text encoder in fp32."""
    pipe = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.chmod(0o644)
    index = folder / "model_index.json"
    # The one name of this tokenizer class that both transformers 4 and 5 know.
    entries = json.loads(index.read_text())
    write_json(index, entries | {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]})
    strip_local_paths(folder)
    write_json(folder / "captions.json", captions)


def strip_local_paths(folder: Path) -> None:
    """Drop where the parts were loaded from, and keys that their class does not know."""
    for config in folder.glob("*/config.json"):
        entries = json.loads(config.read_text())
        entries.pop("_name_or_path", None)
        if entries.get("_class_name") == "AutoencoderTiny":
            entries.pop("block_out_channels", None)
        write_json(config, entries)


def describe(
    recipe: Any,
    minutes: dict[str, float],
    objects: int,
    device: torch.device,
) -> dict[str, Any]:
    """The settings of a run as plain data, with the machine it runs on."""
    return {
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "minutes": minutes,
        "objects": objects,
        "device": device.type,
        "processor": processor_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def processor_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the matrix instructions it has."""
    found = machine(device)
    bf16 = "amx_bf16" if found["amx"] else "avx512_bf16" if found["avx512_bf16"] else None
    return found["gpu"] or (f"{found['processor']} ({bf16})" if bf16 else found["processor"])


def check_same_run(path: Path, settings: dict[str, Any]) -> None:
    """Refuse another run's checkpoints; only the minutes may change between a kill and a resume."""
    if path.exists():
        before = json.loads(path.read_text())
        for key in ("recipe", "objects"):
            if before[key] != settings[key]:
                raise SystemExit(f"{path}: {key} was {before[key]}, now {settings[key]}; use another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


@torch.no_grad()
def decoded(vae: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """Pictures ``(B, 3, H, W)`` in [0, 1] as an autoencoder shows them."""
    latents = vae.encoder(pictures.to(vae.device, vae.dtype) * 2 - 1)
    return vae.decoder(latents).float().clamp(-1, 1).add(1).div(2).cpu()
