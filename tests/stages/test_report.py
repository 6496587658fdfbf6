"""From results files to tables and pictures, without torch and without replacing what is the user's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from hyperdb import cli, config
from hyperdb.report.plot import PLANES
from hyperdb.report.table import comma_separated, latex, markdown

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "experiments" / "embedded"
FILES = [str(FOLDER / "linear" / "validation.json"), str(FOLDER / "base64" / "likeness" / "validation_seeds.json")]
TABLES = ["table.csv", "table.md", "table.tex"]
PICTURES = [f"{name}.png" for name in PLANES if name != "prompt"]  # what these files have figures for


@pytest.fixture
def small(in_tmp):
    """Return results of one row that cost no time, in a file."""
    one = {"cosine": {"mean": 0.5, "lo": 0.4, "hi": 0.6}, "rank1": 0.25, "bytes": 5}
    (in_tmp / "small.json").write_text(json.dumps({"rows": {"a": one}, "paired": {}, "people": 3}))
    return in_tmp / "small.json"


def test_several_files_give_a_table_each_and_one_picture(in_tmp, capsys):
    out = config.run("report", [f"results=[{','.join(FILES)}]", "name=both"])
    assert out == Path("runs/report/both")
    assert sorted(p.name for p in out.iterdir() if p.name[0] != ".") == sorted(TABLES + PICTURES)
    named = {file: json.loads(Path(file).read_text()) for file in FILES}
    text = (out / "table.md").read_text()
    assert text == "\n".join(f"## {file}\n\n{markdown(found, brief=False)}\n" for file, found in named.items())
    text = (out / "table.tex").read_text()
    assert text == "\n".join(
        [r"% \usepackage{booktabs, adjustbox}", "", *(latex(x, file) for file, x in named.items())]
    )
    assert (out / "table.csv").read_text() == comma_separated(named)
    for name in PICTURES:
        with Image.open(out / name) as picture:
            assert picture.width > 600
    said = capsys.readouterr().out
    lines = ["prompt.png is left out: no row has clip_t"]
    lines.append(f"{', '.join(['table.md', 'table.tex', 'table.csv', *PICTURES])} in {out}")
    assert said == "\n".join(lines) + "\n"


def test_pictures_that_a_file_has_no_figures_for_are_left_out(small, capsys):
    out = config.run("report", [f"results={small}"])
    assert {p.name for p in out.glob("*.png")} == {"bytes.png"}
    assert capsys.readouterr().out.splitlines()[:5] == [
        "seconds.png is left out: no row has seconds",
        "copying.png is left out: no row has copy_pose and copy_background",
        "diversity.png is left out: no row has diversity",
        "style.png is left out: no row has style_accuracy",
        "prompt.png is left out: no row has clip_t",
    ]
    out = config.run("report", [f"results=[{small},{FILES[0]}]", "name=both"])
    assert f"seconds.png is without {small}: no row has seconds" in capsys.readouterr().out
    assert {p.name for p in out.glob("*.png")} == set(PICTURES)


def test_a_folder_of_an_ablation_is_one_table_and_one_picture(small, capsys):
    found = json.loads(small.read_text())
    for rank in (16, 2):
        Path(f"runs/rank={rank}").mkdir(parents=True)
        told = {**found, "settings": {"relaxed": {"rank": rank}}, "persons": [7, 8, 9]}
        told["values"] = {"a": {"cosine": [[0.1, 0.2, rank / 16]], "seen": [[rank]]}}
        Path(f"runs/rank={rank}/results.json").write_text(json.dumps(told))
    out = config.run("report", ["results=runs"])
    headings = [line for line in (out / "table.md").read_text().splitlines() if line.startswith(("#", "| a"))]
    assert headings[:3] == [
        "## over relaxed.rank",
        "| a; relaxed.rank 2 | 0.500 [0.400, 0.600] | 0.25 | 5 |",
        "| a; relaxed.rank 16 | 0.500 [0.400, 0.600] | 0.25 | 5 |",
    ]
    # person by person: 0, 0 and 1 - 2 / 16
    assert headings[3].startswith("| a; relaxed.rank 16 − a; relaxed.rank 2 | 0.292 [0.000, ")
    assert headings[4::2] == ["## runs/rank=16/results.json", "## runs/rank=2/results.json"]
    assert (out / "table.tex").read_text().count(r"\caption") == 4  # the values, their differences, a file each
    assert {p.name for p in out.glob("*.png")} == {"over.png", "bytes.png"}
    Path("empty").mkdir()
    assert cli.main(["report", "results=empty", "out=out"]) == 2
    assert "results=empty: this folder holds no results.json" in capsys.readouterr().err


def test_values_that_other_photos_judge_are_not_compared_person_by_person(small):
    found = json.loads(small.read_text())
    for photos in (1, 4):
        Path(f"runs/{photos}").mkdir(parents=True)
        told = {**found, "settings": {"photos": photos, "given": None}, "persons": [7, 8, 9]}
        told["values"] = {"a": {"cosine": [[0.1, 0.2, photos / 16]]}}
        Path(f"runs/{photos}/results.json").write_text(json.dumps(told))
    assert " − " not in (config.run("report", ["results=runs"]) / "table.md").read_text()
    for file in Path("runs").glob("*/results.json"):
        told = json.loads(file.read_text())
        file.write_text(json.dumps({**told, "settings": {**told["settings"], "given": 4}}))
    assert "a; photos 4 − a; photos 1" in (config.run("report", ["results=runs", "name=same"]) / "table.md").read_text()


def test_without_matplotlib_there_are_tables(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = config.run("report", [f"results={small}"])
    assert sorted(p.name for p in out.iterdir() if p.name[0] != ".") == TABLES
    assert "no figures: matplotlib is not installed; run `pip install -e '.[plots]'`" in capsys.readouterr().out


def test_a_report_replaces_its_own_files_alone(small, capsys):
    words = ["report", f"results={small}", "out=out"]
    assert cli.main(words) == cli.main(words) == 0
    table = Path("out/table.md").read_text()
    assert cli.main([*words[:1], f"results={FILES[0]}", "out=out"]) == 2
    assert "of a run with other results, which would be lost" in capsys.readouterr().err
    assert Path("out/table.md").read_text() == table
    Path("mine").mkdir()
    Path("mine/table.csv").write_text("mine")
    assert cli.main([*words[:2], "out=mine"]) == 2
    assert [path.name for path in Path("mine").iterdir()] == ["table.csv"]
    assert Path("mine/table.csv").read_text() == "mine"


def test_bad_files_are_one_line_and_nothing_is_written(small, capsys):
    Path("other.json").write_text('{"steps": 3}')
    for words, said in [
        (["results=[]"], "results=[]: name a file"),
        ([f"results={small}", "gallery_people=0"], "gallery_people=0: expected at least 1"),
        ([f"results={small}", "gallery_columns=0"], "gallery_columns=0: expected at least 1"),
        (["results=none.json"], "cannot read none.json"),
        ([f"results=[{small},other.json]"], "other.json is not a results file of `hyperdb evaluate`: it has no rows"),
        ([], "report needs results=..."),
    ]:
        assert cli.main(["report", *words, "out=out"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"hyperdb: error: {said}")
        assert error.count("\n") == 1
    assert not Path("out").exists()


def test_reports_need_no_torch(small):
    """Nor does the gallery of the pictures beside the results."""
    told = {"images_a_person": 1, "made_from": "x", "methods": {"a": {}}}
    Path("small.json").write_text(json.dumps(json.loads(small.read_text()) | told))
    Path("rows").mkdir()
    key = {"made_from": json.dumps({"made_from": "x"})}
    save_file({"images": np.zeros((3, 1, 3, 32, 32), np.uint8)}, "rows/a.safetensors", metadata=key)
    code = "import sys; from hyperdb import config; config.run('report', sys.argv[1:]); print([*sys.modules])"
    command = [sys.executable, "-c", code, f"results={small}"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert "'matplotlib'" in loaded
    assert "'torch'" not in loaded
    assert Path("runs/report/default/gallery.webp").is_file()
