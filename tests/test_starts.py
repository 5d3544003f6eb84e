"""Starts: trained at equal passes, chosen on validate, resumed, refused when made otherwise, and left out where no
weights are."""
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from neural import starts
from neural.cli import app, stage_values
from neural.cohort import write_cohort
from neural.image_model import EfficientNetLite
from neural.layouts import index_dataset
from neural.starts import (LITE, PLAIN, WARM, bench_starts, new_network, start_parts, start_settings, start_tables,
                           training_file)
from neural.study import NeuralError
from neural.yardstick import is_tables, read_tables

STAGES = ["10_finetune", "53_controls"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    home = tmp_path_factory.mktemp("starts")
    write_cohort(home / "cohort", 80, 96, 5)
    index_dataset("mimic-cxr", home / "cohort", labels="truth/labels.csv")[0].save(home / "manifest.csv")
    return home / "manifest.csv"


@pytest.fixture(scope="module")
def settings():
    values = stage_values("open-i", STAGES)
    return start_settings(values, epochs=1, findings=["Pneumonia", "Pleural Effusion"], image_size=96)


@pytest.fixture
def no_weights(monkeypatch):
    def missing(name): raise NeuralError("the ImageNet weights are not installed")
    monkeypatch.setattr(starts, "packaged_file", missing)


def test_settings_are_those_of_the_preset_and_passes_are_equal():
    found = start_settings(stage_values("open-i", STAGES))
    assert found["findings"] == ["Cardiomegaly", "Pleural Effusion", "Lung Opacity", "Atelectasis", "No Finding"]
    assert (found["image_size"], found["coarse"], found["epochs"], found["batch_size"]) == (192, 0.6, 6, 16)
    with pytest.raises(NeuralError, match="some findings"):
        start_settings(stage_values("open-i", STAGES) | {"targets_audited": []})


def test_the_two_efficientnets_differ_in_their_weights_alone():
    net = new_network(LITE, ["Edema"], 96)
    assert isinstance(net.net, EfficientNetLite) and net.config["stride"] == 16
    if starts.weights_missing(): pytest.skip("the extra [warmstart] is not installed")
    warm = new_network(WARM, ["Edema"], 96)
    assert warm.config == net.config
    assert [p.shape for p in warm.parameters()] == [p.shape for p in net.parameters()]
    first = [next(m.net.parameters()) for m in (warm, net)]
    assert not torch.equal(*first)


def test_without_weights_the_row_is_left_out_and_said_so(manifest, settings, no_weights, tmp_path, capsys):
    tables = bench_starts(manifest, settings, [0], [3e-3], tmp_path, workers=1)
    assert set(tables["auc"].start) == {PLAIN, LITE} and set(tables["differences"].difference) == {
        f"{LITE} less {PLAIN}"}
    assert f"left out: {WARM}: the ImageNet weights are not installed" in capsys.readouterr().out


def test_a_finished_training_is_not_made_again_and_another_is_refused(
    manifest, settings, no_weights, tmp_path, monkeypatch
):
    first = bench_starts(manifest, settings, [0], [3e-3], tmp_path, workers=1)
    monkeypatch.setattr(starts, "one_training", lambda *_: pytest.fail("made again"))
    assert bench_starts(manifest, settings, [0], [3e-3], tmp_path, workers=1)["auc"].equals(first["auc"])
    with pytest.raises(
        NeuralError,
        match=r"^residual-network-from-nothing-0.003-0.json: was made otherwise \(other settings\); make it again"):
        bench_starts(manifest, settings | {"epochs": 2}, [0], [3e-3], tmp_path, workers=1)
    training_file(tmp_path, PLAIN, 3e-3, 0).write_text("{}")
    with pytest.raises(NeuralError, match="is no training of `neural starts`"):
        bench_starts(manifest, settings, [0], [3e-3], tmp_path, workers=1)


@pytest.mark.parametrize(
    "findings, said",
    [(["Gout"], "no finding 'Gout'"), (["Support Devices", "Pleural Other"], "one class only on validate")])
def test_findings_that_cannot_be_measured_are_refused_before_anything_is_trained(
    manifest, settings, no_weights, tmp_path, monkeypatch, findings, said
):
    studies, parts = start_parts(manifest, tmp_path, settings)
    monkeypatch.setattr(starts, "made_trainings", lambda *_: pytest.fail("work began"))
    names = list(studies.label_names)
    if said.startswith("one class"): parts["validate"].targets[:, [names.index(f) for f in findings]] = 0
    with pytest.raises(NeuralError, match=said): starts.check_findings(parts, names, findings)


def planted(parts, names, start, rate, seed, noise, settings):
    "A training whose scores are the targets under some noise."
    rng = np.random.default_rng([seed, int(rate * 1e4), len(start)])
    scores = {split: (np.nan_to_num(part.targets) + noise * rng.normal(size=part.targets.shape)).tolist()
              for split, part in parts.items()}
    return dict(start=start, rate=rate, seed=seed, settings=settings, studies="0", code="0", seconds=1.0,
                curve=[dict(epoch=1, loss=0.5, eval_loss=0.6)], scores=scores)


def test_a_planted_gain_is_found_and_the_rate_is_chosen_on_validate(manifest, settings, tmp_path):
    studies, parts = start_parts(manifest, tmp_path, settings)
    names = list(studies.label_names)
    some = [planted(parts, names, start, rate, 0, noise, settings) for start, noise in ((LITE, 0.01), (WARM, 0.01))
            for rate in (1e-3, 3e-3)]
    # the first rate of each: bad on validate
    for t in some[::2]: t["scores"]["validate"] = (-np.asarray(t["scores"]["validate"])).tolist()
    for t in some[1::2]:
        t["scores"]["test"] = (
            t["scores"]["test"] if t["start"] == WARM else np.zeros_like(parts["test"].targets).tolist())
    tables = start_tables(some, parts, [studies[i].patient_id for i in parts["test"].ids], names)
    assert set(tables["trainings"].query("chosen").rate) == {3e-3}
    gain = tables["differences"].set_index(["difference", "finding"]).loc[(f"{WARM} less {LITE}", "mean")]
    assert gain["AUC on test"] == pytest.approx(0.5, abs=0.01) and gain.low > 0.3
    assert json.loads(tables["auc"].to_json(orient="records"))


def test_the_command_writes_its_tables_and_not_over_a_file_of_the_user(manifest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["starts", str(manifest), "--small", "--epochs", "1", "--seeds", "0", "--workers", "1", "--findings",
             "Pneumonia, Pleural Effusion", "--out", "starts.json"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    about, tables = read_tables(tmp_path / "starts.json")
    assert about["command"] == "neural starts manifest.csv --preset open-i --epochs 1 --seeds 0 --small" and is_tables(
        tmp_path / "starts.json")
    assert {"auc", "differences", "trainings", "curves", "settings"} == set(tables) and str(tmp_path) not in (
        tmp_path / "starts.json").read_text()
    (tmp_path / "starts.json").write_text("mine")
    again = CliRunner().invoke(app, [*words, "--force"])
    assert again.exit_code == 1 and (tmp_path / "starts.json").read_text() == "mine"
