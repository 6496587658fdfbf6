"""Tables say what the results file says of its rows."""

from __future__ import annotations

import json

import pytest

from hyperdb.report.table import comma_separated, latex, markdown, read
from hyperdb.runtime.errors import UserError


def row(**told):
    return {"cosine": {"mean": 0.5, "lo": 0.4, "hi": 0.6}, "rank1": 0.25, **told}


def test_rows_stand_in_the_files_order_with_the_files_labels():
    rows = {"svdiff": row(label="SVDiff, 7 iterations"), "hyper_40": row(label="hypernetwork + 5 iterations")}
    table = markdown({"rows": rows, "paired": {"svdiff-hyper_40": rows["svdiff"]["cosine"]}}).splitlines()
    assert table[2:4] == [
        "| SVDiff, 7 iterations | 0.500 [0.400, 0.600] | 0.25 |",
        "| hypernetwork + 5 iterations | 0.500 [0.400, 0.600] | 0.25 |",
    ]
    assert table[-1] == "| SVDiff, 7 iterations − hypernetwork + 5 iterations | 0.500 [0.400, 0.600] |"


def test_what_a_row_was_not_asked_is_a_dash():
    changed, styled = ({"mean": x, "lo": x, "hi": x} for x in (0.4567, 0.987))
    rows = {"floor": row(label="base", cosine_changed=changed, style_accuracy=styled),
            "copy": row(label="photo", cosine_changed={**changed, "mean": 0.8})}  # fmt: skip
    table = markdown({"rows": rows, "paired": {}}).splitlines()
    assert table[0] == "| way to personalise | face cosine | rank-1 | face cosine, changed prompt | style obeyed |"
    assert table[2].endswith("| 0.25 | 0.457 [0.457, 0.457] | 0.99 |")
    assert table[3].endswith("| 0.25 | 0.800 [0.457, 0.457] | — |")


def test_a_table_has_the_columns_that_are_asked_for():
    table = markdown(RESULTS, only=["bytes", "copy_pose"]).splitlines()
    assert table[0] == "| way to personalise | face cosine | bytes | pose copied |"
    assert table[3] == "| lora | 0.500 [0.375, 0.625] | — | — |"
    assert table[5] == "| paired difference | face cosine | pose copied |"
    assert len(table) == 8
    with pytest.raises(UserError, match="no row has the figure copies; expected of cosine, "):
        markdown(RESULTS, only=["copies"])


RESULTS = {
    "rows": {
        "copy": {
            "label": "[V]: 50 % of A_B & C|D",
            "start": None,
            "cosine": {"mean": 0.8125, "lo": 0.75, "hi": 0.875},
            "rank1": 1.0,
            "lpips": 0.25,
            "copy_pose": {"mean": -0.0625, "lo": -0.125, "hi": 0.03125},
            "bytes": 1234567.0,
        },
        "lora": {"cosine": {"mean": 0.5, "lo": 0.375, "hi": 0.625}, "rank1": 0.0417},
    },
    "paired": {"lora-copy": {"mean": -0.3125, "lo": -0.375, "hi": -0.25}},
    "paired_further": {"rank1": {}, "copy_pose": {"lora-copy": {"mean": 0.5, "lo": 0.25, "hi": 0.75}}},
    "people": 24,
    "seeds": 3,
}


MARKDOWN = r"""
| way to personalise | face cosine | rank-1 | pose copied | bytes | lpips |
| --- | --- | --- | --- | --- | --- |
| [V]: 50 % of A_B & C\|D | 0.812 [0.750, 0.875] | 1.00 | -0.06 | 1,234,567 | 0.250 |
| lora | 0.500 [0.375, 0.625] | 0.04 | — | — | — |

| paired difference | face cosine | pose copied |
| --- | --- | --- |
| lora − [V]: 50 % of A_B & C\|D | -0.312 [-0.375, -0.250] | 0.500 [0.250, 0.750] |

n = 24 people, 3 seeds; in brackets: 95 % intervals over people and seeds
"""
LATEX = r"""
\begin{table}
\centering
\begin{adjustbox}{max width=\linewidth}
\begin{tabular}{lrrrrr}
\toprule
way to personalise
 & \rotatebox{90}{face cosine}
 & \rotatebox{90}{rank-1}
 & \rotatebox{90}{pose copied}
 & \rotatebox{90}{bytes}
 & \rotatebox{90}{lpips} \\
\midrule
{}[V]: 50 \% of A\_B \& C\textbar{}D
 & \shortstack{0.812\\{\scriptsize [0.750, 0.875]}}
 & 1.00
 & $-$0.06
 & 1,234,567
 & 0.250 \\
lora
 & \shortstack{0.500\\{\scriptsize [0.375, 0.625]}}
 & 0.04
 & ---
 & ---
 & --- \\
\bottomrule
\end{tabular}
\end{adjustbox}
\caption{a\_b.json: n = 24 people, 3 seeds; in brackets: 95 \% intervals over people and seeds.}
\end{table}
\begin{table}
\centering
\begin{adjustbox}{max width=\linewidth}
\begin{tabular}{lrr}
\toprule
paired difference
 & \rotatebox{90}{face cosine}
 & \rotatebox{90}{pose copied} \\
\midrule
lora $-$ [V]: 50 \% of A\_B \& C\textbar{}D
 & \shortstack{$-$0.312\\{\scriptsize [$-$0.375, $-$0.250]}}
 & \shortstack{0.500\\{\scriptsize [0.250, 0.750]}} \\
\bottomrule
\end{tabular}
\end{adjustbox}
\caption{a\_b.json: n = 24 people, 3 seeds; in brackets: 95 \% intervals over people and seeds.}
\end{table}
"""
CSV = """
results,name,label,people,seeds,cosine,cosine_lo,cosine_hi,rank1,copy_pose,copy_pose_lo,copy_pose_hi,steps,bytes,lpips
a.json,copy,[V]: 50 % of A_B & C|D,24,3,0.8125,0.75,0.875,1.0,-0.0625,-0.125,0.03125,,1234567.0,0.25
a.json,lora,lora,24,3,0.5,0.375,0.625,0.0417,,,,,,
a.json,lora-copy,lora − [V]: 50 % of A_B & C|D,24,3,-0.3125,-0.375,-0.25,,0.5,0.25,0.75,,,
b.json,lora,"LoRA, 7",9,1,0.5,0.4,0.6,0.25,,,,7,,
"""


def test_the_whole_table_has_every_figure_and_says_of_how_many():
    assert markdown(RESULTS, brief=False) == MARKDOWN.strip()


def test_the_whole_table_tells_people_apart_by_what_is_known_of_them():
    part = {"people": 3, "copy": 0.8125, "lora": 0.5}
    others = part | {"people": 21, "lora": 0.25, "lora of": 9}
    told = RESULTS | {"slices": {"reference_wears": {"glasses": part, "nothing": others}}}
    *_, first, second, _, counted = markdown(told, brief=False).splitlines()
    assert first == "| reference wears: glasses | 3 | 0.812 | 0.500 |"
    assert second == "| reference wears: nothing | 21 | 0.812 | 0.250 (9) |"
    assert counted.startswith("n = 24 people")
    assert "glasses" in latex(told, "a")
    assert markdown(told) == markdown(RESULTS)  # in brief


def test_rows_of_fewer_people_say_so():
    rows = {"all": row(people=50), "few": row(people=10)}
    found = {"rows": rows, "paired": {"few-all": rows["all"]["cosine"]}, "people": 50}
    lines = markdown(found).splitlines()
    assert lines[0] == "| way to personalise | face cosine | people | rank-1 |"
    assert lines[3] == "| few | 0.500 [0.400, 0.600] | 10 | 0.25 |"
    assert lines[-3] == "| paired difference | face cosine [95 % interval over people] | people |"
    assert lines[-1] == "| few − all | 0.500 [0.400, 0.600] | 10 |"
    assert comma_separated({"a": found}).splitlines()[1:] == [
        "a,all,all,50,1,0.5,0.4,0.6,0.25", "a,few,few,10,1,0.5,0.4,0.6,0.25", "a,few-all,few − all,10,1,0.5,0.4,0.6,",
    ]  # fmt: skip


def test_latex_is_escaped_and_has_the_intervals_under_the_means():
    assert latex(RESULTS, "a_b.json").replace(" & ", "\n & ") == LATEX.lstrip()


def test_every_special_character_of_latex_is_text():
    rows = {"a": row(label="\\ {x} $1 #2 ~ ^ <y> level -1")}
    lines = latex({"rows": rows, "paired": {}, "people": 2}, "x").splitlines()
    assert lines[7].startswith(
        r"\textbackslash{} \{x\} \$1 \#2 \textasciitilde{} \textasciicircum{} \textless{}y\textgreater{} level $-$1 & "
    )
    assert sum(line == r"\begin{table}" for line in lines) == 1, "no pairs, no table of them"


def test_csv_has_full_precision_the_ends_and_all_files():
    other = {"rows": {"lora": {"label": "LoRA, 7", **row(steps=7)}}, "paired": {}, "people": 9}
    assert comma_separated({"a.json": RESULTS, "b.json": other}) == CSV.lstrip()


def test_a_row_in_which_nothing_is_drawn_by_chance_has_one_seed():
    values = {"hyper_40": {"cosine": [[0.5], [0.6], [0.7]]}, "copy": {"cosine": [[0.9]]}}
    rows = {name: {"label": name, "people": 1, "cosine": 0.6} for name in values}
    lines = comma_separated({"a": {"rows": rows, "paired": {}, "people": 1, "seeds": 3, "values": values}}).splitlines()
    assert [line.split(",")[:5] for line in lines[1:]] == [
        ["a", "hyper_40", "hyper_40", "1", "3"],
        ["a", "copy", "copy", "1", "1"],
    ]


def test_several_files_of_the_same_people_are_one_table(tmp_path):
    told = {"paired": {}, "people": 3, "persons": [1, 2, 3], "data": "d", "changed": ["a [V] face, on the beach"]}
    first = {**told, "rows": {"floor": row(label="base"), "lora": row(label="LoRA")}}
    bits = {**told, "rows": {"lora": row(label="LoRA", bytes=8)}, "settings": {"diffusion": {"quantise": "nf4"}}}
    few = {**told, "rows": {"floor": row(), "lora_moved": row()}, "people": 2, "persons": [1, 2]}
    for name, found in (("a", first), ("b", bits), ("c", few)):
        (tmp_path / name).write_text(json.dumps(found))
    lines = read("a,b,c", ["people", "bytes"], tmp_path).splitlines()
    shown = [line.split(" | ")[0].removeprefix("| ") + "," + ",".join(line.split(" | ")[2:]) for line in lines[2:]]
    assert shown == ["base,3,— |", "LoRA,3,— |", "LoRA, base in nf4,3,8 |", "lora_moved,2,— |"]
    (tmp_path / "c").write_text(json.dumps({**few, "persons": [1, 3]}))
    with pytest.raises(UserError, match=r"c differs from .*a in persons"):
        read("a,c", [], tmp_path)
    (tmp_path / "c").write_text(json.dumps({**few, "changed": []}))
    with pytest.raises(UserError, match=r"c differs from .*a in changed"):
        read("a,c", [], tmp_path)
