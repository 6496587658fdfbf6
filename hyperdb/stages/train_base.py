"""Train the embedded base's text encoder and UNet on rendered people and their captions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperdb.diffusion import check_logit_normal
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath, resolve
from hyperdb.runtime.track import Track, check_tracker, tracked

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler
    from torch import Tensor
    from transformers import CLIPTokenizer

    from hyperdb.diffusion.base import Base
    from hyperdb.runtime.optim import EMA


WRITES = ("checkpoint.safetensors", "journal.jsonl", "report.json", "samples-*.png", "base/*", "base/*/*")
KEPT = "its last checkpoint is kept"


@dataclass
class Config:
    """What the base learns from, how large its networks are, and how it is trained.

    The UNet learns to denoise the latents of rendered people under their captions, and the text encoder is trained
    along. Both are new, or go on from the base in `init`, which then decides all sizes.

    `vae` is the autoencoder whose latents are learned. Without it that of `init` is used, and without `init` the one
    that `hyperdb train_autoencoder` writes by default.
    """

    data: FilePath = "data/heads"  # rendered people: a folder of `hyperdb render_heads`
    vae: FilePath | None = None  # folder of an autoencoder; null: as said above
    init: FilePath | None = None  # folder of a base to go on from; null: a new one
    name: str = "default"  # of the run, the last part of `out`
    out: FilePath = "runs/train_base/default"  # folder that is written
    # widths of the UNet's levels; each after the first halves the side of the latents
    channels: list[int] = field(default_factory=lambda: [96, 192, 256])
    # attention heads of each level; one head of 64 at 16 x 16 is fast
    heads: list[int] = field(default_factory=lambda: [1, 4, 4])
    text_width: int = 128  # width of the text encoder, and of what the UNet attends to
    text_layers: int = 4  # transformer layers of the text encoder
    text_length: int = 24  # tokens of a prompt; what is longer is cut off
    steps: int = 1100  # of the optimiser, in all
    batch: int = 64  # pictures in each step
    rate: float = 1e-3  # AdamW's learning rate, after the warm-up and before the decay
    warmup: int = 200  # steps over which the rate rises from 0
    decay: float = 0.6  # share of the steps, at the end, over which the rate falls as a cosine
    ema: float = 0.995  # decay of the running average of the weights, which is what is measured and written
    prompt_dropout: float = 0.1  # share of the captions that are left empty, for classifier-free guidance
    logit_normal: list[float] | None = None  # mean and standard deviation of logit(noise level); null: uniform
    save_every: int = 250  # steps from one checkpoint, and one sheet of samples, to the next
    tracker: str | None = None  # wandb, tensorboard or trackio; null: nobody watches
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # of the first weights, the batches and the noise

    def __post_init__(self) -> None:
        check_tracker(self.tracker)
        check_logit_normal(self.logit_normal)
        if not self.channels or len(self.heads) != len(self.channels):
            raise UserError(f"channels={self.channels} heads={self.heads}: expected as many heads, one for each level")


def _apply(pieces: list[str], first: str, second: str) -> list[str]:
    """Join every adjacent (first, second) among the pieces, from the left."""
    joined: list[str] = []
    for piece in pieces:
        if joined and joined[-1] == first and piece == second:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def build_tokenizer(words: list[str], length: int) -> CLIPTokenizer:
    """Return a CLIP tokenizer to which each of `words` is one token and any other word a spelling.

    Each word first takes the merges that exist, in their order, then adds its own from the left: encoding replays this.
    The same words give the same ids on every run, so a resumed training reads its captions as before.
    """
    from itertools import pairwise

    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges: list[tuple[str, str]] = []
    for word in sorted(words):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            known = next((m for m in merges if m in pairwise(pieces)), None)
            if known is None:
                known = (pieces[0], pieces[1])
                merges.append(known)
            pieces = _apply(pieces, *known)
    letters = sorted(ByteLevel.alphabet())
    ends = [c + "</w>" for c in letters]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *ends, *(first + second for first, second in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def noise_schedule() -> DDPMScheduler:
    """Return the cosine schedule: it ends at a signal-to-noise ratio of zero, where sampling begins.

    Stable Diffusion's own schedule leaves a trace of the image at its last step. On small latents that trace outweighs
    the noise's mean, and pictures sampled from pure noise come out grey.
    """
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # without effect here; the pipeline asks for it
    )


def _running(device: str) -> dict[str, Any]:
    """Return the settings of a base to be trained on a device; see `DiffusionConfig.attention`."""
    return {"device": device, "attention": "eager" if device == "cpu" else "sdpa"}


def new_base(config: Config, vae: AutoencoderKL, words: list[str], device: str = "cpu") -> Base:
    """Return an untrained base around an autoencoder, whose vocabulary is `words`, in float32 on `device`."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from hyperdb.diffusion import DiffusionConfig
    from hyperdb.diffusion.base import Base
    from hyperdb.runtime.seed import derive

    tokenizer = build_tokenizer(words, config.text_length)
    levels = len(config.channels)
    torch.manual_seed(derive(config.seed, "base weights"))  # the only way to seed diffusers' initialisation
    unet = UNet2DConditionModel(
        sample_size=vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        cross_attention_dim=config.text_width,
        attention_head_dim=tuple(config.heads),  # diffusers' name for the number of heads
        block_out_channels=tuple(config.channels),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        norm_num_groups=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=config.text_length,
            projection_dim=config.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    settings = DiffusionConfig(size=vae.config.sample_size, **_running(device))
    for model in (unet, text_encoder, vae):
        model.to(device)
    return Base(settings, unet, text_encoder, vae, tokenizer, noise_schedule(), digest="")


def save_base(base: Base, out: Path) -> None:
    """Write a Stable Diffusion folder that `StableDiffusionPipeline.from_pretrained` loads, fp16 safetensors."""
    import copy

    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from hyperdb.runtime.files import load_json, save_json, writing

    scheduler = DDIMScheduler.from_config(base.schedule.config)
    half = {n: copy.deepcopy(getattr(base, n)).half().cpu() for n in ("unet", "text_encoder", "vae")}
    half = {n: m.to(memory_format=torch.contiguous_format) for n, m in half.items()}
    pipeline = StableDiffusionPipeline(
        **half,
        tokenizer=base.tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with writing(out):
        pipeline.save_pretrained(out, safe_serialization=True)
    # without a dtype asked for, transformers takes the config's and diffusers float32: make them the same
    text_config = out / "text_encoder" / "config.json"
    save_json(text_config, {**load_json(text_config), "dtype": "float32"})


@tracked
def run(config: Config, track: Track) -> Path:
    """Train from `config.data`; write the base to `out/base` and return `out`."""
    import torch
    from diffusers import AutoencoderKL

    from hyperdb.data.people import latent_moments, load_people
    from hyperdb.diffusion import DiffusionConfig
    from hyperdb.diffusion.base import pick_device
    from hyperdb.diffusion.digest import digest_vae
    from hyperdb.diffusion.loss import bad_levels, diffusion_loss, stratified_timesteps
    from hyperdb.heads.captions import vocabulary
    from hyperdb.runtime.files import hash_files, save_json
    from hyperdb.runtime.loop import train
    from hyperdb.runtime.optim import EMA, Schedule, adamw
    from hyperdb.runtime.output import claim
    from hyperdb.runtime.recipe import recipe
    from hyperdb.runtime.seed import generator

    # --- data, model
    people = load_people(config.data)
    wanted = config.vae or ("runs/train_autoencoder/default/vae" if config.init is None else None)
    if wanted is not None and not (resolve(wanted) / "config.json").is_file():
        raise UserError(
            f"no autoencoder at {wanted}; run `hyperdb train_autoencoder` first or set vae=FOLDER, its folder vae"
        )
    vae = AutoencoderKL.from_pretrained(resolve(wanted)) if wanted is not None else None
    device = str(pick_device(config.device))
    if config.init is None:
        assert vae is not None
        base = new_base(config, vae, vocabulary(), device)
        base.digest = hash_files(resolve(str(wanted)))
    else:
        # trained in float32; the matrix products alone in bf16
        base = DiffusionConfig(path=config.init, dtype="fp32", **_running(device)).load()
        base.config.dtype = "bf16"
        if vae is not None:
            mine, theirs = ((len(x.block_out_channels), x.latent_channels) for x in (vae.config, base.vae.config))
            if mine != theirs:
                raise UserError(f"{wanted} has other latents than the autoencoder of {config.init}")
            base.vae = vae.requires_grad_(False).eval().to(device)
        base.config.size = base.vae.config.sample_size
        base.schedule = noise_schedule()
    out = Path(config.out)
    latents = latent_moments(base, people)
    latents = latents.to(device)
    ids = base.tokenize(people.captions)
    empty = base.tokenize([""])
    base.unet.requires_grad_(True).train()
    base.text_encoder.requires_grad_(True).train()
    params = [*base.unet.parameters(), *base.text_encoder.parameters()]

    # --- train
    last: list[Tensor] = []  # the error of each row of the last step, and its noise level

    def backward(step: int) -> dict[str, Tensor]:
        g = generator(config.seed, "base", step)
        index = torch.randint(0, len(people), (config.batch,), generator=g)
        mean, std = latents[index.to(device)].float().unbind(1)
        drawn = g if device == "cpu" else generator(config.seed, "base noise", step, device=device)
        jitter = torch.randn(mean.shape, generator=drawn, device=device)
        dropped = torch.rand(config.batch, 1, generator=g) < config.prompt_dropout
        if config.logit_normal is None:
            t = torch.randint(0, base.schedule.config.num_train_timesteps, (config.batch,), generator=g)
        else:
            count = base.schedule.config.num_train_timesteps
            t = stratified_timesteps(1, config.batch, count, g, config.logit_normal)[0]
        noise = torch.randn(mean.shape, generator=drawn, device=device)
        z = mean + std * jitter
        words = torch.where(dropped.to(device), empty, ids[index.to(device)])
        errors = diffusion_loss(base, z, noise, t.to(device), words)
        loss = errors.mean()
        loss.backward()
        last[:] = errors.detach(), t.to(device)
        return {"diffusion": loss.detach()}

    def saved(done: int) -> None:
        sheet = out / f"samples-{done:06d}.png"
        _preview(base, ema, sheet)
        track.picture(done, "samples", sheet)

    optimizer, ema = adamw(params, config.rate, 1e-2), EMA(params, config.ema)
    schedule = Schedule(config.steps, config.warmup, config.decay)
    around = hash_files(sorted(Path(wanted).glob("*.safetensors"))) if wanted is not None else None
    if config.init is not None and vae is not None:  # without `init` the base's digest is of the whole folder
        around = digest_vae(vae)
    whole = {**recipe(config), "made_from": [people.digest, base.digest, around], "noise": dict(base.schedule.config)}
    claim(out, WRITES, whole)
    train(
        "base", out, whole, schedule, optimizer, ema, backward, save_every=config.save_every,
        saved=saved, track=track, where=lambda: bad_levels(base.schedule, *last),
    )  # fmt: skip

    # --- write
    save_base(base, out / "base")
    made_from = {
        "data": people.digest,
        "vae": hash_files(sorted((out / "base" / "vae").glob("*.safetensors"))),
        "init": base.digest if config.init is not None else None,
    }
    save_json(out / "base" / "made_from.json", made_from)
    digest = replace(base.config, path=str(out / "base")).load().digest
    report = {"steps": config.steps, "samples": config.steps * config.batch, **made_from, "base": digest}
    save_json(out / "report.json", report)
    print(f"base in {out / 'base'}, samples in {out}")
    return out


def _preview(base: Base, ema: EMA, path: Path) -> None:
    """Draw every style eight times, from fixed noise, with the averaged weights."""
    from torchvision.utils import save_image

    from hyperdb.diffusion.sample import sample, start_noise
    from hyperdb.heads.captions import STYLE_PROMPTS, prompt
    from hyperdb.runtime.files import atomic

    prompts = [prompt(style) for style in STYLE_PROMPTS for _ in range(8)]
    ema.swap()
    latents = sample(base, prompts, start_noise(base, list(range(8)) * (len(prompts) // 8)))
    images = base.decode(latents)
    ema.swap()
    with atomic(path) as temporary:
        save_image(images.float() / 255, temporary, nrow=8)
