"""Pretrain a small image encoder on rendered people: from any photo, draw the person's portrait, tell the face's shape.

The portrait is a plain one (from the front, no expression, plain light and backdrop), so what the encoder must keep for
it is what can be seen of a person, each thing in proportion to how much of the picture it fills: hair, skin, clothes.
The shape is what people are told apart by when these are alike. For bases whose encoder cannot be downloaded; SD1.5
uses a pretrained ViT-H (paper section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.hypernet import EncoderConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath, resolve
from hyperdb.runtime.track import Track, check_tracker, tracked

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from hyperdb.data.people import People

TOGETHER = 8  # people whose portraits a process renders before it is given others
STATISTICS_PHOTOS = 2048  # that batch normalisation's means and variances are taken from


WRITES = ("checkpoint.safetensors", "journal.jsonl", "report.json", "encoder.safetensors", "portraits.safetensors")
KEPT = "its last checkpoint is kept"


@dataclass
class Config:
    """What the encoder learns from, and how it is trained.

    From the mean of the encoder's features, a linear layer draws the portrait of `portrait` x `portrait` pixels and
    tells `shape` principal components of the face's points (`Identity.face`), each at unit variance. The loss is the
    mean squared error of the drawing and, times `shape_weight`, that of the components. The layer is thrown away at the
    end. Photos are mirrored, shifted by a few pixels and tinted at random, because nothing of this says who the person
    is.
    """

    data: FilePath = "data/heads"  # rendered people: a folder of `hyperdb render_heads`
    name: str = "default"  # of the run, the last part of `out`
    out: FilePath = "runs/train_encoder/default"  # folder that is written
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    portrait: int = 32  # side of the portrait in pixels
    shape: int = 40  # principal components of the face's shape that are learned; 0: none
    shape_weight: float = 1.0
    jitter: float = 0.03  # standard deviation of the tint: the factor on each colour channel of a photo is about 1
    steps: int = 3000  # of the optimiser, in all
    batch: int = 64  # photos in each step
    rate: float = 1e-3  # AdamW's learning rate, after a warm-up of 100 steps and before its decay
    held_out: int = 200  # people kept aside to measure on
    save_every: int = 200  # steps from one checkpoint to the next
    tracker: str | None = None  # wandb, tensorboard or trackio; null: nobody watches
    device: str = "auto"  # auto, cpu, cuda or mps
    workers: int = 2  # processes that render the portraits
    seed: int = 0  # of the first weights, the batches and the changes of the photos

    def __post_init__(self) -> None:
        check_tracker(self.tracker)
        if self.held_out < 1:
            raise UserError(f"held_out={self.held_out}: expected at least 1, who the encoder is measured on")


@tracked
def run(config: Config, track: Track) -> Path:
    """Write the encoder's weights to `out/encoder.safetensors`."""
    import torch
    import torch.nn.functional as F
    from torch.optim.swa_utils import update_bn

    from hyperdb.data.people import load_people
    from hyperdb.diffusion.base import pick_device
    from hyperdb.hypernet.encoder import Encoder
    from hyperdb.runtime.files import hash_files, save_json, save_tensors
    from hyperdb.runtime.loop import train
    from hyperdb.runtime.optim import EMA, Schedule, adamw
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.precision import attention, autocast
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.recipe import recipe
    from hyperdb.runtime.seed import derive, generator

    # --- data: rendered people's photos and portraits
    people = load_people(config.data)
    if "coefficients" not in people.labels:
        raise UserError(f"{config.data} holds no rendered people; make some with `hyperdb render_heads`")
    photos = [rows for rows in people.photos if len(rows)]
    if len(photos) <= config.held_out:
        raise UserError(f"{config.data} has {len(photos)} people with a photo; render more or lower held_out")
    weights = resolve(config.encoder.weights) if config.encoder.weights is not None else None
    begun_from = hash_files([weights]) if weights is not None and weights.is_file() else None
    whole = {**recipe(config), "made_from": people.digest, "begun_from": begun_from}
    out = claim(config.out, WRITES, whole)
    plain, faces = _known(people, config.portrait, out / "portraits.safetensors", config.workers)
    portraits = plain.flatten(1).float() - plain.flatten(1).float().mean(0)
    portraits /= portraits.std()
    shapes = components(faces.flatten(1).float(), config.shape)
    seen, held = torch.cat(photos[: -config.held_out]), torch.cat(photos[-config.held_out :])
    device = pick_device(config.device)
    portraits, shapes = portraits.to(device), shapes.to(device)

    # --- model
    torch.manual_seed(derive(config.seed, "encoder weights"))  # the only way to seed timm's initialisation
    encoder = Encoder(config.encoder).to(device)
    sizes = [portraits.shape[1], shapes.shape[1]]
    tell = torch.nn.Linear(encoder.dim, sum(sizes)).to(device)
    params = [*encoder.parameters(), *tell.parameters()]
    encoder.net.train()

    def told(images: Tensor) -> tuple[Tensor, ...]:
        with autocast(device, torch.bfloat16), attention(fused=device.type != "cpu"):
            return tell(encoder(images)[:, 0]).float().split(sizes, 1)

    # --- train
    def backward(step: int) -> dict[str, Tensor]:
        g = generator(config.seed, "encoder", step)
        rows = seen[torch.randint(0, len(seen), (config.batch,), generator=g)]
        wanted = portraits[people.identity[rows]].unflatten(1, (3, config.portrait, -1))
        images = people.images[rows].to(device).float()
        # mirrored people are people too; white balance and a few pixels of shift say nothing of who it is
        flip = (torch.rand(len(rows), 1, 1, 1, generator=g) < 0.5).to(device)
        images, wanted = (torch.where(flip, x.flip(-1), x) for x in (images, wanted))
        gain = (1 + config.jitter * torch.randn(len(rows), 3, 1, 1, generator=g)).to(device)
        shift = torch.randint(-3, 4, (len(rows), 2), generator=g).tolist()
        images = torch.stack([x.roll(s, (1, 2)) for x, s in zip(images, shift, strict=True)])
        drawn, shape = told((images * gain).clamp(0, 255))
        terms = {"portrait": F.mse_loss(drawn, wanted.flatten(1))}
        if config.shape > 0:  # without asymmetry, a mirrored face has the same
            terms["shape"] = config.shape_weight * F.mse_loss(shape, shapes[people.identity[rows]])
        torch.stack(list(terms.values())).sum().backward()
        return {name: term.detach() for name, term in terms.items()}

    optimizer, ema = adamw(params, config.rate, 0.05), EMA(params, 0.995)
    schedule = Schedule(config.steps, warmup=100)
    train("encoder", out, whole, schedule, optimizer, ema, backward, save_every=config.save_every, track=track)

    # --- measure on held-out people, write
    # the averaged weights need batch statistics of their own
    batches = seen[:STATISTICS_PHOTOS].split(config.batch)
    update_bn((encoder.pixels(people.images[part]) for part in batches), encoder.net)
    encoder.eval()
    with torch.no_grad():
        parts = [told(people.images[part]) for part in held.split(64)]
    guess, shape = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    who, portraits, shapes = people.identity[held], portraits.cpu(), shapes.cpu()
    gallery = who.unique()
    nearest = gallery[torch.cdist(guess, portraits[gallery]).argmin(1)]
    report = {
        "portrait_r2": _explained(guess, portraits[who]),
        "shape_r2": _explained(shape, shapes[who]) if config.shape > 0 else None,
        "rank1_held_out": round((nearest == who).float().mean().item(), 4),
        "people_held_out": len(gallery),
    }
    save_tensors(out / "encoder.safetensors", encoder.net.state_dict(), {"data": people.digest})
    track.log(config.steps, {name: value for name, value in report.items() if value is not None})
    save_json(out / "report.json", {**report, "steps": config.steps, "data": people.digest, **provenance()})
    found = ", ".join(f"{name} {value}" for name, value in report.items() if value is not None)
    print(f"unseen people: {found}; encoder in {out}")
    return out


def _explained(guess: Tensor, truth: Tensor) -> float:
    """Return the share of the square of `truth [n, d]`, whose mean over everyone is 0, that `guess` explains."""
    return round(1 - ((guess - truth).square().sum() / truth.square().sum()).item(), 4)


def components(points: Tensor, count: int) -> Tensor:
    """Return the first principal components of points `[I, d]`, at unit variance: `[I, count]`, or all there are."""
    import torch

    centred = (points - points.mean(0)).double()
    count = min(count, len(points) - 1, points.shape[1])
    variance, axes = torch.linalg.eigh(centred.mT @ centred / max(1, len(points) - 1))  # the smallest first
    variance, axes = variance.flip(0)[:count], axes.flip(1)[:, :count]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # an axis has no sign of its own
    return (centred @ axes / variance.clamp_min(1e-12).sqrt()).float()


def _person(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Render one person's plain portrait and return it and the face's shape; runs in a worker process."""
    import numpy as np

    from hyperdb.heads import Identity, View, render

    person = Identity(seed)
    return render(person, View(), size), person.face.astype(np.float32)


def _people(seeds: list[int], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return `_person` of several people; runs in a worker process."""
    return [_person(seed, size) for seed in seeds]


def _known(people: People, size: int, path: Path, workers: int) -> tuple[Tensor, Tensor]:
    """Return everyone's portrait `[I, 3, size, size]` uint8 and face `[I, V, 3]`, made once and kept at `path`."""
    from functools import partial

    import numpy as np
    import torch
    from tqdm import tqdm

    from hyperdb.runtime.files import load_made, save_tensors
    from hyperdb.runtime.pool import each

    key = f"{people.digest} {size}"
    if (there := load_made(path)) is not None:
        tensors, metadata = there
        if metadata.get("key") == key and "faces" in tensors:
            return tensors["portraits"], tensors["faces"]
    seeds = [int(people.seed[rows[0]]) for rows in people.rows]
    some = [seeds[k : k + TOGETHER] for k in range(0, len(seeds), TOGETHER)]
    found: dict[int, list[Any]] = {}
    with tqdm(total=len(seeds), desc="portraits", unit="person", dynamic_ncols=True) as bar:
        for number, made in each(partial(_people, size=size), some, workers):
            found[number] = made
            bar.update(len(made))
    drawn = [one for number in range(len(some)) for one in found[number]]
    pixels, points = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    portraits = pixels.permute(0, 3, 1, 2).contiguous()
    save_tensors(path, {"portraits": portraits, "faces": points}, {"key": key})
    return portraits, points
