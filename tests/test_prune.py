"Budgets kept to the unit, ties that fall the same way everywhere, and the released selection held to the letter."
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from neural.prune import keep_count, random_k, reduction, released_rows, retain, select, top_k
from neural.study import NeuralError

N = 144


def attention(T, seed=0, heads=4):
    return torch.randn(heads, T, N, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def planted(T=20, patch=100):
    "Every token looks hardest at one patch, low on the film."
    a = attention(T)
    a[:, :, patch] += 0.5
    return a / a.sum(-1, keepdim=True)


def test_ceiling_is_exact_for_every_percentage():
    wrong = [(n, p) for n in (1, 7, 49, 100, 144, 196, 576, 1000) for p in range(1, 1001)
             if keep_count(n, p / 1000) != max(1, ceil(Fraction(p, 1000) * n))]
    assert wrong == []


def test_four_of_144_is_not_2_3_percent():
    assert keep_count(N, 0.023) == 4 and round(100 * (1 - reduction(N, 4)), 1) == 2.8


@pytest.mark.parametrize("seed", range(20))
def test_top_k_agrees_with_the_plain_definition(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 200))
    k = int(rng.integers(1, n + 1))
    scores = rng.integers(0, 4, size=(3, n)) / 4                                     # many ties
    expected = [sorted(sorted(range(n), key=lambda i: (-row[i], i))[:k]) for row in scores]
    assert top_k(torch.as_tensor(scores), k).tolist() == expected
    assert [top_k(row, k).tolist() for row in scores] == expected                    # channels come one layer at a time


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_all_equal_scores_keep_the_first_k(dtype):
    assert top_k(torch.zeros(2, 20_000, dtype=dtype), 5).tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("bad", [torch.tensor([1., torch.nan]), torch.tensor([1., torch.inf]), torch.ones(1, 1, 3)])
def test_scores_that_cannot_be_ranked_are_refused(bad):
    with pytest.raises(NeuralError): top_k(bad, 1)


@pytest.mark.parametrize("k", [0, -1, 145])
def test_impossible_budgets_are_refused(k):
    with pytest.raises(NeuralError, match="between 1 and the 144"): retain(torch.ones(1, N), k=k)


def test_planted_patch_is_kept_as_described_and_lost_as_released():
    a = planted()
    assert 100 in select(a, "described").tolist()
    assert 100 not in select(a, "released").tolist()
    assert select(a, "described", k=1).tolist() == [100]


def test_released_never_reaches_past_the_report():
    for T in (5, 20, 60): assert select(planted(T, patch=143), "released").max() < T


def test_released_selection_grows_with_the_report_and_described_does_not():
    lengths = (12, 40, 80, 143)
    released = [len(select(attention(T), "released")) for T in lengths]
    assert released == sorted(released) and released[-1] > 10 * released[0]
    assert [len(select(attention(T))) for T in lengths] == [4] * 4


def test_released_equals_a_loop_written_from_the_description():
    for seed in range(10):
        a = attention(30, seed).mean(0).numpy()
        threshold = np.percentile(a, 97.7)
        loop = [t for t in range(30) for j in range(N) if a[t, j] > threshold]
        assert released_rows(a).tolist() == loop


@pytest.mark.parametrize("T,kept", [(12, 40), (40, 133), (80, 265), (143, 474)])
def test_released_counts_on_a_real_decoder(T, kept):
    torch.manual_seed(T)
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=4,
                      decoder_start_token_id=0)
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(encoder_outputs=BaseModelOutput(torch.randn(1, N, 16)), labels=torch.randint(2, 50, (1, T)),
                    output_attentions=True)
    assert len(select(out.cross_attentions[-1][0], "released")) == kept


def test_a_report_longer_than_the_grid_points_outside_it():
    with pytest.raises(NeuralError, match="150 tokens.*defect A3"): select(attention(150), "released")
    assert len(select(attention(150))) == 4


def test_flat_attention_falls_to_the_flat_arg_max():
    assert released_rows(np.full((3, N), 1 / N)).tolist() == [0]
    spread = np.tile(np.arange(N), (1, 1)) / np.arange(N).sum()
    assert released_rows(spread, percentile=1).tolist() == [142, 143]     # one token: squeezed, so these are patches


def test_random_k_is_fair_and_repeatable():
    rng = np.random.default_rng(0)
    counts = np.bincount(np.concatenate([random_k(20, 5, rng) for _ in range(4000)]), minlength=20)
    assert abs(counts - 1000).max() < 150
    assert random_k(N, 4, np.random.default_rng(9)).tolist() == random_k(N, 4, np.random.default_rng(9)).tolist()
    assert len(set(random_k(N, N, rng).tolist())) == N


def test_input_scores_are_left_as_they_were():
    scores = torch.rand(2, N)
    before = scores.clone()
    retain(scores, 0.1)
    assert torch.equal(scores, before)
