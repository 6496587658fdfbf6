"""hyperdb: HyperDreamBooth, one photo of a face in, a tiny personalisation of a diffusion model out."""

__version__ = "0.1.0"
