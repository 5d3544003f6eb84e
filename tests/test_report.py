"What the report chapter cannot show: many assertion cases, odd sections, hostile files, real reports, phantoms."
import copy, csv, gzip, json, random, subprocess, sys, time
from pathlib import Path

import pytest

from neural.report import (Annotation, ReportReader, evidence, expand_braces, labels_of, load_lexicon, openi_scores,
                           pattern_scores, ruler_patterns, split_sections, swap_laterality, train_tokenizer)
from neural.study import LABELS, NeuralError


@pytest.fixture(scope="module")
def reader(): return ReportReader()


CASES = """
no evidence of pneumonia | pneumonia | absent
no radiographic evidence of acute pneumonia | pneumonia | absent
cannot exclude pneumonia | pneumonia | uncertain
cannot rule out a small pneumothorax | pneumothorax | uncertain
pneumonia cannot be excluded | pneumonia | uncertain
trace effusion cannot be entirely excluded | pleural effusion | uncertain
pneumonia is not excluded | pneumonia | uncertain
opacity may represent pneumonia | pneumonia | uncertain
opacity may represent pneumonia | lung opacity | present
findings are concerning for pneumonia | pneumonia | uncertain
findings suggest mild congestive heart failure | heart failure | uncertain
in the appropriate clinical setting, this could represent pneumonia | pneumonia | uncertain
consolidation consistent with pneumonia | pneumonia | present
no consolidation consistent with pneumonia | pneumonia | absent
no opacity to suggest pneumonia | pneumonia | absent
pneumonia is unlikely | pneumonia | uncertain
rule out pneumonia | pneumonia | uncertain
r/o pneumonia | pneumonia | uncertain
pneumonia has been ruled out | pneumonia | absent
questionable nodule in the right apex | lung nodule | uncertain
possible left effusion | pleural effusion | uncertain
probable atelectasis | atelectasis | uncertain
there may be a small left pleural effusion | pleural effusion | uncertain
left effusion is likely | pleural effusion | uncertain
atelectasis versus infiltrate | atelectasis | uncertain
left base opacity, atelectasis versus infiltrate | atelectasis | uncertain
opacity, less likely pneumonia | lung opacity | present
atelectasis at the bases, pneumonia cannot be excluded | atelectasis | present
the effusion has resolved | pleural effusion | absent
the right lower lobe pneumonia has cleared | pneumonia | absent
interval resolution of the pneumothorax | pneumothorax | absent
the pneumothorax has nearly completely resolved | pneumothorax | present
resolving pneumonia | pneumonia | present
pulmonary edema has improved | pulmonary edema | present
no change in the effusion | pleural effusion | present
no significant interval change in large right effusion | pleural effusion | present
the effusion is not significantly changed | pleural effusion | present
pneumothorax has not changed | pneumothorax | present
unchanged small left pleural effusion | pleural effusion | present
no effusion, pneumothorax, or consolidation | pneumothorax | absent
no effusion, pneumothorax, or consolidation | consolidation | absent
no effusion but there is consolidation | pleural effusion | absent
no effusion but there is consolidation | consolidation | present
no effusion, and the heart is enlarged | cardiomegaly | present
no effusion and cardiomegaly is unchanged | cardiomegaly | present
no pleural effusion and there is a small apical pneumothorax | pneumothorax | present
no consolidation, effusion or pneumothorax, stable cardiomegaly | cardiomegaly | present
neither effusion nor pneumothorax is seen | pneumothorax | absent
cardiomegaly without edema | cardiomegaly | present
cardiomegaly without edema | pulmonary edema | absent
the lungs are free of focal consolidation | consolidation | absent
negative for pneumothorax | pneumothorax | absent
absence of effusion | pleural effusion | absent
pneumothorax is not seen | pneumothorax | absent
effusion, pneumothorax, or consolidation is not identified | pleural effusion | absent
effusion is not seen and cardiomegaly persists | cardiomegaly | present
cardiomegaly is stable and pneumothorax is not seen | cardiomegaly | present
the effusion is no longer present | pleural effusion | absent
there is no longer a pneumothorax | pneumothorax | absent
no XXXX of pneumothorax | pneumothorax | absent
no XXXX XXXX pleural effusion | pleural effusion | absent
no ___ pleural effusion | pleural effusion | absent
status post removal of the chest tube | chest tube | absent
the left PICC has been removed | catheter | absent
a right-sided Port-A-Cath ends in the SVC | catheter | present
normal heart size | cardiomegaly | absent
heart size is within normal limits | cardiomegaly | absent
heart size is at the upper limits of normal | cardiomegaly | absent
heart size is borderline enlarged | cardiomegaly | uncertain
borderline cardiomegaly | cardiomegaly | uncertain
heart is enlarged | cardiomegaly | present
heart size remains mildly enlarged | cardiomegaly | present
the cardiac silhouette is moderately enlarged but stable | cardiomegaly | present
the heart is not significantly enlarged | cardiomegaly | absent
the cardiomediastinal silhouette is unremarkable | enlarged cardiomediastinum | absent
mediastinum is widened | widened mediastinum | present
the lungs are clear | airspace opacity | absent
lungs are well expanded and clear without effusion | airspace opacity | absent
the lungs are not clear | airspace opacity | present
pleural spaces are clear | pleural effusion | absent
pulmonary vasculature is not engorged | pulmonary congestion | absent
bones are intact | fracture | absent
multiple old healed left rib fractures | fracture | present
note that nondisplaced fractures may not be demonstrated | fracture | uncertain
pericardial effusion | pericardial effusion | present
lung volumes are low | hypoinflation | present
no acute cardiopulmonary abnormality | acute abnormality | absent
small pleural
 effusion | pleural effusion | present
ABSENT CONSOLIDATION | consolidation | absent
""".strip()
ROWS = [tuple(part.strip("\n") for part in row.rsplit(" | ", 2))
        for row in CASES.replace("\n effusion", "\x00effusion").splitlines()]


@pytest.mark.parametrize("sentence,concept,assertion", ROWS)
def test_assertion(reader, sentence, concept, assertion):
    sentence = sentence.replace("\x00", "\n ")
    for text in (sentence, sentence[0].upper() + sentence[1:] + ".",
                 f"Lines and tubes as before. {sentence}. Recommend follow-up."):
        assert {m.assertion for m in reader(text).mentions if m.concept == concept} == {assertion}, text


def test_a_list_of_bare_effusions_is_not_pericardial(reader):
    assert [m.concept for m in reader("pericardial effusion").mentions] == ["pericardial effusion"]


def test_clear_lungs_deny_airspace_findings_only(reader):
    labels = labels_of(reader("The lungs are clear."))
    assert [k for k, v in labels.items() if v == 0.0] == ["Lung Opacity", "Edema", "Consolidation"] and labels[
        "No Finding"] == 1.0
    assert labels["Pneumonia"] is None and labels["Pleural Effusion"] is None


def test_blank_stays_unknown(reader):
    assert set(labels_of(reader("")).values()) == {None}
    assert set(labels_of(reader("Comparison is made to the prior study.")).values()) == {None}
    assert list(labels_of(reader(""))) == list(LABELS)
    # a device says nothing of the lungs
    assert labels_of(reader("The chest tube has been removed."))["No Finding"] is None


def test_relations(reader):
    a = reader("Small left apical pneumothorax. Right base opacity may represent atelectasis or pneumonia.")
    said = {(a.mentions[r.head].text, r.type, a.mentions[r.tail].text) for r in a.relations}
    assert {("Small", "modify", "pneumothorax"), ("left", "modify", "apical"),
            ("pneumothorax", "located_at", "apical"), ("Right", "modify", "base"), ("opacity", "located_at", "base"),
            ("opacity", "suggestive_of", "atelectasis"), ("opacity", "suggestive_of", "pneumonia")} == said


def test_mentions_are_inside_the_vocabulary_and_index_the_text(reader):
    text = "FINDINGS:\r\n\tThe  heart is\n enlarged.\n\n\nNo   effusion ,\tor pneumothorax.\u00a0Lungs clear."
    a = reader(text)
    assert [m.concept for m in a.mentions] == ["heart", "cardiomegaly", "pleural effusion", "pneumothorax", "lung",
                                               "airspace opacity"]
    for m in a.mentions:
        assert text[m.start:m.end] == m.text and m.concept in reader.vocabulary and reader.kinds[m.concept] == m.kind


def test_no_phrase_belongs_to_two_concepts():
    lexicon, owner = load_lexicon(), {}
    parts = {"observations": {c: e["words"] for c, e in lexicon["observations"].items()},
             "anatomy": lexicon["anatomy"], "sides": lexicon["sides"], "modifiers": lexicon["modifiers"]}
    for part in parts.values():
        for concept, words in part.items():
            for phrase in (p.lower() for w in words for p in expand_braces(w)):
                assert owner.setdefault(phrase, concept) == concept, phrase
    assert all(isinstance(p["pattern"], str) and p["pattern"] for p in ruler_patterns(lexicon))
    named = {c for part in parts.values() for c in part}
    for rule in lexicon["readings"]: assert {rule["finding"], *rule["of"], *rule["says"]} <= named, rule
    for entry in lexicon["openi"].values(): assert set(entry["concepts"]) <= named


SECTIONS = [
    (
        ("FINAL REPORT\n INDICATION:  ___ with cough, r/o pneumonia.\n\n FINDINGS:\n\n The lungs are\n clear.\n\n"
         " IMPRESSION:\n\n No pneumonia."),
        {"indication", "findings", "impression", "preamble"},
        "The lungs are clear.\n\nNo pneumonia.",
    ),
    ("IMPRESSION: Small effusion.\n Findings were conveyed as follows: by phone at noon.", {"impression"},
     "Small effusion. Findings were conveyed as follows: by phone at noon."),
    ("INDICATION: Cough. FINDINGS: Clear. IMPRESSION: Normal.", {"indication", "findings", "impression"},
     "Clear.\n\nNormal."),
    ("Comparison: None. Findings: Clear. Impression: Normal.", {"comparison", "findings", "impression"},
     "Clear.\n\nNormal."),
    ("CONCLUSION: Normal.", {"impression"}, "Normal."),
    ("IMPRESSION: wet.\n IMPRESSION: final.", {"impression"}, "final."),
    ("IMPRESSION: kept.\n IMPRESSION:\n", {"impression"}, "kept."),
    ("HISTORY: pneumonia\n CLINICAL HISTORY: effusion", {"history"}, ""),
    ("REASON FOR EXAM: pneumonia?", {"indication"}, ""),
    ("FINDINGS:\n LUNGS: Clear.\n HEART: Normal.\n LINES/TUBES: None.", {"findings"},
     "LUNGS: Clear. HEART: Normal. LINES/TUBES: None."),
    ("TECHNIQUE: PA.\n LUNGS: Clear.", {"technique", "findings"}, "Clear."),
    ("CHEST, PA AND LATERAL: The heart is normal.", {"findings"}, "The heart is normal."),
    ("INDICATION: tube check\n CHEST TUBE: still in place?", {"indication"}, ""),
    ("WET READ: pneumonia\n FINDINGS: Clear.", {"wet read", "findings"}, "Clear."),
    ("No header, pneumonia in the text.", {"preamble"}, ""),
    ("", set(), ""),
    (" \n\n ", set(), ""),
    ("FINDINGS:", set(), ""),
]


@pytest.mark.parametrize("text,names,seen", SECTIONS)
def test_sections(text, names, seen):
    sections = split_sections(text)
    assert set(sections) == names and all(sections.values())
    assert evidence(sections) == seen


def test_the_question_never_reaches_the_model():
    for header in ("INDICATION", "HISTORY", "CLINICAL HISTORY", "REASON FOR EXAM", "CLINICAL INFORMATION",
                   "REASON FOR EXAMINATION", "COMPARISON"):
        for text in (f"{header}: evaluate for pneumonia.\n FINDINGS: Clear.",
                     f"{header}: evaluate for pneumonia. FINDINGS: Clear.", f"FINDINGS: Clear.\n {header}: pneumonia"):
            assert evidence(split_sections(text)) == "Clear.", text


def test_sectioning_is_linear_in_the_text():
    begin = time.perf_counter()
    split_sections("FINDINGS: " + "A" * 150_000)
    split_sections("\n A A(" * 20_000)
    split_sections("A B C D " * 20_000)
    assert time.perf_counter() - begin < 20  # a quadratic search would take minutes
    with pytest.raises(NeuralError, match="at most"): split_sections("x" * 300_000)


def facts(a):
    return ([(m.concept, m.kind, m.assertion) for m in a.mentions],
            {(a.mentions[r.head].concept, r.type, a.mentions[r.tail].concept) for r in a.relations})


def test_radgraph_round_trip(reader):
    for text in {row[0].replace("\x00", "\n ") for row in ROWS} | {
        "Heart, hila and mediastinum are normal. 2.5-cm RUL nodule (new)."}:
        a = reader(text)
        for long in (False, True):
            data = json.loads(json.dumps(a.to_radgraph(long)))
            b = Annotation.from_radgraph(data)
            assert facts(b) == facts(a) and b.to_radgraph(long) == data, text


def test_radgraph_reads_what_others_wrote():
    data = {
        "text": "New dense retrocardiac foobar opacity . Heart size is normal .",
        "data_source": "MIMIC-CXR",
        "data_split": "train",
        "entities": {
            "1": {"tokens": "New", "label": "OBS-DP", "start_ix": 0, "end_ix": 0, "relations": [["modify", "4"]]},
            "2": {"tokens": "retrocardiac", "label": "ANAT-DP", "start_ix": 2, "end_ix": 2, "relations": []},
            "3": {"tokens": "foobar", "label": "OBS-U", "start_ix": 3, "end_ix": 3, "relations": [["modify", "4"]]},
            "4": {"tokens": "opacity", "label": "OBS-DP", "start_ix": 4, "end_ix": 4,
                  "relations": [["located_at", "2"]]},
            "5": {"tokens": "Heart", "label": "ANAT-DP", "start_ix": 6, "end_ix": 6, "relations": []},
            "6": {
                "tokens": "normal", "label": "OBS-DP", "start_ix": 9, "end_ix": 9, "relations": [["located_at", "5"]]},
        },
    }
    a = Annotation.from_radgraph(data)
    assert [(m.concept, m.assertion) for m in a.mentions] == [("new", "present"), ("retrocardiac region", "present"),
                                                              ("foobar", "uncertain"), ("lung opacity", "present"),
                                                              ("heart", "present"), ("cardiomegaly", "absent")]
    assert all(a.text[m.start:m.end] == m.text for m in a.mentions) and len(a.relations) == 4


def test_hostile_radgraph_is_refused(reader):
    good, rng = reader("Small left effusion may represent edema. Heart size is normal.").to_radgraph(), random.Random(0)
    junk = [None, -1, 10**12, True, 1.5, "x", "", [], {}, ["a"], [["modify"]], [["modify", "99"]], [["explodes", "1"]],
            [[["deep"], "1"]], "OBS-", "Observation::", "::"]
    refused = 0
    for _ in range(600):
        data = copy.deepcopy(good)
        entity = data["entities"][rng.choice(list(data["entities"]))]
        entity[rng.choice(["label", "start_ix", "end_ix", "relations"])] = rng.choice(junk)
        try:Annotation.from_radgraph(data)
        except NeuralError as error: refused += "\n" not in str(error)  # any other error fails the test
    assert refused > 400
    for data in (None, [], "text", {}, {"text": 1, "entities": {}}, {"text": "a", "entities": []},
                 {"text": "a", "entities": {"1": 3}}, {"text": "a " * 30_000, "entities": {}}):
        with pytest.raises(NeuralError): Annotation.from_radgraph(data)
    itself = copy.deepcopy(good)
    itself["entities"]["1"]["relations"] = [["modify", "1"]]
    with pytest.raises(NeuralError, match="another entity"): Annotation.from_radgraph(itself)


CORPUS = [f"{a} {b} {c}." for a in ("No", "Small", "Large left", "Resolving right", "Possible")
          for b in ("pleural effusion", "pneumothorax", "consolidation (2.5 cm)", "basilar opacity")
          for c in ("is seen", "may be present", "in the lower lobe", "has resolved")]


def test_tokenizer_offsets_and_round_trip(reader, tmp_path):
    from transformers import AutoTokenizer, T5Tokenizer
    tokenizer = train_tokenizer(CORPUS, vocab_size=200)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2) and len(
        tokenizer) <= 200
    for text in ("No pleural effusion.", "Large  left\n\nconsolidation (2.5 cm); possible \u00e9ffusion", CORPUS[7]):
        coded = tokenizer(text, return_offsets_mapping=True)
        assert coded.input_ids[-1] == 1
        seen = {i for a, b in coded.offset_mapping for i in range(a, b)}
        # every letter of the ORIGINAL text is in a token
        assert seen == {i for i, c in enumerate(text) if not c.isspace()}
        for m in reader(text).mentions: assert any(a < m.end and b > m.start for a, b in coded.offset_mapping)
    tokenizer.save_pretrained(tmp_path)
    for again in (T5Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        for text in CORPUS[:5] + ["Unheard words  \u03b1"]:
            assert again(text, return_offsets_mapping=True).data == tokenizer(text, return_offsets_mapping=True).data
        assert again.decode(again(CORPUS[3]).input_ids, skip_special_tokens=True) == CORPUS[3]


def test_tokenizer_is_the_same_in_another_process(tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps(CORPUS))
    code = (
        "import json,hashlib\nfrom neural.report import"
        f" train_tokenizer\nprint(hashlib.sha256(train_tokenizer(json.load(open({str(tmp_path / 'corpus.json')!r})),"
        " 200).backend_tokenizer.to_str().encode()).hexdigest())")
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                       env={"PATH": "", "PYTHONHASHSEED": seed, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1 and len(runs.pop().strip()) == 64


@pytest.mark.parametrize("texts", [[], [""], [None, " "]])
def test_tokenizer_refuses_nothing_to_learn_from(texts):
    with pytest.raises(NeuralError, match="no text"): train_tokenizer(texts)


@pytest.mark.parametrize(
    "text,mirrored",
    [("Left lower lobe", "Right lower lobe"), ("LEFT-SIDED effusion", "RIGHT-SIDED effusion"),
     ("RLL and LUL", "LLL and RUL"), ("rml", "lml"), ("leftward shift", "rightward shift"),
     ("levoscoliosis", "dextroscoliosis"), ("Lingula", "Right lingula"), ("right middle lobe", "left middle lobe"),
     ("R > L effusions", "L > R effusions"), ("L base", "R base"),
     ("right greater than left", "left greater than right"), ("bright", "bright"), ("r/o pneumonia", "r/o pneumonia"),
     ("L1 fracture, upright", "L1 fracture, upright"), ("L-spine", "L-spine")],
)
def test_sides_are_mirrored(text, mirrored):
    assert swap_laterality(text) == mirrored and swap_laterality(mirrored) == text


def test_implied_sides_keep_their_meaning():
    assert swap_laterality("middle lobe") == "left middle lobe" and swap_laterality("left lingula") == "right lingula"


def openi(real_data):
    with gzip.open(real_data / "openi_reports.csv.gz", "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_real_reports_are_read_well(real_data, reader):
    """Reports with an odd number, which nobody looked at while the lexicon was tuned; a little beneath what was
    measured."""
    rows = [r for r in openi(real_data) if int(r["uid"]) % 2 and "No Indexing" not in r["mesh_major"]]
    scores = {s["finding"]: s
              for s in openi_scores(list(reader.pipe(evidence(r) for r in rows)), [r["mesh_major"] for r in rows])}
    floors = {"Cardiomegaly": 0.89, "Pleural Effusion": 0.92, "Pneumothorax": 0.80, "Atelectasis": 0.91,
              "Airspace or opacity": 0.94, "Congestion or edema": 0.88, "Nodule or mass": 0.78,
              "Granuloma or calcinosis": 0.92, "Fracture": 0.80, "Emphysema or hyperinflation": 0.94,
              "Hypoinflation": 0.91, "Scar": 0.82, "Degenerative or scoliosis": 0.91, "Devices": 0.86,
              "Hiatal hernia": 0.92}
    assert not {k: round(scores[k]["f1"], 3) for k, floor in floors.items() if scores[k]["f1"] < floor}
    assert all(
        scores[k]["f1"] > 2 * scores[k]["f1_blind"] for k in ("Pneumothorax", "Pleural Effusion", "Cardiomegaly"))


def test_real_reports_round_trip_and_mirror(real_data, reader):
    texts = [evidence(r) for r in openi(real_data)[::4]]
    implied = ("lingula", "middle lobe")
    for a in reader.pipe(texts):
        assert all(
            a.text[m.start : m.end] == m.text and m.concept in reader.vocabulary for m in a.mentions
        ), "a mention does not index its text"
        data = a.to_radgraph()
        assert Annotation.from_radgraph(data).to_radgraph() == data, "RadGraph round trip differs"
        if not any(w in a.text.lower() for w in implied):
            assert swap_laterality(swap_laterality(a.text)) == a.text, "mirrored twice differs"
        else:
            assert swap_laterality(swap_laterality(swap_laterality(a.text))) == swap_laterality(
                a.text), "a mirrored text is not stable"


def test_phantom_reports_say_what_their_labels_say(phantom_cohort, reader):
    "The phantom's chexpert.csv holds what its report says: present versus not must agree."
    pytest.importorskip("neural.cohort")
    with gzip.open(phantom_cohort / "mimic-cxr-2.0.0-chexpert.csv.gz", "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    agree = total = 0
    for row in rows:
        subject, study = row["subject_id"], row["study_id"]
        text = (phantom_cohort / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt").read_text()
        labels = labels_of(reader(evidence(split_sections(text))))
        for name in LABELS:
            agree += (labels[name] == 1.0) == (row[name] not in ("", None) and float(row[name]) == 1.0)
            total += 1
    assert total and agree / total >= 0.95, f"{agree} of {total} labels agree"


@pytest.mark.parametrize("text,finding,place", [
    ("Patchy consolidation is seen in the right upper lobe.", "consolidation", "right upper lobe"),
    ("Consolidation is present in the right upper lobe.", "consolidation", "right upper lobe"),
    ("An opacity is noted at the left base.", "lung opacity", "lung base"),
    ("Small effusion is seen on the left.", "pleural effusion", "left"),
    ("The right lower lobe shows an opacity.", "lung opacity", "right lower lobe")])
def test_a_verb_does_not_part_a_finding_from_its_place(reader, text, finding, place):
    a = reader(text)
    assert (finding, "located_at", place) in {
        (a.mentions[r.head].concept, r.type, a.mentions[r.tail].concept) for r in a.relations}


@pytest.mark.parametrize(
    "text,finding",
    [("Opacity is unchanged and the right lung is clear.", "lung opacity"),
     ("Effusion is small, the left base is clear.", "pleural effusion"),
     ("Small effusion is unchanged. The left lung is clear.", "pleural effusion")],
)
def test_the_place_of_the_next_clause_is_not_this_finding_s(reader, text, finding):
    a = reader(text)
    assert not [r for r in a.relations if r.type == "located_at" and a.mentions[r.head].concept == finding]


# --- sentences by pattern of assertion
def own_sentences():
    with open(Path(__file__).parent / "sentences.tsv", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_sentences_are_balanced():
    rows = own_sentences()
    patterns = {r["pattern"] for r in rows}
    assert len(rows) >= 400 and len(patterns) == 8 and len({r["sentence"] for r in rows}) == len(rows)
    assert {(r["pattern"], r["label"]) for r in rows} == {(p, label) for p in patterns for label in LABELS}
    for p in patterns: assert sum(r["pattern"] == p and r["half"] == "held" for r in rows) >= 27


def test_held_out_sentences_are_read_well(reader):
    rows = own_sentences()
    scores = pattern_scores(rows, [labels_of(a) for a in reader.pipe(r["sentence"] for r in rows)])
    assert not {k: round(v, 3) for k, v in scores.items() if k[1] == "held" and v < 0.95}


def test_a_shape_leaves_other_findings_alone(reader):
    for text, label, value in (
        ("Small effusion: no pneumothorax.", "Pleural Effusion", 1.0),
        ("Left effusion greater than right.", "Pleural Effusion", 1.0),
        ("More than one nodule is seen.", "Lung Lesion", 1.0), ("Effusion: no change.", "Pleural Effusion", 1.0),
        ("Opacity unlikely to represent consolidation.", "Lung Opacity", 1.0),
        ("Atelectasis, not pneumonia.", "Atelectasis", 1.0),
        ("Cardiomegaly: negative for edema.", "Cardiomegaly", 1.0),
        ("Good inspiratory effort.", "Pleural Effusion", None), ("No PE.", "Pleural Effusion", None)):
        assert labels_of(reader(text))[label] == value, text


@pytest.mark.parametrize(
    "text, labels",
    [
        ("Pneumothorax: N", {"Pneumothorax": 0}),
        ("PNEUMOTHORAX: Y", {"Pneumothorax": 1}),
        ("Pneumothorax:N Effusion:Y Edema:N", {"Pneumothorax": 0, "Pleural Effusion": 1, "Edema": 0}),
        ("Pneumothorax: N. Effusion: Y. The heart is enlarged.",
         {"Pneumothorax": 0, "Pleural Effusion": 1, "Cardiomegaly": 1}),
        ("Fracture - N; nodule - Y", {"Fracture": 0, "Lung Lesion": 1}),
        ("Pleural effusion (Y/N): N", {"Pleural Effusion": 0}),
        ("Pleural effusion (Y/N): Y", {"Pleural Effusion": 1}),
        ("Edema? N", {"Edema": 0}),
        ("Consolidation = [N], right base", {"Consolidation": 0}),
        ("Effusion, left: N, right: Y", {"Pleural Effusion": 1}),
        ("No pneumothorax: Y", {"Pneumothorax": 0}),
        ("Effusion: N (old blunted angle)", {"Pleural Effusion": 0}),
        ("Pneumonia (N), effusion (Y)", {"Pneumonia": 0, "Pleural Effusion": 1}),
    ],
)
def test_one_letter_answers(reader, text, labels):
    read = labels_of(reader(evidence(split_sections(f"FINDINGS: {text}"))))
    assert {k: read[k] for k in labels} == labels, text


@pytest.mark.parametrize(
    "text",
    ["Pneumothorax: N/A", "Nodule: N/Y", "Pneumothorax in N. Smith", "Vitamin N deficiency, nodule",
     "Opacity: N95 mask in view"],
)
def test_a_letter_that_is_no_answer_denies_nothing(reader, text):
    assert 0.0 not in {labels_of(reader(text))[k] for k in LABELS[1:]}, text


@pytest.mark.parametrize(
    "text, label, value",
    [
        ("No infiltrate: lungs clear.", "Lung Opacity", 0),
        ("No infiltrate: lungs are clear", "Lung Opacity", 0),
        ("no focal opacity - lungs clear", "Lung Opacity", 0),
        ("No effusion \u2013 sharp costophrenic angles.", "Pleural Effusion", 0),
        ("No fracture: bones intact", "Fracture", 0),
        ("No edema: normal vasculature", "Edema", 0),
        ("No effusion, lungs clear, heart normal", "Cardiomegaly", 0),
        ("No pneumothorax: normal heart size.", "Cardiomegaly", 0),
        ("Infiltrate: no, lungs clear.", "Lung Opacity", 0),
        ("Effusion: no. Lungs clear.", "Lung Opacity", 0),
        ("No pneumothorax: heart enlarged.", "Cardiomegaly", 1),
        ("The heart is not enlarged and lungs clear", "Lung Opacity", 0),
        # a denied 'normal' still affirms
        ("No effusion: heart not normal.", "Cardiomegaly", 1),
        ("No effusion - lungs not clear", "Lung Opacity", 1),
        ("Lungs: not clear", "Lung Opacity", 1),
        ("No evidence of normal heart", "Cardiomegaly", 1),
        ("No evidence of: enlarged heart, effusion", "Cardiomegaly", 0),
        ("Negative for: enlarged heart", "Cardiomegaly", 0),
        ("No consolidation, effusion, enlarged heart.", "Cardiomegaly", 0),
        # and a list stays one
        ("No effusion, cardiac enlargement, or nodule.", "Cardiomegaly", 0),
        ("No effusion or enlarged heart", "Cardiomegaly", 0),
        ("No effusion - cardiac enlargement", "Cardiomegaly", 0),
    ],
)
def test_a_no_ends_where_the_next_words_begin(reader, text, label, value):
    assert labels_of(reader(text))[label] == value, text


# --- headers as people write them
HEADED = ["{f}: {a}\n{i}: {b}", "{f}:\n{a}\n\n{i}:\n{b}", "{f}\n{a}\n\n{i}\n{b}", "{f} - {a}\n{i} - {b}",
          "{f} \u2013 {a}\n{i} \u2014 {b}", "**{f}:** {a}\n**{i}:** {b}", "**{f}**\n{a}\n\n**{i}**\n{b}",
          "## {f}\n{a}\n\n## {i}\n{b}", "\ufeff{f}: {a}\n{i}: {b}", "1. {f}: {a}\n2. {i}: {b}",
          "II) {f}: {a}\nIII) {i}: {b}", "{f}\n-----\n{a}\n\n{i}\n-----\n{b}", "{f}: {a} {i}: {b}",
          "{f}:\r\n{a}\r\n{i}:\r\n{b}", "[{f}] {a}\n[{i}] {b}", "<b>{f}:</b> {a}<br><b>{i}:</b> {b}"]


@pytest.mark.parametrize("dress", HEADED)
def test_headers_in_any_dress(dress):
    for f, i in (("FINDINGS", "IMPRESSION"), ("Findings", "Conclusion"), ("findings", "impression")):
        text = "INDICATION: Cough, rule out pneumonia.\n" + dress.format(
            f=f, i=i, a="The heart is enlarged.", b="Cardiomegaly.")
        text = "\ufeff" + text.replace("\ufeff", "") if "\ufeff" in text else text
        assert evidence(split_sections(text)) == "The heart is enlarged.\n\nCardiomegaly.", text


@pytest.mark.parametrize(
    "header",
    ["IMPRESSION AND FINDINGS:", "FINDINGS/IMPRESSION:", "Findings & Impression -", "RADIOGRAPHIC FINDINGS:",
     "FINAL IMPRESSION:", "IMPRESSION (FINAL):", "OPINION:", "ADDENDUM:", "Impression #2:"],
)
def test_headers_that_open_evidence(header):
    assert evidence(split_sections(f"HISTORY: pneumonia.\n{header} Small effusion.")) == "Small effusion."


@pytest.mark.parametrize(
    "text",
    ["CLINICAL IMPRESSION: pneumonia.", "HISTORY AND FINDINGS: pneumonia.",
     "INDICATION: Patient with these\nfindings: pneumonia.", "INDICATION: cough.\n\n Evaluate for pneumonia.",
     "SUMMARY: 2-ABNORMAL, PREVIOUSLY REPORTED", "END OF IMPRESSION: I have reviewed the images.",
     "Findings are unchanged.", "COMPARISON: Findings of the prior film: pneumonia."],
)
def test_what_is_no_evidence(text):
    assert evidence(split_sections(text)) == ""


def test_what_wins_when_two_headers_name_one_section():
    seen = lambda text: evidence(split_sections(text))
    assert (seen("IMPRESSION: Small effusion.\nSUMMARY: 4-POSSIBLE SIGNIFICANT ABNORMALITY, MAY NEED ACTION")
            == "Small effusion.")
    assert seen("IMPRESSION: Small effusion.\nCONCLUSION: Stable.") == "Small effusion.\n\nStable."
    assert (
        seen("IMPRESSION: Small effusion. END OF IMPRESSION: I have reviewed. SUMMARY: 1-NORMAL") == "Small effusion.")
    assert (
        seen("IMPRESSION: Effusion.\nADDENDUM:\nIMPRESSION: Small pneumothorax.") == "Effusion.\n\nSmall pneumothorax.")
    assert (seen("FINDINGS:\nPLEURAL EFFUSION: NONE\nHEART: NORMAL\nACCESSION NUMBER: 12")
            == "PLEURAL EFFUSION: NONE HEART: NORMAL")
    assert (seen("REASON FOR EXAMINATION: Edema.\n\n The film was read.\n\n The effusion is small.")
            == "The film was read.\n\nThe effusion is small.")


# --- real reports: nothing that is there gets lost, nothing is read worse than before
DEV_FLOORS = {"Cardiomegaly": 0.9326, "Pleural Effusion": 0.9285, "Pneumothorax": 0.8235, "Atelectasis": 0.9180,
              "Airspace or opacity": 0.9795, "Pneumonia": 0.8421, "Congestion or edema": 0.9166,
              "Nodule or mass": 0.8604, "Granuloma or calcinosis": 0.9606, "Fracture": 0.9122,
              "Emphysema or hyperinflation": 0.9569, "Hypoinflation": 0.9629, "Scar": 0.8135,
              "Degenerative or scoliosis": 0.9444, "Tortuous aorta": 0.8983, "Devices": 0.8571,
              "Pleural thickening": 0.6666, "Hiatal hernia": 0.9411}


def dev_reports(real_data):
    with open(real_data / "real_cxr_dev" / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["dataset"] == "openi256" and r["view"] == "frontal"]
    return [(r["report_text"], dict(x.split("=", 1) for x in r["other_labels"].split("|") if "=" in x).get("mesh", ""))
            for r in rows]


def test_real_reports_keep_their_evidence_and_their_scores(real_data, reader):
    rows = dev_reports(real_data)
    seen = [evidence(split_sections(text)) for text, _ in rows]
    assert len(rows) == 1151 and sum(not s for s in seen) == 0
    coded = [(s, mesh) for s, (_, mesh) in zip(seen, rows) if "No Indexing" not in mesh]
    scores = {
        s["finding"]: s["f1"] for s in openi_scores(list(reader.pipe(s for s, _ in coded)), [mesh for _, mesh in coded])
    }
    assert not {k: round(scores[k], 4) for k, floor in DEV_FLOORS.items() if scores[k] < floor}
