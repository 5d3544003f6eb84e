"All scorers on the same studies: what the chapter's planted patch cannot show."
from dataclasses import replace

import numpy as np
import pytest
import torch

from neural.cohort import toy_study
from neural.report import ReportReader, evidence, split_sections, train_tokenizer
from neural.scores import Batch, Network, Scoring, anatomy, gather, measure, patch_ranks
from neural.study import NeuralError
from neural.variants import STUDY_SCORERS, chance_met, compare_maps, every_map, marks_met
from neural.vlm import ReportVLM, small_config


@pytest.fixture(scope="module")
def read():
    "A network that has learnt nothing, three toy studies, what it sees in them, and its state."
    toys = [toy_study(f, size=96, seed=i) for i, f in enumerate(("Pneumonia", "", "Pleural Effusion"))]
    sections = [split_sections(t.report) for t in toys]
    texts = [evidence(s) for s in sections]
    tokenizer = train_tokenizer(texts * 5, vocab_size=120)
    torch.manual_seed(0)
    model = ReportVLM(small_config(len(tokenizer), 96, width=64, d_model=64, layers=2)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    images = torch.stack([torch.as_tensor(np.asarray(t.image)) for t in toys])
    network, batch = Network(model, tokenizer, ReportReader()), Batch(list("abc"), images, texts, sections)
    found = gather(network, batch)
    return network, batch, found, Scoring(baseline=measure(model, [found]))


def test_every_scorer_is_a_distribution_for_every_study(read):
    *_, found, state = read
    maps = every_map(found, state)
    assert tuple(maps) == STUDY_SCORERS
    for name, m in maps.items():
        assert tuple(m.shape) == (3, 144) and torch.isfinite(m).all() and (m >= 0).all(), name
        assert torch.allclose(m.sum(1), torch.ones(3), atol=1e-4), name


def test_empty_and_written_reports_have_maps_too(read):
    network, batch, _, state = read
    written = Batch(batch.ids, batch.films, ["", "no acute disease.", batch.texts[0]])
    maps = every_map(gather(network, written), state)
    assert all(torch.allclose(m.sum(1), torch.ones(3), atol=1e-4) for m in maps.values())


def test_a_report_does_not_depend_on_its_company(read):
    network, batch, found, state = read
    single = Batch(["b"], batch.films[1:2], batch.texts[1:2], batch.sections[1:2])
    alone, together = every_map(gather(network, single), state), every_map(found, state)
    for name in STUDY_SCORERS:
        assert torch.allclose(alone[name][0], together[name][1], atol=2e-4), name


def test_reading_leaves_the_network_as_it_was(read):
    network, batch, *_ = read
    before = {k: v.clone() for k, v in network.model.state_dict().items()}
    gather(network, batch)
    assert all(torch.equal(v, before[k]) for k, v in network.model.state_dict().items())
    assert all(p.grad is None for p in network.model.parameters())  # the slope is asked of the attention alone


def test_priors_read_no_film(read):
    *_, found, state = read
    flipped = tuple(a.flip(-1) for a in found.cross)
    other = replace(found, seen=torch.randn_like(found.seen), bright=torch.rand_like(found.bright), cross=flipped)
    a, b = every_map(found, state), every_map(other, state)
    priors = {"anatomy of findings", "anatomy of the lungs"}
    for name in priors:
        assert torch.equal(a[name], b[name])
    for name in set(STUDY_SCORERS) - priors:
        assert not torch.allclose(a[name], b[name]), name
    assert torch.equal(a["anatomy of the lungs"][0], a["anatomy of the lungs"][2])


def test_the_slope_is_the_slope(read):
    """A nudge of the last cross-attention in the direction of its gradient raises the log-likelihood of the finding
    words."""
    *_, found, _ = read
    assert found.slope.shape == found.cross[-1].shape and torch.isfinite(found.slope).all()
    silent = ~found.classes["finding"].any(1)
    assert found.slope[~silent].abs().sum() > 0


@pytest.mark.parametrize("gamma,gain", [(0.5, 0.9), (2.0, 0.5)])
def test_brightness_ignores_exposure(gamma, gain):
    flat = (torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0)) .repeat_interleave(8, 2)
            .repeat_interleave(8, 3))
    assert torch.equal(patch_ranks(flat), patch_ranks(flat ** gamma * gain))


def test_anatomy_is_drawn_from_phantoms_alone_and_repeats():
    a, b = anatomy(["No Finding", "Pneumonia", "Edema"], studies=2), anatomy(
        ["No Finding", "Pneumonia", "Edema"], studies=2)
    assert torch.equal(a, b) and torch.allclose(a.sum(0), torch.ones(3), atol=1e-4)
    assert torch.allclose(a[:, 0], torch.full((144,), 1 / 144)) and a[:, 2].max() > 1.5 / 144


def test_chance_is_what_random_patches_do():
    rng = np.random.default_rng(0)
    cover = np.zeros((40, 144), np.float32)
    for c in cover: c[rng.choice(144, rng.integers(2, 30), replace=False)] = 1
    drawn = [marks_met(torch.as_tensor(rng.random((40, 144))), cover, 4) for _ in range(300)]
    chance = chance_met(cover, 4)
    for what in ("hit", "precision", "pointing"):
        assert abs(np.mean([d[what].mean() for d in drawn]) - chance[what].mean()) < 0.01, what


def test_a_planted_map_beats_chance_and_its_swapped_self():
    rng = np.random.default_rng(0)
    cover = np.zeros((12, 144), np.float32)
    for row, hot in zip(cover, rng.choice(144, 12, replace=False)):
        row[hot] = 1
    maps = {"planted": torch.as_tensor(cover) + 1e-6, "centre prior": torch.ones(12, 144) / 144}
    found = compare_maps(maps, cover, [f"p{i // 2}" for i in range(12)], ["planted"], 1, samples=200)
    assert found["planted"]["precision"] == [1.0, 1.0, 1.0] and found["studies"] == 12
    assert found["planted"]["precision over random"][1] > 0.9
    assert found["planted"]["precision over swapped films"] == [1.0, 1.0, 1.0]
    assert found["random"]["hit"] == pytest.approx(1 / 144)


def test_refusals(read):
    network, batch, found, state = read
    with pytest.raises(NeuralError, match="share must lie"):
        every_map(found, replace(state, shares={"activation + words": 1.5}))
    with pytest.raises(NeuralError, match="no training study"):
        measure(network.model, [])
    with pytest.raises(NeuralError, match="at least one"):
        Batch([], batch.films[:0], [])
    with pytest.raises(NeuralError, match="empty"):
        marks_met(torch.ones(2, 144), np.zeros((2, 144)), 4)
