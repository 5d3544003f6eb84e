"""From cross-attention to one number per patch: real decoders, real tokenizers, and the alignments a notebook cannot
show."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from neural.relevance import (all_tokens, check_attentions, finding_tokens, lift, mean_relevance, mention_relevance,
                              mention_tokens, phantom_attention, pick_layer, relevance, with_fallback)
from neural.study import NeuralError

B, H, T, N = 3, 4, 9, 144


def mention(start, end, kind="Observation", assertion="present"):
    return SimpleNamespace(start=start, end=end, kind=kind, assertion=assertion)


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    config = T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=2, num_heads=H,
                      decoder_start_token_id=0)
    return T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def look(decoder, tokens, labels):
    with torch.no_grad():
        return decoder(encoder_outputs=BaseModelOutput(tokens), labels=labels, output_attentions=True).cross_attentions


@pytest.fixture(scope="module")
def batch(decoder):
    draw = torch.Generator().manual_seed(1)
    tokens, labels = torch.randn(B, N, 32, generator=draw), torch.randint(2, 200, (B, T), generator=draw)
    labels[1, 6:] = -100
    return tokens, labels


@pytest.mark.parametrize("layer", [0, -1, "mean"])
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_one_number_per_patch_that_sums_to_one(decoder, batch, layer, heads):
    tokens, labels = batch
    r = relevance(look(decoder, tokens, labels), all_tokens(labels), layer, heads)
    assert r.shape == (B, N) and r.dtype == torch.float32
    assert torch.allclose(r.sum(1), torch.ones(B), atol=1e-5) and (r >= 0).all()


def test_mean_is_taken_over_heads_then_the_chosen_tokens(decoder, batch):
    tokens, labels = batch
    layers, mask = look(decoder, tokens, labels), torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.5
    mask[:, 0] = True
    r = relevance(layers, mask)
    for b in range(B):
        rows = [layers[-1][b, h, t] for h in range(H) for t in range(T) if mask[b, t]]
        assert torch.allclose(r[b], torch.stack(rows).mean(0), atol=1e-6)


def test_padding_and_neighbours_change_nothing(decoder, batch):
    tokens, labels = batch
    together = relevance(look(decoder, tokens, labels), all_tokens(labels))
    alone = relevance(look(decoder, tokens[1:2], labels[1:2, :6]), all_tokens(labels[1:2, :6]))
    assert torch.allclose(together[1], alone[0], atol=1e-5)


def test_row_t_belongs_to_the_step_that_predicts_label_t(decoder, batch):
    "The masks rest on this alignment: the input of step t is label t-1, so changing label t first shows in row t+1."
    tokens, labels = batch
    other = labels.clone()
    other[0, 4] = (other[0, 4] + 7) % 190 + 2
    a, b = look(decoder, tokens, labels)[-1][0], look(decoder, tokens, other)[-1][0]
    changed = (a - b).abs().amax(dim=(0, 2)) > 1e-6
    assert not changed[:5].any() and changed[5]


def test_patches_may_be_renumbered(decoder, batch):
    tokens, labels = batch
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    straight, shuffled = (relevance(look(decoder, x, labels), all_tokens(labels)) for x in (tokens, tokens[:, order]))
    assert torch.allclose(straight[:, order], shuffled, atol=1e-5)


def test_planted_patch_wins_only_with_its_token():
    a = torch.full((1, H, T, N), 1 / N)
    a[0, :, 5] = 0
    a[0, :, 5, 100] = 1
    mask = torch.zeros(1, T, dtype=torch.bool)
    with_word, without = mask.clone(), ~mask
    with_word[0, 5], without[0, 5] = True, False
    assert relevance((a,), with_word)[0].argmax() == 100 and relevance((a,), ~mask)[0].argmax() == 100
    assert torch.allclose(relevance((a,), without)[0], torch.full((N,), 1 / N))


def test_half_precision_is_read_as_float32(decoder, batch):
    tokens, labels = batch
    layers = look(decoder, tokens, labels)
    r = relevance(tuple(a.to(torch.bfloat16) for a in layers), all_tokens(labels))
    assert r.dtype == torch.float32 and torch.allclose(r, relevance(layers, all_tokens(labels)), atol=2e-3)


def test_attentions_of_generate_are_refused(decoder, batch):
    out = decoder.generate(encoder_outputs=BaseModelOutput(batch[0]), max_new_tokens=3, use_cache=False,
                           return_dict_in_generate=True, output_attentions=True)
    with pytest.raises(NeuralError, match="generate"): check_attentions(out.cross_attentions)


def test_the_network_of_this_project_gives_what_relevance_reads():
    from neural.vlm import ReportVLM, small_config
    torch.manual_seed(0)
    model = ReportVLM(small_config(60, image_size=96, width=64, d_model=64)).eval()
    labels = torch.tensor([[5, 9, 7, 1], [8, 1, -100, -100]])
    with torch.no_grad():
        layers = model(torch.rand(2, 1, 96, 96), labels=labels, output_attentions=True).cross_attentions
    r = relevance(layers, all_tokens(labels))
    assert r.shape == (2, model.grid[0] * model.grid[1]) and torch.allclose(r.sum(1), torch.ones(2), atol=1e-5)


def test_every_phantom_mention_has_its_tokens_and_only_those():
    from neural.cohort import toy_study
    from neural.report import ReportReader, evidence, split_sections, train_tokenizer
    texts = [evidence(split_sections(toy_study(f, size=48, seed=s).report))
             for f in ("Pneumonia", "Pleural Effusion", "Edema", "") for s in range(5)]
    tokenizer, reader = train_tokenizer(texts, vocab_size=200), ReportReader()
    for text, note in zip(texts, reader.pipe(texts)):
        offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping
        for m, row in zip(note.mentions, mention_tokens(offsets, note.mentions)):
            assert row.any()
            taken = [o for o, here in zip(offsets, row) if here]
            assert all(text[i].isspace() or any(s <= i < e for s, e in taken) for i in range(m.start, m.end))
            assert all(s < m.end and e > m.start for s, e in taken)


def test_only_findings_that_may_be_there_speak():
    offsets = [(0, 5), (5, 9), (9, 15), (15, 20), (0, 0)]
    said = [mention(0, 5), mention(6, 9, assertion="uncertain"), mention(10, 15, assertion="absent"),
            mention(16, 20, kind="Anatomy")]
    assert finding_tokens(offsets, said).tolist() == [True, True, False, False, False]
    assert finding_tokens(offsets, said, kinds=("Anatomy",)).tolist() == [False, False, False, True, False]
    assert finding_tokens(offsets, said, assertions=("absent",)).tolist() == [False, False, True, False, False]


def test_fallback_is_reported_for_exactly_the_studies_that_needed_it():
    every = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    chosen = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()    # the second chose padding only
    mask, fell_back = with_fallback(chosen, every)
    assert fell_back.tolist() == [False, True, True]
    assert mask.tolist() == [[False, True, False], [True, True, False], [True, True, True]]


def test_silent_study_is_an_error_and_not_a_row_of_nan():
    a = torch.full((2, H, T, N), 1 / N)
    mask = torch.ones(2, T).bool()
    mask[1] = False
    with pytest.raises(NeuralError, match=r"studies \[1\]"): relevance((a,), mask)


def test_a_mention_cut_off_looks_nowhere_and_the_others_are_untouched():
    attention = phantom_attention(torch.zeros(N), torch.zeros(4))
    offsets = [(0, 3), (4, 7), (8, 11), (0, 0)]
    both = mention_relevance(attention, offsets, [mention(4, 11), mention(40, 44)])
    assert torch.allclose(both[0], attention[:, 1:3].mean((0, 1)), atol=1e-6) and both[1].sum() == 0


@pytest.mark.parametrize("layer", [-1, "mean"])
def test_empty_attention_names_the_cure(layer):
    with pytest.raises(NeuralError, match="eager"): pick_layer((), layer)


def test_lift_of_the_mean_itself_is_flat_and_survives_half_precision_zeros():
    mean = mean_relevance(torch.rand(50, N, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(lift(mean, mean, smooth=0), torch.full((N,), 1 / N), atol=1e-6)
    holed = mean.clone()
    holed[7] = 0
    up = lift(np.asarray(mean, dtype=np.float16), holed)
    assert torch.isfinite(up).all() and abs(up.sum() - 1) < 1e-5
