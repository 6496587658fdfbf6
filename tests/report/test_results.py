"""What is no results file is refused in one line that says why; what is one is read whole."""

from __future__ import annotations

import json

import pytest

from hyperdb.report.results import load
from hyperdb.runtime.errors import UserError

INTERVAL = {"mean": 0.5, "lo": 0.4, "hi": 0.6}
RESULTS = {
    "rows": {
        "a": {"label": "A", "start": None, "cosine": INTERVAL, "rank1": 0.25, "steps": 40, "by_style": {"ink": 0.5}},
        "b": {"cosine": INTERVAL, "rank1": 0.5},
    },
    "paired": {"a-b": INTERVAL},
    "paired_further": {"rank1": {"a-b": INTERVAL}},
    "people": 9,
}


def test_results_are_read_as_they_are(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RESULTS))
    assert load(tmp_path / "a.json") == RESULTS


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        ((), [1], "it has no rows"),
        (("rows",), {}, "it has no rows"),
        (("rows",), [RESULTS["rows"]["a"]], "it has no rows"),
        (("rows", "b"), 3, "its row 'b' has no face cosine with an interval"),
        (("rows", "b", "cosine"), 0.5, "its row 'b' has no face cosine with an interval"),
        (("rows", "b", "cosine", "lo"), "low", "its row 'b' has no face cosine with an interval"),
        (("rows", "b", "cosine", "hi"), float("nan"), "its row 'b' has no face cosine with an interval"),
        (("rows", "b", "label"), 7, "the label of its row 'b' is no text"),
        (("rows", "b", "rank1"), "high", "rank1 of its row 'b' is neither a number nor"),
        (("rows", "b", "rank1"), True, "rank1 of its row 'b' is neither a number nor"),
        (("rows", "b", "seconds"), float("inf"), "seconds of its row 'b' is neither a number nor"),
        (("people",), [3], "it does not say of how many people it is"),
        (("seeds",), 0, "it does not say of how many seeds it is"),
        (("settings",), ["rate"], "its settings are not named"),
        (("methods",), None, "its methods are not named"),
        (("methods",), {"a": 3}, "what its methods are is not told"),
        *(
            (("values",), values, "its values are not a number for each row, figure, seed and person")
            for values in (
                [],
                {"a": 1},
                {"a": {"cosine": [0.5]}},
                {"a": {"cosine": [[0.5], [0.5, 1.0]]}},
                {"a": {"cosine": [["x"]]}},
                {"a": {"cosine": []}},
                {"a": {"cosine": [[INTERVAL]]}},
            )
        ),
        *(
            (("slices",), told, "its slices are not numbers by attribute and word")
            for told in ([], {"sex": 3}, {"sex": {"man": 3}}, {"sex": {"man": {"people": "many"}}})
        ),
        (("slices_of",), "hair", "its slices are of no face cosine"),
        (("paired",), None, "it has no paired differences"),
        (("paired", "a-c"), INTERVAL, "its paired difference 'a-c' is not an interval of two rows"),
        (("paired", "a-b"), 0.1, "its paired difference 'a-b' is not an interval of two rows"),
        (("paired_further",), [], "it has no paired differences"),
        (("paired_further", "rank1"), {"b": INTERVAL}, "its paired difference 'b' is not an interval of two rows"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path, keys, value, said):
    found = [json.loads(json.dumps(RESULTS))]
    place, last = found, 0
    for key in keys:
        place, last = place[last], key
    place[last] = value
    (tmp_path / "a.json").write_text(json.dumps(found[0]))
    with pytest.raises(UserError) as caught:
        load(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'} is not a results file of `hyperdb evaluate`: {said}")


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        load(tmp_path / "a.json")
