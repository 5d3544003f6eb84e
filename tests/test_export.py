"""The asset in other people's tools: random assets there and back, descriptions that lie or leak, cards of whole, torn
and planted records."""
import dataclasses
import json
import re
import shutil
import string
from pathlib import Path

import networkx as nx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch_geometric.data import Batch

from neural.asset import AssetStore, StudyAsset, vocabulary_hash
from neural.export import (CONTEXT, CROISSANT, REQUIRED, TRIPLES, auc_rows, check_croissant, croissant, data_card,
                           file_hash, hit_rows, identifiers, model_card, refuse_identifiers, run_command, run_manifest,
                           table, to_hetero, to_networkx, to_radgraph, trained_rows, write_cards, write_croissant)
from neural.graph import ASSERTIONS, EDGE_TYPES, RELATIONS
from neural.study import LABELS, Exclusions, Manifest, NeuralError, Study, View

ROOT = Path(__file__).resolve().parents[1]
WORDS = tuple(f"{a}{b} sign" for a in "abcdefg" for b in string.ascii_lowercase[:3])
KINDS = {w: ("Anatomy", "Observation")[i % 2] for i, w in enumerate(WORDS)}
PROVENANCE = dict(model_hash="0123456789abcdef", vocabulary_hash=vocabulary_hash(WORDS), keep_ratio=0.023,
                  selection="described", fusion="grounding")
ABOUT = dict(description="Random assets.", licence="https://spdx.org/licenses/Apache-2.0.html",
             url="https://example.org/x", creator="Somebody", published="2025-01-31")


def random_asset(seed, d=5, **over):
    "Unique concept nodes, relations between different nodes, each once: what a knowledge graph can hold."
    rng = np.random.default_rng(seed)
    k, m = int(rng.integers(1, 12)), int(rng.integers(0, 9))
    pairs = rng.choice(len(WORDS) * 3, m, replace=False)
    links = np.unique(rng.integers(0, max(m, 1), (3 * m, 2)), axis=0) if m else np.zeros((0, 2), int)
    links = links[links[:, 0] != links[:, 1]]
    fields = dict(study_id=f"study{seed:05}", track="image+report", grid=(12, 12),
                  patches=np.sort(rng.choice(144, k, replace=False)), relevance=rng.random(k),
                  features=rng.normal(size=(k, d)), concepts=pairs // 3, assertions=pairs % 3,
                  relations=np.column_stack([links, rng.integers(0, 3, len(links))]), provenance=PROVENANCE)
    ties = np.argwhere(rng.random((m, k)) < .4)
    return StudyAsset(**{**fields, "grounding": ties, "weights": rng.random(len(ties)) + .1, **over})


def random_store(folder, n=9, shards=3):
    store = AssetStore.create(folder, WORDS, KINDS, dim=5, provenance=PROVENANCE)
    for part in np.array_split(np.arange(n), shards): store.append([random_asset(int(i)) for i in part])
    return store


# graphs

@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fusion", ["grounding", "betweenness", "none"])
def test_hetero_holds_the_unified_graph_edge_by_edge(seed, fusion):
    asset = random_asset(seed)
    data, g = to_hetero(asset, fusion), asset.unified(fusion)
    assert data.validate() and data.edge_types == list(TRIPLES.values())
    k, found = len(asset.patches), []
    for code, (head, name, tail) in TRIPLES.items():
        edges, weights = data[head, name, tail].edge_index, data[head, name, tail].edge_weight
        assert edges.dtype == torch.int64 and edges.shape == (2, len(weights))
        found += [(a + k * (head == "concept"), b + k * (tail == "concept"), code, w)
                  for a, b, w in zip(*edges.tolist(), weights.tolist())]
    assert sorted(found) == sorted(zip(*g.edges.tolist(), g.types.tolist(), g.weights.tolist()))
    assert (np.array_equal(data["patch"].x, asset.features) and np.array_equal(data["concept"].id, asset.concepts)
            and np.array_equal(data["concept"].assertion, asset.assertions))
    assert 0 < data["patch"].place.min() and data["patch"].place.max() < 1
    assert np.array_equal((data["patch"].place.numpy() * 12 - .5).round() @ [12, 1], asset.patches)


def test_places_on_a_grid_that_is_not_square():
    place = to_hetero(random_asset(1, grid=(4, 36)))["patch"].place
    assert np.array_equal((place.numpy() * [4, 36] - .5).round() @ [36, 1], random_asset(1).patches)


def test_a_batch_keeps_studies_apart_and_changes_nothing_of_the_asset():
    assets = [random_asset(s) for s in range(8)]
    before = [a.to_bytes() for a in assets]
    parts = [to_hetero(a) for a in assets]
    # another tool may write into its own copy
    for p in parts: p["patch"].x += 1
    batch = Batch.from_data_list(parts)
    assert [a.to_bytes() for a in assets] == before
    assert batch["concept"].num_nodes == sum(len(a.concepts) for a in assets) and batch.num_edges == sum(
        a.unified().edges.shape[1] for a in assets)
    a, b = batch["concept", "looks_at", "patch"].edge_index
    assert torch.equal(batch["concept"].batch[a], batch["patch"].batch[b])


@pytest.mark.parametrize("seed", range(10))
def test_networkx_through_graphml(seed, tmp_path):
    asset = random_asset(seed)
    g = to_networkx(asset, WORDS)
    nx.write_graphml(g, tmp_path / "g.graphml")
    again = nx.read_graphml(tmp_path / "g.graphml", node_type=int, force_multigraph=True)
    assert dict(again.nodes(data=True)) == dict(g.nodes(data=True))
    edges = lambda n: sorted((a, b, e["type"], e["weight"]) for a, b, e in n.edges(data=True))
    assert edges(again) == edges(g) and len(edges(g)) == asset.unified().edges.shape[1]
    assert all(n["label"] for _, n in g.nodes(data=True)) and g.graph["study"] == asset.study_id


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_radgraph_keeps_concepts_assertions_relations_and_no_text(seed, long):
    asset = random_asset(seed)
    found = to_radgraph(asset, WORDS, KINDS, long)
    assert found["text"] == "" and {(e["start_ix"], e["end_ix"]) for e in found["entities"].values()} <= {(-1, -1)}
    entities = list(found["entities"].values())
    assert [e["tokens"] for e in entities] == [WORDS[c] for c in asset.concepts]
    spelled = {"present": ("DP", "definitely present"), "uncertain": ("U", "uncertain"),
               "absent": ("DA", "definitely absent")}
    assert [re.split("::|-", e["label"])[1] for e in entities] == [
        spelled[ASSERTIONS[a]][long] for a in asset.assertions]
    ids = list(found["entities"])
    assert sorted((h, ids.index(j), r) for h, e in enumerate(entities) for r, j in e["relations"]) == sorted(
        (h, t, RELATIONS[r]) for h, t, r in asset.relations.tolist())
    json.dumps(found)


def test_a_foreign_vocabulary_is_refused_by_every_way_out():
    asset = next(a for a in map(random_asset, range(50)) if len(a.concepts))
    for way in (lambda v: to_networkx(asset, v), lambda v: to_radgraph(asset, v, KINDS)):
        with pytest.raises(NeuralError, match="not the vocabulary"): way(WORDS[1:])
    with pytest.raises(NeuralError, match="take the one of its store"):
        to_networkx(
            random_asset(3, concepts=[200], assertions=[0], relations=(), grounding=(), weights=(), provenance={}),
            WORDS)


# Croissant

def test_croissant_says_what_the_store_is(tmp_path):
    store = random_store(tmp_path / "store")
    card = json.loads(write_croissant(store.folder, "random-assets", **ABOUT).read_text())
    assert check_croissant(card, store.folder) == []
    assert (card["conformsTo"] == CROISSANT == "http://mlcommons.org/croissant/1.0" and card["@type"] == "sc:Dataset"
            and card["@context"] == CONTEXT)
    assert card["license"] == ABOUT["licence"] and card["creator"]["name"] == "Somebody"
    files = {f["@id"]: f for f in card["distribution"] if f["@type"] == "cr:FileObject"}
    assert set(files) == {"store.parquet", *(p.name for p in store.shards)}
    assert all(
        f["sha256"] == file_hash(store.folder / n) and f["contentSize"] == f"{(store.folder / n).stat().st_size} B"
        for n, f in files.items())
    declared = {f["@id"] for f in card["distribution"]}
    fields = card["recordSet"][0]["field"]
    assert [f["source"]["extract"]["column"] for f in fields] == pq.read_schema(store.shards[0]).names and {
        f["source"]["fileSet"]["@id"] for f in fields} <= declared
    assert card["recordSet"][0]["key"] == {"@id": "studies/study_id"} and {f["dataType"] for f in fields} <= {
        "sc:Text", "sc:Integer", "sc:Float", "sc:ImageObject"}
    text = json.dumps(card)
    assert not any(i in text for i in store.ids) and str(tmp_path) not in text
    # a word outside the context would silently become schema.org's
    used = set(re.findall(r'"([A-Za-z]\w*)":', json.dumps({k: v for k, v in card.items() if k != "@context"})))
    schema_org = {"name", "description", "license", "url", "creator", "datePublished", "version", "distribution",
                  "contentUrl", "contentSize", "encodingFormat", "sha256", "sdPublisher"}
    assert used - set(CONTEXT) <= schema_org


def test_every_gap_and_every_lie_of_a_description_is_found(tmp_path):
    store = random_store(tmp_path / "store")
    card = croissant(store, "x", **ABOUT)
    for key in REQUIRED: assert any(key in w for w in check_croissant({k: v for k, v in card.items() if k != key}))
    change = lambda f: (c := json.loads(json.dumps(card)), f(c))[0]
    for f in (lambda c: c.update(conformsTo="http://mlcommons.org/croissant/1.1"), lambda c: c["@context"].pop("sc"),
              lambda c: c["distribution"][0].update(sha256="12"),
              lambda c: c["distribution"][1].update(contentUrl="../x.parquet"),
              lambda c: c["distribution"][1].update({"@id": "store.parquet"}),
              lambda c: c["recordSet"][0]["field"][0].pop("dataType"),
              lambda c: c["recordSet"][0]["field"][2]["source"]["fileSet"].update({"@id": "gone"}),
              lambda c: c.update(datePublished="31/1/25")):
        assert check_croissant(change(f)), "a broken description passed"
    shard = store.shards[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert check_croissant(card, store.folder) == [f"{shard.name}: not there, or changed since it was described"]


def test_croissant_is_refused_when_it_names_a_study_or_lacks_a_licence(tmp_path):
    store = random_store(tmp_path / "store")
    for key in ("description", "creator", "url"):
        with pytest.raises(NeuralError, match=f"croissant: {key} holds an identifier") as caught:
            write_croissant(store.folder, "x", **{**ABOUT, key: "of study00003"})
        assert "study00003" not in str(caught.value)
    with pytest.raises(NeuralError, match="license is required"):
        write_croissant(store.folder, "x", **{**ABOUT, "licence": ""})
    assert not (store.folder / "_croissant.json").exists()


def test_a_store_lives_on_with_its_description_inside(tmp_path):
    store = random_store(tmp_path / "store")
    write_croissant(store.folder, "x", **ABOUT)
    AssetStore(store.folder).append([random_asset(77)])
    assert len(AssetStore(store.folder)) == 10 and AssetStore(store.folder).verify() == []
    assert check_croissant(json.loads((store.folder / "_croissant.json").read_text()), store.folder) == [
        "new since it was described: 1 of its shards"]
    with pytest.raises(NeuralError, match="croissant.json: is there already"):
        write_croissant(store.folder, "x", **ABOUT)
    write_croissant(store.folder, "x", force=True, **ABOUT)
    assert check_croissant(json.loads((store.folder / "_croissant.json").read_text()), store.folder) == [] and not list(
        store.folder.glob("*.part"))


# cards

SECRETS = ("s58800123", "p18800456", "files/p18800456/s58800123/film.dcm", "files/p18800456/s58800123.txt",
           "1.2.840.113619.2.5.1", "/srv/mimic/files")


def cohort():
    label = lambda i: {l: (1., 0., -1., None)[(i + j) % 4] for j, l in enumerate(LABELS)}
    plain = [
        Study(f"s5000{i:04}", f"p1000{i:04}", ("train", "validate", "test")[i % 3],
              (View(f"a/{i}.dcm", "frontal", ""),), f"a/{i}.txt", label(i))
        for i in range(11)
    ]
    return Manifest(
        [*plain, Study(SECRETS[0], SECRETS[1], "test", (View(SECRETS[2], "frontal", ""),), SECRETS[3], label(3))],
        layout="mimic-cxr", label_source="labels.csv")


@pytest.fixture
def run(tmp_path):
    "A run folder with the published records, a manifest with planted identifiers, and no weights."
    run = tmp_path / "run"
    (run / "vlm").mkdir(parents=True)
    for name in ("10_finetune", "20_prune", "30_fuse", "40_classify", "50_figures"):
        source = ROOT / "figures/records" / f"{name}.json"
        if not source.is_file(): pytest.skip("no run has been published yet")
        shutil.copy(source, run)
    (run / "vlm/config.json").write_text(
        json.dumps(
            dict(swin=dict(image_size=192, patch_size=16, embed_dim=192, depths=[2]),
                 decoder=dict(num_decoder_layers=2, d_model=192, vocab_size=612), label_names=list(LABELS))
        )
    )
    manifest = cohort()
    manifest.save(run / "manifest.csv")
    Exclusions(
        [(SECRETS[0], "no frontal radiograph", SECRETS[2]), ("s1", "no findings and no impression", SECRETS[5])]
    ).save(run / "exclusions.csv")
    return run


def leaks(text): return [s for s in SECRETS if s in text] + [p for p in identifiers(cohort()) if p in text]


def test_cards_of_a_whole_run_hold_every_number_and_no_identifier(run, tmp_path):
    model, data = (p.read_text() for p in write_cards(run))
    assert leaks(model + data) == [] and str(tmp_path) not in model + data
    record = json.loads((run / "40_classify.json").read_text())["metrics"]
    for target, variants in record["AUC on test"].items():
        for name, (value, low, high) in variants.items():
            assert (f"| AUC, {target}, {name} | {value:.3f} | {low:.3f} to {high:.3f} |  | 40_classify |"
                    f" `{run_command(run)}` |" in model)
    for target, ways in record["retained patches on test"].items():
        for way, v in ways.items(): assert f"| hit rate on test, {target}, {way} | {v['hit rate']:.3f} |" in model
    for way, v in json.loads((run / "20_prune.json").read_text())["metrics"]["validate"].items():
        assert f"| hit rate on validate, {way} | {v['hit rate']:.3f} |" in model
    assert "not a diagnostic device" in model and "not measured" not in model.split("## What it is\n")[1]
    assert ("| Edema | 3 | 3 | 3 | 3 |" in data and "| no frontal radiograph | 1 |" in data
            and "to be filled in" in data and "no patient identifiers in this card" in data)


def test_what_no_record_says_is_never_invented(run):
    for name in ("10_finetune", "20_prune", "30_fuse", "40_classify", "50_figures"): (run / f"{name}.json").unlink()
    text = model_card(run)
    assert text.count(": not measured.") == 3 and "| parameters | not recorded |" in text and "AUC," not in text
    (run / "manifest.csv").unlink()
    assert "| studies | not recorded |" in model_card(run)
    (run / "vlm/config.json").unlink()
    with pytest.raises(NeuralError, match="no network here"): model_card(run)


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "plant",
    [lambda s: ("40_classify", {"metrics": {"AUC on test": {"Edema": {f"without {s}": [0.9, 0.8, 1.0]}}}}),
     lambda s: ("40_classify", {"metrics": {"retained patches on test": {s: {"x": {"hit rate": 0.5}}}}}),
     lambda s: ("20_prune", {"metrics": {"validate": {s: {"hit rate": 0.5}}}}),
     lambda s: ("10_finetune", {"metrics": {"excluded": f"one: {s}"}})],
)
def test_planted_identifiers_stop_a_model_card(run, plant, secret):
    name, record = plant(secret)
    (run / f"{name}.json").write_text(json.dumps(record))
    with pytest.raises(NeuralError, match="model card") as caught: write_cards(run)
    assert (
        secret not in str(caught.value) and not (run / "model_card.md").exists() and not (run / "data_card.md").exists()
    )


@pytest.mark.parametrize("secret", SECRETS)
def test_planted_identifiers_stop_a_data_card(secret):
    with pytest.raises(NeuralError, match="reason of an exclusion") as caught:
        data_card(cohort(), Exclusions([("x", f"unreadable {secret}", "")]))
    assert secret not in str(caught.value)
    with pytest.raises(NeuralError, match="licence"): data_card(cohort(), licence=f"as for {secret}")


def test_a_label_source_and_a_command_lose_their_folders(run):
    side = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**side, "label_source": "/srv/mimic/files/truth/labels.csv"}))
    assert run_manifest(run).label_source == "labels.csv"
    (run / "results.json").write_text(
        json.dumps({"command": "neural run --manifest=/srv/mimic/files/m.csv --run ~/runs/p9 --preset paper"}))
    assert run_command(run) == "neural run --manifest=m.csv --run p9 --preset paper"
    assert leaks("".join(p.read_text() for p in write_cards(run))) == []


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, '"text"', "\x80"])
def test_a_torn_record_is_refused_in_one_line(run, content):
    (run / "40_classify.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(NeuralError, match="40_classify.json"): model_card(run)


@pytest.mark.parametrize(
    "odd",
    [None, [], "x", {"AUC on test": 3}, {"AUC on test": {"Edema": [1, 2]}}, {"AUC on test": {"Edema": {"x": "0.9"}}},
     {"AUC on test": {"Edema": {"x": [True, 1, None]}}}, {"retained patches on test": {"Edema": {"x": 3}}},
     {"validate": {"x": {"hit rate": float("inf")}}}],
)
def test_odd_values_become_not_measured_never_a_number(odd):
    for read in (auc_rows, hit_rows):
        assert all(r[1] == "not measured" for r in read({"metrics": odd}))


def test_a_cell_cannot_break_its_table():
    made = table(("a", "b"), [("x|y\n# Heading", "<script>")])
    assert len(made.splitlines()) == 3 and "\\|" in made and "<script" not in made


def test_the_gate_lets_ordinary_words_pass():
    known = identifiers(cohort())
    for text in ("mimic-cxr", "no findings and no impression", "https://physionet.org/content/mimic-cxr/2.1.0/",
                 "AUC and/or AUPRC", "0.7 / 0.1 / 0.2", "transformers 5.23.0", "git 07470b3717e3"):
        assert refuse_identifiers(text, known) == text


def test_trained_rows_say_phantoms_where_the_manifest_has_their_truth(run):
    told = lambda manifest: dict(trained_rows(run, manifest))["layout"]
    assert told(None) == "not recorded" and told(cohort()).endswith("no phantoms")
    first, *rest = cohort()
    drawn = dataclasses.replace(first.views[0], masks=("truth/masks/1__Edema.png",))
    known = [dataclasses.replace(first, views=(drawn,)), *rest]
    assert "no patient behind them" in told(Manifest(known, layout="mimic-cxr"))


# what is there already

def test_a_description_is_written_over_nothing_but_one_of_ours(tmp_path):
    store = random_store(tmp_path / "store")
    path = store.folder / "_croissant.json"
    for text in ("", "{", "[]", json.dumps({"@type": "sc:Dataset", "name": "by hand"}), "[" * 100_000):
        path.write_text(text)
        for force in (False, True):
            with pytest.raises(NeuralError, match="was not made by this command"):
                write_croissant(store.folder, "x", force=force, **ABOUT)
        assert path.read_text() == text
    path.unlink()
    write_croissant(store.folder, "x", **ABOUT)
    before = path.read_bytes()
    with pytest.raises(NeuralError, match="--force"): write_croissant(store.folder, "y", **ABOUT)
    with pytest.raises(NeuralError, match="license is required"):
        write_croissant(store.folder, "y", force=True, **{**ABOUT, "licence": ""})
    assert path.read_bytes() == before                                     # a refusal leaves the old one
    assert json.loads(write_croissant(store.folder, "y", force=True, **ABOUT).read_text())["name"] == "y"


def test_cards_that_somebody_filled_in_are_kept(run):
    names = lambda: [p.name for p in write_cards(run)]
    assert names() == ["model_card.md", "data_card.md"] == names()         # ours, untouched, are made again
    mine = (run / "data_card.md").read_text().replace("*to be filled in by whoever holds the data*", "CC-BY-4.0")
    (run / "data_card.md").write_text(mine)
    assert names() == ["model_card.md", "data_card.new.md"] == names() and (run / "data_card.md").read_text() == mine
    (run / "data_card.new.md").write_text("also mine")
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    with pytest.raises(NeuralError, match="data_card.md and data_card.new.md in .* were changed by somebody"):
        write_cards(run)
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("code", [28, 122, 13, 30, 5])
def test_a_disk_that_fails_is_told_and_no_card_is_half(run, monkeypatch, code):
    import os
    write_cards(run)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    def fail(*_): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(NeuralError, match=os.strerror(code)) as e: write_cards(run, licence="CC0-1.0")
    monkeypatch.undo()
    assert "\n" not in str(e.value) and {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


# how sure the writer was

def sure_of(seed, **over):
    a = random_asset(seed)
    return random_asset(
        seed, track="image-only", certainty=[254 if i % 2 else 255 for i in range(len(a.concepts))], **over)


@pytest.mark.parametrize("seed", [s for s in range(12) if len(random_asset(s).concepts) > 1][:4])
def test_every_way_out_says_how_sure_the_writer_was_and_no_more(seed):
    a, plain = sure_of(seed), random_asset(seed)
    wanted = [None if i % 2 == 0 else 1.0 for i in range(len(a.concepts))]
    known = lambda values: [None if v is None or np.isnan(v) else v for v in values]
    assert (known(to_hetero(a)["concept"].certainty.tolist()) == wanted
            and to_hetero(plain)["concept"].certainty.isnan().all())
    nodes = [d for _, d in to_networkx(a, WORDS).nodes(data=True) if d["kind"] == "concept"]
    assert [d.get("certainty") for d in nodes] == wanted
    assert [e.get("certainty") for e in to_radgraph(a, WORDS, KINDS)["entities"].values()] == wanted
    assert "certainty" not in json.dumps(to_radgraph(plain, WORDS, KINDS)) + str(
        to_networkx(plain, WORDS).nodes(data=True))


def test_croissant_explains_the_column_where_there_is_one(tmp_path):
    store = AssetStore.create(
        tmp_path / "s", WORDS, KINDS, dim=5, track="image-only", provenance=PROVENANCE, certainty=True)
    store.append([sure_of(s) for s in range(4)])
    fields = {f["name"]: f for f in croissant(store, "x", **ABOUT)["recordSet"][0]["field"]}
    assert (fields["certainty"]["dataType"] == "sc:Integer" and "255" in fields["certainty"]["description"]
            and fields["certainty"]["repeated"])
    assert "certainty" not in json.dumps(croissant(random_store(tmp_path / "t"), "x", **ABOUT)["recordSet"])
