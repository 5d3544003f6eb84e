"Units of two layers held against each other, layer Integrated Gradients, and the report network half by half."
import numpy as np
import pytest
import torch
from test_slim import VLM, drawn, film, levels, lively, planted
from torch import nn

from neural.attribute import conductance, layer_gradients, prepared
from neural.criteria import Calibration, calibrate, choose, rank_units, score_units
from neural.prune import Budget
from neural.results import count_macs
from neural.slim import Mask, find_units, network_digest, silenced, slimmed
from neural.study import NeuralError
from neural.vlm import ReportVLM, load_vlm, save_vlm, small_config

by_name = pytest.mark.parametrize


# one threshold for all layers

@by_name("criterion", ["taylor", "gamma", "absolute", "ig", "conductance"])
@by_name("scale", ["length", "mean"])
def test_one_threshold_takes_the_units_that_lead_nowhere_and_no_other(criterion, scale):
    for seed in range(3):
        model, name, live = planted(seed)
        calib, x = calibrate(np.eye(2).repeat(3, 0), "AB", each=3), film(model, 6)
        ranked = rank_units(score_units(model, x, calib, criterion, steps=3), calib)
        units = sum(l.units for l in find_units(model))
        mask = choose(model, ranked, Budget(count=units - 4), "model", scale=scale)
        assert {n: k for n, k in mask.counts().items() if k[0] < k[1]} == {name: (2, 6)}
        assert set(mask.kept[name].nonzero().flatten().tolist()) == live
        assert torch.allclose(slimmed(model, mask)(x), model(x), atol=1e-5)
        local = choose(model, ranked, Budget(ratio=0.83))                      # fewer units, some from each layer
        assert not torch.allclose(slimmed(model, local)(x), model(x), atol=1e-3)


def test_the_two_scales_by_hand():
    "Length: 0.74, 0.49, 0.49, 0.25 and 0.83, 0.55; mean: 1.8, 1.2, 1.2, 0.6 and 1.2, 0.8."
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU())
    ranked = {"0": torch.tensor([0.3, 0.2, 0.2, 0.1]), "2": torch.tensor([0.6, 0.4])}
    kept = {s: choose(model, ranked, Budget(count=3), "model", scale=s).counts() for s in ("length", "mean")}
    assert kept == {"length": {"0": (1, 4), "2": (2, 2)}, "mean": {"0": (2, 4), "2": (1, 2)}}
    ranked["2"] *= 100                                                         # the unit of a score does not matter
    again = {s: choose(model, ranked, Budget(count=3), "model", scale=s).counts() for s in ("length", "mean")}
    assert again == kept


@by_name("least,floors", [(0.5, {6: 3, 8: 4}), (0.34, {6: 3, 8: 3}), (2, {6: 2, 8: 2}), (1, {6: 1, 8: 1})])
def test_no_layer_falls_below_its_floor(least, floors):
    model, x = levels(), film(levels(), 1)
    ranked = rank_units(score_units(model, None, None, "random", seed=1))
    starved = {n: v * 1e-6 + (torch.arange(len(v)) == 0) for n, v in ranked.items()}
    for scale in ("length", "mean"):
        for share in (0.6, 0.4):
            budget = Budget(macs=int(share * count_macs(model, x)))
            mask = choose(model, starved, budget, "model", least, (x,), scale=scale)
            assert all(k >= floors[n] for k, n in mask.counts().values())
            assert count_macs(slimmed(model, mask), x) <= budget.macs


def test_a_floor_above_the_budget_and_an_unknown_scale_are_refused():
    model = levels()
    ranked = rank_units(score_units(model, None, None, "weight"))
    for why, act in {
        "least=0.5 keeps 21 units in any case, this budget 9: lower one of them":
            lambda: choose(model, ranked, Budget(count=9), "model", 0.5),
        "scaled to 'length' or 'mean' one; got 'model' and 'sum'":
            lambda: choose(model, ranked, Budget(ratio=0.5), "model", scale="sum"),
        "does not pay for the smallest network":
            lambda: choose(model, ranked, Budget(macs=99), "model", 0.5, (film(model, 1),)),
    }.items():
        with pytest.raises(NeuralError) as caught: act()
        assert why in str(caught.value) and "\n" not in str(caught.value)


# layer Integrated Gradients

class Product(nn.Module):
    "The product of two units."
    def forward(self, a): return a.prod(1, keepdim=True)


def test_layer_gradients_and_conductance_take_two_ways_between_the_same_ends():
    "x goes from 0 to 1, a = (x, max(0, x - 1/2)), f = a1 a2: straight 1/4 and 1/4, bent 1/8 and 3/8; both sum to 1/2."
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), Product())
    with torch.no_grad():
        net[0].weight[:] = 1
        net[0].bias[:] = torch.tensor([0.0, -0.5])
    x, label = torch.ones(1, 1), torch.tensor([0])
    straight = layer_gradients(prepared(net), x, label, "2", 2, baseline=0 * x)
    bent = conductance(prepared(net), x, label, ["2"], 400, grey=0.0)["2"]
    assert straight.flatten().tolist() == pytest.approx([0.25, 0.25], abs=1e-6)
    assert bent.flatten().tolist() == pytest.approx([0.125, 0.375], abs=1e-3)


def smooth():
    "A network without a kink."
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Conv2d(4, 5, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(5, 3)).eval()


@by_name("place", ["2", "3", "6"])
@by_name("start", ["nothing", "grey"])
def test_what_a_layer_earns_is_what_the_logit_gains(place, start):
    net, x, label = prepared(smooth()), film(None, 3, 12), torch.tensor([0, 2, 1])
    grey = torch.full_like(x, 0.45)
    earned = layer_gradients(net, x, label, place, 24, baseline=None if start == "nothing" else grey)
    assert earned.shape == net[: int(place)](x).shape
    begin = net(grey) if start == "grey" else net[int(place) :](torch.zeros_like(net[: int(place)](x)))
    gain = (net(x) - begin).gather(1, label[:, None])[:, 0]
    assert torch.allclose(earned.flatten(1).sum(1), gain, atol=1e-5)


def test_captum_agrees_on_every_layer_that_is_read():
    attr = pytest.importorskip("captum.attr")
    net, x, label = prepared(smooth()), film(None, 3, 12), torch.tensor([0, 2, 1])
    for place in ("2", "3", "6"):
        theirs = attr.LayerIntegratedGradients(net, net.get_submodule(place)).attribute(
            x, torch.full_like(x, 0.45), target=label, n_steps=16, method="gausslegendre",
            attribute_to_layer_input=True)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        ours = layer_gradients(net, x, label, place, 16, baseline=torch.full_like(x, 0.45))
        assert torch.allclose(ours, theirs, atol=1e-5)


# what captum 0.9.0 gives (LayerIntegratedGradients, 16 steps, gausslegendre, of the input of a layer, from grey 0.45),
# summed over space: place -> film -> channel
CAPTUM = {"2": [[1.109094, 0.318525], [-1.257227, -0.252949]],
          "3": [[0.737810, 0.672701, 0.017107], [-0.721332, -0.754279, -0.034565]],
          "6": [[0.737810, 0.672701, 0.017107], [-0.721332, -0.754278, -0.034565]]}


@by_name("place", [*CAPTUM])
def test_the_numbers_of_captum_where_it_is_not_installed(place):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Conv2d(2, 3, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.sin(torch.arange(1.0, p.numel() + 1)).view_as(p))
    x, label = torch.cos(torch.arange(72.0)).view(2, 1, 6, 6).abs(), torch.tensor([0, 1])
    ours = layer_gradients(prepared(net), x, label, place, 16, baseline=torch.full_like(x, 0.45))
    assert torch.allclose(ours.reshape(2, ours.shape[1], -1).sum(2), torch.tensor(CAPTUM[place]), atol=1e-5)


def test_the_criterion_is_layer_integrated_gradients():
    model, x, calib = levels(), film(levels(), 3), calibrate(np.eye(3), "ABC", each=1)
    scores = score_units(model, x, calib, "ig", "size of sum", steps=6)
    layer = next(l for l in find_units(model) if l.name == "net.stages.1.1.body.0")
    earned = layer_gradients(prepared(model), x[calib.rows], calib.label, layer.read[0].name, 6)
    by_hand = earned.sum((2, 3)).abs()
    assert torch.allclose(scores[layer.name].values, by_hand / by_hand.sum(1, keepdim=True), atol=1e-5)


# the report network: encoder and decoder

def report_network():
    "Three blocks that write, four heads in each; the first owns the position bias of all."
    config = small_config(40, stem="levels", **VLM)
    config.decoder = {**config.decoder, "num_decoder_layers": 3, "num_heads": 4}
    return lively(ReportVLM(config))


def half(model, part, ratio, seed=0):
    "A mask that removes units of the encoder, or of all that writes, and of nothing else."
    mask = drawn(model, ratio, seed)
    kept = {n: k if n.startswith("encoder") == (part == "encoder") else torch.ones_like(k)
            for n, k in mask.kept.items()}
    return Mask(kept, network_digest(model))


@by_name("part", ["encoder", "decoder"])
@by_name("ratio", [0.75, 0.5, 0.25])
@torch.no_grad()
def test_half_a_report_network_removed_is_that_half_at_zero(part, ratio, tmp_path):
    model = report_network()
    x, ids = torch.rand(2, 1, 96, 96), torch.randint(2, 40, (2, 9))
    mask = half(model, part, ratio)
    less, silent, whole = slimmed(model, mask), silenced(model, mask)(x, ids), model(x, ids)
    found = less(x, ids)
    for what in ("logits", "label_logits", "tokens"):
        assert torch.allclose(found[what], silent[what], atol=1e-5), what
    changed = {w: not torch.allclose(found[w], whole[w], atol=1e-4) for w in ("logits", "label_logits", "tokens")}
    assert changed == {"logits": True, "label_logits": part == "encoder", "tokens": part == "encoder"}
    save_vlm(less, tmp_path / "slim")
    assert torch.equal(load_vlm(tmp_path / "slim")(x, ids).logits, found.logits)


@torch.no_grad()
def test_heads_of_the_decoder_and_the_bias_that_the_first_block_owns():
    model = report_network()
    mask = half(model, "decoder", 0.5)
    less = slimmed(model, mask)
    own = mask.kept["decoder.decoder.block.0.layer.0.SelfAttention"]
    for n, block in enumerate(less.decoder.decoder.block):
        assert [part.SelfAttention.n_heads if i == 0 else part.EncDecAttention.n_heads
                for i, part in enumerate(block.layer[:2])] == [2, 2]
        assert block.layer[0].SelfAttention.has_relative_attention_bias == (n == 0)
        crossing = mask.kept[f"decoder.decoder.block.{n}.layer.1.EncDecAttention"].repeat_interleave(32)
        assert torch.equal(block.layer[1].EncDecAttention.v.weight,
                           model.decoder.decoder.block[n].layer[1].EncDecAttention.v.weight[crossing])
    bias = "decoder.decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(less.state_dict()[bias], model.state_dict()[bias][:, own])


@by_name("criterion", ["taylor", "ig", "activation"])
def test_words_are_asked_of_tokens_and_the_encoder_is_left_alone(criterion):
    model = report_network()
    tokens, ids = torch.randn(4, 144, 64), torch.randint(2, 40, (4, 7))
    among = tuple(l.name for l in find_units(model) if not l.name.startswith("encoder"))
    def say(m, b):
        logits = m.read_report(b[0], b[1], False)[0]
        return -nn.functional.cross_entropy(logits.transpose(1, 2), b[1], reduction="none").sum(1, keepdim=True)
    calib = Calibration(np.arange(4), torch.zeros(4).long(), ("report",))
    batch = lambda rows: (tokens[rows], ids[rows])
    scores = score_units(model, batch, calib, criterion, say=say, steps=2, among=among, batch_size=2)
    assert set(scores) == set(among) and all(s.values.sum() > 0 for s in scores.values())
    mask = choose(model, rank_units(scores, calib), Budget(ratio=0.5), among=among)
    assert all(k == n for name, (k, n) in mask.counts().items() if name.startswith("encoder"))
    assert {k for name, (k, _) in mask.counts().items() if "EncDec" in name} == {2}
    with pytest.raises(NeuralError, match="rules of relevance follow films, not tuple"):
        score_units(model, batch, calib, "gamma", say=say, among=among)
