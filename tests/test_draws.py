"""Draws of cohort and seed: made as the stages make them, kept at once, summed up rightly, and shown by a page that
runs without them."""
import ast
import math
import re
from dataclasses import replace
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from neural import draws
from neural.cli import SMALL, how_drawn
from neural.draws import (FILM, GAP, HEAD, SIX, bench_draws, draw_file, draw_parts, draw_settings, draw_tables,
                          kept_draw, new_draw, prepare_cohort, taught_control, taught_head)
from neural.finetune import Recipe, recipe_of
from neural.pipeline import load_preset, stage_parameters
from neural.study import NeuralError, targets
from neural.yardstick import is_tables, read_tables, write_tables

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "nbs/paper"


@pytest.fixture(scope="module")
def settings():
    found = how_drawn(SMALL["draws"], True, cohorts="1", seeds="0", check="")["settings"]
    return found | {"studies": 80, "size": 64}


@pytest.fixture(scope="module")
def cohort(settings, tmp_path_factory):
    studies, films = prepare_cohort(tmp_path_factory.mktemp("cohort"), 5, settings, workers=0)
    return studies, films, draw_parts(studies, films, settings)


@pytest.fixture(scope="module")
def work(settings, tmp_path_factory):
    "Two finished draws, made one after another in this process."
    work = tmp_path_factory.mktemp("draws")
    bench_draws(settings, [1, 2], [0], work=work, workers=1, least=2)
    return work


# settings

def test_a_draw_has_the_settings_of_the_stages_and_the_cohort_of_the_makefile():
    found = how_drawn({}, False, cohorts="101,102,103", seeds="0,1,2", check="104")
    values, preset = found["settings"], load_preset("quickstart", PAPER)
    declared = {k: p.default for name in ("53_controls", "10_finetune")
                for k, p in stage_parameters(PAPER / f"{name}.ipynb").items()}
    declared |= vars(recipe_of(preset.get("recipe", declared["recipe"])))
    assert {k: values[k] for k in draws.TAUGHT} == {k: preset.get(k, declared[k]) for k in draws.TAUGHT}
    make = dict(re.findall(r"^(STUDIES|SIZE|TEST) \?= (\S+)$", (ROOT / "Makefile").read_text(), re.M))
    assert {k: float(values[k.lower()]) for k in make} == {k: float(v) for k, v in make.items()} and len(make) == 3
    assert (found["cohorts"], found["seeds"], found["check"], found["least"]) == ([101, 102, 103], [0, 1, 2], [104], 20)


@pytest.mark.parametrize(
    "change, said",
    [({"film_epochs": 0}, "film_epochs must be 1 or more"), ({"warm_epochs": 0}, "warm_epochs must be 1 or more"),
     ({"stem": "patch"}, "stem must not be 'patch'")],
)
def test_settings_that_teach_nothing_are_refused(settings, change, said):
    with pytest.raises(NeuralError, match=said): draw_settings(settings | change)


# as the stages do it

def source(stage, word):
    "The one code cell of a stage that holds a word."
    cells = [
        c.source for c in nbformat.read(PAPER / f"{stage}.ipynb", 4).cells if c.cell_type == "code" and word in c.source
    ]
    assert len(cells) == 1, word
    return cells[0]


def test_the_head_of_a_draw_is_that_of_stage_10(settings, cohort):
    "The stage's own lines, run here; where they change, chapter 37 must change with them."
    from neural import finetune, report, vlm
    studies, films, parts = cohort
    names = {k: p.default for k, p in stage_parameters(PAPER / "10_finetune.ipynb").items()} | {
        k: settings[k] for k in draws.TAUGHT if k != "film_epochs"}
    names["how"] = replace(Recipe(), **{k: settings[k] for k in draws.TAUGHT if k in vars(Recipe())})
    names |= (
        vars(vlm)
        | vars(finetune)
        | dict(seed=3, device="cpu", names=list(studies.label_names), train=parts["train"], validate=parts["validate"],
               tokenizer=report.train_tokenizer(parts["train"].texts, settings["vocab_size"]))
    )
    torch.manual_seed(3)
    exec(source("10_finetune", "ReportVLM(small_config("), names)
    warmed = next(
        s for s in ast.walk(ast.parse(source("10_finetune", "curve = warm_start("))) if isinstance(s, ast.If)).body
    exec(compile(ast.Module(warmed, []), "10_finetune", "exec"), names)
    mine = taught_head(parts, list(studies.label_names), settings, 3).state_dict()
    assert all(torch.equal(v, mine[k]) for k, v in names["model"].state_dict().items())


def test_the_control_of_a_draw_is_that_of_stage_53(settings, cohort):
    from neural import baseline, finetune, study
    studies, films, parts = cohort
    goals = list(studies.label_names)
    names = dict(studies=studies, ids={k: p.ids for k, p in parts.items()}, goals=goals, policy=settings["policy"],
                 device="cpu", bf16=settings["bf16"], coarse=settings["coarse"], np=np, targets=targets,
                 SPLITS=study.SPLITS, StudyDataset=finetune.StudyDataset, rare_weights=finetune.rare_weights,
                 train_film_cnn=baseline.train_film_cnn, read_films=baseline.read_films)
    exec(source("53_controls", "def film_job(").partition("def head_job")[0], names)
    theirs = names["film_job"](films, settings["film_epochs"], 2)["test"]
    assert np.array_equal(theirs, baseline.read_films(taught_control(parts, goals, settings, 2), parts["test"]))


# kept, gone on with, refused

def test_what_is_finished_is_kept_and_not_made_again(work, settings, monkeypatch):
    before = {p.name: p.read_bytes() for p in work.glob("*.json")}
    assert sorted(before) == ["1-0.json", "2-0.json"] and not list((work / "cohorts").iterdir())
    monkeypatch.setattr(draws, "one_draw", lambda *_: pytest.fail("a draw that was done is made again"))
    found = bench_draws(settings, [1, 2], [0], work=work, workers=1, least=2)
    assert found["summary"].draws.max() == 2 and {p.name: p.read_bytes() for p in work.glob("*.json")} == before
    assert (found["numbers"].groupby(["cohort", "seed"]).size() > 20).all() and found["numbers"].value.between(
        -1, 6).all()


def test_a_stop_loses_the_draw_that_is_being_made_and_no_other(work, settings, monkeypatch, tmp_path):
    (tmp_path / "1-0.json").write_bytes((work / "1-0.json").read_bytes())
    whole = draws.draw_numbers
    def stopped(*args, **kw):
        if len(list(tmp_path.glob("*.json"))) == 2: raise KeyboardInterrupt
        return whole(*args, **kw)
    monkeypatch.setattr(draws, "draw_numbers", stopped)
    kept = []
    with pytest.raises(KeyboardInterrupt):
        bench_draws(settings, [1], [0, 1, 2], work=tmp_path, workers=1, least=2, keep=kept.append)
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["1-0.json", "1-1.json"]
    # the record that is written meanwhile
    assert [len(t["numbers"][["cohort", "seed"]].drop_duplicates()) for t in kept] == [2] and kept[0]["settings"].seeds[
        0] == "0 1 2"


def test_draws_made_otherwise_are_refused_before_anything_is_made(work, settings, monkeypatch, tmp_path):
    monkeypatch.setattr(draws, "prepare_cohort", lambda *_, **__: pytest.fail("work began"))
    for change, said in (({"warm_epochs": 2}, "warm_epochs 1 there, 2 here"),
                         ({"studies": 81}, "studies 80 there, 81 here")):
        with pytest.raises(
            NeuralError, match=f"^1-0.json: was made otherwise .{said}.; make it again with --force, [^\n]*$"):
            bench_draws(settings | change, [1, 9], [0], work=work, least=2)
    with pytest.raises(NeuralError, match="least 2 there, 20 here"): bench_draws(settings, [1], [0], work=work)
    monkeypatch.setattr(draws, "code_name", lambda: "another")
    with pytest.raises(NeuralError, match="by other code"): bench_draws(settings, [1], [0], work=work, least=2)
    assert kept_draw(work, 1, 0, settings | {"least": 2}, force=True) is None


@pytest.mark.parametrize("held", ["", "{", "[]", '{"cohort": 1}', "\x00"])
def test_what_is_no_draw_is_told_in_a_line_and_left(settings, tmp_path, held):
    path = draw_file(tmp_path, 1, 0)
    path.write_text(held)
    for force in (False, True):
        with pytest.raises(NeuralError, match="^1-0.json: [^\n]+$"):
            bench_draws(settings, [1], [0], work=tmp_path, force=force)
    assert path.read_text() == held


# sums

def made_up(cohort, seed, value, what=HEAD, finding="mean", half=0.02):
    return dict(cohort=cohort, seed=seed, settings={}, code="", seconds={"label head": 1.0},
                numbers=[[what, finding, value, value - half, value + half]])


def test_the_spreads_of_planted_draws_are_found():
    rng, k, seeds = np.random.default_rng(5), 4000, 3
    rows = pd.DataFrame(
        [(c, s, m + 0.003 * rng.normal()) for c, m in enumerate(0.9 + 0.01 * rng.normal(size=k)) for s in range(seeds)],
        columns=["cohort", "seed", "value"])
    found = new_draw(rows)
    assert found["SD over seeds"] == pytest.approx(0.003, rel=0.05)
    # of cohort means
    assert found["SD over cohorts"] == pytest.approx(math.hypot(0.01, 0.003 / math.sqrt(seeds)), rel=0.05)
    # of one training on one cohort
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 * math.hypot(0.01, 0.003), rel=0.05)


def test_cohorts_of_unequal_numbers_of_seeds_count_alike():
    found = new_draw(
        pd.DataFrame([(1, 0, 0.8), (1, 1, 0.8), (1, 2, 0.8), (2, 0, 0.9)], columns=["cohort", "seed", "value"]))
    assert (found["mean"] == pytest.approx(0.85) and found["SD over seeds"] == pytest.approx(0, abs=1e-12)
            and found["draws"] == 4)
    alone = new_draw(pd.DataFrame([(1, 0, 0.8), (1, 1, 0.9)], columns=["cohort", "seed", "value"]))
    assert (math.isnan(alone["low"]) and math.isnan(alone["SD over cohorts"])
            and alone["SD over seeds"] == pytest.approx(0.0707, abs=1e-3))


def test_a_cohort_that_checks_takes_no_part_in_what_it_checks():
    some = [made_up(c, s, 0.9 + 0.001 * c + 0.0005 * s) for c in (1, 2, 3) for s in (0, 1)]
    alone, held = draw_tables(some), draw_tables([*some, made_up(4, 0, 0.902), made_up(4, 1, 0.95)], [4])
    assert (alone["summary"].equals(held["summary"]) and list(held["check"].inside) == [True, False]
            and not len(alone["check"]))
    wide = draw_tables([made_up(1, 0, 0.99), made_up(2, 0, 0.6), made_up(3, 0, -0.9, GAP), made_up(4, 0, 0.9, GAP)])[
        "summary"].set_index("what")
    # no AUC lies beyond
    assert (wide.low[HEAD], wide.high[HEAD], wide.low[GAP], wide.high[GAP]) == (0, 1, -1, 1)


def test_an_interval_over_patients_stands_for_studies_of_one_patient():
    rng = np.random.default_rng(1)
    y = (rng.random((240, 1)) < 0.4).astype(float)
    p = {"label head": y + rng.normal(size=y.shape), "raw-film control": y + rng.normal(size=y.shape)}
    twice = lambda a: np.repeat(a, 2, 0)
    once, same, apart = (
        draws.auc_numbers(a, q, ["Pneumonia"], who)
        for a, q, who in ((y, p, range(240)),
                          (twice(y), {k: twice(v) for k, v in p.items()}, np.repeat(range(240), 2)),
                          (twice(y), {k: twice(v) for k, v in p.items()}, range(480)))
    )
    width = lambda rows: rows[0][4] - rows[0][3]
    assert (once[0][2] == pytest.approx(same[0][2]) and width(same) == pytest.approx(width(once), rel=1e-6)
            and width(apart) < 0.85 * width(once))


# the page

def shown(folder):
    "The page of draws, executed on a folder of tables: its text and its pictures."
    nb = nbformat.read(PAPER / "draws.ipynb", 4)
    cell = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = f"figures = {str(folder)!r}"
    nbclient.NotebookClient(
        nb, kernel_name="python3", timeout=120, resources={"metadata": {"path": str(PAPER)}}).execute()
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    return "".join(o.get("text", "") if o.output_type == "stream" else "".join(o.get("data", {}).get("text/plain", ""))
                   for o in outputs), sum("image/png" in o.get("data", {}) for o in outputs)


def test_without_a_record_the_page_says_so(tmp_path):
    text, pictures = shown(tmp_path)
    assert text.count("not measured: no table of `neural bench draws` is published here") >= 5


def test_the_page_answers_from_the_record_and_says_what_is_missing(tmp_path):
    numbers = (
        lambda c, s: [
            [w, n, 0.9002 + 0.002 * c + 0.001 * s - d, 0.85, 0.95]
            for w, d in ((HEAD, 0), (FILM, 0.01), ("AUC on train, label head", -0.02),
                         ("AUC on train, raw-film control", -0.01))
            for n in (*SIX, "mean")
        ]
        + [[GAP, "mean", 0.01 + 0.001 * c, -0.01, 0.03], ["findings in the mean", "mean", 6.0, None, None]]
        + [[f"{r}, {w}", "Pneumonia", 0.5 + 0.01 * c, 0.4, 0.6] for r in ("hit rate", "precision")
           for w in ("patch logits", "patch logits less usual", "centre prior", "random")]
    )
    some = [
        made_up(c, s, 0) | {"numbers": numbers(c, s), "settings": {"studies": 1800}} for c in (1, 2, 3) for s in (0, 1)]
    asked = dict(cohorts="1 2 3", seeds="0 1", check="4")
    write_tables(tmp_path / "draws.json", "neural bench draws",
                 draw_tables([*some, made_up(4, 0, 0) | {"numbers": numbers(4, 0)}], [4], asked))
    text, pictures = shown(tmp_path)
    assert is_tables(tmp_path / "draws.json") and pictures == 1 and "not measured" not in text
    assert ("7 draws: 3 cohorts of 1800 studies with 2 training seeds each, and 1 to check them." in text
            and "The record is not complete: of 8 draws that were asked for, 1 not made yet." in text)
    mean = new_draw(
        pd.DataFrame([(c, s, 0.9002 + 0.002 * c + 0.001 * s) for c in (1, 2, 3) for s in (0, 1)],
                     columns=["cohort", "seed", "value"])
    )
    assert (
        f"Label head, mean AUC of 6 findings: {mean['mean']:.3f} (SD 0.002 over cohorts, 0.001 over seeds; patients of"
        f" one test split ±0.050); a new draw is expected between {mean['low']:.3f} and {mean['high']:.3f}." in text)
    assert re.search(r"Cohort 4, drawn to check: \d+ of 37 numbers fall inside", text)


def test_home_says_of_draws_what_the_record_says():
    "Mean, spreads and interval of a new draw on the home page are those of the published record."
    _, tables = read_tables(ROOT / "figures/bench/draws.json")
    summary = tables["summary"].set_index(["what", "finding"])
    head, film = (summary.loc[(what, "mean")] for what in (HEAD, FILM))
    text = (ROOT / "README.md").read_text()
    said = (
        f"mean of six findings, was {head['mean']:.3f} (SD {head['SD over cohorts']:.3f} over cohorts,"
        f" {head['SD over seeds']:.3f} over seeds); a new cohort and training is expected between {head['low']:.3f} and"
        f" {head['high']:.3f}, where the patients of one test split alone say ±{head['patient half-width']:.3f}. The"
        f" raw-film network: {film['mean']:.3f}, between {film['low']:.3f} and {film['high']:.3f}")
    assert said in text
    assert (tables["settings"].cohorts[0], tables["settings"].seeds[0]) == ("101 102 103", "0 1 2")
