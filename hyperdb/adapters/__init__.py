"""What a personalisation is: changes of a frozen network's weights, with a leading identity axis. Knows no base model.

Each kind is one file that begins with its configuration. No file imports torch before it is used. A new kind is such a
file, its line in `KINDS` and its yaml in conf/adapters (CONTRIBUTING.md shows one).
"""

from __future__ import annotations

from hyperdb.adapters.a1111 import A1111Config
from hyperdb.adapters.base import AdapterConfig
from hyperdb.adapters.custom import CustomConfig
from hyperdb.adapters.dora import DoRAConfig
from hyperdb.adapters.e4t import E4TConfig
from hyperdb.adapters.foura import FouRAConfig
from hyperdb.adapters.full import FullConfig
from hyperdb.adapters.lidb import LiDBConfig
from hyperdb.adapters.lora import LoRAConfig
from hyperdb.adapters.lorax import LoRAXConfig
from hyperdb.adapters.plus import PlusConfig
from hyperdb.adapters.svdiff import SVDiffConfig
from hyperdb.adapters.token import TokenConfig

KINDS: dict[str, type[AdapterConfig]] = {
    "a1111": A1111Config,
    "custom": CustomConfig,
    "dora": DoRAConfig,
    "e4t": E4TConfig,
    "foura": FouRAConfig,
    "full": FullConfig,
    "lidb": LiDBConfig,
    "lora": LoRAConfig,
    "lorax": LoRAXConfig,
    "plus": PlusConfig,
    "svdiff": SVDiffConfig,
    "token": TokenConfig,
}
"""{the name of a kind in files: its configuration}."""



def kind_of(settings: AdapterConfig) -> str:
    """Return the name of an adapter's kind in `KINDS`."""
    return next(kind for kind, config in KINDS.items() if type(settings) is config)


__all__ = [
    "KINDS", "A1111Config", "AdapterConfig", "CustomConfig", "DoRAConfig", "E4TConfig", "FouRAConfig", "FullConfig",
    "LiDBConfig", "LoRAConfig", "LoRAXConfig", "PlusConfig", "SVDiffConfig", "TokenConfig", "kind_of",
]  # fmt: skip
