"Fine-tuning with more than the two losses: what the chapter's small example cannot show."
import numpy as np
import pytest
import torch

from neural.finetune import Collator, StudyDataset, augment, draw_weights, finetune, focus_loss, moved, poses, report_ids
from neural.phantom import toy_study
from neural.radiograph import patch_coverage
from neural.report import train_tokenizer
from neural.study import LABELS, NeuralError
from neural.vlm import ReportVLM, small_config


class Films(dict):
    "Films in memory, with the one method a dataset asks for."
    asked = None
    def batch(self, ids):
        if self.asked is not None: self.asked += list(ids)
        return np.stack([self[i] for i in ids])


@pytest.fixture(scope="module")
def cohort():
    "Eight phantom studies with their marks, a tokenizer, and the tokens that should look at the marks."
    toys = {f"s{i}": toy_study("Pneumonia" if i % 4 == 0 else "Lung Lesion", size=96, seed=i) for i in range(8)}
    texts = ["right pneumonia." if i % 4 == 0 else "nodule in the left lung." for i in range(8)]
    tokenizer = train_tokenizer(texts * 5, vocab_size=80)
    targets = np.array([[t.labels[l] for l in LABELS] for t in toys.values()], np.float32)
    cover = [patch_coverage(np.max([np.asarray(m, np.float32) for m in t.masks.values()], 0)) for t in toys.values()]
    speaks = [[True] * (len(report_ids(tokenizer, t, 96)[0]) - 1) + [False] for t in texts]
    return Films({k: np.asarray(v.image, np.float32) for k, v in toys.items()}), texts, targets, tokenizer, list(zip(cover, speaks))


def small(tokenizer):
    torch.manual_seed(0)
    return ReportVLM(small_config(len(tokenizer), 96, width=64, d_model=64, layers=2))


def test_every_parameter_receives_a_gradient(cohort):
    films, texts, targets, tokenizer, focus = cohort
    model = small(tokenizer)
    batch = Collator(tokenizer)([StudyDataset(films, list(films), texts, targets, focus=focus)[i] for i in range(4)])
    marks, speaks = batch.pop("marks"), batch.pop("speaks")
    torch.nn.init.normal_(model.head.weight, std=0.02)  # an undecided head passes nothing back to the film on its first step
    out = model(**batch, output_attentions=True)
    (out.loss + focus_loss(out.cross_attentions[-1], speaks, marks)).backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert [n for n in silent if "shared" not in n and "relative_attention_bias" not in n and "key.bias" not in n] == []  # a shift of all keys leaves a softmax as it is


def test_the_focus_loss_reaches_the_words_own_looks(cohort):
    films, texts, targets, tokenizer, focus = cohort
    model = small(tokenizer)
    batch = Collator(tokenizer)([StudyDataset(films, list(films), texts, targets, focus=focus)[i] for i in range(4)])
    out = model(**{k: v for k, v in batch.items() if k not in ("marks", "speaks")}, output_attentions=True)
    focus_loss(out.cross_attentions[-1], batch["speaks"], batch["marks"]).backward()
    last = model.decoder.decoder.block[-1].layer[1].EncDecAttention
    assert last.q.weight.grad.abs().sum() > 0 and last.k.weight.grad.abs().sum() > 0
    assert model.head.weight.grad is None or not model.head.weight.grad.abs().sum() > 0  # the findings are none of its business


def test_defaults_are_the_plain_run_to_the_last_bit(cohort, tmp_path):
    films, texts, targets, tokenizer, focus = cohort
    runs = []
    for name, data, extra in (("plain", StudyDataset(films, list(films), texts, targets), {}), ("spelled out", StudyDataset(films, list(films), texts, targets, focus=None), dict(draw=None, focus_weight=0.0))):
        model = small(tokenizer)
        finetune(model, tokenizer, data, data, tmp_path / name, epochs=1, batch_size=4, seed=3, **extra)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_marks_without_weight_change_no_weight(cohort, tmp_path):
    films, texts, targets, tokenizer, focus = cohort
    runs = []
    for name, marks in (("without", None), ("with", focus)):
        model, data = small(tokenizer), StudyDataset(films, list(films), texts, targets, focus=marks)
        finetune(model, tokenizer, data, StudyDataset(films, list(films), texts, targets), tmp_path / name, epochs=1, batch_size=4, seed=3, focus_weight=0.0)
        runs.append(model.state_dict())
    assert all(torch.allclose(runs[0][k].float(), runs[1][k].float(), atol=1e-6) for k in runs[0])


def test_an_oversampled_study_is_drawn_more_often(cohort, tmp_path):
    films, texts, targets, tokenizer, _ = cohort
    weights = draw_weights(targets[:, [LABELS.index("Pneumonia")]], ["Pneumonia"], 50.0)
    assert weights.tolist() == [50.0, 1, 1, 1, 50.0, 1, 1, 1]
    seen = Films(films); seen.asked = []
    model = small(tokenizer)
    finetune(model, tokenizer, StudyDataset(seen, list(films), texts, targets), StudyDataset(films, list(films), texts, targets), tmp_path / "run", epochs=3, batch_size=4, draw=weights)
    ill = sum(i in ("s0", "s4") for i in seen.asked)
    assert len(seen.asked) == 24 and ill >= 18  # 96 % expected, 25 % without the draw


def test_film_and_mark_make_the_same_move(cohort):
    films, texts, targets, tokenizer, _ = cohort
    spot = np.zeros((1, 96, 96), np.float32); spot[0, 56:72, 24:40] = 1
    mark = torch.nn.functional.avg_pool2d(torch.as_tensor(spot)[None], 8).flatten().numpy()
    item = dict(film=spot, text="nodule.", targets=targets[0], weights=None, focus=(mark, [True] * 9))
    for seed in range(10):
        batch = Collator(tokenizer, generator=torch.Generator().manual_seed(seed))([item])
        film = torch.nn.functional.avg_pool2d(batch["pixel_values"], 8).flatten()
        assert film[batch["marks"][0] > 0.5].mean() > 0.5 and film[batch["marks"][0] == 0].mean() < 0.05


def test_a_chosen_move_spends_no_randomness_on_another():
    x = torch.rand(3, 1, 96, 96, generator=torch.Generator().manual_seed(1))
    one, two = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    assert torch.equal(augment(x, one), augment(x, two, theta=poses(3, two)))  # the same draws in the same order as ever
    assert torch.allclose(moved(x, torch.eye(2, 3).repeat(3, 1, 1)), x, atol=1e-4)  # a move that stands still


def test_refusals(cohort):
    *_, targets, _, _ = cohort
    with pytest.raises(NeuralError, match="oversample must be above 0"): draw_weights(targets, list(LABELS), -1)
    with pytest.raises(NeuralError, match="do not belong together"): focus_loss(torch.rand(2, 2, 3, 4), torch.ones(2, 4).bool(), torch.ones(2, 4))
