"MXA, EfficientViT and distillation: each defect of the released code that code can show, caught in us."
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from neural.distill import (Distillation, Teacher, distil_loss, distil_terms, mean_teacher, model_teacher,
                            quoted, taught_logits, xray_teacher)
from neural.finetune import StudyDataset, fit_labels
from neural.image_model import ImageModel, load_image_model, save_image_model
from neural.mxa import (BOXES, CascadedAttention, EfficientViT, Finder, LearntBox, ReleasedBox,
                        Sandwich, ViTConfig, boxes_of, even_windows, glimpse, vit_config, vit_model)
from neural.results import MACRO, System, predicted, report_card
from neural.study import LABELS, NeuralError, apply_policy, label_value
from neural.vlm import label_loss

TINY = dict(widths=(16, 32, 32), depths=(1, 1, 1), heads=(2, 2, 2), kernels=(3, 3), key=8)
ONE = dict(widths=(32,), depths=(1,), heads=(2,), kernels=(3, 3), key=8)
by_box = pytest.mark.parametrize("box", BOXES)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def awake(model):
    "Every norm that begins silent gets a voice, and the head an opinion."
    for p in model.parameters():
        if p.ndim == 1 and not p.abs().sum(): nn.init.normal_(p, std=0.5)
    if hasattr(model, "head"): nn.init.normal_(model.head.weight)
    return model


class Films:
    "Films in memory that remember who asked."
    def __init__(self, n, size=64):
        self.films = np.random.default_rng(0).random((n, 1, size, size), np.float32)

    def batch(self, ids): return self.films[[int(i) for i in ids]]


def studies(n=8, labels=2, size=64):
    "Some studies with findings, one of them unknown."
    y = np.random.default_rng(1).integers(0, 2, (n, labels)).astype(np.float32)
    y[0, 0] = np.nan
    return StudyDataset(Films(n, size), [str(i) for i in range(n)], [""] * n, y)


# B1: the sigmoid, once and in one place

@by_box
def test_a_new_network_begins_at_ln_2(box):
    model = vit_model(image_size=64, box=box, **TINY)
    films, y = torch.rand(8, 1, 64, 64), torch.randint(0, 2, (8, len(LABELS))).float()
    y[0, :3] = math.nan
    for mode in (True, False):
        assert abs(label_loss(model.train(mode)(films), y).item() - math.log(2)) < 0.02
    first = distil_loss(LABELS, Teacher("t", LABELS, lambda x: x.new_full((len(x), 14), 9.0)), Distillation(0.0))
    assert abs(first(model, (films, y))["labels"].item() - math.log(2)) < 0.02
    squashed = F.binary_cross_entropy_with_logits(model(films).sigmoid(), y.nan_to_num()).item()
    assert abs(squashed - math.log(2)) > 0.02, "the test would not see a second sigmoid"


@by_box
def test_answers_are_logits_in_float32_and_no_two_films_tie(box):
    model = awake(vit_model(("a",), 64, box=box, **TINY)).train()      # norms by the batch: the films differ
    with torch.no_grad():
        model.head.weight.mul_(10)
        z = model(F.interpolate(torch.rand(64, 1, 3, 3), (64, 64), mode="bilinear"))
        rare = (z - z.mean()) / z.std() * 0.3 - 7.5              # an untaught finding: every probability near 0.0005
    assert z.dtype == torch.float32 and z.abs().max() > 2
    assert len(rare.sigmoid().unique()) == 64
    assert len(rare.sigmoid().half().sigmoid().unique()) < 8, "the test would not see the ties of the released code"


# B2: the four kinds of label cells

@pytest.mark.parametrize("cell, value, target", [("", None, math.nan), ("-1", -1.0, 1.0), ("-1.0", -1.0, 1.0),
                                                 ("1.0", 1.0, 1.0), ("0.0", 0.0, 0.0), ("1", 1.0, 1.0)])
def test_label_cells_are_read_as_numbers(cell, value, target):
    assert label_value(cell) == value
    assert np.array_equal(apply_policy(label_value(cell), "ones"), target, equal_nan=True)
    assert not apply_policy(label_value(cell), "zeros") < 0, "no target is ever below 0"


# B3, B4, B5, B6: the box

@by_box
def test_every_parameter_learns_but_those_of_the_released_box(box):
    model = awake(vit_model(("a", "b"), 96, box=box, **TINY)).train()
    films = F.interpolate(torch.rand(8, 1, 3, 3), (96, 96), mode="bilinear")
    (model(films) * torch.randn(8, 2)).sum().backward()
    dead = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert dead == ({n for n, _ in model.named_parameters() if ".finder." in n} if box == "released" else set())
    if box in ("released", "learnt"): assert any(".finder." in n for n, _ in model.named_parameters())


def test_a_learnt_box_is_never_empty_and_never_leaves_the_film():
    finder = Finder(16)
    nn.init.normal_(finder.pull.weight, std=5)
    with torch.no_grad(): box = finder(torch.randn(512, 6, 6, 16))
    assert ((0 <= box) & (box <= 1)).all() and ((box[:, 2:] - box[:, :2] - 0.5).abs() < 0.2501).all()
    moved = Finder(16)(torch.zeros(1, 6, 6, 16))
    torch.testing.assert_close(moved, torch.tensor([[0.25, 0.25, 0.75, 0.75]]))


def test_a_released_box_has_no_place_and_mostly_no_crop():
    box, spot = ReleasedBox(32), torch.zeros(2, 32, 14, 14)
    spot[0, :, 3, 3] = spot[1, :, 10, 9] = 5.0
    with torch.no_grad():
        torch.testing.assert_close(*box.finder(spot))            # the same four numbers wherever it lies
        left, top, right, bottom = (box.finder(torch.randn(64, 32, 14, 14)) * 14).int().unbind(1)
    assert ((right > left) & (bottom > top)).float().mean() < 0.5


def test_a_released_crop_is_what_it_says():
    box, x = ReleasedBox(16), torch.rand(2, 16, 8, 8)
    box.finder, box.gate = nn.Identity(), nn.Identity()
    class Told(nn.Module):
        def forward(self, x): return torch.tensor([[0.3, 0.0, 0.8, 0.5], [0.6, 0.6, 0.6, 0.9]])
    box.finder = Told()
    wanted = F.interpolate(x[:1, :, 0:4, 2:6], (8, 8), mode="bilinear")
    torch.testing.assert_close(box(x), torch.cat([wanted, x[1:]]))          # an empty box is the whole map


def test_a_batch_is_sampled_as_each_film_alone_and_as_torch_does():
    box, x = LearntBox(16).eval(), torch.randn(5, 16, 7, 7)
    nn.init.normal_(box.finder.pull.weight)
    with torch.no_grad(): torch.testing.assert_close(box(x), torch.cat([box(film) for film in x.split(1)]))
    boxes = torch.tensor([[0.05, 0.3, 0.8, 0.9]])
    theta = torch.tensor([[[0.75, 0.0, 0.05 + 0.8 - 1], [0.0, 0.6, 0.3 + 0.9 - 1]]])
    wanted = F.grid_sample(x[:1], F.affine_grid(theta, (1, 1, 7, 7), align_corners=False), padding_mode="border",
                           align_corners=False)
    torch.testing.assert_close(glimpse(x[:1].permute(0, 2, 3, 1), boxes).permute(0, 3, 1, 2), wanted)


class Counted(TorchDispatchMode):
    "Counts the operations of a pass, and how often a number is read out of a tensor."
    def __init__(self):
        super().__init__()
        self.operations, self.reads = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        self.reads += func._overloadpacket == torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("box, loops", [("se", False), ("cbam", False), ("released", True), ("learnt", False)])
def test_a_batch_is_read_at_once_and_no_number_leaves_the_device(box, loops):
    block, found = Sandwich(ViTConfig(**TINY, box=box, size=96), 0), []
    for films in (2, 8):
        with torch.no_grad(), Counted() as count: block(torch.rand(films, 16, 6, 6))
        found.append((count.operations, count.reads))
    (few, reads), (many, more) = found
    if loops: assert (reads, more) == (2 * 4, 8 * 4) and many >= few + 6 * 4
    else: assert few == many and reads == more == 0


@by_box
def test_the_attention_is_run_once_and_the_shortcut_is_not_doubled(box):
    block, calls = Sandwich(vit_config("efficientvit-m0", box=box), 0), []
    block.mixer.register_forward_hook(lambda *_: calls.append(1))
    x = torch.rand(2, 64, 14, 14)
    with torch.no_grad():
        y = block(x)
        if box == "none": torch.testing.assert_close(y, x)
        elif box != "released": torch.testing.assert_close(y, x + block.side(x))
        else: torch.testing.assert_close(y, 2 * x + block.side(x))
    assert len(calls) == 1 + (box == "released")


# the network

@pytest.mark.parametrize("name, millions", [("m0", 2.3), ("m1", 3.0), ("m2", 4.2), ("m3", 6.9), ("m4", 8.8),
                                            ("m5", 12.4)])
def test_sizes_are_the_published_ones(name, millions):
    with torch.device("meta"): net = EfficientViT(vit_config(f"efficientvit-{name}", channels=3))
    norms = sum(m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)) + 2 * net.width
    count = sum(p.numel() for p in net.parameters()) + 1000 * (net.width + 1)
    assert round((count - norms) / 1e6, 1) == millions          # as counted there, norms folded into convolutions


def test_m5_has_the_parameters_of_the_papers_logs():
    with torch.device("meta"):
        counts = {(box, channels): sum(p.numel() for p in EfficientViT(
            vit_config("efficientvit-m5", box=box, channels=channels)).parameters()) + 14 * 385
            for box, channels in (("none", 3), ("released", 1))}
    assert counts == {("none", 3): 12_094_162, ("released", 1): 16_149_010}


@pytest.mark.parametrize("side", [32, 64, 96, 160, 256])
def test_any_side_that_is_a_multiple_of_32_is_read(side):
    model = vit_model(("a", "b", "c"), side, box="learnt", **TINY)
    levels = {16: (16, side // 16), 32: (32, -(-side // 32)), 64: (32, -(-side // 64))}
    with torch.no_grad(): found = model.eval().levels(torch.rand(2, 1, side, side))
    assert {s: tuple(x.shape[1:]) for s, x in found.items()} == {s: (w, h, h) for s, (w, h) in levels.items()}
    assert model(torch.rand(2, 1, side, side)).shape == (2, 3)
    assert all(even_windows(h)[1] <= 7 for _, h in levels.values())


def test_coarser_films_train_and_channels_are_free():
    model = vit_model(("a",), 192, **TINY).train()
    assert model(torch.rand(2, 1, 128, 128)).shape == (2, 1)
    net = EfficientViT(ViTConfig(**TINY, channels=3, size=64))
    assert net(torch.rand(2, 3, 64, 64)).shape == (2, 32, 1, 1)


def test_padding_is_not_attended_to():
    whole = awake(CascadedAttention(16, 2, (1, 1), 8, 4)).eval()
    x = torch.rand(1, 16, 5, 5)
    shorter = F.pad(x, (0, 1, 0, 1))
    with torch.no_grad():
        assert torch.equal(whole(x), whole(x.clone()))
        assert not torch.allclose(whole(x)[..., 3:, 3:], whole(shorter)[..., 3:5, 3:5])


@pytest.mark.parametrize("said, change", [
    ("a multiple of 32 pixels, got 100; load them with 96", dict(image_size=100)),
    ("must be 32 or more", dict(image_size=0)),
    ("no network is called 'efficientvit-m7': choose one of efficientvit-m0", dict(net="efficientvit-m7")),
    ("no box is called 'roi': choose one of none, se, cbam, released, learnt", dict(box="roi")),
    ("knows no 'block'; it knows widths, depths", dict(block="learnt")),
    ("stage 1: 33 channels cannot be dealt to 2 heads", dict(TINY, widths=(16, 33, 32))),
    ("one number a stage each, got 2, 3 and 3", dict(TINY, widths=(16, 32))),
    ("kernel of odd side, got", dict(TINY, kernels=(4, 3))),
])
def test_what_cannot_be_built_is_refused_in_a_line(said, change):
    with pytest.raises(NeuralError) as caught: vit_model(**dict(dict(image_size=64), **change))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_options_belong_to_a_network():
    with pytest.raises(NeuralError, match="'levels' knows no 'box'; it knows no options"):
        ImageModel(("a",), 64, ((8,), (8,)), options=dict(box="se"))
    assert "options" not in ImageModel(("a",), 64, ((8,), (8,))).config


# on disk

@by_box
def test_what_is_loaded_answers_to_the_last_bit(box, tmp_path):
    model = awake(vit_model(("a", "b"), 96, box=box, **TINY))
    model(torch.rand(8, 1, 96, 96))
    films = torch.rand(3, 1, 96, 96)
    save_image_model(model.eval(), tmp_path / "m")
    with torch.no_grad(): assert torch.equal(load_image_model(tmp_path / "m")(films), model(films))
    again = load_image_model(tmp_path / "m")
    assert again.config == model.config and again.config["options"]["box"] == box


@pytest.mark.parametrize("change, said", [
    (dict(box="roi"), "no box is called"), (dict(widths=[16, 32, 64]), "do not fit its configuration"),
    (dict(widths=[8 * 10**6] * 3), "do not fit its configuration"), (dict(depths=[1, 1, 10**9]), "more than 64"),
    (dict(heads=[0, 2, 2]), "must be 1 or more"), (dict(heads="many"), "cannot be rebuilt"),
    (dict(size=32), "cannot be rebuilt"), (dict(command="rm"), "knows no 'command'"), ("learnt", "options must be"),
    ([1, 2], "options must be"),
])
def test_hostile_configurations_are_refused(change, said, tmp_path):
    save_image_model(vit_model(("a",), 64, box="learnt", **TINY), tmp_path / "m")
    about = json.loads((tmp_path / "m/config.json").read_text())
    options = about["config"]["options"]
    about["config"]["options"] = options | change if isinstance(change, dict) else change
    (tmp_path / "m/config.json").write_text(json.dumps(about))
    with pytest.raises(NeuralError, match=said): load_image_model(tmp_path / "m")


def test_weights_of_another_box_are_refused(tmp_path):
    for box in ("se", "learnt"): save_image_model(vit_model(("a",), 64, box=box, **TINY), tmp_path / box)
    about = json.loads((tmp_path / "se/config.json").read_text())
    about["config"]["options"]["box"] = "learnt"
    (tmp_path / "se/config.json").write_text(json.dumps(about))
    with pytest.raises(NeuralError, match="do not fit its configuration"): load_image_model(tmp_path / "se")


# a planted signal

def test_a_spot_is_found_and_the_box_goes_there():
    generator, line = torch.Generator().manual_seed(0), torch.arange(96) / 96
    def spotted(n):
        y, at = (torch.rand(n, generator=generator) < 0.5).float(), torch.rand(n, 2, generator=generator) * 0.3 + 0.1
        down, across = (torch.exp(-((line - at[:, i, None]) ** 2) / 0.0032) for i in (0, 1))
        noise = torch.rand(n, 96, 96, generator=generator) * 0.4 + 0.1
        return (noise + 0.25 * y[:, None, None] * down[..., None] * across[:, None])[:, None], y, at
    def far(model, films, at):
        box = boxes_of(model.eval(), films)[:, -1]
        return ((box[:, :2] + box[:, 2:]) / 2 - at.flip(1)).norm(dim=1).mean().item()
    model, (films, y, at) = vit_model(("spot",), 96, box="learnt", **ONE), spotted(64)
    before = far(model, films[y > 0], at[y > 0])
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        some, there, _ = spotted(16)
        loss = F.binary_cross_entropy_with_logits(model.train()(some)[:, 0], there)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad(): z = model.eval()(films)[:, 0]
    assert (z[y > 0][:, None] > z[y == 0]).float().mean() > 0.9
    assert far(model, films[y > 0], at[y > 0]) < 0.85 * before


def test_boxes_are_asked_for_where_there_are_some():
    with pytest.raises(NeuralError, match="make it with box='learnt'"):
        boxes_of(vit_model(("a",), 64, box="cbam", **TINY), torch.rand(1, 1, 64, 64))
    assert boxes_of(vit_model(("a",), 64, box="released", **TINY), torch.rand(2, 1, 64, 64)).shape == (2, 3, 4)


# B1c, B14, B15: what goes in

def test_all_kinds_see_the_same_films_and_so_does_the_teacher():
    data, seen = studies(), {}
    for name, box in (("plain", "none"), ("mxa", "learnt"), ("taught", "learnt")):
        model, told = vit_model(("a", "b"), 64, box=box, **TINY), seen.setdefault(name, [])
        model.register_forward_pre_hook(lambda _m, given, told=told: told.append(given[0].clone()))
        shown = seen.setdefault("teacher", [])
        teacher = Teacher("t", ("a", "b"), lambda x: shown.append(x.clone()) or x.new_full((len(x), 2), -3.0))
        loss = distil_loss(("a", "b"), teacher) if name == "taught" else None
        fit_labels(model, model, data, epochs=2, batch_size=4, loss=loss, bf16=False)
    for other in ("mxa", "taught", "teacher"):
        assert len(seen[other]) == len(seen["plain"]) == 4
        assert all(torch.equal(a, b) for a, b in zip(seen["plain"], seen[other])), other


def test_the_network_reads_unit_scale_and_says_nothing(capsys):
    model, seen = vit_model(("a",), 64, box="learnt", **TINY).eval(), []
    model.net.stem.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(3): model(torch.rand(2, 1, 64, 64))
    assert max(x.abs().max() for x in seen) < 3
    assert capsys.readouterr() == ("", "")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()), "nothing is counted in evaluation"


# B7, B8, B12, B13: the teacher

def test_alpha_temperature_and_hardness_act():
    z, y, t = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float(), torch.randn(4, 3) * 3
    ways = [Distillation(a, w) for a in (0.0, 0.3, 1.0) for w in (0.5, 1.0, 4.0)] + [Distillation(0.5, hard=True)]
    found = [sum(distil_terms(z, y, t, how).values()).item() for how in ways]
    assert len({round(v, 5) for v in found[:3]}) == 1 and len({round(v, 5) for v in found[2:]}) == 8
    assert found[0] == pytest.approx(label_loss(z, y).item(), abs=1e-6)
    assert sum(distil_terms(z, y, z, Distillation(1.0, 2.0)).values()).item() == pytest.approx(0, abs=1e-6)
    grads = []
    for how in ways[2:]:
        z.grad, z.requires_grad = None, True
        sum(distil_terms(z, y, t, how).values()).backward()
        grads.append(z.grad.clone())
    assert all(not torch.allclose(a, b) for i, a in enumerate(grads) for b in grads[:i])


def test_a_teacher_is_silent_where_it_knows_nothing():
    z = torch.randn(6, 3, requires_grad=True)
    y = torch.tensor([[1.0, 0, 1]] * 6)
    teacher = Teacher("t", ("b", "", "elsewhere"), lambda x: torch.full((len(x), 3), -4.0))
    taught = teacher.say(torch.rand(6, 1, 8, 8), ("a", "b", "c"))
    assert taught[:, [0, 2]].isnan().all() and (taught[:, 1] == -4).all()
    sum(distil_terms(z, y, taught, Distillation(1.0)).values()).backward()
    alone = z.grad.clone()
    z.grad = None
    label_loss(z, y).backward()
    assert torch.allclose(alone[:, [0, 2]], z.grad[:, [0, 2]]), "labels count as ever where it is silent"
    assert not torch.allclose(alone[:, 1], z.grad[:, 1])
    blank = distil_terms(z, torch.full_like(y, math.nan), torch.full_like(y, math.nan))
    assert all(v.item() == 0 for v in blank.values())


def test_probabilities_are_refused_however_small_the_batches():
    teacher = Teacher("chex", ("a", "b"), lambda x: torch.rand(len(x), 2))
    with pytest.raises(NeuralError, match="'chex' answers within .*, as probabilities do; the loss takes logits"):
        for _ in range(16): teacher(torch.rand(1, 1, 8, 8))
    twice = Teacher("twice", ("a",), lambda x: torch.randn(len(x), 1).sigmoid().sigmoid())
    with pytest.raises(NeuralError, match="as probabilities do"): twice(torch.rand(32, 1, 8, 8))
    logits = Teacher("fine", ("a",), lambda x: torch.linspace(-3, 0.5, len(x))[:, None])
    for n in range(1, 20): logits(torch.rand(n, 1, 8, 8))


@pytest.mark.parametrize("make, said", [
    (lambda: distil_loss(("Mass",), Teacher("t", ("Edema", "Hernia"), None)),
     "'t' knows Edema, Hernia …, the student is asked for Mass …: they share no finding"),
    (lambda: mean_teacher([]), "needs one teacher at least"),
    (lambda: Teacher("t", ("", ""), None), "needs findings, each once, got none"),
    (lambda: Distillation(-0.1), "alpha must lie in [0, 1], got -0.1"),
    (lambda: Distillation(temperature=-1), "temperature must be above 0"),
    (lambda: Distillation(hard=True, temperature=4.0), "at any temperature, got 4"),
    (lambda: distil_loss(("a",))(None, (0, 0)), "nobody teaches"),
    (lambda: Teacher("t", ("a",), lambda x: torch.full((2, 1), math.nan))(torch.rand(2, 1, 8, 8)), "no numbers"),
])
def test_teachers_that_cannot_teach_are_refused_in_a_line(make, said):
    with pytest.raises(NeuralError) as caught: make()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_house_teaches_the_house():
    data = studies()
    big, small = ImageModel(("b", "a"), 64, ((8,), (16,))), vit_model(("a", "b"), 64, box="learnt", **TINY)
    nn.init.normal_(big.head.weight)
    teacher = mean_teacher([model_teacher(big, "one"), model_teacher(big, "two")])
    taught = taught_logits(teacher, data, ("a", "b", "c"), 3)
    with torch.no_grad(): wanted = big.eval()(torch.as_tensor(data.films.films)).flip(1).numpy()
    np.testing.assert_allclose(taught[:, :2], wanted, atol=1e-5)
    assert np.isnan(taught[:, 2]).all() and taught.dtype == np.float32
    history = fit_labels(small, small, data, epochs=2, batch_size=4, bf16=False,
                         loss=distil_loss(("a", "b"), teacher, Distillation(0.7, 2.0)))
    assert set(history[0]) == {"epoch", "loss", "labels", "teacher"}
    assert all(p.grad is None for p in big.parameters()), "a teacher never learns"
    blind = nn.Linear(4, 2)                                      # a student that reads no film: the answers come along
    terms = distil_loss(("a", "b"), read=lambda m, x: m(x))(
        blind, (torch.rand(8, 4), torch.as_tensor(data.targets), torch.as_tensor(taught[:, :2])))
    assert terms["teacher"].item() > 0


def test_files_of_other_teachers_are_refused_unopened(tmp_path):
    file = tmp_path / "chex.pt"
    torch.save({"a": torch.ones(1)}, file)
    with pytest.raises(NeuralError, match="chex.pt is a pickle, which may run code"): xray_teacher(file)
    save_file({"classifier.weight": torch.ones(14, 1024)}, file)
    with pytest.raises(NeuralError, match="no DenseNet-121 of 18 outputs: classifier.bias is missing"):
        xray_teacher(file)
    with pytest.raises(NeuralError, match="is missing"): xray_teacher(tmp_path / "no.safetensors")


# B10, B11: what a number is of

def test_to_know_how_common_findings_are_is_worth_nothing():
    rng, targets = np.random.default_rng(0), ("Edema", "Fracture", "Mass")
    share = np.array([0.05, 0.3, 0.7])
    y, p = (rng.random((200, 3)) < share).astype(float), np.tile(share, (200, 1))
    ids, system = [f"s{i}" for i in range(200)], System("prevalence", "70_mxa", "image-only")
    said = [predicted(system, 0, "test", t, ids, {i: i for i in ids}, y[:, n], p[:, n]) for n, t in enumerate(targets)]
    card = report_card(pd.concat(said), command="this test")
    assert card[card.metric == MACRO].value.tolist() == [0.5]
    assert roc_auc_score(y.ravel(), p.ravel()) > 0.75, "the test would not see a micro AUC"


def test_another_seed_is_another_training():
    data, films, said = studies(), torch.rand(4, 1, 64, 64), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = vit_model(("a", "b"), 64, box="learnt", **TINY)
        fit_labels(model, model, data, epochs=2, batch_size=4, seed=seed, bf16=False)
        with torch.no_grad(): said.append(model.eval()(films))
    assert torch.equal(said[0], said[1]) and not torch.allclose(said[0], said[2])


# the bench

def test_the_bench_compares_the_same_maps():
    from neural.bench import box_ways
    ways = box_ways(replace(vit_config(), size=96), 1, 2)
    shapes = {name: way.args[1].shape for name, way in ways.items()}
    assert set(shapes.values()) == {(2, 128, 3, 3)} and len(shapes) == 4
    for way in ways.values():
        way()
        assert way.args[1].grad.abs().sum() > 0


# B9: what chooses

def test_reading_test_after_every_pass_changes_nothing_of_a_training():
    data, blind = studies(8), studies(8)
    blind.targets[4:] = np.nan
    found = {}
    for name, part in (("first half", None), ("both, one blind", blind)):
        if part is None: part = StudyDataset(data.films, data.ids[:4], [""] * 4, data.targets[:4])
        torch.manual_seed(0)
        model = vit_model(("a", "b"), 64, box="learnt", **TINY)
        history = fit_labels(model, model, data, part, epochs=2, batch_size=4, bf16=False)
        found[name] = model.state_dict(), [row["eval_loss"] for row in history]
    (weights, losses), (again, others) = found.values()
    assert losses == pytest.approx(others, abs=1e-6)
    assert all(torch.equal(v, again[k]) for k, v in weights.items())


# B12: a teacher that is quoted

def test_a_quoted_teacher_teaches_as_if_it_were_asked():
    data, asked, weights = studies(), [], {}
    torch.manual_seed(1)
    large = awake(ImageModel(("a", "b"), 64, ((8,), (8,)))).eval()
    teacher = Teacher("t", ("a", "b"), lambda x: asked.append(len(x)) or large(x))
    memory, counts = quoted(teacher), []
    for name, one in (("asked", teacher), ("quoted", memory), ("quoted again", memory)):
        torch.manual_seed(0)
        model = vit_model(("a", "b"), 64, **TINY)
        fit_labels(model, model, data, epochs=2, batch_size=4, loss=distil_loss(("a", "b"), one), bf16=False)
        weights[name] = model.state_dict()
        counts.append(len(asked))
    assert counts == [4, 8, 8], "the second student of the same films asks for nothing"
    for name in ("quoted", "quoted again"):
        assert all(torch.equal(v, weights[name][k]) for k, v in weights["asked"].items())
    memory(torch.rand(2, 1, 64, 64))
    assert len(asked) == 9, "another film is asked for anew"


def test_what_was_squashed_in_training_shows_in_the_first_loss():
    y = torch.zeros(64, 2)
    y[:15] = 1
    model = vit_model(("a", "b"), 64, **TINY)
    once, twice = (label_loss(z, y).item() for z in (model(torch.rand(64, 1, 64, 64)), torch.zeros(64, 2).sigmoid()))
    assert once == pytest.approx(math.log(2), abs=0.02)
    assert twice == pytest.approx(math.log(1 + math.exp(0.5)) - y.mean().item() / 2, abs=1e-5)
