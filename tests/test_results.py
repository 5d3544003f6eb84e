"Results: planted numbers, two estimands, paired draws, refusals, costs by hand, and cards that gather themselves."
import warnings
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from neural.evaluate import ENSEMBLE, HEADLINE, auc, auc_difference, auc_interval, auprc, brier, ece, seed_summary
from neural.results import (
    CARD, MACRO, PREDICTIONS, SPREAD, SYSTEM, WORST, Costs, Resampling, System, as_card, as_predictions, card_markdown,
    collect_cards, count_macs, count_parameters, differences, model_bytes, open_predictions, predicted, read_card,
    report_card, weighted_auprc, weighted_brier, weighted_ece, wide_card, write_card, write_predictions,
)
from neural.study import LABELS, Manifest, NeuralError, Study, View

TYPED = System("typed graph classifier", "40_classify", "image+report", "described", k=4, codec="int8")
FILM = System("raw-film network", "53_controls", "image-only")
FEW = Resampling(samples=200)


def table_of(scores, y, patients=None, targets=("Pneumonia",), split="test"):
    "Predictions from arrays: system -> (targets, seeds, n); y is (targets, n)."
    n = np.shape(y)[-1]
    ids = [f"s{i:04d}" for i in range(n)]
    who = dict(zip(ids, patients if patients is not None else [f"p{i}" for i in range(n)]))
    one = lambda system, t, s: predicted(system, s, split, targets[t], ids, who, y[t], scores[system][t][s])
    return pd.concat(
        [one(system, t, s) for system, p in scores.items() for t in range(len(p)) for s in range(len(p[t]))],
        ignore_index=True)


def noisy(rng, n=150, targets=2, seeds=3, effect=1.0):
    "Labels (targets, n), scores of two systems (targets, seeds, n), patients of two studies each."
    y = np.array([(np.arange(n) // 2 + t) % 3 == 0 for t in range(targets)]).astype(float)
    sure = lambda noise: 1 / (
        1 + np.exp(-(effect * (2 * y[:, None] - 1) + noise * rng.normal(size=(targets, seeds, n)))))
    return y, {TYPED: sure(1.5), FILM: sure(1.0)}, [f"p{i // 2}" for i in range(n)]


def row(card, metric, target="Pneumonia", system=TYPED):
    "Value and interval of one row."
    part = card[
        (card.metric == metric) & (card.target == target) & (card.system == system.system) & (card.joined != "one seed")
    ]
    assert len(part) == 1
    return part.iloc[0][["value", "low", "high"]].astype(float).tolist()


# estimands

def test_planted_aucs_are_exact():
    y = np.tile([1, 1, 0, 0], 10)[None].astype(float)
    p = {TYPED: np.tile([[.9, .3, .6, .1]], 10)[None], FILM: np.tile([[.9, .8, .2, .1]], 10)[None]}
    card = report_card(table_of(p, y), resampling=FEW)
    assert row(card, HEADLINE)[0] == row(card, ENSEMBLE)[0] == row(card, MACRO, "all targets")[0] == .75
    value, low, high = row(card, HEADLINE, system=FILM)
    # a perfect ranking keeps an honest lower end
    assert (value, high) == (1, 1) and low == pytest.approx(.025 ** (1 / 20))
    assert row(card, MACRO, "all targets", FILM) == [value, low, high]


def test_the_two_estimands_differ_where_seeds_disagree_and_only_there():
    y = np.tile([1, 1, 0, 0], 10)[None].astype(float)
    apart = np.array([np.tile([.9, .3, .6, .1], 10), np.tile([.3, .9, .1, .6], 10)])[None]
    card = report_card(table_of({TYPED: apart}, y), resampling=FEW)
    assert row(card, HEADLINE)[0] == .75 and row(card, ENSEMBLE)[0] == 1
    assert row(card, SPREAD)[0] == 0 and np.isnan(row(card, SPREAD)[1])
    alike = report_card(table_of({TYPED: apart[:, [0, 0]]}, y), resampling=FEW)
    assert row(alike, HEADLINE) == row(alike, ENSEMBLE)
    single = report_card(table_of({TYPED: apart[:, :1]}, y), resampling=FEW)
    assert row(single, HEADLINE) == row(single, ENSEMBLE) and SPREAD not in set(single.metric)


def test_numbers_are_those_of_chapter_24():
    y, scores, who = noisy(np.random.default_rng(0))
    card = report_card(table_of(scores, y, who, ("Pneumonia", "Edema")), resampling=Resampling(samples=300, seed=4))
    for t, target in enumerate(("Pneumonia", "Edema")):
        for system, p in scores.items():
            s = seed_summary(y[t], p[t], who, samples=300, seed=4)
            assert row(card, HEADLINE, target, system) == pytest.approx([s["auc"], s["low"], s["high"]], abs=1e-12)
            assert row(card, ENSEMBLE, target, system) == pytest.approx(
                [s["ensemble"], s["ensemble_low"], s["ensemble_high"]], abs=1e-12)
            assert row(card, SPREAD, target, system)[0] == pytest.approx(s["seed_sd"])
            for name, metric in (("AUPRC", auprc), ("Brier", brier), ("ECE", ece)):
                value, low, high = row(card, name, target, system)
                assert value == pytest.approx(np.mean([metric(y[t], one) for one in p[t]])) and low < high
    assert set(card.studies) == {150} and set(card.positives.dropna()) == set(y.sum(1).astype(int))


def test_an_unknown_label_is_left_out_and_never_no():
    y, scores, who = noisy(np.random.default_rng(1), targets=1)
    y[0, ::5] = np.nan
    card, seen = report_card(table_of(scores, y, who), resampling=FEW), ~np.isnan(y[0])
    assert row(card, HEADLINE)[0] == pytest.approx(np.mean([auc(y[0, seen], p[seen]) for p in scores[TYPED][0]]))
    assert card[card.metric == HEADLINE].studies.tolist() == [seen.sum()] * 2


def test_macro_and_worst_by_hand():
    y = np.tile([1, 1, 0, 0], 10).astype(float)
    wrong, half, right = (np.tile(p, 10) for p in ([.1, .2, .8, .9], [.9, .3, .6, .1], [.9, .8, .2, .1]))
    p, names = {TYPED: [[right], [half], [wrong]]}, ("Pneumonia", "Edema", "Fracture")
    table = table_of(p, np.stack([y] * 3), targets=names)
    less = table_of({FILM: p[TYPED][:2]}, np.stack([y] * 2), targets=names[:2])
    card = report_card(pd.concat([table, less]), groups={"all": names, "two": names[:2]}, resampling=FEW)
    assert row(card, MACRO, "all")[0] == pytest.approx((1 + .75 + 0) / 3) and row(card, WORST, "all")[0] == 0
    assert row(card, MACRO, "two")[0] == .875 and row(card, WORST, "two")[0] == .75
    # a mean over fewer findings is another quantity
    assert np.isnan(row(card, MACRO, "all", FILM)).all()
    assert row(card, MACRO, "two", FILM) == row(card, MACRO, "two")
    gap = row(
        differences(pd.concat([table, less]), [(TYPED, FILM)], groups={"all": names, "two": names[:2]}, resampling=FEW),
        f"difference of {MACRO}", "two")
    assert gap == [0, 0, 0]
    for groups, said in (({"all": []}, "is empty"), ({"all": ["Nodule"]}, "nobody predicts 'Nodule'"),
                         ({"Pneumonia": names}, "called as a target")):
        with pytest.raises(NeuralError, match=said): report_card(table, groups=groups)
    assert set(report_card(table, by=(), resampling=FEW).metric) == {MACRO, WORST}


def test_a_macro_interval_knows_that_findings_share_patients():
    y, scores, who = noisy(np.random.default_rng(2), targets=1)
    twice = {TYPED: np.repeat(scores[TYPED], 2, axis=0)}
    card = report_card(table_of(twice, np.repeat(y, 2, axis=0), who, ("Pneumonia", "Edema")), resampling=FEW)
    assert row(card, MACRO, "all targets") == pytest.approx(row(card, HEADLINE))       # not narrower by the root of two


def test_seeds_on_their_own():
    y, scores, who = noisy(np.random.default_rng(3))
    card = report_card(table_of(scores, y, who, ("Pneumonia", "Edema")), by=("target", "seed"), resampling=FEW)
    each = card[(card.joined == "one seed") & (card.metric == HEADLINE) & (card.target == "Edema")
                & (card.system == FILM.system)]
    assert each.seeds.tolist() == ["0", "1", "2"] and each.value.tolist() == pytest.approx(
        [auc(y[1], p) for p in scores[FILM][1]])
    one = auc_interval(y[1], scores[FILM][1][2], who, samples=200)
    assert each.iloc[2][["value", "low", "high"]].tolist() == pytest.approx(one, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_weighted_metrics_agree_with_scikit_learn_and_with_repeated_studies(seed):
    rng = np.random.default_rng(seed)
    y, p, w = rng.integers(0, 2, 50), rng.integers(0, 9, 50) / 8, rng.integers(0, 3, (20, 50)).astype(float)
    assert weighted_auprc(y, p, w) == pytest.approx([average_precision_score(y, p, sample_weight=v) for v in w])
    for plain, many in ((auprc, weighted_auprc), (brier, weighted_brier), (ece, weighted_ece)):
        drawn = [np.repeat(np.arange(50), v.astype(int)) for v in w]
        assert many(y, p, w) == pytest.approx([plain(y[i], p[i]) for i in drawn])
    assert np.isnan(weighted_auprc([1, 0], [.9, .1], np.array([[0., 1.]]))).all()


# differences

def test_a_difference_is_paired_and_of_the_same_estimand():
    y, scores, who = noisy(np.random.default_rng(5))
    table = table_of(scores, y, who, ("Pneumonia", "Edema"))
    card = report_card(table, against={"system": FILM.system}, resampling=FEW)
    gap = auc_difference(y[0], scores[TYPED][0], scores[FILM][0], who, samples=200)
    assert row(card, "difference of AUC") == pytest.approx(gap, abs=1e-12)
    averaged = auc_difference(y[0], scores[TYPED][0].mean(0), scores[FILM][0].mean(0), who, samples=200)
    assert row(card, f"difference of {ENSEMBLE}") == pytest.approx(averaged, abs=1e-12)
    values = report_card(table, resampling=FEW)
    for metric, target in ((MACRO, "all targets"), (WORST, "all targets"), ("Brier", "Edema")):
        assert row(card, f"difference of {metric}", target)[0] == pytest.approx(
            row(values, metric, target)[0] - row(values, metric, target, FILM)[0])
    assert set(card.system) == {TYPED.system} and set(card.against) == {FILM.label}
    back = differences(table, [(FILM, TYPED)], resampling=FEW)
    d, low, high = row(card, f"difference of {MACRO}", "all targets")
    assert row(back, f"difference of {MACRO}", "all targets", FILM) == pytest.approx([-d, -high, -low])


def test_seed_by_seed_differences_are_those_of_each_pair():
    y, scores, who = noisy(np.random.default_rng(6), targets=1)
    card = differences(table_of(scores, y, who), [(FILM, TYPED)], by=("target", "seed"), resampling=FEW)
    each = card[(card.joined == "one seed") & (card.metric == "difference of AUC")].value
    gaps = np.array([auc(y[0], a) - auc(y[0], b) for a, b in zip(scores[FILM][0], scores[TYPED][0])])
    assert sorted(each) == pytest.approx(sorted(gaps)) and each.std(ddof=1) == pytest.approx(gaps.std(ddof=1))


def test_nothing_differs_from_itself():
    y, scores, who = noisy(np.random.default_rng(7))
    card = differences(
        table_of(scores, y, who, ("Pneumonia", "Edema")), [(TYPED, TYPED)], by=("target", "seed"), resampling=FEW)
    assert (card[["value", "low", "high"]] == 0).all(axis=None) and len(card) > 20


def test_the_counterpart_agrees_in_everything_else():
    y, scores, who = noisy(np.random.default_rng(8), targets=1, seeds=1)
    systems = [replace(TYPED, selection=how, k=k) for how in ("described", "random") for k in (4, 10)]
    table = table_of({s: scores[TYPED] * (1 - .01 * i) for i, s in enumerate(systems)}, y, who)
    card = report_card(table, against={"selection": "random"}, resampling=FEW)
    pairs = card[card.metric == "difference of AUC"][["k", "against"]].values.tolist()
    assert pairs == [[4, systems[2].label], [10, systems[3].label]]
    with pytest.raises(NeuralError, match="no counterpart that differs in selection alone"):
        report_card(
            pd.concat([table, table_of({FILM: scores[FILM]}, y, who)]), against={"selection": "random"}, resampling=FEW)


def test_a_rule_without_seeds_meets_every_seed():
    y, scores, who = noisy(np.random.default_rng(9), targets=1)
    scores[FILM] = scores[FILM][:, :1]
    table = table_of(scores, y, who)
    gap = auc_difference(y[0], scores[TYPED][0], scores[FILM][0], who, samples=200)
    assert row(differences(table, [(TYPED, FILM)], resampling=FEW), "difference of AUC") == pytest.approx(
        gap, abs=1e-12)
    with pytest.raises(NeuralError, match="by seed they need the same"):
        differences(table, [(TYPED, FILM)], by=("seed",), resampling=FEW)


# order, company, blocks

def test_neither_order_nor_company_changes_a_row():
    y, scores, who = noisy(np.random.default_rng(10))
    table = table_of(scores, y, who, ("Pneumonia", "Edema"))
    card = report_card(table, resampling=FEW)
    pd.testing.assert_frame_equal(card, report_card(table.sample(frac=1, random_state=3), resampling=FEW))
    alone = report_card(table[table.system == FILM.system], resampling=FEW)
    pd.testing.assert_frame_equal(alone, card[card.system == FILM.system].reset_index(drop=True))
    # another system met fewer studies
    fewer = table[(table.system != TYPED.system) | (table.study_id < "s0100")]
    pd.testing.assert_frame_equal(
        alone, report_card(fewer, resampling=FEW).query("system == @FILM.system").reset_index(drop=True))


def test_rows_follow_stage_split_finding_and_system():
    y, scores, who = noisy(np.random.default_rng(11))
    many = {replace(TYPED, k=k, stage=stage): scores[TYPED] for k in (40, 4) for stage in ("100_later", "53_controls")}
    card = report_card(table_of(many, y, who, ("Pneumonia", "Edema")), resampling=FEW)
    assert list(dict.fromkeys(card.stage)) == ["53_controls", "100_later"]                # by number, not by letter
    first = card[(card.stage == "53_controls") & (card.metric.isin((HEADLINE, MACRO)))]
    findings = sorted(("Pneumonia", "Edema"), key=LABELS.index)
    assert list(zip(first.target, first.k)) == [(t, k) for t in (*findings, "all targets") for k in (4, 40)]


def test_splits_are_judged_apart():
    y, scores, who = noisy(np.random.default_rng(12), targets=1)
    away = table_of({FILM: scores[FILM]}, 1 - y, [f"x{w}" for w in who], split="external").assign(
        study_id=lambda t: "x" + t.study_id)
    table = pd.concat([table_of(scores, y, who), away])
    there = report_card(table, split="external", resampling=FEW)
    assert set(there.split) == {"external"} and row(there, HEADLINE, system=FILM)[0] < .5
    with pytest.raises(NeuralError, match="no prediction on train"): report_card(table, split="train")
    with pytest.raises(NeuralError, match="split 'elsewhere' is not known"): report_card(table, split="elsewhere")


# refusals

def small(**columns):
    "Four good predictions, some columns changed."
    ids = ["a", "b", "c", "d"]
    return predicted(
        TYPED, 0, "test", "Pneumonia", ids, dict(zip(ids, "wxyz")), [1, 0, 1, 0], [0.9, 0.1, 0.8, 0.2]
    ).assign(**columns)


@pytest.mark.parametrize(
    "table, said",
    [(small(p=[0.9, 1.1, 0.8, 0.2]), "1 of 4 predictions have a p"), (small(p=[0.9, None, 0.8, 0.2]), "have a p"),
     (small(y=[1, 0, 2, 0]), "neither 0 nor 1"), (small(split="tset"), "4 of 4 predictions name another split"),
     (small(study_id="a", patient_id="w", y=1.0), "3 of 4 predictions repeat"),
     (small(study_id=["a", "", "c", "d"]), "lack a study"), (small(target=None), "lack a study"),
     (small(k=0), "k must be 1 or more"), (small(k=2.5), "column k is no Int64"),
     (small(track="both"), "track 'both'"), (small(stage="classify"), "stage 'classify'"),
     (small(system="asset, k = 4"), "carries 'k = 4'"), (small(selection="10 patches"), "carries '10 patches'"),
     (small(condition="seed 3"), "carries 'seed 3'"), (small(system="a\nb"), "plain words"),
     (small(variant="both"), "unknown column 'variant'"),
     (small().drop(columns="patient_id"), "without the column patient_id"), (small().head(0), "without a row"),
     (pd.concat([small(), small(seed=1, y=[0, 0, 1, 0])]), "1 of 5 labels of studies disagree"),
     (pd.concat([small(), small(seed=1, y=[None, 0, 1, 0])]), "labels of studies disagree"),
     (pd.concat([small(), small(seed=1, patient_id="w")]), "3 of 7 studies have two patients"),
     (pd.concat([small(), small(seed=1, split="validate")]), "in two splits"),
     (small(patient_id="w", split=["test", "train", "test", "test"]), "1 of 2 patients are in two splits")],
)
def test_what_does_not_fit_is_refused_in_one_line(table, said):
    for take in (as_predictions, report_card):
        with pytest.raises(NeuralError, match=said) as e: take(table)
        assert "\n" not in str(e.value)


def test_a_patient_may_be_known_here_and_elsewhere():
    table = pd.concat([small(), small(split="external", study_id=["e", "f", "g", "h"])])
    # another hospital counts its patients anew
    assert len(as_predictions(table)) == 8


def test_too_few_patients_and_uneven_seeds_are_named():
    y, scores, who = noisy(np.random.default_rng(13), n=24)
    table = table_of(scores, y, who, ("Pneumonia", "Edema"))
    with pytest.raises(NeuralError, match="typed graph classifier.*from 4 patients"): report_card(table, resampling=FEW)
    assert len(report_card(table, resampling=Resampling(samples=50, least=3)))
    uneven = table.drop(index=table.index[(table.system == FILM.system) & (table.seed == 2)][0])
    with pytest.raises(NeuralError, match="raw-film network.*met different studies"):
        report_card(uneven, resampling=Resampling(samples=50, least=3))
    with pytest.raises(NeuralError, match="costs of film"):
        report_card(table, {System("film", "40_x", "image-only"): Costs()}, resampling=Resampling(50, 0, 3))


# on disk

def manifest_of(table, **changes):
    "A manifest to which a table belongs."
    one = table.drop_duplicates("study_id").assign(**changes)
    study = lambda r: Study(
        r.study_id, r.patient_id, r.split, (View(f"{r.study_id}.png", "frontal"),), labels={"Pneumonia": r.y})
    return Manifest([study(r) for r in one.itertuples()])


def test_predictions_come_back_as_they_went(tmp_path):
    y, scores, who = noisy(np.random.default_rng(14), targets=1)
    table = table_of(scores, y, who).sample(frac=1, random_state=0)
    written = write_predictions(tmp_path / "predictions_40_classify.parquet", table)
    read = open_predictions(tmp_path / "predictions_40_classify.parquet", manifest_of(table))
    pd.testing.assert_frame_equal(read, written, check_exact=True)
    assert list(read.dtypes.astype(str)) == list(PREDICTIONS.values()) and [p.name for p in tmp_path.iterdir()] == [
        "predictions_40_classify.parquet"]


def test_predictions_are_held_against_their_manifest(tmp_path):
    path = tmp_path / "p.parquet"
    write_predictions(path, small())
    for change, said in ((dict(split="train"), "another split"), (dict(y=1.0), "another target"),
                         (dict(patient_id="q"), "another patient"),
                         (dict(study_id=["a", "b", "c", "e"]), "does not know")):
        with pytest.raises(NeuralError, match=said): open_predictions(path, manifest_of(small(), **change))
    small(p=7.).to_parquet(tmp_path / "wrong.parquet")
    with pytest.raises(NeuralError, match="have a p"): open_predictions(tmp_path / "wrong.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(NeuralError, match="no readable Parquet"): open_predictions(tmp_path / "torn.parquet")
    with pytest.raises(NeuralError, match="holds something else"): write_predictions(tmp_path / "torn.parquet", small())
    with pytest.raises(NeuralError, match="lack a study"): write_predictions(path, small(target=""))
    # a refused table leaves the old one
    assert len(open_predictions(path)) == 4


@pytest.mark.parametrize(
    "name, moved",
    [
        ("visual, described, k = 10", dict(system="visual, described", k=10)),
        ("thumbnail, avif, read by the label head", dict(system="thumbnail, read by the label head", codec="avif")),
        ("thumbnail, 500 bytes, read by the label head", dict(system="thumbnail, read by the label head", budget=500)),
        ("label head, all 144", dict(system="label head, all 144")),
        ("thumbnail, 500 bytes + mosaic, 2000 bytes",
         dict(system="thumbnail + mosaic", budget=2500, condition="500 + 2000")),
        ("thumbnail, 250 bytes + asset, k = 4", dict(system="thumbnail + asset", k=4, budget=250)),
    ],
)
def test_older_tables_open_with_a_note(tmp_path, name, moved):
    older = small().drop(columns=["patient_id", *SYSTEM]).assign(track="image-only", variant=name)
    older.to_parquet(tmp_path / "predictions_57_rate.parquet")
    with pytest.warns(UserWarning, match="older predictions"):
        table = open_predictions(tmp_path / "predictions_57_rate.parquet", manifest_of(small()))
    (found,) = {System(**dict(zip(SYSTEM, v))) for v in table[list(SYSTEM)].itertuples(index=False)}
    assert found == System(
        **{"stage": "57_rate", "track": "image-only", **moved}) and table.patient_id.tolist() == list("wxyz")
    older.to_parquet(tmp_path / "some.parquet")
    with pytest.raises(NeuralError, match="tells no stage"):
        open_predictions(tmp_path / "some.parquet", manifest_of(small()))
    with pytest.raises(NeuralError, match="open it with its manifest"):
        open_predictions(tmp_path / "some.parquet", stage="57_rate")


def test_predictions_of_elsewhere_are_external(tmp_path):
    older = (
        small(split="elsewhere").drop(columns=["patient_id", *SYSTEM]).assign(track="image-only", variant="gcn both"))
    older.to_parquet(tmp_path / "elsewhere_56_tasks.parquet")
    with pytest.warns(UserWarning):
        table = open_predictions(tmp_path / "elsewhere_56_tasks.parquet", manifest_of(small()))
    assert set(table.split) == {"external"} and set(table.stage) == {"56_tasks"}


# cards

def cards():
    "One card of two stages, with costs."
    y, scores, who = noisy(np.random.default_rng(15))
    costs = {TYPED: Costs(bytes_study=1311.7, bytes_model=96_000, parameters=24_000, macs=10**12, latency_ms=0.1),
             FILM: Costs(bytes_study=16_166)}
    return report_card(table_of(scores, y, who, ("Pneumonia", "Edema")), costs,
                       command='neural run 40-53 --run "my runs/a|b, c"', resampling=FEW)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_card_comes_back_as_it_went(tmp_path, kind):
    written = write_card(tmp_path / f"40_classify_card.{kind}", cards())
    pd.testing.assert_frame_equal(read_card(tmp_path / f"40_classify_card.{kind}"), written, check_exact=True)
    assert list(written.dtypes.astype(str)) == list(CARD.values())


def test_costs_stand_in_every_row_of_their_system():
    card = cards()
    assert (
        set(card[card.system == TYPED.system].macs) == {10**12} and card[card.system == FILM.system].macs.isna().all())
    assert set(card.bytes_study) == {1311.7, 16166}
    with pytest.raises(NeuralError, match="macs must be 0 or more"): Costs(macs=-5)


def test_a_new_stage_appears_by_itself(tmp_path):
    card = cards()
    (tmp_path / "tables").mkdir()
    write_card(tmp_path / "tables" / "53_controls_card.csv", card[card.stage == "53_controls"])
    write_card(tmp_path / "40_classify_card.parquet", card[card.stage == "40_classify"])
    before = collect_cards(tmp_path)
    new = dict(**asdict(System("slim network", "100_slim", "image-only")), split="test", target="Pneumonia",
               metric=HEADLINE, value=0.8, low=0.7, high=0.9, command="neural run 100")
    write_card(tmp_path / "100_slim_card.csv", as_card([new]))
    after = collect_cards(tmp_path)
    assert after.stage.iloc[-1] == "100_slim" and len(after) == len(before) + 1
    pd.testing.assert_frame_equal(after.iloc[:-1], before)
    pd.testing.assert_frame_equal(before, card, check_exact=True)
    assert "| slim network | 100_slim |" in card_markdown(after, (HEADLINE,)).splitlines()[-1]


def test_two_rows_with_one_identity_are_refused(tmp_path):
    card = cards()
    write_card(tmp_path / "40_classify_card.parquet", card)
    write_card(tmp_path / "53_controls_card.csv", card[card.system == FILM.system].assign(value=.5, low=.4, high=.6))
    with pytest.raises(
        NeuralError,
        match="40_classify_card.parquet and 53_controls_card.csv both hold AUC of raw-film network of Edema") as e:
        collect_cards(tmp_path)
    assert "\n" not in str(e.value)
    with pytest.raises(NeuralError, match="2 of|1 of"): as_card(pd.concat([card, card.head(1)]))


def test_cards_are_refused_where_they_say_too_little(tmp_path):
    card = cards()
    for bad, said in (
        (card.assign(command=""), "have no command"), (card.assign(split="all"), "another split"),
        (card.assign(metric=""), "have no metric"), (card.assign(low=2.0, high=1.0), "ends before it begins"),
        (card.drop(columns="value"), "without the column value"), (card.assign(system="k = 4"), "carries")):
        with pytest.raises(NeuralError, match=said): write_card(tmp_path / "40_classify_card.csv", bad)
    with pytest.raises(NeuralError, match="or nobody finds it"): write_card(tmp_path / "card.csv", card)
    (tmp_path / "40_mine_card.csv").write_text("my own numbers\n1\n")
    with pytest.raises(NeuralError, match="holds something else"): write_card(tmp_path / "40_mine_card.csv", card)
    for text in ("my own numbers\n1\n", "system,value\n" + "a,\"",
                 "system,stage,track,split,metric,value\na,40_x,image-only,test,AUC,high\n"):
        (tmp_path / "40_mine_card.csv").write_text(text)
        with pytest.raises(NeuralError): collect_cards(tmp_path)
    with pytest.raises(NeuralError, match="no card here"): collect_cards(tmp_path / "tables")


def test_a_page_shows_value_and_interval_in_one_cell():
    card = cards()
    wide = wide_card(card, (HEADLINE, "Brier"), digits=2)
    value, low, high = row(card, HEADLINE, "Edema", FILM)
    assert (wide[(wide.system == FILM.system) & (wide.target == "Edema")][HEADLINE].item()
            == f"{value:.2f} [{low:.2f}, {high:.2f}]")
    assert "condition" not in wide and "bytes allowed" not in wide and wide["bytes a study"].iloc[0] == "1,312"
    lines = card_markdown(card, (HEADLINE,)).splitlines()
    assert len(lines) == 2 + 4 and r'`neural run 40-53 --run "my runs/a\|b, c"`' in lines[2]
    with pytest.raises(NeuralError, match="measures 'hit rate'"): wide_card(card, ("hit rate",))


# costs

class Attention(nn.Module):
    def forward(self, q): return nn.functional.scaled_dot_product_attention(q, q, q)


class Vector(nn.Module):
    def forward(self, m): return m @ m[0]


@pytest.mark.parametrize(
    "model, example, macs",
    [
        (nn.Conv2d(1, 8, 3, padding=1), (1, 1, 16, 16), 1 * 8 * 9 * 256),
        (nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False), (1, 4, 9, 9), 8 * 2 * 9 * 16),
        (nn.Linear(10, 5), (1, 10), 50),
        (nn.Linear(10, 5), (3, 7, 10), 1050),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), (1, 1, 2, 2),
         8 + 24),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (1, 7, 16),
         7 * 16 * 48 + 7 * 16 * 16 + 2 * 7 * 16 * 32 + 2 * 7 * 7 * 16),
        (Attention(), (1, 2, 7, 8), 2 * 2 * 7 * 7 * 8),
        (Vector(), (7, 7), 49),
        (nn.ReLU(), (3,), 0),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_macs_by_hand(model, example, macs):
    modes = [m.training for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_macs(model, torch.zeros(example)) == macs
    assert ([m.training for m in model.modules()] == modes and torch.is_grad_enabled()
            and torch.backends.mha.get_fastpath_enabled())


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(NeuralError, match="LSTM: .*rnn.* multiplies"): count_macs(nn.LSTM(4, 8), torch.zeros(5, 1, 4))
    with pytest.raises(NeuralError, match="Bilinear: _trilinear"):
        count_macs(nn.Bilinear(3, 4, 5), torch.zeros(2, 3), torch.zeros(2, 4))
    # elementwise work is not counted
    assert count_macs(nn.Upsample(scale_factor=2, mode="bilinear"), torch.zeros(1, 1, 4, 4)) == 0


def test_parameters_and_bytes_count_shared_numbers_once(tmp_path):
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    assert count_parameters(nn.Sequential(a, b)) == 16 and model_bytes(nn.Sequential(a, b)) == 64
    norm = nn.BatchNorm1d(3)
    # running means and a counter are stored too
    assert count_parameters(norm) == 6 and model_bytes(norm) == 4 * 12 + 8
    assert model_bytes(a.to(torch.bfloat16)) == 32
    (tmp_path / "w.bin").write_bytes(bytes(77))
    assert model_bytes(tmp_path / "w.bin") == model_bytes(tmp_path) == 77
