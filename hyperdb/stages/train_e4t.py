"""Pretrain E4T (Gal et al. 2023): a photo -> a word for its person, and offsets of the weights for such words."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hyperdb.adapters import E4TConfig
from hyperdb.diffusion import DiffusionConfig
from hyperdb.hypernet import HypernetConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath, resolve
from hyperdb.runtime.track import Track, check_tracker, tracked
from hyperdb.words import chosen

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray
    from torch import Tensor

LEVELS = 8  # of noise, that unseen people are measured at
FEATURE_PHOTOS = 2048  # that the encoder's features are standardised by
WRITES = ("checkpoint.safetensors", "journal.jsonl", "report.json", "e4t.safetensors")
KEPT = "its last checkpoint is kept"


@dataclass(kw_only=True)
class Config:
    """Whom the encoder learns from, and for how long.

    In each step it sees one photo of each of `batch` people and predicts each one's word. The base, with these words
    and with offsets of its weights that everybody shares, denoises the same photos under "a [V] face", each at another
    noise level. Decoder and offsets are trained; the image encoder stays as it is. The loss is that of the denoising
    and `word_weight` times the squared length of what is added to the class word, before it is scaled down to a tenth:
    a word near the class word can be used as one.

    Afterwards `held_out` people show whether the word is the person: the error of another photo of theirs with the word
    of the given one, and with the word of the next person.
    """

    diffusion: DiffusionConfig
    model: HypernetConfig  # a hypernetwork of one token
    data: FilePath  # folder of people to learn from
    people: int | None = None  # how many identities of `data` to use; null: all
    held_out: int = 100  # of these, the last, only to measure on; 0: none
    name: str = "default"  # of the run, the last part of `out`
    out: FilePath = "runs/train_e4t/default"  # folder that is written
    word_weight: float  # of the squared length of what is added to the class word
    steps: int  # of the optimiser, in all
    batch: int  # people in each step
    rate: float  # AdamW's learning rate
    warmup: int  # steps over which the rate rises from 0
    decay: float  # share of the steps, at the end, over which the rate falls as a cosine
    ema: float  # decay of the running average of the weights, which is what is written
    save_every: int  # steps from one checkpoint to the next
    tracker: str | None = None  # wandb, tensorboard or trackio; null: nobody watches
    seed: int = 0  # of the first weights and the batches

    def __post_init__(self) -> None:
        check_tracker(self.tracker)
        if self.steps < 1 or self.batch < 1 or self.rate <= 0 or self.word_weight < 0:
            raise UserError("steps and batch must be at least 1, rate above 0 and word_weight at least 0")
        if self.held_out < 0 or self.held_out == 1:
            raise UserError(f"held_out={self.held_out}: expected 0, or at least 2 people who are told apart")
        if self.diffusion.dtype == "fp16":
            raise UserError("diffusion.dtype=fp16 loses the small gradients of this training; use bf16 or fp32")


@tracked
def run(config: Config, track: Track) -> Path:
    """Write `out/e4t.safetensors`: the averaged weights, fp16, without a frozen image encoder."""
    import torch

    from hyperdb.adapters.inject import Injection
    from hyperdb.data.people import latent_moments, load_people
    from hyperdb.diffusion.loss import bad_levels, diffusion_loss, stratified_timesteps
    from hyperdb.hypernet.e4t import KIND, E4TEncoder
    from hyperdb.metrics.score import paired
    from hyperdb.runtime.files import hash_files, save_json
    from hyperdb.runtime.loop import train
    from hyperdb.runtime.optim import EMA, Schedule, adamw
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.precision import attention
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.recipe import plain, recipe
    from hyperdb.runtime.seed import derive, generator
    from hyperdb.tuning.trainable import trainable

    # --- base, people
    base = config.diffusion.load()
    settings, adapter = trainable(base, E4TConfig())
    people = load_people(config.data, limit=config.people, size=config.diffusion.size)
    photos = [rows for rows in people.photos if len(rows)]
    several = [i for i, rows in enumerate(photos) if len(rows) > 1]  # one is given, another denoised
    unseen = several[-config.held_out or len(several) :]
    held, photos = [photos[i] for i in unseen], [rows for i, rows in enumerate(photos) if i not in {*unseen}]
    if len(held) < config.held_out or not photos:
        raise UserError(
            f"{config.data} holds too few people with several photos for held_out={config.held_out} beside those to "
            "learn from; render more, or set held_out=0"
        )
    origin = {"base": base.digest, "data": people.digest}
    weights = config.model.encoder.weights
    if weights is not None and resolve(weights).is_file():  # else whoever reads it says so
        origin["encoder"] = hash_files([resolve(weights)])
    whole = {**recipe(config), "made_from": origin}
    out = claim(config.out, WRITES, whole)
    moments = latent_moments(base, people)

    # --- model
    injection = Injection(base.sites(adapter.layout.names))
    torch.manual_seed(derive(config.seed, "e4t weights"))  # the only way to seed the modules' initialisation
    model = E4TEncoder(config.model, settings.tokens(adapter.layout))
    model.centre.copy_(adapter.init(1, injection.sites)["vector"])
    shown = torch.cat(photos)[:FEATURE_PHOTOS]
    model.to(base.device).standardise_features(people.images.part(shown), people.images.key(shown))
    model.encoder.requires_grad_(False)
    model.train()
    params = [*model.decoder.parameters(), *model.offsets]
    ids = base.tokenize([config.diffusion.instance_prompt]).expand(config.batch, -1)

    # --- train
    last: list[Tensor] = []  # the error of each row of the last step, and its noise level

    def backward(step: int) -> dict[str, Tensor]:
        g = generator(config.seed, "e4t", step)
        who = torch.randint(0, len(photos), (config.batch,), generator=g).tolist()
        shown = torch.stack([photos[i][torch.randint(0, len(photos[i]), (), generator=g)] for i in who])
        mean, std = moments[shown].float().unbind(1)  #                              [I, c, h, w]
        jitter, noise = (torch.randn(mean.shape, generator=g) for _ in "zn")
        t = stratified_timesteps(1, config.batch, base.schedule.config.num_train_timesteps, g)[0]
        z, noise, t = (x.to(base.device) for x in (mean + std * jitter, noise, t))
        with base.autocast(), attention(config.diffusion.attention != "eager"):
            begun = model.begin(people.images[shown])
        # in use until the backward pass has ended: checkpointing computes with it again
        with injection.using(adapter.changes(begun)):
            errors = diffusion_loss(base, z, noise, t, ids)
            terms = {
                "diffusion": errors.mean(),
                "word": config.word_weight * model.penalty(begun["vector"]).mean(),
            }
            torch.stack(list(terms.values())).sum().backward()
        last[:] = errors.detach(), t
        return {name: term.detach() for name, term in terms.items()}

    optimizer, ema = adamw(params, config.rate), EMA(params, config.ema)
    schedule = Schedule(config.steps, config.warmup, config.decay)
    train(
        "E4T", out, whole, schedule, optimizer, ema, backward, save_every=config.save_every, track=track,
        where=lambda: bad_levels(base.schedule, *last),
    )  # fmt: skip

    # --- write, read as it will be used, measure on unseen people
    told = {"adapter": KIND, **origin, "steps": str(config.steps), "settings": json.dumps(plain(recipe(config)))}
    file = model.save(out / "e4t.safetensors", told)
    model = E4TEncoder.load(file).to(base.device)
    report = {"config": asdict(config), **origin, **provenance()}

    @torch.no_grad()
    def error(given: list[Tensor]) -> NDArray[Any]:
        found = []
        for start in range(0, len(held), config.batch):
            some = slice(start, start + config.batch)
            mean, std = moments[torch.stack([rows[-1] for rows in held[some]])].float().unbind(1)
            shown, errors = people.images[torch.stack([rows[0] for rows in given[some]])], []
            with base.autocast(), attention(config.diffusion.attention != "eager"):
                begun = model.begin(shown)
            for level in range(LEVELS):
                g = generator(config.seed, "e4t held out", start, level)
                jitter, noise = (torch.randn(mean.shape, generator=g) for _ in "zn")
                t = torch.full((len(mean),), int((level + 0.5) / LEVELS * base.schedule.config.num_train_timesteps))
                z, noise, t = (x.to(base.device) for x in (mean + std * jitter, noise, t))
                with injection.using(adapter.changes(begun)):
                    errors.append(diffusion_loss(base, z, noise, t, ids[: len(mean)]).cpu())
            found.append(torch.stack(errors).mean(0))
        return torch.cat(found).double().numpy()

    if held:
        own, others = error(held), error([*held[1:], held[0]])
        apart = paired(others, own, config.seed)
        report["held_out"] = {
            "people": len(held), "error": own.mean(), "error_of_another": others.mean(), "others_above_own": apart,
        }  # fmt: skip
        track.log(config.steps, {"held_out/own": own.mean(), "held_out/another": others.mean()})
        print(f"{len(held)} people unseen: error {own.mean():.4f} with their word, with another's higher by "
              f"{apart['mean']:.5f} [{apart['lo']:.5f}, {apart['hi']:.5f}]")  # fmt: skip
    injection.remove()
    save_json(out / "report.json", report)
    words = chosen("diffusion", config.diffusion)
    print(f"encoder in {file}; next: hyperdb personalize adapter=e4t adapter.encoder={file} image=PHOTO{words}")
    return out
