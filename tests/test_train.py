"One loop for whatever learns: it finds what was planted, keeps the best, survives a kill, is a plain loop to the bit."
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from taught import OPTIMISERS, taught
from neural.baseline import read_graphs, train_graphs, visual_data
from neural.classify import GraphClassifier, as_columns, deal, predict_logits, standardise, train_classifier
from neural.finetune import StudyDataset, augment, coarser_side, film_logits, fit_labels, stem_logits, warm_start
from neural.image_model import ImageModel
from neural.study import NeuralError
from neural.train import Training, computes_bf16, fit, one_epoch
from neural.vlm import ReportVLM, label_loss, small_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    "Sums in one order, here and in the processes that are started."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(n, seed):
    "Eight numbers a row; the first three carry a finding each; three answers in ten are unknown."
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=draw)
    y = (x[:, :3] > 0).float()
    y[torch.rand(n, 3, generator=draw) < 0.3] = math.nan
    return x, y


X, Y = numbers(400, 1)
X_VALIDATE, Y_VALIDATE = numbers(200, 2)


def dealt(*columns, size=50):
    "Batches of some columns, in an order drawn anew each epoch."
    def batches(epoch, generator):
        for part in torch.randperm(len(columns[0]), generator=generator).split(size):
            yield tuple(column[part] for column in columns)
    return batches


def small(before=8, after=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(before, 16), nn.ReLU(), nn.Linear(16, after))


def naming(model, batch): return dict(loss=label_loss(model(batch[0]), batch[1]))


def adam(model, lr=0.01): return torch.optim.AdamW(model.parameters(), lr)


# losses that plug in

def codes(n, seed, paired=True):
    "Two views of n objects; a control in which the pairs were mixed up."
    draw = torch.Generator().manual_seed(seed)
    code = torch.randn(n, 4, generator=draw)
    noisy = lambda: torch.cat([code, 0.5 * torch.randn(n, 4, generator=draw)], 1)
    views = [noisy() @ torch.randn(8, 8, generator=draw) for _ in range(2)]
    return views[0], views[1] if paired else views[1][torch.randperm(n, generator=draw)]


class Views(nn.Module):
    "An encoder for each view, and a temperature that learns."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.heat = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.tensor(2.0))

    def forward(self, a, b):
        return self.heat.exp() * F.normalize(self.one(a), dim=-1) @ F.normalize(self.two(b), dim=-1).T


def contrastive(model, batch):
    "Which report belongs to which film, asked both ways."
    z, own = model(*batch), torch.arange(len(batch[0]))
    return dict(films=F.cross_entropy(z, own) / 2, reports=F.cross_entropy(z.T, own) / 2)


def distilled(teacher, share=0.7):
    "Labels where they are known, the answers of a teacher everywhere."
    def loss(model, batch):
        z = model(batch[0])
        with torch.no_grad(): answers = teacher(batch[0]).sigmoid()
        copied = F.binary_cross_entropy_with_logits(z, answers)
        return dict(labels=(1 - share) * label_loss(z, batch[1]), teacher=share * copied)
    return loss


@pytest.mark.parametrize("seen, found", [(slice(0, 8), True), (slice(3, 8), False)])
def test_a_planted_finding_is_found_and_nothing_is_where_nothing_is(seen, found):
    net = small(X[:, seen].shape[1])
    judge = lambda m: dict(validate_loss=label_loss(m(X_VALIDATE[:, seen]), Y_VALIDATE))
    history = fit(net, dealt(X[:, seen], Y), naming, adam(net), Training(12), validate=judge)
    curve = [row["validate_loss"] for row in history]
    if found: assert curve[-1] < 0.25 < 0.5 < curve[0]
    else: assert all(abs(v - math.log(2)) < 0.1 for v in curve)


@pytest.mark.parametrize("paired", [True, False])
def test_pairs_are_found_by_a_contrastive_loss(paired):
    net, (a, b) = Views(), codes(400, 1, paired)
    judge = lambda m: dict(met=(m(a[:50], b[:50]).argmax(1) == torch.arange(50)).float().mean())
    history = fit(net, dealt(a, b), contrastive, adam(net), Training(25), validate=judge)
    assert set(history[0]) == {"epoch", "loss", "films", "reports", "met"}
    if paired: assert history[-1]["met"] > 0.6 and history[-1]["loss"] < 0.5 * history[0]["loss"]
    else: assert history[-1]["met"] < 0.3 and history[-1]["loss"] > 0.7 * math.log(50)


def test_a_student_learns_from_a_teacher_what_its_labels_do_not_say():
    teacher = small()
    fit(teacher, dealt(X, Y), naming, adam(teacher), Training(12))
    few = torch.where(torch.arange(400)[:, None] < 12, Y, math.nan)
    def student(share):
        torch.manual_seed(0)
        net = nn.Linear(8, 3)
        judge = lambda m: dict(validate_loss=label_loss(m(X_VALIDATE), Y_VALIDATE))
        return fit(net, dealt(X, few), distilled(teacher, share), adam(net, 0.02), Training(15), validate=judge)[-1]
    alone, helped = student(0.0), student(0.7)
    assert helped["validate_loss"] < 0.8 * alone["validate_loss"]
    assert helped["loss"] == pytest.approx(helped["labels"] + helped["teacher"])


@pytest.mark.parametrize("make, loss, batch", [
    (small, naming, (X[:50], Y[:50])),
    (small, distilled(small(seed=9)), (X[:50], Y[:50])),
    (Views, contrastive, codes(50, 1)),
], ids=["labels", "teacher", "pairs"])
def test_gradients_reach_every_parameter(make, loss, batch):
    net = make()
    one_epoch(net, [batch], loss, torch.optim.SGD(net.parameters(), 0.0))
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# which epoch, how long

class Told:
    "A validate that says what it was told to, and remembers the weights it was asked about."
    def __init__(self, **columns):
        self.rows, self.weights = [dict(zip(columns, row)) for row in zip(*columns.values())], []

    def __call__(self, model):
        assert not model.training and not torch.is_grad_enabled()
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return self.rows[len(self.weights) - 1]


@pytest.mark.parametrize("best, kept, columns", [
    ("auc", 2, dict(auc=[.5, .7, .9, .8, .9, .6])),                                          # of equals the earlier one
    ("-cost", 4, dict(cost=[.7, .6, .5, .9, .2, .3])),
    (("auc", "-cost"), 3, dict(auc=[.5, .9, .9, .9, .8, .9], cost=[.1, .5, .6, .4, .1, .4])),
    ((), 5, dict(auc=[.5, .7, .9, .8, .9, .6])),                                             # none is chosen: the last
])
def test_the_best_epoch_is_the_one_that_is_left(best, kept, columns):
    net, told = small(), Told(**columns)
    history = fit(net, dealt(X, Y), naming, adam(net), Training(6, best), validate=told)
    assert all(torch.equal(value, told.weights[kept][name]) for name, value in net.state_dict().items())
    assert not net.training and len(history) == 6
    if best: assert max(row["epoch"] for row in history if row["best"]) == kept + 1
    else: assert "best" not in history[0]


@pytest.mark.parametrize("patience, epochs", [(1, 3), (2, 4), (3, 8), (4, 9), (None, 9)])
def test_patience_stops_and_not_before(patience, epochs):
    net, told = small(), Told(auc=[.5, .7, .6, .6, .9, .1, .1, .1, .1])
    assert len(fit(net, dealt(X, Y), naming, adam(net), Training(9, "auc", patience), validate=told)) == epochs


@pytest.mark.parametrize("stepped, steps", [("batch", 4 * 8), ("epoch", 4)])
def test_the_schedule_moves_on_once_a_batch_or_once_an_epoch(stepped, steps):
    net = small()
    optimiser = adam(net)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: 0.5 ** n)
    fit(net, dealt(X, Y), naming, optimiser, Training(4, stepped=stepped), schedule)
    assert schedule.last_epoch == steps and optimiser.param_groups[0]["lr"] == pytest.approx(0.01 * 0.5 ** steps)


def test_batches_are_asked_for_each_epoch_with_one_generator_that_moves_on():
    asked, net = [], small()
    def batches(epoch, generator):
        asked.append((epoch, torch.randint(10**6, (1,), generator=generator).item()))
        yield X, Y
    fit(net, batches, naming, adam(net), Training(3, seed=5))
    draw = torch.Generator().manual_seed(5)
    assert asked == [(n, torch.randint(10**6, (1,), generator=draw).item()) for n in range(3)]


def test_means_count_batches_or_what_is_in_them():
    net, still = small(), torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.0)
    each = [naming(net, (X[part], Y[part]))["loss"].item() for part in (slice(0, 30), slice(30, 400))]
    batches = [(X[:30], Y[:30]), (X[30:], Y[30:])]
    assert one_epoch(net, batches, naming, still)["loss"] == np.mean(each)
    weighed = one_epoch(net, batches, naming, still, size=lambda b: len(b[0]))
    assert weighed["loss"] == (30 * each[0] + 370 * each[1]) / 400


def test_bfloat16_is_used_where_it_is_asked_for():
    seen, net = [], small()
    def loss(model, batch):
        seen.append(model(batch[0]).dtype)
        return naming(model, batch)
    for bf16 in (False, True):
        fit(net, dealt(X, Y, size=400), loss, adam(net), Training(1, bf16=bf16))
    assert seen == [torch.float32, torch.bfloat16]


def test_a_bar_on_a_terminal_and_nowhere_else(monkeypatch):
    said = {}
    for terminal, progress in ((True, True), (True, False), (False, True)):
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        net = small()
        fit(net, dealt(X, Y), naming, adam(net), Training(2, name="toy findings", progress=progress))
        said[terminal, progress] = stream.getvalue()
    assert "toy findings" in said[True, True] and "2/2" in said[True, True]
    assert said[True, False] == said[False, True] == ""


# what is refused

def test_a_loss_that_is_no_number_stops_with_one_line_and_the_weights_are_whole():
    net = small()
    def loss(model, batch):
        weight = math.inf if (batch[0] == X[0]).all(1).any() else 1
        return dict(labels=naming(model, batch)["loss"], teacher=weight * model(batch[0]).mean())
    with pytest.raises(NeuralError, match="^toy: the loss 'teacher' is no longer finite") as told:
        fit(net, dealt(X, Y), loss, adam(net), Training(3, name="toy"))
    assert "\n" not in str(told.value) and "lower the learning rate" in str(told.value)
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("loss, said", [
    (lambda m, b: m(b[0]).mean(), "named terms"),
    (lambda m, b: {}, "named terms"),
    (lambda m, b: dict(a=m(b[0])), "'a' must be a tensor of one number, such as a mean; got one of shape \\(50, 3\\)"),
    (lambda m, b: dict(a=0.5), "'a' must be a tensor of one number, such as a mean; got float"),
    (lambda m, b: dict(loss=m(b[0]).mean(), a=m(b[0]).mean()), "names the sum"),
    (lambda m, b: dict(epoch=m(b[0]).mean()), "'epoch', a name"),
])
def test_a_loss_of_another_form_is_refused(loss, said):
    net = small()
    with pytest.raises(NeuralError, match=said): fit(net, dealt(X, Y), loss, adam(net), Training(1))


@pytest.mark.parametrize("best, validate, said", [
    ("auc", None, "there is no validate"),
    ("auc", lambda m: dict(f1=1), "validate gives f1"),
    ("auc", lambda m: dict(auc=math.nan), "'auc' is no longer finite on validate \\(nan in epoch 1\\)"),
    ((), lambda m: dict(loss=1), "'loss', a name that"),
    ((), lambda m: dict(best=1), "'best', a name that"),
])
def test_a_validate_that_cannot_choose_is_refused(best, validate, said):
    net = small()
    with pytest.raises(NeuralError, match=said):
        fit(net, dealt(X, Y), naming, adam(net), Training(1, best), validate=validate)


@pytest.mark.parametrize("wrong, said", [
    (dict(epochs=0), "epochs must be 1 or more, got 0"),
    (dict(epochs=2, patience=0, best="auc"), "patience"),
    (dict(epochs=2, patience=1), "say with best"),
    (dict(epochs=2, seed=-1), "seed"),
    (dict(epochs=2, stepped="never"), "'batch' or 'epoch'"),
])
def test_settings_that_make_no_training_are_refused(wrong, said):
    with pytest.raises(NeuralError, match=said): Training(**wrong)


def test_no_batches_are_refused():
    net = small()
    with pytest.raises(NeuralError, match="not one batch"):
        fit(net, lambda epoch, generator: [], naming, adam(net), Training(1))


# a kill

def stop(): raise KeyboardInterrupt


def alike(one, two):
    "The same history, weights, moments and randomness, to the last bit."
    assert one[0] == two[0]
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])
    (moments, other) = ({(i, name): v for i, each in run[2].items() for name, v in each.items()} for run in (one, two))
    assert set(moments) == set(other)
    assert all(torch.equal(v, other[at]) if torch.is_tensor(v) else v == other[at] for at, v in moments.items())
    assert torch.equal(one[3], two[3])


def test_a_training_that_was_killed_ends_as_one_that_was_not(tmp_path):
    path = tmp_path / "new" / "training.safetensors"
    script = [sys.executable, ROOT / "tests/taught.py", path]
    done = subprocess.run(script, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    alike(taught(), taught(path))
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_kind_of_state_goes_on(tmp_path, optimiser):
    path = tmp_path / "training.safetensors"
    for until in ((1, 0), (2, 5), (4, 3)):                                                   # killed three times
        with pytest.raises(KeyboardInterrupt): taught(path, until, stop, optimiser)
    alike(taught(optimiser=optimiser), taught(path, optimiser=optimiser))
    assert not path.exists()


def test_patience_is_counted_through_a_kill(tmp_path):
    path = tmp_path / "training.safetensors"
    with pytest.raises(KeyboardInterrupt): taught(path, (2, 1), stop, patience=2)
    alike(taught(patience=2), taught(path, patience=2))


def test_a_checkpoint_is_tensors_and_plain_json(tmp_path):
    path = tmp_path / "training.safetensors"
    with pytest.raises(KeyboardInterrupt): taught(path, (2, 1), stop)
    with safe_open(path, "pt") as f: told, names = json.loads(f.metadata()["about"]), set(f.keys())
    assert len(told["history"]) == 2 and told["identity"]["data"] == "64 films" and told["identity"]["epochs"] == 5
    assert {name.split(".")[0] for name in names} == {"model", "best", "optimiser", "random"}


@pytest.mark.parametrize("change, said", [
    (dict(epochs=6), "epochs 5, now 6"),
    (dict(lr=0.1), "lr of group 0"),
    (dict(optimiser="momentum"), "AdamW, now SGD"),
    (dict(seed=1), "weights \\w+, now \\w+"),
    (dict(data="63 films"), "data 64 films, now 63 films"),
    (dict(patience=3), "patience None, now 3"),
])
def test_the_checkpoint_of_another_training_is_refused_and_left_alone(tmp_path, change, said):
    path = tmp_path / "training.safetensors"
    with pytest.raises(KeyboardInterrupt): taught(path, (2, 1), stop)
    there = path.read_bytes()
    with pytest.raises(NeuralError, match=f"^training.safetensors was made with .*{said}.*: go on with those") as told:
        taught(path, **change)
    assert "\n" not in str(told.value) and path.read_bytes() == there
    alike(taught(), taught(path))


@pytest.mark.parametrize("spoil", [
    lambda b: b"somebody's notes",
    lambda b: b[: len(b) // 2],
    lambda b: b"",
    lambda b: b.replace(b"neural-training", b"neural-nothings"),
])
def test_a_file_that_is_no_checkpoint_is_refused_and_left_alone(tmp_path, spoil):
    path = tmp_path / "training.safetensors"
    with pytest.raises(KeyboardInterrupt): taught(path, (2, 1), stop)
    path.write_bytes(spoil(path.read_bytes()))
    there = path.read_bytes()
    with pytest.raises(NeuralError, match="is no checkpoint, or damaged"): taught(path)
    assert path.read_bytes() == there


def test_a_checkpoint_that_lacks_something_is_told_to_be_damaged(tmp_path):
    path = tmp_path / "training.safetensors"
    with pytest.raises(KeyboardInterrupt): taught(path, (2, 1), stop)
    path.write_bytes(path.read_bytes().replace(b'"random.torch"', b'"random.other"'))
    with pytest.raises(NeuralError, match="is damaged \\(KeyError\\)"): taught(path)


# the loops of the library are plain ones, to the last bit

class Films(dict):
    "Films in memory, with the one method a dataset asks for."
    def batch(self, ids): return np.stack([self[i] for i in ids])


@pytest.fixture(scope="module")
def films():
    rng = np.random.default_rng(0)
    y = (rng.random((22, 3)) > 0.5).astype(np.float32)
    x = rng.random((22, 1, 96, 96)).astype(np.float32) / 2
    x[:, :, :40, :40] += y[:, 0, None, None, None] / 3
    y[3], y[5, 1] = np.nan, np.nan
    data = StudyDataset(Films({f"s{i}": x[i] for i in range(22)}), [f"s{i}" for i in range(22)], [""] * 22, y)
    part = lambda a, b: StudyDataset(data.films, data.ids[a:b], [""] * (b - a), y[a:b])
    return part(0, 17), part(17, 22)


def order_of(n, draw, generator):
    "Each study once, or as often as it is drawn."
    if draw is None: return torch.randperm(n, generator=generator)
    return torch.multinomial(torch.as_tensor(draw, dtype=torch.float64), n, True, generator=generator)


def plain_labels(model, logits_of, weights, train, validate, epochs, batch_size, seed, bf16, draw, coarse):
    "The findings taught by a loop that is written out."
    torch.manual_seed(seed)
    generator, history = torch.Generator().manual_seed(seed), []
    optimiser = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.05)
    steps = math.ceil(len(train) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, epochs=epochs, steps_per_epoch=steps, pct_start=0.2)
    for epoch in range(epochs):
        model.train()
        losses = []
        for part in order_of(len(train), draw, generator).split(batch_size):
            x = torch.as_tensor(train.films.batch([train.ids[i] for i in part]))
            if epoch < coarse * epochs: x = F.interpolate(x, size=(coarser_side(96),) * 2, mode="area")
            x = augment(x, generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16): z = logits_of(x)
            loss = label_loss(z, torch.as_tensor(train.targets[part.tolist()]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        history.append(dict(epoch=epoch + 1, loss=float(np.mean(losses))))
        if validate is None: continue
        z = film_logits(model, validate, bf16=bf16, logits_of=logits_of)
        history[-1]["eval_loss"] = label_loss(z, torch.as_tensor(validate.targets)).item()
    return history


@pytest.mark.parametrize("bf16, judged, drawn, coarse, batch_size", [
    (False, True, False, 0.0, 2),
    (True, True, True, 0.5, 5),
    (True, False, False, 0.4, 3),
    (False, False, True, 0.0, 17),
])
def test_findings_are_taught_as_by_a_plain_loop(films, bf16, judged, drawn, coarse, batch_size):
    train, validate = films[0], films[1] if judged else None
    draw = np.random.default_rng(1).random(len(train)) if drawn else None
    found = []
    for library in (True, False):
        torch.manual_seed(3)
        model = ImageModel(list("abc"), 96, ((8,), (8, 8)))
        if library:
            how = dict(seed=7, bf16=bf16, draw=draw, coarse=coarse)
            history = fit_labels(model, model, train, validate, 3, batch_size, **how)
        else:
            model.to(memory_format=torch.channels_last)
            how = (3, batch_size, 7, bf16 and computes_bf16(), draw, coarse)
            history = plain_labels(model, model, model.parameters(), train, validate, *how)
        found.append((history, model.state_dict(), torch.get_rng_state()))
    (one, a, r), (two, b, s) = found
    assert one == two and all(torch.equal(a[name], b[name]) for name in a) and torch.equal(r, s)
    assert all(p.is_contiguous() for p in a.values())


def test_a_warm_start_with_dropout_is_a_plain_loop_over_some_weights(films):
    train, validate = films
    found = []
    for library in (True, False):
        torch.manual_seed(4)
        model = ReportVLM(small_config(50, 96, list("abc"), 32, 32, 1, 0, stem="levels"))
        parts = (model.encoder.embeddings, model.encoder.layernorm, model.head)
        some, read = [p for part in parts for p in part.parameters()], lambda x: stem_logits(model, x)
        if library: history = warm_start(model, train, validate, 2, 4, seed=2, bf16=False, coarse=0.3)
        else: history = plain_labels(model, read, some, train, validate, 2, 4, 2, False, None, 0.3)
        found.append((history, model.state_dict()))
    (one, a), (two, b) = found
    assert one == two and all(torch.equal(a[name], b[name]) for name in a)


def plain_best(model, optimiser, packs, rng, epochs, patience, loss, rank):
    "Graphs taught by a loop that is written out; gives what was seen of each epoch."
    best, seen = None, []
    for epoch in range(epochs):
        model.train()
        losses = []
        for i in rng.permutation(len(packs)):
            optimiser.zero_grad()
            value = loss(model, *packs[i])
            value.backward()
            optimiser.step()
            losses.append((value.item(), len(packs[i][1])))
        now = rank(model)
        if best is None or now > best[0]: best = now, {name: v.clone() for name, v in model.state_dict().items()}, epoch
        seen.append((sum(v * n for v, n in losses) / sum(n for _, n in losses), now, best[2] == epoch))
        if epoch - best[2] >= patience: break
    model.load_state_dict(best[1])
    return seen


@pytest.fixture(scope="module")
def graphs():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, (120, 2)).astype(np.float32)
    x = rng.normal(size=(120, 16, 6))
    x[:, 3, 0] += 2 * y[:, 0]
    return [visual_data(t, [3, 5], (4, 4)) for t in x], y


@pytest.mark.parametrize("batch_size, patience, dropout", [(16, 2, 0.0), (7, 10, 0.3), (64, 1, 0.0)])
def test_a_graph_classifier_is_taught_as_by_a_plain_loop(graphs, batch_size, patience, dropout):
    data, y = graphs
    how = dict(hidden=8, epochs=8, batch_size=batch_size, patience=patience, seed=5, parts=("visual",), dropout=dropout)
    model, history = train_classifier(data[:80], y[:80, 0], data[80:], y[80:, 0], "typed", **how)
    columns, targets = as_columns(data[:80]), torch.tensor(y[:80, 0])
    torch.manual_seed(5)
    plain = GraphClassifier("typed", 6, 0, 8, dropout=dropout, parts=("visual",))
    standardise(plain, columns)
    packs = [(columns.batch(part), targets[part]) for part in deal(np.arange(80), batch_size, 5)]
    def rank(m):
        z = predict_logits(m, data[80:])
        loss = F.binary_cross_entropy_with_logits(torch.tensor(z), torch.tensor(y[80:, 0]).double())
        return roc_auc_score(y[80:, 0], z), -loss.item()
    loss = lambda m, g, t: F.binary_cross_entropy_with_logits(m(g), t)
    optimiser = torch.optim.AdamW(plain.parameters(), 3e-3, weight_decay=1e-4, fused=True)
    seen = plain_best(plain, optimiser, packs, np.random.default_rng(5), 8, patience, loss, rank)
    assert [(row["loss"], (row["validate_auc"], -row["validate_loss"]), row["best"]) for row in history] == seen
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters())) and not model.training


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("batch_size, patience", [(16, 2), (7, 30)])
def test_all_findings_of_graphs_are_taught_as_by_a_plain_loop(graphs, columns, batch_size, patience):
    data, y = graphs
    unknown = y.copy()
    unknown[::3, 0] = np.nan
    made = as_columns(data[:80]) if columns else data[:80]
    how = dict(hidden=8, epochs=8, batch_size=batch_size, patience=patience, seed=5)
    model = train_graphs(made, unknown[:80], data[80:], y[80:], **how)
    torch.manual_seed(5)
    plain = GraphClassifier("typed", 6, 0, 8, parts=("visual",))
    train, targets = as_columns(data[:80]), torch.tensor(unknown[:80])
    plain.last = nn.Linear(plain.last.in_features, 2)
    nn.init.zeros_(plain.last.weight)
    nn.init.zeros_(plain.last.bias)
    standardise(plain, train)
    rng = np.random.default_rng(5)
    parts = np.array_split(rng.permutation(80), math.ceil(80 / batch_size))
    packs = [(train.batch(part), targets[part]) for part in parts]
    loss = lambda m, g, t: label_loss(m(g).reshape(t.shape), t)
    rank = lambda m: -label_loss(torch.as_tensor(read_graphs(m, data[80:])), torch.tensor(y[80:])).item()
    optimiser = torch.optim.AdamW(plain.parameters(), 3e-3, weight_decay=1e-4, fused=True)
    plain_best(plain, optimiser, packs, rng, 8, patience, loss, rank)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters())) and not model.training
