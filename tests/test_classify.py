"The classifiers: nothing idle, nothing one-way, nothing learned from what was left out."
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from neural.asset import StudyAsset
from torch_geometric.data import Batch
from torch_geometric.nn import global_max_pool, global_mean_pool

from neural.classify import (KINDS, PARTS, GraphClassifier, GraphColumns, TypedConv, as_columns, bag_sum, collate,
                             edge_shares, known_targets, load_classifier, predict, predict_logits, ragged,
                             save_classifier, to_data, train_classifier)
from neural.graph import EDGE_TYPES, REVERSE, SHOWS
from neural.study import NeuralError


def random_asset(seed, k=None, m=None, d=6, words=10):
    rng = np.random.default_rng(seed)
    k, m = k or int(rng.integers(1, 9)), int(rng.integers(0, 7)) if m is None else m
    r = int(rng.integers(0, m)) if m > 1 else 0
    ties = np.argwhere(rng.random((m, k)) < .4)
    return StudyAsset(f"s{seed}", "image+report", (12, 12), np.sort(rng.choice(144, k, replace=False)), rng.random(k),
                      rng.normal(size=(k, d)), rng.permutation(words)[:m], rng.integers(0, 3, m),
                      [(i, i + 1, int(rng.integers(3))) for i in range(r)], ties, rng.random(len(ties)) + 0.1)


def planted(n, signal, seed, k=4, m=3, d=6, words=10):
    rng, y, out = np.random.default_rng(seed), np.arange(n) % 2, []
    for i in range(n):
        x = rng.normal(size=(k, d))
        if signal == "patch": x[rng.integers(k), 2] += 4 * y[i]
        concepts = np.r_[0, rng.choice(np.arange(1, words), m - 1, replace=False)]
        assertions = np.r_[2 - 2 * y[i] if signal == "assertion" else 0, rng.integers(0, 3, m - 1)]
        out.append(
            StudyAsset(f"s{i}", "image+report", (12, 12), np.sort(rng.choice(144, k, replace=False)), rng.random(k), x,
                       concepts, assertions, [(0, 1, 1)], [(0, 0), (1, 1)], [1.0, 1.0])
        )
    return out, y.astype(float)


@pytest.mark.parametrize("fusion", ["betweenness", "grounding", "none"])
@pytest.mark.parametrize("parts", [PARTS, ("visual",), ("knowledge",)])
def test_every_edge_has_its_way_back_with_its_reverse_type(fusion, parts):
    batch = collate([random_asset(i) for i in range(30)], fusion, parts)
    a, b = batch.edge_index
    there = sorted(zip(a.tolist(), b.tolist(), batch.edge_type.tolist()))
    back = sorted(zip(b.tolist(), a.tolist(), np.array(REVERSE, int)[batch.edge_type].tolist()))
    assert there == back
    if batch.num_edges: assert (batch.batch[a] == batch.batch[b]).all() and a.max() < batch.num_nodes
    cross = batch.is_patch[a] != batch.is_patch[b]
    assert bool(cross.any()) == (fusion != "none" and parts == PARTS)
    assert (batch.edge_type[cross] >= SHOWS).all()


@pytest.mark.parametrize("fusion", ["grounding", "none"])
@pytest.mark.parametrize("parts", [PARTS, ("visual",), ("knowledge",)])
def test_many_graphs_at_once_are_those_made_one_by_one(fusion, parts):
    "Repeated patches, repeated relations, ties named twice, ties of no weight, studies without words."
    rng, assets = np.random.default_rng(0), [random_asset(i) for i in range(60)]
    for i, a in enumerate(assets[:20]):
        patches = np.sort(rng.choice(144, len(a.patches)) if i < 10 else rng.choice(20, len(a.patches), replace=False))
        relations = [r for r in a.relations.tolist() for _ in range(2)] + [[0, 0, 1]] * bool(len(a.concepts))
        ties = np.concatenate([a.grounding, a.grounding[:2]])
        assets[i] = StudyAsset(a.study_id, a.track, a.grid, patches, a.relevance, a.features, a.concepts, a.assertions,
                               relations, ties, np.round(rng.random(len(ties)) * 3) / 3,
                               {"selection": "released"} if i < 10 else {})
    one_by_one, at_once = Batch.from_data_list([to_data(a, fusion, parts) for a in assets]), collate(
        assets, fusion, parts)
    for field in ("x", "place", "word", "is_patch", "batch", "edge_index", "edge_type", "ptr"):
        assert torch.equal(at_once[field], one_by_one[field]) and at_once[field].dtype == one_by_one[field].dtype, field
    assert torch.allclose(at_once.edge_weight, one_by_one.edge_weight, atol=1e-6) and at_once.num_graphs == 60


def test_batch_holds_each_study_unchanged():
    assets = [random_asset(i) for i in range(12)]
    batch = collate(assets)
    for i, a in enumerate(assets):
        g, mine = to_data(a), batch.batch == i
        assert mine.sum() == g.num_nodes == len(a.patches) + len(a.concepts)
        assert torch.equal(batch.is_patch[mine], g.is_patch)
    assert torch.equal(batch.x, torch.cat([to_data(a).x for a in assets])) and batch.num_graphs == 12
    assert np.array_equal(np.concatenate([a.concepts * 3 + a.assertions for a in assets]), batch.word)


def test_shares_sum_to_one_per_listener_and_type():
    batch = collate([random_asset(i) for i in range(20)])
    slot = batch.edge_index[1] * len(EDGE_TYPES) + batch.edge_type
    total = torch.zeros(batch.num_nodes * len(EDGE_TYPES)).index_add(0, slot, batch.edge_weight)
    assert torch.allclose(total[total > 0], torch.ones(1)) and (total > 0).sum() == len(slot.unique())
    assert edge_shares(np.array([[0], [1]]), np.array([0]), np.array([1e-6]), 2).tolist() == [1.0]


def plain_typed(conv, h, g):
    "The typed layer edge by edge, over a PyG batch."
    out = torch.stack([h[i] @ conv.own[int(g.is_patch[i])] + conv.bias[int(g.is_patch[i])] for i in range(g.num_nodes)])
    for (a, b), t, w in zip(g.edge_index.T.tolist(), g.edge_type.tolist(), g.edge_weight.tolist()):
        out = out.index_add(0, torch.tensor([b]), w * (h[a] @ conv.relation[t])[None])
    return out


def plain_logits(model, g):
    "The classifier in PyG's own words, over a PyG batch: no columns, no bags, no shortcut."
    h = torch.zeros(g.num_nodes, model.config["hidden"])
    if "visual" in model.config["parts"]:
        x = model.visual((g.x - model.mean) / model.spread)
        h[g.is_patch] = x if model.place is None else x + model.place(g.place)
    if "knowledge" in model.config["parts"]: h[~g.is_patch] = model.words(g.word)
    if model.config["kind"] == "gcn":
        h = model.layers[1](model.layers[0](h, g.edge_index).relu(), g.edge_index)
        return model.last(global_mean_pool(h, g.batch, g.num_graphs)).squeeze(-1)
    for layer in model.layers: h = (h + plain_typed(layer, h, g)).relu()
    kinds = [g.is_patch if p == "visual" else ~g.is_patch for p in PARTS if p in model.config["parts"]]
    return model.last(
        torch.cat(
            [pool(h[at], g.batch[at], g.num_graphs) for at in kinds for pool in (global_mean_pool, global_max_pool)], -1
        )
    ).squeeze(-1)


def one_way(graph):
    "The same graph with every second edge gone, so that what is heard is no longer what is told."
    out = graph.clone()
    out.edge_index, out.edge_type, out.edge_weight = (graph.edge_index[:, ::2], graph.edge_type[::2],
                                                      graph.edge_weight[::2])
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [PARTS, ("visual",), ("knowledge",)])
@pytest.mark.parametrize("change", [lambda g: g, one_way])
def test_columns_give_the_logits_and_gradients_of_plain_pyg(kind, parts, change):
    torch.manual_seed(0)
    graphs = [change(to_data(random_asset(i, m=0 if i == 3 else None), parts=parts)) for i in range(24)]
    columns, rows = GraphColumns(Batch.from_data_list(graphs), kind), [5, 3, 23, 3, 0, 11]
    # a mean over nothing is nothing
    if kind == "gcn" and parts == ("knowledge",): rows = [i for i in rows if graphs[i].num_nodes]
    model = GraphClassifier(kind, 6, 10, hidden=16, patches=144, parts=parts)
    torch.nn.init.normal_(model.last.weight)
    found = [
        (z, torch.autograd.grad(z.square().sum(), list(model.parameters())))
        for z in (model(columns.batch(rows)), plain_logits(model, Batch.from_data_list([graphs[i] for i in rows])))]
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for a, b in zip(found[0][1], found[1][1]): assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_a_batch_of_columns_makes_no_object_per_graph(monkeypatch):
    columns = as_columns([random_asset(i) for i in range(40)])
    monkeypatch.setattr("torch_geometric.data.Data.__init__", lambda *a, **k: pytest.fail("a Data was made"))
    monkeypatch.setattr("neural.asset.StudyAsset.__post_init__", lambda *a: pytest.fail("an asset was made"))
    batch = columns.batch(np.arange(40)[::-1])
    assert batch.num_graphs == 40 and torch.equal(batch.size, torch.from_numpy(columns.size[:, ::-1].copy()))


def test_stretches_may_be_empty():
    rng = np.random.default_rng(0)
    start, length = rng.integers(0, 99, 30), rng.integers(0, 4, 30)
    assert ragged(start, length).tolist() == [i for s, n in zip(start, length) for i in range(s, s + n)]


def test_the_way_back_of_a_bag_sum_is_its_gradient():
    g = as_columns([random_asset(i, m=5) for i in range(9)]).batch(range(9))
    h = torch.randn(int(g.size.sum()), 4, dtype=torch.float64, requires_grad=True)
    double = lambda bags: (*bags[:2], bags[2].double())
    assert torch.autograd.gradcheck(lambda h: bag_sum(h, double(g.heard), lambda: double(g.told)), h)
    assert torch.autograd.gradcheck(lambda h: bag_sum(h, double(g.pool), lambda: double(g.spread)), h)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [PARTS, ("visual",), ("knowledge",)])
def test_first_loss_is_ln2_and_gradient_reaches_everything(kind, parts):
    assets, y = planted(64, "patch", 0)
    torch.manual_seed(1)
    model = GraphClassifier(kind, 6, 10, hidden=32, patches=144, dropout=.1, parts=parts)
    loss = F.binary_cross_entropy_with_logits(model(collate(assets, parts=parts)), torch.tensor(y, dtype=torch.float))
    loss.backward()
    assert abs(loss.item() - math.log(2)) < .01
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


@pytest.mark.parametrize("kind", KINDS)
def test_information_flows_both_ways_between_words_and_patches(kind):
    torch.manual_seed(0)
    g = as_columns([random_asset(3, k=4, m=4)], kind).batch([0])
    model = GraphClassifier(kind, 6, 10, hidden=16)
    h, n = model.nodes(g).detach().requires_grad_(), len(g.x)
    out = bag_sum(model.layers[0].lin(h), g.heard, lambda: g.told) if kind == "gcn" else model.layers[0](h, g)
    to_patches, = torch.autograd.grad(out[:n].sum(), h, retain_graph=True)
    to_words, = torch.autograd.grad(out[n:].sum(), h)
    assert to_patches[n:].abs().sum() > 0 and to_words[:n].abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signal", ["patch", "assertion"])
def test_planted_signal_is_learned_and_only_where_it_lies(kind, signal):
    (a, ya), (b, yb), (c, yc) = (planted(n, signal, s) for n, s in ((240, 1), (80, 2), (200, 3)))
    holds, lacks = ("visual", "knowledge") if signal == "patch" else ("knowledge", "visual")
    score = lambda parts: roc_auc_score(
        yc, predict(train_classifier(a, ya, b, yb, kind, vocabulary_size=10, hidden=32, epochs=20, parts=parts)[0], c))
    assert score(PARTS) > .9 and score((holds,)) > .9
    assert abs(score((lacks,)) - .5) < .15


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_targets_do_not_touch_the_model(kind):
    (a, ya), (b, yb) = planted(60, "patch", 1), planted(30, "patch", 2)
    # every second study has no label
    mixed = [x for pair in zip(a, planted(60, "assertion", 9)[0]) for x in pair]
    targets = np.stack([ya, np.full(60, np.nan)], 1).ravel()
    p = [predict(train_classifier(t, y, b, yb, kind, vocabulary_size=10, hidden=16, epochs=3)[0], b)
         for t, y in ((a, ya), (mixed, targets))]
    assert np.array_equal(*p)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_bits(kind):
    (a, ya), (b, yb) = planted(80, "patch", 1), planted(40, "patch", 2)
    graphs = [to_data(x) for x in a]
    run = lambda train, seed: train_classifier(
        train, ya, b, yb, kind, vocabulary_size=10, hidden=16, epochs=4, dropout=0.3, seed=seed)
    m, h = run(a, 5)
    # whatever the caller did before
    torch.manual_seed(99)
    np.random.seed(99)
    (n, i), (o, _) = run(graphs, 5), run(a, 6)
    assert h == i and np.array_equal(predict(m, b), predict(n, b)) and not np.array_equal(predict(m, b), predict(o, b))
    assert not m.training


def test_best_epoch_on_validate_is_the_one_returned():
    # nothing to learn: the AUC wanders
    (a, ya), (b, yb) = planted(80, "nothing", 1), planted(41, "nothing", 2)
    model, history = train_classifier(
        a, ya, b, yb, "typed", vocabulary_size=10, hidden=16, epochs=15, lr=1e-2, patience=4)
    assert not history[-1]["best"]
    best = max(history, key=lambda r: (r["validate_auc"], -r["validate_loss"]))
    assert roc_auc_score(yb, predict(model, b)) == pytest.approx(best["validate_auc"])
    assert [r for r in history if r["best"]][-1] == best
    assert len(history) == 15 or history[-1]["epoch"] - best["epoch"] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_are_kept_teach_the_same(monkeypatch, kind):
    (a, ya), (b, yb) = planted(70, "patch", 1), planted(30, "patch", 2)
    fits = []
    for most in (2**28, 0):
        monkeypatch.setattr("neural.classify.KEPT", most)
        fits.append(train_classifier(a, ya, b, yb, kind, vocabulary_size=10, hidden=16, epochs=4))
    assert fits[0][1] == fits[1][1] and all(
        torch.equal(x, y) for x, y in zip(fits[0][0].parameters(), fits[1][0].parameters()))


def test_training_leaves_the_callers_random_numbers_alone():
    (a, ya), (b, yb) = planted(30, "patch", 1), planted(20, "patch", 2)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    train_classifier(a, ya, b, yb, vocabulary_size=10, hidden=8, epochs=1, dropout=.5)
    assert torch.equal(state, torch.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()


def test_sigmoid_is_applied_once():
    torch.manual_seed(0)
    model, assets = GraphClassifier("gcn", 6, 10, hidden=8), [random_asset(i) for i in range(5)]
    torch.nn.init.normal_(model.last.weight, std=30)
    z = predict_logits(model, assets)
    assert np.allclose(predict(model, assets), 1 / (1 + np.exp(-z))) and np.abs(z).max() > 1
    assert predict(model, []).shape == (0,)


def test_a_study_is_scored_alone_as_in_company():
    torch.manual_seed(0)
    assets = [random_asset(i) for i in range(17)]
    for kind in KINDS:
        for parts in (PARTS, ("visual",), ("knowledge",)):
            model = GraphClassifier(kind, 6, 10, hidden=8, parts=parts)
            assert np.allclose(predict(model, assets), [predict(model, [a])[0] for a in assets], atol=1e-6)
            assert np.allclose(predict(model, assets[::-1])[::-1], predict(model, assets), atol=1e-6)


@pytest.mark.parametrize(
    "call,said",
    [
        (lambda a, y: train_classifier(a, np.ones(8), a, y, vocabulary_size=10), "train: 8 positive, 0 negative"),
        (lambda a, y: train_classifier(a, y, a, np.zeros(8), vocabulary_size=10), "validate: 0 positive, 8 negative"),
        (lambda a, y: train_classifier(a, np.full(8, np.nan), a, y, vocabulary_size=10), "8 unknown of 8"),
        (lambda a, y: train_classifier(a, y[:3], a, y, vocabulary_size=10), "8 assets but 3 targets"),
        (lambda a, y: train_classifier(a, y - 1, a, y, vocabulary_size=10), "neither 0, 1 nor nan"),
        (lambda a, y: train_classifier(a, y, a, y, vocabulary_size=2), "not in the vocabulary of 2"),
        (lambda a, y: train_classifier(a, y, a, y, "mpnn", vocabulary_size=10), "kind must be"),
        (lambda a, y: train_classifier(a, y, a, y, vocabulary_size=10, parts=()), "parts must be"),
        (lambda a, y: train_classifier(a, y, a, y, vocabulary_size=10, fusion="glue"), "fusion must be"),
        (lambda a, y: train_classifier(a, y, a, y, vocabulary_size=10, lr=float("inf")), "no longer finite"),
        (lambda a, y: predict(GraphClassifier("gcn", 5, 10), a), "was built for 5"),
        (lambda a, y: train_classifier(as_columns(a, "gcn"), y, a, y, "typed", vocabulary_size=10),
         "cannot be read by 'typed'"),
        (lambda a, y: predict(GraphClassifier("gcn", 6, 10, parts=("visual",)), [to_data(x) for x in a]),
         "reads visual"),
        (lambda a, y: known_targets(a, [0, 1] * 3 + [2, np.nan], "test"), "test: 1 targets are neither"),
    ],
)
def test_refusals(call, said):
    assets = [random_asset(i, m=3) for i in range(8)]
    with pytest.raises(NeuralError, match=said) as e: call(assets, np.arange(8) % 2.)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_classifier_answers_the_same(tmp_path, kind):
    torch.manual_seed(0)
    model, assets = GraphClassifier(kind, 6, 10, hidden=8, patches=144, fusion="none", parts=("visual",)).eval(), [
        random_asset(i) for i in range(6)]
    model.mean += 1
    save_classifier(model, tmp_path / "c")
    again = load_classifier(tmp_path / "c")
    assert (np.array_equal(predict(again, assets), predict(model, assets)) and again.config == model.config
            and not again.training)
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == ["config.json", "model.safetensors"]


def test_foreign_or_damaged_classifier_is_refused(tmp_path):
    save_classifier(GraphClassifier("gcn", 6, 10, hidden=8), tmp_path)
    good, weights = (tmp_path / "config.json").read_text(), (tmp_path / "model.safetensors").read_bytes()
    for edit in (dict(format="x"), dict(hidden=9), dict(hidden=-1), dict(hidden="8"), dict(vocabulary_size=10**12),
                 dict(kind="mpnn"), dict(parts=["labels"]), dict(parts=3), dict(extra=1), dict(dropout="x")):
        (tmp_path / "config.json").write_text(json.dumps(json.loads(good) | edit))
        with pytest.raises(NeuralError): load_classifier(tmp_path)
    (tmp_path / "config.json").write_text(good)
    for bad in (b"", weights[:100], b"\x80\x04" + weights[2:], b"\xff" * 64):
        (tmp_path / "model.safetensors").write_bytes(bad)
        with pytest.raises(NeuralError): load_classifier(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(NeuralError, match="config.json: cannot be read, it is damaged"): load_classifier(tmp_path)


# where a classifier comes from, and what it is given to read

VOCABULARY = [f"word {i}" for i in range(10)]


def a_store(
    folder,
    n=12,
    track="image+report",
    codec="int8",
    grid=(12, 12),
    words=VOCABULARY,
    network="aa" * 8,
    fusion="grounding",
    k=4,
    parts=1,
):
    "A store of planted studies, in one shard or more."
    from dataclasses import replace
    from neural.asset import AssetStore
    store = AssetStore.create(folder, words, dim=6, grid=grid, track=track, codec=codec,
                              provenance=dict(model_hash=network, fusion=fusion), settings=dict(keep=k))
    made = [replace(a, track=track, codec=codec, grid=grid, patches=np.arange(k) if grid != (12, 12) else a.patches)
            for a in planted(n, "patch", 3, k=k)[0]]
    for part in np.array_split(np.arange(n), parts): store.append([made[i] for i in part])
    return store


def a_classifier(store, folder, **about):
    "A classifier that saw one epoch of a store."
    assets, y = list(store), np.arange(len(store)) % 2.
    model, _ = train_classifier(assets, y, assets, y, vocabulary_size=len(store.vocabulary), hidden=8, epochs=1)
    save_classifier(model, folder, **about)
    return model


def neural(*words):
    from typer.testing import CliRunner
    from neural.cli import app
    said = CliRunner().invoke(app, [str(w) for w in words])
    assert said.exit_code != 1 or said.stderr.count("\n") == 1, said.output
    return said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    home = tmp_path_factory.mktemp("trained")
    return (a_store(home / "store"),
            a_classifier(a_store(home / "again"), home / "gcn", target="Edema", policy="zeros"), home)


OTHER = dict(network=dict(network="bb" * 8), track=dict(track="image-only"), vocabulary=dict(words=VOCABULARY[::-1]),
             words=dict(words=[*VOCABULARY, "new"]), codec=dict(codec="f16"), fusion=dict(fusion="betweenness"),
             grid=dict(grid=(10, 14)), patches=dict(k=5))


@pytest.mark.parametrize("what", OTHER)
def test_a_store_of_another_kind_is_refused_with_both_names(trained, tmp_path, what):
    store, _, home = trained
    other = a_store(tmp_path / "other", **OTHER[what])
    refused = neural("predict", other.folder, "--classifier", home / "gcn", "-o", tmp_path / "p.csv")
    both = {"network": ("aa" * 8, "bb" * 8), "track": ("image+report", "image-only"), "codec": ("int8", "f16"),
            "fusion": ("grounding", "betweenness"), "grid": ("12 x 12", "10 x 14"), "words": ("10", "11"),
            "patches": ("4", "5")}
    assert (refused.exit_code == 1 and "--anyway" in refused.output
            and all(name in refused.output for name in both.get(what, ("vocabulary",)))), refused.output
    assert not (tmp_path / "p.csv").exists()
    told = neural("predict", other.folder, "--classifier", home / "gcn", "-o", tmp_path / "p.csv", "--anyway")
    assert told.exit_code == (1 if what == "words" and "not in the vocabulary" in told.output else 0), told.output


@pytest.mark.parametrize("what", ["network", "track", "vocabulary", "codec", "fusion"])
def test_python_refuses_the_same(trained, tmp_path, what):
    _, model, _ = trained
    assets = list(a_store(tmp_path / "other", **OTHER[what]))
    with pytest.raises(NeuralError, match="this classifier was trained on .* and not .*anyway=True"):
        predict(model, assets)
    assert predict(model, assets, anyway=True).shape == (12,)
    y = np.arange(12) % 2.
    with pytest.raises(NeuralError, match="trained on"):
        train_classifier(list(trained[0]), y, assets, y, vocabulary_size=10, hidden=8, epochs=1)


def test_a_saved_classifier_says_what_it_was_trained_on(trained):
    known = load_classifier(trained[2] / "gcn").trained_on
    assert (known["network"] == ["aa" * 8] and known["track"] == ["image+report"] and known["codec"] == ["int8"]
            and known["grid"] == ["12 x 12"] and known["fusion"] == ["grounding"])
    assert (known["target"] == "Edema" and known["policy"] == "zeros"
            and known["vocabulary"] == [trained[0].provenance["vocabulary_hash"]])


def test_a_classifier_of_patches_alone_needs_no_vocabulary(tmp_path):
    store, other = a_store(tmp_path / "a"), a_store(tmp_path / "b", words=VOCABULARY[::-1])
    y = np.arange(12) % 2.
    model, _ = train_classifier(list(store), y, list(store), y, hidden=8, epochs=1, parts=("visual",))
    assert predict(model, list(other)).shape == (12,)


def test_a_classifier_of_an_earlier_version_opens_and_says_what_is_unknown(trained, tmp_path):
    import shutil
    from safetensors.torch import load_file, save_file
    shutil.copytree(trained[2] / "gcn", tmp_path / "old")
    about = json.loads((tmp_path / "old/config.json").read_text())
    (tmp_path / "old/config.json").write_text(
        json.dumps({k: v for k, v in about.items() if k not in ("trained_on", "weights")}))
    # without its head
    save_file(load_file(tmp_path / "old/model.safetensors"), tmp_path / "old/model.safetensors")
    told = neural("predict", trained[0].folder, "--classifier", tmp_path / "old", "-o", tmp_path / "p.csv")
    assert (told.exit_code == 0
            and "not recorded by this classifier, so not compared: network, track, vocabulary, codec, fusion, grid"
            in told.output)
    other = a_store(tmp_path / "other", words=[*VOCABULARY, "new"])
    assert (
        "words in the vocabulary 10 and not 11" in neural(
            "predict", other.folder, "--classifier", tmp_path / "old", "-o", tmp_path / "q.csv").output
    )


def test_predictions_are_written_over_nothing_that_is_not_ours(trained, tmp_path):
    store, _, home = trained
    run = lambda out, *more: neural("predict", store.folder, "--classifier", home / "gcn", "-o", out, *more)
    (tmp_path / "mine.csv").write_text("study_id,p\ns1,0.5\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "mine.csv")
    before = {
        p: p.read_bytes() for folder in (store.folder, home / "gcn", tmp_path) for p in folder.iterdir() if p.is_file()}
    for out in ("mine.csv", "link.csv", store.folder / "new.csv", home / "gcn/config.json",
                home / "gcn/model.safetensors", store.shards[0]):
        for flag in ([], ["--force"]): assert run(tmp_path / out, *flag).exit_code == 1, out
    assert {p: p.read_bytes() for p in before} == before and not (store.folder / "new.csv").exists()
    assert run(tmp_path / "deep/p.csv").exit_code == 0
    assert ("replace it with --force" in run(tmp_path / "deep/p.csv").output
            and run(tmp_path / "deep/p.csv", "--force").exit_code == 0)
    assert (tmp_path / "deep/p.csv").read_text().splitlines()[0] == "study_id,p,classifier" and run(
        tmp_path).exit_code == 2


def test_one_bad_asset_among_many_is_left_out_and_counted(trained, tmp_path):
    import csv
    store = a_store(tmp_path / "store", n=40, parts=8)
    shard = store.shards[5]
    data = shard.read_bytes()
    shard.write_bytes(data[:400] + bytes([data[400] ^ 255]) + data[401:])
    run = lambda *more: neural(
        "predict", store.folder, "--classifier", trained[2] / "gcn", "-o", tmp_path / "p.csv", *more)
    stopped = run()
    assert stopped.exit_code == 1 and "5 of 40 studies left out" in stopped.output and not (tmp_path / "p.csv").exists()
    told = run("--limit", 0.2)
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert (
        told.exit_code == 0 and "left out: " in told.output and len(rows) == 40 and sum(r["p"] == "" for r in rows) == 5
    )


def test_an_empty_store_and_studies_that_a_store_lacks_are_refused(trained, tmp_path):
    from neural.asset import AssetStore
    from neural.classify import StoreDataset
    empty = AssetStore.create(
        tmp_path / "empty", VOCABULARY, dim=6, provenance=dict(model_hash="aa" * 8, fusion="grounding"))
    assert (
        "holds no study yet" in neural(
            "predict", empty.folder, "--classifier", trained[2] / "gcn", "-o", tmp_path / "p.csv").output
    )
    with pytest.raises(NeuralError, match="lacks 2 of 3 studies, such as 'x1', 'x2'; it holds 12, such as 's0'"):
        StoreDataset(trained[0], ["s1", "x1", "x2"])
    assert len(StoreDataset(trained[0], [])) == 0                                   # none is none, not all


# kept whole

@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("first", [True, False])
def test_a_kill_between_two_files_leaves_the_old_classifier_or_the_new_one(tmp_path, monkeypatch, when, first):
    import os
    old, new = (GraphClassifier("gcn", 6, 10, hidden=8) for _ in range(2))
    new.trained_on = {"network": ["cc" * 8]}
    if not first: save_classifier(old, tmp_path / "c")
    true, seen = os.replace, []
    def replace(a, b):
        seen.append(b)
        if len(seen) > when: raise KeyboardInterrupt
        true(a, b)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt): save_classifier(new, tmp_path / "c")
    monkeypatch.undo()
    if first and when == 0:
        with pytest.raises(NeuralError, match="holds no classifier"): load_classifier(tmp_path / "c")
        return
    again = load_classifier(tmp_path / "c")
    wanted = old if when == 0 else new
    assert again.trained_on == wanted.trained_on and torch.equal(again.last.weight, wanted.last.weight)
    assert not [p for p in (tmp_path / "c").iterdir() if p.name.endswith(".part")]


@pytest.mark.parametrize("code", [28, 122, 13, 30, 5])
def test_a_disk_that_fails_is_told_and_the_old_classifier_stays(tmp_path, monkeypatch, code):
    import os
    model = GraphClassifier("gcn", 6, 10, hidden=8)
    save_classifier(model, tmp_path / "c")
    before = {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}
    def fail(*_): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(NeuralError, match=os.strerror(code)) as e:
        save_classifier(GraphClassifier("gcn", 6, 10, hidden=8), tmp_path / "c")
    monkeypatch.undo()
    assert "\n" not in str(e.value) and {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()} == before


def test_exchanged_weights_and_foreign_folders_are_told(tmp_path):
    for name in "ab": save_classifier(GraphClassifier("gcn", 6, 10, hidden=8), tmp_path / name)
    (tmp_path / "a/model.safetensors").write_bytes((tmp_path / "b/model.safetensors").read_bytes())
    with pytest.raises(NeuralError, match="do not belong together"): load_classifier(tmp_path / "a")
    for name, text in (("config.json", '{"model_type": "swin"}'), ("config.json", "[]"),
                       ("model.safetensors", "weights of somebody")):
        (tmp_path / name[:5]).mkdir(exist_ok=True)
        (tmp_path / name[:5] / name).write_text(text)
        with pytest.raises(NeuralError): save_classifier(GraphClassifier("gcn", 6, 10, hidden=8), tmp_path / name[:5])
        assert (tmp_path / name[:5] / name).read_text() == text


@pytest.mark.parametrize(
    "wrong, said",
    [(dict(epochs=0), "epochs must be 1 or more, got 0"), (dict(batch_size=0), "batch_size"),
     (dict(patience=0), "patience"), (dict(lr=0), "lr must be above 0"), (dict(lr=-1), "lr"),
     (dict(hidden=0), "hidden"), (dict(dropout=1.0), "dropout"), (dict(dropout=-0.1), "dropout"),
     (dict(seed=-1), "seed"), (dict(weight_decay=-1), "weight_decay"), (dict(epochs=None), "epochs")],
)
def test_zero_is_refused_by_name_and_never_the_default(wrong, said):
    assets, y = [random_asset(i, m=3) for i in range(8)], np.arange(8) % 2.
    with pytest.raises(NeuralError, match=said): train_classifier(assets, y, assets, y, vocabulary_size=10, **wrong)
    with pytest.raises(NeuralError, match="batch_size must be 1 or more"):
        predict(GraphClassifier("gcn", 6, 10), assets, batch_size=0)


# how sure the writer was of a concept

def doubted(n, seed):
    "The label stands in the certainty of the first concept alone."
    (assets, y), r = planted(n, "none", seed), np.random.default_rng(seed)
    own = [[round(254 * r.uniform(*((.6, .9) if ill else (.1, .4)))), 255, 255] for ill in y]
    return [replace(a, track="image-only", certainty=c) for a, c in zip(assets, own)], y


def unsure(assets): return [replace(a, certainty=()) for a in assets]


@pytest.mark.parametrize("kind", KINDS)
def test_what_only_the_certainty_tells_is_learnt(kind):
    (a, ya), (b, yb), (c, yc) = (doubted(n, s) for n, s in ((160, 1), (80, 2), (160, 3)))
    found = {
        read: roc_auc_score(
            yc,
            predict(
                train_classifier(
                    a, ya, b, yb, kind, vocabulary_size=10, hidden=32, epochs=20, batch_size=16, certainty=read)[0],
                c,
            ),
        )
        for read in (True, False)
    }
    assert found[True] > .95 and found[False] < .65


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("certainty", [(), [255, 255, 255]])
def test_the_unknown_adds_nothing(kind, certainty):
    assets = [replace(a, track="image-only", certainty=certainty) for a in planted(12, "none", 4)[0]]
    torch.manual_seed(0)
    plain = GraphClassifier(kind, 6, 10)
    torch.manual_seed(0)
    hearing = GraphClassifier(kind, 6, 10, certainty=True)
    for m in (plain, hearing):
        torch.manual_seed(1)
        torch.nn.init.normal_(m.last.weight)
    torch.nn.init.normal_(hearing.sure)
    assert torch.equal(plain(collate(assets)), hearing(collate(assets)))
    told = [replace(a, certainty=[254, 255, 255]) for a in assets]
    assert torch.equal(plain(collate(told)), plain(collate(assets))) and not torch.allclose(
        hearing(collate(told)), plain(collate(told)))


@pytest.mark.parametrize("kind", KINDS)
def test_without_certainties_a_classifier_is_the_one_it_always_was(kind):
    (a, ya), (b, yb) = planted(40, "patch", 1), planted(20, "patch", 2)
    model, _ = train_classifier(a, ya, b, yb, kind, vocabulary_size=10, hidden=8, epochs=2)
    open_eared, _ = train_classifier(a, ya, b, yb, kind, vocabulary_size=10, hidden=8, epochs=2, certainty=True)
    assert "certainty" not in model.config and "sure" not in model.state_dict() and not open_eared.sure.any()
    assert np.array_equal(predict(model, b), predict(open_eared, b))


def test_certainties_are_read_alike_one_by_one_at_once_and_cut():
    assets = [
        (a if len(a.concepts) == 0 or i % 3 == 0
         else replace(a, track="image-only", certainty=np.random.default_rng(i).integers(0, 256, len(a.concepts))))
        for i, a in enumerate(random_asset(i) for i in range(40))
    ]
    single, many = Batch.from_data_list([to_data(a) for a in assets]), collate(assets)
    assert (torch.equal(single.certainty, many.certainty) and many.certainty.abs().max() <= 1
            and len(many.certainty) == len(many.word))
    rows = [5, 1, 30, 1]
    assert torch.equal(GraphColumns(many).batch(rows).certainty, collate([assets[i] for i in rows]).certainty)
    assert GraphColumns(collate([random_asset(i) for i in range(5)])).batch([0, 1]).certainty is None
    assert len(collate(assets, parts=("visual",)).certainty) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_that_hears_certainties_is_kept_and_its_file_is_not_trusted(tmp_path, kind):
    a, y = doubted(40, 1)
    model, _ = train_classifier(a, y, a, y, kind, vocabulary_size=10, hidden=8, epochs=3)
    save_classifier(model, tmp_path / "c")
    assert np.array_equal(predict(load_classifier(tmp_path / "c"), a), predict(model, a)) and model.sure.any()
    config = json.loads((tmp_path / "c/config.json").read_text())
    for bad, said in ((1, "true or false"), ("yes", "true or false"), (False, "do not belong together")):
        (tmp_path / "c/config.json").write_text(json.dumps({**config, "certainty": bad}))
        with pytest.raises(NeuralError, match=said): load_classifier(tmp_path / "c")
    with pytest.raises(NeuralError, match="certainty is of a concept"):
        GraphClassifier(kind, 6, 10, parts=("visual",), certainty=True)
