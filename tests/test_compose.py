"""Composed reports: nobody is identified, what was told is said and nothing else, sides stay, a hostile bank is refused
in one line."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from neural.build import Aggregation, bank_of, load_aggregation, save_aggregation, with_bank, write_reports
from neural.compose import (FILE, WHERE, WHOLE, PhraseBank, compose, compose_reports, learn_bank, load_bank,
                            own_sentence, phrases_of, read_phrase, report_states, save_bank, sayable, settled,
                            teach_bank)
from neural.prompt import place_of, promptable
from neural.report import ReportReader, labels_of, swap_laterality, train_tokenizer
from neural.study import LABELS, NeuralError
from neural.vlm import ReportVLM, load_vlm, save_vlm, small_config
from neural.writing import variety

READER = ReportReader()
SAID = ["Small {s} pleural effusion.", "A moderate {s} effusion is present.", "{S} basilar atelectasis.",
        "Possible {s} lower lobe pneumonia.", "Pneumonia in the {s} upper lobe.", "Bilateral pleural effusions.",
        "The heart is mildly enlarged.", "Cardiomegaly.", "No pneumothorax.", "No pleural effusion.",
        "There is no effusion or pneumothorax.", "The heart is normal in size.", "No focal consolidation.",
        "The lungs are clear.", "No acute disease.", "No acute cardiopulmonary abnormality.", "No pneumonia.",
        "No pulmonary edema.", "Mild pulmonary edema.", "Probable pulmonary edema.",
        "There is a rib fracture on the {s}.", "The osseous structures are intact.", "An enteric tube is in place.",
        "{S} apical pneumothorax.", "Patchy {s} opacity.", "The aorta is tortuous."]


def reports(n=600, seed=0):
    "Invented reports of invented patients, any sentences together."
    rng = np.random.default_rng(seed)
    side = lambda t: t.format(s=(w := str(rng.choice(["left", "right"]))), S=w.capitalize())
    return [" ".join(side(SAID[i]) for i in rng.choice(len(SAID), 5, replace=False)) for _ in range(n)], [
        f"p{i // 2}" for i in range(n)]


BANK = learn_bank(*reports(), READER)


def random_told(rng):
    "States and places at random, rare ones too."
    states = rng.choice([0.0, 0.5, 1.0, np.nan], len(LABELS), p=[0.6, 0.1, 0.2, 0.1])
    return states, np.stack([rng.integers(0, 4, len(LABELS)), rng.integers(0, 4, len(LABELS))], 1)


def read(text): return {n: v for n, v in labels_of(READER(text)).items() if v is not None and n != "No Finding"}


# who is in the bank

@pytest.mark.parametrize("patients, there", [(4, False), (5, True), (9, True)])
def test_a_sentence_needs_five_patients(patients, there):
    texts = ["No pneumothorax. Small left pleural effusion."] * patients
    assert bool(learn_bank(texts, [f"p{i}" for i in range(patients)], READER).phrases) is there


def test_five_reports_of_one_patient_are_one():
    texts, whose = ["Large right pneumothorax."] * 40 + ["No effusion."] * 5, ["a"] * 20 + ["b"] * 20 + list("abcde")
    assert {p.text for p in learn_bank(texts, whose, READER).phrases} == {"No effusion."}


def test_case_and_spaces_are_folded():
    texts = ["No  pneumothorax.", "no pneumothorax", "NO PNEUMOTHORAX.", "1. No pneumothorax.", "No\npneumothorax."]
    assert [(p.text, p.count) for p in learn_bank(texts, list("abcde"), READER).phrases] == [("No pneumothorax.", 5)]


@pytest.mark.parametrize(
    "odd",
    ["Pneumothorax of 3 cm", "Effusion in Smith", "Pneumonia, per Dr Who", "Effusion since the prior film",
     "Effusion, unchanged", "Effusion in ___", "This patient has pneumonia", "Pneumonia was discussed by telephone",
     "PA film, no effusion", "Pneumonia on May tenth", "Effusion (Example)"],
)
def test_what_could_tell_of_a_person_or_of_another_film_is_refused(odd):
    assert not sayable(odd)
    assert learn_bank([odd + "."] * 9, list("abcdefghi"), READER).phrases == ()


def test_no_sentence_says_what_the_head_was_not_asked():
    assert {"The aorta is tortuous.", "The abdomen is unremarkable."} & {p.text for p in BANK.phrases} == set()
    assert (all(p.count >= 5 and read_phrase(READER(p.text)).says == p.says for p in BANK.phrases)
            and len(BANK.phrases) > 25)


# what is told is said

@pytest.mark.parametrize("bank", [BANK, PhraseBank(LABELS, (), BANK.usual), replace(BANK, usual=tuple(LABELS[1:]))],
                         ids=["learnt", "empty", "denies all"])
def test_a_composed_report_read_again_says_what_it_was_told_and_nothing_else(bank):
    rng = np.random.default_rng(1)
    for _ in range(150):
        states, places = random_told(rng)
        text, told = compose(states, places, bank), settled(states, LABELS)
        said = read(text)
        assert {n: {1.0: 1, 0.5: -1}[v] for n, v in told.items() if v} == {n: v for n, v in said.items() if v}, text
        denied = {n for n, v in said.items() if v == 0}
        assert (
            denied <= {n for n, v in told.items() if v == 0} and {n for n in bank.usual if told.get(n) == 0} <= denied
        ), text
        assert variety([text])["repeats"] == 0 and len(phrases_of(text)) == len(
            {p.casefold() for p in phrases_of(text)})
        assert compose(states, places, bank) == text


def test_nothing_acute_is_only_said_of_films_without_a_finding():
    general = {p.text for p in BANK.phrases if not p.says}
    assert general
    for j in promptable(LABELS):
        for value in (0.5, 1.0):
            states = np.zeros(len(LABELS))
            states[j] = value
            said = any(g in compose(states, None, BANK) for g in general)
            assert said is (LABELS[j] == "Support Devices"), compose(states, None, BANK)
    assert (any(compose(np.zeros(len(LABELS)), None, BANK).endswith(g) for g in general)
            and labels_of(READER(compose(np.zeros(len(LABELS)), None, BANK)))["No Finding"] == 1)


def test_a_wider_finding_is_not_denied_beside_a_narrower_one():
    for narrow in ("Pneumonia", "Atelectasis", "Edema", "Lung Lesion", "Consolidation"):
        states = np.zeros(len(LABELS))
        states[LABELS.index(narrow)] = 1
        said = read(compose(states, None, BANK))
        assert "Lung Opacity" not in said and said[narrow] == 1


def test_devices_are_not_guessed():
    states = np.zeros(len(LABELS))
    states[LABELS.index("Support Devices")] = 1
    assert "enteric" not in compose(states, None, BANK) and "A support device is in place." in compose(
        states, None, BANK)


# sides

def test_sides_are_never_swapped_and_never_invented():
    rng = np.random.default_rng(2)
    for _ in range(150):
        states, places = random_told(rng)
        raised = [j for j in promptable(LABELS) if states[j] > 0]
        allowed = (set().union(*({0: set(), 1: {1}, 2: {2}, 3: {1, 2}}[int(places[j, 0])] for j in raised)) if raised
                   else set())
        told = set().union(
            *(place_of(m.concept)[0] for m in READER(compose(states, places, BANK)).mentions if m.kind == "Anatomy"))
        assert told <= allowed, compose(states, places, BANK)
        assert not any(
            w in compose(states, None, BANK).casefold() for w in ("left", "right", "bilateral", "both sides"))


@pytest.mark.parametrize("finding", ["Pneumonia", "Pleural Effusion", "Atelectasis", "Pneumothorax", "Fracture"])
def test_the_other_side_gives_the_mirrored_side(finding):
    states = np.zeros(len(LABELS))
    j = LABELS.index(finding)
    states[j] = 1
    for side, word, other in ((1, "left", "right"), (2, "right", "left")):
        places = np.zeros((len(LABELS), 2), int)
        places[j, 0] = side
        text = compose(states, places, BANK).casefold()
        assert word in text and other not in text


def test_every_plain_sentence_is_read_as_it_is_meant():
    for n in LABELS[1:]:
        for state, value in ((1, 1), (0.5, -1), (0, 0)):
            for sides in WHERE if state else ((),):
                text = own_sentence(n, state, sides)
                assert read(text) == {n: value}, text
                assert n in WHOLE or not state or read(swap_laterality(text)) == {n: value}


# thresholds

def test_low_and_high_thresholds_part_perhaps_from_yes():
    rng = np.random.default_rng(3)
    goal = rng.integers(0, 3, (90, 14)) / 2
    taught = teach_bank(BANK, goal, 0.1 + 0.4 * goal)
    assert (
        all(0.1 < low < 0.3 < high < 0.5 for low, high in taught.thresholds.values()) and len(taught.thresholds) == 13)
    assert (
        report_states([READER("Pneumonia. Possible effusion. No edema.")])[0][
            [LABELS.index(n) for n in ("Pneumonia", "Pleural Effusion", "Edema")]]
        == [1, 0.5, 0]
    ).all()


# in a network's folder

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A small network with its bank."
    home = tmp_path_factory.mktemp("bank") / "vlm"
    tokenizer = train_tokenizer(reports(60)[0], vocab_size=128)
    torch.manual_seed(0)
    model = ReportVLM(small_config(len(tokenizer), 96, LABELS, width=32, d_model=32, depth=0, stem="levels")).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    save_vlm(model, home, tokenizer)
    save_bank(replace(BANK, thresholds={n: [0.4, 0.6] for n in LABELS[1:]}), home)
    return home


def test_the_bank_comes_back_and_writes_the_same(folder):
    bank = load_bank(folder, READER)
    assert bank == replace(BANK, thresholds={n: [0.4, 0.6] for n in LABELS[1:]})
    model = with_bank(load_vlm(folder), folder, READER, how := Aggregation(writer="compose"))
    films = torch.rand(3, 1, 96, 96)
    with torch.no_grad():
        assert write_reports(model, None, films, bank=bank_of(model, how)) == compose_reports(
            model, model.encode(films), bank)


def test_the_writer_is_kept_with_the_network_and_old_ones_mean_the_decoder(folder):
    save_aggregation(folder, Aggregation(lift=False, writer="compose"), None, 4, 40)
    assert load_aggregation(folder)[0].writer == "compose"
    about = json.loads((folder / "relevance.json").read_text())
    del about["writer"]
    (folder / "relevance.json").write_text(json.dumps(about))
    assert load_aggregation(folder)[0].writer == "decoder"


def spoil(about, name):
    "One way of spoiling a bank."
    first = about["phrases"][0]
    match name:
        case "text": return "[" * 100_000
        case "list": return "[]"
        case "no phrases": del about["phrases"]
        case "version": about["version"] = 2
        case "few patients": about["patients"] = 2
        case "count": first["count"] = 4
        case "typical": first["typical"] = -1
        case "count is text": first["count"] = "9"
        case "name": first["text"] = "Small left pleural effusion of Example."
        case "date": first["text"] = "No effusion in 1999."
        case "lie": first["says"] = {"Pneumonia": 1.0}
        case "swapped": about["phrases"] = [{**p, "text": swap_laterality(p["text"])} for p in about["phrases"]]
        case "foreign finding": first["says"] = {"Gout": 1.0}
        case "threshold": about["thresholds"] = {"Pneumonia": [0.9, 0.1]}
        case "not a number": about["thresholds"] = {"Pneumonia": [float("nan"), 1]}
        case "endless": about["sure"] = float("inf")
        case "many": about["phrases"] = [first] * 3001
        case "large": about["more"] = "x" * 2_000_001
        case "network": about["network"] = "0" * 16
        case "network is a list": about["network"] = []
        case "usual": about["usual"] = [{}]
        case "true": about["sure"] = True
        case "says": first["says"] = "Pneumonia"
    return json.dumps(about)


@pytest.mark.parametrize(
    "name",
    ["text", "list", "no phrases", "version", "few patients", "count", "typical", "count is text", "name", "date",
     "lie", "swapped", "foreign finding", "threshold", "not a number", "endless", "many", "large", "network",
     "network is a list", "usual", "true", "says"],
)
def test_a_hostile_bank_is_refused_in_one_line(folder, name):
    path, good = folder / FILE, (folder / FILE).read_text()
    try:
        path.write_text(spoil(json.loads(good), name))
        with pytest.raises(NeuralError) as told: load_bank(folder, READER)
        assert FILE in str(told.value) and "\n" not in str(told.value) and len(str(told.value)) < 300
    finally:
        path.write_text(good)


def test_a_network_without_a_bank_says_so(folder, tmp_path):
    with pytest.raises(NeuralError, match="has no phrases.json"):
        with_bank(load_vlm(folder), tmp_path, READER, Aggregation(writer="compose"))
    assert with_bank(load_vlm(folder), tmp_path, READER, Aggregation()).phrases is None
