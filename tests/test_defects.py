"Defects and words: complete, nothing named that is not there, no number that is not a record's."
import json
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import nbclient
import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
RAW = (NBS / "defects.yaml").read_text(encoding="utf-8")
PAPERS = yaml.safe_load(RAW)
DEFECTS = {name: defect for paper in PAPERS.values() for name, defect in paper.items()}
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
ONE = r"[A-D]\d{1,2}[bc]?"
MANY = rf"{ONE}(?:(?:, and |, | and | to ){ONE})*"
by_name = pytest.mark.parametrize


def shown(nb) -> list[str]:
    "What the cells of a page show, as Markdown."
    return ["".join(o["data"]["text/markdown"]) for cell in nb.cells for o in cell.get("outputs", []) if "data" in o]


PAGE = nbformat.read(NBS / "defects.ipynb", 4)
ANSWERS, *TEXTS = shown(PAGE)
PARTS = dict(re.findall(rf'#### <span id="[a-d]\d+[bc]?"></span>({ONE}) · (.*?)(?=\n#### |\Z)', "\n".join(TEXTS), re.S))


def numbered(letter: str, last: int, *more: str) -> list[str]:
    "A1 to A18, say, and those that have a letter behind."
    return [*(f"{letter}{n + 1}" for n in range(last)), *more]


# all of them, each once, each whole

def test_every_defect_of_every_paper_is_there_once():
    wanted = [*numbered("A", 18), *numbered("B", 15, "B1b", "B1c", "B7b"), *numbered("C", 16), *numbered("D", 16)]
    assert sorted(re.findall(rf"(?m)^  ({ONE}):$", RAW)) == sorted(DEFECTS) == sorted(wanted)
    assert all(name[0] == paper for paper, found in PAPERS.items() for name in found)
    places = re.findall(r'<span id="([a-d]\d+[bc]?)"></span>', "\n".join(TEXTS))
    assert sorted(places) == sorted(name.lower() for name in wanted) and sorted(PARTS) == sorted(wanted)


@by_name("name", DEFECTS)
def test_an_entry_is_whole(name):
    defect = DEFECTS[name]
    must = {"title", "weight", "does", "why", "here", "pages"}
    assert must <= set(defect) <= must | {"tests", "cells", "untested", "measured", "unmeasured"}
    assert defect["weight"] in ("claim", "results", "craft") and defect["pages"]
    assert ("untested" in defect) != bool(defect.get("tests") or defect.get("cells")), "a test, or why there is none"
    assert all({"said", "from", "at"} <= set(m) <= {"said", "from", "at", "real", "count"} for m in
               defect.get("measured", []))
    for words in (defect["does"], defect["why"], defect["here"], defect["title"]): assert words in PARTS[name]
    assert ("**No test here:**" in PARTS[name]) == ("untested" in defect)
    assert ("**Measured:** not measured." in PARTS[name]) == ("measured" not in defect)


# what is named exists

@by_name("name", DEFECTS)
def test_what_would_catch_it_exists(name):
    defect = DEFECTS[name]
    for test in defect.get("tests", []):
        file, function = test.split("::")
        assert re.search(rf"(?m)^def {function}\(", (ROOT / file).read_text()), f"no {test}"
        assert f"`{test}`" in PARTS[name]
    for page, words in defect.get("cells", {}).items():
        cells = [c.source for c in nbformat.read(NBS / page, 4).cells if c.cell_type == "code" and words in c.source]
        assert cells and all(re.search(r"test_eq|test_close|assert", source) for source in cells), f"no check in {page}"


@by_name("page", ["defects.ipynb", "glossary.ipynb"])
def test_every_link_leads_to_a_notebook(page):
    nb = nbformat.read(NBS / page, 4)
    text = "\n".join([*(c.source for c in nb.cells if c.cell_type == "markdown"), *shown(nb)])
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not link.startswith("https://arxiv.org/")]
    assert len(links) > 60 and [link for link in links if not (NBS / link).is_file()] == []


def test_a_defect_that_is_named_anywhere_is_on_the_page():
    named = {}
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            runs = re.findall(rf"\b(?:[Dd]efects?|answers|corrects|against)(?: defects?)? ({MANY})\b", cell.source)
            runs += re.findall(rf"\(({MANY})[),;:]", cell.source)
            named |= {name: path.name for run in runs for name in re.findall(ONE, run)}
    assert {n: p for n, p in named.items() if n not in DEFECTS and (n, p) != ("A99", "44_docs.ipynb")} == {}
    assert len(named) > 40 and "A99" in named, "chapter 44 shows a number that is refused"


# no number that is not a record's

def record(stage: str, data: str = "") -> dict:
    "The metrics of a published stage."
    return json.loads((ROOT / "figures" / data / "records" / f"{stage}.json").read_text())["metrics"]


def numbers(metrics: dict, at: list) -> list[list]:
    "The numbers of a place; of every finding that has it where the place says `*`."
    if not at:
        if isinstance(metrics, dict): metrics = [metrics[k] for k in ("difference", "low", "high")]
        return [metrics if isinstance(metrics, list) else [metrics]]
    if at[0] != "*": return numbers(metrics[at[0]], at[1:])
    return [n for below in metrics.values() if isinstance(below, dict) and at[1] in below
            for n in numbers(below, at[1:])]


def spelled(n) -> str:
    "A number as the page spells it."
    if isinstance(n, int): return f"{n:,}"
    if abs(n) >= 100: return f"{n:,.0f}".replace("-", "−")
    return f"{Decimal(str(n)).quantize(Decimal('0.001'), ROUND_HALF_UP)}".replace("-", "−")


@by_name("name", [n for n, d in DEFECTS.items() if "measured" in d])
def test_a_measured_effect_is_that_of_the_record(name):
    told = PARTS[name].split("**Measured:** ")[1]
    for measure in DEFECTS[name]["measured"]:
        for data in ("", "open-i") if measure.get("real") else ("",):
            metrics = record(measure["from"], data)
            if measure.get("count"):
                wanted = [str(sum(metrics[measure["at"][0]].values()))]
            elif "*" in measure["at"]:
                found = numbers(metrics, measure["at"])
                ends = sorted(n[0] for n in found)
                wanted = [f"{spelled(ends[0])} to {spelled(ends[-1])} over {len(found)} findings"]
                at = ["Pneumonia" if key == "*" else key for key in measure["at"]]
                if not data: wanted += [spelled(n) for n in numbers(metrics, at)[0]]
            else: wanted = [spelled(n) for n in numbers(metrics, measure["at"])[0]]
            assert [w for w in wanted if w not in told] == [], measure
        assert f"`{measure['from']}`" in told


def test_no_other_number_stands_among_the_measured():
    for name, part in PARTS.items():
        told = part.split("**Measured:** ")[1]
        of = [DEFECTS[name].get("unmeasured", ""), *(m["said"] for m in DEFECTS[name].get("measured", []))]
        for words in of: told = told.replace(words.format(finding="pneumonia"), "")
        told = re.sub(r"`\w+`|over \d+ findings", "", told)
        known = {
            spelled(n) for m in DEFECTS[name].get("measured", []) for data in ("", "open-i")[:1 + m.get("real", False)]
            for found in ([[0]] if m.get("count") else numbers(record(m["from"], data), m["at"])) for n in found
        }
        assert set(re.findall(r"−?\d[\d,]*(?:\.\d+)?", told)) <= known, name


def test_the_answers_count_what_is_there():
    start = ANSWERS[:ANSWERS.index("Three matter most")]
    has = lambda key, value=None: sum(key in d and value in (None, d[key]) for d in DEFECTS.values())
    said = [int(n) for n in re.findall(r"(?<![\w.])\d+", start)]
    assert said == [len(DEFECTS), *(len(PAPERS[p]) for p in "ABCD"), *(has("weight", w) for w in (
        "claim", "results", "craft")), len(DEFECTS) - has("untested"), has("untested"), has("measured")]
    known = {spelled(n) for name in ("A1", "A4", "A8") for m in DEFECTS[name]["measured"]
             for data in ("", "open-i")[:1 + m.get("real", False)]
             for found in numbers(record(m["from"], data), m["at"]) for n in found}
    rest = re.sub(r"\[A\d\]\(#a\d\)", "", ANSWERS[len(start):])
    assert set(re.findall(r"−?\d[\d,]*\.\d+|\d+,\d+", rest)) <= known


def test_the_page_is_what_the_published_records_give():
    nb = nbformat.read(NBS / "defects.ipynb", 4)
    nbclient.NotebookClient(nb, kernel_name="python3", timeout=120, resources={"metadata": {"path": NBS}}).execute()
    assert shown(nb) == [ANSWERS, *TEXTS], "a record has changed since: run nbs/defects.ipynb again"


# words

WORDS = """study, radiograph, section, mention, label policy, split, token grid, relevance, aggregation, budget,
retained patches, visual graph, knowledge graph, unified graph, asset, store, scoring method, track, control, preset,
run record"""    # one name each, everywhere: the words that the design of this companion fixes
MORE = """lift, typed classifier, hit rate, precision, label head, raw-film network, composed report, phantom,
described / released, image-only / image+report, macro AUC, headline AUC, interval, patient, CICL, MXA, criterion,
unit, slim"""


def test_the_words_are_all_there_in_order_with_a_page_each():
    text = "\n".join(c.source for c in nbformat.read(NBS / "glossary.ipynb", 4).cells)
    found = re.findall(r"(?m)^#### (.+)\n\n(.+)$", text)
    words = [word for word, _ in found]
    wanted = {" ".join(w.split()) for w in f"{WORDS}, {MORE}".replace("interval, patient", "interval").split(",")}
    assert wanted - {"interval"} <= set(words) and "interval, patient" in words
    assert words == sorted(words, key=str.lower) and len(set(words)) == len(words)
    for word, told in found:
        assert re.search(r"\(\[(?:chapter|stage) \w+\]\((?:api|paper)/\w+\.ipynb\)\)$", told), f"{word}: no page"
        assert len(told.split()) < 60, f"{word}: a sentence or two"
        number, path = re.findall(r"\[(?:chapter|stage) (\w+)\]\((.+?)\)", told)[-1]
        assert Path(path).name.startswith(f"{number}_"), word
