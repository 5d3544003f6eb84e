"What leaks, and what the released code did: cuts that move nothing else, and switches that do one thing each."
import json

import numpy as np
import pytest
import torch

from neural.asset import StudyAsset
from neural.audit import (PARENT, Defects, ReadyNotes, asset_without, kin_concepts, kin_of, masked, one_way, one_word,
                          overlapping, read_variants, reading_without, released_asset, released_data, sister_split,
                          spared, speaks_of, stage_overlap, target_free, without, without_negation)
from neural.build import Aggregation, Reading, read_batch
from neural.classify import predict, to_data, train_classifier
from neural.cohort import toy_study
from neural.evaluate import auc
from neural.graph import knowledge_graph, visual_graph
from neural.report import Annotation, Mention, ReportReader, evidence, labels_of, split_sections, train_tokenizer
from neural.study import LABELS, NeuralError
from neural.vlm import ReportVLM, small_config

TEXTS = [
    ("Focal consolidation in the right lower lung, suggestive of pneumonia. No left pleural effusion. Heart size is"
     " normal."),
    "No acute cardiopulmonary abnormality. Lungs are clear. No pneumothorax or pleural effusion.",
    "Mild pulmonary edema with bilateral effusions. The heart is enlarged. Possible pneumonia cannot be excluded.",
    "Left chest tube in place. Small left apical pneumothorax, decreased. Bibasilar atelectasis.",
]


@pytest.fixture(scope="module")
def reader(): return ReportReader()


@pytest.fixture(scope="module")
def notes(reader):
    phantoms = [evidence(split_sections(toy_study(f, size=48, seed=s).report))
                for f in ("Pneumonia", "Cardiomegaly", "Pneumothorax") for s in (1, 2)]
    return list(reader.pipe(TEXTS + phantoms))


@pytest.mark.parametrize("target", LABELS)
def test_without_the_target_its_label_is_unknown_and_other_mentions_stand(notes, target):
    for a in notes:
        less = without(a, speaks_of(target))
        if target != "No Finding": assert labels_of(less)[target] is None
        assert [m for m in a.mentions if m.concept not in speaks_of(target)] == list(less.mentions)
        kept = spared(a, speaks_of(target))
        expected = {
            (a.mentions[r.head], a.mentions[r.tail], r.type) for r in a.relations if r.head in kept and r.tail in kept}
        assert {(less.mentions[r.head], less.mentions[r.tail], r.type) for r in less.relations} == expected


@pytest.mark.parametrize("target", LABELS[1:])
def test_kin_masked_leaves_no_label_of_the_family(notes, target):
    for a in notes:
        said = labels_of(without(a, kin_concepts(target)))
        assert [said[l] for l in (target, *kin_of(target))] == [None] * (1 + len(kin_of(target)))


@pytest.mark.parametrize("target", ["Pneumonia", "Pleural Effusion", "No Finding"])
def test_masked_text_holds_no_word_of_the_target_and_moves_no_other(notes, reader, target):
    for a in notes:
        less = masked(a, speaks_of(target))
        assert len(less.text) == len(a.text)
        for m in a.mentions:
            if m.concept in speaks_of(target): assert not less.text[m.start:m.end].strip()
        touched = {i for m in a.mentions if m.concept in speaks_of(target) for i in range(m.start, m.end)}
        assert all(less.text[i] == a.text[i] for i in range(len(a.text)) if i not in touched)


def test_both_polarities_leak_and_both_go(reader):
    for said in ("Pneumonia.", "No pneumonia.", "Possible pneumonia."):
        a = reader(said)
        assert (
            labels_of(a)["Pneumonia"] is not None and labels_of(masked(a, speaks_of("Pneumonia")))["Pneumonia"] is None)


def test_a_denial_by_another_word_speaks_of_the_target_too(reader):
    a = reader("No airspace disease.")
    assert labels_of(a)["Edema"] == 0 and labels_of(without(a, speaks_of("Edema")))["Edema"] is None


def test_kin_is_the_hierarchy_and_nothing_else():
    assert set(PARENT) | set(PARENT.values()) <= set(LABELS)
    for a in LABELS:
        assert a not in kin_of(a)
        for b in kin_of(a): assert a in kin_of(b)
    assert "Edema" not in kin_of("Pneumonia")  # siblings are observations of their own


def test_target_free_keeps_findings_only(notes, reader):
    for a in notes:
        left = without(a, target_free(a, "Pneumonia"))
        assert all(m.concept not in kin_concepts("Pneumonia") and reader.kinds[m.concept] == "Observation"
                   and m.concept in reader.lexicon["observations"] for m in left.mentions)


@pytest.mark.parametrize("bad", ["Gout", "pneumonia", ""])
def test_an_unknown_target_is_refused(bad):
    for ask in (speaks_of, kin_concepts):
        with pytest.raises(NeuralError, match="none of the fourteen"): ask(bad)


# readings and assets

def a_reading(note, seed=0, k=6):
    "A reading with random relevance and looks; no network needed."
    rng = np.random.default_rng(seed)
    seen, kept = rng.dirichlet(np.ones(144)).astype(np.float32), np.sort(rng.choice(144, k, replace=False))
    return Reading(f"s{seed}", "image+report", (12, 12), seen, kept, rng.normal(size=(k, 8)).astype(np.float32), note,
                   rng.dirichlet(np.ones(144), len(note.mentions)).astype(np.float32).reshape(-1, 144), 5, False)


@pytest.mark.parametrize("target", ["Pneumonia", "Cardiomegaly", "No Finding", "Fracture"])
def test_cut_in_the_report_or_in_the_asset_gives_the_same_asset(notes, reader, target):
    for i, a in enumerate(notes):
        r = a_reading(a, i)
        assert asset_without(r.asset(reader.vocabulary), kin_concepts(target), reader.vocabulary) == reading_without(
            r, kin_concepts(target)).asset(reader.vocabulary)


def test_the_readers_of_masked_text_see_no_word_of_the_target(reader):
    """Two reports that differ only in what they say of the target are one report once it is masked: the same relevance,
    patches and asset."""
    texts = ["Pneumonia. Small left pleural effusion.", "No pneumonia. Small left pleural effusion."]
    notes = [masked(a, speaks_of("Pneumonia")) for a in reader.pipe(texts)]
    assert [m.concept for m in notes[0].mentions] == [m.concept for m in notes[1].mentions]
    tokenizer = train_tokenizer(texts * 5, vocab_size=80)
    torch.manual_seed(0)
    model = ReportVLM(small_config(len(tokenizer), 96, width=32, d_model=32, layers=1)).eval()
    film = torch.as_tensor(np.asarray(toy_study("Pneumonia", size=96, seed=3).image))[None]
    usual = torch.zeros(144, 14)
    read = read_variants(model, tokenizer, ["a", "b"], film.repeat(2, 1, 1, 1), {"masked": notes}, "image+report",
                         (Aggregation("activation"), usual, 4, 40))["masked"]
    assert np.array_equal(read[0].patches, read[1].patches) and np.allclose(
        read[0].relevance, read[1].relevance, atol=1e-6)
    open_ = read_variants(model, tokenizer, ["a", "b"], film.repeat(2, 1, 1, 1), {"open": list(reader.pipe(texts))},
                          "image+report", (Aggregation("activation"), usual, 4, 40))["open"]
    # unmasked, the word decides where the guide looks
    assert not np.allclose(open_[0].relevance, open_[1].relevance, atol=1e-6)


def test_ready_notes_refuse_texts_that_are_not_theirs():
    with pytest.raises(NeuralError, match="do not belong"): ReadyNotes([Annotation("a")]).pipe(["b"])


# the leak is found where it was planted, and gone where it was masked

def test_the_audit_finds_a_planted_leak_and_masking_closes_it(reader):
    def cohort(n, seed):
        rng, out, y = np.random.default_rng(seed), [], np.arange(n) % 2
        for i in range(n):
            words = ("Pneumonia. " if y[i] else "No pneumonia. ") + rng.choice(
                ["Small left pleural effusion.", "No pneumothorax.", "Bibasilar atelectasis."])
            out.append(a_reading(reader(str(words)), seed * 1000 + i, 4))
        return out, y.astype(float)
    (a, ya), (b, yb), (c, yc) = cohort(120, 1), cohort(60, 2), cohort(100, 3)
    score = {}
    for name, cut in (("everything", lambda r: r), ("masked", lambda r: reading_without(r, speaks_of("Pneumonia")))):
        made = [[cut(r).asset(reader.vocabulary) for r in part] for part in (a, b, c)]
        model, _ = train_classifier(
            made[0], ya, made[1], yb, "gcn", vocabulary_size=len(reader.vocabulary), hidden=32, epochs=12)
        score[name] = auc(yc, predict(model, made[2]))
    assert score["everything"] > 0.95 and abs(score["masked"] - 0.5) < 0.15


# the released graph

@pytest.mark.parametrize("name", Defects.all().names)
def test_each_switch_changes_only_what_it_says(reader, name):
    note = reader("Right pneumonia. No left pneumonia. No pleural effusion.")
    reading = a_reading(note)
    visual = visual_graph(
        [0, 0, 1, 2, 5], np.random.default_rng(1).normal(size=(5, 8)), np.full(5, 0.2), (12, 12), repeats=True)
    plain, switched = Defects(), Defects(**{name: True})
    before, after = (released_data(released_asset(reading, visual, d, reader.vocabulary), d) for d in (plain, switched))
    changed = {f for f in ("x", "place", "word", "edge_index") if not torch.equal(before[f], after[f])}
    allowed = {"rows": {"x", "place", "edge_index"}, "one_way": {"edge_index"}, "one_word": {"word"},
               "strings": {"word", "edge_index"}, "first_hub": {"edge_index"}}[name]
    assert changed <= allowed and (changed or name == "first_hub")


def test_a_released_asset_survives_the_wire(reader):
    visual = visual_graph([0, 0, 1], np.ones((3, 8)), np.full(3, 1 / 3), (12, 12), repeats=True)
    made = released_asset(a_reading(reader(TEXTS[0])), visual, Defects.all(), reader.vocabulary)
    assert StudyAsset.from_bytes(made.to_bytes()) == made and made.provenance["selection"] == "released"


def test_switches_leave_the_original_alone(reader):
    data = to_data(a_reading(reader(TEXTS[0])).asset(reader.vocabulary))
    before = {k: v.clone() for k, v in data.to_dict().items() if torch.is_tensor(v)}
    one_way(data), one_word(data)
    assert all(torch.equal(v, data[k]) for k, v in before.items())


def test_without_negation_two_opposite_reports_are_one_graph(reader):
    graphs = [knowledge_graph(reader(t), reader.vocabulary) for t in ("Pneumonia.", "No pneumonia.")]
    assert graphs[0].assertions.tolist() != graphs[1].assertions.tolist()
    merged = [without_negation(g, np.ones((len(g), 2)))[0] for g in graphs]
    assert (merged[0].concepts.tolist() == merged[1].concepts.tolist()
            and merged[0].assertions.tolist() == merged[1].assertions.tolist())


# the protocol

def test_overlapping_deals_every_study_once():
    trained, chose = [f"t{i}" for i in range(100)], [f"v{i}" for i in range(30)]
    left, judged = overlapping(trained, chose, 5)
    assert sorted(left + judged) == sorted(trained + chose) and sum(i[0] == "t" for i in judged) * 3 == len(judged)


def test_sister_split_never_mixes_patients_where_it_must_not():
    rng = np.random.default_rng(0)
    who = {f"s{i}": f"p{rng.integers(60)}" for i in range(120)}
    judged, sisters, strangers = sister_split(list(who), who, 3)
    of = lambda ids: {who[i] for i in ids}
    assert (len({who[i] for i in judged}) == len(judged) and of(sisters) <= of(judged)
            and not of(strangers) & of(judged) and len(sisters) == len(strangers))


def test_defects_and_shares_are_plain_numbers():
    shares = stage_overlap([0, 1] * 150)
    assert json.loads(json.dumps(shares)) == shares and abs(sum(shares.values()) - 1) < 1e-12
