"The ruler itself: against scikit-learn, against hand-computed cases, and against simulated truth."
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

from neural.evaluate import (auc, auc_difference, auc_interval, auprc, brier, check_predictions, check_target, delong,
                             ece, file_bytes, finding_patches, hit_rate, image_bytes, known, markdown_table,
                             mean_interval, patches_hit, patient_weights, precision, random_hit_rate, random_precision,
                             read_predictions, reliability, roc_band, seed_summary, separated_bound, target_counts,
                             target_verdicts, weighted_auc)
from neural.layouts import index_dataset
from neural.report import ReportReader, evidence, labels_of, split_sections
from neural.study import LABELS, SPLITS, Manifest, NeuralError, Study, View, report_text, targets
from neural.writing import (bleu, finding_counts, finding_difference, finding_summary, finding_table, negation_table,
                            other_patient, report_quality, rouge_l, text_metrics, typical_report)


def binormal(rng, patients, each=1, effect=1.0, shared=0.0):
    """Scores of patients with `each` studies; `shared` is the share of the noise that a patient's studies have in
    common."""
    who = np.repeat(np.arange(patients), each)
    y = (np.arange(patients) % 3 == 0)[who].astype(float)
    noise = math.sqrt(shared) * rng.normal(size=patients)[who] + math.sqrt(1 - shared) * rng.normal(size=len(who))
    return y, effect * y + noise, who


@pytest.mark.parametrize("seed", range(8))
def test_metrics_agree_with_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.r_[np.ones(7 + seed), np.zeros(23)])
    p = rng.integers(0, 12, len(y)) / 11                      # many ties
    assert auc(y, p) == pytest.approx(metrics.roc_auc_score(y, p))
    assert auprc(y, p) == pytest.approx(metrics.average_precision_score(y, p))
    assert brier(y, p) == pytest.approx(metrics.brier_score_loss(y, p))
    w = rng.integers(0, 3, (5, len(y))).astype(float)
    w[:, y == 1] += 1
    assert weighted_auc(y, p, w) == pytest.approx([metrics.roc_auc_score(y, p, sample_weight=v) for v in w])


def test_auc_counts_pairs():
    y, p = np.array([1, 0, 1, 0, 0]), np.array([.3, .3, .9, .8, .1])
    pairs = [(a > b) + .5 * (a == b) for a, b in itertools.product(p[y == 1], p[y == 0])]
    assert auc(y, p) == pytest.approx(np.mean(pairs))


def test_a_repeated_patient_equals_a_weight():
    y, p = np.array([1, 1, 0, 0.]), np.array([.9, .4, .6, .1])
    assert weighted_auc(y, p, np.array([[2.0, 1, 1, 3]]))[0] == pytest.approx(
        auc(np.repeat(y, [2, 1, 1, 3]), np.repeat(p, [2, 1, 1, 3])))


def test_patients_are_drawn_whole():
    who = np.array(["b", "a", "b", "c", "a", "d"])
    w = patient_weights(who, 300, seed=4)
    for name in "ab":
        columns = w[:, who == name]
        assert (columns == columns[:, :1]).all()
    assert (w[:, [0, 1, 3, 5]].sum(1) == 4).all()
    assert abs(w.mean() - 1) < .1


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng, truth = np.random.default_rng(1), .5 * (1 + math.erf(1.0 / 2))     # AUC of two normals one apart
    found = [auc_interval(*binormal(rng, 150), samples=200, seed=i) for i in range(150)]
    covered = np.mean([low <= truth <= high for _, low, high in found])
    assert .88 <= covered <= .99


def test_patient_interval_covers_where_study_interval_does_not():
    rng, truth = np.random.default_rng(2), .5 * (1 + math.erf(1.0 / 2))
    cohorts = [binormal(rng, 60, each=8, shared=.9) for _ in range(100)]
    cover = lambda unit: np.mean([low <= truth <= high for y, p, who in cohorts
                                  for _, low, high in [auc_interval(y, p, who if unit else None, samples=200)]])
    patients, studies = cover(True), cover(False)
    assert patients > .85 and studies < .75


def test_blocks_of_samples_change_nothing_but_memory(monkeypatch):
    import neural.evaluate as ev
    y, p, who = binormal(np.random.default_rng(4), 200)
    one = auc_interval(y, p, who, samples=400)
    monkeypatch.setattr(ev.bootstrap, "__defaults__", (len(y) * 7,))
    many = auc_interval(y, p, who, samples=400)
    assert one[0] == many[0] and np.allclose(one, many, atol=.02)


def test_perfect_ranking_keeps_an_honest_lower_bound():
    y, p = [1] * 8 + [0] * 30, range(38, 0, -1)
    assert auc_interval(y, p) == (1.0, pytest.approx(.025 ** (1 / 8)), 1.0)
    # two patients with both: one pair
    assert separated_bound([1, 1, 0, 0], ["a", "b", "a", "b"]) == pytest.approx(.025)
    # the bound is exact: with a true AUC just there, all pairs are in order in 2.5 % of the samples
    assert separated_bound([1] * 8 + [0] * 30, range(38)) ** 8 == pytest.approx(.025)


def test_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(5)
    y, p, who = binormal(rng, 200)
    q = p + .3 * y
    d, low, high = auc_difference(y, q, p, who)
    a, b = auc_interval(y, q, who), auc_interval(y, p, who)
    assert d == pytest.approx(a[0] - b[0]) and low <= d <= high
    assert high - low < .5 * ((a[2] - a[1]) + (b[2] - b[1]))
    back = auc_difference(y, p, q, who)
    assert back == pytest.approx((-d, -high, -low))


def test_seeds_mean_is_headline_and_ensemble_is_named():
    rng = np.random.default_rng(6)
    y, p, who = binormal(rng, 120)
    runs = p + rng.normal(size=(3, len(y)))
    s = seed_summary(y, runs, who)
    assert s["auc"] == pytest.approx(np.mean([auc(y, r) for r in runs])) and s["ensemble"] == pytest.approx(
        auc(y, runs.mean(0)))
    assert s["seeds"] == 3 and s["studies"] == 120 and s["positives"] == 40
    assert s["low"] < s["auc"] < s["high"] and s["seed_sd"] == pytest.approx(np.std([auc(y, r) for r in runs], ddof=1))


def test_calibration_by_hand():
    y, p = [0, 1, 1, 0], [.05, .15, .15, 1.0]
    t = reliability(y, p, bins=10)
    assert list(t.index) == [0, 1, 9] and list(t.studies) == [1, 2, 1]
    assert ece(y, p, bins=10) == pytest.approx((.05 + 2 * .85 + 1) / 4)
    assert ece([0, 1], [0., 1.]) == 0


@pytest.mark.parametrize("n,m,k", [(16, 3, 2), (16, 1, 4), (9, 9, 1), (12, 5, 8)])
def test_random_hit_rate_against_all_subsets(n, m, k):
    coverage = np.zeros((1, n))
    coverage[0, :m] = .8
    every = list(itertools.combinations(range(n), k))
    assert random_hit_rate(coverage, k) == pytest.approx(np.mean([min(s) < m for s in every]))
    assert hit_rate(every, np.repeat(coverage, len(every), 0)) == pytest.approx(random_hit_rate(coverage, k))
    assert (precision(every, np.repeat(coverage, len(every), 0)) == pytest.approx(random_precision(coverage))
            == pytest.approx(m / n))


def test_chance_level_takes_a_budget_per_study():
    coverage = np.zeros((2, 10))
    coverage[0, 0] = coverage[1, :5] = 1
    assert random_hit_rate(coverage, [1, 2]) == pytest.approx((.1 + (1 - 10 / 45)) / 2)


def test_threshold_and_small_findings():
    c = np.array([0, .24, .25, .9])
    assert finding_patches(c).tolist() == [False, False, True, True]
    assert not patches_hit([1], c) and patches_hit([1], c, threshold=.2)
    assert finding_patches(c * .1).tolist() == [False, False, False, True]
    assert finding_patches(c * .1, threshold=.01).sum() == 3


@pytest.mark.parametrize(
    "call",
    [lambda: auc([1, 1], [0.2, 0.3]), lambda: auc([0, 1], [np.nan, 0.3]), lambda: auc([0, 1], [np.inf, 0.3]),
     lambda: auc([0, 1, 1], [0.1, 0.2]), lambda: auc([], []), lambda: auc([0, 2], [0.1, 0.2]),
     lambda: auc([0, np.nan, 1], [0.1, 0.2, 0.3]), lambda: auc([[0, 1]], [[0.1, 0.2]]),
     lambda: auc_interval([0, 1] * 4, range(8)), lambda: auc_interval([0, 1] * 8, range(16), ["a", "b"] * 8),
     lambda: auc_interval([0, 1] * 8, range(16), ["a"]), lambda: seed_summary([0, 1] * 8, [range(16), [np.nan] * 16]),
     lambda: brier([0, 1], [-0.1, 0.3]), lambda: ece([0, 1], [0.2, 7.0]), lambda: ece([0, 1], [0.2, 0.7], bins=0),
     lambda: roc_band([0, 1], [0.1, 0.2]), lambda: patches_hit([], [1, 0]), lambda: patches_hit([2], [1, 0]),
     lambda: patches_hit([0], [0, 0]), lambda: patches_hit([0], [1.5, 0]), lambda: patches_hit([0], [np.nan, 1]),
     lambda: hit_rate([], []), lambda: random_hit_rate([[1, 0]], 3), lambda: mean_interval([]),
     lambda: mean_interval([1, 2], ["a"]), lambda: known([1, 0], [1]), lambda: image_bytes(np.zeros((3, 4, 5))),
     lambda: image_bytes(np.full((4, 4), 2.0))],
)
def test_refusals_are_one_line(call):
    with pytest.raises(NeuralError) as e: call()
    assert "\n" not in str(e.value) and len(str(e.value)) > 15


def test_a_markdown_table_is_one_line_a_row():
    t = pd.DataFrame([dict(scores="v", AUC=0.5, extra=1.0, command="neural run a"),
                      dict(scores="w | x", AUC=0.7, extra=float("nan"), command="neural | b"),
                      dict(scores="y", command="")])
    lines = markdown_table(t, digits=2).splitlines()
    assert len(lines) == 5 and lines[3] == r"| w \| x | 0.70 |  | `neural \| b` |" and lines[4] == "| y |  |  |  |"


def test_bytes_are_those_on_disk(tmp_path):
    from PIL import Image
    x = np.random.default_rng(0).random((1, 64, 48)).astype(np.float32)
    Image.fromarray((x[0] * 255).round().astype(np.uint8)).save(tmp_path / "a.png", optimize=True)
    Image.fromarray((x[0] * 255).round().astype(np.uint8)).save(tmp_path / "a.jpg", quality=90)
    assert image_bytes(x) == file_bytes(tmp_path / "a.png") and image_bytes(x, "jpeg") == file_bytes(tmp_path / "a.jpg")
    (tmp_path / "link").symlink_to("/etc/hostname")
    assert file_bytes(tmp_path) == image_bytes(x) + image_bytes(x, "jpeg")


def test_real_films_shrink_less_than_patch_counts_promise(real_data):
    from PIL import Image
    films = sorted((real_data / "real_cxr_dev" / "openi_large").iterdir())
    for f in films:
        x = np.asarray(Image.open(f).convert("L"), np.float32) / 255
        assert 0 < image_bytes(x, "jpeg", 90) < image_bytes(x, "png") <= x.size * 1.01


def test_real_masks_and_boxes_become_coverage(real_data):
    from PIL import Image
    from neural.evaluate import lesion_coverage, lesion_mask
    from neural.layouts import index_dataset
    manifest, _ = index_dataset("folder", real_data / "real_cxr_dev")
    masked = [s for s in manifest if s.frontal.masks][:5]
    boxed = [s for s in manifest if s.frontal.boxes][:5]
    assert masked and boxed
    for s in masked + boxed:
        cover, mask = lesion_coverage(manifest, s, 192), lesion_mask(manifest, s, 192)
        assert mask.shape == (192, 192) and cover.shape == (144,) and 0 < cover.max() <= 1 + 1e-5
        assert cover.mean() == pytest.approx(mask.mean(), abs=1e-4)
    for s in boxed:
        v, b = s.frontal, s.frontal.boxes[0]
        side = max(Image.open(manifest.image_path(v)).size)
        one = lesion_mask(manifest, s, 192, b.label)
        if len([x for x in v.boxes if x.label == b.label]) == 1:
            assert one.sum() == pytest.approx(b.w * b.h * (192 / side) ** 2, rel=.05)
    assert all(lesion_mask(manifest, s, 192, "left lung") is not None for s in masked
               if any("left_lung" in m for m in s.frontal.masks))


# targets and predictions, held against the manifest

def cohort(label="Pneumonia", **counts):
    "A manifest of one label: (positive, negative, uncertain, unknown) studies of each split, one patient each."
    rows = [
        (split, v) for split, four in counts.items() for v, n in zip((1.0, 0.0, -1.0, None), four) for _ in range(n)]
    return Manifest([Study(f"s{i}", f"p{i}", split, (View(f"{i}.png", "frontal"),), labels={label: v, "Edema": None})
                     for i, (split, v) in enumerate(rows)])


def predicted(manifest, label="Pneumonia", **more):
    "A sound table of predictions, in shuffled order."
    y = targets(manifest, label)
    table = pd.DataFrame([
        dict(study_id=s.study_id, split=s.split, y=v, p=0.2 + 0.6 * (v == 1), target=label, track="image-only",
             variant="both", seed=0, **more)
        for s, v in zip(manifest, y)
    ])
    return table.sample(frac=1, random_state=0).reset_index(drop=True)


GOOD = cohort(train=(20, 60, 4, 3), validate=(3, 9, 0, 0), test=(8, 20, 1, 1))


def test_targets_are_counted_by_split_and_policy():
    assert target_counts(GOOD, "Pneumonia").to_dict("index") == {
        "train": dict(positive=24, negative=60, unknown=3, ill=24, well=60),
        "validate": dict(positive=3, negative=9, unknown=0, ill=3, well=9),
        "test": dict(positive=9, negative=20, unknown=1, ill=9, well=20)}
    assert target_counts(GOOD, "Pneumonia", "zeros").loc["train"].tolist() == [20, 64, 3, 20, 64]
    assert target_counts(GOOD, "Pneumonia", "ignore").loc["train"].tolist() == [20, 60, 7, 20, 60]
    many = Manifest([Study(f"s{i}", "one", "test", (View(f"{i}.png"),), labels={"X": float(i % 2)}) for i in range(6)])
    # one patient, whatever the studies
    assert target_counts(many, "X").loc["test"].tolist() == [3, 3, 0, 1, 1]


@pytest.mark.parametrize("counts,said", [
    (dict(train=(0, 0, 0, 9), validate=(0, 0, 0, 2), test=(0, 0, 0, 2)), "unknown in all 13 studies"),
    (dict(train=(40, 60, 0, 0), validate=(0, 9, 0, 0), test=(8, 20, 0, 0)), "one class only in validate"),
    (dict(train=(40, 60, 0, 0), validate=(4, 9, 0, 0)), "one class only in test"),
    (dict(train=(3, 60, 0, 0), validate=(1, 9, 0, 0), test=(5, 20, 0, 0)), "has 9 positives where 10"),
    (dict(train=(30, 60, 0, 0), validate=(3, 9, 0, 0), test=(4, 20, 0, 0)), "4 ill and 20 well patients in test")])
def test_a_target_without_enough_is_refused_with_its_counts(counts, said):
    with pytest.raises(NeuralError) as e: check_target(cohort(**counts), "Pneumonia")
    line = str(e.value)
    assert (said in line and all(f"{s} " in line for s in SPLITS) and "unknown" in line and ": choose" in line
            and "\n" not in line)
    assert not target_verdicts(cohort(**counts), ["Pneumonia"]).usable["Pneumonia"]


def test_a_sound_target_passes_and_a_policy_can_undo_it():
    assert check_target(GOOD, "Pneumonia").positive.sum() == 36
    thin = cohort(train=(4, 60, 9, 0), validate=(1, 9, 2, 0), test=(4, 20, 3, 0))
    check_target(thin, "Pneumonia", "ones")
    with pytest.raises(NeuralError, match="9 positives"): check_target(thin, "Pneumonia", "zeros")
    assert target_verdicts(GOOD, ["Pneumonia", "Edema"]).usable.tolist() == [True, False]


def test_sound_predictions_pass_and_come_back_from_disk(tmp_path):
    table = pd.concat([predicted(GOOD), predicted(GOOD).assign(seed=1)])
    assert check_predictions(table, GOOD) is table
    table.to_parquet(tmp_path / "predictions.parquet")
    again = read_predictions(tmp_path / "predictions.parquet", GOOD)
    part = again[(again.split == "test") & again.y.notna()]
    # the unknown one is left out
    wide, y = part.pivot(index="study_id", columns="seed", values="p"), part.groupby("study_id").y.first()
    assert wide.shape == (29, 2) and y.sum() == 9 and y.to_dict() == {
        s.study_id: v for s, v in zip(GOOD.of("test"), targets(GOOD.of("test"), "Pneumonia")) if not np.isnan(v)}
    assert seed_summary(y.to_numpy(), wide.to_numpy().T)["auc"] == 1


def spoil(column, value, rows=1):
    "A way to spoil a table of predictions."
    def change(t):
        t = t.copy()
        t[column] = [value(v) if i < rows else v for i, v in enumerate(t[column])]
        return t
    return change


@pytest.mark.parametrize(
    "change,said",
    [
        (spoil("study_id", lambda v: f"x{v}", 3),
         "3 of 129 predictions are of studies that the manifest does not know (first: study x"),
        (lambda t: pd.concat([t, t.head(2)]), "2 of 131 predictions repeat a study"),
        (lambda t: pd.concat([t, t.head(1).assign(p=0.9)]), "1 of 130 predictions repeat a study"),
        (spoil("split", lambda v: "test" if v == "train" else "train", 5), "5 of 129 predictions name another split"),
        (spoil("split", lambda v: None), "1 of 129 predictions name another split"),
        (spoil("y", lambda v: 1 - v if v == v else 1.0), "1 of 129 predictions carry another target"),
        (spoil("y", lambda v: -1.0), "1 of 129 predictions carry another target"),
        (spoil("y", lambda v: float("nan"), 129), "predictions carry another target"),
        (spoil("p", lambda v: float("nan")), "1 of 129 predictions have a p"),
        (spoil("p", lambda v: 1.01), "have a p"),
        (spoil("p", lambda v: -0.01), "have a p"),
        (spoil("p", lambda v: float("inf")), "have a p"),
        (spoil("p", lambda v: "much"), "have a p"),
        (spoil("target", lambda v: "Pneumonitis"), "no label of the manifest"),
        (lambda t: t.drop(columns=["p", "seed"]), "without the column seed, p"),
        (lambda t: t.head(0), "without a row"),
    ],
)
def test_predictions_of_another_manifest_are_refused(change, said):
    with pytest.raises(NeuralError) as e: check_predictions(change(predicted(GOOD)), GOOD)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_predictions_belong_to_one_policy():
    table = predicted(GOOD)                                                                    # made with "ones"
    with pytest.raises(NeuralError, match="5 of 129 .*'zeros'"): check_predictions(table, GOOD, "zeros")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"study_id,p\ns1,0.5\n"])
def test_a_torn_table_of_predictions_is_refused(tmp_path, content):
    (tmp_path / "p.parquet").write_bytes(content)
    with pytest.raises(NeuralError, match="no readable Parquet"): read_predictions(tmp_path / "p.parquet", GOOD)


def test_paired_seeds_are_narrower_than_unpaired_ones():
    rng = np.random.default_rng(8)
    y, p, who = binormal(rng, 150)
    noise = rng.normal(size=(4, len(y)))
    # seed by seed the same noise
    better, base = p + .5 * y + noise, p + noise
    d, low, high = auc_difference(y, better, base, who)
    gaps = np.array([auc(y, a) - auc(y, b) for a, b in zip(better, base)])
    assert d == pytest.approx(gaps.mean()) and (gaps > 0).all() and 0 < low < d < high
    assert gaps.std(ddof=1) < np.std([auc(y, r) for r in base], ddof=1)
    assert delong(y, better.mean(0), base.mean(0))[3] < .05
    assert auc_difference(y, base, better, who)[0] == pytest.approx(-d)
    # one row meets every seed of the other
    assert auc_difference(y, base, p, who)[0] == pytest.approx(np.mean([auc(y, r) for r in base]) - auc(y, p))


# written reports

READER = ReportReader()
TRUE = ["Right pleural effusion. No pneumothorax. Heart size is normal.", "Large pneumothorax. No pleural effusion.",
        "Cardiomegaly with pulmonary edema.", "Lungs are clear. No effusion or pneumothorax."]


def read(texts): return [labels_of(a) for a in READER.pipe(texts)]


def test_finding_counts_against_scikit_learn():
    rng = np.random.default_rng(0)
    t, s = rng.integers(0, 2, (40, 3)), rng.integers(0, 2, (40, 3))
    rows = lambda a: [dict(zip("abc", map(float, r))) for r in a]
    table = finding_table(finding_counts(rows(t), rows(s), "abc"), "abc")
    for j, name in enumerate("abc"):
        r = table.loc[name]
        assert (r.precision, r.recall, r.f1, r.kappa) == pytest.approx((
            metrics.precision_score(t[:, j], s[:, j]), metrics.recall_score(t[:, j], s[:, j]),
            metrics.f1_score(t[:, j], s[:, j]), metrics.cohen_kappa_score(t[:, j], s[:, j])))
    summary = finding_summary(finding_counts(rows(t), rows(s), "abc"), samples=200)
    assert summary["F1, micro"][0] == pytest.approx(metrics.f1_score(t.ravel(), s.ravel())) and summary[
        "F1, macro"] == pytest.approx(metrics.f1_score(t, s, average="macro"))
    assert summary["F1, micro"][1] < summary["F1, micro"][0] < summary["F1, micro"][2]


def test_paired_findings_know_which_report_is_better():
    rng = np.random.default_rng(3)
    t = rng.integers(0, 2, (120, 4))
    wrong = lambda share: np.where(rng.random(t.shape) < share, 1 - t, t)
    rows = lambda a: [dict(zip("abcd", map(float, r))) for r in a]
    fine, poor = (finding_counts(rows(t), rows(wrong(w)), "abcd") for w in (.1, .3))
    d, low, high = finding_difference(fine, poor, samples=300)
    assert 0 < low < d < high and d == pytest.approx(
        finding_summary(fine)["F1, micro"][0] - finding_summary(poor)["F1, micro"][0])
    assert finding_difference(poor, fine, samples=300) == pytest.approx([-d, -high, -low])
    with pytest.raises(NeuralError, match="120 studies against 60"): finding_difference(fine, poor[:, :60])


def test_a_blank_label_is_unknown_and_a_silent_report_is_not_a_finding():
    truth, said = [{"X": None}, {"X": 1.0}, {"X": 0.0}, {"X": -1.0}], [{"X": 1.0}, {"X": None}, {"X": None}, {"X": 1.0}]
    assert finding_counts(truth, said, ["X"], silent=np.nan).sum((1, 2)).tolist() == [1, 0, 1, 1]
    # between two reports, silence is "not there"
    assert finding_counts(truth, said, ["X"]).sum((1, 2)).tolist() == [1, 1, 1, 1]
    assert finding_counts(truth, said, ["X"], "ignore", np.nan).sum((1, 2)).tolist() == [0, 0, 1, 1]


def test_a_lost_negation_is_seen():
    turned = [t.replace("No ", "") for t in TRUE]
    table = negation_table(read(TRUE), read(turned))
    assert table.loc["Pneumothorax", ["denied", "kept", "turned"]].tolist() == [2, 0, 2]
    # "heart size is normal" stayed
    assert table.loc["Cardiomegaly", ["denied", "kept"]].tolist() == [1, 1]
    card = report_quality(TRUE, turned, READER, samples=50)
    # nearly the same words, the opposite findings
    assert card["denials turned"] > .3 and card["ROUGE-L"][0] > .85
    assert card["precision"] < .75


def test_perfect_empty_and_foreign_reports():
    perfect, empty = report_quality(TRUE, TRUE, READER, samples=50), report_quality(TRUE, [""] * 4, READER, samples=50)
    assert (perfect["F1, micro"] == perfect["ROUGE-L"] == [1, 1, 1] and perfect["BLEU"] == pytest.approx(1)
            and perfect["denials kept"] == 1 and perfect["F1, macro"] == 1)
    assert (empty["empty"] == 4
            and empty["F1, micro"][0] == empty["ROUGE-L"][0] == empty["BLEU"] == empty["denials kept"] == 0)
    foreign = report_quality(TRUE, ["Quartz mountains hum."] * 4, READER, samples=50)
    assert foreign["F1, micro"][0] == foreign["ROUGE-L"][0] == 0 and foreign["BLEU"] < .05


def test_no_word_of_a_report_leaves_the_card():
    marked = [t + " Zebrafish." for t in TRUE]
    assert "ebrafish" not in repr(report_quality(marked, marked[::-1], READER, samples=20)) + repr(
        finding_table(finding_counts(read(marked), read(marked))))
    with pytest.raises(NeuralError) as e: report_quality([*marked[:3], " "], marked, READER)
    assert "1 of 4 reference reports are empty" in str(e.value) and "ebrafish" not in str(e.value)


def test_words_agree_with_the_packages():
    from rouge_score.rouge_scorer import RougeScorer
    import sacrebleu
    other = TRUE[1:] + TRUE[:1]
    assert rouge_l(TRUE, other) == pytest.approx(
        [RougeScorer(["rougeL"]).score(a, b)["rougeL"].fmeasure for a, b in zip(TRUE, other)])
    assert bleu(TRUE, other) == pytest.approx(sacrebleu.corpus_bleu(other, [TRUE], lowercase=True).score / 100)
    # in another order, one word is common
    assert rouge_l(["a b c d"], ["d c b a"])[0] == pytest.approx(.25)
    assert all(v.strip() for v in text_metrics().values()) and "version" in text_metrics()["BLEU"]


def test_the_typical_report_is_the_common_one():
    texts = ["Large mass in the left lung."] + ["No acute disease of the chest."] * 5 + ["No acute disease.", ""]
    assert typical_report(texts) == 1 and typical_report(texts[::-1]) == 2
    with pytest.raises(NeuralError, match="no report"): typical_report([" "])


@pytest.mark.parametrize("seed", range(5))
def test_nobody_keeps_a_report_of_their_own(seed):
    rng = np.random.default_rng(seed)
    who = rng.permutation(np.repeat(np.arange(12), rng.integers(1, 6, 12)))
    to = other_patient(who, seed)
    assert sorted(to) == list(range(len(who))) and (who[to] != who).all()
    assert (other_patient(who, seed) == to).all() and (other_patient(who, seed + 1) != to).any()


def test_real_written_words_are_scored_without_being_shown(real_data, capsys):
    manifest, _ = index_dataset("open-i", real_data)
    texts = [t for s in list(manifest)[:80] if (t := evidence(split_sections(report_text(manifest, s))))]
    shuffled = [texts[i] for i in other_patient(range(len(texts)))]
    parrot = [texts[typical_report(texts)]] * len(texts)
    cards = {n: report_quality(texts, t, READER, samples=50)
             for n, t in (("own", texts), ("shuffled", shuffled), ("parrot", parrot))}
    assert cards["own"]["F1, micro"][0] == cards["own"]["ROUGE-L"][0] == 1
    # words come cheap, findings do not
    assert cards["parrot"]["F1, micro"][0] < .3 and cards["shuffled"]["F1, micro"][0] < .5
    assert cards["parrot"]["ROUGE-L"][0] > .1
    assert capsys.readouterr().out == "" and not any(isinstance(v, str) for c in cards.values() for v in c.values())


# zero, empty and default

Y, P = np.tile([0., 1.], 20), np.linspace(0, 1, 40)

@pytest.mark.parametrize(
    "call, said",
    [(lambda: auc_interval(Y, P, samples=0), "samples must be 1 or more, got 0"),
     (lambda: auc_interval(Y, P, level=0), "level must lie between"),
     (lambda: auc_interval(Y, P, level=95), "level must lie between 0 and 1, such as 0.95; got 95"),
     (lambda: auc_interval(Y, P, least=-1), "least"), (lambda: auc_difference(Y, P, P, samples=0), "samples"),
     (lambda: auc_difference(Y, P, P, level=1), "level"), (lambda: seed_summary(Y, [P], samples=0), "samples"),
     (lambda: mean_interval(P, samples=0), "samples"), (lambda: mean_interval([]), "at least one"),
     (lambda: roc_band(Y, P, samples=0), "samples"), (lambda: roc_band(Y, P, points=1), "points"),
     (lambda: reliability(Y, P, bins=0), "bins"),
     (lambda: hit_rate([[0]], [np.eye(1, 9)[0]], threshold=0), "threshold must be above 0"),
     (lambda: finding_counts([{}], [{}], labels=()), "at least one label"),
     (lambda: image_bytes(np.zeros((8, 8)), "jpeg", quality=0), "quality must lie between 1 and 100, got 0")],
)
def test_zero_is_refused_by_name(call, said):
    with pytest.raises(NeuralError, match=said) as e: call()
    assert "\n" not in str(e.value)


def test_a_table_that_may_not_be_read_gives_the_systems_reason(tmp_path, monkeypatch):
    import os
    import neural.evaluate as module
    def fail(*_): raise PermissionError(13, os.strerror(13))
    monkeypatch.setattr(module.pq, "ParquetFile", fail)
    (tmp_path / "p.parquet").write_bytes(b"x")
    with pytest.raises(NeuralError, match="p.parquet: cannot be read, Permission denied"):
        read_predictions(tmp_path / "p.parquet", None)


def test_predictions_of_other_studies_are_refused_with_examples_of_both_sides():
    mine = Manifest(
        [Study(f"s{i}", f"p{i}", "test", (View(f"{i}.png", "frontal"),), "", {"Edema": 1.0}) for i in range(4)])
    table = pd.DataFrame([
        dict(study_id=f"{i}.0", target="Edema", track="image-only", variant="v", seed=0, split="test", y=1.0, p=0.5)
        for i in range(4)])
    with pytest.raises(
        NeuralError, match="4 of 4 predictions .* does not know .*study 0.0.*manifest of 4 studies, such as s0, s1, s2"
    ):
        check_predictions(table, mine)
