"""What guides the pruning must be able to find what was hidden: labels say whether, the head must learn where."""
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from neural.build import Aggregation, ahead, by_activation, close_calls, finding_places, guided, habit, named_findings, read_batch, region, settle, shard_of
from neural.finetune import stem_logits
from neural.prune import top_k
from neural.race import step_network
from neural.report import ReportReader, train_tokenizer
from neural.vlm import ReportVLM, label_loss, pack, small_config

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


TEXTS = ["There is a nodule in the right lower lobe.", "Mild pulmonary edema.", "No focal opacity. The heart is normal in size and there is no effusion.", "Nodule in the left lung. Edema is seen."]


@pytest.fixture(scope="module")
def read_plainly(taught):
    "Studies, how they are read, and their readings by the plain float32 path, the reading guide being the taught head."
    tokenizer, reader = train_tokenizer(TEXTS, 64), ReportReader()
    films = planted(128, 2)[0]
    studies = [(str(i), films[i].numpy(), TEXTS[i % 4]) for i in range(128)]
    usual = habit(taught, None, reader, [([str(i) for i in range(128)], films, [""] * 128)], Aggregation("activation"))
    settings = (Aggregation("activation"), usual, 4, 32)
    network = ReportVLM(small_config(64, 96, NAMES, width=64, d_model=64, layers=2, sharpness=4.0)).eval()
    network.encoder.load_state_dict(taught.encoder.state_dict()); network.head.load_state_dict(taught.head.state_dict())
    plain = read_batch(network, tokenizer, reader, [i for i, *_ in studies], films, TEXTS * 32, "image+report", 4, settings[0], usual, 32)
    return network, tokenizer, reader, studies, settings, plain


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
def test_one_layer_read_alone_equals_the_eager_one(read_plainly, layer):
    network, (films, labels) = read_plainly[0], (planted(3, 5)[0], torch.tensor([[5, 9, 7, 1], [4, 1, -100, -100], [1, -100, -100, -100]]))
    with torch.no_grad(): tokens = network.encode(films); whole = network.read_report(tokens, labels)[1]
    assert torch.allclose(network.attend(tokens, labels, layer), whole[layer], atol=1e-6)
    assert not torch.allclose(whole[0], whole[1], atol=1e-4)  # the layers do differ


def test_packed_float32_is_the_plain_path(read_plainly):
    network, tokenizer, reader, studies, settings, plain = read_plainly
    packed = pack(copy.deepcopy(network))
    fast = shard_of(packed, tokenizer, reader, studies, "image+report", settings)
    for a, b in zip(fast, plain):
        assert a.study_id == b.study_id and a.tokens_used == b.tokens_used and (a.patches == b.patches).all()
        assert np.abs(a.relevance - b.relevance).max() < 1e-4 * b.relevance.max() and np.abs(a.features - b.features).max() < 1e-3 and np.abs(a.looks - b.looks).max() < 1e-4
    again = shard_of(packed, tokenizer, reader, studies, "image+report", settings)
    assert all((a.relevance == b.relevance).all() and (a.features == b.features).all() for a, b in zip(fast, again))  # twice the same numbers


@pytest.mark.parametrize("guide", ["activation", "attention"])
def test_bfloat16_keeps_the_same_patches(read_plainly, guide):
    network, tokenizer, reader, studies, settings, _ = read_plainly
    settings = settings if guide == "activation" else (Aggregation(lift=False), None, 4, 32)
    plain, packed = shard_of(network, tokenizer, reader, studies, "image+report", settings), pack(copy.deepcopy(network), half=True)
    lower = shard_of(packed, tokenizer, reader, studies, "image+report", settings, precision="bfloat16")
    assert np.mean([(a.patches == b.patches).all() for a, b in zip(lower, plain)]) >= 0.99
    assert max(np.abs(a.relevance - b.relevance).max() / b.relevance.max() for a, b in zip(lower, plain)) > 1e-5  # it did compute in bfloat16
    twice = shard_of(packed, tokenizer, reader, studies, "image+report", settings, precision="bfloat16")
    assert all((a.relevance == b.relevance).all() for a, b in zip(lower, twice))


def test_without_a_second_look_at_close_calls_patches_would_differ(read_plainly):
    plain = read_plainly[-1]
    near = [b for b in plain if close_calls([b], 0.02)]
    assert 0 < len(near) < len(plain) / 2  # some calls are close, most are not
    assert len(close_calls(plain, 1.0)) >= len(near) >= len(close_calls(plain, 0.0)) == 0


def test_what_the_blocks_of_swin_add_up_stays_in_float32():
    network, films, errors = step_network().eval(), planted(8, 3)[0], {}  # a plain Swin of two stages, as from the hub
    with torch.no_grad(): plain = network.encode(films)
    for kept in (True, False):
        packed, kinds = pack(copy.deepcopy(network), half=True), []
        if not kept:
            for part in packed.encoder.modules(): part._forward_hooks.clear()
        for stage in packed.encoder.encoder.layers:
            for block in stage.blocks: block.register_forward_hook(lambda _, __, out: kinds.append((out if torch.is_tensor(out) else out[0]).dtype))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): errors[kept] = (packed.encode(films).float() - plain).square().mean().sqrt()
        assert len(kinds) == 4 and set(kinds) == {torch.float32 if kept else torch.bfloat16}
    assert 0 < errors[True] < errors[False]


@pytest.mark.parametrize("error", [0.003, 0.03, 0.3])
def test_calls_are_read_again_until_a_lead_is_beyond_what_the_precision_moves(read_plainly, error):
    rng, plain, asked = np.random.default_rng(0), read_plainly[-1], []
    shaken = [r.relevance * np.exp(error * rng.standard_normal(144)) for r in plain]
    rough = [replace(r, relevance=x, patches=np.sort(np.argsort(-x)[:4])) for r, x in zip(plain, shaken)]
    done = settle(rough, lambda places: (asked.extend(places), [plain[n] for n in places])[1])
    wrong = lambda some: np.mean([(np.sort(a.patches) != np.sort(b.patches)).any() for a, b in zip(some, plain)])
    assert wrong(done) <= 0.01 and len(asked) == len(set(asked)) and (error > 0.003 or len(asked) < len(plain))  # where all is noise, all are read again
    assert error == 0.003 or wrong(rough) > wrong(done)  # there was something to mend
    assert all(done[n] is plain[n] for n in asked) and all(d is r for n, (d, r) in enumerate(zip(done, rough)) if n not in asked)


def test_a_film_is_looked_at_once_even_when_its_report_is_written(read_plainly, monkeypatch):
    network, tokenizer, reader, studies, settings, _ = read_plainly
    seen, encode = [], ReportVLM.encode
    monkeypatch.setattr(ReportVLM, "encode", lambda self, films: (seen.append(len(films)), encode(self, films))[1])
    shard_of(network, tokenizer, reader, studies[:5], "image-only", settings)
    assert sum(seen) == 5


def test_films_are_asked_for_before_the_network_is_busy_with_the_last():
    events = []
    for part, found in ahead([[0], [1], [2]], lambda p: (events.append(("begun", p[0])), iter(p))[1]): events.append(("read", part[0]))
    assert events == [("begun", 0), ("begun", 1), ("read", 0), ("begun", 2), ("read", 1), ("read", 2)]
