"What the home page says of the companions is what their published records hold."
import json
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"MXA and distillation": "70_mxa", "Interpretability-aware pruning": "80_slim"}
TRIPLE = r"[+−]\d\.\d{3} \[[+−]\d\.\d{3}, [+−]\d\.\d{3}\]"


def written(values):
    "A difference with its interval, as the home page writes it."
    value, low, high = map(sign, values)
    return f"{value} [{low}, {high}]"


def sign(value):
    "A difference, as the home page writes it."
    return f"{value:+.3f}".replace("-", "−")


def intervals(tree):
    "Every value with its interval in a record: as it is written, as it is."
    if isinstance(tree, dict): return [t for v in tree.values() for t in intervals(v)]
    if isinstance(tree, list) and len(tree) == 3 and all(isinstance(v, (int, float)) for v in tree):
        return [(written(tree), tree)]
    return [t for v in tree for t in intervals(v)] if isinstance(tree, list) else []


def leaves(tree):
    "Every number of a record."
    if isinstance(tree, (dict, list)): return [n for v in getattr(tree, "values", lambda: tree)() for n in leaves(v)]
    return [tree] if isinstance(tree, float) else []


def record_of(name):
    "The numbers of a stage's published record."
    return json.loads((ROOT / f"figures/records/{STAGES[name]}.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def rows():
    "The lines of the home page's table of companions, by paper."
    cells = [c.source for c in nbformat.read(ROOT / "nbs/index.ipynb", 4).cells]
    table = next(c for c in cells if c.startswith("## The three papers around it"))
    return {name: next(line for line in table.splitlines() if line.startswith(f"| {name} (")) for name in STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_numbers_on_home_are_those_of_the_record(rows, name):
    held, said = dict(intervals(record_of(name))), re.findall(TRIPLE, rows[name])
    assert said and set(said) <= set(held), set(said) - set(held)
    assert f"(paper/{STAGES[name]}.ipynb)" in rows[name], "the row leads to its stage"


@pytest.mark.parametrize("name", STAGES)
def test_what_home_calls_shown_has_an_interval_off_zero(rows, name):
    "Each difference is followed by what the record says of it: `shown` only where the interval leaves zero out."
    held = dict(intervals(record_of(name)))
    said = re.findall(rf"({TRIPLE}) \((shown|not shown)\)", rows[name])
    assert len(said) == len(re.findall(TRIPLE, rows[name]))
    for value, word in said:
        assert (word == "shown") == (held[value][1] > 0 or held[value][2] < 0), value


@pytest.mark.parametrize("name", STAGES)
def test_other_differences_on_home_are_numbers_of_the_record(rows, name):
    alone = re.findall(r"[+−]\d\.\d{3}", re.sub(TRIPLE, "", rows[name]))
    assert set(alone) <= {sign(v) for v in leaves(record_of(name))}, alone
