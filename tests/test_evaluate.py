"The ruler itself: against scikit-learn, against hand-computed cases, and against simulated truth."
import itertools
import math

import numpy as np
import pytest
from sklearn import metrics

from neural.evaluate import (auc, auc_difference, auc_interval, auprc, brier, file_bytes, ece, finding_patches, hit_rate, image_bytes, known, markdown_table,
                             mean_interval, patient_weights, patches_hit, precision, random_hit_rate, random_precision, reliability, results_table, roc_band,
                             seed_summary, separated_bound, weighted_auc)
from neural.study import NeuralError


def binormal(rng, patients, each=1, effect=1.0, shared=0.0):
    "Scores of patients with `each` studies; `shared` is the share of the noise that a patient's studies have in common."
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
    w = rng.integers(0, 3, (5, len(y))).astype(float); w[:, y == 1] += 1
    assert weighted_auc(y, p, w) == pytest.approx([metrics.roc_auc_score(y, p, sample_weight=v) for v in w])


def test_auc_counts_pairs():
    y, p = np.array([1, 0, 1, 0, 0]), np.array([.3, .3, .9, .8, .1])
    pairs = [(a > b) + .5 * (a == b) for a, b in itertools.product(p[y == 1], p[y == 0])]
    assert auc(y, p) == pytest.approx(np.mean(pairs))


def test_a_repeated_patient_equals_a_weight():
    y, p = np.array([1, 1, 0, 0.]), np.array([.9, .4, .6, .1])
    assert weighted_auc(y, p, np.array([[2., 1, 1, 3]]))[0] == pytest.approx(auc(np.repeat(y, [2, 1, 1, 3]), np.repeat(p, [2, 1, 1, 3])))


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
    cover = lambda unit: np.mean([low <= truth <= high for y, p, who in cohorts for _, low, high in [auc_interval(y, p, who if unit else None, samples=200)]])
    patients, studies = cover(True), cover(False)
    assert patients > .85 and studies < .75


def test_blocks_of_samples_change_nothing_but_memory(monkeypatch):
    import neural.evaluate as ev
    y, p, who = binormal(np.random.default_rng(4), 200)
    one = auc_interval(y, p, who, samples=400)
    monkeypatch.setattr(ev._bootstrap, "__defaults__", (len(y) * 7,))
    many = auc_interval(y, p, who, samples=400)
    assert one[0] == many[0] and np.allclose(one, many, atol=.02)


def test_perfect_ranking_keeps_an_honest_lower_bound():
    y, p = [1] * 8 + [0] * 30, range(38, 0, -1)
    assert auc_interval(y, p) == (1.0, pytest.approx(.025 ** (1 / 8)), 1.0)
    assert separated_bound([1, 1, 0, 0], ["a", "b", "a", "b"]) == pytest.approx(.025)     # two patients with both: one pair
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
    assert s["auc"] == pytest.approx(np.mean([auc(y, r) for r in runs])) and s["ensemble"] == pytest.approx(auc(y, runs.mean(0)))
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
    coverage = np.zeros((1, n)); coverage[0, :m] = .8
    every = list(itertools.combinations(range(n), k))
    assert random_hit_rate(coverage, k) == pytest.approx(np.mean([min(s) < m for s in every]))
    assert hit_rate(every, np.repeat(coverage, len(every), 0)) == pytest.approx(random_hit_rate(coverage, k))
    assert precision(every, np.repeat(coverage, len(every), 0)) == pytest.approx(random_precision(coverage)) == pytest.approx(m / n)


def test_chance_level_takes_a_budget_per_study():
    coverage = np.zeros((2, 10)); coverage[0, 0] = coverage[1, :5] = 1
    assert random_hit_rate(coverage, [1, 2]) == pytest.approx((.1 + (1 - 10 / 45)) / 2)


def test_threshold_and_small_findings():
    c = np.array([0, .24, .25, .9])
    assert finding_patches(c).tolist() == [False, False, True, True]
    assert not patches_hit([1], c) and patches_hit([1], c, threshold=.2)
    assert finding_patches(c * .1).tolist() == [False, False, False, True]
    assert finding_patches(c * .1, threshold=.01).sum() == 3


@pytest.mark.parametrize("call", [
    lambda: auc([1, 1], [.2, .3]), lambda: auc([0, 1], [np.nan, .3]), lambda: auc([0, 1], [np.inf, .3]), lambda: auc([0, 1, 1], [.1, .2]), lambda: auc([], []),
    lambda: auc([0, 2], [.1, .2]), lambda: auc([0, np.nan, 1], [.1, .2, .3]), lambda: auc([[0, 1]], [[.1, .2]]),
    lambda: auc_interval([0, 1] * 4, range(8)), lambda: auc_interval([0, 1] * 8, range(16), ["a", "b"] * 8), lambda: auc_interval([0, 1] * 8, range(16), ["a"]),
    lambda: seed_summary([0, 1] * 8, [range(16), [np.nan] * 16]), lambda: brier([0, 1], [-.1, .3]), lambda: ece([0, 1], [.2, 7.]), lambda: ece([0, 1], [.2, .7], bins=0),
    lambda: roc_band([0, 1], [.1, .2]), lambda: patches_hit([], [1, 0]), lambda: patches_hit([2], [1, 0]), lambda: patches_hit([0], [0, 0]), lambda: patches_hit([0], [1.5, 0]),
    lambda: patches_hit([0], [np.nan, 1]), lambda: hit_rate([], []), lambda: random_hit_rate([[1, 0]], 3), lambda: mean_interval([]), lambda: mean_interval([1, 2], ["a"]),
    lambda: known([1, 0], [1]), lambda: results_table([]), lambda: results_table([dict(variant="x", command=" ")]), lambda: image_bytes(np.zeros((3, 4, 5))), lambda: image_bytes(np.full((4, 4), 2.)),
])
def test_refusals_are_one_line(call):
    with pytest.raises(NeuralError) as e: call()
    assert "\n" not in str(e.value) and len(str(e.value)) > 15


def test_tables_carry_their_command(tmp_path):
    t = results_table([dict(command="neural run a", variant="v", auc=.5, low=.4, high=.6), dict(command="neural run b", variant="w", auc=.7, low=.6, high=.8, extra=float("nan"))])
    assert list(t.columns[:1]) == ["variant"] and t.columns[-1] == "command"
    lines = markdown_table(t, digits=2).splitlines()
    assert len(lines) == 4 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert "0.70 [0.60, 0.80]" in lines[3] and "`neural run b`" in lines[3] and "nan" not in lines[3]


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
    from neural.study import index_dataset
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
        if len([x for x in v.boxes if x.label == b.label]) == 1: assert one.sum() == pytest.approx(b.w * b.h * (192 / side) ** 2, rel=.05)
    assert all(lesion_mask(manifest, s, 192, "left lung") is not None for s in masked if any("left_lung" in m for m in s.frontal.masks))
