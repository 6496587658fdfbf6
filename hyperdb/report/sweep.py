"""Several results that differ in one setting, as those of an ablation do: which one, and one table over its values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple


class Axis(NamedTuple):
    """The setting in which results differ, by its dotted name, and its value in each of them."""

    setting: str
    values: list[Any]

    @property
    def is_number(self) -> bool:
        """Whether the values have an order of their own."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)

    def order(self) -> list[int]:
        """Return the places of the results, the lowest value first; null before numbers, other values as they are."""
        places = range(len(self.values))
        if not Axis(self.setting, [value for value in self.values if value is not None]).is_number:
            return list(places)
        return sorted(places, key=lambda i: (self.values[i] is not None, self.values[i] or 0))

    def text(self, place: int) -> str:
        """Return the value of one of the results as people read it."""
        return shown(self.values[place])


def shown(value: Any) -> str:
    """Return a setting's value as people read it; of a list of one thing several times that thing."""
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value)


def _flat(told: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted name: value}, a list being a value."""
    found: dict[str, Any] = {}
    for key, value in told.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _methods(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what results say of each row's method; one that names no strength was drawn as trained.

    Its hypernetwork is told apart from the methods.
    """
    methods = found.get("methods", {}).items()
    return {row: {"strength": 1.0, **{k: v for k, v in how.items() if k != "hypernet"}} for row, how in methods}


def axis(named: Mapping[str, Mapping[str, Any]]) -> Axis | None:
    """Return the setting in which results of one base, the same data and judges differ, None for others.

    None too if there are several or none, or the same value twice.

    Settings that follow from each other, such as the rate of the fine-tuning and that of a row, count as one, by the
    first name. A setting that only some of the results have differs too.
    """
    every = list(named.values())

    def differs(name: str) -> bool:
        return any(found.get(name) != every[0].get(name) for found in every)

    if len(every) < 2 or any(map(differs, ("base", "data", "recognisers", "judges"))):
        return None
    methods = [_methods(found) for found in every]
    common = set.intersection(*map(set, methods))  # a row more is no setting
    told = [
        _flat({**found.get("settings", {}), "methods": {row: how for row, how in each.items() if row in common}})
        for found, each in zip(every, methods, strict=True)
    ]
    columns: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for one in told for key in one):
        columns[key] = [json.dumps(one.get(key)) for one in told]
    differ = {key: values for key, values in columns.items() if len(set(values)) > 1}
    if not all("settings" in found for found in every) or len({tuple(v) for v in differ.values()}) != 1:
        return None
    setting, values = next(iter(differ.items()))
    if differs("hypernet") and not setting.startswith("hypernet."):  # another one, trained alike
        return None
    return Axis(setting, [json.loads(value) for value in values]) if len(set(values)) == len(values) else None


def own_axis(named: Mapping[str, Mapping[str, Any]], row: str) -> tuple[list[str], Axis] | None:
    """Return the results that have a row, and the one number in which its method differs in them, the lowest first.

    None if it is the same method in all, differs otherwise, or the results differ in more than that. What several
    results have of the same pictures, as tables that share a row do, counts once.
    """
    mine: dict[str, dict[str, Any]] = {}
    for title, found in named.items():
        if row in found["rows"] and (how := found.get("methods", {}).get(row)) is not None:
            one = {**found, "methods": {row: how}}
            if not any(
                all(one.get(k) == two.get(k) for k in ("made_from", "settings", "methods"))
                and one["rows"][row] == two["rows"][row]
                for two in mine.values()
            ):
                mine[title] = one
    along = axis(mine) if len(mine) > 1 else None
    if along is None or not along.is_number or len({json.dumps(_methods(found)) for found in mine.values()}) == 1:
        return None
    order = along.order()
    return [list(mine)[i] for i in order], Axis(along.setting, [along.values[i] for i in order])


def merged(named: Mapping[str, Mapping[str, Any]], along: Axis) -> dict[str, Any]:
    """Return several results as one: a row for each row and value, the values of a row below each other."""
    every = list(named.values())
    rows = {}
    for name in dict.fromkeys(name for results in every for name in results["rows"]):
        for place in along.order():
            if (row := every[place]["rows"].get(name)) is not None:
                label = f"{row.get('label', name)}; {along.setting} {along.text(place)}"
                rows[f"{name} {place}"] = {**row, "label": label}
    most = {count: max(results.get(count, 1) for results in every) for count in ("people", "seeds")}
    return {"rows": rows, "paired": {}, **most}
