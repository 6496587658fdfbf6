"""Train the embedded base's autoencoder on rendered people."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Config:
    """`data`: rendered people; `channels`: the widths of the levels, each halving the side (so 3 levels are f = 4).

    `init`: an autoencoder's folder to go on from, whose sizes it keeps.
    """

    data: str = "data/heads"
    init: str | None = None
    name: str = "default"
    out: str = "runs/train_autoencoder/default"
    channels: list[int] = field(default_factory=lambda: [32, 64, 128])
    latent_channels: int = 4
    steps: int = 2000
    batch: int = 32
    rate: float = 1.5e-3
    kl: float = 3e-4
    face_weight: float = 1.2  # extra weight of the middle of the frame, where the face is
    gradient_weight: float = 2.0
    ema: float = 0.995
    held_out: int = 256  # images kept aside to measure on
    save_every: int = 250
    seed: int = 0


def _edges(x: Tensor) -> Tensor:
    import torch

    return torch.cat([x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]], 1)


def run(config: Config) -> Path:
    """Train from `config.data`; write a diffusers `AutoencoderKL` to `out/vae` and return that folder."""
    import torch
    import torch.nn.functional as F
    from diffusers import AutoencoderKL

    from hyperdb.data.people import load_people
    from hyperdb.runtime.errors import UserError
    from hyperdb.runtime.files import hash_files, save_json
    from hyperdb.runtime.loop import train
    from hyperdb.runtime.optim import EMA, Schedule, adamw
    from hyperdb.runtime.precision import autocast
    from hyperdb.runtime.seed import derive, generator

    # --- data, model
    people = load_people(config.data)
    # whole people are held out: those of the last `held_out` pictures
    first = people.identity[-config.held_out :][0]
    seen, held = people.images[people.identity < first], people.images[people.identity >= first]
    if len(seen) == 0:
        raise UserError(f"{config.data} has no people beside the {len(held)} held-out pictures; render more")
    size = people.images.shape[-1]
    levels = len(config.channels)
    torch.manual_seed(derive(config.seed, "autoencoder weights"))  # the only way to seed diffusers' initialisation
    if config.init is not None:
        if not (Path(config.init) / "config.json").is_file():
            raise UserError(f"no autoencoder at {config.init}; set init to the vae folder of a base, or to null")
        vae = AutoencoderKL.from_pretrained(config.init)
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
    weight = 0.6 + config.face_weight * torch.exp(-distance / 0.3)

    # --- train
    def backward(step: int) -> dict[str, Tensor]:
        g = generator(config.seed, "autoencoder", step)
        index = torch.randint(0, len(seen), (config.batch,), generator=g)
        x = seen[index].float() / 127.5 - 1
        x = torch.where(torch.rand(config.batch, 1, 1, 1, generator=g) < 0.5, x.flip(-1), x)
        with autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
            y = vae.decode(z).sample
        y = y.float()
        terms = {
            "pixels": ((y - x).abs() * weight).mean(),
            "edges": config.gradient_weight * F.l1_loss(_edges(y), _edges(x)),
            "colour": 0.5 * F.mse_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4)),
            "kl": config.kl * posterior.kl().float().mean() / posterior.mean[0].numel(),
        }
        torch.stack(list(terms.values())).sum().backward()
        return terms

    optimizer, ema = adamw(vae.parameters(), config.rate, 1e-3), EMA(vae.parameters(), config.ema)
    schedule = Schedule(config.steps, warmup=100)
    begun_from = hash_files(sorted(Path(config.init).glob("*.safetensors"))) if config.init is not None else None
    whole = {**asdict(config), "made_from": [people.digest, begun_from]}
    train("autoencoder", out, whole, schedule, optimizer, ema, backward, save_every=config.save_every)

    # --- measure, write
    vae.eval()
    with torch.no_grad():
        means = torch.cat([vae.encode(p.float() / 127.5 - 1).latent_dist.mean for p in seen[:2048].split(128)])
        x = held.float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    vae.register_to_config(scaling_factor=round(1 / means.std().item(), 5))
    psnr = (-10 * torch.log10(((x - y) / 2).square().mean())).item()
    vae.save_pretrained(out / "vae")
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
    print(f"held-out PSNR {psnr:.2f} dB; autoencoder in {out / 'vae'}, pictures in {out / 'reconstructions.png'}")
    return out


def _picture(path: Path, x: Tensor, y: Tensor) -> None:
    """Write pairs of originals (above) and reconstructions (below)."""
    import torch
    from torchvision.utils import save_image

    rows = [t for k in range(0, 48, 16) for t in (x[k : k + 16], y[k : k + 16])]
    save_image(torch.cat(rows) / 2 + 0.5, path, nrow=16)
