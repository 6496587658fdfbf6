"""Train the embedded base's autoencoder on rendered people."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.hypernet import EncoderConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath, resolve
from hyperdb.runtime.track import Track, check_tracker, tracked

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hyperdb.hypernet.encoder import Encoder


WRITES = ("checkpoint.safetensors", "journal.jsonl", "report.json", "reconstructions.png", "vae/*")
KEPT = "its last checkpoint is kept"


@dataclass
class Config:
    """What the autoencoder learns from, what it looks like, and what its loss is made of.

    It is trained to give back rendered pictures: their pixels, their edges, and their colours at coarser resolutions.
    Two more terms are off by default. With `adversarial_weight` above 0 a discriminator that looks at small patches is
    trained along, and the autoencoder learns to fool it (Esser et al. 2021). With `feature_weight` above 0 pictures
    are also compared by the features of `encoder`, a network of `hyperdb train_encoder`.

    A training can go on from the autoencoder in `init`, which then decides all sizes. `decoder_only=true` leaves the
    encoder of `init` as it is. The latents stay the same, so every base that was trained on them stays valid.
    """

    data: FilePath = "data/heads"  # rendered people: a folder of `hyperdb render_heads`
    init: FilePath | None = None  # folder of an autoencoder to go on from; null: a new one
    name: str = "default"  # of the run, the last part of `out`
    out: FilePath = "runs/train_autoencoder/default"  # folder that is written
    # widths of the levels; each after the first halves the side, so four levels are f = 8
    channels: list[int] = field(default_factory=lambda: [32, 64, 128, 128])
    latent_channels: int = 8  # channels of a latent; 4 in Stable Diffusion
    steps: int = 2000  # of the optimiser, in all
    batch: int = 16  # pictures in each step
    rate: float = 1.5e-3  # AdamW's learning rate, after a warm-up of 100 steps and before its decay
    kl: float = 3e-4  # weight of the divergence of the latents from a standard normal distribution
    face_weight: float = 1.2  # extra weight of the middle of the frame, where the face is
    gradient_weight: float = 2.0  # weight of the differences between neighbouring pixels: of edges
    crop: int | None = None  # side in pixels of the random squares to train on; null: whole pictures
    decoder_only: bool = False  # train the decoder of `init` alone
    adversarial_weight: float = 0.0  # weight of fooling the discriminator; 0: there is none
    feature_weight: float = 0.0  # weight of the difference of the encoder's features; 0: they are not compared
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    ema: float = 0.995  # decay of the running average of the weights, which is what is measured and written
    held_out: int = 256  # pictures kept aside to measure on, with all others of the same people
    save_every: int = 250  # steps from one checkpoint to the next
    tracker: str | None = None  # wandb, tensorboard or trackio; null: nobody watches
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # of the first weights, the batches and the noise

    def __post_init__(self) -> None:
        check_tracker(self.tracker)
        if self.held_out < 1:
            raise UserError(f"held_out={self.held_out}: expected at least 1 picture to measure on")
        if self.crop is not None and (self.crop < 16 or self.crop % 2 ** (len(self.channels) - 1)):
            raise UserError(f"crop={self.crop}: expected a multiple of {2 ** (len(self.channels) - 1)}, at least 16")
        if self.decoder_only and self.init is None:
            raise UserError("decoder_only=true needs init=FOLDER, the autoencoder whose latents it keeps")
        if self.feature_weight > 0 and self.encoder.weights is None:
            raise UserError("feature_weight > 0 needs encoder.weights=FILE of `hyperdb train_encoder`")


def _edges(x: Tensor) -> Tensor:
    import torch

    return torch.cat([x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]], 1)


def _discriminator() -> nn.Module:
    """Return a network that tells renders from reconstructions patch by patch (Isola et al. 2017, PatchGAN)."""
    from torch import nn

    layers: list[nn.Module] = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
    for width in (64, 128):
        layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(256, 1, 4, 1, 1))


def _unlike(encoder: Encoder, x: Tensor, y: Tensor) -> Tensor:
    """Return how far pictures in [-1, 1] are apart by the directions of an encoder's features, at every resolution."""
    import torch
    import torch.nn.functional as F

    maps: list[Tensor] = []
    stages = [encoder.net.get_submodule(info["module"]) for info in encoder.net.feature_info]
    hooks = [stage.register_forward_hook(lambda _module, _inputs, out: maps.append(out)) for stage in stages]
    encoder.net.forward_features(encoder.pixels((torch.cat([x, y]) + 1) * 127.5))
    for hook in hooks:
        hook.remove()
    pairs = [F.normalize(m.float(), dim=1).chunk(2) for m in maps]
    return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).sum()


@tracked
def run(config: Config, track: Track) -> Path:
    """Train from `config.data`; write a diffusers `AutoencoderKL` to `out/vae` and return that folder."""
    import torch
    import torch.nn.functional as F
    from diffusers import AutoencoderKL

    from hyperdb.data.people import load_people
    from hyperdb.diffusion.base import pick_device
    from hyperdb.hypernet.encoder import Encoder
    from hyperdb.runtime.files import hash_files, save_json, writing
    from hyperdb.runtime.loop import train
    from hyperdb.runtime.optim import EMA, Schedule, adamw
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.precision import autocast
    from hyperdb.runtime.recipe import recipe
    from hyperdb.runtime.seed import derive, generator

    # --- data, model
    people = load_people(config.data)
    # whole people are held out: those of the last `held_out` pictures
    first = people.identity[-config.held_out :][0]
    seen, held = (part.nonzero()[:, 0] for part in (people.identity < first, people.identity >= first))
    device = pick_device(config.device)
    if len(seen) == 0:
        raise UserError(f"{config.data} has no people beside the {len(held)} held-out pictures; render more")
    size = people.images.shape[-1]
    if config.crop is not None and config.crop > size:
        raise UserError(f"crop={config.crop}: the pictures of {config.data} have {size} px")
    levels = len(config.channels)
    torch.manual_seed(derive(config.seed, "autoencoder weights"))  # the only way to seed diffusers' initialisation
    if config.init is not None:
        if not (resolve(config.init) / "config.json").is_file():
            raise UserError(f"no autoencoder at {config.init}; set init to the vae folder of a base, or to null")
        vae = AutoencoderKL.from_pretrained(resolve(config.init))
    else:
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(config.channels),
            layers_per_block=1,
            latent_channels=config.latent_channels,
            norm_num_groups=8,
            sample_size=size,
            mid_block_add_attention=False,
        )
    out = Path(config.out)
    axis = torch.linspace(-1, 1, size)
    distance = axis[:, None] ** 2 + axis[None, :] ** 2
    weight = (0.6 + config.face_weight * torch.exp(-distance / 0.3)).to(device)
    vae.to(device, memory_format=torch.channels_last)
    if config.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    discriminator = _discriminator().to(device) if config.adversarial_weight > 0 else None
    encoder = None
    if config.feature_weight > 0:
        encoder = Encoder(config.encoder).to(device).requires_grad_(False).eval()

    # --- train
    def backward(step: int) -> dict[str, Tensor]:
        g = generator(config.seed, "autoencoder", step)
        drawn = g if device.type == "cpu" else generator(config.seed, "autoencoder noise", step, device=device)
        index = torch.randint(0, len(seen), (config.batch,), generator=g)
        flipped = torch.rand(config.batch, 1, 1, 1, generator=g) < 0.5
        corner = torch.randint(0, size - crop + 1, (config.batch, 2, 1), generator=g) + torch.arange(crop)
        at = (torch.arange(config.batch)[:, None, None], corner[:, 0, :, None], corner[:, 1, None, :])
        x = people.images[seen[index]].to(device).float() / 127.5 - 1
        x = torch.where(flipped.to(device), x.flip(-1), x).movedim(1, 3)[at].movedim(3, 1)  #  [B, 3, crop, crop]
        with autocast(device, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=drawn, device=device)
            y = vae.decode(z).sample
        y = y.float()
        terms = {
            "pixels": ((y - x).abs() * weight[at[1:]][:, None]).mean(),
            "edges": config.gradient_weight * F.l1_loss(_edges(y), _edges(x)),
            "colour": torch.stack([F.l1_loss(F.avg_pool2d(y, k), F.avg_pool2d(x, k)) for k in (2, 4, 8)]).mean(),
            "kl": config.kl * posterior.kl().float().mean() / posterior.mean[0].numel(),
        }
        if encoder is not None:
            with autocast(device, torch.bfloat16):
                terms["features"] = config.feature_weight * _unlike(encoder, x, y).float()
        if discriminator is not None:
            discriminator.requires_grad_(False)
            terms["fooled"] = -config.adversarial_weight * min(1, step / 500) * discriminator(y).mean()
        torch.stack(list(terms.values())).sum().backward()
        if discriminator is not None:
            discriminator.requires_grad_(True)
            real, made = discriminator(torch.cat([x, y.detach()])).chunk(2)
            hinge = F.relu(1 - real).mean() + F.relu(1 + made).mean()
            hinge.backward()
            terms["discriminator"] = hinge
        return terms

    crop = config.crop or size
    params = [p for p in vae.parameters() if p.requires_grad]
    params += list(discriminator.parameters()) if discriminator is not None else []
    optimizer, ema = adamw(params, config.rate, 1e-3), EMA(params, config.ema)
    schedule = Schedule(config.steps, warmup=100)
    begun_from = hash_files(sorted(Path(config.init).glob("*.safetensors"))) if config.init is not None else None
    whole = {**recipe(config), "made_from": [people.digest, begun_from]}
    if encoder is not None:
        whole["features"] = hash_files([resolve(str(config.encoder.weights))])
    claim(out, WRITES, whole)
    train("autoencoder", out, whole, schedule, optimizer, ema, backward, save_every=config.save_every, track=track)

    # --- measure, write
    vae.eval()
    with torch.no_grad():
        shown = (people.images[rows].to(device).float() / 127.5 - 1 for rows in seen[:2048].split(128))
        means = torch.cat([vae.encode(p).latent_dist.mean for p in shown])
        x = people.images[held].float() / 127.5 - 1
        parts = x.split(64)
        y = torch.cat([vae.decode(vae.encode(p.to(device)).latent_dist.mean).sample.clamp(-1, 1).cpu() for p in parts])
    if not config.decoder_only:
        vae.register_to_config(scaling_factor=round(1 / means.std().item(), 5))
    psnr = (-10 * torch.log10(((x - y) / 2).square().mean())).item()
    with writing(out / "vae"):
        vae.to("cpu", memory_format=torch.contiguous_format).save_pretrained(out / "vae")
    save_json(out / "vae" / "made_from.json", {"data": people.digest})
    save_json(
        out / "report.json",
        {
            "steps": config.steps,
            "psnr_held_out": round(psnr, 2),
            "parameters": vae.num_parameters(),
            "data": people.digest,
            "init": begun_from,
        },
    )
    _picture(out / "reconstructions.png", x, y)
    track.log(config.steps, {"psnr_held_out": psnr})
    track.picture(config.steps, "reconstructions", out / "reconstructions.png")
    print(f"held-out PSNR {psnr:.2f} dB; autoencoder in {out / 'vae'}, pictures in {out / 'reconstructions.png'}")
    return out


def _picture(path: Path, x: Tensor, y: Tensor) -> None:
    """Write pairs of originals (above) and reconstructions (below)."""
    import torch
    from torchvision.utils import save_image

    from hyperdb.runtime.files import atomic

    rows = [t for k in range(0, 48, 16) for t in (x[k : k + 16], y[k : k + 16])]
    with atomic(path) as temporary:
        save_image(torch.cat(rows) / 2 + 0.5, temporary, nrow=16)
