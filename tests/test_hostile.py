"""Whatever the bytes of a file from outside are: it is read, or refused in a line that names it, soon and in little
memory. No other exception, and nothing is written.

    python -m pytest -m slow tests/test_hostile.py --examples 20000
"""

from __future__ import annotations

import copy
import json
import re
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pillow_heif
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from hyperdb import config as configuration
from hyperdb import options
from hyperdb.adapters import FouRAConfig, LiDBConfig
from hyperdb.adapters.layout import Layer, Layout
from hyperdb.data import fits
from hyperdb.data.people import load_people
from hyperdb.diffusion import DiffusionConfig
from hyperdb.diffusion.base import Base
from hyperdb.diffusion.xadapter import Mapper
from hyperdb.faces.image import read_image, read_text
from hyperdb.formats import a1111, lora
from hyperdb.formats.directions import ATTRIBUTES, load_directions, save_directions
from hyperdb.formats.native import Part, Personalization
from hyperdb.hypernet import EncoderConfig, HypernetConfig
from hyperdb.hypernet.model import Hypernet
from hyperdb.metrics.obedience import Judge
from hyperdb.report import results
from hyperdb.runtime import checkpoint, journal, output
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.files import (
    load_json,
    load_metadata,
    load_shapes,
    load_tensors,
    load_text,
    save_json,
    save_tensors,
)
from hyperdb.runtime.optim import EMA, adamw
from hyperdb.stages import preprocess, render_heads, train_base

FEW = 25  # examples of each kind in the default tests
ROOM = 3 * 2**30  # bytes of addresses that reading may take besides what the tests have
SECONDS = 20  # of computing, for one file

pytestmark = pytest.mark.timeout(0)


# --- what is done to files ---------------------------------------------------------------------------

HOSTILE = st.one_of(
    st.sampled_from([None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, float("nan"), "", "x", "..", "\0", [], {}, [[]]]),
    st.just("9" * 5000), st.just({"a": {"b": []}}), st.integers(), st.text(max_size=20),
)  # fmt: skip


@st.composite
def bytes_of(draw: Any, content: bytes) -> bytes:
    """Some bytes of a file changed, cut out, repeated or put in; or others altogether."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([1, 1, 2, 8, 100, len(data)]))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "put", "repeat", "zero"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "put":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "repeat":
            data[at:at] = data[at : at + length]
        elif kind == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
    return bytes(data)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value in what JSON holds."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, x in inner for place in _places(x, (*path, key)))]


@st.composite
def json_of(draw: Any, whole: Any) -> Any:
    """What JSON holds with some values replaced, left out or called otherwise."""
    whole = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(_places(whole)[1:] or [("",)]))
        inner = whole
        for key in way:
            inner = inner[key]
        if not isinstance(inner, dict | list) or (isinstance(inner, dict) and last not in inner):
            continue
        kind = draw(st.sampled_from(["replace", "replace", "leave out", "rename", "nest"]))
        if kind == "replace":
            inner[last] = copy.deepcopy(draw(HOSTILE))  # it is changed itself by what follows
        elif kind == "nest":
            inner[last] = [inner[last]]
        elif kind == "leave out" or isinstance(inner, list):
            del inner[last]
        else:
            inner[draw(st.text(max_size=12))] = inner.pop(last)
    return whole


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


@st.composite
def header_of(draw: Any, content: bytes) -> bytes:
    """A safetensors file whose header says other things; what is JSON in it is changed inside too."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for key, value in header.get("__metadata__", {}).items():
        if value[:1] in ("{", "[") and draw(st.booleans()):
            header["__metadata__"][key] = json.dumps(draw(json_of(json.loads(value))))
    ready = _text(draw(json_of(header)))
    claimed = draw(st.sampled_from([len(ready)] * 8 + [0, 2**20, 2**63 - 1]))
    return claimed.to_bytes(8, "little") + ready + content[8 + length :]


@st.composite
def lines_of(draw: Any, content: bytes) -> bytes:
    """JSON lines, one of which is another."""
    lines = content.splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = draw(st.one_of(json_of(json.loads(lines[at])).map(_text), HOSTILE.map(_text), st.binary(max_size=9)))
    return b"\n".join(lines) + b"\n"


@st.composite
def yaml_of(draw: Any, content: bytes) -> bytes:
    """Settings with a line that is another."""
    lines = content.decode().splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    odd = ["- a", "a: [", "&a *a", "!!python/object:os.system x", "'", "\t", "? x", "seed: ${seed}", "defaults: 5",
           "hydra: 3", "seed: {a: 1}", "<<: *b", "1: 2", "--- x", "%YAML 9"]  # fmt: skip
    lines[at] = draw(st.one_of(st.sampled_from(odd), st.text(max_size=30), json_of({"seed": [1, {}]}).map(str)))
    return "\n".join(lines).encode(errors="surrogatepass")


# --- what is read ------------------------------------------------------------------------------------

LAYOUT = Layout((Layer("unet.tall", (40, 12)), Layer("unet.flat", (9, 30))))
LIDB = LiDBConfig(a=8, b=5)


def _person(path: Path) -> Path:
    numbers = torch.randn(LIDB.build(LAYOUT).mask.shape, generator=torch.Generator().manual_seed(0))
    relaxed = {"unet.flat": (torch.ones(1, 2, 30), torch.ones(1, 9, 2))}
    foura = FouRAConfig(rank=2)
    params = {name: torch.zeros(1, *shape) for name, shape in foura.build(LAYOUT).shapes().items()}
    made = Personalization(LAYOUT, numbers, LIDB, "0123", relaxed=relaxed, parts=[Part(foura, LAYOUT, params)])
    return made.save(path / "adapter.safetensors")


def _kohya(path: Path) -> Path:
    tensors = {"lora_unet_a.lora_down.weight": torch.ones(2, 12), "lora_unet_a.lora_up.weight": torch.ones(40, 2)}
    tensors |= {"lora_unet_a.alpha": torch.tensor(2.0)}
    stated = json.dumps({"unet.r": 2, "unet.lora_alpha": 2})
    return save_tensors(path / "lora.safetensors", tensors, {"ss_v2": "False", "lora_x": stated}, check=False)


def _peft(path: Path) -> Path:
    tensors = {f"base_model.model.a.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_json(path / "adapter_config.json", {"r": 2, "lora_alpha": 2, "peft_type": "LORA", "rank_pattern": {"b": 1}})
    return save_tensors(path / "adapter_model.safetensors", tensors, check=False)


def _directions(path: Path) -> Path:
    lidb = LIDB.build(LAYOUT)
    file = path / "directions.safetensors"
    return save_directions(file, torch.ones(len(ATTRIBUTES), lidb.numbers), lidb.fingerprint, "0123")


def _read_directions(path: Path) -> None:
    load_directions(str(path), Personalization(LAYOUT, None, LIDB, "0123"))


def _training() -> tuple[torch.optim.Optimizer, EMA]:
    model = torch.nn.Linear(3, 2)
    optimizer = adamw(model.parameters(), 1e-3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer, EMA(model.parameters(), 0.9)


def _checkpoint(path: Path) -> Path:
    file = path / "checkpoint.safetensors"
    checkpoint.save(file, 3, *_training(), {"rate": 1.0, "fit": {"steps": 2}})
    return file


def _hypernet(path: Path) -> Path:
    encoder = EncoderConfig("vit_tiny_patch16_224", size=32, patch=16, depth=1)
    model = Hypernet(HypernetConfig(width=8, heads=2, layers=1, summary=2, encoder=encoder), LIDB.build(LAYOUT))
    return model.save(path / "hypernet.safetensors", {"base": "0123"})


def _judge(path: Path) -> Path:
    return Judge({"style": ["photo", "sketch"]}).save(path / "judge.safetensors", {})


def _store(path: Path) -> Path:
    lidb = LIDB.build(LAYOUT)
    fits.save_shard(path, 0, lidb.init(2)["tokens"], torch.arange(2), "of what")
    return fits.finish(path, 1, lidb, {"by": "person", "base": "0123"})


def _shard(path: Path) -> Path:
    return fits.shard_path(_store(path).parent, 0)


def _saved(path: Path) -> Path:
    """A data set as `datasets` keeps it on the disk."""
    pictures = [Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)) for i in range(4)]
    table = datasets.Dataset.from_dict({"image": pictures, "identity": [0, 0, 1, 2], "caption": ["a face"] * 4})
    table.cast_column("image", datasets.Image()).save_to_disk(path / "faces")
    return path / "faces" / "data-00000-of-00001.arrow"


def _renders(path: Path) -> Path:
    settings = {"identities": 2, "views": 1, "photo_views": 1, "size": 16, "workers": 1}
    return next(render_heads.run(render_heads.Config(out=str(path / "heads"), **settings)).glob("data-*.arrow"))


def _pixels(path: Path) -> None:
    people = load_people(path.parent, split=None, size=16)
    people.images[:]


def _listed(path: Path) -> Path:
    (path / "identity_CelebA.txt").write_text("000001.jpg 2880\n000002.jpg 2937\n")
    return path / "identity_CelebA.txt"


def _folder(path: Path) -> Path:
    """A folder of pictures with a table of what they show; of a csv that fails, `datasets` leaves the file open."""
    lines = []
    (path / "pictures").mkdir()
    for i in range(4):
        Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)).save(path / "pictures" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "identity": i // 2, "caption": "a face"}))
    (path / "pictures" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return path / "pictures" / "metadata.jsonl"


def _parquet(path: Path) -> Path:
    pictures = [Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)) for i in range(4)]
    table = datasets.Dataset.from_dict({"image": pictures, "identity": [0, 0, 1, 2], "caption": ["a face"] * 4})
    (path / "faces").mkdir()
    table.cast_column("image", datasets.Image()).to_parquet(path / "faces" / "people.parquet")
    return path / "faces" / "people.parquet"


def _mapper(path: Path) -> Path:
    base = Base.load(DiffusionConfig(path=str(_base(path)), size=32, dtype="fp32", device="cpu"))
    BASES[path] = base
    return Mapper.between(base, base, 4).save(path / "xadapter.safetensors", base, base)


BASES: dict[Path, Base] = {}  # of each folder in which an X-Adapter lies
KV = {f"a.to_{side}": torch.nn.Linear(12, 8) for side in "kv"}


def _a1111(path: Path) -> Path:
    tensors = {}
    for side in "kv":
        for number, shape in ((0, (24, 12)), (1, (12, 24))):
            tensors[f"12.{side}.linear.{number}.weight"] = torch.ones(shape)
            tensors[f"12.{side}.linear.{number}.bias"] = torch.ones(shape[0])
    told = {"activation_func": "linear", "is_layer_norm": "False", "layer_structure": "[1, 2, 1]"}
    return save_tensors(path / "net.safetensors", tensors, told, check=False)


def _base(path: Path) -> Path:
    """The smallest base, of which one file after the other is damaged."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,),
            norm_num_groups=2, sample_size=32, mid_block_add_attention=False,
        )  # fmt: skip
        small = train_base.Config(channels=[16], heads=[2], text_width=8, text_layers=1)
        train_base.save_base(train_base.new_base(small, vae, ["a", "face", "sks"]), path / "base")
    return path / "base"


def _base_of(path: Path) -> None:
    Base.load(DiffusionConfig(path=str(path.parents[1]), size=32, dtype="fp32", device="cpu"))


def _results(path: Path) -> Path:
    interval = {"mean": 0.5, "lo": 0.4, "hi": 0.6}
    row = {"cosine": interval, "rank1": 0.5, "label": "a"}
    whole = {"rows": {"a": row, "b": row}, "paired": {"a-b": interval}, "people": 3, "seeds": 1, "methods": {"a": {}}}
    return save_json(path / "results.json", whole)


def _record(path: Path) -> Path:
    output.claim(path, ["x.json"], {"seed": 0, "fit": {"rate": 1.0}})
    return path / output.RECORD


def _journal(path: Path) -> Path:
    with journal.Journal(path / "journal.jsonl", 3, every=1) as j:
        for step in (1, 2, 3):
            j.step(step, 1.0, prior=0.5)
    return path / "journal.jsonl"


def _manifest(path: Path) -> Path:
    rng = np.random.default_rng(0)
    (path / "faces").mkdir()
    lines = []
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path / "faces" / f"{i}.png")
        lines.append({"file": f"faces/{i}.png", "source": f"{i}.jpg", "identity": str(i), "split": "train"})
    (path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path / "manifest.jsonl"


def _photo(kind: str, mode: str = "RGB", **how: Any) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        pillow_heif.register_heif_opener()
        pixels = np.random.default_rng(0).integers(0, 255, (40, 36, 3), dtype=np.uint8)
        deep = pixels[..., 0].astype(np.uint16) * 257
        image = Image.fromarray(deep) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
        image.save(path / f"photo.{kind}", **how)
        return path / f"photo.{kind}"

    return make


def _read_experiment(path: Path) -> None:
    options.swept(options.experiment("hostile"))
    configuration.load("generate", ["experiment=hostile"])


EXIF = Image.Exif()
EXIF[0x0112] = 6
SAFETENSORS = ("bytes", "header")
KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any], tuple[str, ...]]] = {
    "png": (_photo("png"), read_image, ("bytes",)),
    "deep png": (_photo("png", "I;16"), read_image, ("bytes",)),
    "png's text": (_photo("png", "P"), read_text, ("bytes",)),
    "jpeg": (_photo("jpg", exif=EXIF), read_image, ("bytes",)),
    "tiff": (_photo("tiff", compression="tiff_lzw"), read_image, ("bytes",)),
    "webp": (_photo("webp"), read_image, ("bytes",)),
    "gif": (_photo("gif"), read_image, ("bytes",)),
    "heic": (_photo("heic"), read_image, ("bytes",)),
    "tensors": (_kohya, load_tensors, SAFETENSORS),
    "shapes": (_kohya, load_shapes, SAFETENSORS),
    "metadata": (_kohya, load_metadata, SAFETENSORS),
    "adapter": (_person, Personalization.load, SAFETENSORS),
    "lora": (_kohya, lora.read, SAFETENSORS),
    "peft": (_peft, lambda path: lora.read(path.parent), SAFETENSORS),
    "peft's settings": (
        lambda path: _peft(path).with_name("adapter_config.json"), lambda path: lora.read(path.parent), ("json",)
    ),
    "directions": (_directions, _read_directions, SAFETENSORS),
    "checkpoint": (_checkpoint, lambda path: checkpoint.load(path, *_training(), {"rate": 1.0}), SAFETENSORS),
    "hypernetwork": (_hypernet, Hypernet.load, SAFETENSORS),
    "judge": (_judge, Judge.load, SAFETENSORS),
    "x-adapter": (_mapper, lambda path: Mapper.load(path, BASES[path.parent], BASES[path.parent]), SAFETENSORS),
    "metadata.jsonl": (_folder, _pixels, ("lines", "bytes")),
    "parquet": (_parquet, _pixels, ("bytes",)),
    "a1111": (_a1111, lambda path: a1111.read(path, KV, "a base"), SAFETENSORS),
    "fits": (_shard, lambda path: fits.load_store(path.parent, LAYOUT, base="0123").tokens[:], SAFETENSORS),
    "data set": (_saved, _pixels, ("bytes",)),
    "data set's state": (lambda path: _saved(path).with_name("state.json"), _pixels, ("json", "bytes")),
    "data set's columns": (lambda path: _saved(path).with_name("dataset_info.json"), _pixels, ("json", "bytes")),
    "renders": (_renders, _pixels, ("bytes",)),
    "renders' index": (lambda path: _renders(path).with_name("index.json"), _pixels, ("json", "bytes")),
    "identities": (_listed, lambda path: preprocess._read_columns(path, 2), ("bytes",)),
    "base's weights": (lambda path: next((_base(path) / "unet").glob("*.safetensors")), _base_of, SAFETENSORS),
    "base's settings": (lambda path: _base(path) / "unet" / "config.json", _base_of, ("json", "bytes")),
    "base's words": (lambda path: _base(path) / "tokenizer" / "tokenizer.json", _base_of, ("json", "bytes")),
    "base's levels": (lambda path: _base(path) / "scheduler" / "scheduler_config.json", _base_of, ("json", "bytes")),
    "store": (_store, lambda path: fits.load_store(path.parent, LAYOUT, base="0123"), ("json", "bytes")),
    "manifest": (_manifest, lambda path: load_people(path.parent), ("lines", "bytes")),
    "results": (_results, results.load, ("json", "bytes")),
    "record": (_record, lambda path: output.claim(path.parent, ["x.json"], {"seed": 0}), ("json", "bytes")),
    "journal": (_journal, journal.read, ("lines", "bytes")),
    "json": (_results, load_json, ("json", "bytes")),
    "text": (_results, load_text, ("bytes",)),
    "yaml": (lambda p: p / "conf" / "experiment" / "hostile.yaml", _read_experiment, ("yaml", "bytes")),
}  # fmt: skip
CHANGES = {
    "bytes": bytes_of, "header": header_of, "lines": lines_of, "yaml": yaml_of,
    "json": lambda content: json_of(json.loads(content)).map(_text),
}  # fmt: skip


@pytest.fixture
def little_memory():
    """Leave room for addresses as reading may take, and no more."""
    now = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _many(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--examples")


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_or_refused(kind, many, tmp_path, monkeypatch, request, little_memory):
    make, read, ways = KINDS[kind]
    if kind == "yaml":
        shutil.copytree(options.conf_dir(), tmp_path / "conf")
        (tmp_path / "conf" / "experiment" / "hostile.yaml").write_text(
            "# @package _global_\ndefaults:\n  - override /diffusion: embedded\nseed: 3\nprompt: a [V] face\n"
        )
        monkeypatch.setattr(options, "conf_dir", lambda: tmp_path / "conf")
    path = make(tmp_path)
    right = path.read_bytes()
    read(path)  # as it is
    there = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    few = 5 if kind == "yaml" or kind.startswith("base") else FEW  # which take longer
    strategy = st.one_of([CHANGES[way](right) for way in ways])

    @settings(
        max_examples=_many(request) if many else few, deadline=None, database=None, derandomize=not many,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(strategy)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        began = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(path)
        except UserError as error:
            said = str(error)
            assert path.name in said or path.parent.name in said, said
        assert time.process_time() - began < SECONDS
        assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == there

    check()


# --- what was thought of, each a line ----------------------------------------------------------------


def _deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def test_deep_json_is_refused(tmp_path):
    _deep(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"x\.json is not valid JSON"):
        load_json(tmp_path / "x.json")
    _deep(tmp_path / "journal.jsonl")
    assert journal.read(tmp_path / "journal.jsonl") == []


def test_a_hypernetwork_that_claims_a_size_takes_no_memory(tmp_path, little_memory):
    path = _hypernet(tmp_path)
    tensors, metadata = load_tensors(path)
    for name, value in (("width", 2**14), ("layers", 10**9), ("heads", 0), ("summary", 2**14)):
        claimed = json.loads(metadata["config"]) | {name: value}
        save_tensors(path, tensors, metadata | {"config": json.dumps(claimed)})
        with pytest.raises(UserError, match=rf"{re.escape(str(path))}|model\.{name}"):
            Hypernet.load(path)
    deep = asdict(EncoderConfig("vit_tiny_patch16_224", size=32, patch=16, depth=1)) | {"depth": 10**9}
    save_tensors(path, tensors, metadata | {"config": json.dumps({"width": 8, "heads": 2, "encoder": deep})})
    with pytest.raises(UserError, match="depth"):
        Hypernet.load(path)


def test_a_picture_that_claims_to_be_huge_is_refused_by_its_header(tmp_path, little_memory):
    path = _photo("png")(tmp_path)
    content = bytearray(path.read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"photo\.png"):
        read_image(path)


def test_nothing_is_unpickled():
    """A pickle runs what it likes: neither the package nor its scripts open one, and torch.load is told so."""
    root = Path(__file__).parent.parent
    files = [p for name in ("hyperdb", "benchmarks", "experiments") for p in (root / name).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            code = re.sub(r"(\"|').*?\1|#.*", "", line)  # without words about pickles
            assert not re.search(r"^\s*(import|from)\s+(c?pickle|dill|joblib|shelve|marshal)\b", line), path
            assert "allow_pickle=True" not in code, path
            assert not re.search(r"\b(pickle|dill|joblib|shelve|marshal)\.loads?\(", code), path
            assert not re.search(r"\byaml\.(unsafe_|full_)?load\(", code), path
            if "torch.load(" in code:
                assert "weights_only=True" in code, path
