"""Train the hypernetwork: one photo -> LiDB tokens, learned over many people (paper section 4.2, eq. 2)."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.adapters import AdapterConfig
from hyperdb.diffusion import DiffusionConfig
from hyperdb.hypernet import HypernetConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath, resolve
from hyperdb.tuning.prior import PriorConfig

if TYPE_CHECKING:
    from torch import Tensor

    from hyperdb.data.people import People
    from hyperdb.data.weights import WeightStore
    from hyperdb.diffusion.base import Base
    from hyperdb.hypernet.model import Hypernet
    from hyperdb.runtime.journal import Journal
    from hyperdb.tuning.memory import Sketch

FEATURE_PHOTOS = 2048  # that the encoder's features are standardised by


WRITES = (
    *("checkpoint.safetensors", "journal.jsonl", "report.json", "hypernet.safetensors", "prior.safetensors"),
    "previews/*.png",
)
KEPT = "its last checkpoint is kept"


@dataclass(kw_only=True)
class Config:
    """Whom the hypernetwork learns from, what it is asked for, and how long.

    In each step the hypernetwork sees one photo of each of `batch` people, the conditioning photo, and predicts an
    adapter for each. The loss is that of the paper (eq. 2) and two terms that the paper does not have:

        L = alpha * diffusion + beta * weight space + prior_weight * prior + identity_weight * identity

    - *Diffusion*: the base with the predicted adapter denoises pictures of the person under the prompt "a [V] face".
      `target_view` says which pictures: `same` is the conditioning photo, as in the paper, and `other` another photo of
      the person. With `target_style=any` they include pictures of the person in other styles, each under its own
      caption. Rendered people have such pictures, photographed ones do not.
    - *Weight space*: the distance from a fit that `hyperdb precompute` made before. `weights` names the store of fits;
      null leaves the term out. A fit of one image is compared with the prediction for that image, a fit of a person
      with the prediction for any photo of that person.
    - *Prior*: on class pictures the adapted network shall predict what the base predicts (`hyperdb.tuning.prior`).
    - *Identity*: the encoder compares pictures drawn with the prediction with the person's photos (`identity_loss`).

    `flips` turns half of the people left to right, the conditioning photo and the pictures alike. `prompt_dropout` is
    the share of pictures that are denoised under the empty prompt. Classifier-free guidance later subtracts what the
    network predicts there with the same adapter in place.

    The training is measured on the people of `validation`, who are never trained on.
    """

    diffusion: DiffusionConfig
    adapter: AdapterConfig  # what is predicted; today LiDB alone can be
    model: HypernetConfig
    prior: PriorConfig
    data: FilePath  # folder of people to learn from
    validation: FilePath | None  # folder of people to measure on; null: measure nothing
    weights: FilePath | None
    validation_weights: FilePath | None = None  # store of fits of the validation people, for their weight-space loss
    people: int | None = None  # how many identities of `data` to use; null: all
    init: FilePath | None = None  # file of a hypernetwork to go on from; null: begin anew
    name: str = "default"
    out: FilePath = "runs/train_hypernet/default"
    alpha: float = 1.0  # open in the paper
    beta: float = 0.1  # open in the paper
    fit_share: float = 0.25  # share of a batch that is drawn from the people who have a fit
    # The same change of a layer has many pairs of factors: A times c and B over c are one of them.
    weight_loss: str = "gauge_free"  # compares the changes, so that all such pairs are equal; plain: L2 of the factors
    target_view: str
    target_style: str
    signal_weight: float | None  # how much each noise level counts, as in `FitConfig`; null: the base's own loss
    face_weight: float  # extra weight of the middle of the frame in the diffusion loss
    identity_weight: float
    identity_people: int = 8  # people of each step whose pictures are drawn for the identity loss
    identity_steps: int = 4  # sampling steps of these pictures; the gradient goes through the last one
    prior_weight: float
    prior_rows: int  # class pictures for each person in each step
    prompt_dropout: float
    flips: bool
    steps: int
    batch: int  # people in each step
    levels: int  # noise levels for each person in each step, a picture at each
    logit_normal: list[float] | None  # mean and standard deviation of the logit of the noise level; null: uniform
    rate: float  # learning rate of the decoder
    matrix_rate: float | None  # rate of orthogonal steps (Muon) for the decoder's matrices; null: AdamW for all
    encoder_rate: float  # learning rate of the image encoder; 0: it stays as it was pretrained
    warmup: int  # steps over which the rates rise from 0
    decay: float  # share of the steps, at the end, over which the rates fall as a cosine
    ema: float  # decay of the running average of the weights, which is what is written
    default_spread: float  # scale of the predicted numbers where there are no fits to take it from
    validate_every: int  # steps
    validation_people: int
    save_every: int  # steps between checkpoints, from which the same command goes on
    tracker: str | None = None  # wandb or tensorboard
    seed: int = 0
    dry_run: bool = False  # load nothing: say which networks would be loaded, where, and in how much memory

    def __post_init__(self) -> None:
        self.adapter.require_predictable()
        if self.weight_loss not in ("gauge_free", "plain"):
            raise UserError(f"weight_loss={self.weight_loss!r}: expected gauge_free or plain")
        if self.target_view not in ("same", "other"):
            raise UserError(f"target_view={self.target_view!r}: expected same or other")
        if self.target_style not in ("same", "any"):
            raise UserError(f"target_style={self.target_style!r}: expected same or any")
        if self.target_style == "any" and self.target_view == "same":
            raise UserError("target_style=any needs target_view=other: the conditioning photo has one style")
        if self.tracker not in (None, "wandb", "tensorboard"):
            raise UserError(f"tracker={self.tracker!r}: expected wandb, tensorboard or null")
        if self.tracker is not None and importlib.util.find_spec(self.tracker) is None:
            raise UserError(f"tracker={self.tracker} is not installed; run `pip install hyperdb[{self.tracker}]`")
        if self.logit_normal is not None and (len(self.logit_normal) != 2 or self.logit_normal[1] <= 0):
            raise UserError(f"logit_normal={self.logit_normal}: expected [mean, standard deviation above 0] or null")
        if self.identity_weight > 0 and (self.model.summary < 1 or self.identity_people < 1):
            raise UserError("identity_weight > 0 needs model.summary and identity_people of at least 1")
        if self.diffusion.dtype == "fp16":
            raise UserError("diffusion.dtype=fp16 loses the small gradients of this training; use bf16 or fp32")
        if self.validation_weights is not None and (self.validation is None or self.weights is None or self.beta <= 0):
            raise UserError("validation_weights needs validation, weights and beta > 0")
        if not 0 <= self.prompt_dropout < 1:
            raise UserError(f"prompt_dropout={self.prompt_dropout}: expected 0 to less than 1")
        if self.alpha <= 0 and (self.flips or self.prompt_dropout > 0):
            raise UserError("flips and prompt_dropout concern the diffusion loss: set alpha > 0")
        if not 0 <= self.fit_share <= 1:
            raise UserError(f"fit_share={self.fit_share}: expected 0 to 1")
        if self.alpha <= 0 and (self.beta <= 0 or self.weights is None):
            raise UserError("nothing to learn from: set alpha > 0, or beta > 0 with weights=STORE")


def passes(config: Config, sketch: Sketch) -> None:
    """Measure a step of the training, and a validation; count what the optimizer keeps of each network."""
    from hyperdb.tuning.draw import together
    from hyperdb.tuning.memory import rows

    hypernet = sketch.add_hypernet(config.model, config.adapter.tokens(sketch.layout))
    hypernet.encoder.requires_grad_(config.encoder_rate > 0 and not config.model.encoder.frozen)
    people = config.batch
    with sketch.measure("encoding photos"):
        sketch.encode()
    with sketch.measure("training step"):
        tokens = sketch.predict(people, trained=True)
        if config.alpha > 0:
            rank = config.adapter.tokens(sketch.layout).rank
            sketch.denoise(people * rows(config), sketch.factors(people, rank, trained=True))
        tokens.float().square().mean().backward()
    if config.validation is not None:
        with sketch.measure("validation"):
            sketch.draw(together(config.diffusion.size))
    sketch.keep_training("image encoder", "hypernetwork decoder")


def run(config: Config) -> Path:
    """Train; write `out/hypernet.safetensors` (averaged weights, fp16) and `out/prior.safetensors`."""
    import torch
    from accelerate import Accelerator

    from hyperdb.adapters.inject import Injection
    from hyperdb.adapters.layout import Layout
    from hyperdb.data.people import latent_moments, load_people
    from hyperdb.data.weights import load_store, made_from
    from hyperdb.diffusion.loss import face_focus, predict, signal_weight, stratified_timesteps, target
    from hyperdb.hypernet import loss as weight_space
    from hyperdb.hypernet.model import Hypernet
    from hyperdb.runtime.files import hash_files, load_json, save_json
    from hyperdb.runtime.loop import train
    from hyperdb.runtime.optim import EMA, Muon, Schedule, adamw
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.precision import attention
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.recipe import recipe
    from hyperdb.runtime.seed import derive, generator
    from hyperdb.tuning.prior import load_prior

    # --- base, people, fits
    base = config.diffusion.load()
    layout = Layout.of(base.targets())
    people = load_people(config.data, limit=config.people, size=config.diffusion.size)
    photos = people.photos
    usable = torch.tensor([i for i, rows in enumerate(photos) if len(rows)])
    if len(usable) == 0:
        raise UserError(f"{config.data} holds no photos of people")
    fits = config.weights if config.beta > 0 else None
    store = load_store(fits, layout, **made_from(base, people)) if fits is not None else None
    if store is not None and asdict(store.lidb.config) != asdict(config.adapter):
        raise UserError(f"{config.weights} was made with lidb {asdict(store.lidb.config)}; set the same or refit")
    lidb = store.lidb if store is not None else config.adapter.tokens(layout)
    lidb = lidb.to(base.device)
    origin = {"base": base.digest, "data": people.digest, "weights": store.digest if store else ""}
    # `init` brings its own encoder
    for part, file in (("init", config.init), ("encoder", None if config.init else config.model.encoder.weights)):
        if file is not None and resolve(file).is_file():  # else whoever reads it says so
            origin[part] = hash_files([resolve(file)])
    whole = {**recipe(config), "made_from": origin}
    out = claim(config.out, WRITES, whole)
    moments = latent_moments(base, people, Path(config.data))
    turned = latent_moments(base, people, Path(config.data), mirrored=True) if config.flips else None
    prior = load_prior(base, config.prior, out / "prior.safetensors") if config.prior_weight > 0 else None

    # --- model
    if config.tracker == "wandb":
        os.environ.setdefault("WANDB_MODE", "offline")  # `wandb sync` uploads; WANDB_MODE=online does at once
    accelerator = Accelerator(
        cpu=base.device.type == "cpu", log_with=config.tracker, project_dir=str(out) if config.tracker else None
    )
    if config.tracker:
        accelerator.init_trackers("hyperdb", config={"name": config.name, "seed": config.seed})
    torch.manual_seed(derive(config.seed, "hypernet weights"))  # the only way to seed the modules' initialisation
    if config.init is not None:
        model = Hypernet.load(resolve(config.init))
        layout.require(model.lidb.layout, f"the hypernetwork {config.init}")
        if asdict(model.lidb.config) != asdict(config.adapter):
            raise UserError(f"{config.init} was made with lidb {asdict(model.lidb.config)}; set the same")
    else:
        model = Hypernet(config.model, lidb, config.default_spread)
        if store is not None and len(store.tokens) > 1:
            model.standardise(store.tokens)
        model.to(base.device).standardise_features(people.images[torch.cat(photos)[:FEATURE_PHOTOS]])
    # whose fit belongs to which photo; what conditions is what was fitted
    fit_row, every = torch.full((len(people),), -1), torch.cat(photos)
    if store is not None:
        fit_row[every] = store.rows_of(people.keys(store.by, every))
        if (fit_row < 0).all():
            raise UserError(f"{config.weights} holds no fit of the people in {config.data}; set weights=null or refit")
    fitted_photos = [rows[fit_row[rows] >= 0] for rows in photos]
    fitted_people = torch.tensor([i for i, rows in enumerate(fitted_photos) if len(rows)], dtype=torch.long)
    few_fitted = round(config.batch * config.fit_share) if len(fitted_people) else 0
    if config.alpha <= 0:  # nobody else has anything to teach
        few_fitted = config.batch
    scale = weight_space.scales(lidb, store.tokens.to(base.device), config.weight_loss) if store is not None else None
    weight_loss = getattr(weight_space, config.weight_loss)
    if config.encoder_rate == 0:
        model.encoder.requires_grad_(False)
    model = model.to(base.device).train()
    inside = [p for p in model.encoder.parameters() if p.requires_grad]
    outside = list(model.decoder.parameters())
    if config.matrix_rate is None:
        optimizer = adamw(outside, config.rate)
    else:
        # positions and biases are vectors, a layer each
        kinds = {n: n.endswith("weight") and p.ndim > 1 for n, p in model.decoder.named_parameters()}
        vectors, matrices = ([p for n, p in model.decoder.named_parameters() if kinds[n] is k] for k in (False, True))
        optimizer = Muon(vectors, config.rate, matrices, config.matrix_rate)
    if inside:
        optimizer.add_param_group({"params": inside, "lr": config.encoder_rate})
    ema = EMA([*outside, *inside], config.ema)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    # see `DiffusionConfig.attention`: the fused backward is slow in bf16 on a CPU
    fused = config.diffusion.attention != "eager"
    injection = Injection(base.targets())
    ids = base.tokenize(_prompts(people, config.diffusion)) if config.target_style == "any" else None
    instance, nothing = base.tokenize([config.diffusion.instance_prompt]), base.tokenize([""])
    wanted_from = people.rows if config.target_style == "any" else photos
    focus = face_focus(config.face_weight, *base.latent_shape[1:]).to(base.device)
    validation = _Validation(config, base, lidb) if config.validation is not None else None
    unseen = None
    if config.validation_weights is not None and validation is not None:
        unseen = load_store(config.validation_weights, layout, **made_from(base, validation.people))
        if (validation.fits_of(unseen) < 0).all():
            raise UserError(f"{config.validation_weights} holds no fit of the people in {config.validation}")

    # --- train
    def backward(step: int) -> dict[str, Tensor]:
        g = generator(config.seed, "hypernet", accelerator.process_index, step)
        drawn = [fitted_people] * few_fitted + [usable] * (config.batch - few_fitted)
        who = torch.stack([group[torch.randint(0, len(group), (), generator=g)] for group in drawn])
        people_now, levels = config.batch, config.levels
        given = [(fitted_photos if k < few_fitted else photos)[i] for k, i in enumerate(who.tolist())]
        pictures = [wanted_from[i] for i in who.tolist()]
        shown, wanted = _views(given, pictures, levels, config.target_view, g)  #    [I], [I, S]
        asked = ids[wanted] if ids is not None else instance.expand(people_now, levels, -1)
        t = stratified_timesteps(people_now, levels, base.schedule.config.num_train_timesteps, g, config.logit_normal)
        latent, images = moments[wanted], people.images[shown]  #                    [I, S, 2, c, h, w], [I, 3, H, W]
        mirror = torch.zeros(people_now, dtype=torch.bool)
        if turned is not None:  # a turned photo is another image: those drawn for their fit stay as they are
            mirror[few_fitted:] = torch.rand(people_now - few_fitted, generator=g) < 0.5
            latent[mirror], images[mirror] = turned[wanted[mirror]], images[mirror].flip(-1)
        z_mean, z_std = latent.float().unbind(2)  #                                  [I, S, c, h, w]
        jitter, noise = (torch.randn(z_mean.shape, generator=g) for _ in "zn")
        if config.prompt_dropout > 0:
            dropped = torch.rand(people_now, levels, 1, generator=g) < config.prompt_dropout
            asked = torch.where(dropped.to(base.device), nothing, asked)
        rows = [z_mean + z_std * jitter, noise, t, asked]  #                         [I, S, ...] each
        rows = [x.to(base.device) for x in rows]
        goal = target(base.schedule, *(x.flatten(0, 1) for x in rows[:3])).unflatten(0, (people_now, levels))
        if prior is not None:
            # further rows a person, of the prior: [I, S + P, ...]
            mixed = torch.randperm(people_now * config.prior_rows, generator=g)
            kept = prior.draw(len(mixed), config.seed, step)
            each = [x[mixed].unflatten(0, (people_now, -1)) for x in kept]
            *rows, goal = (torch.cat(pair, 1) for pair in zip((*rows, goal), each, strict=True))
        with base.autocast(), attention(fused):
            predicted = wrapped(images)  #                                          [I, N, D]
        # each term goes back as far as the tokens, the first while its factors are in use; then all through the network
        tokens = predicted.detach().requires_grad_()
        terms: dict[str, Tensor] = {}
        # eq. 2, first term: on everyone
        if config.alpha > 0:
            with injection.using(lidb.factors({"tokens": tokens})):
                out_rows = predict(base, *(x.flatten(0, 1) for x in rows)).unflatten(0, (people_now, -1))
                weight = signal_weight(base.schedule, rows[2], config.signal_weight)[..., None, None, None]
                square = weight * (out_rows - goal).square()
                terms["diffusion"] = config.alpha * (square[:, :levels] * focus).mean()
                if prior is not None:
                    terms["prior"] = config.prior_weight * square[:, levels:].mean()
                torch.stack(list(terms.values())).sum().backward()
        if config.identity_weight > 0:
            some = slice(config.identity_people)
            noise = torch.randn((len(who[some]), *base.latent_shape), generator=g)
            guide, own = config.diffusion.guide(), lidb.factors({"tokens": tokens[some]})
            with injection.using(own, repeat=guide.adapted, plain=guide.plain), attention(fused):
                shown_all = [people.images[photos[i]] for i in who[some].tolist()]
                shown_all = [x.flip(-1) if turn else x for x, turn in zip(shown_all, mirror[some], strict=True)]
                distance = identity_loss(base, model, noise, shown_all, config.identity_steps)
                terms["identity"] = config.identity_weight * distance.mean()
                terms["identity"].backward(inputs=[tokens])  # never the encoder: it would learn to see less
        # eq. 2, second term: where a fit exists
        if store is not None and scale is not None:
            fits = fit_row[shown].where(~mirror, -1)
            if (fits >= 0).any():
                fitted = store.tokens[fits[fits >= 0]].to(base.device)
                distance = weight_loss(lidb, tokens[(fits >= 0).to(base.device)], fitted, scale)
                terms["weights"] = config.beta * distance.sum() / config.batch
                terms["weights"].backward()
        accelerator.backward(predicted, gradient=tokens.grad)
        return {k: v.detach() for k, v in terms.items()}

    def after(done: int, terms: dict[str, float], journal: Journal) -> None:
        scores = dict(terms)
        if validation is not None and (done % config.validate_every == 0 or done == config.steps):
            ema.swap()
            picture = out / "previews" / f"step-{done:06d}.png"
            found = validation.measure(model, picture, unseen, weight_loss, scale)
            ema.swap()
            save_json(out / "validation.json", {"step": done, "people": len(validation.shown), **validation.pairs})
            found = {f"validation/{k}": v for k, v in found.items()}
            journal.record(done, **found)
            scores.update(found)
        if config.tracker:
            accelerator.log(scores, step=done)

    schedule = Schedule(config.steps, config.warmup, config.decay)
    train(
        "hypernetwork", out, whole, schedule, optimizer, ema, backward, after, config.save_every,
        main=accelerator.is_main_process,
    )  # fmt: skip

    # --- write
    injection.remove()
    model.save(out / "hypernet.safetensors", {**origin, "steps": str(config.steps)})
    save_json(out / "report.json", {"config": asdict(config), **origin, **provenance()})
    if config.tracker:
        accelerator.end_training()
    if validation is not None and (out / "validation.json").is_file():
        print(_verdict(load_json(out / "validation.json")))
    print(f"hypernetwork in {out / 'hypernet.safetensors'}, previews in {out / 'previews'}")
    return out


def _views(given: list[Tensor], pictures: list[Tensor], levels: int, target_view: str, g: Any) -> tuple[Tensor, Tensor]:
    """Draw each person's conditioning photo of `given`, `[I]`, and what to denoise of `pictures`, `[I, levels]`."""
    import torch

    shown, wanted = [], []
    for photos, others in zip(given, pictures, strict=True):
        first = photos[torch.randint(0, len(photos), (), generator=g)]
        others = others[others != first]
        if target_view == "same" or len(others) == 0:
            others = first[None]
        others = others[torch.randperm(len(others), generator=g)]
        shown.append(first)
        wanted.append(others[torch.arange(levels) % len(others)])
    return torch.stack(shown), torch.stack(wanted)


def identity_loss(base: Base, model: Hypernet, noise: Tensor, photos: list[Tensor], steps: int) -> Tensor:
    """Return how far the picture of each `noise [I, c, h, w]` is from that person's photos `[K, 3, H, W]`, `[I]`.

    The squared distance of summaries of the hypernetwork's encoder, a mean over their components. What is injected is
    differentiated through the last of `steps` of sampling (Xu et al. 2023, ReFL).
    """
    import torch

    from hyperdb.diffusion.sample import sample

    with torch.no_grad():
        known = torch.stack([model.features(images)[1].mean(0) for images in photos])
    prompts, guide = [base.config.instance_prompt] * len(noise), base.config.guide()
    latents = sample(base, prompts, noise, steps, gradient=True, subject_guidance=guide.subject)
    return (model.features(base.pixels(latents))[1] - known).square().mean(1)


def _prompts(people: People, config: DiffusionConfig) -> list[str]:
    """Return what every picture is denoised under: photos the instance prompt, others their caption about [V]."""
    photo, word = people.is_style("photo").tolist(), config.class_word
    named = re.compile(rf"(?<!{re.escape(config.rare_token)} )\b{re.escape(word)}\b")
    return [
        config.instance_prompt if is_photo else named.sub(f"{config.rare_token} {word}", text, count=1)
        for text, is_photo in zip(people.captions, photo, strict=True)
    ]


def _verdict(found: dict[str, Any]) -> str:
    """Say in words whether unseen people's own predictions denoise them better than another's and than the average."""
    lines = [f"on {found['people']} unseen people after {found['step']} steps, the own prediction against"]
    for other, word in (("shuffled", "another person's"), ("mean", "everybody's average")):
        loss, face = (found[f"{kind}_own-{other}"] for kind in ("diffusion", "face_cosine"))
        said = "it carries the person" if loss["hi"] < 0 else "it is not better"
        lines.append(
            f"  {word}: loss {loss['mean']:+.5f} [{loss['lo']:+.5f}, {loss['hi']:+.5f}], "
            f"face cosine {face['mean']:+.3f} [{face['lo']:+.3f}, {face['hi']:+.3f}]: {said}"
        )
    return "\n".join(lines)


class _Validation:
    """Unseen people, fixed seeds: the training's diffusion loss on another photo, and the face cosine.

    Under the own prediction, another person's and everybody's average.
    """

    def __init__(self, config: Config, base: Base, lidb: Any) -> None:
        import torch

        from hyperdb.data.people import load_people

        assert config.validation is not None
        self.base, self.lidb, self.config = base, lidb, config
        many, size = config.validation_people, config.diffusion.size
        people = load_people(config.validation, many, "validation", size, least=2)
        rows = people.photos
        if len(rows) < 2:
            raise UserError(f"{config.validation} needs at least two people with two photos each")
        views = min(len(r) for r in rows)
        self.people = people
        self.first = torch.stack([r[0] for r in rows])
        self.shown = people.images[self.first]  #                                   [I, 3, H, W]
        others = torch.stack([r[1:views] for r in rows])  #                         [I, K]
        self.others = people.images[others.flatten()].unflatten(0, others.shape)
        self.moments = base.moments(self.others[:, 0])
        self.gallery: Tensor | None = None
        self.pairs: dict[str, dict[str, float]] = {}  # own - another's, own - average; mean and interval over people

    def fits_of(self, store: WeightStore) -> Tensor:
        """Return the row in a store of each person's photo, -1 where it has none."""
        return store.rows_of(self.people.keys(store.by, self.first))

    def measure(
        self, model: Hypernet, picture: Path, store: WeightStore | None, weight_loss: Any, scale: Tensor | None
    ) -> dict[str, float]:
        """Return the scores, keep the `pairs`, and write the preview sheet."""
        import torch

        from hyperdb.adapters.base import select
        from hyperdb.adapters.inject import Injection
        from hyperdb.diffusion.loss import face_focus, predict, signal_weight, stratified_timesteps, target
        from hyperdb.faces.image import grid, save_png
        from hyperdb.metrics.face import SFace
        from hyperdb.metrics.likeness import face_cosine, galleries
        from hyperdb.metrics.score import paired
        from hyperdb.runtime.seed import generator
        from hyperdb.tuning.draw import draw

        base, count, feature = self.base, len(self.shown), SFace()
        if self.gallery is None:
            self.gallery = galleries(feature, self.others)
        model.eval()
        with torch.no_grad(), base.autocast():
            tokens = model(self.shown)
        model.train()
        own = self.lidb.factors({"tokens": tokens})
        shuffled = select(own, [(i + 1) % count for i in range(count)])
        average = self.lidb.factors({"tokens": tokens.mean(0, keepdim=True)})
        ways = {"own": own, "shuffled": shuffled, "mean": average}
        # the same noise and noise levels at every validation, weighted as in training
        levels, config, schedule = 4, self.config, base.schedule
        g = generator(config.seed, "validation")
        t = stratified_timesteps(count, levels, schedule.config.num_train_timesteps, g, config.logit_normal)
        t = t.flatten().to(base.device)
        z = self.moments[:, 0].repeat_interleave(levels, 0).to(base.device)
        noise = torch.randn(z.shape, generator=g).to(base.device)
        ids = base.tokenize([config.diffusion.instance_prompt]).expand(len(t), -1)
        weight = signal_weight(schedule, t, config.signal_weight)[:, None, None, None]
        weight = weight * face_focus(config.face_weight, *base.latent_shape[1:]).to(base.device)
        losses: dict[str, Tensor] = {}
        injection = Injection(base.targets())
        for name, factors in ways.items():
            with torch.no_grad(), injection.using(factors):
                error = weight * (predict(base, z, noise, t, ids) - target(schedule, z, noise, t)).square()
                losses[name] = error.flatten(1).mean(1).view(count, levels).mean(1).cpu()  #  [I]
        injection.remove()
        scores = {f"diffusion_{name}": round(loss.mean().item(), 5) for name, loss in losses.items()}
        if store is not None and scale is not None:
            rows = self.fits_of(store)
            if (rows >= 0).any():
                fitted = store.tokens[rows[rows >= 0]].to(base.device)
                distance = weight_loss(self.lidb, tokens[(rows >= 0).to(base.device)], fitted, scale)
                scores["weights"] = round(distance.mean().item(), 5)
        prompts = [self.config.diffusion.instance_prompt] * 2
        drawn = {n: draw(base, ways[n], count, prompts, [0, 1]) for n in ("own", "shuffled")}
        drawn["mean"] = draw(base, average, 1, prompts, [0, 1]).expand_as(drawn["own"])  # alike for all
        faces = {n: face_cosine(feature, images, self.gallery).mean(1) for n, images in drawn.items()}
        scores |= {f"face_cosine_{name}": round(cosine.mean().item(), 4) for name, cosine in faces.items()}
        self.pairs = {
            f"{kind}_own-{name}": paired(values["own"].numpy(), values[name].numpy(), config.seed)
            for kind, values in (("diffusion", losses), ("face_cosine", faces))
            for name in ("shuffled", "mean")
        }
        word = self.config.diffusion.class_word
        style = self.config.prior.prompts[-1].replace(word, f"[V] {word}")
        styled = draw(base, own, count, [style], [0])
        few = min(count, 10)
        one, two = drawn["own"][:few, :2].unbind(1)
        sheet = [self.shown[:few], one, two, drawn["shuffled"][:few, 0], styled[:few, 0]]
        pixels = torch.cat(sheet).permute(0, 2, 3, 1).numpy()
        labels = ["photo", "predicted", "predicted", "another's", "styled"]
        save_png(picture, grid(list(pixels), few, rows=labels))
        return scores
