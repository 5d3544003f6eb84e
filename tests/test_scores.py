"""Scorers: found by name, computed from what they ask for, kept beside a network, and as they were before they had
names."""
import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from neural.build import habit, read, read_batch
from neural.cohort import toy_study
from neural.finetune import pad_rows, report_ids
from neural.prune import Budget, keep, top_k
from neural.relevance import lift, phantom_attention, relevance
from neural.report import ReportReader, evidence, split_sections, train_tokenizer
from neural.scores import (GUIDED, MIXTURES, OF_STUDY, OF_TRAINING, Aggregation, Baseline, Batch, Evidence, Network,
                           Scoring, as_scoring, finding_places, gather, guided, load_scoring, look, made_ready, measure,
                           register_scorer, save_aggregation, save_scoring, score, scored_by, scorer, scorers,
                           wanted_findings, word_mask)
from neural.study import NeuralError
from neural.vlm import ReportVLM, pack, small_config

FINDINGS = ("Pneumonia", "", "Pleural Effusion", "Cardiomegaly")


@pytest.fixture(scope="module")
def reading():
    """A network that has learnt nothing and has opinions all the same, four toy studies, and everything measured on
    them."""
    toys = [toy_study(f, size=96, seed=i) for i, f in enumerate(FINDINGS)]
    sections = [split_sections(t.report) for t in toys]
    texts = [evidence(s) for s in sections]
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts * 5, vocab_size=120)
    model = ReportVLM(small_config(len(tokenizer), 96, width=64, d_model=64, layers=2, sharpness=4.0)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    films = torch.stack([torch.as_tensor(np.asarray(t.image)) for t in toys])
    network, batch = Network(model, tokenizer, ReportReader()), Batch(
        [f"s{i}" for i in range(4)], films, texts, sections)
    found = gather(network, batch)
    return replace(network, scoring=Scoring(baseline=measure(model, [found]))), batch, found


# as they were before they had names

def by_the_fields(network, batch, how, mean):
    "What the pruning stage's fields meant before there were scorers, written out."
    model, pairs = network.model, [report_ids(network.tokenizer, t, 96) for t in batch.texts]
    labels, notes = pad_rows([p[0] for p in pairs], -100), list(network.reader.pipe(batch.texts))
    with torch.no_grad():
        tokens, layers = look(model, batch.films, labels, how.layer)
        if how.guide == "activation":
            wanted = wanted_findings(model, tokens, notes)[0]
            where = finding_places(notes, list(model.config.label_names), model.grid) if how.places else None
            return guided(model.find(tokens), mean, wanted, model.config.sharpness, where)
    seen = relevance(layers, word_mask(labels, [p[1] for p in pairs], notes, how.tokens)[0], "mean", how.heads)
    return lift(seen, mean) if how.lift else seen


ATTENTION = [Aggregation("attention", t, h, n, u)
             for t, h, n, u in product(("all", "finding"), ("mean", "max"), (-1, 0, "mean"), (True, False))]
ACTIVATION = [Aggregation("activation", t, places=p) for t in ("all", "finding") for p in (True, False)]


@pytest.mark.parametrize("how", ATTENTION + ACTIVATION, ids=lambda how: "-".join(map(str, vars(how).values())))
def test_the_fields_of_the_pruning_stage_mean_what_they_meant(reading, how):
    network, batch, _ = reading
    three = [(batch.ids, batch.films, batch.texts)]
    mean = (habit(network.model, network.tokenizer, network.reader, three, how, 96)
            if how.lift or how.guide == "activation" else None)
    wanted = by_the_fields(network, batch, how, mean)
    for track in ("image+report", "image-only"):
        said = read_batch(network.model, network.tokenizer, network.reader, *three[0], track, 4, how, mean, 96)
        assert all(torch.equal(torch.as_tensor(r.relevance), w) for r, w in zip(said, wanted))
        assert all(r.patches.tolist() == top_k(w, 4).tolist() for r, w in zip(said, wanted))
    named = scored_by(
        replace(as_scoring((how, mean, 4, 96)), how=replace(how, guide="attention", tokens="finding")), how.score)
    again = read(replace(network, scoring=named), batch, "image+report")
    # asked for by name: the same bits
    assert all(np.array_equal(a.relevance, b.relevance) for a, b in zip(said, again))


def test_every_aggregation_has_one_name():
    names = {how.score for how in ATTENTION + ACTIVATION}
    assert names == set(GUIDED) <= set(scorers())


OLD = {"guide": "attention", "tokens": "finding", "heads": "max", "layer": -1, "lift": True, "k": 3, "max_tokens": 50}


def test_a_file_of_an_earlier_version_reads_as_it_did(reading, tmp_path):
    network, batch, _ = reading
    how = Aggregation(heads="max")
    mean = habit(network.model, network.tokenizer, network.reader, [(batch.ids, batch.films, batch.texts)], how, 50)
    # no places, no writer, no network
    (tmp_path / "relevance.json").write_text(json.dumps(OLD | {"mean": mean.tolist()}))
    scoring = load_scoring(tmp_path)
    assert (scoring.how, scoring.k, scoring.max_tokens, scoring.score) == (how, 3, 50, "finding words, lifted")
    plain = read_batch(network.model, network.tokenizer, network.reader, batch.ids, batch.films, batch.texts,
                       "image+report", 3, how, mean, 50)
    for a, b in zip(read(replace(network, scoring=scoring), batch, "image+report"), plain):
        assert np.array_equal(a.relevance, b.relevance) and np.array_equal(a.patches, b.patches)


# what they need

WITHOUT = {"report": dict(classes={}), "attention": dict(cross=()), "layers": dict(words=()),
           "gradient": dict(slope=None), "head": dict(seen=None), "brightness": dict(bright=None), "id": dict(ids=[])}


@pytest.mark.parametrize("name", scorers())
def test_a_scorer_reads_what_it_asks_for_and_nothing_else(reading, name):
    network, batch, found = reading
    mine, state = scorer(name), made_ready(scored_by(network.scoring, name), network.model)
    asked = [n for n in mine.needs if n in OF_STUDY]
    least = gather(replace(network, scoring=state), batch, asked)
    spared = set(OF_STUDY) - set(asked) - {"id", "report", "attention"} - ({"layers"} if "gradient" in asked else set())
    assert not [need for need in spared if least.has(need)]  # a gradient passes through all layers
    assert torch.allclose(mine(least, state), mine(found, state), atol=1e-5)
    for need in mine.needs:
        poorer = ((found, replace(state, baseline=Baseline())) if need in OF_TRAINING
                  else (replace(found, **WITHOUT[need]), state))
        with pytest.raises(NeuralError, match="and was not given it"): mine(*poorer)


WITNESSES = {"attention": {"attention", "layers", "gradient"}, "head": {"head"}, "brightness": {"brightness"},
             "anatomy": {"anatomy"}}


def planted(where, hot=67):
    "Evidence and baseline in which one witness alone knows the hot patch."
    speaks, flat, alike = (torch.tensor([True] * 5 + [False] * 3), torch.full((144,), 1 / 144),
                           torch.full((1, 4, 8, 144), 1 / 144))
    cover = torch.zeros(144)
    cover[hot] = 1
    gaze = phantom_attention(cover, speaks, pull=9.0)[None] if where == "attention" else alike
    seen, wanted, bright, places = (torch.zeros(1, 144, 14), torch.zeros(1, 14), torch.full((1, 144), 0.4),
                                    flat[:, None].repeat(1, 14))
    wanted[0, 7] = 1
    if where == "head": seen[0, hot, 7], seen[0, hot, 0] = 3.0, -3.0
    if where == "brightness": bright[0, hot] = 0.95
    if where == "anatomy": places[hot] = 0.3
    mask = lambda *on: torch.tensor([[i in on for i in range(8)]])
    classes = dict(all=mask(*range(8)), finding=mask(*range(5)), denied=mask(5, 6), findings=mask(0, 1, 2),
                   impression=mask(3, 4, 5))
    slope = speaks[None, None, :, None] * gaze
    e = Evidence((gaze, gaze), (torch.eye(8).expand(1, 4, 8, 8),) * 2, slope, classes, seen, wanted,
                 torch.ones(1, 144, 14).bool(), bright, ["s1"])
    names = ["No Finding", *(f"finding {i}" for i in range(1, 14))]
    usual = Baseline(dict(all=flat, finding=flat), torch.zeros(144, 14), torch.full((144,), 0.4),
                     torch.full((144,), 0.1), places / places.sum(0), names)
    return e, Scoring(baseline=usual)


def sees(name, where):
    "Whether a scorer asks the one witness that knows."
    # that one asks it for names alone
    return bool(WITNESSES[where] & set(scorer(name).needs)) and not (where == "head" and name == "anatomy of findings")


@pytest.mark.parametrize("where", WITNESSES)
def test_a_planted_patch_is_kept_by_every_scorer_that_can_see_it(where):
    e, state = planted(where)
    kept = {n: keep(scorer(n)(e, state), Budget(count=1)).item() == 67 for n in scorers()}
    assert {n for n, is_hot in kept.items() if is_hot} == {n for n in scorers() if sees(n, where)}


def test_the_centre_prior_follows_training_reports_alone():
    e, state = planted("attention")
    there = torch.full((144,), 0.001)
    there[5] = 1
    usual = replace(state.baseline, looks={"all": there / there.sum()})
    assert scorer("centre prior")(e, replace(state, baseline=usual)).argmax() == 5


# named by others

@pytest.fixture
def distant():
    "A scorer of another module: the patch farthest from the middle."
    @register_scorer("farthest", "distance from the middle of the film", (), "control")
    def far(e, s):
        side = int(e.shape[1] ** 0.5)
        y, x = np.mgrid[:side, :side] - (side - 1) / 2
        away = torch.as_tensor(np.hypot(y, x).flatten() ** 8, dtype=torch.float32)
        return (away / away.sum()).expand(e.shape[0], -1)
    yield "farthest"
    from neural.scores import _REGISTRY
    del _REGISTRY["farthest"]


def test_a_scorer_of_another_module_is_read_like_any_other(reading, distant):
    network, batch, _ = reading
    named = replace(network, scoring=scored_by(network.scoring, distant))
    assert [r.patches.tolist() for r in read(named, batch, "image+report")] == [[0, 11, 132, 143]] * 4
    assert keep(score(named, batch), Budget(count=4)).tolist() == [[0, 11, 132, 143]] * 4


@pytest.mark.parametrize(
    "wrong, said",
    [(torch.ones(4, 144), "does not sum to 1"), (torch.full((4, 144), float("nan")), "holds NaN"),
     (torch.ones(144), "one number per patch")],
)
def test_a_map_that_is_no_relevance_is_refused(reading, wrong, said):
    network, batch, found = reading
    bad = replace(scorer("all words"), name="bad", read=lambda e, s: wrong)
    with pytest.raises(NeuralError, match=said): bad(found, network.scoring)


# the saved state

def test_the_state_comes_back_to_the_last_bit(reading, tmp_path):
    network, batch, found = reading
    shares = {n: s for n, s in zip(MIXTURES, (0.1, 0.25, 0.75, 0.9, 0.4))}
    state = replace(network.scoring, how=Aggregation(heads="max", layer=0, writer="compose"), k=7, max_tokens=33,
                    shares=shares, seed=5)
    save_scoring(tmp_path, state)
    for name in scorers():
        back, mine = load_scoring(tmp_path, name), scored_by(state, name)
        assert (back.how, back.k, back.max_tokens, back.shares, back.seed, back.score) == (
            mine.how, 7, 33, shares, 5, name)
        assert torch.equal(scorer(name)(found, back), scorer(name)(found, mine)), name
    assert load_scoring(tmp_path).score == "finding words, lifted"  # no run's choice is there: its own


def test_the_runs_own_choice_is_read_unless_a_scorer_is_named(reading, tmp_path):
    network, *_ = reading
    save_scoring(tmp_path, replace(network.scoring, k=9, max_tokens=11))
    save_aggregation(tmp_path, Aggregation("activation", writer="compose"), torch.zeros(144, 14), 5, 60)
    own, other = load_scoring(tmp_path), load_scoring(tmp_path, "finding words, lifted")
    assert own.score == "activation, placed" and torch.equal(own.mean, torch.zeros(144, 14)) and not own.named
    assert (other.k, other.max_tokens, other.how.writer) == (5, 60, "compose") and torch.equal(
        other.mean, network.scoring.baseline.looks["finding"])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "maps": "0"}', '{"version": 1, "maps": null}'])
def test_a_damaged_state_is_one_line(reading, tmp_path, text):
    save_scoring(tmp_path, reading[0].scoring)
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(NeuralError) as e: load_scoring(tmp_path, "random")
    assert "\n" not in str(e.value)
    (tmp_path / "scores.safetensors").unlink()
    with pytest.raises(NeuralError): load_scoring(tmp_path, "random")


def test_a_state_of_another_network_is_refused(reading, tmp_path):
    network, *_ = reading
    network.model.save_pretrained(tmp_path)
    save_scoring(tmp_path, network.scoring)
    assert load_scoring(tmp_path, "activation").baseline.has("usual head")
    torch.manual_seed(9)
    ReportVLM(small_config(120, 96, width=64, d_model=64, layers=1)).save_pretrained(tmp_path)
    with pytest.raises(NeuralError, match="was chosen for network [0-9a-f]{16}, and .* holds network [0-9a-f]{16}"):
        load_scoring(tmp_path, "activation")


def test_a_baseline_of_another_grid_or_head_is_refused(reading):
    network, batch, _ = reading
    other = replace(network.scoring, baseline=replace(network.scoring.baseline, seen=torch.zeros(16, 14)))
    with pytest.raises(NeuralError, match="does not fit the 144 patches"):
        score(replace(network, scoring=scored_by(other, "activation")), batch)


def test_gradients_need_a_network_as_it_was_trained(reading):
    import copy
    network, batch, _ = reading
    packed = replace(
        network, model=pack(copy.deepcopy(network.model)), scoring=scored_by(network.scoring, "times gradient"))
    with pytest.raises(NeuralError, match="without pack"): score(packed, batch)
