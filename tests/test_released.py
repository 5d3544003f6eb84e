"""Each test here fails on what the released code of the paper does (defects A1-A15), so the claim is shown on us, not asserted."""
import math

import numpy as np
import pytest
import torch

from neural.build import read_batch, Aggregation
from neural.finetune import Collator, StudyDataset, augment, mirror
from neural.phantom import toy_study
from neural.prune import released_rows, top_k
from neural.relevance import relevance
from neural.report import ReportReader, evidence, split_sections, train_tokenizer
from neural.study import LABELS, split_of
from neural.vlm import ReportVLM, label_loss, small_config, text_loss

TEXTS = ["Focal consolidation in the right lower lung, consistent with pneumonia. No pleural effusion.", "Small left pleural effusion. Heart size is normal."]


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer(TEXTS * 5, vocab_size=90)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return ReportVLM(small_config(len(tokenizer), 96, width=64, d_model=64, layers=2)).eval()


@pytest.fixture(scope="module")
def films(): return torch.stack([torch.as_tensor(toy_study(f, size=96, seed=3).image) for f in ("Pneumonia", "Pleural Effusion")])


class Memory(dict):
    def batch(self, ids): return np.stack([self[i] for i in ids])


def planted(tokens=20, hot=101):
    "Attention of a report whose words all rest on one patch."
    a = torch.full((1, 4, tokens, 144), 0.5 / 143); a[..., hot] = 0.5
    return a


def test_a_hot_patch_is_kept_and_the_released_selection_loses_it():
    seen = relevance((planted(),), torch.ones(1, 20, dtype=torch.bool))
    assert 101 in top_k(seen, 4)[0].tolist()
    assert 101 not in released_rows(planted()[0].mean(0)).tolist()  # it returns token rows, 0 to 19


def test_relevance_has_one_number_per_patch_whatever_the_report_length():
    for tokens in (5, 40, 150):
        seen = relevance((planted(tokens),), torch.ones(1, tokens, dtype=torch.bool))
        assert seen.shape == (1, 144) and torch.allclose(seen.sum(), torch.tensor(1.0), atol=1e-4)


def test_a_study_keeps_k_patches_whatever_its_report_says(model, tokenizer, films):
    long = " ".join([TEXTS[0]] * 6)
    for text in (TEXTS[1], long):
        reading = read_batch(model, tokenizer, ReportReader(), ["s"], films[:1], [text], "image+report", 4, Aggregation(lift=False), max_tokens=200)[0]
        assert len(set(reading.patches.tolist())) == 4 and reading.features.shape == (4, 64)


@pytest.mark.parametrize("sharpness", [0.0, 4.0])
def test_initial_losses_are_those_of_a_network_that_knows_nothing(tokenizer, films, sharpness):
    torch.manual_seed(0)
    model = ReportVLM(small_config(len(tokenizer), 96, width=64, d_model=64, layers=2, sharpness=sharpness)).eval()
    batch = Collator(tokenizer)([dict(film=f.numpy(), text=t, targets=np.zeros(14, np.float32)) for f, t in zip(films, TEXTS)])
    with torch.no_grad(): out = model(**batch)
    assert abs(out.text_loss.item() - math.log(len(tokenizer))) < 0.03 * math.log(len(tokenizer))
    assert abs(out.label_loss.item() - math.log(2)) < 1e-4


@pytest.mark.parametrize("sharpness", [0.0, 4.0])
def test_every_trainable_parameter_receives_a_gradient(tokenizer, films, sharpness):
    torch.manual_seed(1)
    fresh = ReportVLM(small_config(len(tokenizer), 96, width=64, d_model=64, layers=2, sharpness=sharpness)).train()
    with torch.no_grad(): fresh.head.weight.normal_(std=0.01)
    fresh(**Collator(tokenizer)([dict(film=f.numpy(), text=t, targets=np.ones(14, np.float32)) for f, t in zip(films, TEXTS)])).loss.backward()
    assert not [n for n, p in fresh.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_pads_never_count_in_the_loss(model, tokenizer, films):
    items = [dict(film=f.numpy(), text=t, targets=np.zeros(14, np.float32)) for f, t in zip(films, TEXTS)]
    both, alone = Collator(tokenizer)(items), [Collator(tokenizer)([i]) for i in items]
    with torch.no_grad(): together, apart = model(**both), [model(**a) for a in alone]
    tokens = [(a["labels"] != -100).sum().item() for a in alone]
    expected = sum(o.text_loss.item() * t for o, t in zip(apart, tokens)) / sum(tokens)
    assert (both["labels"] == -100).any() and abs(together.text_loss.item() - expected) < 1e-4
    assert text_loss(torch.zeros(1, 2, 7), torch.full((1, 2), -100)).item() == 0


def test_an_unknown_label_is_not_a_negative():
    nan = torch.tensor([[float("nan"), 1.0]])
    assert torch.allclose(label_loss(torch.tensor([[50.0, 0.0]]), nan), torch.tensor(math.log(2)), atol=1e-5)


def test_a_flipped_image_never_keeps_its_words_and_augmentation_never_flips():
    film, text = torch.zeros(1, 8, 8), "Left lower lobe pneumonia."
    film[..., 0] = 1
    flipped, words = mirror(film, text)
    assert flipped[..., -1].all() and "right" in words.lower() and "left" not in words.lower()
    half = torch.zeros(64, 1, 48, 48); half[..., :20] = 1
    moved = augment(half, torch.Generator().manual_seed(0))
    assert (moved[..., :24].sum((1, 2, 3)) > moved[..., 24:].sum((1, 2, 3))).all()


def test_validation_films_are_never_augmented(tokenizer):
    film = np.random.default_rng(0).random((1, 16, 16), np.float32)
    batch = Collator(tokenizer)([dict(film=film, text="x", targets=np.zeros(2, np.float32))])
    assert np.array_equal(batch["pixel_values"][0].numpy(), film)


def test_the_indication_never_reaches_the_model():
    report = "INDICATION: Evaluate for pneumonia.\n\nFINDINGS: Heart size is normal."
    assert "pneumonia" not in evidence(split_sections(report)).lower()
    assert evidence(split_sections("INDICATION: Evaluate for pneumonia.")) == ""  # and no section is ever replaced by the whole report


def test_negated_and_affirmed_findings_are_different_nodes(model, tokenizer, films):
    reader = ReportReader(); how = Aggregation(lift=False)
    said = [read_batch(model, tokenizer, reader, ["s"], films[:1], [t], "image+report", 4, how)[0].asset(reader.vocabulary) for t in ("Pneumonia.", "No pneumonia.")]
    assert said[0].concepts.tolist() == said[1].concepts.tolist() and said[0].assertions.tolist() != said[1].assertions.tolist()


def test_stored_edges_are_symmetric(model, tokenizer, films):
    reader = ReportReader()
    readings = read_batch(model, tokenizer, reader, ["a", "b"], films, TEXTS, "image+report", 20, Aggregation(lift=False))
    for fusion in ("betweenness", "grounding", "none"):
        for r in readings:
            pairs = set(map(tuple, r.graph(reader.vocabulary, fusion).edges.T.tolist()))
            assert pairs and all((b, a) in pairs for a, b in pairs)


def test_a_patient_has_one_split_for_all_stages():
    for i in range(200): assert split_of(f"p{i}") == split_of(f"p{i}")
    shares = [np.mean([split_of(f"p{i}") == s for i in range(3000)]) for s in ("train", "validate", "test")]
    assert np.allclose(shares, (0.7, 0.1, 0.2), atol=0.03)


def test_text_nodes_are_not_all_alike():
    "The released text nodes are all the same constant vector; ours are a learned row per concept and assertion."
    from neural.classify import GraphClassifier
    words = GraphClassifier("gcn", 8, 5).words.weight
    assert len({tuple(w.tolist()) for w in words}) == len(words) == 15


def test_dataset_refuses_lists_of_different_length():
    with pytest.raises(ValueError, match="do not belong together"): StudyDataset(Memory(), ["a"], ["x", "y"], np.zeros((1, len(LABELS))))
