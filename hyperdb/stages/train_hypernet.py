"""Train the hypernetwork: one photo -> LiDB tokens, learned over many people (paper section 4.2, eq. 2)."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.adapters import AdapterConfig
from hyperdb.diffusion import DiffusionConfig, check_logit_normal, check_subject
from hyperdb.hypernet import HypernetConfig
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath, resolve
from hyperdb.runtime.track import Track, check_tracker, tracked
from hyperdb.tuning.prior import PriorConfig

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

    from hyperdb.adapters.layout import Layout
    from hyperdb.adapters.lidb import LiDB
    from hyperdb.data.fits import FitStore
    from hyperdb.data.people import People
    from hyperdb.diffusion.base import Base
    from hyperdb.hypernet.loss import WeightSpace
    from hyperdb.hypernet.model import Hypernet
    from hyperdb.runtime.journal import Journal
    from hyperdb.tuning.memory import Sketch
    from hyperdb.tuning.prior import Prior
    from hyperdb.tuning.validation import Validation

FEATURE_PHOTOS = 2048  # that the encoder's features are standardised by


WRITES = (
    *("checkpoint.safetensors", "journal.jsonl", "report.json", "hypernet.safetensors", "prior.safetensors"),
    "previews/*.png",
)
KEPT = "its last checkpoint is kept"
TOGETHER = True  # several processes of a launcher are one run


@dataclass(kw_only=True)
class Config:
    """Whom the hypernetwork learns from, what it is asked for, and how long.

    In each step the hypernetwork sees one photo of each of `batch` people, the conditioning photo, and predicts an
    adapter for each. The loss is that of the paper (eq. 2) and two terms that the paper does not have:

        L = alpha * diffusion + beta * weight space + prior_weight * prior + identity_weight * identity

    - *Diffusion*: the base with the predicted adapter denoises pictures of the person. `target_view` says which ones:
      `same` is the conditioning photo, as in the paper, and `other` another photo of the person. With
      `target_style=any` they include pictures of the person in other styles. Rendered people have such pictures,
      photographed ones do not. `target_prompt` says under which prompt photos are denoised: `instance` is "a [V] face",
      as in the paper, and `caption` the photo's own caption with [V] before the class word, so that [V] is learned as
      what stays the same from place to place. Pictures in other styles always have their own caption.
    - *Weight space*: the distance from a fit that `hyperdb precompute` made before. `weights` names the store of fits;
      null or beta=0 leaves the term out. A fit of one image is compared with the prediction for that image, a fit of a
      person with the prediction for any photo of that person. `weight_loss` is the metric. `plain` is the squared
      distance of the factors, every layer counting alike, as in the paper. `gauge_free` compares the changes `A B`, for
      A times c and B over c are the same change. `fisher` weights each number by the mean square of the diffusion
      loss's gradient where the fits began: what hardly moves a picture hardly counts. It needs fits that did not begin
      at the template.
    - *Prior*: on class pictures the adapted network shall predict what the base predicts (`hyperdb.tuning.prior`).
    - *Identity*: the encoder compares photos drawn with the prediction, under the prompts of the diffusion loss, with
      the person's own (`hyperdb.tuning.identity`).

    `flips` turns half of the people left to right, the conditioning photo and the pictures alike. `prompt_dropout` is
    the share of pictures that are denoised under the empty prompt. Classifier-free guidance later subtracts what the
    network predicts there with the same adapter in place.

    With `init` the training goes on from a hypernetwork. On a linear map alone (0 iterations) the decoder that `model`
    describes begins; with `new_decoder` it does so on the map of any hypernetwork, whose decoder is left out. A smaller
    `model.summary` than it has keeps the directions in which its linear map moves the predictions most.

    Several processes of `accelerate launch` divide the people of each step, and one alone validates, draws and writes.
    Their number changes the result by rounding only, and may change when the training goes on.

    If `weights` names fits, predictions begin at their mean, whatever beta is. The training is measured on the people
    of `validation`, who are never trained on: in pictures of "a [V] face", and under each of the `changed` prompts.
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
    new_decoder: bool | None = None  # true: of `init` only the encoder and the linear map
    name: str = "default"
    out: FilePath = "runs/train_hypernet/default"
    alpha: float = 1.0  # open in the paper
    beta: float = 0.1  # open in the paper
    fit_share: float = 0.25  # share of a batch that is drawn from the people who have a fit
    weight_loss: str = "gauge_free"
    target_view: str
    target_style: str
    target_prompt: str
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
    batch: int  # people in each step, of all processes together
    levels: int  # noise levels for each person in each step, a picture at each
    logit_normal: list[float] | None  # mean and standard deviation of the logit of the noise level; null: uniform
    rate: float  # learning rate of the decoder
    matrix_rate: float | None  # rate of orthogonal steps (Muon) for the decoder's matrices; null: AdamW for all
    linear_rate: float | None  # rate of plain steps for the map of `model.linear`; null: there is none, or it stays
    encoder_rate: float  # learning rate of the image encoder; 0: it stays as it was pretrained
    warmup: int  # steps over which the rates rise from 0
    decay: float  # share of the steps, at the end, over which the rates fall as a cosine
    ema: float  # decay of the running average of the weights, which is what is written
    default_spread: float  # scale of the predicted numbers where there are no fits to take it from
    changed: list[str]  # such as 'a photo of a [V] face, on the beach'
    validate_every: int  # steps
    validation_people: int
    save_every: int  # steps between checkpoints, from which the same command goes on
    tracker: str | None = None  # wandb, tensorboard or trackio; null: nobody watches
    seed: int = 0
    dry_run: bool = False  # load nothing: say which networks would be loaded, where, and in how much memory

    def __post_init__(self) -> None:
        self.adapter.require_predictable()
        if self.weight_loss not in ("gauge_free", "plain", "fisher"):
            raise UserError(f"weight_loss={self.weight_loss!r}: expected gauge_free, plain or fisher")
        if self.target_view not in ("same", "other"):
            raise UserError(f"target_view={self.target_view!r}: expected same or other")
        if self.target_style not in ("same", "any"):
            raise UserError(f"target_style={self.target_style!r}: expected same or any")
        if self.target_prompt not in ("instance", "caption"):
            raise UserError(f"target_prompt={self.target_prompt!r}: expected instance or caption")
        if self.target_style == "any" and self.target_view == "same":
            raise UserError("target_style=any needs target_view=other: the conditioning photo has one style")
        check_subject("changed", self.changed)
        check_tracker(self.tracker)
        check_logit_normal(self.logit_normal)
        if self.identity_weight > 0 and (self.model.summary < 1 or self.identity_people < 1):
            raise UserError("identity_weight > 0 needs model.summary and identity_people of at least 1")
        if self.diffusion.dtype == "fp16":
            raise UserError("diffusion.dtype=fp16 loses the small gradients of this training; use bf16 or fp32")
        if self.validation_weights is not None and (self.validation is None or self.weights is None or self.beta <= 0):
            raise UserError("validation_weights needs validation, weights and beta > 0")
        if not 0 <= self.prompt_dropout < 1:
            raise UserError(f"prompt_dropout={self.prompt_dropout}: expected 0 to less than 1")
        if self.alpha <= 0 and (self.flips or self.prompt_dropout > 0 or self.prior_weight > 0):
            raise UserError("flips, prompt_dropout and prior_weight concern the diffusion loss: set alpha > 0")
        if self.prior_weight > 0 and self.prior_rows < 1:
            raise UserError(f"prior_weight={self.prior_weight:g} needs prior_rows of at least 1")
        if self.encoder_rate > 0 and self.model.encoder.frozen:
            raise UserError(f"encoder_rate={self.encoder_rate:g}: it is frozen; set model.encoder.frozen=false")
        if self.init is None and self.model.linear != (self.linear_rate is not None):
            raise UserError("model.linear=true and linear_rate need each other, or the map stays as it begins, at zero")
        if self.new_decoder and self.init is None:
            raise UserError("new_decoder=true is for the hypernetwork of init; set it to false")
        if not 0 <= self.fit_share <= 1:
            raise UserError(f"fit_share={self.fit_share}: expected 0 to 1")
        if self.alpha <= 0 and (self.beta <= 0 or self.weights is None):
            raise UserError("nothing to learn from: set alpha > 0, or beta > 0 with weights=STORE")


def passes(config: Config, sketch: Sketch) -> None:
    """Count the people; measure a step and a validation; count what the optimizer keeps of each network."""
    from hyperdb.tuning.draw import together
    from hyperdb.tuning.memory import rows
    from hyperdb.tuning.validation import LEVELS, group

    rank = config.adapter.tokens(sketch.layout).rank
    hypernet = sketch.add_hypernet(config.model, config.adapter.tokens(sketch.layout))
    hypernet.encoder.requires_grad_(config.encoder_rate > 0 and not config.model.encoder.frozen)
    people = config.batch
    sketch.read(config.data, config.people, "train", latents=(1 + config.flips) * (config.alpha > 0))
    if config.validation is not None:
        sketch.read(config.validation, config.validation_people, "validation", least=2)
    with sketch.measure("encoding photos"):
        sketch.encode()
    with sketch.measure("training step"):
        tokens = sketch.predict(people, trained=True)
        if config.alpha > 0:
            sketch.denoise(people * rows(config), sketch.factors(people, rank, trained=True))
        tokens.float().square().mean().backward()
    if config.identity_weight > 0:
        with sketch.measure("identity loss"):
            people = min(config.identity_people, config.batch)
            sketch.draw(people, sketch.factors(people, rank, trained=True))
    if config.validation is not None:
        with sketch.measure("validation"):
            people = min(group(config.diffusion.size), config.validation_people or 1)
            sketch.denoise(people * LEVELS, sketch.factors(people, rank, trained=False))
            sketch.draw(together(config.diffusion.size))
    sketch.keep_training("image encoder", "hypernetwork decoder")


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


def _prompts(people: People, config: DiffusionConfig, photos: str) -> list[str]:
    """Return what every picture is denoised under: its caption about [V]; photos so or under the `instance` prompt."""
    photo, word = people.is_style("photo").tolist(), config.class_word
    named = re.compile(rf"(?<!{re.escape(config.rare_token)} )\b{re.escape(word)}\b")
    return [
        config.instance_prompt
        if is_photo and photos == "instance"
        else named.sub(f"{config.rare_token} {word}", text, count=1)
        for text, is_photo in zip(people.captions, photo, strict=True)
    ]


@dataclass(kw_only=True)
class Batch:
    """What one step is about: I people, of each S pictures to denoise, and of the prior P rows for each."""

    images: Tensor  # [I, 3, H, W] conditioning photos, uint8
    # without the diffusion loss there are none of these
    rows: list[Tensor]  # latents, noise, timesteps and token ids, [I, S + P, ...] each
    goal: Tensor  # [I, S + P, c, h, w] what the base shall predict for them
    fit_rows: Tensor  # [I] which row of the store is the fit of each photo; -1: there is none
    noise: Tensor  # [J, c, h, w] what the pictures of the identity loss begin at; J = 0 without that loss
    prompts: list[str]  # what these J people are drawn under
    portraits: list[Tensor]  # all photos [K, 3, H, W] of each of those drawn in this step by any process
    seed: int  # of how the pictures are moved before they are compared
    part: slice  # which of the step's people these are


class Batches:
    """Whom and what the steps are about.

    `fit_rows [n]` says which row of a store is the fit of each picture of `people`, and -1 where there is none.
    """

    def __init__(self, config: Config, base: Base, people: People, fit_rows: Tensor, prior: Prior | None) -> None:
        import torch

        from hyperdb.data.people import latent_moments
        from hyperdb.runtime.ahead import Ahead

        self.config, self.base, self.people, self.fit_rows, self.prior = config, base, people, fit_rows, prior
        # nothing is denoised without the diffusion loss: training on fits alone takes seconds to begin
        denoises = config.alpha > 0
        self.latents = latent_moments(base, people) if denoises else None
        self.turned = latent_moments(base, people, mirrored=True) if config.flips else None
        self.photos = people.photos
        self.fitted_photos = [rows[fit_rows[rows] >= 0] for rows in self.photos]
        self.usable, self.fitted = (
            torch.tensor([i for i, rows in enumerate(each) if len(rows)], dtype=torch.long)
            for each in (self.photos, self.fitted_photos)
        )
        self.few_fitted = round(config.batch * config.fit_share) if len(self.fitted) else 0
        if config.alpha <= 0:  # nobody else has anything to teach
            self.few_fitted = config.batch
        every_style = config.target_style == "any"
        self.pictures = people.rows if every_style else self.photos
        self.is_photo = people.is_style("photo")
        self.prompts = _prompts(people, config.diffusion, config.target_prompt)
        differ = set(self.prompts) != {config.diffusion.instance_prompt}
        self.ids = base.tokenize(self.prompts) if denoises and differ else None
        self.instance, self.nothing = base.tokenize([config.diffusion.instance_prompt]), base.tokenize([""])
        self.ahead = Ahead(self.batch)

    def batch(self, step: int, process: int = 0, processes: int = 1) -> Batch:
        """Draw the batch of a 0-based step; of several processes each has every so many-th of its people."""
        import torch

        from hyperdb.diffusion.loss import stratified_timesteps, target
        from hyperdb.runtime.seed import derive, generator

        config, base, count, levels = self.config, self.base, self.config.batch, self.config.levels
        part = slice(process, None, processes)
        g = generator(config.seed, "hypernet", 0, step)
        # the first few have a fit; what conditions is what was fitted
        few, groups = self.few_fitted, [self.fitted] * self.few_fitted + [self.usable] * (count - self.few_fitted)
        who = [int(group[torch.randint(0, len(group), (), generator=g)]) for group in groups]
        given = [(self.fitted_photos if k < few else self.photos)[i] for k, i in enumerate(who)]
        shown, wanted = _views(given, [self.pictures[i] for i in who], levels, config.target_view, g)  # [I], [I, S]
        mirror = torch.zeros(count, dtype=torch.bool)
        rows, goal = [], torch.empty(0)
        if self.latents is not None:
            ids = self.ids[wanted] if self.ids is not None else self.instance.expand(count, levels, -1)
            t = stratified_timesteps(count, levels, base.schedule.config.num_train_timesteps, g, config.logit_normal)
            latents = self.latents[wanted]  #                                        [I, S, 2, c, h, w]
            if self.turned is not None:  # a turned photo is another image: those drawn for their fit stay as they are
                mirror[few:] = torch.rand(count - few, generator=g) < 0.5
                latents[mirror] = self.turned[wanted[mirror]]
            mean, std = latents.float().unbind(2)  #                                 [I, S, c, h, w]
            jitter, noise = (torch.randn(mean.shape, generator=g) for _ in "zn")
            if config.prompt_dropout > 0:
                dropped = torch.rand(count, levels, 1, generator=g) < config.prompt_dropout
                ids = torch.where(dropped.to(base.device), self.nothing, ids)
            rows = [x[part].to(base.device) for x in (mean + std * jitter, noise, t, ids)]  #  [I, S, ...] each
            goal = target(base.schedule, *(x.flatten(0, 1) for x in rows[:3])).unflatten(0, (-1, levels))
            if self.prior is not None:
                mixed = torch.randperm(count * config.prior_rows, generator=g)
                kept = self.prior.rows(len(mixed), config.seed, step)
                each = [x[mixed].unflatten(0, (count, -1))[part] for x in kept]
                *rows, goal = (torch.cat(pair, 1) for pair in zip((*rows, goal), each, strict=True))  # [I, S + P, ...]
        images, turned = self.people.images[shown[part]], mirror[part]  #  [I, 3, H, W], decodes no other
        images[turned] = images[turned].flip(-1)
        some = who[: config.identity_people] if config.identity_weight > 0 else []
        portraits = [self.people.images[self.photos[i]] for i in some]
        # a photo's prompt: that of the first photo among what is denoised, else that of what conditions
        rows_of = [torch.cat([row[self.is_photo[row]], shown[i, None]])[0] for i, row in enumerate(wanted[: len(some)])]
        return Batch(
            images=images,
            rows=rows,
            goal=goal,
            fit_rows=self.fit_rows[shown].where(~mirror, -1)[part],
            noise=torch.randn((len(some), *base.latent_shape), generator=g)[part],
            prompts=[self.prompts[row] for row in rows_of[part]],
            portraits=[x.flip(-1) if turn else x for x, turn in zip(portraits, mirror[: len(some)], strict=True)],
            seed=derive(config.seed, "identity", 0, step),
            part=part,
        )


class Objective:
    """The terms of the loss: eq. 2 and those that the paper does not have.

    `fits` is the store that predictions are compared with, by the distance `weight_space`.
    """

    def __init__(
        self, config: Config, base: Base, model: Hypernet, lidb: LiDB, fits: FitStore | None,
        weight_space: WeightSpace | None,
    ) -> None:  # fmt: skip
        from hyperdb.adapters.inject import Injection
        from hyperdb.diffusion.loss import face_focus

        self.config, self.base, self.model, self.lidb = config, base, model, lidb
        self.fits, self.weight_space = fits, weight_space
        self.injection = Injection(base.targets())
        self.last: tuple[Tensor, Tensor] | None = None  # the error [I, S + P] of the last step, and the noise levels
        self.focus = face_focus(config.face_weight, *base.latent_shape[1:]).to(base.device)

    def backward(self, tokens: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the terms for predictions `[I, N, D]`, leaves, whose `grad` is then that of the sum of the terms."""
        terms: dict[str, Tensor] = {}
        if self.config.alpha > 0:
            terms |= self._denoise(tokens, batch)
        if len(batch.noise):
            terms["identity"] = self._identify(tokens, batch)
        if self.fits is not None and self.weight_space is not None and (batch.fit_rows >= 0).any():
            distance = self.weight_space(tokens, self.fits.tokens, batch.fit_rows)
            # eq. 2, second term: where a fit exists
            terms["weights"] = self.config.beta * distance.sum() / len(tokens)
            terms["weights"].backward()
        return {name: term.detach() for name, term in terms.items()}

    def bad_levels(self) -> str:
        """Say at which noise levels the last step's errors were no numbers."""
        from hyperdb.diffusion.loss import bad_levels

        return "" if self.last is None else bad_levels(self.base.schedule, *self.last)

    # eq. 2, first term: on everyone
    def _denoise(self, tokens: Tensor, batch: Batch) -> dict[str, Tensor]:
        import torch

        from hyperdb.diffusion.loss import predict, signal_weight

        config, base, (count, levels) = self.config, self.base, (len(tokens), self.config.levels)
        terms = {}
        # in use until the backward pass has ended: checkpointing computes with it again
        with self.injection.using(self.lidb.factors({"tokens": tokens})):
            predicted = predict(base, *(x.flatten(0, 1) for x in batch.rows)).unflatten(0, (count, -1))
            weight = signal_weight(base.schedule, batch.rows[2], config.signal_weight)[..., None, None, None]
            square = weight * (predicted - batch.goal).square()  #                [I, S + P, c, h, w]
            self.last = square.detach().flatten(2).mean(2), batch.rows[2]
            terms["diffusion"] = config.alpha * (square[:, :levels] * self.focus).mean()
            if config.prior_weight > 0:
                terms["prior"] = config.prior_weight * square[:, levels:].mean()
            torch.stack(list(terms.values())).sum().backward()
        return terms

    def _identify(self, tokens: Tensor, batch: Batch) -> Tensor:
        from hyperdb.runtime.precision import attention
        from hyperdb.tuning.identity import identity_loss

        config, guide = self.config, self.config.diffusion.guide()
        own = self.lidb.factors({"tokens": tokens[: len(batch.noise)]})
        with (
            self.injection.using(own, repeat=guide.adapted, plain=guide.plain),
            attention(_fused(config)),
        ):
            distance = identity_loss(
                self.base, self.model, batch.noise, batch.portraits, config.identity_steps, batch.prompts, batch.seed,
                batch.part,
            )  # fmt: skip
            # a mean over the people of all processes, whose gradients become a mean over processes
            share = len(distance) * batch.part.step / len(batch.portraits)
            term = config.identity_weight * distance.mean() * share
            term.backward(inputs=[tokens])  # never the encoder: it would learn to see less
        return term


def _require_form(config: Config, model: Hypernet) -> None:
    """Raise `UserError` if the hypernetwork of `init` has another form than the settings ask for."""
    names = ("iterations", "width", "heads", "layers", "head") if model.config.iterations else ()
    odd = [name for name in names if getattr(model.config, name) != getattr(config.model, name)]
    if config.model.linear and not model.config.linear:
        odd.append("linear")
    if config.model.summary > model.config.summary:
        odd.append("summary")
    if odd:
        form = " ".join(f"model.{name}={str(getattr(model.config, name)).lower()}" for name in odd)
        raise UserError(f"{config.init} was made with {form}; set the same")


def _fused(config: Config) -> bool:
    """Whether the hypernetwork's attention may be fused, as the base's is (`DiffusionConfig.attention`)."""
    return config.diffusion.attention != "eager"


TERMS = ("diffusion", "prior", "identity", "weights")


def _together(terms: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the mean of each term over the processes, of which some may be without it: there it is 0."""
    import torch

    nothing = torch.zeros((), device=accelerator.device)
    values = torch.stack([terms.get(name, nothing).float() for name in TERMS])
    there = torch.tensor([float(name in terms) for name in TERMS], device=accelerator.device)
    values, there = accelerator.reduce(torch.stack([values, there]), "mean")
    return {name: value for name, value, some in zip(TERMS, values, there, strict=True) if some > 0}


def backward(
    step: int, *, batches: Batches, network: nn.Module, objective: Objective, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Compute the gradients of a 0-based step in the `network`, and return the terms of its loss, of all processes.

    Each term goes back as far as the predictions, while what it needs is in use; then all go through the network once.
    """
    from hyperdb.runtime.precision import attention

    batch = batches.ahead(step, accelerator.process_index, accelerator.num_processes)
    with objective.base.autocast(), attention(_fused(objective.config)):
        predicted = network(batch.images)  #                                        [I, N, D]
    tokens = predicted.detach().requires_grad_()
    terms = objective.backward(tokens, batch)
    predicted.backward(tokens.grad)
    return _together(terms, accelerator) if accelerator.num_processes > 1 else terms


def _fits(config: Config, folder: str, base: Base, layout: Layout, people: People) -> FitStore:
    """Load the store of fits of people. Raises `UserError` for fits of another kind than what is to be predicted."""
    from hyperdb.data.fits import load_store, made_from

    fits = load_store(folder, layout, **made_from(base, people))
    if asdict(fits.lidb.config) != asdict(config.adapter):
        raise UserError(f"{folder} was made with lidb {asdict(fits.lidb.config)}; set the same or refit")
    if config.weight_loss == "fisher" and fits.moment is None:
        raise UserError(
            f"weight_loss=fisher needs the gradients where the fits of {folder} began; "
            "run `hyperdb precompute start=average`, or choose another weight_loss"
        )
    return fits


def _validation(
    config: Config, base: Base, lidb: LiDB, layout: Layout, weight_space: WeightSpace | None
) -> Validation | None:
    """Load the people to measure on and their fits; nobody if none are asked for."""
    from hyperdb.data.people import load_people
    from hyperdb.tuning.validation import Validation

    if config.validation is None:
        return None
    people = load_people(config.validation, config.validation_people, "validation", config.diffusion.size, least=2)
    if people.identities < 2:
        raise UserError(f"{config.validation} needs at least two people with two photos each")
    folder, word = config.validation_weights, config.diffusion.class_word
    validation = Validation(
        base=base,
        lidb=lidb,
        people=people,
        style=config.prior.prompts[-1].replace(word, f"[V] {word}"),
        changed=config.changed,
        logit_normal=config.logit_normal,
        signal_weight=config.signal_weight,
        face_weight=config.face_weight,
        fits=_fits(config, folder, base, layout, people) if folder is not None else None,
        weight_space=weight_space,
        seed=config.seed,
    )
    if validation.fit_rows is not None and (validation.fit_rows < 0).all():
        raise UserError(f"{folder} holds no fit of the people in {config.validation}")
    return validation


def _optimizer(config: Config, model: Hypernet) -> torch.optim.Optimizer:
    """Return what trains the decoder: AdamW, Muon for its matrices if asked for, and plain steps for a linear map."""
    from hyperdb.runtime.optim import Muon, adamw

    named = dict(model.decoder.named_parameters())
    linear = [named.pop("linear")] if model.config.linear else []
    if config.matrix_rate is None and not linear:
        return adamw(named.values(), config.rate)
    # positions and biases are vectors, a layer each
    matrices = {n for n, p in named.items() if n.endswith("weight") and p.ndim > 1 and config.matrix_rate is not None}
    vectors, stacks = ([p for n, p in named.items() if (n in matrices) is kind] for kind in (False, True))
    return Muon(vectors, config.rate, stacks, config.matrix_rate or 0.0, linear, config.linear_rate or 0.0)


def _check_whole() -> None:
    """Raise `UserError` if `accelerate launch` was told to divide a network among processes."""
    for word in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{word}") == "true":
            raise UserError(
                f"this configuration of accelerate asks for {word}, but every process keeps a whole hypernetwork here "
                "(docs/cluster.md says why that is enough); use one of conf/accelerate"
            )


def _processes(config: Config, base: Base) -> Accelerator:
    """Bring the processes of `accelerate launch` together; one is alone. Raises `UserError` if they cannot share."""
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if base.device.index not in (None, int(os.environ.get("LOCAL_RANK", "0"))):
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # a process that sees one card alone calls it the first
    accelerator = Accelerator(
        cpu=base.device.type == "cpu",
        device_placement=False,  # beside the base, wherever that is
        mixed_precision="no",  # diffusion.dtype decides
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # while one draws class pictures or validates
            # without refinements the trunk is not used
            DistributedDataParallelKwargs(find_unused_parameters=config.model.iterations == 0),
        ],
    )
    count = accelerator.num_processes
    if config.batch % count:
        raise UserError(f"batch={config.batch} people cannot be divided among {count} processes; take a multiple")
    if count > 1 and accelerator.device != base.device and base.device.type != "cpu":
        raise UserError(
            f"diffusion.device={config.diffusion.device}: {count} processes need a device each; use auto, cuda or cpu"
        )
    return accelerator


@tracked
def run(config: Config, track: Track) -> Path:
    """Train; write `out/hypernet.safetensors` (averaged weights, fp16) and `out/prior.safetensors`."""
    import torch

    from hyperdb.adapters.layout import Layout
    from hyperdb.data.people import load_people
    from hyperdb.hypernet.loss import WeightSpace
    from hyperdb.hypernet.model import Hypernet
    from hyperdb.runtime.files import hash_files, load_json, save_json
    from hyperdb.runtime.loop import train
    from hyperdb.runtime.optim import EMA, Schedule
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.provenance import provenance
    from hyperdb.runtime.recipe import plain, recipe
    from hyperdb.runtime.seed import derive
    from hyperdb.tuning.prior import load_prior
    from hyperdb.tuning.validation import verdict

    # --- base, people, fits
    _check_whole()
    base = config.diffusion.load()
    accelerator = _processes(config, base)
    main = accelerator.is_main_process
    layout = Layout.of(base.targets())
    people = load_people(config.data, limit=config.people, size=config.diffusion.size)
    photos = torch.cat(people.photos)
    if len(photos) == 0:
        raise UserError(f"{config.data} holds no photos of people")
    fits = None
    if config.weights is not None:
        fits = _fits(config, config.weights, base, layout, people)
    lidb = fits.lidb if fits is not None else config.adapter.tokens(layout)
    lidb = lidb.to(base.device)
    origin = {"base": base.digest, "data": people.digest, "weights": fits.digest if fits is not None else ""}
    # `init` brings its own encoder
    for part, file in (("init", config.init), ("encoder", None if config.init else config.model.encoder.weights)):
        if file is not None and resolve(file).is_file():  # else whoever reads it says so
            origin[part] = hash_files([resolve(file)])
    whole = {**recipe(config), "made_from": origin}
    del whole["changed"]  # drawn in validations alone
    out = claim(config.out, WRITES, whole) if main else Path(config.out)
    fit_rows = torch.full((len(people),), -1)  # whose fit belongs to which photo
    if fits is not None and config.beta > 0:
        with accelerator.main_process_first():  # the others read what it has looked at
            fit_rows[photos] = fits.rows_of(people.keys(fits.by, photos))
        if (fit_rows < 0).all():
            raise UserError(f"{config.weights} holds no fit of the people in {config.data}; set weights=null or refit")
    with accelerator.main_process_first():  # the others read what it has drawn and encoded
        prior = load_prior(base, config.prior, out / "prior.safetensors") if config.prior_weight > 0 else None
        batches = Batches(config, base, people, fit_rows, prior)

    # --- model
    torch.manual_seed(derive(config.seed, "hypernet weights"))  # the only way to seed the modules' initialisation
    if config.init is not None:
        model = Hypernet.load(resolve(config.init))
        model.require(lidb, config.init)
        if config.new_decoder and not model.config.linear:
            raise UserError(f"new_decoder=true: {config.init} has no linear map to begin at; set it to false")
        if config.new_decoder or model.config.iterations == 0:
            model.begin_refining(config.model)
        if config.model.summary < model.config.summary:
            model.cut(config.model.summary)
        _require_form(config, model)
        if model.encoder.frozen and not config.model.encoder.frozen:
            model.unfreeze()
    else:
        model = Hypernet(config.model, lidb, config.default_spread)
        if fits is not None and len(fits.tokens) > 1:
            model.standardise(fits.tokens, fits.moment)
        shown = photos[:FEATURE_PHOTOS]
        model.to(base.device).standardise_features(people.images.part(shown), people.images.key(shown))
    if config.encoder_rate == 0:
        model.encoder.requires_grad_(False)
    model = model.to(base.device).train()
    inside = [p for p in model.encoder.parameters() if p.requires_grad]
    outside = list(model.decoder.parameters())
    optimizer = _optimizer(config, model)
    if inside:
        optimizer.add_param_group({"params": inside, "lr": config.encoder_rate})
    ema = EMA([*outside, *inside], config.ema)
    network, optimizer = accelerator.prepare(model, optimizer)
    weight_space = None
    if fits is not None and config.beta > 0:
        weight_space = WeightSpace(lidb, fits.tokens, config.weight_loss, fits.moment)
    objective = Objective(config, base, model, lidb, fits, weight_space)
    validation = _validation(config, base, lidb, layout, weight_space) if main else None

    # --- train
    def after(done: int, terms: dict[str, float], journal: Journal) -> None:
        if validation is not None and (done % config.validate_every == 0 or done == config.steps):
            ema.swap()
            sheet = out / "previews" / f"step-{done:06d}.png"
            found, pairs = validation.measure(model, sheet)
            ema.swap()
            save_json(out / "validation.json", {"step": done, "people": validation.people.identities, **pairs})
            found = {f"validation/{k}": v for k, v in found.items()}
            journal.record(done, **found)
            track.log(done, found)
            track.picture(done, "preview", sheet)

    def agreed(mine: bool) -> bool:
        if accelerator.num_processes == 1:
            return mine
        return bool(accelerator.reduce(torch.tensor(float(mine), device=base.device)) > 0)

    step = partial(backward, batches=batches, network=network, objective=objective, accelerator=accelerator)
    schedule = Schedule(config.steps, config.warmup, config.decay)
    train(
        "hypernetwork", out, whole, schedule, optimizer, ema, step, after, config.save_every, main=main, agreed=agreed,
        track=track, where=objective.bad_levels, fixed=list(model.buffers()),
    )  # fmt: skip

    # --- write
    objective.injection.remove()
    accelerator.end_training()
    if not main:
        return out
    settings = json.dumps(plain(recipe(config)))
    model.save(out / "hypernet.safetensors", {**origin, "steps": str(config.steps), "settings": settings})
    save_json(out / "report.json", {"config": asdict(config), **origin, **provenance()})
    if validation is not None and (out / "validation.json").is_file():
        print(verdict(load_json(out / "validation.json")))
    print(f"hypernetwork in {out / 'hypernet.safetensors'}, previews in {out / 'previews'}")
    return out
