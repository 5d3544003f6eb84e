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
    value, low, high = (f"{v:+.3f}".replace("-", "−") for v in values)
    return f"{value} [{low}, {high}]"


def triples(tree):
    "Every value with its interval in a record."
    if isinstance(tree, dict): return [t for v in tree.values() for t in triples(v)]
    if isinstance(tree, list) and len(tree) == 3 and all(isinstance(v, (int, float)) for v in tree):
        return [written(tree)]
    return [t for v in tree for t in triples(v)] if isinstance(tree, list) else []


@pytest.fixture(scope="module")
def rows():
    "The lines of the home page's table of companions, by paper."
    cells = [c.source for c in nbformat.read(ROOT / "nbs/index.ipynb", 4).cells]
    table = next(c for c in cells if c.startswith("## The three papers around it"))
    return {name: next(line for line in table.splitlines() if line.startswith(f"| {name} (")) for name in STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_numbers_on_home_are_those_of_the_record(rows, name):
    held = triples(json.loads((ROOT / f"figures/records/{STAGES[name]}.json").read_text())["metrics"])
    said = re.findall(TRIPLE, rows[name])
    assert said and set(said) <= set(held), set(said) - set(held)
    assert f"(paper/{STAGES[name]}.ipynb)" in rows[name], "the row leads to its stage"


@pytest.mark.parametrize("name", STAGES)
def test_what_home_calls_shown_has_an_interval_off_zero(rows, name):
    "Each number is followed by what it says: `shown` only where the interval leaves zero out."
    for value, word in re.findall(rf"({TRIPLE}) \((shown|not shown)\)", rows[name]):
        _, low, high = (float(v.replace("−", "-")) for v in re.findall(r"[+−]\d\.\d{3}", value))
        assert (word == "shown") == (low > 0 or high < 0), value
    assert len(re.findall(TRIPLE, rows[name])) == len(re.findall(rf"{TRIPLE} \((?:shown|not shown)\)", rows[name]))
