"""Train the judge of style and place on rendered people, and measure it on people it has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyperdb.diffusion import DiffusionConfig
from hyperdb.runtime.paths import FilePath

WRITES = ("checkpoint.safetensors", "journal.jsonl", "report.json", "judge.safetensors")
KEPT = "its last checkpoint is kept"


@dataclass(kw_only=True)
class Config:
    """What the judge learns from, and how it is trained.

    It learns to name the style and the place of rendered pictures. Half of the pictures go through the autoencoder of
    the base in `diffusion` first, because every generated picture, which it is to judge, has come through that too.
    """

    diffusion: DiffusionConfig
    data: FilePath = "data/heads"  # rendered people: a folder of `hyperdb render_heads`
    held_out: int = 200  # people kept aside to measure on
    name: str = "default"  # of the run, the last part of `out`
    out: FilePath = "runs/train_judge/default"  # folder that is written
    steps: int = 400  # of the optimiser, in all
    batch: int = 64  # pictures in each step
    rate: float = 2e-3  # AdamW's learning rate, after a warm-up of 50 steps and before its decay
    save_every: int = 200  # steps from one checkpoint to the next
    seed: int = 0  # of the first weights, the batches and the noise on the pictures


def run(config: Config) -> Path:
    """Write `out/judge.safetensors` and `out/report.json` with the held-out accuracies."""
    import torch
    import torch.nn.functional as F

    from hyperdb.data.people import latent_moments, load_people
    from hyperdb.metrics.obedience import Judge
    from hyperdb.runtime.errors import UserError
    from hyperdb.runtime.files import save_json
    from hyperdb.runtime.loop import train
    from hyperdb.runtime.optim import EMA, Schedule, adamw
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.precision import autocast
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.recipe import recipe
    from hyperdb.runtime.seed import derive, generator

    # --- data
    base = config.diffusion.load()
    people = load_people(config.data, size=config.diffusion.size)
    if "style" not in people.labels or people.identities <= config.held_out:
        raise UserError(f"{config.data} must hold rendered people, more than held_out={config.held_out}")
    moments = latent_moments(base, people, Path(config.data))
    labels = {name: people.labels[name] for name in ("style", "place")}
    seen = (people.identity < people.identities - config.held_out).nonzero()[:, 0]
    held = (people.identity >= people.identities - config.held_out).nonzero()[:, 0]

    # --- train
    torch.manual_seed(derive(config.seed, "judge weights"))  # the only way to seed timm's initialisation
    judge = Judge({name: people.names[name] for name in labels}).to(base.device).train()

    def backward(step: int) -> dict[str, torch.Tensor]:
        g = generator(config.seed, "judge", step)
        index = seen[torch.randint(0, len(seen), (config.batch,), generator=g)]
        half = config.batch // 2
        images = torch.cat([base.decode(moments[index[:half], 0].float()), people.images[index[half:]]]).float()
        gain = 1 + 0.05 * torch.randn(len(images), 3, 1, 1, generator=g)
        grain = 4 * torch.randn(images.shape, generator=g) * torch.rand(len(images), 1, 1, 1, generator=g)
        with autocast(base.device, torch.float32 if base.device.type == "cpu" else torch.bfloat16):
            logits = judge.logits((images * gain + grain).clamp(0, 255).to(base.device))
        right = {name: labels[name][index].to(base.device) for name in logits}
        terms = {name: F.cross_entropy(x, right[name], label_smoothing=0.05) for name, x in logits.items()}
        torch.stack(list(terms.values())).sum().backward()
        return terms

    out = Path(config.out)
    params = list(judge.parameters())
    optimizer, ema = adamw(params, config.rate, 0.02), EMA(params, 0.99)
    schedule = Schedule(config.steps, warmup=50)
    whole = {**recipe(config), "made_from": [people.digest, base.digest]}
    claim(out, WRITES, whole)
    train("judge", out, whole, schedule, optimizer, ema, backward, save_every=config.save_every)

    # --- measure on unseen people, write
    judge.cpu().eval()
    report: dict[str, object] = {"people_held_out": config.held_out, "pictures_held_out": len(held)}
    for kind, images in (("renders", people.images[held]), ("reconstructions", base.decode(moments[held, 0].float()))):
        found = judge(images)
        accuracy = {name: round((found[name] == labels[name][held]).float().mean().item(), 4) for name in labels}
        report[f"accuracy_{kind}"] = accuracy
        print(f"{kind}: " + ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items()))
    made_from = {"data": people.digest, "base": base.digest}
    judge.save(out / "judge.safetensors", {**made_from, "steps": str(config.steps)})
    save_json(out / "report.json", {**report, "steps": config.steps, **made_from, **provenance()})
    print(f"judge in {out / 'judge.safetensors'}")
    return out
