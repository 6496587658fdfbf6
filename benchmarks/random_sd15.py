"""Write a Stable Diffusion 1.5 folder of the true sizes with random weights: everything but the pictures is real.

    pip install --no-deps open-clip-torch        (its wheel carries CLIP's vocabulary)
    python benchmarks/random_sd15.py OUT [fp32|bf16]

UNet 859.5 M, text encoder 123.1 M, VAE 83.7 M parameters; in bf16 2.1 GB, in fp32 4.3 GB.
"""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MERGES = 49152 - 256 - 2  # CLIP uses so many of the merges in its file


def letters() -> list[str]:
    """Return the character that byte-level BPE writes for each byte, in CLIP's order: printable ones first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def tokenizer() -> CLIPTokenizer:
    """Rebuild CLIP's tokenizer, 49,408 words, from the merges that open-clip-torch ships."""
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        sys.exit("random_sd15: CLIP's vocabulary is missing; run `pip install --no-deps open-clip-torch`")
    text = gzip.decompress(Path(found.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.split("\n")[1 : MERGES + 1]]
    words = [*letters(), *(x + "</w>" for x in letters()), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=77)


def models() -> tuple[UNet2DConditionModel, CLIPTextModel, AutoencoderKL]:
    """Build the three networks with their default initialisation."""
    cross, plain = ("CrossAttn{}Block2D", "{}Block2D")
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=(*[cross.format("Down")] * 3, plain.format("Down")),
        up_block_types=(plain.format("Up"), *[cross.format("Up")] * 3),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            projection_dim=768,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    vae = AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    return unet, text_encoder, vae


def main(out: str, dtype: str = "bf16") -> None:
    """Build, cast, write."""
    torch.manual_seed(0)
    unet, text_encoder, vae = models()
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer(), unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.to(wanted).save_pretrained(out)
    for name, model in (("unet", unet), ("text encoder", text_encoder), ("vae", vae)):
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    print(f"random Stable Diffusion 1.5 in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
