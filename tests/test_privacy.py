"""Identifiers planted wherever they could come from (DICOM headers, reports, file names, burnt-in text) must reach no
byte of a store."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pydicom
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from neural.asset import is_keyed, keyed_id
from neural.build import Packing, build_store, corners, fill_store, open_store
from neural.codec import fit_pq
from neural.cohort import toy_study
from neural.export import write_croissant
from neural.layouts import index_dataset
from neural.report import ReportReader, train_tokenizer
from neural.scores import Aggregation, Network, load_scoring, save_aggregation
from neural.study import Manifest, NeuralError
from neural.viewer import asset_page
from neural.vlm import ReportVLM, load_vlm, small_config

SECRETS = ["Zweistein", "Zwei^Albert", "1954-03-02", "19540302", "8812345", "1.2.840.113619.2.55.3.604688119", "Quux",
           "St Elsewhere", "ACC-77-1234", "p9999", "exam_0"]


def planted_film(path, toy):
    "A DICOM whose header names the patient in every field that has room."
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.StudyInstanceUID, ds.Modality = (
        "1.2.840.10008.5.1.4.1.1.1.1", SECRETS[5], SECRETS[5] + ".1", "DX")
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.AccessionNumber = (
        SECRETS[1], SECRETS[4], SECRETS[3], SECRETS[8])
    ds.ReferringPhysicianName, ds.InstitutionName, ds.StudyDescription, ds.PatientComments = (
        SECRETS[6], SECRETS[7], f"CHEST {SECRETS[0]}", f"{SECRETS[0]}, born {SECRETS[2]}")
    pixels = np.round(toy.image[0] * 4095).astype(np.uint16)
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelData = 16, 12, 11, pixels.tobytes()
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    "Eight studies with planted identifiers, and a network that has seen nothing."
    home = tmp_path_factory.mktemp("privacy")
    films = home / "Zweistein_8812345"
    films.mkdir()
    rows, texts = [], []
    for i in range(8):
        toy = toy_study("Pneumonia", size=132, seed=i)
        planted_film(films / f"exam_{i}_Zweistein_1954-03-02.dcm", toy)
        texts.append(
            f"FINDINGS: Mr. {SECRETS[0]} (MRN {SECRETS[4]}, born {SECRETS[2]}). {toy.report} IMPRESSION: Right lower"
            f" lobe pneumonia, told Dr. {SECRETS[6]} at {SECRETS[7]}.")
        rows.append(
            dict(image=f"{films.name}/exam_{i}_Zweistein_1954-03-02.dcm", report_text=texts[-1],
                 patient_id=f"p9999{i % 4}", study_id=f"exam_{i}", Pneumonia=i % 2)
        )
    pd.DataFrame(rows).to_csv(home / "manifest.csv", index=False)
    reader = ReportReader()
    tokenizer = train_tokenizer(texts * 3, vocab_size=150)
    torch.manual_seed(0)
    model = ReportVLM(small_config(len(tokenizer), 96, width=64, d_model=64, layers=1)).eval()
    vlm = home / "vlm"
    model.save_pretrained(vlm)
    tokenizer.save_pretrained(vlm)
    save_aggregation(vlm, Aggregation(lift=False), None, 4, 60)
    return home, index_dataset("folder", home)[0], vlm, model.encoder.num_features


def bytes_of(folder):
    "Everything in a folder: names, bytes, and what compression might hide."
    out = b""
    for p in sorted(folder.rglob("*")):
        if p.is_file():
            out += p.name.encode() + p.read_bytes()
            if p.suffix == ".parquet": out += repr(pq.read_table(p).to_pydict()).encode()
    return out


@pytest.mark.parametrize("track", ["image+report", "image-only"])
@pytest.mark.parametrize("codec", ["int8", "pq"])
def test_nothing_planted_reaches_a_store(cohort, tmp_path, track, codec):
    home, manifest, vlm, dim = cohort
    book = fit_pq(np.random.default_rng(0).normal(size=(400, dim)), 8) if codec == "pq" else None
    packing = Packing(codec, book, thumbnail=450, pixels=True, secret=b"0123456789abcdef", never=corners((12, 12)))
    store, left_out = build_store(manifest, tmp_path / "store", vlm, track, packing=packing, workers=0, progress=False)
    assert (
        len(store) == 8 and len(left_out) == 0 and all(a.thumbnail and a.pixels for a in store) and store.verify() == []
    )
    write_croissant(tmp_path / "store", "a store", description="phantoms", licence="CC0-1.0",
                    url="https://example.org", creator="nobody", published="2026-01-01")
    held = (bytes_of(tmp_path / "store") + b"".join(a.to_bytes() for a in store)
            + "".join(asset_page(a, store.vocabulary) for a in store).encode())
    for secret in SECRETS:
        assert secret.encode() not in held and secret.encode("utf-16-le") not in held, secret
    for word in (b"label", b"patient", b"StudyInstanceUID", str(home).encode()):
        assert word not in bytes_of(tmp_path / "store"), word


def test_corners_are_neither_retained_nor_shown(cohort, tmp_path):
    home, manifest, vlm, _ = cohort
    hidden = corners((12, 12), 2)
    store, _ = build_store(
        manifest, tmp_path / "store", vlm, packing=Packing(thumbnail=2000, never=hidden), workers=0, progress=False)
    from neural.picture import decode_picture
    for a in store:
        assert not set(a.patches.tolist()) & set(hidden)
        small = decode_picture(a.thumbnail, 96)[0]
        assert small[:12, :12].max() < 0.15 and small[-12:, -12:].max() < 0.15


def test_a_keyed_store_goes_on_where_it_stopped(cohort, tmp_path):
    home, manifest, vlm, _ = cohort
    packing = Packing(secret=b"0123456789abcdef")
    first, _ = build_store(manifest, tmp_path / "store", vlm, packing=packing, workers=0, progress=False)
    again, _ = build_store(manifest, tmp_path / "store", vlm, packing=packing, workers=0, progress=False)
    assert again.ids == first.ids and len(again.shards) == 1


KEY = b"0123456789abcdef"


@pytest.mark.parametrize("then", [None, b"another key of 32 bytes or so ...", b"0123456789abcdeX"])
def test_a_keyed_store_is_not_gone_on_with_under_another_key_or_none(cohort, tmp_path, then):
    home, manifest, vlm, _ = cohort
    part = Manifest(list(manifest)[:3], manifest.root, manifest.layout)
    build_store(part, tmp_path / "store", vlm, packing=Packing(secret=KEY), workers=0, progress=False)
    before = bytes_of(tmp_path / "store")
    with pytest.raises(NeuralError, match="key [0-9a-f]{16}, now ([0-9a-f]{16}|none)"):
        build_store(manifest, tmp_path / "store", vlm, packing=Packing(secret=then), workers=0, progress=False)
    assert bytes_of(tmp_path / "store") == before and KEY not in before and KEY.hex().encode() not in before
    whole, _ = build_store(manifest, tmp_path / "store", vlm, packing=Packing(secret=KEY), workers=0, progress=False)
    assert len(whole) == 8 and all(is_keyed(i) for i in whole.ids) and whole.verify() == []


def test_filling_a_keyed_store_by_hand_without_its_key_is_refused(cohort, tmp_path):
    "The parts that a build is made of keep the promise, too."
    home, manifest, vlm, _ = cohort
    store, _ = build_store(Manifest(list(manifest)[:3], manifest.root, manifest.layout), tmp_path / "store", vlm,
                           packing=Packing(secret=KEY, never=corners((12, 12))), workers=0, progress=False)
    network = Network(
        load_vlm(vlm), AutoTokenizer.from_pretrained(vlm, local_files_only=True), ReportReader(), load_scoring(vlm))
    todo, before = list(manifest)[3:], bytes_of(tmp_path / "store")
    for packing in (Packing(), Packing(secret=KEY), Packing(never=corners((12, 12)))):
        with pytest.raises(NeuralError, match="begun with other settings"):
            fill_store(store, manifest, todo, network, packing=packing, workers=0, progress=False)
    with pytest.raises(NeuralError, match="begun with other settings"):
        open_store(tmp_path / "store", network.reader, network.model, "image+report", {})
    plain, _ = build_store(manifest, tmp_path / "plain", vlm, workers=0, progress=False)
    with pytest.raises(NeuralError, match="holds keyed study ids"): store.append(list(plain))
    with pytest.raises(NeuralError, match="holds plain study ids"): plain.append(list(store))
    assert bytes_of(tmp_path / "store") == before


def test_what_a_keyed_build_leaves_out_names_nobody(cohort, tmp_path):
    home, manifest, vlm, _ = cohort
    films = [replace(s, views=(replace(s.views[0], image=s.views[0].image.replace("exam_", "gone_exam_")),))
             for s in list(manifest)[:3]]
    store, left = build_store(Manifest(films, manifest.root, manifest.layout), tmp_path / "store", vlm,
                              packing=Packing(secret=KEY), workers=0, progress=False)
    told = repr(left.rows)
    assert (len(left) == 3 and len(store) == 0 and {i for i, *_ in left} == {keyed_id(s.study_id, KEY) for s in films}
            and all(why == "film not readable" for _, why, _ in left))
    for secret in SECRETS: assert secret not in told, secret
    plain = build_store(
        Manifest(films, manifest.root, manifest.layout), tmp_path / "other", vlm, workers=0, progress=False)[1]
    assert all("gone_exam_" in detail for *_, detail in plain)
