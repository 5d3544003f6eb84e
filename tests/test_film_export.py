"Film models outside the house: the ONNX file and its card, eight bits, calibration, and the table of a folder."
import copy
import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from neural import films as chapter
from neural.cli import app
from neural.films import (FilmCalibration, calibrate_films, calibration_file, fit_calibration, is_film_table,
                          load_calibration, open_film_model, platt, predict_films, quantise_onnx, read_logits,
                          save_calibration, to_onnx, weights_hash, write_film_table)
from neural.image_model import ImageModel, load_image_model, save_image_model
from neural.mxa import vit_model
from neural.slim import Mask, find_units, network_digest, slimmed
from neural.study import Manifest, NeuralError, Study, View

LABELS = ("Cardiomegaly", "Pneumonia")
SMALL = dict(widths=(16, 32, 48), depths=(1, 1, 1), heads=(2, 2, 2))


def missing() -> str:
    "Why the cells and tests of ONNX cannot run here; empty where they can."
    try: chapter.extra("onnx"), chapter.extra("onnxruntime")
    except NeuralError as e: return str(e)
    return ""


onnx = pytest.mark.skipif(bool(missing()), reason=missing() or "there")


def taught(model):
    "A network that says something: no norm is silent, no head is nought."
    torch.manual_seed(0)
    for part in model.parameters():
        if part.ndim == 1: torch.nn.init.uniform_(part, -0.5, 1.0)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.eval()


def small(net="levels", **more):
    "One of the house's networks, small."
    if net == "levels": return taught(ImageModel(LABELS, 64, ((8,), (16,)), **more))
    if net.startswith("vit"): return taught(vit_model(LABELS, 64, box=net.partition("-")[2] or "none", **SMALL))
    return taught(ImageModel(LABELS, 64, net=net))


def film(path, seed, shape=(40, 36)):
    "A small picture."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A network in its folder, and films."
    place = tmp_path_factory.mktemp("films")
    save_image_model(small(), place / "net")
    for n in range(3): film(place / f"inbox/{n}.png", n)
    return place


# ONNX

@onnx
@pytest.mark.parametrize("net", ["levels", "efficientnet-lite0", "vit", "vit-se", "vit-cbam", "vit-learnt"])
def test_every_network_of_the_house_answers_the_same_abroad(net, tmp_path):
    model = small(net)
    made = to_onnx(model, tmp_path / "net.onnx")
    assert made["difference"] <= 1e-4 and made["bytes"] == (tmp_path / "net.onnx").stat().st_size
    abroad = open_film_model(tmp_path / "net.onnx")
    assert abroad.labels == LABELS and abroad.image_size == 64 and abroad.hash == made["hash"]
    for count in (1, 2, 3, 5):
        films = torch.rand(count, 1, 64, 64)
        with torch.no_grad(): ours = model.logits(films).numpy()
        assert np.ptp(ours) > 0.01, "a network that says the same of everything tests nothing"
        np.testing.assert_allclose(abroad.logits(films.numpy()), ours, atol=1e-4)


@onnx
def test_a_side_that_windows_do_not_divide_is_exported_too(tmp_path):
    model = taught(vit_model(LABELS, 160, widths=(16, 32, 48), depths=(1, 1, 1), heads=(2, 2, 2)))   # 10, 5 and 3 cells
    assert to_onnx(model, tmp_path / "net.onnx")["difference"] <= 1e-4


@onnx
def test_the_card_says_what_a_stranger_needs(tmp_path):
    import importlib
    model = small(pixel_mean=0.4, pixel_std=0.2)
    to_onnx(model, tmp_path / "net.onnx")
    save_image_model(model, tmp_path / "net")
    graph = importlib.import_module("onnx").load(tmp_path / "net.onnx")
    card = {p.key: p.value for p in graph.metadata_props}
    assert json.loads(card["labels"]) == list(LABELS) and card["image_size"] == "64"
    assert (card["pixel_mean"], card["pixel_std"]) == ("0.4", "0.2")
    assert card["note"] == "research software, not a diagnostic device" and "uncalibrated" in card["says"]
    assert card["weights"] == json.loads((tmp_path / "net/config.json").read_text())["weights_hash"]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@onnx
def test_a_slimmed_network_is_exported_like_any(tmp_path):
    model = small()
    kept = {layer.name: torch.arange(layer.units) < max(1, layer.units // 2) for layer in find_units(model)}
    less = slimmed(model, Mask(kept, network_digest(model)))
    made, whole = (to_onnx(net, tmp_path / name) for net, name in ((less, "less.onnx"), (model, "whole.onnx")))
    assert made["difference"] <= 1e-4 and made["bytes"] < whole["bytes"]


@onnx
@pytest.mark.parametrize("fault", ["batch of one", "scale"])
def test_an_export_that_answers_otherwise_is_never_written(fault, tmp_path):
    class Odd(ImageModel):
        "Says something that a trace of two films does not hold."
        def forward(self, films): return self.logits(films)
        def logits(self, films):
            said = super().logits(films)
            if fault == "scale": return said * (1 + 0.5 * (not torch.jit.is_tracing()))
            return said + (len(films) == 1) * 2e-4
    odd = small()
    odd.__class__ = Odd
    with pytest.raises(NeuralError, match="off by .*nothing is written"): to_onnx(odd, tmp_path / "odd.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(chapter, "extra", lambda name: None)
    with pytest.raises(NeuralError, match="the box 'released' loops over the films"):
        to_onnx(vit_model(LABELS, 64, box="released", **SMALL), tmp_path / "a.onnx")
    with pytest.raises(NeuralError, match="a Linear is no image model"):
        to_onnx(torch.nn.Linear(1, 1), tmp_path / "a.onnx")
    with pytest.raises(NeuralError, match="ends in .onnx"): to_onnx(small(), tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    def gone(name): raise ImportError(name)
    monkeypatch.setattr(chapter.importlib, "import_module", gone)
    (tmp_path / "a.onnx").write_bytes(b"x")
    for call in (lambda: to_onnx(small(), tmp_path / "b.onnx"), lambda: open_film_model(tmp_path / "a.onnx"),
                 lambda: quantise_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")):
        with pytest.raises(NeuralError, match=r"not installed: pip install 'neural-companion\[onnx\]'"): call()


@onnx
def test_export_leaves_the_network_and_other_files_alone(tmp_path):
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    to_onnx(model, tmp_path / "net.onnx")
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(NeuralError, match="replace it with force=True"): to_onnx(model, tmp_path / "net.onnx")
    to_onnx(model, tmp_path / "net.onnx", force=True)
    (tmp_path / "mine.onnx").write_text("mine")
    with pytest.raises(NeuralError, match="was not made by this command"):
        to_onnx(model, tmp_path / "mine.onnx", force=True)
    assert (tmp_path / "mine.onnx").read_text() == "mine"


@onnx
def test_another_programs_file_is_refused(tmp_path):
    helper = chapter.extra("onnx")
    to_onnx(small(), tmp_path / "net.onnx")
    graph = helper.load(tmp_path / "net.onnx")
    card = {p.key: p.value for p in graph.metadata_props}

    def variant(name, **changes):
        helper.helper.set_model_props(graph, {k: v for k, v in (card | changes).items() if v is not None})
        helper.save(graph, tmp_path / name)
        return tmp_path / name

    for changes, said in ((dict(kind="other"), "was not written by to_onnx"), (dict(labels="[]"), "do not belong"),
                          (dict(labels='["a", "b", "c"]'), "do not belong"), (dict(labels="["), "do not belong"),
                          (dict(image_size="96"), "do not belong"), (dict(image_size=None), "do not belong")):
        del graph.metadata_props[:]
        with pytest.raises(NeuralError, match=said): open_film_model(variant("odd.onnx", **changes))
    (tmp_path / "junk.onnx").write_bytes(os.urandom(2000))
    with pytest.raises(NeuralError, match="junk.onnx: onnxruntime cannot open it"):
        open_film_model(tmp_path / "junk.onnx")


@onnx
@pytest.mark.parametrize("static", [False, True])
def test_eight_bits_are_smaller_and_say_what_they_cost(static, tmp_path):
    model = taught(ImageModel(LABELS, 64, ((32, 32), (64, 64))))
    to_onnx(model, tmp_path / "net.onnx")
    films = np.random.default_rng(0).random((6, 1, 64, 64), np.float32)
    found = quantise_onnx(tmp_path / "net.onnx", tmp_path / "int8.onnx", films if static else None)
    assert found["bytes"] == (tmp_path / "int8.onnx").stat().st_size < 0.5 * found["bytes_before"]
    before, after = open_film_model(tmp_path / "net.onnx"), open_film_model(tmp_path / "int8.onnx")
    probes = films if static else np.random.default_rng(0).random((8, 1, 64, 64), np.float32)
    off = np.abs(before.logits(probes) - after.logits(probes))
    assert 0 < found["difference"] == pytest.approx(off.max(), rel=1e-3)
    assert after.labels == LABELS and after.alike == () and before.alike == (weights_hash(model),)
    assert after.card["precision"].startswith("int8") and after.card["made_from"] == before.hash
    with pytest.raises(NeuralError, match="name a float32 file"):
        quantise_onnx(tmp_path / "int8.onnx", tmp_path / "again.onnx")


# calibration

def made_up(n=3000, seed=0):
    "Logits that are three times too sure and too high, and the truth."
    rng = np.random.default_rng(seed)
    honest = rng.normal(-1, 1.5, n)
    return 3 * honest + 2, (rng.random(n) < 1 / (1 + np.exp(-honest))).astype(float)


def test_platt_finds_what_was_planted_and_never_turns_a_ranking_round():
    z, y = made_up()
    slope, offset = platt(z, y)
    assert slope == pytest.approx(1 / 3, abs=0.04) and offset == pytest.approx(-2 / 3, abs=0.12)
    assert 0 < platt(-z, y)[0] < 0.01
    assert np.isfinite(platt(np.arange(40.0), np.arange(40) > 19)).all()


def test_platt_agrees_with_a_logistic_regression():
    from sklearn.linear_model import LogisticRegression
    z, y = made_up(20000, 1)
    reference = LogisticRegression(C=1e6, tol=1e-8).fit(z[:, None], y)
    assert platt(z, y) == pytest.approx((reference.coef_[0, 0], reference.intercept_[0]), abs=2e-3)


def test_a_finding_of_which_too_little_is_known_keeps_its_sigmoid(place):
    model = open_film_model(place / "net")
    z, y = made_up(400)
    logits, truth = np.stack([z, z], 1), np.stack([y, np.where(np.arange(400) < 12, y, np.nan)], 1)
    found = fit_calibration(model, logits, truth)
    assert list(found.slopes) == ["Cardiomegaly"] and sum(found.known["Pneumonia"]) == 12
    said = found.probabilities(logits, LABELS)
    np.testing.assert_allclose(said[:, 1], 1 / (1 + np.exp(-z)), atol=1e-12)
    assert (np.argsort(said[:, 0], kind="stable") == np.argsort(z, kind="stable")).all()
    assert "except Pneumonia" in chapter.worth(found, LABELS)


def cohort(place, labels, split="validate"):
    "A manifest of small films."
    for n in range(len(labels)): film(place / f"{n:02}.png", n)
    return Manifest([Study(f"s{n}", f"p{n}", split, (View(f"{n:02}.png"),), labels={"Cardiomegaly": v})
                     for n, v in enumerate(labels)], place)


def test_calibration_reads_validate_alone_and_leaves_uncertain_and_blank_out(place, tmp_path):
    model = open_film_model(place / "net")
    known = calibrate_films(model, cohort(tmp_path, [0.0, 1.0] * 11 + [-1.0, None]))
    assert known.known["Cardiomegaly"] == [11, 11] and known.studies == 24 and known.model == model.hash
    for split in ("train", "test"):
        with pytest.raises(NeuralError, match="no validate study"):
            calibrate_films(model, cohort(tmp_path, [0.0, 1.0] * 11, split))
    with pytest.raises(NeuralError, match="nothing can be calibrated"):
        calibrate_films(model, cohort(tmp_path, [0.0, 1.0]))
    manifest = cohort(tmp_path, [0.0, 1.0] * 11)
    (tmp_path / "03.png").write_bytes(b"no film")
    assert calibrate_films(model, manifest).known["Cardiomegaly"] == [11, 10]


def test_a_calibration_is_kept_beside_its_network_and_checked(place, tmp_path):
    shutil.copytree(place / "net", tmp_path / "net")
    model = open_film_model(tmp_path / "net")
    assert load_calibration(model) is None
    mine = FilmCalibration(model.hash, {"Pneumonia": 0.5}, {"Pneumonia": -1.0}, 40, {"Pneumonia": [20, 20]})
    path = save_calibration(mine, model)
    assert load_calibration(model) == mine and path == calibration_file(model)
    load_image_model(tmp_path / "net")                                     # a network with it is still a network
    said = json.loads(path.read_text())
    for change in (dict(kind="x"), dict(slopes={"Pneumonia": -1}), dict(slopes={"Pneumonia": float("nan")}),
                   dict(slopes={"Fracture": 1}), dict(offsets={}), dict(slopes=[]), dict(model=None), dict(more=1),
                   dict(studies="many"), dict(slopes={"Pneumonia": True})):
        path.write_text(json.dumps(said | change))
        with pytest.raises(NeuralError, match="calibration.json"): load_calibration(model)
    for text in ("", "[]", "null", '{"kind"'):
        path.write_text(text)
        with pytest.raises(NeuralError, match="calibration.json"): load_calibration(model)
    with pytest.raises(NeuralError, match="was not made by this command"): save_calibration(mine, model, force=True)


@onnx
def test_an_export_takes_the_calibration_of_its_folder_and_eight_bits_do_not(place, tmp_path):
    to_onnx(load_image_model(place / "net"), tmp_path / "net.onnx")
    quantise_onnx(tmp_path / "net.onnx", tmp_path / "int8.onnx")
    home, abroad, eight = (open_film_model(p) for p in (place / "net", tmp_path / "net.onnx", tmp_path / "int8.onnx"))
    mine = FilmCalibration(home.hash, {"Pneumonia": 0.5}, {"Pneumonia": -1.0}, 40)
    ours, theirs = (predict_films(m, place / "inbox", mine) for m in (home, abroad))
    for (a, p, _), (b, q, _) in zip(ours, theirs, strict=True):
        assert a == b
        np.testing.assert_allclose(p, q, atol=1e-4)
    with pytest.raises(NeuralError, match="the calibration belongs to the network"):
        predict_films(eight, place / "inbox", mine)
    assert save_calibration(mine, abroad).name == "net.calibration.json" and load_calibration(abroad) == mine


# a folder of films

def test_films_are_read_as_training_read_them(place):
    from neural.radiograph import cache_radiographs
    model, paths = open_film_model(place / "net"), [place / f"inbox/{n}.png" for n in range(3)]
    cache, _ = cache_radiographs(zip("012", paths), place / "cache", 64, workers=0)
    with torch.no_grad(): ours = load_image_model(place / "net").logits(torch.from_numpy(cache.batch(["0", "1", "2"])))
    for workers in (0, 2):
        logits, reasons = read_logits(model, paths, workers)
        assert reasons == {}
        np.testing.assert_allclose(logits, ours.numpy(), atol=1e-5)


def test_one_film_that_cannot_be_read_stops_no_other(place, tmp_path):
    shutil.copytree(place / "inbox", tmp_path / "inbox")
    (tmp_path / "inbox/1.png").write_bytes((place / "inbox/1.png").read_bytes()[:200])
    (tmp_path / "inbox/note.txt").write_text("words")
    (tmp_path / "inbox/.hidden.png").write_text("words")
    film(tmp_path / "inbox/deep/er/SCAN.PNG", 7)
    shutil.copy(tmp_path / "inbox/0.png", tmp_path / "inbox/plain")            # by its first bytes
    model = open_film_model(place / "net")
    rows = predict_films(model, tmp_path / "inbox")
    assert [r[0] for r in rows] == ["0.png", "1.png", "2.png", "deep/er/SCAN.PNG", "plain"]
    assert [r[1] is None for r in rows] == [False, True, False, False, False] and rows[1][2].startswith("1.png: ")
    write_film_table(tmp_path / "t.csv", rows, model)
    with open(tmp_path / "t.csv", newline="") as f: table = list(csv.DictReader(f))
    assert list(table[0]) == ["film", *LABELS, "reason", "model", "note"]
    assert table[1]["Pneumonia"] == "" and table[1]["reason"] == rows[1][2]
    assert {r["note"] for r in table} == {"uncalibrated; research software, not a diagnostic device"}
    assert {r["model"] for r in table} == {model.hash} and is_film_table(tmp_path / "t.csv")


def test_paths_stay_under_the_folder(place, tmp_path):
    (tmp_path / "inbox").mkdir()
    film(tmp_path / "elsewhere/secret.png", 1)
    film(tmp_path / "inbox/a.png", 1)
    (tmp_path / "inbox/b.png").symlink_to(tmp_path / "inbox/a.png")
    model = open_film_model(place / "net")
    assert [r[0] for r in predict_films(model, tmp_path / "inbox")] == ["a.png", "b.png"]
    (tmp_path / "inbox/c.png").symlink_to(tmp_path / "elsewhere/secret.png")
    with pytest.raises(NeuralError, match="leads it out of the root"): predict_films(model, tmp_path / "inbox")


def test_a_network_that_says_nothing_finite_is_refused(tmp_path):
    model = small()
    with torch.no_grad(): model.head.bias[0] = float("nan")
    save_image_model(model, tmp_path / "net")
    film(tmp_path / "inbox/a.png", 1)
    with pytest.raises(NeuralError, match="not finite"):
        predict_films(open_film_model(tmp_path / "net"), tmp_path / "inbox")


def test_no_cell_of_a_table_is_a_formula_or_speaks_to_a_terminal(place, tmp_path):
    model = open_film_model(place / "net")
    write_film_table(tmp_path / "t.csv", [("=2+2.png", None, "=2+2.png: no\x1b[2J"), ("-a.png", [0.5, 0.5], ""),
                                          ("bad\udcff.png", [0.5, 0.5], "")], model)
    text = (tmp_path / "t.csv").read_text(encoding="utf-8")
    assert "\n=" not in text and "\n-" not in text and "\x1b" not in text and is_film_table(tmp_path / "t.csv")
    with pytest.raises(NeuralError, match="'note', as is a column"):
        write_film_table(tmp_path / "u.csv", [], open_named(tmp_path, ("note", "b")))
    assert not (tmp_path / "u.csv").exists()


def open_named(place, labels):
    "A network with other findings."
    save_image_model(ImageModel(labels, 64, ((8,), (16,))), place / "other")
    return open_film_model(place / "other")


# the command

def neural(*words):
    "The command as typed: status and what it said."
    answer = CliRunner().invoke(app, [str(w) for w in words])
    return answer.exit_code, answer.output


def test_the_command_tells_success_from_failure(place, tmp_path):
    status, said = neural("predict-films", place / "net", place / "inbox", "-o", tmp_path / "t.csv")
    assert status == 0 and "3 of 3 films" in said and "uncalibrated; research software, not a diagnostic device" in said
    before = (tmp_path / "t.csv").read_bytes()
    assert neural("predict-films", place / "net", place / "inbox", "-o", tmp_path / "t.csv")[0] == 1
    assert neural("predict-films", place / "net", place / "inbox", "-o", tmp_path / "t.csv", "--force")[0] == 0
    assert (tmp_path / "t.csv").read_bytes() == before
    (tmp_path / "mine.csv").write_text("film,note\n")
    assert neural("predict-films", place / "net", place / "inbox", "-o", tmp_path / "mine.csv", "--force")[0] == 1
    assert (tmp_path / "mine.csv").read_text() == "film,note\n"
    shutil.copytree(place / "inbox", tmp_path / "inbox")
    (tmp_path / "inbox/9.png").write_bytes(b"")
    status, said = neural("predict-films", place / "net", tmp_path / "inbox", "-o", tmp_path / "u.csv")
    assert status == 1 and "1 of 4 films could not be read, first 9.png" in said and is_film_table(tmp_path / "u.csv")


def test_the_command_calibrates_keeps_it_and_uses_it_next_time(place, tmp_path):
    shutil.copytree(place / "net", tmp_path / "net")
    (tmp_path / "data").mkdir()
    cohort(tmp_path / "data", [0.0, 1.0] * 11).save(tmp_path / "list.csv")
    call = "predict-films", tmp_path / "net", place / "inbox", "-o"
    assert neural(*call, tmp_path / "raw.csv")[0] == 0
    status, said = neural(*call, tmp_path / "a.csv", "--calibrate", tmp_path / "list.csv")
    assert status == 0 and "calibrated on 22 validate studies (Platt), except Pneumonia" in said
    assert not (tmp_path / "net/calibration.json").exists()
    status, said = neural(*call, tmp_path / "b.csv", "--calibrate", tmp_path / "list.csv", "--keep")
    assert status == 0 and "calibration.json" in said
    assert neural(*call, tmp_path / "c.csv")[0] == 0
    a, b, c, raw = ((tmp_path / f"{n}.csv").read_text() for n in ("a", "b", "c", "raw"))
    assert a == b == c != raw
    status, said = neural(*call, tmp_path / "d.csv", "--calibrate", tmp_path / "list.csv", "--keep")
    assert status == 1 and "there already" in said and not (tmp_path / "d.csv").exists()
    assert neural(*call, tmp_path / "d.csv", "--keep")[0] == 2


@onnx
def test_the_command_reads_an_exported_network(place, tmp_path):
    to_onnx(load_image_model(place / "net"), tmp_path / "net.onnx")
    status, said = neural("predict-films", tmp_path / "net.onnx", place / "inbox", "-o", tmp_path / "t.csv")
    assert status == 0 and open_film_model(tmp_path / "net.onnx").hash in said
    over = neural("predict-films", tmp_path / "net.onnx", place / "inbox", "-o", tmp_path / "net.onnx", "--force")
    assert over[0] == 1
    assert open_film_model(tmp_path / "net.onnx").labels == LABELS
