"""Pretrain a small image encoder on rendered people: who is it, seen twice, and which face shape.

For bases whose encoder cannot be downloaded; SD1.5 uses a pretrained ViT-H (paper section 4.2).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from hyperdb.hypernet import EncoderConfig


@dataclass
class Config:
    """Two photos of each of `batch` people a step: a supervised contrastive loss, and regression of their morphs."""

    data: str = "data/heads"
    name: str = "default"
    out: str = "runs/train_encoder/default"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    steps: int = 1200
    batch: int = 32
    rate: float = 1e-3
    temperature: float = 0.1
    morph_weight: float = 1.0
    held_out: int = 100  # people kept aside to measure on
    save_every: int = 200
    seed: int = 0


def run(config: Config) -> Path:
    """Write the encoder's weights to `out/encoder.safetensors`."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from hyperdb.data.people import load_people
    from hyperdb.hypernet.encoder import Encoder
    from hyperdb.runtime.errors import UserError
    from hyperdb.runtime.files import save_json, save_tensors
    from hyperdb.runtime.loop import train
    from hyperdb.runtime.optim import EMA, Schedule, adamw
    from hyperdb.runtime.seed import derive, generator

    # --- data: people with at least two photos
    people = load_people(config.data)
    pairs = [rows for rows in people.photos if len(rows) >= 2]
    if len(pairs) <= config.held_out + config.batch:
        raise UserError(f"{config.data} has {len(pairs)} people with two photos; render more or lower held_out, batch")
    held, pairs = pairs[-config.held_out :], pairs[: -config.held_out]
    morphs = people.labels["coefficients"].float()
    morphs = (morphs - morphs.mean(0)) / morphs.std(0).clamp_min(1e-3)

    # --- model
    torch.manual_seed(derive(config.seed, "encoder weights"))  # the only way to seed timm's initialisation
    encoder = Encoder(config.encoder)
    project = torch.nn.Linear(encoder.dim, 128)
    regress = torch.nn.Linear(encoder.dim, morphs.shape[1])
    params = [*encoder.parameters(), *project.parameters(), *regress.parameters()]
    def pooled(images: torch.Tensor) -> torch.Tensor:
        # the fused attention's backward is slow in bf16 on a CPU
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel([SDPBackend.MATH]):
            return encoder(images)[:, 0].float()

    # --- train
    def backward(step: int) -> dict[str, torch.Tensor]:
        g = generator(config.seed, "encoder", step)
        who = torch.randperm(len(pairs), generator=g)[: config.batch].tolist()
        rows = torch.stack([pairs[i][torch.randperm(len(pairs[i]), generator=g)[:2]] for i in who], 1).flatten()
        # light, white balance, left and right and a few pixels of shift say nothing of who it is
        gain = 1 + 0.15 * torch.randn(len(rows), 3, 1, 1, generator=g)
        flip = torch.rand(len(rows), 1, 1, 1, generator=g) < 0.5
        shift = torch.randint(-3, 4, (len(rows), 2), generator=g).tolist()
        images = torch.stack([x.roll(s, (1, 2)) for x, s in zip(people.images[rows], shift, strict=True)])
        h = pooled((torch.where(flip, images.flip(-1), images).float() * gain).clamp(0, 255))
        z = F.normalize(project(h), dim=1)
        logits = z @ z.mT / config.temperature - 1e4 * torch.eye(len(z))
        partner = torch.arange(len(z)).roll(len(z) // 2)
        contrast = F.cross_entropy(logits, partner)
        shape = config.morph_weight * F.mse_loss(regress(h), morphs[rows])
        (contrast + shape).backward()
        return {"contrast": contrast.detach(), "shape": shape.detach()}

    out = Path(config.out)
    optimizer, ema = adamw(params, config.rate, 0.05), EMA(params, 0.995)
    schedule = Schedule(config.steps, warmup=100)
    whole = {**asdict(config), "made_from": people.digest}
    train("encoder", out, whole, schedule, optimizer, ema, backward, save_every=config.save_every)

    # --- measure on held-out people, write
    encoder.eval()
    with torch.no_grad():
        first, second = (pooled(people.images[torch.stack([rows[k] for rows in held])]) for k in (0, 1))
        z1, z2 = (F.normalize(project(h), dim=1) for h in (first, second))
        rank1 = ((z1 @ z2.mT).argmax(1) == torch.arange(len(held))).float().mean().item()
        error = F.mse_loss(regress(first), morphs[torch.stack([rows[0] for rows in held])]).item()
    save_tensors(out / "encoder.safetensors", encoder.vit.state_dict())
    report = {"rank1_held_out": rank1, "people_held_out": len(held), "morph_r2": round(1 - error, 4)}
    save_json(out / "report.json", {**report, "steps": config.steps, "data": people.digest})
    print(f"rank-1 of {len(held)} unseen people {rank1:.2f}, morph R2 {1 - error:.2f}; encoder in {out}")
    return out
