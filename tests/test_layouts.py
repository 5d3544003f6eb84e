"""Each data set as it ships, from files to evidence, labels, views, splits and assets; records that do not fit; files
that must survive."""
import csv
import errno
import gzip
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from neural import layouts as module
from neural.cli import app
from neural.layouts import index_dataset, match_ids, walk, write_index
from neural.report import evidence, split_sections
from neural.study import (COLUMNS, LABELS, Exclusions, Manifest, NeuralError, made_here, read_side, read_table,
                          report_text, row_text, split_of)

# what goes in: patient, exam, official split, findings, impression, labels, views
EXAMS = [
    (1, 1, "train", "The heart is enlarged. No pleural effusion.", "Cardiomegaly.",
     {"Cardiomegaly": 1.0, "Pleural Effusion": 0.0}, ("PA", "LATERAL")),
    (1, 2, "train", "Heart size is normal. The lungs are clear.", "", {"No Finding": 1.0}, ("AP",)),
    (2, 1, "train", "", "Possible pneumonia at the right base.", {"Pneumonia": -1.0}, ("PA", "LATERAL")),
    (3, 1, "validate", "Small left pleural effusion.", "Small left pleural effusion.", {"Pleural Effusion": 1.0},
     ("AP",)),
    (4, 1, "test", "No pneumothorax.", "No acute disease.", {"Pneumothorax": 0.0, "No Finding": 1.0}, ("PA",)),
    (5, 1, "test", "There is an endotracheal tube. Pulmonary edema.", "Pulmonary edema.",
     {"Edema": 1.0, "Support Devices": 1.0}, ("LATERAL", "AP")),
]
HISTORY = "Evaluate for fracture and gout."      # asked, not seen: never evidence
films = iter(range(10**9))


def film(path: Path) -> Path:
    "A picture of noise, no two alike: DICOM, PNG or JPEG by its suffix."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(next(films)).random((1, 140, 120))
    if path.suffix == ".dcm":
        from neural.cohort import uid_of, write_dicom
        write_dicom(path, pixels, "PA", uid_of(0, str(path.name)))
    else: Image.fromarray((pixels[0] * 255).astype(np.uint8)).save(path)
    return path


def table(path: Path, header, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])
    return path


def report_of(findings, impression) -> str:
    "A report as a hospital types it: indented, broken lines, capitals."
    parts = ["                                 FINAL REPORT",
             f" EXAMINATION:  CHEST RADIOGRAPHS\n\n INDICATION:  {HISTORY}\n\n COMPARISON:  None."]
    if findings: parts.append(f" FINDINGS:  {findings}")
    if impression: parts.append(f" IMPRESSION:  {impression}")
    return "\n\n".join(parts) + "\n"


def mimic(root: Path, suffix=".dcm", reports: Path = None, float_ids=False) -> dict:
    "MIMIC-CXR, or MIMIC-CXR-JPG with its reports elsewhere; returns study id -> exam."
    split, meta, labels, put = [], [], [], {}
    dot = ".0" if float_ids else ""
    for k, exam in enumerate(EXAMS):
        p, s = 10000000 + exam[0], 50000000 + k
        place = f"files/p10/p{p}/s{s}"
        put[str(s)] = exam
        note = (reports or root) / f"{place}.txt"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(report_of(*exam[3:5]))
        for v, view in enumerate(exam[6]):
            name = f"{k:08x}-{v:08x}-00000000-00000000-00000000"
            film(root / place / f"{name}{suffix}")
            split.append((name, f"{s}{dot}", f"{p}{dot}", exam[2]))
            meta.append((name, p, s, "CHEST (PA AND LAT)", view, 140, 120))
        labels.append(
            (f"{p}{dot}", f"{s}{dot}", *("" if exam[5].get(n) is None else exam[5][n] for n in sorted(LABELS))))
    table(root / "mimic-cxr-2.0.0-split.csv.gz", ("dicom_id", "study_id", "subject_id", "split"), split)
    table(
        root / "mimic-cxr-2.0.0-metadata.csv.gz",
        ("dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns"),
        meta)
    table(root / "mimic-cxr-2.0.0-chexpert.csv.gz", ("subject_id", "study_id", *sorted(LABELS)), labels)
    table(root / "mimic-cxr-2.0.0-negbio.csv.gz", ("subject_id", "study_id", *sorted(LABELS)), labels)
    return put


PLUS = ["path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id", "patient_report_date_order",
        "report", "section_narrative", "section_clinical_history", "section_history", "section_comparison",
        "section_technique", "section_procedure_comments", "section_findings", "section_impression",
        "section_end_of_impression", "section_summary", "section_accession_number", "age", "sex", "race", "ethnicity",
        "interpreter_needed", "insurance_type", "recent_bmi", "deceased", "split"]


def chexpert(root: Path, dicom=False, whole=()) -> dict:
    "CheXpert Plus with its labels and its RadGraph files; exams of `whole` have their text in `report` alone."
    rows, labels, graphs, put = [], [], [], {}
    for k, (p, s, split, findings, impression, told, views) in enumerate(EXAMS):
        official = "valid" if split == "test" else "train"
        put[f"patient{p}_study{s}"] = EXAMS[k]
        for v, view in enumerate(views, 1):
            side = "Lateral" if view == "LATERAL" else "Frontal"
            path = f"{official}/patient{p}/study{s}/view{v}_{side.lower()}.jpg"
            film(root / ("DICOM" if dicom else "PNG") / path.replace(".jpg", ".dcm" if dicom else ".png"))
            text = (f"NARRATIVE:\nChest {len(views)} views\n\nCLINICAL HISTORY: {HISTORY}\n\n"
                    + (f"FINDINGS:\n{findings}\n\n" if findings else "")
                    + (f"IMPRESSION:\n{impression}\n\n" if impression else ""))
            cells = (
                {}
                if k in whole
                else dict(
                    section_findings=findings and f"\n{findings}", section_impression=impression and f"\n{impression}")
            )
            rows.append(
                dict.fromkeys(PLUS, "")
                | dict(path_to_image=path, path_to_dcm=path.replace(".jpg", ".dcm"), frontal_lateral=side,
                       ap_pa="" if side == "Lateral" else view, deid_patient_id=f"patient{p}",
                       patient_report_date_order=s,
                       report=text + f"SUMMARY: 2-ABNORMAL, PREVIOUSLY REPORTED\n\nACCESSION NUMBER:\n77{k}{v}\n",
                       section_narrative="Chest views", section_clinical_history=HISTORY,
                       section_end_of_impression="2-ABNORMAL\nI have looked at these films.",
                       section_summary="2-ABNORMAL, PREVIOUSLY REPORTED", section_accession_number=f"77{k}{v}",
                       age="61.0", sex="Female", split=official)
                | cells
            )
            labels.append({"path_to_image": path} | {n: told.get(n) for n in LABELS})
            graphs.append({
                "path_to_image": path,
                "section_impression": {
                    "0": {"text": "fine", "entities": {}, "data_source": None, "data_split": "inference"}},
            })
    table(root / "df_chexpert_plus_240401.csv", PLUS, [[r[c] for c in PLUS] for r in rows])
    for name, lines in (("chexbert_labels/impression_fixed.json", labels),
                        ("chexbert_labels/report_fixed.json", labels),
                        ("radgraph-XL-annotations/section_impression.json", graphs),
                        ("radgraph-XL-annotations/impression_fixed.json", graphs)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("\n".join(map(json.dumps, lines)) + "\n")
    return put


HABITS = {"archive": ("CXR{p}_{p}_IM-00{p}{s}-{t}", "CXR{p}_{p}_IM-00{p}{s}-{t}.png"),
          "kaggle": ("CXR{p}_IM-00{p}{s}-{t}", "{p}_IM-00{p}{s}-{t}.dcm.png"),
          "plain": ("CXR{p}_IM-00{p}{s}-{t}", "CXR{p}_IM-00{p}{s}-{t}.jpg")}
HEADINGS = {"Cardiomegaly": "Cardiomegaly/mild", "Pleural Effusion": "Pleural Effusion/left/small",
            "Edema": "Pulmonary Edema", "No Finding": "normal", "Support Devices": "Catheters, Indwelling"}


def openi(root: Path, habit="archive", tgz=False) -> dict:
    "Open-i: an XML per exam, as files or in the archive, the films beside them under one of three habits of naming."
    put, documents = {}, {}
    for k, exam in enumerate(EXAMS):
        p, s, _, findings, impression, told, views = exam
        inside, outside = HABITS[habit]
        name = dict(p=100 * p + s, s=s)
        put[f"CXR{100 * p + s}"] = exam
        tails = ["2001" if v == "LATERAL" else "1001" for v in views]
        for t in tails: film(root / "pictures" / outside.format(t=t, **name))
        majors = [HEADINGS[n] for n, v in told.items() if v == 1]
        documents[f"ecgen-radiology/{100 * p + s}.xml"] = (
            '<?xml version="1.0" encoding="utf-8"?><eCitation><uId'
            f' id="CXR{100 * p + s}"/><MedlineCitation><Article><Abstract><AbstractText'
            ' Label="COMPARISON">None.</AbstractText>'
            f'<AbstractText Label="INDICATION">{HISTORY}</AbstractText><AbstractText'
            f' Label="FINDINGS">{findings}</AbstractText><AbstractText'
            f' Label="IMPRESSION">{impression}</AbstractText></Abstract></Article></MedlineCitation>'
            f'<MeSH>{"".join(f"<major>{m}</major>" for m in majors)}</MeSH>'
            + "".join(f'<parentImage id="{inside.format(t=t, **name)}"/>' for t in tails) + "</eCitation>"
        )
    for name, text in documents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    if tgz:
        with tarfile.open(root / "NLMCXR_reports.tgz", "w:gz") as tar:
            tar.add(root / "ecgen-radiology", "ecgen-radiology")
        for name in documents: (root / name).unlink()
    table(
        root / "indiana_projections.csv",
        ("uid", "filename", "projection"),
        [
            (100 * e[0] + e[1],
             HABITS["kaggle"][1].format(p=100 * e[0] + e[1], s=e[1], t="2001" if v == "LATERAL" else "1001"),
             "Lateral" if v == "LATERAL" else "Frontal")
            for e in EXAMS
            for v in e[6]
        ],
    )
    return put


def nih(root: Path) -> dict:
    "ChestX-ray14: a table under its own names, films in numbered folders, two lists, no reports; one film per study."
    words = {"Cardiomegaly": "Cardiomegaly", "Pleural Effusion": "Effusion", "Edema": "Edema",
             "No Finding": "No Finding", "Pneumonia": "Pneumonia", "Pneumothorax": "Pneumothorax"}
    rows, lists, put = [], {"train_val_list.txt": [], "test_list.txt": []}, {}
    for k, exam in enumerate(EXAMS):
        name = f"{exam[0]:08}_{exam[1]:03}.png"
        put[name[:-4]] = exam
        film(root / f"images_{1 + k % 3:03}/images/{name}")
        rows.append((name, "|".join(words[n] for n, v in exam[5].items() if v and n in words) or "Hernia", exam[1],
                     exam[0], 58, "M", "PA" if "PA" in exam[6] else "AP", 2682, 2749, 0.143, 0.143))
        lists["test_list.txt" if exam[2] == "test" else "train_val_list.txt"].append(name)
    table(
        root / "Data_Entry_2017.csv",
        ("Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender",
         "View Position", "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]"),
        rows,
    )
    for name, lines in lists.items(): (root / name).write_text("\n".join(lines) + "\n")
    return put


def chexpert_films(root: Path, release="CheXpert-v1.0-small", has_test=True) -> dict:
    "CheXpert, small or full: films, three tables with labels, no reports; the test table names studies."
    rows, put = {"train": [], "valid": [], "test": []}, {}
    names = sorted(LABELS)
    for p, s, split, _, _, told, views in EXAMS:
        official = "valid" if split == "validate" else split
        put[f"patient{p}_study{s}"] = (p, s, split, told, views)
        cells = ["" if told.get(n) is None else told[n] for n in names]
        for v, view in enumerate(views, 1):
            side = "Lateral" if view == "LATERAL" else "Frontal"
            path = f"{release}/{official}/patient{p}/study{s}/view{v}_{side.lower()}.jpg"
            film(root / path)
            rows[official].append((path, "Female", 60, side, "" if side == "Lateral" else view, *cells))
        if official == "test":
            del rows["test"][-len(views):]
            rows["test"].append((f"{release}/test/patient{p}/study{s}", *cells))
    for official in ("train", "valid"):
        table(root / f"{official}.csv", ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *names), rows[official])
    if has_test: table(root / "test_labels.csv", ("Study", *names), rows["test"])
    return put


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    "A small network that has learnt nothing, with its tokenizer."
    import torch
    from neural.build import Aggregation, save_aggregation
    from neural.report import train_tokenizer
    from neural.vlm import ReportVLM, small_config
    vlm = tmp_path_factory.mktemp("network") / "vlm"
    torch.manual_seed(0)
    tokenizer = train_tokenizer([f"{e[3]} {e[4]}" for e in EXAMS] * 5, vocab_size=90)
    ReportVLM(small_config(len(tokenizer), 96, width=32, d_model=32, layers=1)).save_pretrained(vlm)
    tokenizer.save_pretrained(vlm)
    save_aggregation(vlm, Aggregation(lift=False), None, 4, 40)
    return vlm


def assets_of(manifest, folder, vlm, track="image+report") -> dict:
    "Study id -> what its asset says: concept -> assertion."
    from neural.build import build_store
    store, lost = build_store(manifest, folder, vlm, track, workers=0)
    assert not len(lost) and sorted(store.ids) == sorted(s.study_id for s in manifest)
    return {
        a.study_id: {
            store.vocabulary[c]: ("present", "uncertain", "absent")[a.assertions[i]] for i, c in enumerate(a.concepts)}
        for a in store
    }


def check_round_trip(manifest, out, put, tmp_path, splits=None, labels=None):
    "What came out is what was put in: studies, evidence, labels, views, splits; on disk again, too."
    assert not len(out) and not out.parts and sorted(s.study_id for s in manifest) == sorted(put), (out.rows, out.parts)
    manifest.save(tmp_path / "m.csv")
    again = Manifest.load(tmp_path / "m.csv")
    assert again.studies == manifest.studies
    for name, (_, _, official, findings, impression, told, views) in put.items():
        s = again[name]
        assert s.split == (splits(name) if splits else official)
        assert (sorted(v.view for v in s.views) == sorted("lateral" if v == "LATERAL" else "frontal" for v in views)
                and s.frontal.view == "frontal")
        assert evidence(split_sections(report_text(again, s))) == "\n\n".join(t for t in (findings, impression) if t)
        if labels is None:assert s.labels == {n: told.get(n) for n in manifest.label_names}
        else: labels(s, told)
        assert all(again.image_path(v).is_file() for v in s.views)
    assert all("gout" not in evidence(split_sections(report_text(again, s))) for s in again)
    counts = again.counts()
    assert (counts["studies"], counts["radiographs"], counts["splits"]["test"]) == (
        len(put), sum(len(e[6]) for e in put.values()), sum(s.split == "test" for s in again))


SAID = {0: ("cardiomegaly", "present"), 3: ("pleural effusion", "present"), 4: ("pneumothorax", "absent")}


def check_assets(manifest, put, folder, vlm):
    said = assets_of(manifest, folder, vlm)
    for k, (concept, assertion) in SAID.items():
        name = next(n for n, e in put.items() if e is EXAMS[k])
        assert said[name].get(concept) == assertion, (name, said[name])


# each data set as it ships

def test_mimic_cxr_as_it_ships(tmp_path, network):
    put = mimic(tmp_path / "d")
    manifest, out = index_dataset("mimic-cxr", tmp_path / "d")
    check_round_trip(manifest, out, put, tmp_path)
    check_assets(manifest, put, tmp_path / "store", network)


def test_mimic_cxr_jpg_with_separate_reports(tmp_path, network):
    put = mimic(tmp_path / "jpg", ".jpg", tmp_path / "mimic-cxr-reports")
    manifest, out = index_dataset("mimic-cxr", tmp_path / "mimic-cxr-reports", images=tmp_path / "jpg")
    check_round_trip(manifest, out, put, tmp_path)
    check_assets(manifest, put, tmp_path / "store", network)


@pytest.mark.parametrize("dicom", [False, True])
def test_chexpert_plus_as_it_ships(tmp_path, network, dicom):
    put = chexpert(tmp_path / "d", dicom, whole=(3,))
    manifest, out = index_dataset("chexpert-plus", tmp_path / "d")
    official = lambda name: "test" if put[name][2] == "test" else split_of(name.split("_")[0], (0.9, 0.1, 0.0))
    check_round_trip(manifest, out, put, tmp_path, official)
    assert (manifest.label_source == "impression_fixed.json"
            and manifest.notes["reports read as a whole: findings and impression are blank"] == 1)
    texts = [report_text(manifest, s) for s in manifest if s.study_id != "patient3_study1"]
    # no code, no identifier, no signature
    assert not [t for t in texts if "ABNORMAL" in t or "77" in t or "looked at" in t]
    check_assets(manifest, put, tmp_path / "store", network)


@pytest.mark.parametrize("habit, tgz", [("archive", True), ("kaggle", False), ("plain", False)])
def test_open_i_as_it_ships(tmp_path, network, habit, tgz):
    put = openi(tmp_path / "d", habit, tgz)
    manifest, out = index_dataset("open-i", tmp_path / "d")
    def coded(s, told):
        for n, v in told.items():
            if v == 1 and n != "Support Devices": assert s.labels[n] == 1, (s.study_id, n)
        assert all(v in (1, 0, None) for v in s.labels.values()) and (s.labels["Fracture"] == 0) == any(
            v == 1 and n in HEADINGS for n, v in told.items())
    check_round_trip(manifest, out, put, tmp_path, split_of, coded)
    if habit == "archive": check_assets(manifest, put, tmp_path / "store", network)


def test_chest_x_ray_14_as_a_folder(tmp_path, network):
    put = nih(tmp_path / "d")
    table(tmp_path / "d/BBox_List_2017.csv", ("Image Index", "Finding Label"), [])
    manifest, out = index_dataset("folder", tmp_path / "d/Data_Entry_2017.csv", need_report=False)
    assert not len(out) and not out.parts and [s.study_id for s in manifest] == list(put)
    for name, exam in put.items():
        s = manifest[name]
        assert (s.patient_id, s.frontal.view, s.report) == (str(exam[0]), "frontal", "") and (s.split == "test") == (
            exam[2] == "test")
        assert {n for n, v in s.labels.items() if v == 1} == {
            n for n, v in exam[5].items() if v and n != "Support Devices"}
        # no word for it is not "absent"
        assert s.labels["Fracture"] is None and s.labels["Support Devices"] is None
    assert len({(s.patient_id, s.split) for s in manifest}) == 5
    assert assets_of(manifest, tmp_path / "store", network, "image-only").keys() == put.keys()
    with pytest.raises(NeuralError, match="'report_text' is missing"):
        index_dataset("folder", tmp_path / "d/Data_Entry_2017.csv")


@pytest.mark.parametrize("release", ["CheXpert-v1.0-small", "CheXpert-v1.0"])
def test_chexpert_as_it_ships(tmp_path, network, release):
    put = chexpert_films(tmp_path / "d", release)
    manifest, out = index_dataset("chexpert", tmp_path / "d", need_report=False)
    assert not len(out) and not out.parts and [s.study_id for s in manifest] == sorted(put)
    for name, (p, _, split, told, views) in put.items():
        s = manifest[name]
        assert (s.patient_id, s.split, s.report, s.frontal.view) == (f"patient{p}", split, "", "frontal")
        assert sorted(v.view for v in s.views) == sorted("lateral" if v == "LATERAL" else "frontal" for v in views)
        assert s.labels == {n: told.get(n) for n in manifest.label_names}        # a blank is unknown, -1 uncertain
    assert manifest.label_source == "train.csv, valid.csv, test_labels.csv"
    assert assets_of(manifest, tmp_path / "store", network, "image-only").keys() == put.keys()
    with pytest.raises(NeuralError, match="CheXpert ships no reports; .*--allow-no-report"):
        index_dataset("chexpert", tmp_path / "d")


def test_chexpert_without_its_test_set(tmp_path):
    put = chexpert_films(tmp_path, has_test=False)
    manifest, out = index_dataset("chexpert", tmp_path, need_report=False)
    at = {s.study_id: s.split for s in manifest}
    assert at["patient3_study1"] == "test" and {s for n, s in at.items() if n[:8] in ("patient1", "patient2")} <= {
        "train", "validate"}
    # films that no table names are listed, and stand in no split
    assert sorted(s for s, *_ in out) == ["patient4_study1", "patient5_study1"] == sorted(put)[-2:]


def test_chexpert_keeps_its_patients_apart(tmp_path):
    chexpert_films(tmp_path)
    lines = (tmp_path / "valid.csv").read_text()
    (tmp_path / "valid.csv").write_text(lines.replace("valid/patient3", "valid/patient1"))
    with pytest.raises(NeuralError, match="valid.csv row 2: patient1 is in train.csv too"):
        index_dataset("chexpert", tmp_path, need_report=False)


def test_chest_x_ray_14_as_it_ships(tmp_path):
    put = nih(tmp_path)
    head = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]", "", "", "")
    table(tmp_path / "BBox_List_2017.csv", head, [("00000001_001.png", "Cardiomegaly", 1, 2, 30.5, 4, "", "", "")])
    manifest, out = index_dataset("nih", tmp_path, need_report=False)
    assert not len(out) and [s.study_id for s in manifest] == list(put)
    assert [(b.label, b.x, b.w) for b in manifest["00000001_001"].frontal.boxes] == [("Cardiomegaly", 1, 30.5)]
    assert not manifest["00000002_001"].frontal.boxes
    assert {s.study_id for s in manifest if s.split == "test"} == {n for n, exam in put.items() if exam[2] == "test"}
    as_folder = index_dataset("folder", tmp_path / "Data_Entry_2017.csv", need_report=False)[0]
    assert [(s.study_id, s.split, s.labels) for s in as_folder] == [(s.study_id, s.split, s.labels) for s in manifest]
    with pytest.raises(NeuralError, match="ships no reports"): index_dataset("nih", tmp_path)
    (tmp_path / "test_list.txt").unlink()
    with pytest.raises(NeuralError, match="not both at the top"): index_dataset("nih", tmp_path, need_report=False)


def test_the_shipped_trees_in_two_numbers(tmp_path):
    "Twice the tree is twice the list, whatever the layout: nothing is counted twice, nothing is left behind."
    for layout, make in (("mimic-cxr", mimic), ("chexpert-plus", chexpert), ("open-i", openi)):
        make(tmp_path / layout)
        manifest, _ = index_dataset(layout, tmp_path / layout)
        assert not [
            k for k in manifest.notes if "lies twice" in k or "lacks" in k or "no report names" in k], manifest.notes


# a look-alike is not the real thing

@pytest.mark.parametrize(
    "cells, want",
    [
        (dict(section_findings="Toy.", section_impression="", section_summary="1-NORMAL"), "FINDINGS: Toy."),
        (dict(section_impression="Toy.", section_end_of_impression="3-ABNORMAL\nSigned."), "IMPRESSION: Toy."),
        (
            dict(
                section_impression="2-ABNORMAL, PREVIOUSLY REPORTED", section_findings="  ", report="IMPRESSION: whole."
            ),
            "IMPRESSION: whole.",
        ),
        (dict(section_impression="nan", section_findings="nan", report="FINDINGS: whole."), "FINDINGS: whole."),
        (dict(section_impression="1-NO PNEUMOTHORAX.", report="other"), "IMPRESSION: 1-NO PNEUMOTHORAX."),
        (dict(section_impression="Toy.", section_history="IMPRESSION: of last year."),
         "HISTORY: IMPRESSION: of last year.\nIMPRESSION: Toy."),
        (dict(section_accession_number="12345", section_narrative="Chest", report=""), "NARRATIVE: Chest"),
    ],
)
def test_what_a_row_hands_on(cells, want):
    assert row_text({c: "" for c in PLUS if c.startswith("section")} | cells) == want


# ids

@pytest.mark.parametrize(
    "wanted, there, want",
    [(["50000001", "50000002"], ["50000001.0", "50000002.0"], {"50000001": "50000001.0", "50000002": "50000002.0"}),
     (["7", "8"], ["007", "s8"], {"7": "007", "8": "s8"}),
     (["CXR12", "CXR13"], ["12", "13.00"], {"CXR12": "12", "CXR13": "13.00"}), (["1", "01"], ["1.0"], {}),
     (["1"], ["1.0", "01"], {}), (["1"], ["1", "01"], {"1": "1"}), (["1.5"], ["1"], {}), (["a.0"], ["a"], {})],
)
def test_ids_agree_where_only_one_can_be_meant(wanted, there, want):
    assert match_ids(wanted, there) == want


def test_float_ids_are_ids_in_every_table(tmp_path):
    put = mimic(tmp_path / "d", float_ids=True)
    check_round_trip(*index_dataset("mimic-cxr", tmp_path / "d"), put, tmp_path)


def folder(root: Path, rows, header="image,report_text,patient_id", make=True) -> Path:
    (root).mkdir(parents=True, exist_ok=True)
    (root / "manifest.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    for r in rows if make else ():
        film(root / Path(r.split(",")[0]).as_posix()) if r.split(",")[0].endswith(".png") else None
    return root


SIX = [f"f{i}.png,FINDINGS: Toy {i}.,p{i}" for i in range(6)]


@pytest.mark.parametrize(
    "ids, known",
    [(["f0", "f1", "f2"], 3), (["x1", "x2", "x3"], None), (["f0", "x1", "x2", "x3"], None), (["0.0", "1.0"], 0)])
def test_labels_meet_studies_or_are_refused(tmp_path, ids, known):
    root = folder(tmp_path / "d", SIX)
    labels = table(tmp_path / "l.csv", ("study_id", "Edema"), [(i, 1) for i in ids])
    if not known:
        with pytest.raises(NeuralError, match="of 6 studies agree.*on the one side 'f") as told:
            index_dataset("folder", root, labels=labels)
        assert str(told.value).count("'") >= 2 * 5
    else:
        manifest, out = index_dataset("folder", root, labels=labels)
        assert manifest.counts()["labels"]["Edema"] == {"1": known, "unknown": 6 - known} and not len(out)
        assert (out.parts == [(f"f{i}", "no label row: labels unknown", "", "label") for i in range(known, 6)]
                and manifest.notes["no label row: labels unknown"] == 6 - known)


def test_label_rows_of_no_study_are_counted_and_an_empty_file_is_refused(tmp_path):
    root = folder(tmp_path / "d", SIX)
    manifest, _ = index_dataset(
        "folder", root,
        labels=table(tmp_path / "l.csv", ("study_id", "Edema"), [*((f"f{i}", 1) for i in range(6)), ("z", 1)]))
    assert manifest.notes == {"label rows of no study": 1}
    with pytest.raises(NeuralError, match="agree with the 0 label rows"):
        index_dataset("folder", root, labels=table(tmp_path / "e.csv", ("study_id", "Edema"), []))


# one record does not stop the rest, and does not vanish

@pytest.mark.parametrize(
    "values, edema, torn",
    [(("1", "0"), None, True), (("1", "-1"), None, True), (("", "1"), 1.0, False), (("0", "0"), 0.0, False),
     (("1", "0", "1"), None, True)],
)
def test_rows_that_contradict_each_other_leave_one_label_unknown(tmp_path, values, edema, torn):
    rows = [f"v{i}.png,FINDINGS: Toy.,p1,s1,{v},1" for i, v in enumerate(values)]
    manifest, out = index_dataset(
        "folder", folder(tmp_path / "d", rows, "image,report_text,patient_id,study_id,Edema,Pneumonia"))
    assert (manifest["s1"].labels["Edema"] == edema and manifest["s1"].labels["Pneumonia"] == 1
            and len(manifest["s1"].views) == len(values))
    assert out.parts == ([("s1", module.TORN, "Edema", "label")] if torn else []) and out.check(1, 0) == 0


def test_views_of_chexpert_plus_labelled_differently(tmp_path):
    chexpert(tmp_path)
    path = tmp_path / "chexbert_labels/impression_fixed.json"
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    lines[1]["Cardiomegaly"] = 0.0
    lines[1]["Edema"] = 1.0
    path.write_text("\n".join(map(json.dumps, lines)))
    manifest, out = index_dataset("chexpert-plus", tmp_path)
    labels = manifest["patient1_study1"].labels
    assert (labels["Cardiomegaly"] is None and labels["Edema"] == 1 and labels["Pleural Effusion"] == 0
            and len(manifest) == 6)
    assert out.parts == [("patient1_study1", module.TORN, "Cardiomegaly", "label")] and manifest.notes[module.TORN] == 1


def test_a_film_named_twice(tmp_path):
    twice = [*SIX, SIX[0]]
    manifest, out = index_dataset("folder", folder(tmp_path / "a", twice))
    assert (len(manifest) == 6 and all(len(s.views) == 1 for s in manifest) and manifest.notes == {"rows repeated": 1}
            and not len(out))
    claimed = folder(tmp_path / "b",
                     [f"f{i}.png,FINDINGS: Toy {i}.,p{i},s{i}" for i in range(6)] + ["f0.png,FINDINGS: Other.,p9,s9"],
                     "image,report_text,patient_id,study_id")
    manifest, out = index_dataset("folder", claimed)
    assert ({s for s, *_ in out} == {"s0", "s9"} and out.counts() == {"radiograph claimed by two studies": 2}
            and len(manifest) == 5)
    mimic(tmp_path / "m")
    split = tmp_path / "m/mimic-cxr-2.0.0-split.csv.gz"
    rows = gzip.decompress(split.read_bytes()).decode().splitlines()
    split.write_bytes(
        gzip.compress(
            "\n".join([*rows, rows[1], rows[1].replace(",50000000,10000001,train", ",50000004,10000004,test")]).encode()
        )
    )
    manifest, out = index_dataset("mimic-cxr", tmp_path / "m")
    assert {p[:2] for p in out.parts} == {("50000000", "radiograph claimed by two studies"),
                                          ("50000004", "radiograph claimed by two studies")}
    assert list(out) == [("50000000", "only laterals", "")] and len(manifest["50000004"].views) == 1


def test_studies_on_disk_that_the_tables_lack(tmp_path):
    mimic(tmp_path / "m")
    film(tmp_path / "m/files/p10/p10000009/s59999999/odd.dcm")
    (tmp_path / "m/files/p10/p10000009/s59999998.txt").write_text("FINDINGS: Toy.")
    film(tmp_path / "m/files/p10/p10000001/s50000000/more.dcm")
    manifest, out = index_dataset("mimic-cxr", tmp_path / "m")
    assert (list(out) == [("59999998", "not in the split file", ""), ("59999999", "not in the split file", "")]
            and len(manifest) == 6)
    assert out.parts == [("50000000", "radiograph not in the split file", "more", "radiograph")]
    chexpert(tmp_path / "c")
    film(tmp_path / "c/PNG/train/patient99/study1/view1_frontal.png")
    film(tmp_path / "c/PNG/train/patient1/study1/view7_frontal.png")
    manifest, out = index_dataset("chexpert-plus", tmp_path / "c")
    assert list(out) == [("patient99_study1", "not in the table", "")] and out.parts == [
        ("patient1_study1", "radiograph not in the table", "view7_frontal", "radiograph")]
    openi(tmp_path / "o")
    film(tmp_path / "o/pictures/CXR999_IM-1-1001.png")
    assert index_dataset("open-i", tmp_path / "o")[0].notes["images on disk that no report names"] == 1
    folder(tmp_path / "f", SIX)
    film(tmp_path / "f/extra.png")
    assert index_dataset("folder", tmp_path / "f")[0].notes == {"images on disk that the table lacks": 1}


def test_one_name_two_exams(tmp_path):
    "Without a study id the stem names the study; two patients or two reports give away that it cannot."
    rows = ["a/1.png,FINDINGS: Toy a.,p1", "b/1.png,FINDINGS: Toy b.,p2", "a/2.png,FINDINGS: Toy.,p3",
            "b/2.png,FINDINGS: Other.,p3", "a/3.png,FINDINGS: Toy.,p4", "b/3.png,FINDINGS: Toy.,p4"]
    manifest, out = index_dataset("folder", folder(tmp_path / "d", rows))
    assert [s.study_id for s in manifest] == ["3"] and len(manifest["3"].views) == 2
    assert (out.counts() == {"one image name, two reports": 1, "one study, two patients": 1}
            and "study_id" in dict((s, d) for s, _, d in out)["2"])


def test_two_patients_and_two_reports_of_one_id(tmp_path):
    put = openi(tmp_path / "o")
    (tmp_path / "o/ecgen-radiology/copy.xml").write_bytes((tmp_path / "o/ecgen-radiology/101.xml").read_bytes())
    (tmp_path / "o/ecgen-radiology/other.xml").write_text(
        (tmp_path / "o/ecgen-radiology/201.xml").read_text().replace("Possible", "No"))
    manifest, out = index_dataset("open-i", tmp_path / "o")
    assert ([s for s, *_ in out] == ["CXR201"] and out.counts() == {"one id, two reports": 1}
            and manifest.notes["reports repeated"] == 1 and len(manifest) == len(put) - 1)
    mimic(tmp_path / "m")
    copy = tmp_path / "m/copy"
    copy.mkdir()
    (copy / "s50000000.txt").write_bytes(next((tmp_path / "m").rglob("s50000000.txt")).read_bytes())
    (copy / "s50000001.txt").write_text("FINDINGS: Other.")
    manifest, out = index_dataset("mimic-cxr", tmp_path / "m")
    assert (list(out) == [("50000001", "missing report", "")]
            and [p[:2] for p in out.parts] == [("50000001", "two reports of one name")]
            and "50000000" in {s.study_id for s in manifest})


def test_a_film_without_metadata_is_unknown_and_listed(tmp_path):
    mimic(tmp_path)
    meta = tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz"
    rows = gzip.decompress(meta.read_bytes()).decode().splitlines()
    meta.write_bytes(gzip.compress("\n".join(rows[:-2]).encode()))
    manifest, out = index_dataset("mimic-cxr", tmp_path)
    assert (list(out) == [("50000005", "no known frontal", "ViewPosition is blank or neither PA nor AP")]
            and [p[1] for p in out.parts] == ["radiograph without a metadata row: view unknown"] * 2)
    meta.write_bytes(gzip.compress("\n".join(rows[:3]).replace("00000", "11111").encode()))
    with pytest.raises(NeuralError, match="of 9 films of the split file agree with the 2 rows of the metadata"):
        index_dataset("mimic-cxr", tmp_path)


def test_rows_without_patient_or_image_are_listed(tmp_path):
    manifest, out = index_dataset(
        "folder",
        folder(tmp_path / "d", [*SIX, "g.png,FINDINGS: Toy.,", ",FINDINGS: Toy.,p8", "h.png,FINDINGS: Toy.,nan", ",,"]))
    assert len(manifest) == 6 and [(s, r) for s, r, _ in out] == [
        ("g", "no patient id"), ("row 9", "no image named"), ("h", "no patient id")]


@pytest.mark.parametrize(
    "make, layout, why",
    [
        (lambda d: mimic(d, ".jpg", d.parent / "elsewhere"), "mimic-cxr", "mimic-cxr-reports.zip.*--images FILMS"),
        (lambda d: [f.unlink() for f in (mimic(d) and d).rglob("*.dcm")], "mimic-cxr", "no film .* --images"),
        (lambda d: [f.rename(f.with_name(f"x{f.name}")) for f in list((mimic(d) and d).rglob("*.dcm"))], "mimic-cxr",
         "0 of 9 films of the split file agree with the 9 films on disk: on the one side '0.*on the other 'x0"),
        (
            lambda d: [
                f.rename(f.with_name(f"view9{f.name[5:]}")) for f in list((chexpert(d) and d).rglob("view*.png"))],
            "chexpert-plus",
            "films of the table agree",
        ),
        (lambda d: [f.unlink() for f in (openi(d) and d).rglob("*.png")], "open-i", "no film"),
        (lambda d: [f.rename(f.with_name(f"Z{i}.png")) for i, f in enumerate(list((openi(d) and d).rglob("*.png")))],
         "open-i", "films of the reports agree"),
        (lambda d: [f.rename(f.with_name(f"z{f.name}")) for f in list((folder(d, SIX)).glob("*.png"))], "folder",
         "0 of 6 films of the table agree with the 6 films on disk"),
        (lambda d: folder(d, []), "folder", "holds no row"),
    ],
)
def test_a_join_that_matches_nothing_is_refused(tmp_path, make, layout, why):
    make(tmp_path / "d")
    with pytest.raises(NeuralError, match=why) as told: index_dataset(layout, tmp_path / "d")
    assert "\n" not in str(told.value) and "{" not in str(told.value)


def test_a_part_of_a_data_set_is_welcome(tmp_path):
    "One study of six on disk: the split file is larger than the disk, and nothing is wrong with that."
    mimic(tmp_path)
    for s in range(1, 6):
        for f in [*tmp_path.rglob(f"s5000000{s}.txt"), *tmp_path.rglob(f"s5000000{s}/*.dcm")]: f.unlink()
    manifest, out = index_dataset("mimic-cxr", tmp_path)
    assert len(manifest) == 1 and out.counts() == {"missing image": 5} and not out.parts


# tables and reports in other codes

@pytest.mark.parametrize(
    "data, why",
    [
        ("image,report_text,patient_id\na.png,FINDINGS: \u201cclear\u201d.,p1\n".encode("cp1252"),
         r"\(line 2\), most likely it is Windows-1252; save it as"),
        ("image,report_text,patient_id\na.png,x,p1\n".encode("utf-16"), "most likely it is UTF-16"),
        ("image,report_text,patient_id\na.png,x,p1\n".encode("utf-16-le"), "most likely it is UTF-16"),
        ("image,report_text,patient_id\na.png,x,p1\n".encode("utf-32"), "most likely it is UTF-32"),
        (b"image;report_text;patient_id\na.png;x;p1\n", "parted by ';', save the table with commas"),
        (b"image\treport_text\tpatient_id\na.png\tx\tp1\n", "parted by"),
        (b"image,patient_id,image\na.png,p1,b.png\n", "'image' is there twice"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary"),
        (b"image,report_text,patient_id\na.png,\"" + b"x" * 200_000 + b"\",p1\n", "field larger than field limit"),
    ],
)
def test_a_table_in_another_code_is_refused_by_name(tmp_path, data, why):
    film(tmp_path / "a.png")
    (tmp_path / "manifest.csv").write_bytes(data)
    with pytest.raises(NeuralError, match=why) as told: index_dataset("folder", tmp_path)
    assert "\n" not in str(told.value) and "manifest.csv" in str(told.value) and "checksum" not in str(told.value)


def test_a_table_with_a_mark_and_blank_rows_is_read(tmp_path):
    film(tmp_path / "a.png")
    (tmp_path / "manifest.csv").write_bytes(
        "\ufeffimage, report_text ,patient_id\r\na.png,FINDINGS: naïve.,p1\r\n,,\r\n\r\n".encode())
    manifest, out = index_dataset("folder", tmp_path)
    assert len(manifest) == 1 and not len(out) and report_text(manifest, manifest["a"]) == "FINDINGS: naïve."


@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_report_file_in_any_of_four_codes(tmp_path, code):
    mimic(tmp_path)
    next(tmp_path.rglob("s50000000.txt")).write_bytes("FINDINGS: The heart is \u201cenlarged\u201d.".encode(code))
    manifest, _ = index_dataset("mimic-cxr", tmp_path)
    assert report_text(manifest, manifest["50000000"]) == "FINDINGS: The heart is \u201cenlarged\u201d."


# paths and links

@pytest.mark.parametrize("named", ["./f0.png", ".//f0.png", "sub/../f0.png", "sub//f0.png", "sub/./f0.png", " f0.png "])
def test_a_path_is_one_file_however_it_is_written(tmp_path, named):
    folder(tmp_path, SIX)
    film(tmp_path / "sub/f0.png")
    table(tmp_path / "manifest.csv", ("image", "report_text", "patient_id"), [(named, "FINDINGS: Toy.", "p1")])
    if ".." in named:
        with pytest.raises(NeuralError, match=r"manifest.csv row 2: path 'sub/\.\./f0.png' leaves the root"):
            index_dataset("folder", tmp_path)
        return
    manifest, _ = index_dataset("folder", tmp_path)
    assert (manifest["f0"].frontal.image == ("sub/f0.png" if "sub" in named else "f0.png")
            and report_text(manifest, manifest["f0"]) == "FINDINGS: Toy.")


def test_films_on_another_disk(tmp_path):
    "`files` is a link to another disk: refused with words that work when they are followed."
    put = mimic(tmp_path / "d")
    (tmp_path / "disk").mkdir()
    (tmp_path / "d/files").rename(tmp_path / "disk/files")
    (tmp_path / "d/files").symlink_to(tmp_path / "disk/files")
    with pytest.raises(NeuralError, match="'files': a link leads it out.*--images: ") as told:
        index_dataset("mimic-cxr", tmp_path / "d")
    advised = str(told.value).rpartition("--images: ")[2]
    manifest, out = index_dataset("mimic-cxr", tmp_path / "d", images=advised)
    check_round_trip(manifest, out, put, tmp_path)
    folder(tmp_path / "own", [f"films/{r}" for r in SIX], make=False)
    (tmp_path / "own/films").symlink_to(tmp_path / "disk2")
    for r in SIX: film(tmp_path / "disk2" / r.split(",")[0])
    manifest, out = index_dataset("folder", tmp_path / "own", images=tmp_path / "disk2")
    assert len(manifest) == 6 and manifest["f0"].frontal.image == "f0.png" and not len(out)


def test_a_link_leads_only_where_the_user_said(tmp_path):
    mimic(tmp_path / "d")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/s5.txt").write_text("x")
    (tmp_path / "d/way").symlink_to(tmp_path / "secret")
    with pytest.raises(NeuralError, match="'way': a link leads it out"):
        index_dataset("mimic-cxr", tmp_path / "d", images=tmp_path / "d/files")
    (tmp_path / "d/way").unlink()
    (tmp_path / "d/ring").symlink_to(tmp_path / "d/ring")
    with pytest.raises(NeuralError, match="in a circle"): walk(tmp_path / "d")
    (tmp_path / "d/ring").unlink()
    (tmp_path / "d/up").symlink_to(tmp_path)
    # once here, once by the link, and no further
    assert len([p for p in walk(tmp_path / "d", also=(tmp_path,)) if p.endswith("s50000000.txt")]) == 2


def test_a_moved_data_set_is_found_again(tmp_path, network):
    folder(tmp_path / "d", SIX)
    manifest, _ = index_dataset("folder", tmp_path / "d")
    manifest.save(tmp_path / "m.csv")
    (tmp_path / "d").rename(tmp_path / "moved")
    with pytest.raises(NeuralError, match="root 'd': not a folder here; if the data set has moved.*--root.*m.json"):
        Manifest.load(tmp_path / "m.csv")
    assert Manifest.load(tmp_path / "m.csv", root=tmp_path / "moved").studies == manifest.studies
    said = CliRunner().invoke(
        app,
        ["build", str(tmp_path / "m.csv"), str(tmp_path / "st"), "--vlm", str(network), "--workers", "0", "--root",
         str(tmp_path / "moved")],
    )
    assert said.exit_code == 0 and "6 assets" in said.stdout
    with pytest.raises(NeuralError, match="not a folder here"): Manifest.load(tmp_path / "m.csv", root="")


def test_a_manifest_sorted_by_a_spreadsheet_reads_right(tmp_path):
    rows = [f"v{i}.png,FINDINGS: Toy {i % 3}.,p{i % 3},s{i % 3}" for i in range(6)]
    manifest, _ = index_dataset("folder", folder(tmp_path / "d", rows, "image,report_text,patient_id,study_id"))
    manifest.save(tmp_path / "m.csv")
    lines = (tmp_path / "m.csv").read_text().splitlines()
    (tmp_path / "m.csv").write_text("\n".join([lines[0], *sorted(lines[1:], key=lambda x: x.split(",")[4])]) + "\n")
    again = Manifest.load(tmp_path / "m.csv")
    assert {s.study_id: set(s.views) for s in again} == {s.study_id: set(s.views) for s in manifest} and [
        report_text(again, s) for s in again] == [f"FINDINGS: Toy {i}." for i in range(3)]
    for bad in ("train", "test"):
        (tmp_path / "m.csv").write_text(
            (tmp_path / "m.csv").read_text().replace(f",{again['s1'].split},", f",{bad},", 1))
    with pytest.raises(NeuralError): Manifest.load(tmp_path / "m.csv")
    (tmp_path / "p.csv").write_text("\n".join(f"{i},{x}" if i else f",{x}" for i, x in enumerate(lines)) + "\n")
    with pytest.raises(NeuralError, match="a column without a name; remove it .in pandas"):
        Manifest.load(tmp_path / "p.csv", root=tmp_path / "d")


# options: zero, empty and default are three things

@pytest.mark.parametrize(
    "options, why",
    [(dict(extra_labels=("",)), "none blank"), (dict(extra_labels="airspace_mesh"), "give a list"),
     (dict(fractions=(0.5, 0.5)), "three shares"), (dict(fractions=(float("nan"), 0.5, 0.5)), "sum to 1"),
     (dict(labels=""), "no such file"), (dict(images=""), "not a folder"),
     (dict(views="manifest.csv"), "is for open-i"), (dict(images="nowhere"), "not a folder")],
)
def test_an_option_that_says_nothing_is_refused(tmp_path, options, why):
    with pytest.raises(NeuralError, match=why): index_dataset("folder", folder(tmp_path, SIX), **options)


@pytest.mark.parametrize("fractions", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0, 0.5)])
def test_a_share_of_zero_stays_empty(tmp_path, fractions):
    manifest, _ = index_dataset("folder", folder(tmp_path, SIX), fractions=fractions)
    assert [len(manifest.of(s)) > 0 for s in ("train", "validate", "test")] <= [f > 0 for f in fractions] and all(
        len(manifest.of(s)) == 0 for s, f in zip(("train", "validate", "test"), fractions) if f == 0)


# nothing is lost

def neural(*words):
    said = CliRunner().invoke(app, [*map(str, words)])
    assert said.exit_code in (0, 1, 2) and "Traceback" not in said.output
    return said


def bytes_in(root: Path) -> dict:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_an_index_inside_the_data_takes_another_name(tmp_path, monkeypatch):
    folder(tmp_path, SIX)
    before = bytes_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    said = neural("index", "folder", ".")
    assert said.exit_code == 0 and "manifest: neural-manifest.csv" in said.stdout, said.output
    assert {k: v for k, v in bytes_in(tmp_path).items() if k in before} == before and len(
        Manifest.load("neural-manifest.csv")) == 6
    # our own files are no table of the folder
    again = neural("index", "folder", ".")
    assert (again.exit_code == 0 and "in place of the same" in again.stdout
            and {k: v for k, v in bytes_in(tmp_path).items() if k in before} == before)


@pytest.mark.parametrize(
    "goal",
    ["d/manifest.csv", "d/link.csv", "d/hard.csv", "d/boxes.csv", "labels.csv", "alias/manifest.csv", "notes.csv",
     "dangling.csv", "other.txt", "d", "exclusions.csv", "gone/x.json"],
)
@pytest.mark.parametrize("flag", [(), ("--force",)])
def test_an_index_never_writes_over_what_it_reads_or_did_not_make(tmp_path, monkeypatch, goal, flag):
    root = folder(tmp_path / "d", SIX)
    monkeypatch.chdir(tmp_path)
    (root / "link.csv").symlink_to(root / "manifest.csv")
    os.link(root / "manifest.csv", root / "hard.csv")
    (tmp_path / "alias").symlink_to(root)
    (tmp_path / "dangling.csv").symlink_to("nowhere.csv")
    table(root / "boxes.csv", ("image", "label", "x", "y", "w", "h"), [])
    (tmp_path / "notes.json").write_text("{}")
    # begins as a manifest of ours does, and is read
    table(tmp_path / "labels.csv", ("study_id", *COLUMNS[1:], "Edema"), [(f"f{i}", *[""] * 8, 1) for i in range(6)])
    before = bytes_in(tmp_path)
    said = neural("index", "folder", "d", "-o", goal, "--labels", "labels.csv", *flag)
    assert said.exit_code in (1, 2) and said.stdout == "" and len(said.stderr.strip().splitlines()) == 1, said.output
    assert bytes_in(tmp_path) == before and not (tmp_path / "gone").exists()


def test_what_was_edited_takes_a_flag(tmp_path, monkeypatch):
    folder(tmp_path / "d", SIX)
    monkeypatch.chdir(tmp_path)
    assert neural("index", "folder", "d", "-o", "m.csv").exit_code == 0
    other = folder(tmp_path / "e", SIX[:5])
    said = neural("index", "folder", other, "-o", "m.csv")
    assert (said.exit_code == 0 and "in place of a manifest of 6 studies of d" in said.stdout
            and len(Manifest.load("m.csv")) == 5)
    text = Path("m.csv").read_text().replace(",train,", ",test,")
    Path("m.csv").write_text(text)
    before = bytes_in(tmp_path)
    refused = neural("index", "folder", "d", "-o", "m.csv")
    assert refused.exit_code == 1 and "--force" in refused.stderr and bytes_in(tmp_path) == before
    assert neural("index", "folder", "d", "-o", "m.csv", "--force").exit_code == 0 and len(Manifest.load("m.csv")) == 6
    Path("exclusions.csv").write_text("study_id,reason,detail,what\nf9,looked at by hand,,study\n")
    assert (
        neural("index", "folder", "e", "-o", "m.csv").exit_code == 1 and "by hand" in Path("exclusions.csv").read_text()
    )


def test_a_refused_index_writes_nothing(tmp_path, monkeypatch):
    root = folder(tmp_path / "d", SIX)
    (root / "f0.png").unlink()
    monkeypatch.chdir(tmp_path)
    before = bytes_in(tmp_path)
    said = neural("index", "folder", "d", "-o", "new/m.csv")
    assert (said.exit_code == 1 and "1 of 6 studies left out (16.7%, limit 5.0%: missing image 1)" in said.stderr
            and "--limit 1" in said.stderr and said.stdout == "" and bytes_in(tmp_path) == before
            and not (tmp_path / "new").exists())
    assert (neural("index", "folder", "d", "-o", "new/m.csv", "--limit", "0").exit_code == 1
            and not (tmp_path / "new").exists())
    assert neural("index", "folder", "d", "-o", "new/m.csv", "--limit", "1").exit_code == 0 and list(
        Exclusions.load("new/exclusions.csv")) == [("f0", "missing image", "")]


def test_a_labels_file_means_the_one_that_was_typed(tmp_path, monkeypatch):
    "The same relative name lies under the root, too: the command takes the one seen from here."
    root = folder(tmp_path / "d", SIX)
    monkeypatch.chdir(tmp_path)
    table(root / "l.csv", ("study_id", "Edema"), [(f"f{i}", 0) for i in range(6)])
    table(tmp_path / "l.csv", ("study_id", "Edema"), [(f"f{i}", 1) for i in range(6)])
    assert neural(
        "index", "folder", "d/manifest.csv", "-o", "m.csv", "--labels", "l.csv"
    ).exit_code == 0 and Manifest.load("m.csv").counts()["labels"]["Edema"] == {"1": 6}


def test_the_summary_counts_what_was_noted(tmp_path, monkeypatch):
    folder(tmp_path / "d", [*SIX, SIX[0]])
    monkeypatch.chdir(tmp_path)
    assert "noted          1 rows repeated" in neural("index", "folder", "d", "-o", "m.csv").stdout


class Killed(BaseException): pass


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("at", range(6))
def test_killed_at_any_write_rows_and_json_belong_together(tmp_path, monkeypatch, call, at):
    old, new = folder(tmp_path / "old", SIX[:3]), folder(tmp_path / "new", SIX)
    write_index(*index_dataset("folder", old), tmp_path / "m.csv")
    writes, real = [], getattr(os, call)
    def dying(*a):
        writes.append(a)
        if len(writes) > at: raise Killed
        return real(*a)
    made = index_dataset("folder", new)
    monkeypatch.setattr(os, call, dying)
    try: write_index(*made, tmp_path / "m.csv")
    except Killed: pass
    monkeypatch.undo()
    again = Manifest.load(tmp_path / "m.csv")
    assert (len(again), again.root.name) in ((3, "old"), (6, "new")) and all(
        again.image_path(s.frontal).is_file() for s in again)
    assert not list(tmp_path.glob(".*"))
    # and the next one mends it
    assert write_index(*made, tmp_path / "m.csv", force=True) and Manifest.load(tmp_path / "m.csv").root.name == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_disk_that_refuses_is_told_and_changes_nothing(tmp_path, monkeypatch, number, call):
    root = folder(tmp_path / "d", SIX)
    monkeypatch.chdir(tmp_path)
    assert neural("index", "folder", "d", "-o", "m.csv").exit_code == 0
    (root / "manifest.csv").write_text("\n".join(["image,report_text,patient_id", *SIX[:5]]) + "\n")
    before = bytes_in(tmp_path)
    def refuse(*a): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, call, refuse)
    said = neural("index", "folder", "d", "-o", "m.csv")
    monkeypatch.undo()
    assert (
        said.exit_code == 1 and os.strerror(number) in said.stderr and len(said.stderr.strip().splitlines()) == 1
    ), said.output
    assert bytes_in(tmp_path) == before and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_a_folder_that_cannot_be_read_is_named_with_the_system_s_reason(tmp_path, monkeypatch, number):
    folder(tmp_path / "d", SIX)
    def refuse(*a): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(module.os, "scandir", refuse)
    with pytest.raises(NeuralError, match=f"d: cannot be read, {os.strerror(number)}; "):
        index_dataset("folder", tmp_path / "d")


@pytest.mark.parametrize(
    "text", ["[]", '{"root": 3}', '{"before": {"sha256": 1}, "notes": []}', '{"root"', "\ufeffnull"])
def test_a_json_that_is_not_ours_is_refused(tmp_path, text):
    (tmp_path / "m.csv").write_text(",".join(COLUMNS) + "\n")
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(NeuralError, match="m.json"): read_side(tmp_path / "m.csv")
    assert made_here(tmp_path / "m.csv") and not made_here(tmp_path / "m.json")


def test_python_does_not_write_over_a_table_either(tmp_path):
    root = folder(tmp_path / "d", SIX)
    manifest, out = index_dataset("folder", root)
    before = bytes_in(root)
    for act in (lambda: manifest.save(root / "manifest.csv"), lambda: out.save(root / "manifest.csv"),
                lambda: manifest.save(root / "f0.png"), lambda: manifest.save(root / "m.json")):
        with pytest.raises(NeuralError): act()
    assert bytes_in(root) == before
    manifest.save(tmp_path / "m.csv")
    manifest.save(tmp_path / "m.csv")
    assert len(Manifest.load(tmp_path / "m.csv")) == 6


def test_exclusions_keep_parts_apart(tmp_path):
    out = Exclusions([("s1", "missing image", "")])
    out.add("s2", "rows contradict", "Edema", "label")
    out.save(tmp_path / "exclusions.csv")
    again = Exclusions.load(tmp_path / "exclusions.csv")
    assert ((again.rows, again.parts) == (out.rows, out.parts) and again.counts() == {"missing image": 1}
            and again.check(100) == 0.01)
    assert [r["what"] for r in read_table(tmp_path / "exclusions.csv")] == ["study", "label"]
    (tmp_path / "old.csv").write_text("study_id,reason,detail\ns1,missing image,\n")
    assert Exclusions.load(tmp_path / "old.csv").rows == out.rows


def test_a_film_that_is_gone_is_listed_where_its_study_stays(tmp_path):
    mimic(tmp_path / "m")
    chexpert(tmp_path / "c")
    openi(tmp_path / "o")
    gone = [
        next(f for f in sorted((tmp_path / "m").rglob("*.dcm")) if "s50000000" in str(f) and "00000001-0" in f.name),
        tmp_path / "c/PNG/train/patient1/study1/view2_lateral.png",
        tmp_path / "o/pictures/CXR101_101_IM-001011-2001.png"]
    for f in gone: f.unlink()
    for layout, name, film_id in (("mimic-cxr", "m", gone[0].stem), ("chexpert-plus", "c", "view2_lateral"),
                                  ("open-i", "o", "CXR101_IM-001011-2001")):
        manifest, out = index_dataset(layout, tmp_path / name)
        assert (len(manifest) == 6 and not len(out)
                and [(p[1], p[2]) for p in out.parts] == [("radiograph not on disk", film_id)]
                and manifest.notes["radiograph not on disk"] == 1)
    rows = ["a.png,FINDINGS: Toy.,p1,s1,front", "b.png,,p1,s1,PA"]
    root = folder(tmp_path / "f", rows, "image,report_text,patient_id,study_id,view")
    (root / "a.png").unlink()
    manifest, out = index_dataset("folder", root)
    assert (out.parts == [("s1", "radiograph not on disk", "manifest.csv row 2", "radiograph")]
            and report_text(manifest, manifest["s1"]) == "FINDINGS: Toy.")
    assert manifest.notes == {"views that are no word for frontal or lateral: unknown": 1, "radiograph not on disk": 1}


def test_a_mark_in_a_name_is_no_row(tmp_path):
    mimic(tmp_path / "d")
    (tmp_path / "d/files").rename(tmp_path / "d/batch #2")
    manifest, _ = index_dataset("mimic-cxr", tmp_path / "d")
    assert "enlarged" in report_text(manifest, manifest["50000000"])
    folder(tmp_path / "f", SIX)
    (tmp_path / "f/manifest.csv").rename(tmp_path / "f/no #1.csv")
    with pytest.raises(NeuralError, match="rename it"): index_dataset("folder", tmp_path / "f")


def test_films_that_are_links_to_another_disk(tmp_path):
    for r in SIX: film(tmp_path / "disk" / r.split(",")[0])
    root = folder(tmp_path / "d", SIX, make=False)
    for r in SIX: (root / r.split(",")[0]).symlink_to(tmp_path / "disk" / r.split(",")[0])
    with pytest.raises(NeuralError, match="a link leads it out") as told: index_dataset("folder", root)
    manifest, out = index_dataset("folder", root, images=str(told.value).rpartition("--images: ")[2])
    assert len(manifest) == 6 and not len(out)
