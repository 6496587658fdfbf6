"""A page to try hyperdb in a browser: a photo in, that person's pictures, mixtures and files out.

    hyperdb web                     # http://127.0.0.1:7860, for this machine alone
    hyperdb web diffusion=sd15 hypernet=null at_once=1

Needs gradio (extra `web`). What a visitor brings and makes lies in a folder of his own, in the system's temporary
folder, which is removed when he leaves the page, when he does nothing for `idle` minutes, and when the server stops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath
from hyperdb.tuning.personalizer import PersonalizerConfig

if TYPE_CHECKING:
    from hyperdb.tuning.memory import Sketch


@dataclass(kw_only=True)
class Config(PersonalizerConfig):
    """Where the page is served, to how many at once, and how people are personalised there.

    The last is said as in `hyperdb personalize`, but for `image`, `face`, `align` and `preview`, which the page asks
    for. Nobody else reaches the page unless `host` says so: `0.0.0.0` opens it to the network, and `share` to everybody
    who has an address that gradio's servers give it.
    """

    image: FilePath = "none"
    out: FilePath = "runs/web/default"  # where class pictures are kept that the base has to draw first
    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    at_once: int = 1  # visitors served at the same time, each by a copy of base and hypernetwork of his own
    waiting: int = 20  # visitors who may wait for their turn; more are told to come back
    upload: float = 20.0  # megabytes of a photo
    idle: float = 60.0  # minutes after which a visitor who does nothing is forgotten
    directions: FilePath = "package:embedded/directions.safetensors"  # what shifts attributes: hyperdb weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.port <= 65_535:
            raise UserError(f"port={self.port}: expected 1 to 65535")
        if not 1 <= self.at_once <= 64:
            raise UserError(f"at_once={self.at_once}: expected 1 to 64")
        if not 0 <= self.waiting <= 1000:
            raise UserError(f"waiting={self.waiting}: expected 0 to 1000")
        for name in ("upload", "idle"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name):g}: expected more than 0")


def passes(config: Config, sketch: Sketch) -> None:
    """Measure prediction, fine-tuning and drawing of one copy of the base."""
    from hyperdb.tuning import photos

    photos.passes(config, sketch)


def run(config: Config) -> None:
    """Serve the page until it is interrupted."""
    import os
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise UserError("the page needs gradio; install it: pip install -e '.[web]', or pip install 'gradio>=6.31'")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: it would call home
    from hyperdb.web.page import serve

    serve(config)
