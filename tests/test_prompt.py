"""Prompts: what is said before a report must not move it, must reach the words, and must stay away where nobody asked
for it."""
import copy
import json

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor

from neural.build import prompted_looks, write_reports
from neural.finetune import Collator, StudyDataset, data_name, finetune
from neural.prompt import (PLACES, NewSentences, Prompter, add_prompts, best_threshold, check_writer, choose_thresholds,
                           own_prompts, own_states, prior_of, prompt_rows, prompt_words, prompters_of, read_prompts,
                           said_places, said_states, seen_places, teach_prompts, told_prompts)
from neural.report import ReportReader, swap_laterality, train_tokenizer
from neural.study import LABELS, NeuralError
from neural.vlm import ReportVLM, load_tokenizer, load_vlm, save_vlm, small_config
from neural.writing import sentences

NAMES = ("No Finding", "Pneumonia", "Pleural Effusion")
WORDS = ["No pneumonia. Small left pleural effusion.", "Right lower lobe pneumonia. No effusion.",
         "Lungs are clear. Heart is normal."]
READER = ReportReader()


@pytest.fixture()
def pair():
    "A tokenizer with prompts, and an untrained network that knows them."
    tokenizer = train_tokenizer(WORDS * 9, vocab_size=80)
    writer = add_prompts(tokenizer, NAMES)
    torch.manual_seed(0)
    return (
        tokenizer,
        ReportVLM(small_config(len(tokenizer), 96, labels=NAMES, width=32, d_model=32, layers=2, writer=writer)).eval())


def ids(tokenizer, *words): return torch.tensor([tokenizer.convert_tokens_to_ids(list(words))])


# alignment

@pytest.mark.parametrize("rows", [[[0, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 0, 1]], [[1], [1]]])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_both_roads_see_the_same_rows_with_prompts(pair, rows, layer):
    tokenizer, model = pair
    said = torch.tensor(rows, dtype=torch.bool)
    prompts = torch.where(said, len(tokenizer) - 3, -100)
    report = torch.tensor([[5, 9, 14, 7, 1], [8, 1, -100, -100, -100]])
    with torch.no_grad():
        tokens = model.encode(torch.rand(2, 1, 96, 96))
        logits, looks = model.read_report(tokens, report, prompts=prompts)
    assert logits.shape[:2] == report.shape and looks[layer].shape[2] == report.shape[1]
    assert torch.allclose(model.attend(tokens, report, layer, prompts), looks[layer], atol=1e-5)
    assert torch.allclose(looks[layer].sum(-1), torch.ones(()), atol=1e-4)


def test_row_t_still_predicts_token_t(pair):
    tokenizer, model = pair
    report, prompts = torch.tensor([[5, 9, 14, 7, 1]]), ids(tokenizer, "<Pneumonia: yes>", "<Pleural Effusion: no>")
    with torch.no_grad():
        tokens = model.encode(torch.rand(1, 1, 96, 96))
        before = model.read_report(tokens, report, prompts=prompts)[0]
        other = report.clone()
        other[0, 2] = 20
        after = model.read_report(tokens, other, prompts=prompts)[0]
    moved = (before - after).abs().amax(-1)[0] > 1e-5
    assert moved.tolist() == [False, False, False, True, True]             # what is written at 2 is seen from 3 on


def test_a_padded_prefix_is_the_prefix(pair):
    tokenizer, model = pair
    short = ids(tokenizer, "<Pneumonia: yes>")
    padded = torch.cat([torch.full((1, 4), -100), short], 1)
    film, report = torch.rand(1, 1, 96, 96), torch.tensor([[5, 9, 14, 1]])
    with torch.no_grad():
        tokens = model.encode(film)
        assert torch.allclose(model.read_report(tokens, report, prompts=short)[0],
                              model.read_report(tokens, report, prompts=padded)[0], atol=1e-4)
        for beams in (1, 2):
            assert torch.equal(model.write(film, 8, beams, prompts=short), model.write(film, 8, beams, prompts=padded))


def test_no_prompt_at_all_is_the_decoder_without(pair):
    tokenizer, model = pair
    none, report = torch.zeros(1, 0, dtype=torch.long), torch.tensor([[5, 9, 14, 1]])
    with torch.no_grad():
        tokens = model.encode(torch.rand(1, 1, 96, 96))
        assert torch.allclose(
            model.read_report(tokens, report, prompts=none)[0], model.read_report(tokens, report)[0], atol=1e-6)
    assert torch.allclose(model.attend(tokens, report, -1, none), model.attend(tokens, report), atol=1e-6)


def test_every_prompt_that_is_said_learns(pair):
    tokenizer, model = pair
    said = ids(tokenizer, "<Pneumonia: yes>", "<Pneumonia: left>", "<Pleural Effusion: no>")
    model.train()(torch.rand(1, 1, 96, 96), torch.tensor([[5, 9, 14, 1]]), prompts=said).text_loss.backward()
    moved = model.decoder.shared.weight.grad.abs().sum(1)
    with torch.no_grad(): model.zero_grad()
    model(torch.rand(1, 1, 96, 96), torch.tensor([[5, 9, 14, 1]])).text_loss.backward()
    without = model.decoder.shared.weight.grad.abs().sum(1)
    # as inputs they learn, beside what all words learn as outputs
    assert (moved[said[0]] > 2 * without[said[0]]).all()


# off by default

def test_a_network_without_prompts_is_as_before(tmp_path):
    torch.manual_seed(0)
    plain = ReportVLM(small_config(90, 96, width=32, d_model=32, layers=2)).eval()
    torch.manual_seed(0)
    spelt = ReportVLM(small_config(90, 96, width=32, d_model=32, layers=2, writer=None)).eval()
    films, report = torch.rand(2, 1, 96, 96), torch.tensor([[5, 9, 14, 1], [8, 1, -100, -100]])
    with torch.no_grad():
        tokens = plain.encode(films)
        from transformers.modeling_outputs import BaseModelOutput
        raw = plain.decoder(encoder_outputs=BaseModelOutput(last_hidden_state=plain.projection(tokens)),
                            decoder_input_ids=plain.decoder._shift_right(report), output_attentions=True,
                            use_cache=False)
        logits, looks = plain.read_report(tokens, report)
        assert torch.equal(logits, raw.logits) and all(torch.equal(a, b) for a, b in zip(looks, raw.cross_attentions))
        assert torch.equal(plain(films, report).loss, spelt(films, report).loss) and torch.equal(
            plain.write(films, 6), spelt.write(films, 6))
    save_vlm(plain, tmp_path / "vlm")
    assert ("writer" not in json.loads((tmp_path / "vlm/config.json").read_text())
            and load_vlm(tmp_path / "vlm").config.writer is None)
    with pytest.raises(NeuralError, match="built without prompts"):
        plain.read_report(tokens, report, prompts=torch.full((2, 1), 80))
    with pytest.raises(NeuralError, match="built without prompts"): own_prompts(plain, tokens)


def test_training_without_prompts_is_as_before(tmp_path):
    films = Films(5)
    texts, goals = [WORDS[i % 3] for i in range(8)], np.zeros((8, 3), np.float32)
    goals[::3, 1] = 1
    tokenizer = train_tokenizer(WORDS * 9, vocab_size=80)
    runs = []
    for name, extra in (("plain", {}), ("spelt", dict(prompters=None))):
        torch.manual_seed(0)
        model = ReportVLM(small_config(len(tokenizer), 96, labels=NAMES, width=32, d_model=32, layers=1))
        data = StudyDataset(films, range(8), texts, goals)
        finetune(model, tokenizer, data, data, tmp_path / name, epochs=1, batch_size=4, seed=3, **extra)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    assert "prompt_drop" not in json.loads((tmp_path / "plain/settings.json").read_text())


# words and thresholds

def test_the_initial_loss_is_that_of_the_whole_vocabulary(pair):
    tokenizer, model = pair
    assert model.decoder.config.vocab_size == len(tokenizer)
    with torch.no_grad():
        out = model(torch.rand(2, 1, 96, 96), torch.tensor([[5, 9, 14, 1]] * 2),
                    prompts=ids(tokenizer, "<Pneumonia: no>").repeat(2, 1))
    assert abs(out.text_loss.item() / np.log(len(tokenizer)) - 1) < .05


@pytest.mark.parametrize(
    "text", ["<Pneumonia: yes>", "No <Pneumonia: no> effusion.", "<Pleural Effusion: left><Pneumonia: perhaps>"])
def test_a_report_cannot_spell_a_prompt(pair, text, tmp_path):
    tokenizer, model = pair
    save_vlm(model, tmp_path / "vlm", tokenizer)
    for kept in (tokenizer, load_tokenizer(tmp_path / "vlm", model)):
        assert max(Collator(kept).ids(text)) < model.config.writer["first"]


@pytest.mark.parametrize(
    "writer",
    [{"first": -1, "count": 18}, {"first": 70, "count": 17}, {"first": "70", "count": 18},
     {"first": 70, "count": 18, "thresholds": [1]},
     {"first": 70, "count": 18, "thresholds": {"Pneumonia": [0.6, 0.4]}},
     {"first": 70, "count": 18, "thresholds": {"Pneumonia": [0.6]}},
     {"first": 70, "count": 18, "thresholds": {"Pneumonia": [0, float("nan")]}}],
)
def test_a_broken_configuration_is_refused(writer):
    with pytest.raises(NeuralError): check_writer(writer, NAMES)


def test_thresholds_come_back_with_the_network(pair, tmp_path):
    tokenizer, model = pair
    rng = np.random.default_rng(0)
    y = (rng.random((80, 3)) < .3).astype(float)
    p = 1 / (1 + np.exp(-(y * 2 - 1 + rng.normal(size=y.shape))))
    told = [(row.astype(np.float32), np.zeros((3, 2), np.int8)) for row in y]
    writer = teach_prompts(model, told, y, p, band=.3, sure=.8, apart=2)
    save_vlm(model, tmp_path / "vlm", tokenizer)
    again = load_vlm(tmp_path / "vlm")
    assert (again.config.writer == writer and writer["apart"] == 2 and writer["sure"] == 0.8
            and set(writer["thresholds"]) == set(NAMES[1:]))
    tokens = torch.randn(2, 144, 32)
    for a, b in zip(own_states(model, tokens), own_states(again, tokens)): assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize("positives", [0, 4, 5, 30])
def test_few_positives_fall_back_on_the_prior(positives):
    rng = np.random.default_rng(1)
    y = np.zeros((200, 2))
    y[:positives, 1] = 1
    p = np.stack([np.zeros(200), np.clip(.3 * y[:, 1] + .3 * rng.random(200), 0, 1)], 1)
    low, high = choose_thresholds(y, p, NAMES[:2], prior=np.array([np.nan, .1]))["Pneumonia"]
    said = (p[:, 1] >= high).sum()
    assert low == high and (said == 20 if positives < 5 else said == positives)


def test_the_best_threshold_is_the_best_of_all():
    rng = np.random.default_rng(2)
    f1 = lambda y, s: 2 * (y * s).sum() / max((y.sum() + s.sum()), 1)
    for _ in range(50):
        y, p = (rng.random(30) < .4).astype(float), np.round(rng.random(30), 1)
        if y.sum(): assert f1(y, p >= best_threshold(y, p)) == pytest.approx(max(f1(y, p >= t) for t in np.unique(p)))


# sides

def test_sides_are_the_patients():
    # the left edge of the picture
    film = torch.zeros(1, 144, 3)
    film[0, 12 * 8 + 1, 1] = 20.
    # is the patient's right
    assert seen_places(film, (12, 12))[0, 1].tolist() == [2, 3]
    assert seen_places(film.unflatten(1, (12, 12)).flip(2).flatten(1, 2), (12, 12))[0, 1].tolist() == [1, 3]


@pytest.mark.parametrize(
    "text",
    ["Right lower lobe pneumonia.", "Small left pleural effusion.", "Pneumonia in the left upper lobe.",
     "There is a right-sided effusion.", "Bilateral effusions."],
)
def test_mirrored_words_are_the_other_side(text):
    here, there = (said_places(READER(t), NAMES) for t in (text, swap_laterality(text)))
    assert (here[:, 0].any() and np.array_equal(np.choose(here[:, 0], [0, 2, 1, 3]), there[:, 0])
            and np.array_equal(here[:, 1], there[:, 1]))


def test_denied_findings_have_no_place(pair):
    tokenizer, _ = pair
    assert not said_places(READER("No pneumonia in the right lower lobe."), NAMES).any()
    rows = prompt_rows(np.array([[0, 0, 1.]]), np.full((1, 3, 2), 1), NAMES, check_writer(pair[1].config.writer, NAMES))
    assert tokenizer.convert_ids_to_tokens(rows[0].tolist()) == [
        "<Pneumonia: no>", "<Pleural Effusion: yes>", "<Pleural Effusion: left>", "<Pleural Effusion: upper>"]


# training

def test_unknown_is_unsaid_and_hedged_is_perhaps():
    notes = [READER(t) for t in ("Possible pneumonia.", "Possible pneumonia.", "Right pneumonia.", "Clear.")]
    told = told_prompts(np.array([[0, 1, np.nan], [0, np.nan, 0], [0, 1, 0], [1, 0, np.nan]]), notes, NAMES)
    assert [s[1] for s, _ in told] == [.5, .5, 1, 0] and np.isnan([told[0][0][2], told[3][0][2]]).all()
    assert prior_of(told)[1] == .75 and prior_of(None) is None


@pytest.mark.parametrize("flip,prior", [(.1, .1), (.3, .05), (.2, .5)])
def test_flips_come_at_the_stated_rate(pair, flip, prior):
    n = 20000
    ill = np.arange(n) < prior * n
    states = np.stack([np.full(n, np.nan), ill, np.zeros(n)], 1).astype(np.float32)
    said, _ = Prompter(NAMES, pair[1].config.writer, 0, flip, np.array([np.nan, prior, 0])).erring(
        states, np.zeros((n, 3, 2), int), torch.Generator().manual_seed(0))
    assert abs((said[ill, 1] == 0).mean() - flip) < .03 and abs((~ill)[said[:, 1] == 1].mean() - flip) < .03
    # unknown stays unknown, what never occurs is never raised
    assert np.isnan(said[:, 0]).all() and not said[:, 2].any()


def test_validate_is_told_no_lies(pair):
    tokenizer, model = pair
    said = [(np.array([np.nan, 1, 0], np.float32), np.zeros((3, 2), np.int8))] * 8
    data = StudyDataset(Films(1), range(8), [WORDS[1]] * 8, np.zeros((8, 3)), prompts=said)
    prompter = Prompter(NAMES, model.config.writer, .5, .5, prior_of(said))
    calm = Collator(tokenizer, prompter=Prompter(NAMES, model.config.writer))([data[i] for i in range(8)])["prompts"]
    wild = [Collator(tokenizer, 96, torch.Generator().manual_seed(s), prompter)([data[i] for i in range(8)])["prompts"]
            for s in (0, 0, 1)]
    assert (calm == calm[0]).all() and calm.shape == (8, 2)
    assert torch.equal(wild[0], wild[1]) and not torch.equal(wild[0], wild[2])


class Films:
    "Films that show nothing of what is planted in the prompts."
    def __init__(self, seed): self.seed = seed
    def batch(self, ids): return np.random.default_rng(self.seed).random((1, 1, 96, 96), np.float32).repeat(len(ids), 0)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A writer trained on films that are all alike: only prompts can tell the reports apart."
    texts = [
        (f"{'Right' if i % 4 < 2 else 'Left'} lower lobe pneumonia. No effusion." if i % 2
         else "Lungs are clear. No pneumonia.")
        for i in range(16)
    ]
    tokenizer = train_tokenizer(texts * 5, vocab_size=80)
    writer = add_prompts(tokenizer, NAMES)
    torch.manual_seed(0)
    model = ReportVLM(small_config(len(tokenizer), 96, labels=NAMES, width=32, d_model=64, layers=2, writer=writer))
    goals = np.array([[0, i % 2, 0] for i in range(16)], np.float32)
    told = told_prompts(goals, list(READER.pipe(texts)), NAMES)
    data = StudyDataset(Films(0), range(16), texts, goals, prompts=told)
    finetune(model, tokenizer, data, data, tmp_path_factory.mktemp("planted"), epochs=40, batch_size=8, lr=5e-3,
             prompters=prompters_of(model, told, 0.1, 0.02))
    with pytest.raises(NeuralError, match="prompts go to train and validate"):
        finetune(model, tokenizer, data, data, "nowhere", epochs=1, batch_size=8)
    return tokenizer, model, texts, told


def test_what_is_planted_in_the_prompts_is_written(planted):
    tokenizer, model, texts, told = planted
    prompts = prompt_rows(*(np.stack(x) for x in zip(*told)), NAMES, model.config.writer)
    films = torch.as_tensor(Films(0).batch(range(16)))
    written = [
        t.strip() for t in tokenizer.batch_decode(model.write(films, 30, prompts=prompts), skip_special_tokens=True)]
    # whether, and on which side
    assert written == texts


def test_the_networks_own_prompts_are_used_in_writing(planted):
    tokenizer, model, *_ = planted
    model = copy.deepcopy(model)
    films = torch.as_tensor(Films(0).batch(range(2)))
    # no thresholds, no prompts
    assert write_reports(model, tokenizer, films, 30) == write_reports(model, tokenizer, films, 30, prompted=False)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0., 4., -4.]))
    model.config.writer = {**model.config.writer,
                           "thresholds": {"Pneumonia": [0.5, 0.5], "Pleural Effusion": [0.5, 0.5]}, "apart": 1}
    raised = write_reports(model, tokenizer, films, 30)
    with torch.no_grad(): model.head.bias[1] = -4
    assert (all("pneumonia. No effusion" in t for t in raised)
            and write_reports(model, tokenizer, films, 30) == ["Lungs are clear. No pneumonia."] * 2)
    assert read_prompts(model, StudyDataset(Films(0), range(3), [""] * 3, np.zeros((3, 3))))[2][0][1] == 0
    seen = prompted_looks(
        model, films, torch.tensor([[5, 9, 1]] * 2), torch.tensor([[True, True, False]] * 2), torch.eye(2, 144))
    assert all(((0 <= v) & (v <= 1)).all() for v in seen.values()) and (seen["moved"] > 0).all()


# writing

def test_a_prompt_is_never_written(pair):
    tokenizer, model = pair
    # shout prompts
    with torch.no_grad(): model.decoder.shared.weight[model.config.writer["first"] :] *= 40
    for prompts in (None, ids(tokenizer, "<Pneumonia: yes>").repeat(3, 1)):
        for beams in (1, 2):
            assert (
                model.write(torch.rand(3, 1, 96, 96), 12, beams, prompts=prompts).max() < model.config.writer["first"])


class Parrot(LogitsProcessor):
    "Wants to say one sentence for ever."
    def __init__(self, line): self.line = line
    def __call__(self, ids, scores):
        scores[:, self.line[(ids.shape[1] - 1) % len(self.line)]] = scores.max() + 1
        return scores


@pytest.mark.parametrize("apart", [1, 2, 5])
@pytest.mark.parametrize("beams", [1, 3])
def test_no_sentence_comes_twice_within_reach(pair, apart, beams):
    tokenizer, model = pair
    parrot = Parrot(tokenizer("No pneumonia.", add_special_tokens=False).input_ids)
    films = torch.rand(2, 1, 96, 96)
    say = lambda *rules: [
        sentences(t)
        for t in tokenizer.batch_decode(model.write(films, 40, beams, rules=rules), skip_special_tokens=True)]
    assert all(s[:3] == ["no pneumonia"] * 3 for s in say(parrot))
    for said in say(parrot, NewSentences(tokenizer, apart)):
        assert len(said) > 1 and not any(a in said[max(0, i - apart) : i] for i, a in enumerate(said))


def test_the_rule_reads_text_and_not_pieces(pair):
    tokenizer, _ = pair
    code, rule = tokenizer.convert_tokens_to_ids, NewSentences(tokenizer)
    words, stop = [code(t) for t in tokenizer.tokenize("Lungs are clear")], code(".")
    forbidden = (lambda so_far: torch.isinf(rule(torch.tensor([so_far]), torch.zeros(1, len(tokenizer))))[0] .nonzero()
                 .flatten() .tolist())
    assert words[-1] in forbidden([*words, stop, *words[:-1]]) and forbidden(words) == []
    # other spaces, the same sentence
    assert words[-1] in forbidden([*words, code("▁"), stop, code("▁"), *words[:-1]])


def test_all_words_of_all_labels_differ():
    assert len(set(prompt_words())) == len(prompt_words()) == 13 * (3 + len(PLACES)) and not any(
        "No Finding" in w for w in prompt_words())
    assert said_states(np.ones((1, 14)), {n: [.5, .5] for n in LABELS}, LABELS)[0, 1:].tolist() == [1.] * 13
    assert data_name(StudyDataset(Films(0), [1], [""], np.zeros((1, 3)))) != data_name(
        StudyDataset(Films(0), [1], [""], np.zeros((1, 3)), prompts=[(np.zeros(3), np.zeros((3, 2)))]))
