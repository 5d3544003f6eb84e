"IMITATE: what the released code does wrong (C1 to C16) is caught in us, planted pairs are found, blanks teach nothing."
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from neural.image_model import ImageModel, save_image_model
from neural.imitate import (Pairs, Softening, TextEncoder, between_patients, check_spread, cicl, correlation,
                            load_text_encoder, prior_vectors, read_pairs, report_tokenizer, save_text_encoder,
                            section_vectors, soft_targets, train_text_encoder, warm_cosine)
from neural.layouts import index_dataset
from neural.pretrain import (FindingsBranch, Imitate, PairTraining, channel_counts, contrast_on, draw_channels,
                             load_imitate, pair_batch, pair_batches, pair_loss, pretrain, register_backbone,
                             save_imitate, start_from_pairs, trained_together)
from neural.probe import label_efficiency, linear_probe, patients_at, retrieval, zero_shot
from neural.radiograph import cache_radiographs, load_radiograph
from neural.report import ReportReader, swap_laterality
from neural.study import Manifest, NeuralError, Study, View
from neural.train import Training, fit
from neural.vlm import ReportVLM, small_config

torch.set_num_threads(1)
SIZE = 32
ONE_HOT = Softening("one-hot")


class Bag:
    "A text encoder without a training: words by their hash."
    width, name = 32, "bag"

    def encode(self, texts):
        rows = torch.zeros(len(texts), self.width)
        for row, text in zip(rows, texts):
            for word in re.findall(r"[a-z]+", (text or "").lower()):
                row += torch.randn(self.width, generator=torch.Generator().manual_seed(
                    int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)))
        return rows


class Films:
    "Films by id; remembers who was asked for."

    def __init__(self, films): self.films, self.asked = films, []
    def batch(self, ids):
        self.asked += ids
        return np.stack([self.films[i] for i in ids])


def noise(n, seed=0):
    return np.random.default_rng(seed).normal(0.3, 0.05, (n, 1, SIZE, SIZE)).astype(np.float32).clip(0, 1)


def small(widths=((8,), (16,)), **more): return ImageModel(("a",), SIZE, widths, **more)


def network(seed=0, image=None, **more):
    torch.manual_seed(seed)
    return Imitate(image or small(), Bag.width, **dict(dim=32, side=4, heads=2, words=Bag.name) | more)


def planted(n=96, seed=0):
    "A square or a line somewhere in noise, and the word for it."
    rng = np.random.default_rng(seed)
    films, kinds = noise(n, seed), rng.integers(2, size=n)
    for film, kind in zip(films, kinds):
        r, c = rng.integers(4, SIZE - 10, 2)
        film[0, r : r + (6 if kind else 2), c : c + (6 if kind else 18)] += 0.5
    words = np.array(["A line.", "A square."])[kinds].tolist()
    return Pairs(Films(dict(enumerate(films.clip(0, 1)))), range(n), words, words), kinds


def halves(n=48, missing=3):
    "Noise with reports, of which every third has no FINDINGS."
    rng, words = np.random.default_rng(1), ["left effusion", "normal heart", "pneumonia", "clear lungs", "right nodule"]
    texts = [" ".join(rng.choice(words, 2)) for _ in range(n)]
    found = [" " if i % missing == 0 else t for i, t in enumerate(texts)]
    return Pairs(Films(dict(enumerate(noise(n)))), range(n), found, texts)


def vectors_of(pairs, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return section_vectors(pairs, Bag(), **more)


# the planted pair

def test_the_loss_finds_the_pairing_within_seconds():
    pairs, _ = planted(128)
    model = network()
    how = PairTraining(epochs=24, batch_size=32, lr=1e-2, views=1, softening=ONE_HOT, progress=False)
    history = pretrain(model, pairs, vectors_of(pairs), how)
    assert abs(history[0]["loss"] - 2 * math.log(32)) < 1.2 and history[-1]["loss"] < history[0]["loss"] - 0.5
    fresh, kinds = planted(64, seed=5)
    said = model.read(Bag().encode(["A line.", "A square."]))
    embedded = model.embed(torch.as_tensor(fresh.films.batch(fresh.ids)))
    for section, e in embedded.items():
        assert ((e @ said.T).argmax(1).numpy() == kinds).mean() > 0.85, section


def test_a_planted_blank_correlation_is_not_picked_up():
    "Films without FINDINGS have a bright corner; were the blank a text, the corner would be its picture (C3)."
    films, blank = noise(96), np.arange(96) % 2 == 0
    films[blank, 0, :10, :10] += 0.6
    rng, words = np.random.default_rng(2), np.array(["one", "two", "three", "four"])
    texts = ["" if b else " ".join(rng.choice(words, 2)) for b in blank]
    pairs = Pairs(Films(dict(enumerate(films.clip(0, 1)))), range(96), texts, ["normal"] * 96)
    masked, as_space = vectors_of(pairs), Bag().encode(["blank"])
    filled = {s: replace(v) for s, v in masked.items()}
    filled["findings"].features = masked["findings"].features.clone()
    filled["findings"].features[0, torch.as_tensor(blank)] = as_space
    filled["findings"].there = torch.ones(96, dtype=torch.bool)
    gaps, how = {}, PairTraining(views=1, softening=ONE_HOT)
    for name, vectors in dict(masked=masked, filled=filled).items():
        model = network(3)
        model.settle_words(filled)
        loss = lambda m, b: {"findings": pair_loss(how)(m, b)["findings"]}
        fit(model, pair_batches(pairs, vectors, 32, 1), loss, torch.optim.AdamW(model.parameters(), 3e-3),
            Training(12, progress=False))
        seen = model.embed(torch.as_tensor(pairs.films.batch(pairs.ids)))["findings"]
        alike = (seen @ model.read(as_space).detach().T)[:, 0]
        gaps[name] = float(alike[torch.as_tensor(blank)].mean() - alike[torch.as_tensor(~blank)].mean())
    assert gaps["filled"] > 0.5 and abs(gaps["masked"]) < 0.5 * gaps["filled"], gaps


def test_what_stands_in_place_of_a_blank_changes_nothing():
    pairs, model = halves(), network().eval()
    batch = pair_batch(pairs, vectors_of(pairs), torch.arange(24))
    features, prior, there = batch["findings"]
    odd = (features.masked_fill(~there[:, None], 7.0), prior.masked_fill(~there[:, None], 1.0), there)
    loss = lambda b: pair_loss()(model, b)["findings"]
    assert 0 < there.sum() < 24 and torch.equal(loss(batch), loss(batch | dict(findings=odd)))
    films = batch["films"][0].clone().requires_grad_()
    loss(batch | dict(films=[films])).backward()
    assert torch.equal(films.grad.abs().sum((1, 2, 3)) > 0, there)


def test_the_first_loss_is_the_logarithm_of_the_batch():
    pairs = halves(96)
    vectors = vectors_of(pairs)
    for n, multi in ((32, True), (96, True), (64, False)):
        model = network(n, branches="multi" if multi else "two", dim=256)
        model.settle_words(vectors)
        batch = pair_batch(pairs, vectors, torch.arange(n), torch.Generator().manual_seed(0))
        for section, loss in pair_loss(PairTraining(softening=ONE_HOT))(model, batch).items():
            assert abs(loss.item() - math.log(batch[section][2].sum())) < 0.35, (n, section)


def test_every_trainable_parameter_gets_a_gradient():
    pairs = halves()
    for branches in ("whole", "two", "multi"):
        sections = ("whole",) if branches == "whole" else ("findings", "impression")
        vectors, model = vectors_of(pairs, sections=sections), network(branches=branches)
        how = PairTraining(views_weight=1.0)
        batch = pair_batch(pairs, vectors, torch.arange(32), torch.Generator().manual_seed(0))
        sum(pair_loss(how)(model, batch).values()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == [], branches


# the loss

@pytest.fixture
def unit():
    draw = torch.Generator().manual_seed(0)
    x, y, t = (F.normalize(torch.randn(24, 16, generator=draw), dim=1) for _ in range(3))
    return x, y, correlation(prior_vectors(t))


def test_without_similarity_cicl_is_infonce(unit):
    x, y, rho = unit
    target = torch.arange(24)
    for tau in (0.07, 0.2):
        plain = (F.cross_entropy(x @ y.T / tau, target) + F.cross_entropy(y @ x.T / tau, target)) / 2
        assert torch.allclose(cicl(x, y, torch.zeros_like(rho), Softening(), tau), plain, atol=1e-5)
        assert torch.allclose(cicl(x, y, rho, Softening(pull=0.0), tau), plain, atol=1e-5)


@pytest.mark.parametrize("targets", ["cicl", "uniform", "one-hot"])
@pytest.mark.parametrize("n", [2, 24, 200])
def test_targets_sum_to_one(targets, n):
    "C6: for any batch."
    rho = correlation(prior_vectors(torch.randn(n, 16)))
    y = soft_targets(rho, Softening(targets))
    assert torch.allclose(y.sum(1), torch.ones(n), atol=1e-5) and (y >= 0).all()


def test_the_strength_of_the_prior_depends_on_neither_batch_nor_temperature():
    "C6: the released targets do both."
    alike = lambda n: torch.full((n, n), 0.5)
    on_itself = lambda n, how, tau: (y := soft_targets(alike(n), how, tau))[0, 0] / y[0].sum()
    ours = [float(on_itself(n, Softening(), tau)) for n in (16, 128) for tau in (0.07, 0.2)]
    released = [float(on_itself(n, Softening("released"), tau)) for n in (16, 128) for tau in (0.07, 0.2)]
    assert max(ours) - min(ours) < 1e-5 and max(released) - min(released) > 0.3
    assert abs(ours[0] - released[2]) < 0.01  # the paper's own batch and temperature


def test_the_released_targets_are_those_of_the_released_code(unit):
    x, y, rho = unit
    prior = rho.clone().fill_diagonal_(0)
    prior[prior < 0] = 0
    targets = torch.eye(24) + 0.07 * (1 - torch.exp(-0.2 * prior))
    by_hand = F.cross_entropy(x @ y.T / 0.07, targets) + F.cross_entropy(y @ x.T / 0.07, targets)
    assert torch.allclose(cicl(x, y, rho, Softening("released")), by_hand, atol=1e-4)


def test_a_constant_prior_is_label_smoothing():
    "C7: what the released prior comes to; the control has the same mass in each row."
    flat, rho = torch.full((16, 16), 0.8), correlation(prior_vectors(torch.randn(16, 8)))
    assert torch.allclose(soft_targets(flat), soft_targets(flat, Softening("uniform")), atol=1e-6)
    both = [soft_targets(rho, Softening(t)) for t in ("cicl", "uniform")]
    assert torch.allclose(*(y.diagonal() for y in both), atol=1e-6) and not torch.allclose(*both, atol=1e-3)


def test_a_nearly_constant_prior_is_told_in_one_line_and_centring_repairs_it():
    "C7."
    features = 5 * torch.randn(16) + 0.5 * torch.randn(60, 16)
    with pytest.warns(UserWarning, match="nearly constant; centre") as told:
        check_spread(prior_vectors(features), range(60))
    assert len(told) == 1 and "\n" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, sd = check_spread(prior_vectors(features, features.mean(0)), range(60))
    assert abs(mean) < 0.1 < sd
    assert len(between_patients(torch.eye(4), ["p", "p", "q", "r"])) == 5


def test_prior_and_loss_stay_float32_under_autocast(unit):
    "C14."
    x, y, rho = unit
    vectors = prior_vectors(torch.randn(24, 16))
    with torch.autocast("cpu", torch.bfloat16):
        low = correlation(vectors), cicl(x, y, rho), soft_targets(rho)
        assert (x @ y.T).dtype == torch.bfloat16
    for a, b in zip(low, (correlation(vectors), cicl(x, y, rho), soft_targets(rho))):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_a_step_under_autocast_uses_the_same_targets():
    "C14: the whole loss, as `fit` runs it."
    pairs, model = halves(), network().eval()
    batch = pair_batch(pairs, vectors_of(pairs), torch.arange(32))
    plain = pair_loss()(model, batch)
    with torch.autocast("cpu", torch.bfloat16): low = pair_loss()(model, batch)
    for section in plain:
        assert low[section].dtype == torch.float32 and abs(low[section] - plain[section]) < 0.1


# missing sections

def test_missing_sections_are_left_out_before_the_loss():
    "C1: the released code indexes a loss that is a single number."
    pairs, model = halves(), network().eval()
    vectors, rows = vectors_of(pairs), torch.arange(30)
    there = vectors["findings"].there[:30]
    everybody = pair_loss()(model, pair_batch(pairs, vectors, rows))["findings"]
    only = pair_loss()(model, pair_batch(pairs, vectors, rows[there]))["findings"]
    assert there.sum() == 20 and torch.allclose(everybody, only, atol=1e-5)


@pytest.mark.parametrize("blank", [" ", "", None, float("nan"), "___", "\n\t", "..."])
def test_blanks_are_told_from_texts(blank):
    "C3 and C4: a space, a NaN or a mark of removed words is no text, in either section."
    pairs = Pairs(None, ["a", "b"], [blank, "Effusion."], ["Normal.", blank])
    vectors = vectors_of(pairs)
    assert vectors["findings"].there.tolist() == [False, True] and vectors["impression"].there.tolist() == [True, False]
    assert not vectors["findings"].features[0, 0].any() and not vectors["impression"].prior[0, 1].any()
    assert pairs.of("whole") == ["Normal.", "Effusion."]


def test_a_batch_in_which_nobody_has_findings_is_refused():
    pairs, model = halves(), network()
    vectors = vectors_of(pairs)
    with pytest.raises(NeuralError, match="^none of the 16 studies of a batch has FINDINGS: take larger batches"):
        pair_loss()(model, pair_batch(pairs, vectors, torch.arange(48)[~vectors["findings"].there]))


@pytest.mark.parametrize("n, findings, why", [
    (31, "Effusion.", "31 pairs of film and FINDINGS are too few to contrast, 32"),
    (40, " ", "0 pairs of film and FINDINGS"),
])
def test_few_pairs_are_refused_with_the_count(n, findings, why):
    pairs = Pairs(Films({}), range(n), [findings] * n, ["Normal."] * n)
    with pytest.raises(NeuralError, match=why): pretrain(network(), pairs, {})


def test_a_table_without_sections_is_refused():
    pairs = Pairs(Films({}), range(40), [None] * 40, [" "] * 40)
    for branches in ("whole", "multi"):
        with pytest.raises(NeuralError, match="none of 40 reports has FINDINGS or IMPRESSION: split the reports"):
            pretrain(network(branches=branches), pairs, {})
    with pytest.raises(NeuralError, match="there are no vectors of FINDINGS"): pretrain(network(), halves(), {})


# films

def test_each_view_is_encoded_once():
    "C9: also with terms between the views, for which channels are drawn anew."
    pairs, model, calls = halves(), network(), []
    model.net.stem.register_forward_hook(lambda *_: calls.append(1))
    batch = pair_batch(pairs, vectors_of(pairs), torch.arange(32), torch.Generator().manual_seed(0))
    assert [*pair_loss(PairTraining(views_weight=1.0))(model, batch)] == ["findings", "impression", "views"]
    assert len(calls) == 2


def test_terms_between_views_are_a_switch():
    "C2: the released source has them, the byte-code beside it has not."
    pairs, model = halves(), network()
    batch = pair_batch(pairs, vectors_of(pairs), torch.arange(32), torch.Generator().manual_seed(0))
    assert "views" not in pair_loss()(model, batch)
    with pytest.raises(NeuralError, match="need two of them"): PairTraining(views=1, views_weight=0.5)


def test_nothing_is_mirrored_without_its_words():
    "C10: neither upside down nor left for right."
    films = np.full((40, 1, SIZE, SIZE), 0.1, np.float32)
    films[..., 4:12, 4:12] = 0.9
    pairs = Pairs(Films(dict(enumerate(films))), range(40), ["left effusion"] * 40, ["right lung"] * 40)
    up = lambda v: v[:, 0, :16].mean((1, 2)) > v[:, 0, 16:].mean((1, 2))
    left = lambda v: v[:, 0, :, :16].mean((1, 2)) > v[:, 0, :, 16:].mean((1, 2))
    still = vectors_of(pairs)
    batch = pair_batch(pairs, still, torch.arange(40), torch.Generator().manual_seed(0))
    assert all(up(v).all() and left(v).all() for v in batch["films"])
    with pytest.raises(NeuralError, match="only together with its words"):
        pair_batch(pairs, still, torch.arange(40), torch.Generator().manual_seed(0), flips=0.5)
    batch = pair_batch(pairs, vectors_of(pairs, mirrored=True), torch.arange(40), torch.Generator().manual_seed(0),
                       flips=0.5)
    words = Bag().encode([swap_laterality("left effusion"), "left effusion"])
    for view, features in zip(batch["films"], batch["findings"][0]):
        assert up(view).all() and 5 < left(view).sum() < 35 and torch.equal(features, words[left(view).long()])


def test_channels_are_drawn_without_replacement_and_for_each_film():
    "C11."
    picks = draw_channels(6, [256, 512, 1024, 2048], counts := channel_counts([256, 512, 1024, 2048]))
    assert counts == [64, 76, 102, 204]
    for level in picks: assert all(len(set(row)) == len(row) for row in level.tolist())
    assert not torch.equal(*picks[0].sort(1).values[:2])


def test_padding_is_not_attended_to_and_evaluation_draws_nothing():
    "C11."
    torch.manual_seed(0)
    maps, branch = [torch.rand(3, 8, 8, 8), torch.rand(3, 16, 4, 4)], FindingsBranch([8, 16], 16, 4, heads=2)
    assert not torch.equal(branch(maps), branch(maps))
    branch.eval()
    still = branch(maps)
    assert torch.equal(branch(maps), still)
    for length in (24, 40, 512):
        branch.length = length
        assert torch.allclose(branch(maps), still, atol=1e-5)
    order = torch.randperm(8)
    plain = FindingsBranch([8, 16], 16, 4, heads=2, named=False).eval()
    assert torch.allclose(plain([maps[0][:, order], maps[1]]), plain(maps), atol=1e-5)  # a place means nothing
    assert not torch.allclose(branch([maps[0][:, order], maps[1]]), still, atol=1e-5)  # a name means a channel


def test_the_brightest_pixels_stay_bright(tmp_path):
    "C5: in the released cache they wrap round to black."
    for kind, full in ((np.uint8, 255), (np.uint16, 65535)):
        film = np.full((64, 64), full // 3, kind)
        film[16:48, 16:48] = full
        Image.fromarray(film).save(tmp_path / "film.png")
        read = load_radiograph(tmp_path / "film.png", 64)[0]
        assert read[20:44, 20:44].min() > 0.99 > read[:12].max()


def test_films_and_texts_are_joined_by_id():
    "C13: another order, or a table that was filtered in between, moves no film to another report."
    pairs = halves()
    order = np.random.default_rng(0).permutation(48)[:40]
    part = lambda values: [values[i] for i in order]
    other = Pairs(pairs.films, part(pairs.ids), part(pairs.findings), part(pairs.impressions))
    places = (pairs, torch.as_tensor(order)), (other, torch.arange(40))
    a, b = (pair_batch(p, vectors_of(p), rows) for p, rows in places)
    assert torch.equal(a["films"][0], b["films"][0])
    assert torch.equal(a["impression"][0], b["impression"][0]) and torch.equal(a["findings"][2], b["findings"][2])


def test_a_cache_of_films_is_written_once_and_asked_by_id(tmp_path):
    "C13: the released cache is written anew for each film, and joined by the order of a table."
    names = [f"s{n}" for n in range(4)]
    for n, name in enumerate(names):
        Image.fromarray(np.full((SIZE, SIZE), 40 * n, np.uint8) + np.arange(SIZE, dtype=np.uint8)).save(
            tmp_path / f"{name}.png")
    items = [(name, tmp_path / f"{name}.png") for name in names]
    cache, lost = cache_radiographs(items, tmp_path / "films", SIZE, workers=0)
    written = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "films").iterdir()}
    pairs = Pairs(cache, names[::-1], ["Effusion."] * 4, ["Effusion."] * 4)
    batch = pair_batch(pairs, vectors_of(pairs), torch.tensor([3, 0]))["films"][0]
    assert not lost and torch.equal(batch, torch.as_tensor(cache.batch(["s0", "s3"])))
    again, _ = cache_radiographs(items, tmp_path / "films", SIZE, workers=0)
    assert written == {f.name: f.stat().st_mtime_ns for f in (tmp_path / "films").iterdir()}
    assert np.array_equal(again.batch(names), cache.batch(names))


# real reports

def test_the_prior_of_real_reports(real_data):
    "C3, C7, C16: sections that are missing, a raw prior that is constant, and a reader's that is not."
    manifest, _ = index_dataset("open-i", real_data)
    pairs = {split: read_pairs(manifest, None, split) for split in ("train", "test")}
    train = pairs["train"]
    assert not set(train.patients) & set(pairs["test"].patients)
    assert 0.05 < 1 - np.mean([bool(t) for t in train.findings]) < 0.4 and len(train) > 500
    tokenizer, some = report_tokenizer(train.impressions), Pairs(None, train.ids[:300], [""] * 300,
                                                                 train.impressions[:300], train.patients[:300])
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
                        intermediate_size=32, pad_token_id=0)
    encoder = TextEncoder(BertModel(config, add_pooling_layer=False), tokenizer, "cls", 64)
    with pytest.warns(UserWarning, match="IMPRESSION: the similarity of reports is 1.00 ± 0.00 between patients"):
        section_vectors(some, encoder, prior="raw")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prior in ("text", "reader"): section_vectors(some, encoder, ("impression",), prior, ReportReader())


# processes

SCRIPT = '''
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_imitate import *
place, rank, of = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=of)
told = together(place, rank, of)
if rank == 0: (place / "told.json").write_text(json.dumps(told))
dist.destroy_process_group()
'''


def together(place, rank=0, of=1):
    "Two steps on batches of 16 without a draw, and what they left: losses and weights."
    pairs = halves(32)
    vectors, model = vectors_of(pairs), network(shares=(1.0,))
    model.settle_words(vectors)
    def batches(epoch, generator):
        for rows in torch.arange(32).split(16): yield pair_batch(pairs, vectors, rows[rank::of])
    with trained_together(model):
        history = fit(model, batches, pair_loss(PairTraining()), torch.optim.SGD(model.parameters(), 0.05),
                      Training(2, progress=False))
    assert all(type(m) is nn.BatchNorm2d for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    sums = {n: [float(p.double().sum()), float(p.double().norm())] for n, p in model.state_dict().items()}
    return dict(history=history, sums=sums)


def test_two_processes_give_the_loss_of_one(tmp_path):
    "C8: negatives, batch statistics and gradients of both."
    (tmp_path / "two.py").write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    words = [sys.executable, tmp_path / "two.py", Path(__file__).parent, tmp_path]
    running = [subprocess.Popen([*words, str(rank), "2"], env=env, stderr=subprocess.PIPE) for rank in (0, 1)]
    errors = [p.communicate(timeout=500)[1].decode() for p in running]
    assert [p.returncode for p in running] == [0, 0], errors
    two, one = json.loads((tmp_path / "told.json").read_text()), together(tmp_path)
    for a, b in zip(one["history"], two["history"]):
        assert all(abs(a[name] - b[name]) < 2e-4 for name in ("loss", "findings", "impression")), (a, b)
    for name, numbers in one["sums"].items(): assert np.allclose(numbers, two["sums"][name], rtol=2e-3, atol=2e-3), name


def test_who_else_is_in_a_batch_does_not_matter_to_the_heads():
    "C8: batch norm in a head tells which batch a film came in."
    model, rows = network().train(), torch.randn(8, 32)
    maps = [torch.rand(8, 8, 8, 8), torch.rand(8, 16, 4, 4)]
    part = [m[:3] for m in maps]
    assert torch.allclose(model.conclude(maps)[:3], model.conclude(part), atol=1e-6)
    assert torch.allclose(model.read(rows)[:3], model.read(rows[:3]), atol=1e-6)
    heads = [model.describe, model.conclude, model.speak]
    assert not [m for head in heads for m in head.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_processes_share_batches_evenly(monkeypatch):
    pairs = halves()
    vectors = vectors_of(pairs)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr("neural.pretrain.processes", lambda rank=rank: (rank, 2))
        pairs.films.asked = []
        sizes = [len(b["films"][0]) for b in pair_batches(pairs, vectors, 16)(0, torch.Generator().manual_seed(0))]
        assert sizes == [8, 8, 8]
        seen.append(set(pairs.films.asked))
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(range(48))
    with pytest.raises(NeuralError, match="2 processes cannot share batches of 15 pairs"):
        pair_batches(pairs, vectors, 15)


# training

def test_the_rate_ends_where_it_should():
    "C12: the released schedule is written for other steps than are taken."
    optimiser, rates = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0), []
    for steps in (1, 2, 7, 30):
        optimiser.param_groups[0]["lr"] = 1.0
        optimiser.param_groups[0].pop("initial_lr", None)
        schedule = warm_cosine(optimiser, steps)
        for _ in range(steps):
            rates.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            schedule.step()
        assert rates[-1] < 0.01 or steps < 2
    assert max(rates) <= 1.0 + 1e-9


def test_as_many_epochs_as_were_asked_for_and_a_checkpoint_that_is_found(tmp_path, monkeypatch):
    "C12: twenty are not twenty-one, and who resumes looks for the file that is written."
    from neural.train import Checkpoint
    pairs = halves()
    vectors, how = vectors_of(pairs), PairTraining(epochs=3, batch_size=16, lr=1e-3, views=1, progress=False)
    straight = network()
    history = pretrain(straight, pairs, vectors, how)
    assert [h["epoch"] for h in history] == [1, 2, 3]
    save, left = Checkpoint.save, []
    def dying(self, state):
        save(self, state)
        left.append(len(state.history))
        if len(left) == 2: raise KeyboardInterrupt
    monkeypatch.setattr(Checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt): pretrain(network(), pairs, vectors, how, resume=tmp_path / "t.safetensors")
    monkeypatch.setattr(Checkpoint, "save", save)
    other = Pairs(pairs.films, pairs.ids, pairs.impressions, pairs.impressions)
    with pytest.raises(NeuralError, match="was made with.*pairs 48"):
        pretrain(network(), other, vectors, how, resume=tmp_path / "t.safetensors")
    with pytest.raises(NeuralError, match=r"another backbone, levels \[\[8\], \[16\]\], 32 pixels, and this one"):
        pretrain(network(image=small(((8,), (8,)))), pairs, vectors, how, resume=tmp_path / "t.safetensors")
    with pytest.raises(NeuralError, match="was made with settings.*tau=0.07"):
        pretrain(network(), pairs, vectors, replace(how, tau=0.1), resume=tmp_path / "t.safetensors")
    with pytest.raises(NeuralError, match="was made with vectors"):
        pretrain(network(), pairs, vectors_of(pairs, prior="raw"), how, resume=tmp_path / "t.safetensors")
    model = network()
    again = pretrain(model, pairs, vectors, how, resume=tmp_path / "t.safetensors")
    assert again == history and not (tmp_path / "t.safetensors").exists()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), straight.state_dict().values()))


def test_the_epoch_is_chosen_on_validate():
    pairs, held = halves(), halves(40, 4)
    vectors = vectors_of(pairs)
    model = network()
    history = pretrain(model, pairs, vectors, PairTraining(epochs=2, batch_size=24, views=1, progress=False),
                       (held, theirs := vectors_of(held, like=vectors)))
    best = min(h["contrast"] for h in history)
    assert [h["best"] for h in history][0] and abs(contrast_on(held, theirs)(model)["contrast"] - best) < 1e-5


def test_reports_of_other_splits_are_never_learnt_from(tmp_path):
    "C16: pairs are those of train, and a patient is in one split."
    (tmp_path / "r.txt").write_text("FINDINGS: Effusion.\n\nIMPRESSION: Effusion.")
    (tmp_path / "empty.txt").write_text("INDICATION: Cough.")
    study = lambda n, split, report="r.txt", patient=None: Study(f"s{n}", patient or f"p{n}", split,
                                                                 (View(f"{n}.png"),), report)
    studies = [study(0, "train"), study(1, "validate"), study(2, "test"), study(3, "train", "empty.txt")]
    assert read_pairs(Manifest(studies, tmp_path), None).ids == ["s0"]
    assert read_pairs(Manifest(studies, tmp_path), None, "test").ids == ["s2"]
    with pytest.raises(NeuralError): Manifest([study(0, "train", patient="p"), study(1, "test", patient="p")], tmp_path)
    with pytest.raises(NeuralError, match="none of 1 train reports has FINDINGS"):
        read_pairs(Manifest(studies[3:], tmp_path), None)


# judges

def test_fractions_are_of_patients_and_of_train_alone(monkeypatch):
    "C15: no study of validate or test is learnt from, at any fraction, by either protocol."
    rng = np.random.default_rng(0)
    split = np.repeat(["train", "validate", "test"], 40)
    films, y = noise(120), rng.integers(2, size=120).astype(float)
    films[:, 0, 8:16, 8:16] += 0.4 * y[:, None, None]
    studies = [Study(f"s{i}", f"p{i // 2}", s, (View(f"{i}.png", "frontal"),), "", {"Edema": v})
               for i, (s, v) in enumerate(zip(split, y))]
    store = Films({f"s{i}": f for i, f in enumerate(films)})
    make = lambda: ImageModel(("Edema",), SIZE, ((8,), (16,)), dropout=0.0)
    seen = []
    def watch(image, logits, train, *args, **kwargs):
        seen.append(set(train.ids))
        return [dict(loss=0.0)]
    monkeypatch.setattr("neural.probe.fit_labels", watch)
    table = label_efficiency(Manifest(studies), store, make, ("Edema",), (0.1, 1.0), (0, 1))
    trained = {f"s{i}" for i in range(40)}
    assert [len(s) for s in seen] == [4, 4, 40, 40] and all(s <= trained for s in seen)
    assert len(table) == 4 and table[(table.way == "linear probe") & (table.share == 1)].value.item() > 0.7
    assert patients_at(["a", "a", "b", "b"], 0.5).tolist() in ([True, True, False, False], [False, False, True, True])


def test_the_probe_cannot_see_the_test_labels():
    rng = np.random.default_rng(0)
    x, y, split = rng.normal(size=(90, 4)), rng.integers(2, size=(90, 1)).astype(float), np.repeat(
        ["train", "validate", "test"], 30)
    other = y.copy()
    other[60:] = 1 - other[60:]
    assert np.array_equal(*(linear_probe(x, t, split, [*range(90)]) for t in (y, other)))


def test_identical_embeddings_are_ranked_by_chance():
    said = retrieval(torch.ones(20, 4), torch.ones(20, 4))
    assert said["median rank"] == 10.5 and said["R@10"] == 0 and abs(said["chance of R@10"] - 0.5) < 1e-9
    with pytest.raises(NeuralError, match="needs two to 20,000 pairs, got 20001 and 20001"):
        retrieval(torch.zeros(20001, 1), torch.zeros(20001, 1))
    good = retrieval(torch.eye(20), torch.eye(20))
    assert good["R@1"] == 1 and good["median rank"] == 1


def test_words_of_another_encoder_are_refused():
    class Other(Bag): name = "other"
    model = network()
    films = F.normalize(torch.randn(5, 32), dim=1)
    assert zero_shot(model, Bag(), films, "Edema").shape == (5,)
    with pytest.raises(NeuralError, match="these words are read by other, the encoder was trained with bag"):
        zero_shot(model, Other(), films, "Edema")


# on disk

def test_vectors_of_another_encoder_or_other_pairs_are_refused():
    class Other(Bag): name = "other"
    pairs, how = halves(), PairTraining(epochs=1, progress=False)
    theirs = section_vectors(pairs, Other())
    with pytest.raises(NeuralError, match="of the text encoder other, the network was built for 32 of bag"):
        pretrain(network(), pairs, theirs, how)
    with pytest.raises(NeuralError, match="40 vectors and 48 pairs do not belong together"):
        pretrain(network(), pairs, vectors_of(halves(40)), how)


def test_saved_and_loaded_to_the_last_bit(tmp_path):
    pairs, model = halves(), network()
    pretrain(model, pairs, vectors_of(pairs), PairTraining(epochs=1, batch_size=24, views=1, progress=False))
    save_imitate(model, tmp_path / "pairs", command="a test")
    again, films = load_imitate(tmp_path / "pairs"), torch.rand(3, 1, SIZE, SIZE)
    for section, e in model.embed(films).items(): assert torch.equal(again.embed(films)[section], e)
    assert torch.equal(again.read(Bag().encode(["effusion"])), model.read(Bag().encode(["effusion"])))
    assert again.config == model.config
    save_imitate(again, tmp_path / "pairs")  # replaced


def test_an_encoder_goes_on_into_a_report_generator_and_nowhere_else(tmp_path):
    save_imitate(network(image=ImageModel(("a",), 96, ((8,), (32,)))), tmp_path / "pairs")
    config = small_config(100, 96, width=32, d_model=32, layers=1, depth=0, stem="levels", widths=((8,), (32,)))
    stem = ReportVLM(config).encoder.embeddings.patch_embeddings.projection
    start_from_pairs(stem, tmp_path / "pairs")
    wanted = load_imitate(tmp_path / "pairs").net.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in stem.state_dict().items())
    with pytest.raises(NeuralError, match=r"is levels \[\[8\], \[32\]\], 96 pixels, another backbone than"):
        start_from_pairs(small().net, tmp_path / "pairs")


def test_the_papers_backbone_has_the_papers_levels():
    with torch.device("meta"): image = ImageModel(("a",), 224, net="resnet-50")
    levels = image.levels(torch.rand(1, 1, 224, 224, device="meta"))
    assert {s: tuple(m.shape[1:]) for s, m in levels.items()} == {
        4: (256, 56, 56), 8: (512, 28, 28), 16: (1024, 14, 14), 32: (2048, 7, 7)}


def test_any_backbone_of_transformers_is_trained_and_saved(tmp_path):
    from transformers import ConvNextConfig
    register_backbone("convnext-tiny-test", ConvNextConfig(num_channels=3, hidden_sizes=[8, 16], depths=[1, 1],
                                                           num_stages=2))
    pairs, model = halves(), network(image=small(net="convnext-tiny-test"))
    pretrain(model, pairs, vectors_of(pairs), PairTraining(epochs=1, batch_size=24, views=1, progress=False))
    save_imitate(model, tmp_path / "pairs")
    films = torch.rand(2, 1, SIZE, SIZE)
    assert torch.equal(load_imitate(tmp_path / "pairs").embed(films)["findings"], model.embed(films)["findings"])


HOSTILE = {
    "huge": (lambda f, a: a["config"].update(dim=10**9), "cannot be rebuilt"),
    "negative": (lambda f, a: a["config"].update(side=-1), "cannot be rebuilt"),
    "unknown": (lambda f, a: a["config"].update(spy=1), "cannot be rebuilt"),
    "no configuration": (lambda f, a: a.update(config=None), "cannot be rebuilt"),
    "other width": (lambda f, a: a["config"].update(text_width=8), "cannot be rebuilt"),
    "other branches": (lambda f, a: a["config"].update(branches="whole"), "do not fit|cannot be rebuilt"),
    "another kind": (lambda f, a: a.update(kind="image-model"), "holds no encoder"),
    "exchanged": (lambda f, a: (f / "branches.safetensors").write_bytes(b"x" * 99), "not the one it was saved with"),
    "lost": (lambda f, a: (f / "branches.safetensors").unlink(), "not the one it was saved with"),
    "another image": (lambda f, a: save_image_model(small(), f / "image"), "not the one it was saved with"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_comes_from_a_disk_is_not_trusted(tmp_path, what):
    save_imitate(network(), folder := tmp_path / "pairs")
    about = json.loads((folder / "config.json").read_text())
    HOSTILE[what][0](folder, about)
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(NeuralError, match=HOSTILE[what][1]) as told: load_imitate(folder)
    assert "\n" not in str(told.value)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    save_image_model(small(), tmp_path)
    with pytest.raises(NeuralError, match="holds something else"): save_imitate(network(), tmp_path)


# words

@pytest.fixture(scope="module")
def spoken():
    texts = ["No pleural effusion.", "The heart size is normal.", "There is a pneumothorax.", "Left lobe pneumonia."]
    return train_text_encoder(texts * 4, 80, 32, 1, epochs=1, progress=False)[0], texts


def test_an_own_text_encoder_comes_back_to_the_last_bit(spoken, tmp_path):
    encoder, texts = spoken
    save_text_encoder(encoder, tmp_path / "words")
    again = load_text_encoder(tmp_path / "words", max_tokens=96)
    assert torch.equal(again.encode(texts), encoder.encode(texts)) and again.name == encoder.name
    mixed = encoder.encode([texts[0], "", texts[3] * 5])  # neither order nor padding matters
    assert torch.allclose(mixed[0], encoder.encode(texts[:1])[0], atol=1e-5) and not mixed[1].any()
    assert all(p.requires_grad is False for p in again.model.parameters())


def test_a_tokenizer_of_another_network_is_refused(spoken, tmp_path):
    encoder, _ = spoken
    encoder.tokenizer.save_pretrained(tmp_path)
    for size, why in ((2000, "pieces, the network 2000"), (20, "pieces, the network 20")):
        BertModel(BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
                             intermediate_size=32)).save_pretrained(tmp_path)
        with pytest.raises(NeuralError, match=why): load_text_encoder(tmp_path)
    config = BertConfig(vocab_size=len(encoder.tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
                        intermediate_size=32, pad_token_id=5)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(NeuralError, match="it pads with 0, the network with 5: copy both"): load_text_encoder(tmp_path)
    greek = train_text_encoder(["αβγ δεζ ηθι κλμ"] * 9, 64, 32, 1, epochs=1, progress=False)[0]
    save_text_encoder(greek, tmp_path / "greek")
    with pytest.raises(NeuralError, match="does not know [0-9]+% of a plain sentence"):
        load_text_encoder(tmp_path / "greek")


def test_only_safetensors_are_opened(spoken, tmp_path):
    save_text_encoder(spoken[0], tmp_path / "words")
    weights = tmp_path / "words/model.safetensors"
    config = json.loads((tmp_path / "words/config.json").read_text())
    (tmp_path / "words/config.json").write_text(json.dumps({k: v for k, v in config.items() if "hash" not in k}))
    torch.save({}, tmp_path / "words/pytorch_model.bin")
    weights.unlink()
    unreadable = pytest.raises(NeuralError, match="no text encoder can be read from 'words'")
    with unreadable: load_text_encoder(tmp_path / "words")
    weights.write_bytes(b"not tensors")
    with unreadable: load_text_encoder(tmp_path / "words")
    with pytest.raises(NeuralError, match="config.json is missing"): load_text_encoder(tmp_path / "nowhere")


@pytest.mark.parametrize("what", ["num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"])
def test_sizes_of_a_text_encoder_are_bounded_before_it_is_built(spoken, tmp_path, what):
    save_text_encoder(spoken[0], tmp_path / "words")
    told = json.loads((tmp_path / "words/config.json").read_text())
    (tmp_path / "words/config.json").write_text(json.dumps(told | {what: 10**9}))
    with pytest.raises(NeuralError, match=f"^'words' asks for {what} 1,000,000,000, at most"):
        load_text_encoder(tmp_path / "words")


def test_a_network_that_writes_is_no_text_encoder(spoken, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration
    config = T5Config(vocab_size=len(spoken[0].tokenizer), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    spoken[0].tokenizer.save_pretrained(tmp_path)
    with pytest.raises(NeuralError, match="holds a network that writes"): load_text_encoder(tmp_path)
