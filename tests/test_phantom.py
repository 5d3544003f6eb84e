"What two chapters cannot test by themselves: whole cohorts, several processes, rates, and the words of reports."
import csv
import gzip
import io
import os
import re
from collections import defaultdict

import numpy as np
import pydicom
import pytest
from PIL import Image
from scipy.stats import chi2_contingency

from neural.cohort import (FRACTIONS, HEDGED, LATERAL, MONOCHROME1, NEITHER, NO_FINDINGS, NO_IMPRESSION, RAISED, STATED,
                           draw_cohort, draw_patient_studies, toy_study, truth_of, write_cohort, write_report)
from neural.layouts import index_dataset
from neural.phantom import DRAW, PREVALENCE, SIDES, Finding, draw_film, draw_findings, draw_patient, lay_out
from neural.study import LABELS, NeuralError


@pytest.fixture(scope="module")
def plan():
    "Two thousand planned studies; nothing is drawn for them."
    return draw_cohort(2000, seed=21)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    "Forty small studies on disk, with their plan."
    out = tmp_path_factory.mktemp("phantom") / "cohort"
    summary = write_cohort(out, studies=40, size=96, seed=4, workers=1)
    return out, draw_cohort(40, seed=4), summary


def rows(path):
    data = path.read_bytes()
    return list(csv.DictReader(io.StringIO((gzip.decompress(data) if path.suffix == ".gz" else data).decode())))


def share(values): return float(np.mean(list(values)))


# --- the plan: rates, splits, independence
# --------------------------------------------------------------------------------------

def test_prevalence_is_as_stated(plan):
    for name, stated in PREVALENCE.items():
        got = share(any(f.name == name for f in s["findings"]) for s in plan)
        # 1.4: studies of one patient are alike
        assert abs(got - stated) < 4.5 * (stated * (1 - stated) / len(plan)) ** .5 * 1.4, (name, got, stated)
    assert .30 < share(truth_of(s["findings"])["No Finding"] for s in plan) < .42


def test_four_hundred_studies_already_look_right():
    small = draw_cohort(400, seed=2)
    for name, low, high in (("Pneumonia", 0.09, 0.21), ("Pleural Effusion", 0.14, 0.30), ("Cardiomegaly", 0.11, 0.29),
                            ("Support Devices", 0.16, 0.34), ("Edema", 0.05, 0.18)):
        assert low < share(truth_of(s["findings"])[name] for s in small) < high, name


def test_illness_clusters(plan):
    truth = {n: np.array([truth_of(s["findings"])[n] for s in plan]) for n in LABELS}
    for a, b in (("Edema", "Cardiomegaly"), ("Edema", "Pleural Effusion"), ("Support Devices", "Pleural Effusion")):
        assert truth[b][truth[a] == 1].mean() > 1.3 * truth[b][truth[a] == 0].mean(), (a, b)


def test_a_pneumonia_is_a_lung_opacity(plan):
    for s in plan:
        t = truth_of(s["findings"])
        assert t["Lung Opacity"] >= t["Pneumonia"] and t["Consolidation"] <= t["Pneumonia"]
        assert t["No Finding"] == (not any(t[l] for l in LABELS if l not in ("No Finding", "Support Devices")))


def test_split_is_by_patient(plan):
    of = defaultdict(set)
    for s in plan: of[s["patient"]].add(s["split"])
    assert all(len(v) == 1 for v in of.values())
    for name, stated in zip(("train", "validate", "test"), FRACTIONS):
        assert abs(share(v == {name} for v in of.values()) - stated) < .01


def test_a_larger_test_split_draws_the_same_studies():
    usual, wide = draw_cohort(600, seed=3), draw_cohort(600, seed=3, fractions=(.5, .1, .4))
    assert [s["report"] for s in usual] == [s["report"] for s in wide]
    patients = {s["patient"]: s["split"] for s in wide}
    assert abs(share(v == "test" for v in patients.values()) - .4) < .02
    for wrong in ((.5, .5), (.5, .1, .5), (1, 0, 0)):
        with pytest.raises(NeuralError, match="three positive shares"): draw_cohort(5, fractions=wrong)


def test_ids_are_unique_in_a_large_cohort():
    large = draw_cohort(2500, seed=0)
    assert len({s["study"] for s in large}) == len(large)
    assert all(
        str(s["patient"]).startswith("10") and len(str(s["patient"])) == 8 and len(str(s["study"])) == 8 for s in large)


def test_patients_have_one_to_four_studies(plan):
    count = defaultdict(int)
    for s in plan: count[s["patient"]] += 1
    assert set(count.values()) == {1, 2, 3, 4}


def test_lasting_findings_keep_their_side(plan):
    seen = {}
    for s in plan:
        for f in s["findings"]:
            if f.name == "Lung Lesion":
                assert seen.setdefault((s["patient"], f.seed), (f.side, f.site)) == (f.side, f.site)
    assert len(seen) > 20


def test_a_longer_cohort_begins_like_a_shorter_one():
    assert [s["report"] for s in draw_cohort(20, 3)] == [s["report"] for s in draw_cohort(60, 3)[:20]]
    assert [s["report"] for s in draw_cohort(20, 3)] != [s["report"] for s in draw_cohort(20, 4)]


def test_missing_sections_and_odd_films_at_the_stated_rates(plan):
    no_findings, no_impression = (share(word not in s["report"] for s in plan) for word in ("FINDINGS:", "IMPRESSION:"))
    assert (abs(no_findings - NO_FINDINGS - NEITHER) < 0.04
            and abs(no_impression - NO_IMPRESSION - NEITHER) < 0.04)
    neither = share("FINDINGS:" not in s["report"] and "IMPRESSION:" not in s["report"] for s in plan)
    assert 0 < neither < .015
    assert abs(share(s["negative"] for s in plan) - MONOCHROME1) < .04
    assert (abs(share("LL" in s["views"] for s in plan) - LATERAL) < 0.04
            and 0 < share(s["views"] == ["LL"] for s in plan) < 0.03)


def indication(report): return re.search(r"(?:INDICATION|HISTORY): (.*)", report)[1]


def test_the_indication_knows_nothing(plan):
    """By construction it has a source of its own: other findings, the same indications; and counted, no dependence
    either."""
    once = {s["patient"]: s for s in plan}.values()  # one study a patient: chi-square wants independent rows
    table = defaultdict(lambda: [0, 0])
    for s in once: table[indication(s["report"])][truth_of(s["findings"])["Pneumonia"]] += 1
    counts = np.array([v for v in table.values()])
    assert chi2_contingency(counts).pvalue > .001, counts
    assert .3 < share("pneumonia" in indication(s["report"]).lower() for s in plan) < .65


def test_the_indication_does_not_move_with_the_findings(monkeypatch):
    before = [indication(s["report"]) for n in range(40) for s in draw_patient_studies(5, n)]
    monkeypatch.setattr("neural.phantom.PREVALENCE", {n: .9 for n in PREVALENCE})
    healthy = [indication(s["report"]) for n in range(40) for s in draw_patient_studies(5, n)]
    assert before == healthy


def test_length_of_reports(plan):
    words = [len(s["report"].split()) for s in plan]
    assert 25 <= np.median(words) <= 60 and max(words) < 220 and len({s["report"] for s in plan}) > .99 * len(plan)


# --- what reports say
# -----------------------------------------------------------------------------------------------------------

def test_says_follows_the_words(plan):
    "Independent check with bare words: what is stated or hedged is named in the text, and silence is blank."
    word = {"Pneumonia": "pneumonia", "Pleural Effusion": "effusion", "Pneumothorax": "pneumothorax", "Edema": "edema",
            "Atelectasis": "atelectasis", "Consolidation": "consolidation"}
    for s in plan:
        evidence = re.split(r"\n\n(?=FINDINGS|IMPRESSION)", s["report"], maxsplit=1)
        text = evidence[1].lower() if len(evidence) > 1 else ""
        for label, w in word.items():
            if s["says"][label] is None:assert w not in text, (label, text)
            else: assert w in text, (label, text)


def test_sections_that_are_missing_say_nothing(plan):
    silent = [s for s in plan if "FINDINGS:" not in s["report"] and "IMPRESSION:" not in s["report"]]
    assert silent and all(v is None for s in silent for v in s["says"].values())


def test_sides_in_words_are_sides_in_truth(plan):
    "A stated one-sided finding never names the other side in its own sentence."
    checked = 0
    for s in plan:
        if re.search(r"resolved|no longer", s["report"]): continue
        for f in s["findings"]:
            if f.name not in ("Pneumothorax", "Lung Lesion") or sum(g.name == f.name for g in s["findings"]) > 1:
                continue
            noun, other = {"Pneumothorax": "pneumothorax", "Lung Lesion": "nodule"}[f.name], {
                "right": "left", "left": "right"}[f.side]
            for sentence in re.split(r"\.\s", s["report"].lower()):
                if (noun in sentence and re.search(r"\b(left|right|lingula)\b", sentence)
                    and not re.search(r"\bno\b|without|negative|indication|history", sentence)):
                    assert not re.search(rf"\b{other}\b", sentence), sentence
                    checked += 1
    assert checked > 40


@pytest.mark.parametrize("side", SIDES)
def test_right_in_words_is_left_on_the_film(side):
    r, other = np.random.default_rng(3), {"right": "left", "left": "right"}[side]
    for name in ("Pneumonia", "Pleural Effusion", "Lung Lesion", "Pneumothorax", "Atelectasis", "Lung Opacity",
                 "Fracture", "Pleural Other"):
        f = Finding(name, side, "lower lobe" if name not in ("Lung Lesion", "Pleural Other") else "upper lobe", 0.8,
                    int(r.integers(1000)))
        text, says = write_report([f], None, np.random.default_rng(int(r.integers(1000))))
        _, masks = draw_film(draw_patient(r), [f], r, 128)
        assert (np.nonzero(masks[name])[1].mean() < 64) == (side == "right"), name
        if says[name]: assert side in text.lower(), text


def test_reports_are_wrong_about_as_often_as_stated():
    r, silent, hedged, raised, n = np.random.default_rng(0), 0, 0, 0, 1500
    for _ in range(n):
        says = write_report([Finding("Pleural Effusion", "left", "lower lobe", .9)], None, r)[1]["Pleural Effusion"]
        silent += says in (None, 0)
        hedged += says == -1
        raised += write_report([], None, r)[1]["Pneumonia"] in (1, -1)
    assert abs(silent / n - (1 - STATED - HEDGED)) < .04 and abs(hedged / n - HEDGED) < .04
    assert 0 < raised / n < RAISED


def test_changes_are_told_against_the_previous_study():
    r = np.random.default_rng(0)
    before, now = [Finding("Pneumonia", "left", "lower lobe", .9)], [Finding("Pneumonia", "left", "lower lobe", .3)]
    texts = [write_report(now, before, r)[0] for _ in range(100)] + [write_report([], before, r)[0] for _ in range(100)]
    assert any("improved" in t or "decreased" in t for t in texts[:100]) and not any(
        "worse" in t or "progressed" in t for t in texts[:100])
    assert any("resolved" in t or "no longer" in t for t in texts[100:])
    assert not any(w in write_report(now, None, r)[0] for _ in range(100)
                   for w in ("unchanged", "prior study", "prior exam", "resolved"))


# --- films
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", (64, 97, 160))
def test_every_finding_draws_at_every_size(size):
    r = np.random.default_rng(size)
    for name in DRAW:
        study = toy_study(name, size, int(r.integers(100)))
        assert (study.image.shape == (1, size, size) and study.image.dtype == np.float32 and 0 <= study.image.min()
                and study.image.max() <= 1)
        assert (study.masks[name].shape == (size, size) and study.masks[name].dtype == bool and study.masks[name].any()
                and study.labels[name] == 1)


def test_severity_is_seen():
    "A plain finding changes the film more than a subtle one, inside its mask."
    p = draw_patient(np.random.default_rng(1))
    healthy, _ = draw_film(p, [], np.random.default_rng(7), 160)
    for name in ("Pneumonia", "Lung Opacity", "Pleural Effusion", "Lung Lesion"):
        change = []
        for severity in (.1, .9):
            film, masks = draw_film(
                p, [Finding(name, "left", "lower lobe" if name != "Lung Lesion" else "upper lobe", severity, 3)],
                np.random.default_rng(7), 160)
            change.append(float(np.abs(film - healthy)[0][masks[name]].sum()))
        assert change[1] > 1.3 * change[0], name


def test_anatomy_stays_with_the_patient():
    a, b = (draw_patient_studies(3, n)[0]["anatomy"] for n in (0, 1))
    assert a != b and draw_patient(np.random.default_rng(a)) == draw_patient(np.random.default_rng(a))
    for n in range(30): assert len({tuple(s["anatomy"]) for s in draw_patient_studies(3, n)}) == 1


def test_lungs_are_dark_and_bones_are_bright():
    r = np.random.default_rng(0)
    for _ in range(6):
        p = draw_patient(r)
        film, _ = draw_film(p, [], r, 128)
        c = lay_out(p, 128)
        lung = (c.lung["right"] > .6) | (c.lung["left"] > .6)
        assert film[0][lung].mean() < .55 * film[0][100:120, 40:88].mean()  # the belly


# --- files
# ----------------------------------------------------------------------------------------------------------------------

def test_layout(cohort):
    out, plan, summary = cohort
    for name in ("mimic-cxr-2.0.0-split.csv.gz", "mimic-cxr-2.0.0-metadata.csv.gz", "mimic-cxr-2.0.0-chexpert.csv.gz",
                 "truth/labels.csv", "truth/boxes.csv"):
        assert (out / name).is_file()
    assert not list(out.parent.glob(".*tmp")), "a temporary folder is left behind"
    for s in plan:
        folder = out / "files" / "p10" / f"p{s['patient']}"
        assert (folder / f"s{s['study']}.txt").read_text() == s["report"] and len(
            list((folder / f"s{s['study']}").glob("*.dcm"))) == len(s["views"])
    assert (summary["studies"] == 40 and summary["films"] == len(list(out.rglob("*.dcm")))
            and summary["masks"] == len(list(out.rglob("*.png"))))


def test_films_are_twelve_bit_dicom_without_a_patient(cohort):
    out, _, _ = cohort
    shown = {(r["dicom_id"]): r for r in rows(out / "mimic-cxr-2.0.0-metadata.csv.gz")}
    kinds, uids = set(), set()
    for path in out.rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        pixels = ds.pixel_array
        row = shown[path.stem]
        assert ((ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation) == (16, 12, 11, 0)
                and pixels.max() <= 4095 and np.ptp(pixels) > 1000)
        assert (pixels.shape == (int(row["Rows"]), int(row["Columns"])) and row["ViewPosition"] == ds.ViewPosition
                and max(pixels.shape) == 96)
        assert not str(ds.PatientName) and not ds.PatientID and not ds.PatientBirthDate and not ds.StudyDate
        assert (ds.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
                and pydicom.uid.UID(ds.SOPInstanceUID).is_valid)
        kinds.add(ds.PhotometricInterpretation)
        uids.add(ds.SOPInstanceUID)
    assert kinds == {"MONOCHROME1", "MONOCHROME2"} and len(uids) == len(shown)


def test_masks_and_boxes_agree_with_truth(cohort):
    out, plan, _ = cohort
    truth, boxes = {s["study"]: s for s in plan}, {
        (int(r["study_id"]), r["label"]): r for r in rows(out / "truth" / "boxes.csv")}
    size = {r["dicom_id"]: (int(r["Rows"]), int(r["Columns"])) for r in rows(out / "mimic-cxr-2.0.0-metadata.csv.gz")}
    for path in (out / "truth" / "masks").glob("*.png"):
        study, name = path.stem.split("__")
        findings = [f for f in truth[int(study)]["findings"] if f.name == name]
        box = boxes.pop((int(study), name))
        mask = np.asarray(Image.open(path))
        assert findings and mask.shape == size[box["dicom_id"]] and set(np.unique(mask)) <= {0, 255} and mask.any()
        i, j = np.nonzero(mask)
        assert (int(box["x"]), int(box["y"]), int(box["w"]), int(box["h"])) == (
            j.min(), i.min(), np.ptp(j) + 1, np.ptp(i) + 1)
        sides = {f.side for f in findings}
        if len(sides) == 1 and name not in ("Support Devices", "Edema", "Cardiomegaly", "Enlarged Cardiomediastinum"):
            assert (j.mean() < mask.shape[1] / 2) == (sides == {"right"}), (path.name, sides)
    assert not boxes, "a box without a mask"


def test_label_tables(cohort):
    out, plan, _ = cohort
    said, true = (
        {int(r["study_id"]): r for r in rows(out / p)} for p in ("mimic-cxr-2.0.0-chexpert.csv.gz", "truth/labels.csv"))
    for s in plan:
        for l in LABELS:
            assert said[s["study"]][l] == ("" if s["says"][l] is None else str(float(s["says"][l])))
            assert int(true[s["study"]][l]) == truth_of(s["findings"])[l]


def test_the_layout_is_read_as_mimic_cxr(cohort):
    out, plan, _ = cohort
    for labels in (None, "truth/labels.csv"):
        manifest, excluded = index_dataset("mimic-cxr", out, labels=labels)
        assert len(manifest) + len({e[0] for e in excluded}) == len(plan) and len(manifest) > 30
    assert any(v.masks for s in manifest for v in s.views) and any(v.boxes for s in manifest for v in s.views)
    by = {str(s["study"]): s for s in plan}
    for study in manifest:
        s = by[study.study_id.lstrip("s")]
        assert study.split == s["split"] and study.labels["Pneumonia"] == truth_of(s["findings"])["Pneumonia"]


def test_any_number_of_workers_writes_the_same_bytes(cohort, tmp_path):
    out, _, _ = cohort
    write_cohort(tmp_path / "again", studies=40, size=96, seed=4, workers=2)
    first, second = ({p.relative_to(d).as_posix(): p.read_bytes() for p in d.rglob("*") if p.is_file()}
                     for d in (out, tmp_path / "again"))
    assert first.keys() == second.keys() and all(first[k] == second[k] for k in first)


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(NeuralError, match="already holds files"): write_cohort(tmp_path, studies=2, size=64)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
    with pytest.raises(NeuralError, match="already holds files"):
        write_cohort(tmp_path / "kept.txt", studies=2, size=64)


def test_an_empty_folder_is_used_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert write_cohort(tmp_path / "empty", studies=2, size=64, workers=1)["studies"] == 2
    monkeypatch.setattr("neural.cohort.write_tables", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): write_cohort(tmp_path / "new", studies=2, size=64, workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


def test_a_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "link")
    with pytest.raises(NeuralError, match="already holds files|link"):
        write_cohort(tmp_path / "link", studies=2, size=64)


@pytest.mark.parametrize("wrong", (dict(studies=0), dict(size=8), dict(size=10**6), dict(studies=10**9)))
def test_impossible_cohorts_are_refused(tmp_path, wrong):
    with pytest.raises(NeuralError, match="48 to 4096"):
        write_cohort(tmp_path / "x", **(dict(studies=2, size=64) | wrong))
    assert not (tmp_path / "x").exists()


def test_the_fixture_says_what_it_shows():
    for name in ("Pneumonia", "Pleural Effusion", "Edema", "Fracture", ""):
        study = toy_study(name, 96, 3)
        assert (study.says[name or "No Finding"] == 1 and study.labels[name or "No Finding"] == 1
                and "FINDINGS:" in study.report and "IMPRESSION:" in study.report)
    assert (np.array_equal(toy_study(seed=9).image, toy_study(seed=9).image)
            and toy_study(seed=9).report == toy_study(seed=9).report)
    with pytest.raises(NeuralError, match="no phantom shows"): toy_study("Measles")


def test_findings_need_no_drawing_to_be_sampled():
    r = np.random.default_rng(0)
    assert all(isinstance(f, Finding) and 0 < f.severity < 1 for _ in range(200) for f in draw_findings(r))
