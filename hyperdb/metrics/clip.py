"""CLIP as a judge: how like pictures are, and how well a picture shows what its prompt says."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from hyperdb.metrics.pretrained import SETTINGS, Pretrained, fill
from hyperdb.runtime.files import load_json


class Clip(Pretrained):
    """A CLIP of transformers (Radford et al. 2021) with its processor, in the hub's layout.

    Pictures and words are compared by the plain cosine: nothing is scaled, and nothing cut off at 0.
    """

    name = "clip"

    def load(self, folder: Path) -> nn.Module:
        """Read network, picture processor and tokenizer."""
        settings = load_json(folder / SETTINGS)
        if (kind := settings.get("model_type")) != "clip":
            raise ValueError(f"{SETTINGS} is of a model of the type {kind!r}")
        net = fill(CLIPModel(CLIPConfig.from_dict(settings)), folder)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        self.pictures, self.tokenizer = processor.image_processor, processor.tokenizer
        known, most = len(self.tokenizer), net.config.text_config.vocab_size
        if not len(set(self.tokenizer.all_special_ids)) < known <= most:  # one without files is made up
            raise ValueError(f"its tokenizer has {known} words, and the network {most}")
        return net

    def attempt(self) -> Tensor:
        """Read words too."""
        if not self.words(["a face"]).isfinite().all():
            raise ValueError("its weights make words into NaN")
        return super().attempt()

    def pixels(self, image: Tensor) -> Tensor:
        """Resize, crop and normalise one picture."""
        return self.pictures(image, return_tensors="pt", input_data_format="channels_first").pixel_values[0]

    def features(self, pixels: Tensor) -> Tensor:
        """Return the picture's features in the space that it shares with words."""
        return self.net.get_image_features(pixel_values=pixels).pooler_output

    @torch.no_grad()
    def words(self, texts: list[str]) -> Tensor:
        """Encode texts as float32 `[N, dim]` of length 1, on the CPU; what is beyond the model's length is cut off."""
        self.net.to(self.device)
        length = self.net.config.text_config.max_position_embeddings
        ids = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        found = self.net.get_text_features(**ids.to(self.device)).pooler_output
        return F.normalize(found.float().cpu(), dim=-1)
