"What the home page says of the companions is what their published records hold."
import json
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"IMITATE": "60_imitate", "MXA and distillation": "70_mxa", "Interpretability-aware pruning": "80_slim"}
BESIDE = {"MXA and distillation": ["72_graph_student"]}  # more stages that a row speaks of
TRIPLE = r"[+−]\d\.\d{3} \[[+−]\d\.\d{3}, [+−]\d\.\d{3}\]"


def written(values):
    "A difference with its interval, as the home page writes it."
    value, low, high = map(sign, values)
    return f"{value} [{low}, {high}]"


def sign(value):
    "A difference, as the home page writes it: a half goes up, as the stage that measured it printed it."
    return f"{Decimal(str(value)).quantize(Decimal('0.001'), ROUND_HALF_UP):+}".replace("-", "−")


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


def record_file(stage, data=""):
    "Where the record of a stage is published, for phantoms or another data set."
    return ROOT / "figures" / data / f"records/{stage}.json"


def metrics_of(stage, data=""):
    "The numbers of a published stage, on phantoms or of another data set."
    return json.loads(record_file(stage, data).read_text())["metrics"]


def row_metrics(name, data=""):
    "The numbers that a row of the table may quote, by stage."
    return {stage: metrics_of(stage, data) for stage in (STAGES[name], *BESIDE.get(name, []))}


@pytest.fixture(scope="module")
def rows():
    "What the home page's table of companions says, by paper and data."
    cells = [c.source for c in nbformat.read(ROOT / "nbs/index.ipynb", 4).cells]
    table = next(c for c in cells if c.startswith("## The three papers around it"))
    found = {}
    for name in STAGES:
        line = next(line for line in table.splitlines() if line.startswith(f"| {name} ("))
        for stage in row_metrics(name): assert f"(paper/{stage}.ipynb)" in line, "the row leads to its stages"
        found[name, ""], _, found[name, "open-i"] = line.partition("On Open-i")
    return found


MEASURED = [(name, data) for name in STAGES for data in ("", "open-i") if record_file(STAGES[name], data).exists()]


def test_home_tells_of_open_i_where_something_was_measured_there(rows):
    assert {key for key, text in rows.items() if text} == {*MEASURED} >= {(name, "") for name in STAGES}


@pytest.mark.parametrize("name, data", MEASURED)
def test_numbers_on_home_are_those_of_the_record(rows, name, data):
    held, said = dict(intervals(row_metrics(name, data))), re.findall(TRIPLE, rows[name, data])
    assert said and set(said) <= set(held), set(said) - set(held)


@pytest.mark.parametrize("name, data", MEASURED)
def test_what_home_calls_shown_has_an_interval_off_zero(rows, name, data):
    "Each difference is followed by what the record says of it: `shown` only where the interval leaves zero out."
    held = dict(intervals(row_metrics(name, data)))
    said = re.findall(rf"({TRIPLE}) \((shown|not shown)\)", rows[name, data])
    assert len(said) == len(re.findall(TRIPLE, rows[name, data]))
    for value, word in said:
        assert (word == "shown") == (held[value][1] > 0 or held[value][2] < 0), value


@pytest.mark.parametrize("name, data", MEASURED)
def test_other_differences_on_home_are_numbers_of_the_record(rows, name, data):
    alone = re.findall(r"[+−]\d\.\d{3}", re.sub(TRIPLE, "", rows[name, data]))
    assert set(alone) <= {sign(v) for v in leaves(row_metrics(name, data))}, alone


@pytest.mark.parametrize("name, data", MEASURED)
def test_areas_on_home_are_those_of_the_record(rows, name, data):
    held = {area(values) for _, values in intervals(row_metrics(name, data))}
    said = re.findall(r"(?<![+−\d.])\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", rows[name, data])
    assert len(said) == 2 * (name == "IMITATE" and not data) and set(said) <= held, said


@pytest.mark.parametrize("data", [data for name, data in MEASURED if STAGES[name] == "80_slim"])
def test_eight_bits_on_home_are_those_of_the_record(rows, data):
    held = {(written(v["less dense, on test"]), f"{v['bytes over dense float32']:.2f}", f"{v['times as fast']:.2f}")
            for v in metrics_of("80_slim", data)["eight bits"].values()}
    row = rows["Interpretability-aware pruning", data]
    said = re.findall(rf"({TRIPLE}) \([\w ]+\) at (\d\.\d\d) of the bytes, (\d\.\d\d) times as fast", row)
    assert len(said) == 2 and set(said) <= held


# what came out, at the top of the page

def area(values):
    "An AUC with its interval, as the home page writes it."
    value, low, high = (f"{v:.3f}" for v in values)
    return f"{value} [{low}, {high}]"


def gap(row):
    "A paired difference, as the home page writes it."
    return written([row["difference"], row["low"], row["high"]])


def share(row):
    "A hit rate with its interval in percent."
    return f"{row['hit rate']:.0%} [{row['low']:.0%}, {row['high']:.0%}]".replace("%", " %")


def percent(rate):
    "A rate in percent."
    return f"{rate:.0%}".replace("%", " %")


def explorer_rates():
    "Finding -> hit rate of its four patches and of random ones, with the report, as the explorer's table has them."
    page = (ROOT / "figures/explore.html").read_text(encoding="utf-8")
    assert "<caption>Every study at 4 patches, activation, image+report</caption>" in page, "what it shows first"
    table = page[page.index('<caption id="says">All marked studies of the test split</caption>'):]
    row = r'<th scope="row">([\w ]+) <small>\d+</small></th><td><span class="two"><b>(\d+ %)</b> <span>(\d+ %)</span>'
    return {finding: rates for finding, *rates in re.findall(row, table[:table.index("</table>")])}


def over_findings(control, question):
    "Of a question of stage 53: findings above zero, below, of how many, and the mean, as its record words it."
    line = next(line for line in control["in words"] if line.startswith(f"{question}: "))
    above, below, _, of, mean = re.search(
        r"above zero for (\d), below for (\d), undecided for (\d) of (\d) findings; mean (\S+)", line).groups()
    return above, below, of, mean.replace("-", "−")


def what_came_out():
    "Line of the section (a piece of it) -> what the records make of its numbers."
    kept = metrics_of("40_classify")["retained patches on test"]["Pneumonia"]
    assert kept["image-only"]["low"] < kept["centre prior"]["high"], "a gain over the usual relevance is not shown"
    areas, real = (metrics_of("40_classify", d)["AUC on test"] for d in ("", "open-i"))
    areas, real = areas["Pneumonia"], real["Cardiomegaly"]
    control, control_real = (metrics_of("53_controls", d) for d in ("", "open-i"))
    other, other_real = control["AUC on test"]["Pneumonia"], control_real["AUC on test"]["Cardiomegaly"]
    pairs, pairs_real = (c["paired differences"] for c in (control, control_real))
    pairs, pairs_real = pairs["Pneumonia"], pairs_real["Cardiomegaly"]
    many, many_real = (f"{metrics_of('51_quality', d)['studies']['test']['studies']:.0f}" for d in ("", "open-i"))
    fused = metrics_of("30_fuse")
    fused_real = metrics_of("30_fuse", "open-i")
    small, small_real = ({t: f"{v:.0f}" for t, v in m["bytes per study"].items()} for m in (fused, fused_real))
    film, film_real = (f"{m['film on disk, bytes']:,.0f}" for m in (fused, fused_real))
    jpeg, pooled = f"{fused['film at the size that is read']['JPEG']:,.0f}", "image-only, pooled embedding, 1 x 1 cells"
    vector, vector_real = (str(c["bytes per study"]["pooled embedding, 1 x 1 cells"]) for c in (control, control_real))
    released = {f: v["less described"] for f, v in metrics_of("55_released").items()
                if isinstance(v, dict) and "less described" in v}
    rows = "token rows (A1)"
    alone_in = {f: {n: v[0] for n, v in lost.items() if n != "all defects"} for f, lost in released.items()}
    dearest = [f for f, lost in alone_in.items() if min(lost, key=lost.get) == rows]
    light = max(released, key=lambda f: released[f][rows][0])
    guided = {f: t["image-only"]["this run's guide"]["hit"][0]
              for f, t in metrics_of("52_relevance")["test, finding by finding"].items()}
    least, most = min(guided, key=guided.get), max(guided.values())
    ends = [percent(v) for v in (guided[least], most)]
    heart = metrics_of("52_relevance")["test, finding by finding"]["Cardiomegaly"]["image-only"]["centre prior"]
    seen = explorer_rates()
    read = metrics_of("52_relevance", "open-i")
    best = read["elsewhere, chosen on the first half"]
    assert best == "brightness + anatomy", "the reading that is described in words"
    marked = {name: read["elsewhere, second half"][name] for name in ("covid_notes", "nih1024")}
    swapped = [m[best]["precision over swapped films"] for m in marked.values()]
    anatomy = marked["covid_notes"][best]["precision over anatomy"]
    films = [str(m["studies"]) for m in marked.values()]
    front = json.loads((ROOT / "figures/records/90_frontier.json").read_text())["answers"][0]
    most_of_all = r"the best is (thumbnail), .* at most (\d+) bytes with ([\d,]+) bytes a study, AUC (\d\.\d{3}) "
    best_of_all = re.search(most_of_all, front)
    codecs = metrics_of("58_codecs")
    beside_it = codecs["of as many bytes"]["pooled vector"]["less image-only asset"]
    reads = area(codecs["AUC on test"]["own"][f"image-only, thumbnail, {best_of_all[2]} bytes, read by the label head"])
    assert reads.startswith(f"{best_of_all[4]} ["), "stages 58 and 90 speak of the same thumbnail"
    ours, ten = (f"image-only asset, k = {k} - raw film" for k in (4, 10))
    lost, lost_real = over_findings(control, ours), over_findings(control_real, ten)
    ten_read = {f: t["image-only, both graphs, described, k = 10"][0]
                for f, t in control_real["AUC on test"].items()}
    ends_real = [w for f in (min(ten_read, key=ten_read.get), max(ten_read, key=ten_read.get))
                 for w in (f"{ten_read[f]:.3f}", f)]
    alone = over_findings(control, "described - random, k = 4, image-only")
    alone_real = over_findings(control_real, "described - random, k = 4, image-only")
    beside_real = [over_findings(control_real, f"described - random, both graphs, k = 4, {t}")[0] for t in small]
    beside = [over_findings(control, f"described - random, both graphs, k = 4, {t}") for t in small]
    return {
        "1. **": [share(kept["image+report"]), share(kept["image-only"]),
                  f"of as many random patches in {percent(kept['random']['hit rate'])}",
                  f"usual relevance, the same for every film, reach {share(kept['centre prior'])}",
                  f"in cardiomegaly those of the usual attention hit {percent(heart['hit'])}, ours "
                  f"{percent(guided['Cardiomegaly'])}",
                  f"five findings, from the film alone, {ends[0]} ({least}) to {ends[1]}",
                  f"a lung lesion is hit in {seen['Lung Lesion'][0]}",
                  "a fracture in {} (random {})".format(*seen["Fracture"])],
        "2. **": [f"{small['image-only']} bytes ({small['image+report']} with", film, f"{jpeg} as a JPEG",
                  area(areas["image-only, typed both"]),
                  area(other["image-only, raw-film network"]), gap(pairs[ours]), gap(pairs_real[ten]),
                  "from {} ({}) to {} ({})".format(*ends_real),
                  f"{gap(control_real['paired differences'][ends_real[1]][ten])} for {ends_real[1]}",
                  f"mean of five findings {lost[3]} (below zero for {lost[1]} of {lost[2]})",
                  f"mean {lost_real[3]} (below zero for {lost_real[1]} of {lost_real[2]})"],
        "3. **": [gap(pairs["described - random, k = 4, image-only"]),
                  *(gap(pairs[f"described - random, both graphs, k = 4, {t}"]) for t in small),
                  f"in {alone[0]} of {alone[2]} findings (mean {alone[3]})",
                  f"{beside[0][0]} of {beside[0][2]} findings are shown (mean {beside[0][3]})",
                  f"{beside[1][0]} of {beside[1][2]} are (mean {beside[1][3]})",
                  f"On Open-i, shown alone, {alone_real[0]} of {alone_real[2]} findings",
                  gap(pairs_real["described - random, k = 4, image-only"]),
                  f"beside the knowledge graph {beside_real[0]} and {beside_real[1]}",
                  area(other["image+report, knowledge graph alone"])],
        "On phantoms with": ["95 % interval", f"({many} test studies)", f"Open-i ({many_real})"],
        "4. **": [f"{vector} bytes", written(beside_it), f"{best_of_all[1]} of {best_of_all[3]} bytes", reads],
        "5. **": [f"(COVID-19, {films[0]} films; NIH, {films[1]})", *(written(s) for s in swapped),
                  f"worse than anatomy alone, {written(anatomy)}"],
        "Of the released": [f"costs most in {len(dearest)} of {len(released)} findings",
                            written(released["Pneumonia"][rows]),
                            f"{written(released[light][rows])} where it costs least ({light})"],
        "| asset, report known": [f"| {small['image+report']} |", area(areas["image+report, typed both"]),
                                  f"| {small_real['image+report']} |", area(real["image+report, typed both"])],
        "| its knowledge": [area(c["image+report, knowledge graph alone"]) for c in (other, other_real)],
        "| asset, image-only": [f"| {small['image-only']} |", area(areas["image-only, typed both"]),
                                f"| {small_real['image-only']} |", area(real["image-only, typed both"])],
        "| averaged": [vector, area(other[pooled]), vector_real, area(other_real[pooled])],
        "| label head": [film, area(areas["image-only, label head, all patches"]),
                         film_real, area(real["image-only, label head, all patches"])],
        "| raw-film network": [film, area(other["image-only, raw-film network"]),
                               film_real, area(other_real["image-only, raw-film network"])],
        "Bytes of an asset": [f"takes {control['bytes per study']['asset, image-only, k = 4']:,}"],
    }


@pytest.fixture(scope="module")
def out():
    "Lines of the section that says what came out."
    cells = [c.source for c in nbformat.read(ROOT / "nbs/index.ipynb", 4).cells]
    found = next(n for n, c in enumerate(cells) if c.startswith("## What came out"))
    assert found <= 2, "it stands before everything else but the introduction"
    return cells[found].partition("## Four ways")[0].splitlines()


@pytest.mark.parametrize("start", what_came_out())
def test_what_came_out_is_what_the_records_hold(out, start):
    line = next(line for line in out if line.startswith(start))
    expected = what_came_out()[start]
    for piece in expected:
        assert piece in line, f"{piece} is not in: {line}"
    for piece in sorted(expected, key=len, reverse=True): line = line.replace(piece, "")
    assert not re.findall(r"\d\.\d{2,}|\d+ %", line), f"numbers of no record: {line}"


def test_no_other_line_of_what_came_out_has_a_measured_number(out):
    rest = [line for line in out if not any(line.startswith(s) for s in what_came_out())]
    assert not re.findall(r"\d\.\d{2,}", "\n".join(rest))


def test_what_came_out_calls_nothing_shown_that_is_not(out):
    "Of each difference the sentence says, or does not deny, what its interval allows."
    lines = {s: next(line for line in out if line.startswith(s)) for s in ("3. **", "5. **")}
    third, fifth = (re.findall(TRIPLE, lines[s]) for s in lines)
    ends = [[float(v.replace("−", "-")) for v in re.findall(r"[+−]\d\.\d{3}", t)] for t in (*third, *fifth)]
    shown = [low > 0 or high < 0 for _, low, high in ends]
    assert shown == [True, False, False, False, False, False, True]
    assert all(f"{t}, not shown" in lines["3. **"] for t in third[1:]) and f"{third[0]}, not" not in lines["3. **"]
    assert "is not shown to beat" in lines["5. **"] and "worse than anatomy alone" in lines["5. **"] and ends[-1][2] < 0
    better, cost = (next(line for line in out if line.startswith(s)) for s in ("4. **", "Of the released"))
    low = [float(v.replace("−", "-")) for v in re.findall(r"[+−]\d\.\d{3}", re.search(TRIPLE, better)[0])][1]
    assert ("does better" in better) == (low > 0)
    light = [float(v.replace("−", "-")) for v in re.findall(r"[+−]\d\.\d{3}", re.findall(TRIPLE, cost)[-1])]
    assert ("there not shown" in cost) == (light[1] <= 0 <= light[2])
    front = json.loads((ROOT / "figures/records/90_frontier.json").read_text())["answers"][0]
    assert ("not shown to be ahead of what is cheaper" in better) == ("0 above all that are cheaper" in front)
