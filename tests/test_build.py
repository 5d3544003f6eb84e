"""What guides the pruning must be able to find what was hidden: labels say whether, the head must learn where."""
import numpy as np
import pytest
import torch

from neural.build import Aggregation, by_activation, finding_places, guided, habit, named_findings, region
from neural.finetune import stem_logits
from neural.prune import top_k
from neural.report import ReportReader
from neural.vlm import ReportVLM, label_loss, small_config

NAMES = ("Lung Lesion", "Edema")


def planted(n, seed):
    "Noisy films: half hide a bright square in one patch of the 12x12 grid, half are hazy all over; labels, and where the square is."
    rng = np.random.default_rng(seed)
    films, labels, where = rng.normal(0.4, 0.05, (n, 1, 96, 96)), np.zeros((n, 2)), rng.integers(13, 131, n)
    for i in range(n):
        if i % 2: labels[i, 0] = 1; r, c = divmod(where[i], 12); films[i, :, r * 8 : r * 8 + 8, c * 8 : c * 8 + 8] += 0.45
        if i % 4 > 1: labels[i, 1] = 1; films[i] += 0.15
    return torch.as_tensor(films.clip(0, 1), dtype=torch.float32), torch.as_tensor(labels, dtype=torch.float32), where


@pytest.fixture(scope="module")
def taught():
    "A small network whose stem was told which films have a lesion, and never where."
    torch.manual_seed(0)
    model = ReportVLM(small_config(40, 96, NAMES, width=64, d_model=64, layers=1, sharpness=4.0)).train()
    films, labels, _ = planted(256, 0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(60):
        part = slice(16 * (step % 16), 16 * (step % 16) + 16)
        loss = label_loss(stem_logits(model, films[part]), labels[part]); optimiser.zero_grad(); loss.backward(); optimiser.step()
    return model.eval()


def test_a_planted_lesion_is_kept_though_only_its_name_was_taught(taught):
    films, labels, where = planted(64, 1)
    reader = ReportReader()
    usual = habit(taught, None, reader, [([str(i) for i in range(32)], films[:32], [""] * 32)], Aggregation("activation"))
    ill = [i for i in range(32, 64) if labels[i, 0]]
    with torch.no_grad(): tokens = taught.encode(films[ill])
    seen, silent = by_activation(taught, tokens, [reader("There is a lung nodule.")] * len(ill), usual)
    assert not silent.any() and torch.allclose(seen.sum(1), torch.ones(len(ill)), atol=1e-4)
    near = [max(abs(j // 12 - where[i] // 12), abs(j % 12 - where[i] % 12)) <= 1 for i, kept in zip(ill, top_k(seen, 4).tolist()) for j in kept]
    assert np.mean(near) >= 0.5  # within one patch, as far as a convolution reaches; 4 of 144 at random: 0.06


def test_the_report_decides_which_finding_is_followed():
    seen = torch.zeros(1, 144, 2); seen[0, 20, 0], seen[0, 90, 1] = 2.0, 2.0
    for named, place in (([1.0, 0.0], 20), ([0.0, 1.0], 90), ([0.5, 1.0], 90)):
        assert guided(seen, torch.zeros(144, 2), torch.tensor([named]), 4.0).argmax().item() == place


def test_a_head_that_takes_the_mean_can_still_point():
    seen = torch.zeros(1, 6, 1); seen[0, 2] = 3.0
    assert guided(seen, torch.zeros(6, 1), torch.ones(1, 1), 0.0).argmax().item() == 2


@pytest.mark.parametrize("words,place", [("Opacity in the right upper lobe.", "right upper lobe"), ("Left lower lobe consolidation, likely pneumonia.", "left lower lobe"),
                                         ("There is a patchy opacity at the left lung base.", ("lung base", "left")), ("Possible right middle lobe pneumonia.", "right middle lobe")])
def test_a_finding_of_one_side_is_never_answered_from_the_other(words, place):
    torch.manual_seed(0)
    reader, names = ReportReader(), ["Lung Opacity", "Consolidation", "Pneumonia"]
    note = reader(words)
    where = finding_places([note], names)
    spot = region(*(place if isinstance(place, tuple) else (place,)))
    assert 4 < spot.sum() < 100
    for _ in range(20):
        kept = top_k(guided(torch.randn(1, 144, 3) * 3, torch.zeros(144, 3), named_findings([note], names), 4.0, where), 4)[0]
        assert spot[kept].all()
