"""Datasets, splits and manifests: real Open-i, hostile manifests, a walk that stays linear, the phantom cohort in MIMIC
layout."""
import csv
import gzip
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neural import layouts as module
from neural.layouts import index_dataset, mesh_labels, openi_views, walk
from neural.study import (LABELS, SPLITS, Box, Exclusions, Manifest, NeuralError, Study, View, read_table, report_text,
                          split_of, targets)

SPLIT_HEADER = "dicom_id,study_id,subject_id,split\n"


def write(path: Path, text="x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz": path.write_bytes(gzip.compress(text.encode()))
    else: path.write_text(text)
    return path


def mimic(root: Path, studies=6, gz="", suffix=".jpg") -> Path:
    "A small tree in MIMIC-CXR's layout: a lateral that comes first by path, then the frontal."
    rows, meta, labels = [], [], []
    for i in range(studies):
        study, patient, split = 50 + i, 10000001 + i // 2, SPLITS[(i // 2) % 3]
        folder = root / f"files/p10/p{patient}/s{study}"
        write(folder.with_suffix(".txt"), f"FINDINGS: Toy {study}.")
        for name, view in ((f"a{i}", "LATERAL"), (f"b{i}", "AP")):
            write(folder / (name + suffix), name)
            rows.append(f"{name},{study},{patient},{split}")
            meta.append(f"{name},{view}")
        labels.append(f"{patient},{study},{('1.0', '0.0', '-1.0', '')[i % 4]}")
    write(root / f"mimic-cxr-2.0.0-split.csv{gz}", SPLIT_HEADER + "\n".join(rows) + "\n")
    write(root / f"mimic-cxr-2.0.0-metadata.csv{gz}", "dicom_id,ViewPosition\n" + "\n".join(meta) + "\n")
    write(root / f"mimic-cxr-2.0.0-chexpert.csv{gz}", "subject_id,study_id,Pneumonia\n" + "\n".join(labels) + "\n")
    return root


def one_study(**changes) -> Study:
    return replace(Study("s1", "p1", "train", (View("a.png", "frontal"),), "", {"Pneumonia": 1.0}), **changes)


# splits

def test_hash_split_is_the_same_everywhere():
    "Pinned by hand: a changed hash would move patients between train and test of every dataset without a split."
    assert [split_of(f"p{i}") for i in range(8)] == PINNED
    assert split_of("p1", salt="a") in SPLITS and {split_of("é", salt=str(i)) for i in range(40)} == set(SPLITS)


PINNED = ["validate", "train", "train", "train", "train", "train", "test", "validate"]


def test_adding_patients_moves_nobody(tmp_path):
    def index(n, name):
        root = tmp_path / name
        for i in range(n): write(root / f"{i}.png")
        write(root / "manifest.csv",
              "image,report_text,patient_id\n" + "".join(f"{i}.png,IMPRESSION: toy.,p{i // 3}\n" for i in range(n)))
        return {s.study_id: s.split for s in index_dataset("folder", root)[0]}
    small, large = index(60, "small"), index(120, "large")
    assert small == {k: large[k] for k in small} and len(set(large.values())) == 3


def test_patient_in_two_official_splits_is_refused(tmp_path):
    root = mimic(tmp_path)
    split = root / "mimic-cxr-2.0.0-split.csv"
    split.write_text(split.read_text() + "zz,99,10000001,test\n")
    with pytest.raises(NeuralError, match="line 14.*two splits"): index_dataset("mimic-cxr", root)


# labels

def test_blank_is_unknown_from_file_to_target(tmp_path):
    manifest, _ = index_dataset("mimic-cxr", mimic(tmp_path, studies=4))
    assert [s.labels["Pneumonia"] for s in manifest] == [1.0, 0.0, -1.0, None]
    assert all(s.labels["Edema"] is None for s in manifest)                      # a column that is not there is unknown
    manifest.save(tmp_path / "m.csv")
    again = Manifest.load(tmp_path / "m.csv")
    for policy, uncertain in (("ones", 1), ("zeros", 0), ("ignore", np.nan)):
        np.testing.assert_equal(
            targets(again, "Pneumonia", policy), np.array([1, 0, uncertain, np.nan], dtype=np.float32))


def test_named_labels_replace_the_dataset_s_own(tmp_path):
    root = mimic(tmp_path / "m", studies=4)
    write(root / "truth/labels.csv", "subject_id,study_id,Airspace Opacity\n10000001,50,1\n")
    manifest, _ = index_dataset("mimic-cxr", root, labels="truth/labels.csv")
    assert manifest.label_source == "labels.csv" and manifest["50"].labels["Lung Opacity"] == 1
    assert all(s.labels["Pneumonia"] is None for s in manifest)                  # nothing is left of the old source


def test_mesh_labels_never_invent_a_negative():
    assert set(mesh_labels([]).values()) == set(mesh_labels(["No Indexing"]).values()) == {None}
    fluid = mesh_labels(["Hydropneumothorax/left"])
    assert fluid["Pneumothorax"] == fluid["Pleural Effusion"] == 1 and fluid["Edema"] == 0
    assert (mesh_labels(["Pulmonary Edema"])["Lung Opacity"] is None
            and mesh_labels(["Infiltrate/lung"])["Pneumonia"] is None)
    assert mesh_labels(["Thickening/bronchovascular"])["Pleural Other"] == 0


# MIMIC-CXR

@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".jpg", ".dcm"])
def test_mimic_layout(tmp_path, gz, suffix):
    manifest, out = index_dataset("mimic-cxr", mimic(tmp_path, gz=gz, suffix=suffix))
    assert len(manifest) == 6 and len(out) == 0 and manifest.label_source == f"mimic-cxr-2.0.0-chexpert.csv{gz}"
    assert all(Path(s.frontal.image).name.startswith("b") for s in manifest)      # never the first path
    assert [len(manifest.of(s)) for s in SPLITS] == [2, 2, 2]
    assert report_text(manifest, manifest["53"]) == "FINDINGS: Toy 53."
    assert manifest.image_path(manifest["53"].frontal).read_text() == "b3"


def test_mimic_images_and_reports_in_two_trees(tmp_path):
    root = mimic(tmp_path / "jpg")
    for report in list(root.rglob("s*.txt")):
        target = tmp_path / "reports" / report.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        report.rename(target)
    manifest, out = index_dataset("mimic-cxr", tmp_path / "reports", images=root)
    assert len(manifest) == 6 and not len(out)
    manifest.save(tmp_path / "m.csv")
    again = Manifest.load(tmp_path / "m.csv")
    assert (again.image_root == root.resolve() and again.image_path(again["50"].frontal).is_file()
            and "Toy 50" in report_text(again, again["50"]))


def test_mimic_exclusions_are_counted_by_reason(tmp_path):
    root = mimic(tmp_path)
    next(root.rglob("s50.txt")).unlink()
    for gone in ("a1.jpg", "b1.jpg", "b2.jpg"): next(root.rglob(gone)).unlink()
    meta = root / "mimic-cxr-2.0.0-metadata.csv"
    meta.write_text(meta.read_text().replace("b3,AP", "b3,").replace("a3,LATERAL", "a3,"))
    manifest, out = index_dataset("mimic-cxr", root)
    assert (out.counts() == {"missing report": 1, "missing image": 1, "only laterals": 1, "no known frontal": 1}
            and len(manifest) == 2)
    assert {s for s, *_ in out} == {"50", "51", "52", "53"}
    with pytest.raises(NeuralError, match="4 of 6 studies left out"): out.check(6)
    out.save(tmp_path / "out.csv")
    assert list(Exclusions.load(tmp_path / "out.csv")) == list(out)
    assert len(index_dataset("mimic-cxr", root, need_report=False)[0]) == 3


def test_dicom_goes_before_jpeg_and_twins_belong_to_nobody(tmp_path):
    root = mimic(tmp_path)
    film = next(root.rglob("b0.jpg"))
    write(film.with_suffix(".dcm"), "deeper")
    assert index_dataset("mimic-cxr", root)[0]["50"].frontal.image.endswith("b0.dcm")
    write(film.with_suffix(".dcm").parent / "again" / "b0.dcm")
    # which of the two is meant? the study keeps its lateral, and that is not enough
    manifest, out = index_dataset("mimic-cxr", root)
    assert (out.parts == [("50", "radiograph lies twice on disk", "b0", "radiograph")]
            and list(out) == [("50", "only laterals", "")] and len(manifest) == 5)
    assert manifest.notes == {"radiograph lies twice on disk": 1}


def test_pa_goes_before_ap(tmp_path):
    root = mimic(tmp_path)
    meta = root / "mimic-cxr-2.0.0-metadata.csv"
    meta.write_text(meta.read_text().replace("a0,LATERAL", "a0,AP").replace("b0,AP", "b0,PA"))
    manifest, _ = index_dataset("mimic-cxr", root)
    assert [Path(v.image).stem for v in manifest["50"].views] == ["b0", "a0"]    # by path it would be a0


def test_mimic_needs_its_metadata(tmp_path):
    root = mimic(tmp_path)
    (root / "mimic-cxr-2.0.0-metadata.csv").unlink()
    with pytest.raises(NeuralError, match="metadata"): index_dataset("mimic-cxr", root)


def test_phantom_cohort_is_read_as_mimic(phantom_cohort):
    manifest, out = index_dataset("mimic-cxr", phantom_cohort)
    truth, _ = index_dataset("mimic-cxr", phantom_cohort, labels="truth/labels.csv")
    assert len(manifest) + len(out) == 60 and out.check(60) <= 0.05
    assert len({s.patient_id for s in manifest}) <= len(manifest) and set(manifest.label_names) == set(LABELS)
    assert all(v is not None for s in truth for v in s.labels.values())           # the truth knows everything
    assert any(v is None for s in manifest for v in s.labels.values())            # a report does not
    assert any(s.frontal.boxes for s in truth) and any(s.frontal.masks for s in truth)
    for s in truth:
        assert s.frontal.view == "frontal" and report_text(truth, s) and truth.image_path(s.frontal).is_file()
        assert all(truth.mask_path(m).is_file() and f"{s.study_id}__" in m for m in s.frontal.masks)
    truth.save(phantom_cohort.parent / "phantom.csv")
    assert Manifest.load(phantom_cohort.parent / "phantom.csv").studies == truth.studies


# one walk

def count_scans(monkeypatch, act) -> list:
    opened, scandir = [], os.scandir
    def counting(path):
        opened.append(os.path.realpath(path))
        return scandir(path)
    monkeypatch.setattr(module.os, "scandir", counting)
    act()
    monkeypatch.undo()
    return opened


def test_each_folder_is_opened_once(tmp_path, monkeypatch):
    for n in (6, 60):
        root = mimic(tmp_path / f"n{n}", studies=n)
        folders = {str(p.resolve()) for p in [root, *root.rglob("*")] if p.is_dir()}
        opened = count_scans(monkeypatch, lambda: index_dataset("mimic-cxr", root))
        assert len(opened) == len(folders) and set(opened) == folders


def test_no_study_looks_at_the_list_of_files(tmp_path, monkeypatch):
    "The listing is gone through a fixed number of times, however many studies there are."
    class Counted(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()
    seen, real = [], module.walk
    for n in (6, 60):
        passes, root = [], mimic(tmp_path / f"n{n}", studies=n)
        monkeypatch.setattr(module, "walk", lambda r: Counted(real(r)))
        index_dataset("mimic-cxr", root)
        seen.append(len(passes))
    assert seen[0] == seen[1] > 0


# refusals

HEADER = "study_id,patient_id,split,report,image,view,sha256,masks,boxes,Pneumonia\n"
GOOD = "s1,p1,train,,a.png,frontal,,,,1\n"


@pytest.mark.parametrize("rows, why", [
    ("s2,p1,test,,b.png,frontal,,,,1\n", "row 3: study s2: its patient is in two splits"),
    ("s2,p2,train,,/a/b.png,frontal,,,,1\n", "row 3: study s2: path '/a/b.png' leaves the root"),
    ("s2,p2,train,,../b.png,frontal,,,,1\n", "row 3: .*leaves the root"),
    ("s2,p2,train,../r.txt,b.png,frontal,,,,1\n", "row 3: .*leaves the root"),
    ("s2,p2,train,../r.tgz#1.xml,b.png,frontal,,,,1\n", "row 3: .*leaves the root"),
    ("s2,p2,train,,b.png,frontal,,/m.png,,1\n", "row 3: .*leaves the root"),
    ("s2,p2,train,,b.png,frontal,,,,1\ns1,p1,test,,c.png,frontal,,,,1\n", "row 4: study s1 appears twice"),
    ("s1,p2,train,,c.png,frontal,,,,1\n", "row 3: study s1 appears twice"),
    ("s2,p2,train,,a.png,frontal,,,,1\n", "row 3: .*used twice"),
    ("s2,p2,train,,b.png,frontal,,,,2\n", "row 3: Pneumonia: label value '2'"),
    ("s2,p2,train,,b.png,frontal,,,,yes\n", "row 3: Pneumonia: label value"),
    ("s2,p2,dev,,b.png,frontal,,,,1\n", "row 3: .*split 'dev'"),
    ("s2,p2,train,,b.png,up,,,,1\n", "row 3: .*view 'up'"),
    ("s2,,train,,b.png,frontal,,,,1\n", "row 3: .*blank study or patient"),
    ("s2,p2,train,,b.png,frontal,,,\"[[\"\"x\"\",0,0,0,1]]\",1\n", "row 3: boxes"),
    ("s2,p2,train,,b.png,frontal,,,\"{\"\"x\"\":1}\",1\n", "row 3: boxes"),
    ("s2,p2,train\n", "line 3: not as many cells"),
])
def test_broken_manifest_is_refused_with_its_row(tmp_path, rows, why):
    with pytest.raises(NeuralError, match=why) as told: Manifest.load(write(tmp_path / "m.csv", HEADER + GOOD + rows))
    assert "\n" not in str(told.value) and str(tmp_path) not in str(told.value)


def test_links_out_of_the_root_are_refused(tmp_path):
    write(tmp_path / "secret/a.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "way").symlink_to(tmp_path / "secret")
    (root / "a.png").symlink_to(tmp_path / "secret/a.png")
    for image in ("way/a.png", "a.png"):
        with pytest.raises(NeuralError, match="a link leads it out"):
            Manifest.load(write(tmp_path / "m.csv", HEADER + f"s1,p1,train,,{image},frontal,,,,1\n"), root=root)
        manifest = Manifest([one_study(views=(View(image, "frontal"),))], root)
        with pytest.raises(NeuralError, match="a link leads it out"): manifest.image_path(manifest["s1"].frontal)
    with pytest.raises(NeuralError, match="a link leads it out"): walk(root)
    inner = tmp_path / "inner"
    write(inner / "real/a.png")
    (inner / "b.png").symlink_to(inner / "real/a.png")
    assert walk(inner) == ["b.png", "real/a.png"]                                # a link that stays inside is fine


@pytest.mark.parametrize(
    "act, why",
    [
        (lambda root: index_dataset("dicomdir", root), "layout 'dicomdir' is not known; use one of mimic-cxr"),
        (lambda root: index_dataset("folder", root / "nowhere"), "not a folder"),
        (lambda root: index_dataset("folder", root), "CSV files at the top"),
        (lambda root: index_dataset("chexpert-plus", root), "no file named like"),
        (lambda root: index_dataset("open-i", root), "no XML report"),
        (lambda root: index_dataset("mimic-cxr", root, labels="none.csv"), "no such file"),
        (lambda root: index_dataset("folder", write(root / "o/manifest.csv", "image,report_text\na.png,x\n").parent),
         "'patient_id' is missing"),
        (
            lambda root: index_dataset(
                "folder", write(root / "p/manifest.csv", "image,report_text,patient_id\na.png,x,p\n").parent),
            "no study found",
        ),
        (
            lambda root: index_dataset(
                "folder", write(root / "q/manifest.csv", "image,report_text,patient_id\n../a.png,x,p\n").parent),
            "leaves the root",
        ),
        (lambda root: list(read_table(write(root / "t.csv.gz", "a\n1\n").rename(root / "binary.csv"))),
         "binary.csv: cannot be read"),
    ],
)
def test_index_refusals_are_one_line(tmp_path, act, why):
    with pytest.raises(NeuralError, match=why) as told: act(mimic(tmp_path))
    assert "\n" not in str(told.value) and str(tmp_path) not in str(told.value)


def test_truncated_tables_are_refused(tmp_path):
    whole = gzip.compress(b"a,b\n" + b"1,2\n" * 1000)
    (tmp_path / "cut.csv.gz").write_bytes(whole[:-12])
    with pytest.raises(NeuralError, match="cut.csv.gz: cannot be read"): list(read_table(tmp_path / "cut.csv.gz"))
    (tmp_path / "nul.csv").write_bytes(b"a,b\n\xff\xfe,2\n")
    with pytest.raises(NeuralError, match="nul.csv: cannot be read"): list(read_table(tmp_path / "nul.csv"))


def test_hostile_open_i(tmp_path):
    "Entities, oversized members and links in the archive do no harm; the readable study survives."
    body = ('<eCitation><uId id="CXR{0}"/><AbstractText'
            ' Label="FINDINGS">Toy.</AbstractText><MeSH><major>normal</major></MeSH><parentImage'
            ' id="CXR{0}_IM-1-1001"/></eCitation>')
    for i in (1, 2): write(tmp_path / f"pictures/CXR{i}_IM-1-1001.png")
    write(tmp_path / "x/1.xml", body.format(1))
    write(tmp_path / "x/2.xml",
          '<!DOCTYPE e [<!ENTITY a SYSTEM "file:///etc/hostname">]>' + body.format(2).replace("Toy.", "&a;"))
    manifest, out = index_dataset("open-i", tmp_path)
    assert [s.study_id for s in manifest] == ["CXR1"] and out.counts() == {"unreadable report": 1}
    write(tmp_path / "x/2.xml",
          '<!DOCTYPE e [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>' + body.format(2).replace("Toy.", "&b;"))
    assert index_dataset("open-i", tmp_path)[1].counts() == {"unreadable report": 1}
    with tarfile.open(write(tmp_path / "t/pictures/CXR1_IM-1-1001.png").parents[1] / "reports.tgz", "w:gz") as tar:
        info = tarfile.TarInfo("link.xml")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(info)
        tar.add(tmp_path / "x/1.xml", "../../1.xml")
    manifest, _ = index_dataset("open-i", tmp_path / "t")
    assert report_text(manifest, manifest["CXR1"]) == "FINDINGS: Toy." and not (tmp_path.parent / "1.xml").exists()


def test_oversized_member_is_refused_before_it_is_read(tmp_path):
    info = tarfile.TarInfo("1.xml")
    info.size = module.MAX_REPORT + 1
    with tarfile.open(tmp_path / "reports.tgz", "w:gz") as tar: tar.addfile(info, io.BytesIO(b" " * info.size))
    with pytest.raises(NeuralError, match="'1.xml' is too large"): index_dataset("open-i", tmp_path)


def test_manifest_round_trip_keeps_everything(tmp_path):
    films = (
        View("a,b.png", "frontal", "ab" * 32, ("m/x__Edema.png", "m/x__Pneumonia.png"),
             (Box("Edema", 1.5, 2, 3, 4), Box('a"b', 0, 0, 1, 1))),
        View("é.png"),
    )
    manifest = Manifest(
        [one_study(views=films, report="reports.tgz#x/1.xml", labels={"Pneumonia": -1.0, "Edema": None})], tmp_path,
        "folder", "by hand", notes={"n": 1})
    manifest.save(tmp_path / "m.csv")
    again = Manifest.load(tmp_path / "m.csv")
    assert again.studies == manifest.studies and (again.layout, again.label_source, again.notes) == (
        "folder", "by hand", {"n": 1})
    assert json.loads((tmp_path / "m.json").read_text())["counts"]["labels"]["Edema"] == {"unknown": 1}
    (tmp_path / "m.json").unlink()
    assert Manifest.load(tmp_path / "m.csv").root == tmp_path.resolve()
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(NeuralError, match="m.json: cannot be read"): Manifest.load(tmp_path / "m.csv")


def test_hash_files_pins_the_film(tmp_path):
    manifest, _ = index_dataset("mimic-cxr", mimic(tmp_path), hash_files=True)
    assert (len({v.sha256 for s in manifest for v in s.views}) == 12
            and not index_dataset("mimic-cxr", tmp_path)[0]["50"].frontal.sha256)


def test_films_are_hashed_side_by_side_and_each_folder_is_looked_at_once(tmp_path, monkeypatch):
    root, looked, real = mimic(tmp_path / "m", studies=40), [], os.path.islink
    big = next(root.rglob("b0.jpg"))
    big.write_bytes(os.urandom(3 * 2**20 + 1))                # more than one buffer
    monkeypatch.setattr(module.os.path, "islink", lambda p: (looked.append(str(p)), real(p))[1])
    manifest, _ = index_dataset("mimic-cxr", root, hash_files=True)
    assert len(looked) == len(set(looked))
    for s in manifest:
        for v in s.views: assert v.sha256 == hashlib.sha256((root / v.image).read_bytes()).hexdigest()


def test_a_film_that_goes_while_it_is_hashed_stops_the_index_in_one_line(tmp_path, monkeypatch):
    root, real = mimic(tmp_path), module.hashed
    monkeypatch.setattr(module, "hashed", lambda *a: (next(root.rglob("b3.jpg")).unlink(), real(*a))[1])
    with pytest.raises(NeuralError, match="b3.jpg: cannot be read") as e:
        index_dataset("mimic-cxr", root, hash_files=True)
    assert "\n" not in str(e.value)


# the data cards

def test_every_layout_has_a_card_that_names_its_command():
    cards = Path(__file__).resolve().parents[1] / "data_manifests"
    for layout in module.LAYOUTS:
        text = (cards / f"{layout}.md").read_text()
        assert text.startswith("---\n") and f"neural index {layout} " in text
    assert "neural phantom" in (cards / "phantom.md").read_text()


# real data

def test_real_open_i(real_data):
    images = real_data / "real_cxr_dev/openi256"
    manifest, out = index_dataset("open-i", real_data, images=images, views=real_data / "real_cxr_dev/manifest.csv",
                                  extra_labels=("airspace_mesh",))
    counts = manifest.counts()
    assert (counts["studies"], counts["radiographs"], len(out)) == (1151, 1201, 0)
    assert all(
        report_text(manifest, s).startswith(("FINDINGS", "IMPRESSION", "INDICATION", "COMPARISON")) for s in manifest)
    assert counts["labels"]["airspace_mesh"]["1"] == 93 and counts["labels"]["Cardiomegaly"]["1"] == 110
    archive, _ = index_dataset("open-i", real_data / "openi_xml_dev.tgz", images=images,
                               views=real_data / "real_cxr_dev/manifest.csv", extra_labels=("airspace_mesh",))
    assert archive.studies == manifest.studies                                   # the archive itself may be the root
    # without a table of views: the rule on the ids
    ruled, lost = index_dataset("open-i", real_data, images=images)
    assert len(ruled) + len(lost) == 1151 and set(lost.counts()) == {"only laterals"} and lost.check(1151) < 0.05


def test_real_view_rule(real_data):
    "The rates stated in the chapter."
    seen = Counter()
    for row in read_table(real_data / "openi_reports.csv.gz"):
        truth = dict(p.split("=") for p in row["image_views"].split(";") if p)
        ids = [i for i in row["image_ids"].split(";") if i]
        seen.update((guess, truth[i].lower()) for i, guess in zip(ids, openi_views(ids)) if i in truth)
    for view in ("frontal", "lateral"):
        assert seen[view, view] / (seen[view, "frontal"] + seen[view, "lateral"]) > 0.94
    assert (seen["", "frontal"] + seen["", "lateral"]) / sum(seen.values()) < 0.15


def test_real_mesh_agrees_with_the_reference_columns(real_data):
    agree = Counter()
    for row in read_table(real_data / "openi_reports.csv.gz"):
        labels = mesh_labels(row["mesh_major"].split(";"), ("airspace_mesh",))
        if labels["airspace_mesh"] is not None:
            agree["airspace", labels["airspace_mesh"] == float(row["airspace_mesh"])] += 1
        if row["pneumonia"] and labels["Pneumonia"] is not None:
            agree["pneumonia", labels["Pneumonia"] == float(row["pneumonia"])] += 1
    assert agree["airspace", False] == 0 and agree["pneumonia", False] <= 2 and agree["pneumonia", True] > 1800


def test_real_folder_as_it_is(real_data):
    root = real_data / "real_cxr_dev"
    with open(root / "manifest.csv", newline="", encoding="utf-8") as f: rows = list(csv.DictReader(f))
    manifest, out = index_dataset("folder", root, extra_labels=("airspace_mesh",))
    laterals = {Path(r["image"]).stem for r in rows if r["view"] == "lateral"}
    silent = {Path(r["image"]).stem for r in rows if not r["report_text"]}
    assert (out.counts() == {"missing report": len(silent), "only laterals": len(laterals)}
            == {"missing report": 107, "only laterals": 50})
    everything, _ = index_dataset("folder", root, need_report=False)
    films = {v.image: (s, v) for s in everything for v in s.views}
    assert set(films) == {r["image"] for r in rows if r["view"] != "lateral"}
    for r in rows:
        if r["image"] not in films: continue
        s, v = films[r["image"]]
        assert s.labels["Pneumonia"] == (float(r["pneumonia"]) if r["pneumonia"] else None) and len(v.boxes) == int(
            r["boxes"] or 0)
        assert len(v.masks) == len([m for m in r["masks"].split(";") if m])
    assert sum(len(s.views) > 1 for s in everything) == 2                         # one film at two sizes, twice
    assert report_text(manifest, manifest.studies[0]) == rows[0]["report_text"].strip()
    assert len({(s.patient_id, s.split) for s in everything}) == len({s.patient_id for s in everything})


def test_real_manifest_survives_the_disk(real_data, tmp_path):
    manifest, _ = index_dataset("folder", real_data / "real_cxr_dev", need_report=False, hash_files=False)
    manifest.save(tmp_path / "real.csv")
    again = Manifest.load(tmp_path / "real.csv")
    assert again.studies == manifest.studies and report_text(again, again.studies[5]) == report_text(
        manifest, manifest.studies[5])


@pytest.mark.parametrize("name", ["index_dataset", "LAYOUTS", "walk", "mesh_labels", "openi_views"])
def test_a_name_that_moved_is_found_with_a_word_about_its_home(name):
    from neural import study
    assert name in study.MOVED
    with pytest.warns(DeprecationWarning, match=f"{name} is in neural.layouts now"):
        assert getattr(study, name) is getattr(module, name)


# data that have moved

def far(home: Path, reports="", films=6) -> Path:
    "A manifest whose six films lie on a disk of their own."
    studies = [
        one_study(study_id=f"s{i}", patient_id=f"p{i}",
                  views=(View(f"films/{i}.png", "frontal"), View(f"films/{i}b.png", "lateral")),
                  report=reports and f"{reports}/{i}.txt")
        for i in range(6)
    ]
    for i in range(films): write(home / f"disk1/films/{i}.png")
    (home / "disk1").mkdir(exist_ok=True)
    Manifest(studies, home / "disk1", "folder", "by hand", notes={"rows": 12}).save(home / "m.csv", made="once")
    return home / "m.csv"


def test_a_manifest_is_told_where_its_data_lie_now_and_nothing_else_changes(tmp_path):
    path = far(tmp_path)
    (tmp_path / "disk1").rename(tmp_path / "disk2")
    rows, side = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    with pytest.raises(NeuralError, match="not a folder here"): Manifest.load(path)
    Manifest.reroot(path, tmp_path / "disk2")
    now = json.loads(path.with_suffix(".json").read_text())
    assert (path.read_bytes() == rows and now == side | {"root": str(tmp_path / "disk2")} and list(now)[0] == "root"
            and now["made"] == "once")
    assert Manifest.load(path).root == tmp_path / "disk2" and Manifest.load(path).notes == {"rows": 12}
    # still known as ours, so it may be replaced
    Manifest.load(path).save(path)
    path.with_suffix(".json").unlink()
    Manifest.reroot(path, tmp_path / "disk2")
    assert Manifest.load(path).root == tmp_path / "disk2"


def test_films_that_moved_apart_from_their_reports(tmp_path):
    path = far(tmp_path, "text")
    for i in range(6): write(tmp_path / f"disk1/text/{i}.txt", f"FINDINGS: Toy {i}.")
    (tmp_path / "disk2").mkdir()
    (tmp_path / "disk1/films").rename(tmp_path / "disk2/films")
    Manifest.reroot(path, image_root=tmp_path / "disk2")
    m = Manifest.load(path)
    assert ((m.root, m.image_root) == (tmp_path / "disk1", tmp_path / "disk2")
            and m.image_path(m["s3"].frontal).is_file() and report_text(m, m["s3"]) == "FINDINGS: Toy 3.")
    # the films stay where they are
    (tmp_path / "disk1").rename(tmp_path / "disk3")
    Manifest.reroot(path, tmp_path / "disk3")
    m = Manifest.load(path)
    assert (m.root, m.image_root) == (tmp_path / "disk3", tmp_path / "disk2")
    before = path.with_suffix(".json").read_bytes()
    with pytest.raises(
        NeuralError, match="'disk2' holds 0 of 6 reports; not there: text/0.txt, text/1.txt, text/2.txt;"):
        Manifest.reroot(path, tmp_path / "disk2")
    assert path.with_suffix(".json").read_bytes() == before


@pytest.mark.parametrize("films", [0, 2, 3, 6])
def test_a_folder_without_half_of_the_films_is_not_where_they_lie(tmp_path, films):
    path = far(tmp_path, films=films)
    before = path.with_suffix(".json").read_bytes()
    (tmp_path / "disk1").rename(tmp_path / "disk2")
    if films >= 3:
        Manifest.reroot(path, tmp_path / "disk2")
        assert Manifest.load(path).root == tmp_path / "disk2"
        return
    gone = ", ".join(f"films/{i}.png" for i in range(films, films + 3))
    with pytest.raises(NeuralError) as said: Manifest.reroot(path, tmp_path / "disk2")
    assert f"'disk2' holds {films} of 6 first radiographs of its studies; not there: {gone}; name the folder" in str(
        said.value) and "\n" not in str(said.value)
    assert path.with_suffix(".json").read_bytes() == before


def test_a_manifest_with_reports_in_an_archive_and_a_table_moves_too(tmp_path):
    refs = ("t.tgz#1.xml", "t.csv#a.png", "12#1.txt")
    studies = [
        one_study(study_id=f"s{i}", patient_id=f"p{i}", views=(View(f"{i}.png"),), report=r) for i, r in enumerate(refs)
    ]
    for i, r in enumerate(("t.tgz", "t.csv", "12#1.txt")):
        write(tmp_path / "films" / f"{i}.png")
        write(tmp_path / "new" / r)
    (tmp_path / "old").mkdir()
    Manifest(studies, tmp_path / "old", image_root=tmp_path / "films").save(tmp_path / "m.csv")
    Manifest.reroot(tmp_path / "m.csv", tmp_path / "new")
    assert Manifest.load(tmp_path / "m.csv").root == tmp_path / "new"
