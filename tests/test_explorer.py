"The page of a run: its numbers are those of the run and of the library, and a reader's hands work on it in a browser."
import base64
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from neural.build import Aggregation, load_readings, measured, read, save_aggregation, save_readings
from neural.cohort import write_cohort
from neural.evaluate import hit_rate, precision, random_hit_rate, random_precision
from neural.explorer import (EXPLORER_MARK, MOST_BYTES, batch_of, explored, explorer_page, marks_of, methods_of,
                             needs_of, open_explored, studies_read, with_usual)
from neural.layouts import index_dataset
from neural.prune import released_rows, top_k
from neural.radiograph import cache_radiographs
from neural.report import ReportReader, study_evidence, train_tokenizer
from neural.scores import Batch, Network, Scoring, gather, scorer
from neural.study import Manifest, NeuralError
from neural.vlm import ReportVLM, load_vlm, small_config
from test_viewer import Tags, browser  # the fixture that starts Chromium

ROOT = Path(__file__).resolve().parents[1]
TRACKS = ("image+report", "image-only")
FINDINGS = ("No Finding", "Pneumonia", "Pleural Effusion", "Cardiomegaly")
HABIT = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    "What stages 10 and 20 leave of 24 phantoms and an untrained network, by the calls of stage 20."
    home = tmp_path_factory.mktemp("explorer")
    folder = home / "run"
    folder.mkdir()
    write_cohort(home / "cohort", 24, 96, 5, 1, (0.3, 0.05, 0.65))
    index_dataset("mimic-cxr", home / "cohort", labels="truth/labels.csv")[0].save(folder / "manifest.csv")
    listed = Manifest.load(folder / "manifest.csv")
    films = cache_radiographs([(s.study_id, listed.image_path(s.frontal)) for s in listed], folder / "images", 96, 0)[0]
    ids, texts = [s.study_id for s in listed], [study_evidence(listed, s) for s in listed]
    tokenizer = train_tokenizer(texts * 2, vocab_size=200)
    torch.manual_seed(3)
    config = small_config(len(tokenizer), 96, FINDINGS, width=32, d_model=32, layers=1)
    ReportVLM(config).save_pretrained(folder / "vlm")
    tokenizer.save_pretrained(folder / "vlm")
    network = Network(load_vlm(folder / "vlm"), tokenizer, ReportReader(), Scoring(Aggregation("activation"), 4, 60))
    tracks = {"image+report": texts, "image-only": texts[1:] + texts[:1]}
    part = {t: Batch(ids, torch.as_tensor(films.batch(ids)), words) for t, words in tracks.items()}
    sample = [n for n, s in enumerate(listed) if s.split == "train"][:HABIT]
    train = Batch([ids[n] for n in sample], part["image+report"].films[sample], [texts[n] for n in sample])
    network.scoring = measured(network, [train])
    save_readings([r for t in TRACKS for r in read(network, part[t], t)], folder)
    pq.write_table(pa.table({"study_id": ids, "text": tracks["image-only"]}), folder / "generated.parquet")
    save_aggregation(folder / "vlm", network.scoring.how, network.scoring.mean, 4, 60)
    (folder / "20_prune.json").write_text(json.dumps({"schema": 1, "parameters": {"habit_studies": HABIT}}))
    return folder


@pytest.fixture(scope="module")
def data(run): return explored(run, HABIT)


@pytest.fixture(scope="module")
def page(data): return explorer_page(data)


@pytest.fixture(scope="module")
def opened_run(run): return open_explored(run)


def table(text, kind="<u2", shape=(-1, 144)):
    return np.frombuffer(base64.b64decode(text), kind).reshape(shape)


# numbers

def test_at_the_runs_own_k_the_patches_are_those_that_stage_20_recorded(run, data):
    recorded = {t: {r.study_id: r for r in load_readings(run, t)} for t in TRACKS}
    assert len(data["studies"]) >= 6 and data["methods"][data["own"]]["name"] == "activation, placed"
    for study in data["studies"]:
        for track, told in zip(TRACKS, study["tracks"]):
            kept = table(told["order"])[data["own"], : data["k"]]
            assert sorted(kept.tolist()) == recorded[track][study["id"]].patches.tolist()
            assert told["fell"][data["own"]] == recorded[track][study["id"]].fell_back


def test_the_recorded_order_is_what_the_network_says_when_it_is_asked_again(opened_run, data):
    opened = opened_run
    methods = methods_of("activation, placed", FINDINGS)
    opened = with_usual(opened, needs_of(methods), HABIT)
    studies = [s for s in studies_read(opened) if s.study_id in {x["id"] for x in data["studies"]}]
    found = gather(opened.network, batch_of(opened, studies, "image+report"), needs_of(methods))
    for n, name in enumerate(methods):
        maps = scorer(name)(found, opened.network.scoring)
        for k in (1, 4, 9, 144):
            mine = {s.study_id: kept for s, kept in zip(studies, top_k(maps, k).tolist())}
            for x in data["studies"]:
                assert sorted(table(x["tracks"][0]["order"])[n, :k].tolist()) == mine[x["id"]], (name, k)


def test_the_rates_of_the_whole_split_are_those_of_chapter_24(run, opened_run, data):
    opened = opened_run
    marked = {s.study_id: marks_of(opened, s) for s in studies_read(opened)}
    own = {r.study_id: r for r in load_readings(run, "image-only")}
    assert sum(r["studies"] for r in data["split"]) == sum(map(len, marked.values())) > 10
    for row in data["split"]:
        ids = [i for i, m in marked.items() if row["name"] in m]
        cover = np.stack([marked[i][row["name"]] for i in ids])
        hit, right = table(row["rates"][1]["described"], shape=(-1, 2, 144))[data["own"], :, data["k"] - 1] / 1e4
        kept = [own[i].patches for i in ids]
        assert (hit, right) == pytest.approx((hit_rate(kept, cover), precision(kept, cover)), abs=1e-4)
        chance = table(row["chance"], shape=(-1,)) / 1e4
        assert [chance[k - 1] for k in (1, 4, 50)] == pytest.approx(
            [random_hit_rate(cover, k) for k in (1, 4, 50)], abs=1e-4)
        assert row["on"] == pytest.approx(random_precision(cover))


def test_the_published_page_says_of_the_split_what_stages_40_and_52_say():
    text = (ROOT / "figures/explore.html").read_text(encoding="utf-8")
    shown = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    told = lambda stage: json.loads((ROOT / f"figures/records/{stage}.json").read_text())["metrics"]
    n, found = int(np.prod(shown["grid"])), told("52_relevance")["test, finding by finding"]
    assert EXPLORER_MARK in text and len(text.encode()) < MOST_BYTES and shown["phantoms"] is True
    assert shown["k"] == told("52_relevance")["kept patches"] and len(found) >= 5
    chances = told("40_classify")["retained patches on test"]
    for row in (r for r in shown["split"] if r["name"] in found):
        for t, track in enumerate(TRACKS):
            own = table(row["rates"][t]["described"], shape=(-1, 2, n))[shown["own"], :, shown["k"] - 1] / 1e4
            guide = found[row["name"]][track]["this run's guide"]
            assert list(own) == pytest.approx([guide["hit"][0], guide["precision"][0]], abs=1e-4), (row["name"], track)
        if row["name"] in chances:
            chance = table(row["chance"], shape=(-1,))[shown["k"] - 1] / 1e4
            assert chance == pytest.approx(chances[row["name"]]["random"]["hit rate"], abs=1e-4)
    assert {r["name"] for r in shown["split"]} >= {*found, *chances} and chances
    home = (ROOT / "nbs/index.ipynb").read_text(encoding="utf-8")
    assert len(shown["studies"]) == 16 and "has sixteen phantoms of the test split" in home


def test_the_bytes_at_the_runs_k_are_those_of_the_asset_that_stage_30_stores(run, opened_run, data):
    opened, checked = opened_run, 0
    for track in TRACKS:
        for r in load_readings(run, track):
            for x in (s for s in data["studies"] if s["id"] == r.study_id):
                asset = r.asset(opened.network.reader.vocabulary, "grounding", opened.made)
                told = table(x["tracks"][TRACKS.index(track)]["bytes"], "<u4")
                assert told[data["own"], data["k"] - 1] == len(asset.to_bytes())
                checked += 1
    assert checked == 2 * len(data["studies"])


def test_released_rows_are_those_of_chapter_16(opened_run, data):
    opened = opened_run
    study = next(s for s in studies_read(opened) if s.study_id == data["studies"][0]["id"])
    found = gather(opened.network, batch_of(opened, [study], "image+report"), ("report", "attention"))
    attention = found.cross[-1][0].mean(0)
    entry = table(data["studies"][0]["tracks"][0]["entry"], shape=(-1,))
    for k in (1, 4, 30, 144):
        assert np.flatnonzero(entry <= k).tolist() == np.unique(released_rows(attention, 100 * k / 144)).tolist()


def test_every_study_is_there_for_its_reason(opened_run, data):
    why, own = [s["why"] for s in data["studies"]], opened_run.readings["image+report"]
    met = {bool(hit_rate([own[s.study_id].patches], [c])) for s in studies_read(opened_run)
           for c in marks_of(opened_run, s).values()}
    assert {"hit", "miss"} & set(why) == {"hit" if m else "miss" for m in met} and met
    assert "normal" in why and len({s["id"] for s in data["studies"]}) == len(why)
    for s in data["studies"]:
        kept = set(table(s["tracks"][0]["order"])[data["own"], : data["k"]].tolist())
        if s["why"] in ("hit", "miss"): assert bool(kept & set(s["marks"][0]["on"])) == (s["why"] == "hit")
        if s["why"] == "report ignored": assert any(t["fell"][data["own"]] for t in s["tracks"])
        assert not (s["why"] == "normal" and s["marks"])
        assert not s["marks"] or s["marks"][0]["name"] == s["finding"]


# the page as text

class Whole(Tags):
    "A page with controls."
    EMPTY = Tags.EMPTY | {"input", "stop"}


def test_the_page_is_whole_small_and_refers_to_nothing(page):
    tags = Whole(page)
    assert len(page.encode()) < MOST_BYTES and EXPLORER_MARK in page
    assert "http" not in page.replace("http-equiv", "") and sum(tag == "script" for tag, _ in tags.seen) == 2
    for tag, attrs in tags.seen:
        assert not [n for n in attrs if n.startswith("on") or n in ("style", "srcset", "action")], (tag, attrs)
        assert re.match(r"data:", attrs.get("src", "data:")) and re.match(r"data:", attrs.get("href", "data:"))
    ids = [attrs["id"] for _, attrs in tags.seen if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert "In the order of the manifest" in tags.text and "not a diagnostic device" in tags.text


def test_real_films_are_told_apart_and_carry_no_id(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run.parent / "cohort", tmp_path / "cohort")
    shutil.rmtree(tmp_path / "cohort/truth")
    listed = Manifest.load(run / "manifest.csv")
    some = listed.of("train")[:4] + listed.of("test")[:6]
    bare = [replace(s, views=tuple(replace(v, masks=(), boxes=()) for v in s.views)) for s in some]
    for name in ("manifest.csv", "manifest.json"): (tmp_path / "run" / name).unlink()
    Manifest(bare, tmp_path / "cohort", listed.layout, listed.label_source).save(tmp_path / "run/manifest.csv")
    found = explored(tmp_path / "run", 4)
    text = explorer_page(found)
    assert not found["phantoms"] and "Not for publication" in text and not found["split"]
    assert not [s.study_id for s in listed if s.study_id in text]
    assert {s["why"] for s in found["studies"]} >= {"finding"}


def test_a_page_that_would_be_too_large_is_refused(data):
    word = ["x" * MOST_BYTES, "", 1, 0]
    first = data["studies"][0]
    long = {**first, "tracks": [{**t, "words": [word]} for t in first["tracks"]]}
    with pytest.raises(NeuralError, match="more than 1,500,000"): explorer_page({**data, "studies": [long]})


# the command

def explore(*words):
    from typer.testing import CliRunner
    from neural.cli import app
    said = CliRunner().invoke(app, ["explore", *map(str, words)])
    assert said.exit_code != 1 or said.stderr.count("\n") == 1, said.output
    return said


def test_the_command_writes_over_nothing_but_a_page_of_its_own(run, page, tmp_path):
    (tmp_path / "notes.html").write_text("<!doctype html><p>mine")
    for goal, reason in (("notes.html", "was not made by this command"), (run / "page.html", "lies inside")):
        for flag in ([], ["--force"]):
            said = explore(run, "-o", tmp_path / goal, *flag)
            assert said.exit_code == 1 and reason in said.stderr
    assert (tmp_path / "notes.html").read_text() == "<!doctype html><p>mine" and not (run / "page.html").exists()
    (tmp_path / "page.html").write_text(EXPLORER_MARK)
    assert "replace it with --force" in explore(run, "-o", tmp_path / "page.html").stderr
    said = explore(run, "-o", tmp_path / "page.html", "--force")
    assert said.exit_code == 0 and "test studies" in said.output
    assert (tmp_path / "page.html").read_text() == page, "the command and the function make the same page"


@pytest.mark.parametrize("lost", ["relevance.parquet", "generated.parquet", "manifest.csv", "vlm/relevance.json"])
def test_a_run_without_its_parts_is_refused_in_one_line(run, tmp_path, lost):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / lost).unlink()
    said = explore(tmp_path / "run", "-o", tmp_path / "page.html")
    assert said.exit_code == 1 and lost.rpartition("/")[2].partition(".")[0] in said.stderr
    assert "unexpected" not in said.stderr and not (tmp_path / "page.html").exists()


# a browser

@pytest.fixture
def opened(browser, page, tmp_path):
    "The page opened from disk, as a reader does."
    def show(address="", width=1300, **more):
        browser.show("<p>", width=width, **more)
        (tmp_path / "page.html").write_text(page, "utf-8")
        browser("Page.navigate", url=f"file://{tmp_path}/page.html{address}")
        ready = "new Promise(done => { const look = () => window.explorer ? done() : setTimeout(look, 20); look() })"
        if more.get("scripts", True): browser.ask(ready)
        return browser
    return show


STATE = "JSON.stringify(window.explorer.state)"
TEXT = "document.getElementById('{}').textContent"


def key(browser, name, code):
    for kind in ("keyDown", "keyUp"):
        browser("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)


def middle(browser, what):
    return browser.ask(f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
                       f" return [r.x + r.width / 2, r.y + r.height / 2] }})(document.querySelector('{what}'))")


def test_a_click_on_a_word_and_on_a_patch(opened, data):
    b, told = opened(), data["studies"][0]["tracks"][0]
    words = [w for w, *_ in told["words"]]
    assert b.ask("[...document.querySelectorAll('.word')].map(e => e.textContent)") == words
    at = next(n for n, w in enumerate(told["words"]) if w[1])
    row = table(told["looks"]["rows"], "u1")[at]
    b.point(f".word[data-w=\"{at}\"]", press=True)
    assert json.loads(b.ask(STATE))["word"] == at and f"word={at}" in b.ask("location.hash")
    b.point("h1")
    cells = b.ask("[...document.querySelectorAll('#cells rect')].map(e => +e.getAttribute('fill-opacity'))")
    assert cells == pytest.approx((0.65 * row / 255).tolist(), abs=1e-4)
    assert f"patch {int(row.argmax())} " in b.ask(TEXT.format("say")) and words[at] in b.ask(TEXT.format("heat"))
    p = int(row.argmax())
    b.point(f"#cells rect[data-p=\"{p}\"]", press=True)
    column = np.array(told["looks"]["top"]) * table(told["looks"]["rows"], "u1")[:, p]
    lit = b.ask("[...document.querySelectorAll('.word.lit')].map(e => +e.dataset.w)")
    assert lit == np.flatnonzero(column > 0.15 * column.max()).tolist() and int(column.argmax()) in lit
    b.key("Escape")
    b.point("h1")
    assert b.ask("document.querySelectorAll('.word.lit, .word.on').length") == 0


def test_dragging_the_slider_changes_the_numbers(opened, data):
    b, told = opened(), data["studies"][0]
    x, y = middle(b, "#k")
    before = b.ask(TEXT.format("bytes"))
    b("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button="left", clickCount=1)
    for step in range(1, 6):
        b("Input.dispatchMouseEvent", type="mouseMoved", x=x + 8 * step, y=y, button="left", buttons=1)
    b("Input.dispatchMouseEvent", type="mouseReleased", x=x + 40, y=y, button="left", clickCount=1)
    k = json.loads(b.ask(STATE))["k"]
    assert 74 < k < 110 and f"k={k}" in b.ask("location.hash")
    size = table(told["tracks"][0]["bytes"], "<u4")[data["own"], k - 1]
    assert b.ask(TEXT.format("bytes")) == f"{size:,}" != before
    on, order = set(told["marks"][0]["on"]), table(told["tracks"][0]["order"])[data["own"]]
    met = len(on & set(order[:k].tolist()))
    assert b.ask(TEXT.format("prec")) == f"{100 * met / k:.1f} % ({met} of {k})"
    chance = table(told["marks"][0]["chance"], shape=(-1,))[k - 1] / 100
    assert b.ask(TEXT.format("hitR")) == f"{chance:.1f} %"


def test_the_script_computes_what_the_library_does_at_every_k(opened, data):
    b = opened()
    found = b.ask("""(() => { const out = [], e = window.explorer, s = e.state;
        for (s.study = 0; s.study < 3; s.study++) for (s.track = 0; s.track < 2; s.track++)
        for (s.rule = 0; s.rule < 2; s.rule++) for (s.method = 0; s.method < 5; s.method++)
        for (s.k = 1; s.k <= 144; s.k += 11) {
          s.mark = 0; const r = e.rates(), known = [r.hit, r.precision, r.chance].map(x => x ?? null);
          out.push([s.study, s.track, s.rule, s.method, s.k, r.kept, ...known, e.whole()[0]]); }
        return out })()""")
    assert len(found) == 3 * 2 * 2 * 5 * 14
    for study, track, rule, method, k, kept, hit, right, chance, whole in found:
        told, row = data["studies"][study], data["split"][0]
        if rule: mine = np.flatnonzero(table(told["tracks"][track]["entry"], shape=(-1,)) <= k)
        else: mine = table(told["tracks"][track]["order"])[method, :k].astype(int)
        assert kept == mine.tolist()
        rates = row["rates"][track]
        expected = (table(rates["released"])[:, k - 1] if rule else
                    [*table(rates["described"], shape=(-1, 2, 144))[method, :, k - 1],
                     table(row["chance"], shape=(-1,))[k - 1], 1e4 * row["on"]])
        assert whole == pytest.approx((np.array(expected) / 1e4).tolist())
        if not told["marks"]:
            assert hit is None
            continue
        cover = np.zeros(144)
        cover[told["marks"][0]["on"]] = 1
        assert (hit, right) == (bool(hit_rate([mine], [cover])), pytest.approx(precision([mine], [cover])))
        assert chance == pytest.approx(random_hit_rate([cover], len(mine)), abs=1e-4)


def test_keys_move_the_slider_the_words_the_patches_and_the_studies(opened):
    b = opened()
    key(b, "ArrowRight", 39)
    key(b, "ArrowRight", 39)
    assert json.loads(b.ask(STATE))["k"] == 6
    b.ask("document.getElementById('k').focus()")
    key(b, "ArrowLeft", 37)
    assert json.loads(b.ask(STATE))["k"] == 5
    b.ask("document.querySelector('.word').focus()")
    key(b, "ArrowRight", 39)
    assert b.ask("document.activeElement.dataset.w") == "1"
    b.key("Enter")
    assert json.loads(b.ask(STATE))["word"] == 1
    b.ask("document.getElementById('film').focus()")
    key(b, "ArrowDown", 40)
    key(b, "ArrowDown", 40)
    assert json.loads(b.ask(STATE))["patch"] == 7 * 12 + 6 and "patch 90 (row 7, column 6)" in b.ask(TEXT.format("say"))
    b.ask("document.querySelector('.strip button').focus()")
    key(b, "ArrowRight", 39)
    assert (json.loads(b.ask(STATE))["study"], json.loads(b.ask(STATE))["patch"]) == (1, -1)
    b.ask("document.querySelector('input[name=rule]').focus()")
    key(b, "ArrowRight", 39)
    assert json.loads(b.ask(STATE))["rule"] == 1 and "A1" in b.ask(TEXT.format("badge"))


def test_a_finger_on_a_phone(opened):
    b = opened(width=390)
    b("Emulation.setTouchEmulationEnabled", enabled=True)
    for what, name, value in ((".word[data-w=\"2\"]", "word", 2), ("#cells rect[data-p=\"40\"]", "patch", 40)):
        x, y = middle(b, what)
        b("Input.dispatchTouchEvent", type="touchStart", touchPoints=[dict(x=x, y=y)])
        b("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        b.ask("new Promise(done => setTimeout(done, 60))")
        assert json.loads(b.ask(STATE))[name] == value
    b("Emulation.setTouchEmulationEnabled", enabled=False)


def test_the_address_holds_the_state(opened, data):
    b = opened("#study=2&k=20&rule=released&track=image-only&lesion=0")
    state = json.loads(b.ask(STATE))
    assert [state[n] for n in ("study", "k", "rule", "track", "lesion")] == [1, 20, 1, 1, 0]
    assert b.ask("document.getElementById('lesion').getAttribute('d')") == ""
    for wrong in ("#study=99&k=99999&method=nothing&word=8888&patch=x", "#study=0&k=0", "#%E0%A4%A", "#k=-3"):
        b.ask("new Promise(done => { addEventListener('hashchange', () => done(), {once: true});"
              f" location.hash = '{wrong}' }})")
        state = json.loads(b.ask(STATE))
        assert 0 <= state["study"] < len(data["studies"]) and 1 <= state["k"] <= 144 and state["word"] == -1


@pytest.mark.parametrize("width", [390, 1300])
def test_it_fits_asks_the_network_nothing_and_breaks_no_rule(opened, width):
    b = opened(width=width, dark=width == 390)
    for n in range(3): b.point(f".strip button:nth-child({n + 1})", press=True)
    assert b.ask("document.documentElement.scrollWidth") <= width
    sent = [e["params"]["request"]["url"] for e in b.events if e.get("method") == "Network.requestWillBeSent"]
    assert [u for u in sent if not u.startswith(("data:", "about:")) and "page.html" not in u] == []
    wrong = [e["params"] for e in b.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert wrong == [], "neither an error nor anything against the policy"


def test_without_scripts_it_is_a_still_picture_and_a_table(opened, data):
    b = opened(scripts=False)
    said, until = "", time.monotonic() + 20
    while "diagnostic device" not in said and time.monotonic() < until:      # the foot of the page is there
        nodes = b("Accessibility.getFullAXTree")["nodes"]
        said = " ".join(n["name"]["value"] for n in nodes if "value" in n.get("name", {}))
    first = data["studies"][0]["tracks"][0]["words"][0][0]
    for words in ("still picture", "All marked studies", "random, exact", first): assert words in said
