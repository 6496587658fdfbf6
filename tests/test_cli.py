"""The command line: words mean what they say, errors are one line, help is fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from hyperdb import cli, config, options
from hyperdb.runtime.errors import UserError
from hyperdb.runtime.paths import FilePath

HEAVY = {"torch", "torchvision", "diffusers", "transformers", "timm", "gradio", "matplotlib", "cv2", "pandas"}


# --- a stage of our own, with everything a stage can have -----------------------------------------------


@dataclass
class Engine:
    """A group."""

    path: str = ""
    power: int = 1


@dataclass
class TurboConfig(Engine):
    """A member of the group with a setting of its own."""

    boost: float = 1.0


@dataclass
class Loss:
    """A branch that is no group."""

    weight: float = 1.0
    label: str = "mse"
    file: FilePath | None = None


@dataclass
class Config:
    """Settings of the toy stage."""

    prompt: str = "a face"
    # where the picture
    # stands
    image: Path | None = None
    hypernet: str | None = "embedded"
    """Which hypernetwork."""
    name: str = "ada"
    prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    labels: dict[str, str] = field(default_factory=lambda: {"sex": "any"})
    steps: int = 4  # how many steps
    needed: str = "???"
    out: FilePath = ""
    place: FilePath | None = None
    places: list[FilePath] = field(default_factory=list)
    engine: Engine = field(default_factory=Engine)
    loss: Loss = field(default_factory=Loss)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} is too few; give 1 or more")


CONF = {
    "toy.yaml": """
defaults: [toy_schema, {engine: small}, _self_, {experiment: null}]
needed: x
out: runs/toy/${name}
""",
    "needy.yaml": "defaults: [needy_schema, {engine: small}, _self_, {experiment: null}]\n",
    "engine/small.yaml": "defaults: [schema]\npath: small.bin\n",
    "engine/turbo.yaml": "defaults: [turbo_schema]\npath: turbo.bin\npower: 9\n",
    "experiment/fast.yaml": (
        "# @package _global_\n# Toy at speed.\n"
        "defaults: [{override /engine: turbo}]\nsteps: 2\nengine: {boost: 3}\n"
    ),
    "experiment/wrong.yaml": "# @package _global_\nstepz: 2\n",
    "experiment/over/steps.yaml": (
        "# @package _global_\n# Toy at several speeds.\nname: speeds\n"
        "hydra: {sweeper: {params: {steps: '1,2', prompt: '[a,b c]'}}}\n"
    ),
}


@pytest.fixture
def toy(in_tmp, monkeypatch):
    """Register the toy stage under `toy` and `needy`; return the list of the configs it was run with."""
    conf = in_tmp / "conf"
    for name, text in CONF.items():
        (conf / name).parent.mkdir(parents=True, exist_ok=True)
        (conf / name).write_text(text)
    runs: list[Config] = []
    module = types.ModuleType("toy_stage", "A toy stage.")
    module.Config, module.run = Config, runs.append
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "toy_stage", module)
    monkeypatch.setitem(config.STAGES, "toy", ("toy_stage", "a toy"))
    monkeypatch.setitem(config.STAGES, "needy", ("toy_stage", "a toy without its setting"))
    monkeypatch.setattr(options, "conf_dir", lambda: conf)
    work = in_tmp / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return runs


def ran(toy: list[Config], *words: str) -> Config:
    assert cli.main(["toy", *words]) == 0
    assert list(Path.cwd().iterdir()) == [], "composing must not write anything"
    return toy.pop()


# --- what words mean ------------------------------------------------------------------------------------

LITERAL = [
    "a pencil sketch of a [V] face, on the beach",
    "me (1).jpg",
    "très.jpg",
    "a=b.png",
    "photo's.jpg",
    'a "quoted" word',
    """both ' and \"""",
    "C:\\x",
    "C:\\",
    "\\\\server\\share\\'",
    "",
    "${x}",
    "\\${x}",
    "\\\\${x}",
    "${oc.env:HOME}\\",
    "$HOME ${",
    "  leading and trailing  ",
    "null",
    "true",
    "1e3",
    "007",
    "[a, b]",
    "{a: b}",
    "a,b",
    "~x",
    "?",
    "two\nlines",
    "日本 🙂",
    "#no comment",
    "x: y",
    "%(x)s",
]


@pytest.mark.parametrize("text", LITERAL)
def test_text_survives(toy, text):
    found = ran(toy, *(f"{key}={text}" for key in ("prompt", "engine.path", "loss.label", "labels.sex")))
    assert [found.prompt, found.engine.path, found.loss.label, found.labels["sex"]] == [text] * 4


def test_optional_text_takes_null_and_plain_text_does_not(toy):
    assert ran(toy, "hypernet=null").hypernet is None
    assert ran(toy, "name=null").name == "null"
    assert ran(toy, "image=null").image is None
    assert ran(toy, "hypernet='null'").hypernet == "'null'"


@pytest.mark.parametrize("text", ["me (1).jpg", "${x}.png", "a=b/c d.png", "photo's.jpg"])
def test_paths_survive(toy, text):
    assert ran(toy, f"image={text}").image == Path(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a,b]", ["a", "b"]),
        ("['a [V] face, on the beach', b]", ["a [V] face, on the beach", "b"]),
        ("[]", []),
        ("a [V] face, on the beach", ["a [V] face, on the beach"]),
        ("[V] face of [V]", ["[V] face of [V]"]),
        ("", [""]),
        ("null", ["null"]),
        ("[a [V] face,a [V] cartoon]", ["a [V] face", "a [V] cartoon"]),
        ("[Bob's run,my run (1),${x}]", ["Bob's run", "my run (1)", "${x}"]),
        ("[null,1]", ["null", "1"]),
    ],
)
def test_lists_of_text(toy, text, expected):
    assert ran(toy, f"prompts={text}").prompts == expected


def test_other_types_keep_hydras_grammar(toy):
    found = ran(toy, "steps=7", "seeds=[1,2]", "loss.weight=1e-3", "loss={weight: 2}")
    assert (found.steps, found.seeds, found.loss.weight) == (7, [1, 2], 2.0)


def test_home_in_paths_and_only_there(in_tmp, toy, monkeypatch):
    monkeypatch.setenv("HOME", str(in_tmp / "${home}"))
    found = ran(toy, "place=~/a b.bin", "places=[~/a,b~,~]", "prompt=~/a", "prompts=[~/a]", "out=~no body/x")
    home = f"{in_tmp}/${{home}}"
    assert found.place == f"{home}/a b.bin"
    assert found.places == [f"{home}/a", "b~", home]
    assert (found.prompt, found.prompts, found.out) == ("~/a", ["~/a"], "~no body/x")
    assert ran(toy, "loss.file=~/m").loss.file == f"{home}/m"


def test_name_decides_out(toy):
    assert ran(toy, "name=b o b").out == "runs/toy/b o b"
    assert ran(toy, "out=here").out == "here"


def test_groups_and_experiments(toy):
    assert ran(toy).engine == Engine("small.bin")
    turbo = ran(toy, "engine=turbo", "engine.boost=2")
    assert turbo.engine == TurboConfig("turbo.bin", 9, 2.0)
    fast = ran(toy, "experiment=fast")
    assert (fast.steps, fast.engine) == (2, TurboConfig("turbo.bin", 9, 3.0))
    assert ran(toy, "experiment=fast", "steps=3").steps == 3


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["promt=x"], "toy has no setting 'promt'; did you mean 'prompt'?"),
        (["+promt=x"], "did you mean 'prompt'?"),
        (["path=x"], "did you mean 'engine.path'?"),
        (["engine.pwer=1"], "did you mean 'engine.power'?"),
        (["xyzzy=1"], "`hyperdb toy --help` lists them"),
        (["steps=many"], "steps: Value 'many' of type 'str' could not be converted to Integer"),
        (["steps=1,2"], "steps: '1,2' is several values; add -m"),
        (["steps=null"], "steps: "),
        (["steps="], "steps: "),
        (["seeds=3"], "seeds: "),
        (["seeds=3,4"], "a list is written seeds=[3,4]"),
        (["prompts=[a,]"], "prompts: '[a,]' has an empty entry"),
        (["steps=(("], "steps: cannot read the value '(('"),
        (["engine.power=x"], "engine.power: Value 'x'"),
        (["steps=0"], "steps=0 is too few; give 1 or more"),
        (["engine=smal"], "no engine 'smal'; did you mean 'small'?; there is: small, turbo"),
        (["engine=null"], "no engine 'null'"),
        (["engine="], "no engine ''"),
        (["engine.boost=1"], "toy has no setting 'engine.boost'"),
        (["experiment=fats"], "no experiment 'fats'; did you mean 'fast'?; there is: fast, over/steps, wrong"),
        (["experiment=wrong"], "conf/experiment/wrong.yaml: toy has no setting 'stepz'"),
        (["prompt"], "'prompt' is not key=value"),
        (["--prompt=x"], "'--prompt=x' is not key=value"),
        (["~prompt"], "'~prompt' is not key=value"),
        (["hydra.run.dir=x"], "add -m"),
        (["prompt=???"], "needs prompt=..."),
    ],
)
def test_bad_words_are_one_line_and_code_2(toy, capsys, words, said):
    assert cli.main(["toy", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hyperdb: error: ")
    assert error.count("\n") == 1
    assert said in error
    assert toy == []
    assert list(Path.cwd().iterdir()) == []


def test_required_setting(toy, capsys):
    assert cli.main(["needy"]) == 2
    assert capsys.readouterr().err.startswith("hyperdb: error: needy needs needed=...")


def test_exit_codes_of_run(toy, capsys, monkeypatch):
    def failing(error):
        def run(_):
            raise error

        return run

    module = sys.modules["toy_stage"]
    for error, code, said in [
        (UserError("no such\nfile: x"), 2, "hyperdb: error: no such file: x\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command begins again"),
        (OSError(28, "No space left on device", "x.png"), 2, "hyperdb: error: x.png: No space left on device\n"),
        (OSError(5, "Input/output error"), 1, "Traceback"),
        (ValueError("our bug"), 1, "Traceback"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "the card has too little memory (CUDA out"),
    ]:
        monkeypatch.setattr(module, "run", failing(error))
        assert cli.main(["toy"]) == code
        assert said in capsys.readouterr().err
    for number, code, said in ((signal.SIGINT, 130, "interrupted; "), (signal.SIGTERM, 143, "terminated; ")):
        before = signal.getsignal(number)
        monkeypatch.setattr(module, "run", lambda _, number=number: os.kill(os.getpid(), number))
        assert cli.main(["toy"]) == code
        assert f"{said}the same command begins again" in capsys.readouterr().err
        assert signal.getsignal(number) is before
    monkeypatch.setattr(module, "KEPT", "its pictures are kept", raising=False)
    monkeypatch.setattr(module, "run", failing(KeyboardInterrupt()))
    assert cli.main(["toy"]) == 130
    assert "interrupted; run the same command to continue (its pictures are kept)" in capsys.readouterr().err


# --- sweeps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_sweep(toy, flag):
    assert cli.main(["toy", flag, "prompt=[a,'b, c']", "steps=1,2", "name=x"]) == 0
    assert [(c.prompt, c.steps) for c in toy] == [("a", 1), ("a", 2), ("b, c", 1), ("b, c", 2)]
    assert toy[0].out == "runs/toy/x/prompt=a+steps=1"
    assert toy[-1].out.startswith("runs/toy/x/prompt=b_c+steps=2-")
    assert len({c.out for c in toy}) == 4
    assert [p for p in Path().rglob("*") if p.is_file()] == [Path("multirun/toy/multirun.yaml")]


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("prompt=a [V] face", ["a [V] face"]),
        ("prompt=a face, on the beach", ["a face, on the beach"]),
        ("prompt=[V]", ["[V]"]),
        ("prompt=[V] and [V]", ["[V] and [V]"]),
        ("prompt=['a','b']", ["a", "b"]),
        ("prompt=[a [V] face,it's ${x}]", ["a [V] face", "it's ${x}"]),
        ("prompt=choice(a,b)", ["choice(a,b)"]),
        ("hypernet=[default,null]", ["default", None]),
        ("hypernet=['null',x]", ["null", "x"]),
        ("image=[a (1).jpg,b.jpg]", [Path("a (1).jpg"), Path("b.jpg")]),
        ("steps=1,2", [1, 2]),
        ("steps=[1,2]", [1, 2]),
        ("steps=range(1,4)", [1, 2, 3]),
        ("prompts=[a,b]", [["a", "b"]]),
        ("prompts=[[a,b],[c]]", [["a", "b"], ["c"]]),
        ("prompts=[a [V] face,b]", [["a [V] face", "b"]]),
        ("seeds=[1,2],[3]", [[1, 2], [3]]),
        ("seeds=[[1,2],[3]]", [[1, 2], [3]]),
        ("seeds=[1,2]", [[1, 2]]),
        ("engine.path=['a,b',c]", ["a,b", "c"]),
        ("labels.sex=[a,b]", ["a", "b"]),
    ],
)
def test_what_words_mean_in_a_sweep(toy, word, values):
    assert cli.main(["toy", "-m", word]) == 0
    key = word.partition("=")[0]
    found = toy
    for part in key.split("."):
        found = [c[part] if isinstance(c, dict) else getattr(c, part) for c in found]
    assert found == values
    assert len({c.out for c in toy}) == len(values)


def test_a_sweep_of_out_or_name_is_in_out_already(toy):
    assert cli.main(["toy", "-m", "name=[a,b]"]) == 0
    assert cli.main(["toy", "-m", "out=[x,y]", "steps=1,2"]) == 0
    assert cli.main(["toy", "-m", "out=z", "name=[a,b]"]) == 0
    assert [c.out for c in toy] == [
        *("runs/toy/a", "runs/toy/b"),
        *("x/steps=1", "x/steps=2", "y/steps=1", "y/steps=2"),
        *("z/name=a", "z/name=b"),
    ]


def test_an_experiment_may_be_a_sweep(toy, capsys):
    assert cli.main(["toy", "-m", "experiment=over/steps"]) == 0
    assert [(c.prompt, c.steps) for c in toy] == [("a", 1), ("b c", 1), ("a", 2), ("b c", 2)]
    assert [c.out.partition("-")[0] for c in toy[:2]] == [
        "runs/toy/speeds/steps=1+prompt=a", "runs/toy/speeds/steps=1+prompt=b_c",
    ]  # fmt: skip
    assert cli.main(["toy", "-m", "experiment=over/steps", "steps=3"]) == 0  # a word is stronger
    assert [(c.prompt, c.steps) for c in toy[4:]] == [("a", 3), ("b c", 3)]
    assert cli.main(["toy", "experiment=over/steps", "steps=3", "prompt=a"]) == 0
    assert (toy[6].out, toy[6].steps) == ("runs/toy/speeds", 3)
    assert cli.main(["toy", "experiment=over/steps", "prompt=a"]) == 2
    assert "the experiment is a sweep of steps=1,2; add -m, or set steps to one of them" in capsys.readouterr().err
    assert len(toy) == 7


def test_a_sweep_over_a_group(toy):
    assert cli.main(["toy", "-m", "engine=small,turbo"]) == 0
    assert [c.out for c in toy] == ["runs/toy/ada/engine=small", "runs/toy/ada/engine=turbo"]


def test_long_values_make_different_folders(toy):
    long = "a face " * 60
    assert cli.main(["toy", "-m", f"prompt=['{long}1','{long}2','日{long}']"]) == 0
    assert len({c.out for c in toy}) == 3
    assert all(len(Path(c.out).name.encode()) < 255 for c in toy)


def test_sweep_refuses_in_one_line(toy, capsys):
    for words in (["stepz=1,2"], ["steps=a,b"], ["steps=0,1"], ["engine=smal,small"]):
        assert cli.main(["toy", "-m", *words]) == 2, words
        error = capsys.readouterr().err
        assert error.count("hyperdb: error:") == 1
        assert "Traceback" not in error
        assert len(error.splitlines()) <= 2, error  # Hydra names the job that failed, above
    assert all(c.steps > 0 for c in toy)


# --- help -----------------------------------------------------------------------------------------------


def test_stage_help(toy, capsys):
    assert cli.main(["toy", "--help"]) == 0
    text = capsys.readouterr().out
    for said in (
        "A toy stage.",
        "Settings of the toy stage.",
        "steps: int = 4",
        "how many steps",
        "where the picture stands",
        "Which hypernetwork.",
        "engine.path: str = small.bin",
        "engine=small | turbo",
        "experiment=fast  Toy at speed.",
        "experiment=over/steps  Toy at several speeds.",
    ):
        assert said in text
    assert "wrong" not in text, "an experiment of other settings is not offered"
    assert cli.main(["needy", "--help"]) == 0
    assert "needed: str required" in capsys.readouterr().out


def test_cfg_prints_and_runs_nothing(toy, capsys):
    from omegaconf import OmegaConf

    assert cli.main(["toy", "prompt=${x}, y", "--cfg", "job"]) == 0
    assert OmegaConf.create(capsys.readouterr().out).prompt == "${x}, y"
    assert toy == []


def hyperdb(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hyperdb", *words], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def test_help_is_fast_and_light(tmp_path):
    code = "import sys, json, hyperdb.cli as c; c.main(['--help']); print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", code]
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        seconds.append(time.perf_counter() - began)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert not loaded & (HEAVY | {"hydra", "omegaconf", "numpy"})
    assert min(seconds) < 1
    for name in config.available():
        assert f"  {name} " in done.stdout


def test_errors_of_the_real_program(tmp_path):
    for words, said in [
        (("doctr",), "no stage 'doctr'; did you mean 'doctor'?"),
        (("doctor", "x=1"), "doctor has no setting 'x'"),
        (("--frob",), "unknown option --frob"),
    ]:
        done = hyperdb(*words, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_names_that_the_terminal_cannot_show(tmp_path):
    code = "import hyperdb.cli as c; c.overview = lambda: 'Иван \\udceb'; raise SystemExit(c.main(['--help']))"
    terminal = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path, env=terminal)
    assert done.returncode == 0
    assert done.stdout.decode("cp1252").strip() == r"\u0418\u0432\u0430\u043d \udceb"


def test_out_is_looked_at_before_the_work(toy, capsys):
    Path("file").touch()
    assert cli.main(["toy", "out=file/x"]) == 2
    assert capsys.readouterr().err == "hyperdb: error: out=file/x: file is a file; choose another folder\n"
    assert toy == []


def test_version(tmp_path):
    from hyperdb import __version__

    assert hyperdb("--version", cwd=tmp_path).stdout == f"hyperdb {__version__}\n"


def test_reader_that_goes_away(tmp_path):
    command = f"{sys.executable} -m hyperdb --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == ""


# --- doctor ---------------------------------------------------------------------------------------------


def test_doctor_never_fails(monkeypatch, capsys):
    from hyperdb.stages import doctor

    def broken(_):
        raise RuntimeError("driver\nlost")
        yield

    monkeypatch.setitem(doctor.CHECKS, "device", [broken])
    doctor.run(doctor.Config())
    text = capsys.readouterr().out
    assert "RuntimeError: driver lost" in text
    assert "torch" in text


def test_doctor_says_what_to_do(monkeypatch, tmp_path):
    from hyperdb.stages import doctor

    monkeypatch.setattr(doctor, "EMBEDDED", tmp_path)
    missing = list(doctor.embedded(doctor.Config()))
    assert [finding.state for finding in missing] == ["missing", "missing"]
    assert all("hyperdb train_" in finding.advice for finding in missing)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/model_index.json").write_text("{}")
    assert next(doctor.embedded(doctor.Config())).state == "ok"
    assert next(doctor.hub(doctor.Config(sd15=str(tmp_path)))).state == "ok"


@pytest.mark.parametrize("base", options.choices("diffusion"))
def test_doctor_says_how_each_judge_is_had(base, in_tmp, monkeypatch):
    import huggingface_hub
    import yaml

    from hyperdb.metrics import JudgesConfig
    from hyperdb.stages import doctor

    cache = {}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *what, revision: cache.get((*what, revision)))
    asked = yaml.safe_load((options.conf_dir() / "evaluate" / f"{base}.yaml").read_text())["judges"]

    def found():
        return dict(zip(asked, doctor.judges(doctor.Config(base=base)), strict=True))

    assert asked.keys() == JudgesConfig.__dataclass_fields__.keys()
    shipped = {"clip", "vicreg", "verifier"} if base == "embedded" else set()
    for name in shipped:
        assert found()[name].state == "ok"
        assert found()[name].advice.endswith(f"judges.{name}=package:embedded/judges/{name}")
    monkeypatch.setattr(doctor, "resolve", lambda path: in_tmp / str(path))  # as if none were
    assert {finding.state for finding in found().values()} == {"optional"}
    assert "hf download timm/vit_small_patch16_224.dino" in found()["dino"].advice
    assert "hyperdb train_judge judge=verifier" in found()["verifier"].advice
    for name, path in asked.items():
        repository, _, revision = (path or "").partition("@")
        folder = in_tmp / "runs" / "train_judge" / name / "judge"
        folder.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            assert found()[name].state == "optional"
            cache[repository, file, revision or None] = "at hand"
            (folder / file).touch()
        assert found()[name].state == "ok"
        assert found()[name].advice.endswith("" if path else f"judges.{name}=runs/train_judge/{name}/judge")
    with pytest.raises(UserError, match="base='sd': expected embedded or sd15"):
        doctor.Config(base="sd")
