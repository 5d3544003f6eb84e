"Units of a model: found wherever they live, scored by rules that keep their promises, removed without a trace."
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neural.asset import StudyAsset
from neural.attribute import ADDITIONS, RULES, Rule, ask, layer_gradients, prepared, share
from neural.classify import PARTS, GraphClassifier, as_columns, load_classifier, save_classifier
from neural.criteria import (CRITERIA, SPACE, Calibration, agreement, calibrate, choose, erased, film_maps,
                             paired_latency, rank_units, recalibrate, recover, score_units, survival)
from neural.evaluate import file_bytes
from neural.image_model import ImageModel, InvertedBlock, ResidualBlock, load_image_model, save_image_model
from neural.mxa import vit_model
from neural.prune import Budget, Scores, top_k
from neural.results import count_macs
from neural.slim import Mask, bytes_after, find_units, network_digest, pipes_of, save_slim, silenced, slimmed
from neural.study import NeuralError
from neural.vlm import ReportVLM, load_vlm, save_vlm, small_config

ATTRIBUTIONS = [c for c, family in CRITERIA.items() if family != "free"]
by_name = pytest.mark.parametrize


def lively(model, seed=0):
    "Weights and statistics as after a training: nothing zero, nothing one."
    torch.manual_seed(seed)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if not t.is_floating_point(): continue
        if "running_var" in name: nn.init.uniform_(t, 0.5, 2)
        elif t.ndim < 2: nn.init.uniform_(t, -0.5, 1)
        elif "bias_table" in name or "attention_bias" in name: nn.init.normal_(t)
        elif "head" in name or "last" in name: nn.init.normal_(t, std=0.3)
    return model.eval()


def drawn(model, ratio, seed=0):
    "A mask that keeps a share of the units of each layer, drawn blindly."
    pick, kept = torch.Generator().manual_seed(seed), {}
    for layer in find_units(model):
        kept[layer.name] = torch.zeros(layer.units, dtype=torch.bool)
        kept[layer.name][torch.randperm(layer.units, generator=pick)[: max(1, round(ratio * layer.units))]] = True
    return Mask(kept, network_digest(model))


def levels(**more):
    torch.manual_seed(0)
    return lively(ImageModel(("A", "B", "C"), 32, ((6, 6), (8, 8)), **more))


def film(model, n=2, size=None):
    return torch.rand(n, 1, *[size or model.config["image_size"]] * 2, generator=torch.Generator().manual_seed(1))


def assets(n=5, d=6, words=10):
    rng, out = np.random.default_rng(0), []
    for i in range(n):
        concepts = rng.permutation(words)[:3]
        patches = np.sort(rng.choice(144, 4, replace=False))
        out.append(StudyAsset(f"s{i}", "image+report", (12, 12), patches, rng.random(4), rng.normal(size=(4, d)),
                              concepts, rng.integers(0, 3, 3), [(0, 1, 1)], [(0, 0), (1, 1)], [1.0, 1.0]))
    return out


# rules

DENSE = dict(x=torch.tensor([1.0, -2, 0.5]), w=torch.tensor([[1.0, 2, 3], [-1, 0.5, 2]]).T, b=torch.tensor([0.5, -1]),
             relevance=torch.tensor([1.0, 2]))


def test_vectors_worked_out_by_hand():
    found, kept = share(Rule("absolute"), lambda a, w: a @ w, *DENSE.values())
    assert found.tolist() == pytest.approx([0.642857, 1.071429, 0.714286], abs=1e-6)
    assert kept.item() == pytest.approx(3 - found.sum().item(), abs=1e-6)
    x, k = torch.arange(1.0, 10).view(1, 1, 3, 3) - 4, torch.tensor([[[[1.0, -1], [0.5, 2]]]])
    for b, wanted in ((0.25, [0.413793, 0.791991, 0.258065, 0, 0.946259, 1.556848, 0.418605, 2.757148, 2.622951]),
                      (0.0, [0.428571, 0.819048, 0.266667, 0, 0.971429, 1.6, 0.428571, 2.819048, 2.666667])):
        found = share(Rule("absolute"), torch.conv2d, x, k, torch.tensor(b), torch.tensor([[[[1.0, 2], [3, 4]]]]))[0]
        assert found.flatten().tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_released_sides_rule_is_not_ours():
    "x = (1, 1, 1), w = (1, 2, 3), b = 1/2: the released code adds 1 where one side is empty (scouting notes, A2)."
    w = torch.tensor([[1.0], [2], [3]])
    found = share(Rule("absolute"), lambda a, w: a @ w, torch.ones(3), w, torch.tensor([0.5]), torch.ones(1))[0]
    assert found.tolist() == pytest.approx([0.1538462, 0.3076923, 0.4615385], abs=1e-6)


@by_name("rule", RULES)
@by_name("addition", ["rule", "equal"])
def test_relevance_in_is_relevance_out_and_the_share_of_the_bias(rule, addition):
    net = prepared(levels())
    trace = ask(net, film(net), torch.tensor([0, 2]), (), Rule(rule, addition=addition))
    for row in trace.ledger:
        assert row["out"] == pytest.approx(row["into"] + row["bias"] + row["lost"], abs=1e-3)
        if rule != "zplus": assert row["lost"] == pytest.approx(0, abs=5e-3 * max(1, abs(row["out"])))
    total = sum(row["bias"] + row["lost"] for row in trace.ledger)
    assert trace.said.sum().item() == pytest.approx(trace.found["input"].sum().item() + total, rel=1e-2, abs=1e-2)


class Plain(nn.Module):
    "a + f(a), without a bias."
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6, bias=False)
        nn.init.uniform_(self.inner.weight, 0, 0.3)

    def forward(self, a): return a + self.inner(a)


@by_name("addition,factor", [("rule", 1), ("equal", 1), ("naive", 2)])
def test_a_plain_residual_doubles_unless_the_addition_is_a_node(addition, factor):
    net = prepared(nn.Sequential(Plain(), Plain(), Plain(), nn.Linear(6, 1, bias=False)))
    nn.init.uniform_(net[3].weight, 0.1, 1)
    for rule in RULES:
        trace = ask(net, torch.rand(2, 6), torch.zeros(2).long(), (), Rule(rule, addition=addition), None, "one")
        assert trace.found["input"].sum(1).tolist() == pytest.approx([factor**3] * 2, rel=1e-3)
    assert addition in ADDITIONS


def test_epsilon_is_activation_times_gradient():
    net = prepared(levels(sharpness=0))
    places = [p.name for layer in find_units(net) for p in layer.read]
    by_rule, by_slope = (ask(net, film(net), torch.tensor([0, 1]), places, rule) for rule in (Rule("epsilon"), None))
    for place in places:
        assert torch.allclose(by_rule.found[place], by_slope.activations[place] * by_slope.found[place], atol=1e-4)


def test_functions_are_followed_whatever_their_module_is_called_and_unknown_ones_refused():  # D7, D8
    class Strange(nn.Module):
        def forward(self, x): return x.sin()
    net = levels()
    net.net.stages[0] = nn.Sequential(net.net.stages[0], Strange())
    with pytest.raises(NeuralError, match=r"net.stages.0.1: no rule of relevance is known for sin\(\)"):
        ask(prepared(net), film(net), torch.tensor([0, 0]), (), Rule())
    ask(prepared(net), film(net), torch.tensor([0, 0]))                                    # a gradient needs none
    product = nn.Sequential(nn.Linear(4, 4))
    product.forward = lambda x: nn.Sequential.forward(product, x) * x
    with pytest.raises(NeuralError, match="no rule of relevance is known for a product of two maps of one size"):
        ask(product.requires_grad_(False), torch.rand(2, 4), torch.tensor([0, 0]), (), Rule())


def test_many_films_at_once_are_one_by_one():  # D14
    net, x, label = prepared(levels()), film(levels(), 3), torch.tensor([2, 0, 1])
    for rule in (Rule("absolute"), Rule("gamma")):
        together = ask(net, x, label, (), rule).found["input"]
        for i in range(3):
            alone = ask(net, x[i : i + 1], label[i : i + 1], (), rule).found["input"][0]
            assert torch.allclose(alone, together[i], atol=1e-5)


def test_another_label_another_explanation():  # D2, D13
    net, x = prepared(levels()), film(levels(), 1)
    a, b = (ask(net, x, torch.tensor([l]), (), Rule("absolute")).found["input"] for l in (0, 1))
    assert (a / a.sum() - b / b.sum()).abs().sum() > 0.02


def test_captum_agrees_on_layer_gradients():
    attr = pytest.importorskip("captum.attr")
    net, x, label = prepared(levels()), film(levels()), torch.tensor([0, 2])
    for place in ("net.stages.1.0", "net.stages.1.1.body.3"):
        theirs = attr.LayerIntegratedGradients(net, net.get_submodule(place)).attribute(
            x, target=label, n_steps=16, method="gausslegendre", attribute_to_layer_input=True)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        assert torch.allclose(layer_gradients(net, x, label, place, 16, baseline=0 * x), theirs, atol=1e-4)


def test_asking_leaves_the_network_as_it_is():  # the tool changes yours: seeds, threads, gradients
    net = levels().train()
    before, state = network_digest(net), torch.get_rng_state()
    films = film(net, 3)
    calib = calibrate(np.eye(3), "ABC", each=1)
    for criterion in CRITERIA: score_units(net, films, calib, criterion, steps=2)
    assert network_digest(net) == before and net.training and all(p.requires_grad for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state) and not any(m._forward_pre_hooks for m in net.modules())


# units

class Excite(nn.Module):
    "A gate per channel, from the channels' means."
    def __init__(self, width, inner=4):
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, inner, 1), nn.ReLU(),
                                  nn.Conv2d(inner, width, 1))

    def forward(self, x): return x * self.gate(x).sigmoid()


@pipes_of(Excite)
def _(pipes, name, part, stream, read):
    return pipes.join(stream, pipes.walk(f"{name}.gate", stream, False), name)


class Mixed(nn.Module):
    "Residual, depth-wise and squeeze-excite in one."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                                  ResidualBlock(8, 8), InvertedBlock(8, 8, expand=3), Excite(8),
                                  InvertedBlock(8, 12, expand=2, halve=True), ResidualBlock(12, 12, True), Excite(12))
        self.head = nn.Linear(12, 3)

    def forward(self, x): return self.head(self.body(x).mean((2, 3)))


@pipes_of(Mixed)
def _(pipes, name, part, stream, read):
    pipes.reads(pipes.walk("body", None), "head", -1)


VLM = dict(image_size=96, labels=("A", "B"), width=64, d_model=64)
VIT = dict(widths=(16, 32), depths=(1, 2), heads=(2, 2), kernels=(3, 3), key=8)
NETWORKS = {
    "levels": lambda: levels(),
    "levels, blocks of three": lambda: lively(ImageModel(("A", "B"), 32, ((6, 6, 8), (8, 12, 12)), last=(3, 3))),
    "levels, as wide when halved": lambda: lively(ImageModel(("A", "B"), 32, ((8, 8), (8, 8), (8, 16)))),
    "efficientnet": lambda: lively(ImageModel(("A", "B"), 64, net="efficientnet-lite0", wide=False)),
    "squeeze-excite": lambda: lively(Mixed()),
    "efficientvit": lambda: lively(vit_model(("A", "B"), 64, **VIT)),
    "efficientvit, learnt box": lambda: lively(vit_model(("A", "B"), 64, box="learnt", **VIT)),
    "report network, levels": lambda: lively(ReportVLM(small_config(40, stem="levels", **VLM))),
    "report network, conv": lambda: lively(ReportVLM(small_config(40, stem="conv", **VLM))),
    "report network, patches": lambda: lively(ReportVLM(small_config(40, stem="patch", **VLM | {"width": 96}))),
    "report network, no Swin": lambda: lively(ReportVLM(small_config(40, stem="levels", depth=0, **VLM))),
}


def said(model, x=None):
    "All that a model of NETWORKS says."
    if not isinstance(model, ReportVLM): return model(film(model, size=None if hasattr(model, "config") else 32))
    x = torch.rand(2, 1, 96, 96, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(2, 40, (2, 7), generator=torch.Generator().manual_seed(2))
    out = model(x, ids)
    return torch.cat([out.logits.flatten(), out.label_logits.flatten()])


@by_name("name", NETWORKS)
@torch.no_grad()
def test_a_unit_removed_is_a_unit_at_zero(name):
    model = NETWORKS[name]()
    whole = said(model)
    for seed, ratio in enumerate((0.75, 0.5, 0.2)):
        mask = drawn(model, ratio, seed)
        less = slimmed(model, mask)
        assert torch.allclose(said(less), said(silenced(model, mask)), atol=1e-5), ratio
        assert not torch.allclose(said(less), whole, atol=1e-3)
        assert sum(t.nbytes for t in less.state_dict().values()) == bytes_after(model, mask)
    assert torch.equal(said(model), whole)


@torch.no_grad()
def test_wide_efficientnet_and_a_second_removal():
    model = lively(ImageModel(("A", "B"), 64, net="efficientnet-lite0"))
    mask = drawn(model, 0.25)
    less = slimmed(model, mask)
    assert torch.allclose(less(film(model)), silenced(model, mask)(film(model)), atol=1e-5)
    again = drawn(less, 0.5)
    least = slimmed(less, again)
    assert torch.allclose(least(film(model)), silenced(less, again)(film(model)), atol=1e-5)
    assert count_macs(least, film(model, 1)) < 0.1 * count_macs(model, film(model, 1))
    assert ImageModel(**least.config).state_dict()["head.weight"].shape == (2, 160)


@by_name("kind,more", [("gcn", {}), ("typed", {}), ("typed", dict(patches=144, certainty=True)),
                       ("typed", dict(parts=("visual",))), ("gcn", dict(parts=("knowledge",))),
                       ("typed", dict(parts=("visual", "knowledge", "context")))])
@torch.no_grad()
def test_a_hidden_unit_of_a_graph_classifier_removed_is_one_at_zero(kind, more, tmp_path):
    parts = more.get("parts", PARTS)
    g = as_columns(assets(), kind, parts=[p for p in parts if p != "context"]).batch(np.arange(5))
    if "context" in parts: g.context = torch.randint(0, 256, (5, 1, 48, 48), dtype=torch.uint8)
    model = lively(GraphClassifier(kind, 6, 10, hidden=12, **more))
    for seed, ratio in enumerate((0.75, 0.5, 0.2)):
        mask = drawn(model, ratio, seed)
        less = slimmed(model, mask)
        assert torch.allclose(less(g), silenced(model, mask)(g), atol=1e-5)
    save_slim(less, tmp_path / "slim")
    assert torch.equal(load_classifier(tmp_path / "slim")(g), less(g))


@torch.no_grad()
def test_the_ungated_decoder_and_what_it_writes():
    config = small_config(40, stem="levels", **VLM)
    config.decoder = {**config.decoder, "feed_forward_proj": "relu", "num_decoder_layers": 3, "num_heads": 4}
    model = lively(ReportVLM(config))
    mask = drawn(model, 0.5)
    less, silent = slimmed(model, mask), silenced(model, mask)
    assert {b.layer[1].EncDecAttention.n_heads for b in less.decoder.decoder.block} == {2}
    assert torch.allclose(said(less), said(silent), atol=1e-5)
    x = torch.rand(2, 1, 96, 96)
    for how in ((12,), (8, 3)): assert torch.equal(less.write(x, *how), silent.write(x, *how))
    kept = mask.kept["decoder.decoder.block.0.layer.0.SelfAttention"]
    table = "decoder.decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(less.state_dict()[table], model.state_dict()[table][:, kept])


def test_a_stream_is_all_that_is_added():
    model = levels()
    found = {layer.name: layer for layer in find_units(model)}
    made = {p.name.removeprefix("net.stages.1.") for p in found["net.stages.1.0.shortcut.1"].made}
    assert made == {"0.shortcut.1.weight", "0.shortcut.2.weight", "0.shortcut.2.bias", "0.body.3.weight",
                    "0.body.4.weight", "0.body.4.bias", "1.body.3.weight", "1.body.4.weight", "1.body.4.bias"}
    everything = [p.name for layer in found.values() for part in (layer.made, layer.cut) for p in part]
    missed = {n for n, t in model.state_dict().items() if t.ndim} - set(everything)
    assert missed == {"head.bias"}                               # every other tensor has an axis of units


def test_torch_pruning_finds_the_same_groups():
    tp = pytest.importorskip("torch_pruning")
    model = levels()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=film(model))
    names = {id(m): n for n, m in model.named_modules()}
    for layer in find_units(model):
        first = model.get_submodule(layer.name)
        group = graph.get_pruning_group(first, tp.prune_conv_out_channels, idxs=[0])
        theirs = {names[id(d.target.module)] for d, _ in group if id(d.target.module) in names}
        ours = {p.name.rpartition(".")[0] for part in (layer.made, layer.cut) for p in part}
        assert ours - {"head"} == theirs, layer.name              # it misses a weight that no module calls


def test_torch_pruning_removes_to_the_same_numbers():
    tp = pytest.importorskip("torch_pruning")
    model, theirs = levels(), levels()
    layer = find_units(model)[1]
    kept = {l.name: torch.ones(l.units, dtype=torch.bool) for l in find_units(model)}
    kept[layer.name][[1, 4]] = False
    graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=film(model))
    graph.get_pruning_group(theirs.get_submodule(layer.name), tp.prune_conv_out_channels, idxs=[1, 4]).prune()
    ours = slimmed(model, Mask(kept, network_digest(model)))
    assert torch.allclose(ours(film(model)), theirs(film(model)), atol=1e-6)


# what is saved

@by_name("kind", ["levels", "efficientnet", "efficientvit, learnt box", "report network, levels",
                  "report network, conv"])
def test_a_slim_network_is_an_ordinary_one_and_smaller_by_what_was_promised(kind, tmp_path, monkeypatch):
    model = NETWORKS[kind]()
    save, load = ((save_vlm, load_vlm) if isinstance(model, ReportVLM) else (save_image_model, load_image_model))
    mask = drawn(model, 0.5)
    less = slimmed(model, mask)
    save(model, tmp_path / "dense")
    save_slim(less, tmp_path / "slim")
    dense, slim = (file_bytes(tmp_path / n / "model.safetensors") for n in ("dense", "slim"))
    promised = sum(t.nbytes for t in model.state_dict().values()) - bytes_after(model, mask)
    assert dense - slim == pytest.approx(promised, abs=2000)              # the head of the file names shapes
    monkeypatch.setitem(sys.modules, "neural.slim", None)                  # whoever opens it does without this chapter
    back = load(tmp_path / "slim")
    assert torch.equal(said(back), said(less))
    assert network_digest(back) == network_digest(less)


def test_the_dense_network_is_never_overwritten(tmp_path):
    graphs = lively(GraphClassifier("gcn", 6, 10, hidden=8))
    for model, save in ((levels(), save_image_model), (graphs, save_classifier)):
        folder = tmp_path / type(model).__name__
        save(model, folder)
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        less = slimmed(model, drawn(model, 0.5))
        with pytest.raises(NeuralError, match=f"{folder.name} holds a dense network, which is never overwritten"):
            save_slim(less, folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        save_slim(less, tmp_path / f"{folder.name}-slim")
        save_slim(less, tmp_path / f"{folder.name}-slim")                   # a slim one is replaced
        with pytest.raises(NeuralError, match="nothing has been removed from it"): save_slim(model, tmp_path / "x")


@by_name("slim,why", [({"net.stem.0.weight": [60, 1, 6, 6]}, "cannot be rebuilt"), (7, "cannot be rebuilt"),
                      ({"net.roof": [2]}, "cannot be rebuilt"), ({"no.roof.weight": [2]}, "cannot be rebuilt"),
                      ({"net.stem.0.weight": [2, 1, 6, 6]}, "do not fit its configuration")])
def test_a_configuration_that_lies_is_refused(slim, why, tmp_path):
    model = levels()
    model.config["slim"] = slim
    save_image_model(model, tmp_path / "m")
    with pytest.raises(NeuralError, match=why): load_image_model(tmp_path / "m")


# planted truth

def planted(seed=0):
    "A network, and the two of its units on which every decision hangs; the others are louder."
    torch.manual_seed(seed)
    model = lively(ImageModel(("A", "B"), 32, ((4, 4), (6, 6))), seed)
    pick = np.random.default_rng(seed)
    live, heard = np.sort(pick.choice(6, 2, replace=False)), np.sort(pick.choice(6, 3, replace=False))
    deaf, rest = np.setdiff1d(np.arange(6), heard), np.setdiff1d(np.arange(6), live)
    block = model.net.stages[1][1]
    with torch.no_grad():
        model.head.weight[:] = model.head.weight.abs()
        model.head.weight[:, deaf] = 0
        block.body[3].weight[np.ix_(heard, rest)] = 0
        block.body[3].weight[np.ix_(heard, live)] = block.body[3].weight[np.ix_(heard, live)].abs()
        block.body[4].weight[:] = block.body[4].weight.abs() + 0.1              # LRP-z+ knows no evidence against
        block.body[4].bias[:], block.body[4].running_mean[:] = 0.1, 0.0
        block.body[0].weight[rest] *= 5
        block.body[1].bias[:], block.body[1].weight[:] = 2.0, 1.0
        block.body[1].weight[rest] = 3.0
    return model, "net.stages.1.1.body.0", set(live.tolist())


@by_name("criterion", ATTRIBUTIONS)
@by_name("space", SPACE)
def test_attribution_keeps_the_units_that_decide(criterion, space):
    for seed in range(2):
        model, name, live = planted(seed)
        calib = calibrate(np.eye(2).repeat(3, 0), "AB", each=3)
        scores = score_units(model, film(model, 6), calib, criterion, space, steps=3)
        ranked = rank_units(scores, calib)
        for ratio in (0.34, 0.5, 0.67, 0.84):
            kept = choose(model, ranked, Budget(ratio=ratio)).kept[name].nonzero().flatten().tolist()
            assert live <= set(kept), (criterion, ratio, seed)


def test_random_and_size_do_not():
    model, name, live = planted()
    blind = [score_units(model, None, None, "random", seed=s)[name].values[0] for s in range(200)]
    met = [live <= set(top_k(each, 3).tolist()) for each in blind]
    assert np.mean(met) == pytest.approx(4 / 20, abs=0.1)
    calib = calibrate(np.eye(2).repeat(3, 0), "AB", each=3)
    for criterion in ("weight", "activation", "norm"):
        found = rank_units(score_units(model, film(model, 6), calib, criterion), calib)[name]
        assert not live & set(top_k(found, 3).tolist())


@torch.no_grad()
def test_the_decision_stays_with_the_units_and_goes_with_them():
    model, name, live = planted()
    kept = {l.name: torch.ones(l.units, dtype=torch.bool) for l in find_units(model)}
    only = torch.zeros(6, dtype=torch.bool)
    only[list(live)] = True
    stays, goes = (slimmed(model, Mask({**kept, name: k}, network_digest(model))) for k in (only, ~only))
    assert torch.allclose(stays(film(model)), model(film(model)), atol=1e-5)
    assert not torch.allclose(goes(film(model)), model(film(model)), atol=3e-3)


def test_the_maximum_over_labels_spares_the_rare_finding():  # D4
    values = torch.tensor([[0.5, 0.4, 0.1]] * 9 + [[0.1, 0.1, 0.8]])
    calib = Calibration(np.arange(10), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3]), "ABCD")
    scores = {"x": Scores(values, ("study", "unit"))}
    kept = {how: top_k(rank_units(scores, calib, how)["x"], 2) for how in ("max", "mean")}
    assert 2 in kept["max"] and 2 not in kept["mean"]


def test_a_confident_draw_is_of_the_surest(rng=np.random.default_rng(0)):  # D5
    y, p = (rng.random((60, 2)) < 0.5).astype(float), rng.random((60, 2))
    sure, other = calibrate(y, "AB", "confident", 5, p), calibrate(y, "AB", "balanced", 5)
    mean = lambda c: p[c.rows, c.label.numpy()].mean()
    assert mean(sure) > mean(other) and all(y[r, l] == 1 for c in (sure, other) for r, l in zip(c.rows, c.label))
    assert len({tuple(calibrate(y, "AB", "random", 5, seed=s).rows) for s in range(4)}) == 4


# every model can be scored

def test_heads_and_words_of_the_report_network_are_scored():
    model = NETWORKS["report network, levels"]()
    x, ids = torch.rand(4, 1, 96, 96), torch.randint(2, 40, (4, 7))
    batch = lambda rows: (x[rows], ids[rows])
    say = lambda m, b: -F.cross_entropy(m(*b).logits.transpose(1, 2), b[1], reduction="none").sum(1, keepdim=True)
    calib = Calibration(np.arange(4), torch.zeros(4).long(), ("report",))
    for criterion in ("taylor", "activation", "ig"):
        scores = score_units(model, batch, calib, criterion, say=say, steps=2, batch_size=2)
        used = {n: s.values for n, s in scores.items()}
        assert all(torch.isfinite(v).all() and v.shape[0] == 4 for v in used.values())
        assert all(v.sum() > 0 for n, v in used.items() if "decoder" in n)
    mask = choose(model, rank_units(scores, calib), Budget(ratio=0.5))
    assert {k for n, (k, _) in mask.counts().items() if "EncDec" in n} == {1}
    findings = lambda m, b: m.name_findings(m.encode(b))
    pairs = Calibration(np.arange(4), torch.tensor([0, 1, 0, 1]), "AB")
    for criterion in ("gamma", "absolute"):                               # the encoder by rules of relevance, too
        scores = score_units(model, x, pairs, criterion, say=findings)
        assert all(s.values.sum() > 0 for n, s in scores.items() if "encoder.encoder" in n)
        assert all(s.values.sum() == 0 for n, s in scores.items() if n.startswith("decoder"))   # findings need no words
    with pytest.raises(NeuralError, match="no rule of relevance is known"):
        score_units(model, x, calib, "gamma", say=lambda m, b: m.read_report(m.encode(b), ids)[0].sum((1, 2))[:, None])


def test_hidden_units_of_graph_classifiers_are_scored():
    for kind in ("gcn", "typed"):
        columns = as_columns(assets(), kind)
        model = lively(GraphClassifier(kind, 6, 10, hidden=8))
        with torch.no_grad():
            if kind == "gcn": model.last.weight[:, 3] = 0
        calib = Calibration(np.arange(5), torch.zeros(5).long(), ("ill",))
        for criterion in ("taylor", "ig", "activation", "weight"):
            scores = score_units(model, columns.batch, calib, criterion, steps=4)
            assert all(torch.isfinite(s.values).all() and s.values.sum() > 0 for s in scores.values())
            if kind == "gcn" and criterion in ("taylor", "ig"): assert scores["layers.1"].values[:, 3].abs().max() == 0
        with pytest.raises(NeuralError, match="follow"): score_units(model, columns.batch, calib, "gamma")


# budgets and refusals

def test_budgets_are_kept_by_the_network_that_is_made():
    model = levels()
    ranked, one = rank_units(score_units(model, None, None, "weight")), film(model, 1)
    dense = count_macs(model, one)
    for share_left in (0.6, 0.3):
        less = slimmed(model, choose(model, ranked, Budget(macs=int(dense * share_left)), example=(one,)))
        assert 0.5 * share_left * dense < count_macs(less, one) <= share_left * dense
    ranks = choose(model, ranked, Budget(ratio=0.3), "model", least=2).counts()
    assert all(k >= 2 for k, _ in ranks.values()) and sum(k for k, _ in ranks.values()) == 13


def test_what_cannot_be_is_refused_in_one_line_with_layer_and_reason():
    model = levels()
    ranked, mask = rank_units(score_units(model, None, None, "weight")), drawn(model, 0.5)
    other = lively(ImageModel(("A", "B", "C"), 32, ((6, 6), (8, 8))), 5)
    class Odd(nn.Module): pass
    strange = levels()
    strange.net.stages[1][0] = Odd()
    hollow = Mask({**mask.kept, "net.stages.0.1.body.0": torch.zeros(6, dtype=torch.bool)}, mask.of)
    shout = {n: torch.where(torch.arange(len(v)) == 0, 1.0, 1e-9) for n, v in ranked.items()}
    for why, act in {
        "the calibration set holds no film with B": lambda: calibrate(np.array([[1, 0], [1, 0]]), "AB"),
        "this budget would leave the layer empty": lambda: choose(model, shout, Budget(count=5), "model"),
        "net.stages.0.1.body.0: the mask leaves it empty": lambda: slimmed(model, hollow),
        "net.stem.0: k must lie between 1 and the 6": lambda: choose(model, ranked, Budget(count=9)),
        "net.stages.1.0: Odd is an unknown module": lambda: find_units(strange),
        "net.stem.0: the mask is of another model": lambda: slimmed(other, mask),
        "net.stem.0: has 4 units, the mask 6": lambda: slimmed(ImageModel(("A",), 32, ((4, 4), (8, 8))), mask),
        "scores of another model": lambda: choose(model, {}, Budget(ratio=0.5)),
        "that would be circular": lambda: film_maps(model, film(model), torch.tensor([0, 0]), "gamma", "zplus"),
        "do not belong together": lambda: agreement(np.zeros((2, 4)), np.zeros((2, 5))),
    }.items():
        with pytest.raises(NeuralError) as caught: act()
        assert "\n" not in str(caught.value)
        assert why in str(caught.value)


# recovery and survival

def test_statistics_are_the_mean_of_what_is_seen():
    dense = levels()
    model, x = slimmed(dense, drawn(dense, 0.5)), film(dense, 8)
    assert recalibrate(model, [x]) == 10 and not any(m.training for m in model.modules())
    seen = model.net.stem[0]((x - 0.45) / 0.25)
    norm = model.net.stem[1]
    assert torch.allclose(norm.running_mean, seen.mean((0, 2, 3)), atol=1e-5) and norm.momentum == 0.1
    assert torch.allclose(norm.running_var, seen.var((0, 2, 3)), rtol=1e-3)


def test_recovery_takes_any_loss_and_keeps_the_sizes():
    dense = levels()
    model, x = slimmed(dense, drawn(dense, 0.5)), film(dense, 8)
    teacher = dense(x).detach()
    distil = lambda m, batch: dict(loss=F.mse_loss(m(batch), teacher))
    before = distil(model.eval(), x)["loss"].item()
    history = recover(model, lambda epoch, gen: [x] * 12, distil, 4, 1e-2)
    assert len(history) == 4 and distil(model, x)["loss"].item() < before and "slim" in model.config


def test_an_explanation_survives_where_nothing_was_lost():
    model, name, live = planted()
    kept = {l.name: torch.ones(l.units, dtype=torch.bool) for l in find_units(model)}
    only = torch.zeros(6, dtype=torch.bool)
    only[list(live)] = True
    less, x = slimmed(model, Mask({**kept, name: only}, network_digest(model))), film(model, 4)
    label, pairs = torch.tensor([0, 1, 0, 1]), (("gamma", "absolute"), ("absolute", "taylor"), ("gradient", "gamma"))
    for judge, pruned_by in (*pairs, ("covered", "gamma")):
        told = survival(model, less, x, label, pruned_by, judge, grid=(8, 8))
        if judge != "absolute": assert told.loc["slim", "correlation"] > 0.999 and told.loc["slim", "changed"] == 0
        assert told.loc["slim", "deletion"] == pytest.approx(told.loc["dense", "deletion"], abs=1e-2)
    worse = slimmed(model, drawn(model, 0.25))
    assert survival(model, worse, x, label, "random", "covered", grid=(8, 8)).loc["slim", "overlap"] < 1
    curve = erased(model, x, label, film_maps(model, x, label, "covered", grid=(8, 8)), grid=(8, 8))
    assert curve.shape == (4, 7) and (curve[:, 1] <= curve[:, 0] + 1e-6).mean() > 0.7


def test_statistics_of_an_efficientvit_are_measured_too():
    model, x = lively(vit_model(("A", "B"), 64)), torch.rand(12, 1, 64, 64)
    seen = []
    hook = model.net.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].mean((2, 3))))
    recalibrate(model, [x[:6], x[6:]])
    hook.remove()
    both = torch.stack([part.mean(0) for part in seen]).mean(0)                       # a plain mean over batches
    assert torch.allclose(model.net.norm.running_mean, both, atol=1e-4) and model.net.norm.momentum == 0.1


def test_dense_maps_that_are_known_are_not_made_again(monkeypatch):
    model, x, label = planted()[0], film(planted()[0], 2), torch.tensor([0, 1])
    less = slimmed(model, drawn(model, 0.5))
    whole = survival(model, less, x, label, "random", "covered", grid=(8, 8))
    before, made = film_maps(model, x, label, "covered", grid=(8, 8)), []
    counted = lambda m, *rest, **how: made.append(m) or film_maps(m, *rest, **how)
    monkeypatch.setattr("neural.criteria.film_maps", counted)
    known = survival(model, less, x, label, "random", "covered", grid=(8, 8), before=before)
    assert known.equals(whole) and made == [less]


# stage 80: some layers alone, equal networks, time

def test_a_budget_may_be_spent_on_some_layers_alone():
    torch.manual_seed(0)
    model = lively(ReportVLM(small_config(60, 96, ("A", "B"), width=64, d_model=64, stem="levels", depth=0)))
    among = tuple(l.name for l in find_units(model) if l.name.startswith("encoder"))
    x = torch.rand(2, 1, 96, 96)
    ranked = rank_units(score_units(model, None, None, "weight", among=among))
    assert set(ranked) == set(among)
    budget = Budget(macs=count_macs(model, x[:1]) // 2)
    mask = choose(model, ranked, budget, example=(x[:1],), among=among)
    assert all(kept == n for name, (kept, n) in mask.counts().items() if name not in among)
    assert any(kept < n for kept, n in mask.counts().values())
    less = slimmed(model, mask)
    assert count_macs(less, x[:1]) <= budget.macs
    assert torch.allclose(less(x).label_logits, silenced(model, mask)(x).label_logits, atol=1e-5)
    with pytest.raises(NeuralError, match="nobody: no layer of ReportVLM is called so"):
        choose(model, ranked, Budget(ratio=0.5), among=("nobody",))


def test_within_layers_every_criterion_leaves_an_equal_network():
    model, x = levels(), film(levels(), 6)
    calibration = calibrate(np.eye(3).repeat(2, 0), "ABC", each=2)
    budget, left = Budget(macs=count_macs(model, x[:1]) // 2), set()
    for criterion in ("taylor", "absolute", "weight", "random"):
        ranked = rank_units(score_units(model, x, calibration, criterion), calibration)
        left.add(tuple(choose(model, ranked, budget, example=(x[:1],)).counts().items()))
    assert len(left) == 1


@by_name("rule,most", [("gamma", 5), ("zplus", 2), ("absolute", 1), ("epsilon", 1)])
def test_a_rule_passes_a_layer_no_more_often_than_it_must(rule, most):
    passes = []
    def f(a, w):
        passes.append(1)
        return a @ w
    share(Rule(rule), f, *DENSE.values())
    assert len(passes) == most


def test_two_networks_are_timed_in_turn_and_threads_put_back():
    order, threads = [], torch.get_num_threads()
    class Clock(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name
        def forward(self, x): order.append((self.name, torch.get_num_threads()))
    told = paired_latency(Clock("dense"), Clock("slim"), (None,), 3)
    assert order == [("dense", 1), ("slim", 1)] * 5 and torch.get_num_threads() == threads
    assert (told["minimum"] <= told["10th percentile"]).all() and (told > 0).all(axis=None)
