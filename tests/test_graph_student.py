"Stage 72: what a graph learns of a teacher, what it must not be shown, and what is refused."
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

from neural.asset import StudyAsset
from neural.baseline import _finder, read_graphs, teach_graphs, train_graphs
from neural.classify import PARTS, as_columns
from neural.distill import Distillation, distil_terms
from neural.pipeline import stage_parameters
from neural.record import begin
from neural.study import NeuralError
from neural.train import Training
from neural.vlm import label_loss

STAGE = Path(__file__).resolve().parents[1] / "nbs/paper/72_graph_student.ipynb"
ARMS = ("labels alone", "labels and teacher", "teacher alone")
TRAIN, HELD, NEW = (0, 160), (160, 220), (220, 400)


def cells():
    "The code of the stage, cell by cell."
    return [c.source for c in nbformat.read(STAGE, 4).cells if c.cell_type == "code"]


def words(start, **names):
    "What the stage defines in the cell that defines one of its functions."
    cell = next(c for c in cells() if f"def {start}(" in c)
    known = dict(np=np, torch=torch, Distillation=Distillation, distil_terms=distil_terms, NeuralError=NeuralError,
                 distil=[0.5, 2.0], teacher_alone=True) | names
    exec(cell.split("\nteacher = ")[0], known)
    return known


def asset(i, x):
    "Four patches of a film and two words, as an asset of this track."
    return StudyAsset(f"s{i}", "image-only", (12, 12), np.arange(4), np.ones(4), x, [0, 1 + i % 5], [0, i % 3],
                      [(0, 1, 1)], [(0, 0), (1, 1)], [1.0, 1.0])


@pytest.fixture(scope="module")
def cohort():
    """Two findings, each in a patch of its own. Of the first the labels are a coin and the teacher knows it; of the
    second the teacher is silent and the labels know it. A third has neither label nor teacher."""
    rng = np.random.default_rng(72)
    truth = rng.integers(0, 2, (400, 3)).astype(float)
    x = rng.normal(size=(400, 4, 6))
    x[:, 1, 0] += 4 * truth[:, 0]
    x[:, 2, 1] += 4 * truth[:, 1]
    said = np.full((400, 3), np.nan)
    said[:, 0] = 6 * truth[:, 0] - 3 + rng.normal(0, 0.3, 400)
    y = truth.copy()
    y[:, 0] = rng.integers(0, 2, 400)
    y[:, 2] = np.nan
    assets = [asset(i, one) for i, one in enumerate(x)]
    graphs = {where: as_columns(assets[slice(*where)]) for where in (TRAIN, HELD, NEW)}
    return graphs, truth, y, said


@pytest.fixture(scope="module")
def taught(cohort):
    "What each kind of student says of studies that nobody learnt from."
    graphs, _, y, said = cohort
    stage, found = words("lesson"), {}
    for arm in ARMS:
        seen = stage["shown"](arm, y, said)
        held, loss = torch.as_tensor(seen[slice(*HELD)]).float(), stage["lesson"](arm)
        still = lambda model: torch.as_tensor(read_graphs(model, graphs[HELD]))
        judge = lambda model: {"far": sum(loss(lambda _: still(model), (None, held)).values())}
        model, _ = teach_graphs(graphs[TRAIN], seen[slice(*TRAIN)], judge, Training(12, "-far", progress=False), PARTS,
                                10, hidden=16, batch_size=16, loss=loss)
        found[arm] = read_graphs(model, graphs[NEW])
    return found


def area(cohort, taught, arm, j):
    "AUC of a finding on studies that nobody learnt from."
    return roc_auc_score(cohort[1][slice(*NEW), j], taught[arm][:, j])


def test_a_signal_that_only_the_teacher_has_is_found_by_who_is_taught(cohort, taught):
    first = {arm: area(cohort, taught, arm, 0) for arm in ARMS}
    assert first["labels and teacher"] > 0.9 and first["teacher alone"] > 0.9
    assert 0.3 < first["labels alone"] < 0.7, "the labels of this finding are a coin"


def test_where_the_teacher_is_silent_the_labels_teach_and_alone_it_teaches_nothing(cohort, taught):
    second = {arm: area(cohort, taught, arm, 1) for arm in ARMS}
    assert second["labels alone"] > 0.9 and second["labels and teacher"] > 0.9
    assert not taught["teacher alone"][:, 1].any(), "no label is read: its answer stays where it began"
    assert not any(taught[arm][:, 2].any() for arm in ARMS), "nobody speaks of the third"


def test_no_student_is_shown_what_it_must_not_know(cohort):
    _, _, y, said = cohort
    shown = words("shown")["shown"]
    alone, both, teacher = (shown(arm, y, said) for arm in ARMS)
    same = lambda a, b: np.array_equal(a, b, equal_nan=True)
    assert same(alone[..., 0], y) and np.isnan(alone[..., 1]).all()
    assert same(both[..., 0], y) and same(both[..., 1], said)
    assert np.isnan(teacher[..., 0]).all() and same(teacher[..., 1], said)


@pytest.mark.parametrize("arm, share", [*zip(ARMS, (1.0, 0.75, 0.0))])
def test_every_student_begins_at_ln_2(cohort, arm, share):
    "Of two known labels the teacher speaks of one: half of a half of the loss of labels is left to it."
    graphs, _, y, said = cohort
    stage, rows = words("lesson"), np.arange(32)
    model = _finder(graphs[TRAIN], 3, PARTS, 10, 16, 0)
    pack = graphs[TRAIN].batch(rows), torch.as_tensor(stage["shown"](arm, y, said)[rows]).float()
    begun = {name: value.item() for name, value in stage["lesson"](arm)(model, pack).items()}
    assert begun["labels"] == pytest.approx(share * math.log(2), abs=1e-6)
    assert (begun["teacher"] > 0) == (arm != "labels alone")


@pytest.mark.parametrize("arm", ARMS)
def test_every_parameter_gets_a_gradient(cohort, arm):
    graphs, _, y, said = cohort
    stage, rows = words("lesson"), np.arange(64)
    model = _finder(graphs[TRAIN], 3, PARTS, 10, 16, 0)
    torch.nn.init.normal_(model.last.weight)                            # the first step moves the last layer alone
    pack = graphs[TRAIN].batch(rows), torch.as_tensor(stage["shown"](arm, y, said)[rows]).float()
    sum(stage["lesson"](arm)(model, pack).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_silence_and_blanks_move_nothing(cohort):
    _, _, y, said = cohort
    stage, z = words("lesson"), torch.randn(8, 3, requires_grad=True)
    for arm, moved in zip(ARMS, ([1, 1, 0], [1, 1, 0], [1, 0, 0])):
        z.grad = None
        pack = None, torch.as_tensor(stage["shown"](arm, y[:8], said[:8])).float()
        sum(stage["lesson"](arm)(lambda _: z, pack).values()).backward()
        assert (z.grad != 0).any(0).int().tolist() == moved, arm


def test_the_control_is_the_classifier_of_the_audit(cohort):
    "Labels alone: the network, batches and steps of chapter 26, to the last bit."
    graphs, _, y, said = cohort
    stage, seen, held = words("lesson"), y[slice(*TRAIN)], torch.as_tensor(y[slice(*HELD)]).float()
    judge = lambda m: dict(eval_loss=label_loss(torch.as_tensor(read_graphs(m, graphs[HELD])), held))
    plain = train_graphs(graphs[TRAIN], seen, graphs[HELD], held, PARTS, 10, 3, hidden=8, seed=4, patience=3)
    rows = stage["shown"]("labels alone", seen, said[slice(*TRAIN)])
    model, _ = teach_graphs(graphs[TRAIN], rows, judge, Training(3, "-eval_loss", 3, 4, progress=False), PARTS, 10,
                            hidden=8, loss=stage["lesson"]("labels alone"))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters()))


# refusals

def reads():
    "What the stage says that it reads."
    cell = next(c for c in cells() if "READS = " in c)
    known = {}
    exec(re.search(r"(?ms)^STAGE, TRACK = .*?(?=^run, begun)", cell)[0], known)
    return known["STAGE"], known["READS"]


@pytest.mark.parametrize("gone, said", [("students/teacher", "has no students/teacher: run 70_mxa.ipynb first"),
                                        ("store/image-only", "has no store/image-only: run 30_fuse.ipynb first")])
def test_a_run_without_a_teacher_or_a_store_is_refused(tmp_path, gone, said):
    stage, files = reads()
    for name in (n for names in files.values() for n in names if n != gone):
        (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(NeuralError, match=said): begin(tmp_path / "run", stage, {}, files)
    (tmp_path / "run" / gone).mkdir(parents=True)
    assert begin(tmp_path / "run", stage, {}, files)[0] == tmp_path / "run"


def test_a_teacher_of_other_findings_is_refused_by_both_sides():
    agree = words("agree")["agree"]
    agree(["Edema", "Mass", "Pneumonia"], ["Pneumonia", "Edema"])
    with pytest.raises(NeuralError, match="names Edema, Mass and not Pneumonia, .*run 70_mxa.ipynb on this manifest"):
        agree(["Edema", "Mass"], ["Edema", "Pneumonia"])


def test_presets_ask_for_three_students_of_each_kind_and_the_smoke_run_for_one():
    asked = {}
    for preset in (STAGE.parent / "presets").glob("*.yaml"):
        values = yaml.safe_load(preset.read_text())
        asked[preset.stem] = values.get("graph_student", {}).get("seeds", values.get("seeds"))
    assert asked.pop("smoke") == 1 and min(asked.values()) >= 3
    mine, theirs = (stage_parameters(path)["distil"].default for path in (STAGE, STAGE.parent / "70_mxa.ipynb"))
    assert mine == theirs
