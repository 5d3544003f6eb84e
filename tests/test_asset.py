"""The asset under hostile conditions: random assets, damaged and forged bytes, damaged stores, crashes, planted
identifiers."""
import io
import json
import os
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import neural.asset as asset_module
from PIL import Image

from test_store import as_before

from neural.asset import AssetError, AssetStore, StudyAsset, asset_html, check_key, describe, keyed_id, vocabulary_hash
from neural.codec import CODECS, FITTED, check_codec, dequantise, encode, fit_pca, fit_pq, quantise
from neural.picture import encode_tiles, thumbnail
from neural.study import NeuralError

FIXTURES = Path(__file__).parent / "fixtures"
WORDS = tuple(f"word{i}" for i in range(20))
PROVENANCE = dict(model_hash="0123456789abcdef", vocabulary_hash=vocabulary_hash(WORDS), keep_ratio=0.023,
                  selection="described", fusion="grounding")


def random_asset(seed, k=None, m=None, d=None, codec=None, **over):
    rng = np.random.default_rng(seed)
    k, m, d = ((k or int(rng.integers(1, 12))), (int(rng.integers(0, 9)) if m is None else m),
               (d or int(rng.integers(1, 40))))
    r, g = (int(rng.integers(0, 2 * m)) if m else 0), (int(rng.integers(0, m * k)) if m else 0)
    ties = np.unravel_index(np.sort(rng.choice(m * k, g, replace=False)), (m, k)) if g else (np.zeros(0, int),) * 2
    fields = dict(study_id=f"s{seed}", track=("image+report", "image-only")[seed % 2], grid=(12, 12),
                  patches=np.sort(rng.choice(144, k, replace=False)), relevance=rng.random(k),
                  features=rng.normal(size=(k, d)) * 10.0 ** rng.integers(-8, 4), concepts=rng.integers(0, 20, m),
                  assertions=rng.integers(0, 3, m),
                  relations=np.column_stack([rng.integers(0, max(m, 1), (r, 2)), rng.integers(0, 3, r)]),
                  grounding=np.column_stack(ties), weights=rng.random(g), provenance=PROVENANCE,
                  codec=codec or ("int8", "f16", "f32")[seed % 3])
    return StudyAsset(**{**fields, **over})


def book_of(codec, d=8):
    x = np.random.default_rng(7).normal(size=(400, d))
    return {"pca": lambda: fit_pca(x, 4), "pq": lambda: fit_pq(x, 4)}.get(codec, lambda: None)()


def store_of(folder, n=30, codec="int8", track="image+report", shards=2, d=8, **over):
    book = book_of(codec, d)
    store = AssetStore.create(folder, WORDS, {w: "Observation" for w in WORDS}, dim=d, codec=codec, track=track,
                              provenance=PROVENANCE, book=book)
    features = dict(features=lambda i: np.random.default_rng(i).normal(size=(5, d))) if book else {}
    assets = [
        random_asset(i, d=d, codec=codec, track=track, book=book, **{k: v(i) for k, v in features.items()},
                     **(dict(k=5) if book else {}), **over)
        for i in range(n)
    ]
    for part in np.array_split(np.arange(n), shards): store.append([assets[i] for i in part])
    return store, assets


@pytest.mark.parametrize("seed", range(60))
def test_round_trip_of_random_assets(seed):
    a = random_asset(seed)
    b = StudyAsset.from_bytes(a.to_bytes())
    assert a == b and hash(a) == hash(b) and b.to_bytes() == a.to_bytes()
    for name in ("patches", "relevance", "features", "concepts", "assertions", "relations", "grounding", "weights"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y)
    assert (a.study_id, a.track, a.grid, a.provenance, a.codec) == (b.study_id, b.track, b.grid, b.provenance, b.codec)


@pytest.mark.parametrize("k,m,d", [(1, 0, 1), (1, 1, 1), (144, 0, 3), (144, 8, 64), (4, 0, 1024)])
def test_edge_sizes(k, m, d):
    for codec in ("int8", "f16", "f32"):
        a = random_asset(3, k=k, m=m, d=d, codec=codec)
        assert StudyAsset.from_bytes(a.to_bytes()) == a
        assert describe(a) and asset_html(a)


def test_quantisation_error_is_bounded_and_does_not_drift():
    rng = np.random.default_rng(0)
    for _ in range(200):
        x = (rng.normal(size=(5, 17)) * 10.0 ** rng.uniform(-30, 28, size=(5, 1))).astype(np.float32)
        codes, scales = quantise(x)
        y = dequantise(codes, scales)
        # exact in float32: nothing is rounded twice
        assert np.array_equal(codes * scales.astype(np.float64)[:, None], y)
        again = quantise(y)
        assert np.array_equal(again[0], codes) and np.array_equal(again[1], scales)
        big = np.abs(x).max(1) > 1e-29
        assert (np.abs(y - x).max(1)[big] <= scales[big] * .5 * 1.04).all()


def test_any_mutation_is_read_right_or_refused():
    rng, a = np.random.default_rng(1), random_asset(8, k=5, m=4, d=6)
    data = a.to_bytes()
    for _ in range(300):
        b = bytearray(data)
        kind = rng.integers(4)
        if kind == 0: b[rng.integers(len(b))] ^= 1 << rng.integers(8)
        elif kind == 1: b = b[:rng.integers(len(b))]
        elif kind == 2: b += bytes(rng.integers(0, 256, rng.integers(1, 40), dtype=np.uint8))
        else:
            at = rng.integers(len(b))
            b[at:at + 4] = bytes(rng.integers(0, 256, 4, dtype=np.uint8))
        try: assert StudyAsset.from_bytes(bytes(b)) == a
        except AssetError as e: assert "\n" not in str(e)


def test_forged_bytes_with_a_right_checksum_are_read_in_one_form_or_refused():
    rng, read = np.random.default_rng(2), 0
    for i in range(400):
        a = random_asset(i, k=3, m=3, d=4)
        b = bytearray(a.to_bytes()[:-8])
        for _ in range(rng.integers(1, 4)): b[rng.integers(4, len(b))] = rng.integers(256)
        forged = bytes(b) + asset_module._digest(bytes(b))
        try: again = StudyAsset.from_bytes(forged)
        except AssetError as e:
            assert "\n" not in str(e)
            continue
        assert again.to_bytes() == forged
        read += 1
    assert 0 < read < 400           # a changed concept or code is another valid asset; a changed length is not


def test_no_header_can_ask_for_memory(monkeypatch):
    a = random_asset(8, k=5, m=4, d=6)
    monkeypatch.setattr(
        asset_module, "_payload", lambda *_: pytest.fail("arrays were made before the sizes were checked"))
    for at in (10, 12, 14, 16, 18, 20, 22, 24, 26):
        b = bytearray(a.to_bytes()[:-8])
        b[at:at + 2] = b"\xff\xff"
        with pytest.raises(AssetError, match="its header speaks of"):
            StudyAsset.from_bytes(bytes(b) + asset_module._digest(bytes(b)))


@pytest.mark.parametrize(
    "prov",
    [b"[" * 4000, b"{}x", b'{"keep_ratio":NaN}', b'{"note":"Mr Smith"}', b"[]",
     b'{"fusion":"grounding","fusion":"none"}', b'{"keep_ratio":1}', b'{ }', b"\xff\xfe"],
)
def test_forged_provenance(prov):
    a = random_asset(4, k=2, m=0, d=3, provenance={})
    head = bytearray(a.to_bytes()[:30])
    key = a.study_id.encode()
    head[22:24] = len(prov).to_bytes(2, "little")
    body = bytes(head) + key + prov + a.to_bytes()[30 + len(key) + 2:-8]
    with pytest.raises(AssetError): StudyAsset.from_bytes(body + asset_module._digest(body))


@pytest.mark.parametrize(
    "over",
    [dict(track="report"), dict(grid=(12,)), dict(grid=(12, 1000)), dict(grid="ab"), dict(patches=[3, 1, 2]),
     dict(patches=[1, 1, 2]), dict(patches=[1, 2, 144]), dict(patches=[-1, 2, 3]), dict(patches=[[1], [2, 3]]),
     dict(relevance=[0.1, 0.2]), dict(relevance=[0.1, 0.2, -0.1]), dict(relevance=[0.1, 0.2, np.nan]),
     dict(features=np.zeros((2, 4))), dict(features=np.full((3, 4), np.inf)), dict(features=np.zeros((3, 0))),
     dict(concepts=[1, 2, 70000]), dict(concepts=[0.5, 1, 2]), dict(assertions=[0, 1, 3]), dict(assertions=[0, 1]),
     dict(relations=[[0, 3, 0]]), dict(relations=[[0, 1, 3]]), dict(relations=[[0, 1]]),
     dict(grounding=[[3, 0]], weights=[0.1]), dict(grounding=[[0, 3]], weights=[0.1]),
     dict(grounding=[[0, 0]], weights=[]), dict(grounding=[[0, 0]], weights=[np.inf]),
     dict(provenance=dict(date="2024-01-01")), dict(provenance=dict(keep_ratio=0)),
     dict(provenance=dict(keep_ratio=True)), dict(provenance=dict(model_hash="Smith")), dict(codec="zip"),
     dict(study_id=""), dict(study_id="a\tb"), dict(study_id=b"x"), dict(study_id="1.3.6.1.4.1.14519.5.2.1"),
     dict(codec="f16", features=np.full((3, 4), 1e6))],
)
def test_wrong_fields_are_refused(over):
    fields = dict(relations=[], grounding=[], weights=[], provenance={}) | over
    with pytest.raises(AssetError) as e: random_asset(5, k=3, m=3, d=4, **fields)
    assert "\n" not in str(e.value)


def test_released_selection_may_repeat_patches():
    a = random_asset(6, k=3, m=0, d=2, patches=[2, 2, 9], provenance=dict(selection="released"))
    assert StudyAsset.from_bytes(a.to_bytes()) == a and len(a.unified("none").visual) == 3


def test_graphs_come_back():
    a = random_asset(11, k=6, m=5, d=4, relations=[[0, 1, 0], [2, 1, 1]])
    v, q, ties = a.graphs()
    assert (np.array_equal(v.patches, a.patches) and np.array_equal(q.concepts, a.concepts)
            and q.relations == [(0, 1, 0), (2, 1, 1)])
    assert (ties > 0).sum() <= len(a.grounding)
    for mode in ("none", "betweenness", "grounding"):
        edges = set(map(tuple, a.unified(mode).edges.T.tolist()))
        assert edges == {(j, i) for i, j in edges}
    back = StudyAsset.from_graphs(a.study_id, a.track, v, q, None, a.provenance, a.codec)
    assert np.array_equal(back.features, a.features) and np.array_equal(back.relevance, a.relevance)


@pytest.mark.parametrize("codec", CODECS)
def test_store_reopened(tmp_path, codec):
    # more than one row group per shard is possible
    store, assets = store_of(tmp_path / "s", n=300, codec=codec, shards=3)
    again = AssetStore(tmp_path / "s")
    assert again.ids == [a.study_id for a in assets] and len(again) == 300 and list(again) == assets
    for i in np.random.default_rng(0).permutation(300)[:40]: assert again[f"s{i}"] == assets[i]
    assert again.verify() == [] and "s7" in again and "s999" not in again
    assert again.bytes_per_study() == pytest.approx(
        sum(f.stat().st_size for f in (tmp_path / "s").iterdir() if f.name != ".lock") / 300)
    with pytest.raises(AssetError, match="s999 is not in"): again["s999"]


def test_row_groups_are_crossed(tmp_path):
    store = AssetStore.create(tmp_path / "s", WORDS, dim=8, provenance=PROVENANCE)
    assets = [random_asset(i, d=8, codec="int8", track="image+report") for i in range(290)]
    store.append(assets)
    assert pq.ParquetFile(store.shards[0]).metadata.num_row_groups == 2
    assert list(store) == assets and store["s289"] == assets[289] and store["s256"] == assets[256]


def test_other_tools_read_a_shard_without_this_library(tmp_path):
    store, assets = store_of(tmp_path / "s", n=5, shards=1)
    path = tmp_path / "s" / store.shards[0].name
    rows = pq.read_table(path).to_pylist()
    frame = pq.read_table(path).to_pandas()
    found = duckdb.sql(f"select study_id, patches, relevance, weights, features from read_parquet('{path}')").fetchall()
    for a, row, (_, line), (key, patches, relevance, weights, codes) in zip(
        assets, rows, frame.iterrows(), found, strict=True):
        assert row["study_id"] == line.study_id == key == a.study_id
        assert row["patches"] == list(line.patches) == patches == a.patches.tolist()
        assert (np.allclose(row["relevance"], a.relevance) and np.allclose(relevance, a.relevance)
                and np.allclose(weights, a.weights))
        for data in (row["features"], line.features, codes):
            # eight codes and a scale per patch: nothing but numpy
            each = np.frombuffer(data, np.uint8).reshape(len(patches), 8 + 4)
            assert np.allclose(each[:, :8].astype(np.int8) * each[:, 8:].copy().view("<f4"), a.features)


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    store, _ = store_of(tmp_path / "s", n=20, shards=1)
    path, rng = store.shards[0], np.random.default_rng(3)
    good = path.read_bytes()
    for at in [0, 3, len(good) - 1, len(good) - 6, *rng.integers(4, len(good) - 8, 40)]:
        b = bytearray(good)
        b[at] ^= 1 << rng.integers(8)
        path.write_bytes(b)
        found = AssetStore(tmp_path / "s").verify()
        assert (found and all(name == path.name or name.startswith("s") for name, _ in found)
                and all("\n" not in why for _, why in found))
    path.write_bytes(good)
    assert store.verify() == []


@pytest.mark.parametrize(
    "column,value",
    [("patches", [7]), ("relevance", [float("nan")]), ("features", b"12345678"), ("thumbnail", b"GIF89a"),
     ("pixels", b"\x89PNG"), ("concepts", [999]), ("assertions", [3]), ("relations", [1]), ("weights", [0.5] * 99),
     ("study_id", None), ("checksum", b"00000000")],
)
def test_an_edited_row_is_named(tmp_path, column, value):
    store, _ = store_of(tmp_path / "s", n=12, shards=1)
    rows = pq.read_table(store.shards[0]).to_pylist()
    rows[5][column] = value
    pq.write_table(pa.Table.from_pylist(rows, schema=asset_module.SHARD_SCHEMA), store.shards[0])
    found = AssetStore(tmp_path / "s").verify()
    assert [n for n, _ in found] == ["None" if column == "study_id" else "s5"]
    with pytest.raises(AssetError): list(AssetStore(tmp_path / "s"))


def test_duplicates_and_strangers_are_refused_and_leave_no_trace(tmp_path):
    store, assets = store_of(tmp_path / "s", n=6, shards=1)
    files = lambda: sorted((f.name, f.stat().st_size) for f in (tmp_path / "s").iterdir())
    before = files()
    new = lambda i, **kw: random_asset(i, **{**dict(d=8, codec="int8", track="image+report"), **kw})
    for bad, said in (
        ([new(50), new(3)], "s3 is already"), ([new(50), new(50)], "s50 is already"),
        ([new(50), new(51, d=9)], "dim is 9"), ([new(50, codec="f16")], "codec"),
        ([new(50, track="image-only")], "track"), ([new(50, grid=(14, 14))], "grid"),
        ([new(50, m=1, concepts=[20], assertions=[0], relations=[], grounding=[], weights=[])], "concept 20"),
        ([new(50, provenance=dict(model_hash="ffffffff"))], "provenance"), ([], "nothing to append")):
        with pytest.raises(AssetError, match=said): store.append(bad)
    assert files() == before and len(AssetStore(tmp_path / "s")) == 6
    store.append([new(50, provenance={})])
    assert AssetStore(tmp_path / "s")["s50"].provenance == PROVENANCE and store.verify() == []


def test_a_crash_while_writing_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    store, assets = store_of(tmp_path / "s", n=6, shards=1)
    extra = random_asset(60, d=8, codec="int8", track="image+report")
    def crash(*_): raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt): store.append([extra])
    monkeypatch.undo()
    (tmp_path / "s" / ".shard-000000-000001-aaaaaaaaaaaaaaaa.parquet.123.tmp").write_bytes(b"PAR1 half")
    (tmp_path / "s" / "shard-000001.parquet.part").write_bytes(b"PAR1 half")
    again = AssetStore(tmp_path / "s")
    assert list(again) == assets and again.verify() == []
    again.append([extra])
    assert AssetStore(tmp_path / "s")["s60"] == extra


def test_a_missing_shard_is_noticed(tmp_path):
    store, _ = store_of(tmp_path / "s", n=9, shards=3)
    store.shards[1].unlink()
    with pytest.raises(AssetError, match="shard 1 is missing"): AssetStore(tmp_path / "s").ids
    assert AssetStore(tmp_path / "s").verify()[0][0] == "s"


def test_links_are_refused(tmp_path):
    store, _ = store_of(tmp_path / "s", n=6, shards=2)
    outside = tmp_path / "outside.parquet"
    inside = store.shards[1]
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(AssetError, match="is a link"): AssetStore(tmp_path / "s").ids
    other = tmp_path / "t"
    other.mkdir()
    (other / "store.parquet").symlink_to(tmp_path / "s" / "store.parquet")
    with pytest.raises(AssetError, match="link"): AssetStore(other)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', "[" * 100000, '{"format": "other"}', '{"format": "neural-asset-store"}',
     '{"format": "neural-asset-store", "schema_version": 99}',
     '{"format": "neural-asset-store", "schema_version": true}'],
)
def test_foreign_heads(tmp_path, text):
    "What another program, or nobody, would say of a store, in the head of today and in that of before."
    out = io.BytesIO()
    with pq.ParquetWriter(out, asset_module.SHARD_SCHEMA) as f: f.add_key_value_metadata({"neural-asset-store": text})
    for name, data in (("store.json", text.encode()), ("store.parquet", text.encode()),
                       ("store.parquet", out.getvalue())):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AssetError) as e: AssetStore(tmp_path)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "field,value",
    [("vocabulary", [{}]), ("vocabulary", ["a", "a"]), ("vocabulary", ["a" * 101]), ("kinds", {"a": 3}), ("dim", 0),
     ("dim", 10**12), ("dim", True), ("grid", [12]), ("grid", [12, "x"]), ("grid", [[1], [2, 3]]), ("track", "x"),
     ("codec", "pickle"), ("codec", "pq"), ("codebook", "0" * 16), ("loss", -1.0), ("loss", "0"), ("generation", -1),
     ("generation", 0.5), ("schema_version", 1), ("provenance", {"name": "x"}), ("extra", 1)],
)
def test_forged_heads(tmp_path, field, value):
    store, _ = store_of(tmp_path / "s", n=2, shards=1)
    (tmp_path / "s" / "store.parquet").write_bytes(asset_module._head({**store.meta, field: value}))
    with pytest.raises(AssetError): AssetStore(tmp_path / "s")
    (tmp_path / "s" / "store.parquet").unlink()
    (tmp_path / "s" / "store.json").write_text(json.dumps({**store.meta, field: value}))
    with pytest.raises(AssetError): AssetStore(tmp_path / "s")


@pytest.mark.parametrize("cut", [0, 3, 5, 100, -1, -8, -9])
def test_a_head_that_is_cut_or_stuffed_is_refused(tmp_path, cut):
    store, _ = store_of(tmp_path / "s", n=2, shards=1)
    whole = store.head.read_bytes()
    for data in (whole[:cut], whole[:4] + b"x" * 10 + whole[4:], store.shards[0].read_bytes()):
        store.head.write_bytes(data)
        with pytest.raises(AssetError) as e: AssetStore(tmp_path / "s")
        assert "\n" not in str(e.value)
    store.head.write_bytes(whole)
    assert AssetStore(tmp_path / "s").verify() == []


def test_a_parquet_file_of_something_else_is_refused(tmp_path):
    store, _ = store_of(tmp_path / "s", n=4, shards=1)
    out = io.BytesIO()
    pq.write_table(pa.table({c.name: pa.array([["x"]]) for c in asset_module.SHARD_SCHEMA}), out)
    name = f"shard-000000-000001-{asset_module._digest(out.getvalue()).hex()}.parquet"
    (tmp_path / "s" / name).write_bytes(out.getvalue())
    with pytest.raises(AssetError, match="columns of a shard"): AssetStore(tmp_path / "s").ids
    assert [n for n, _ in store.verify()] == [name] and store["s3"].study_id == "s3"


def test_existing_folder_is_not_taken_over(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AssetError, match="not empty"): AssetStore.create(tmp_path, WORDS)
    with pytest.raises(AssetError, match="not empty"): AssetStore.create(tmp_path / "notes.txt", WORDS)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_planted_identifiers_reach_neither_asset_nor_store(tmp_path):
    from neural.graph import knowledge_graph, visual_graph
    from neural.report import ReportReader
    planted = ["Zweistein", "1954-03-02", "03/02/1954", "MRN 8812345", "8812345", "1.2.840.113619.2.55.3.604688119",
               "p10000764", "Dr. Quux"]
    report = (f"FINDINGS: Mr. {planted[0]}, born {planted[1]} ({planted[2]}), {planted[3]}, study {planted[5]}, patient"
              f" {planted[6]}. Right lower lobe opacity. No pleural effusion.\nIMPRESSION: Pneumonia, discussed with"
              f" {planted[7]}.")
    reader = ReportReader()
    q = knowledge_graph(reader(report), reader.vocabulary)
    assert len(q) >= 2
    v = visual_graph([5, 9], np.ones((2, 8)), [.5, .4], (12, 12))
    store = AssetStore.create(tmp_path / "s", reader.vocabulary, reader.kinds, dim=8)
    a = StudyAsset.from_graphs("key-1", "image+report", v, q, np.ones((len(q), 2)))
    store.append([a])
    # what compression might hide
    rows = repr(pq.read_table(store.shards[0]).to_pylist()).encode()
    everything = (a.to_bytes() + rows + repr(store["key-1"].__dict__).encode()
                  + b"".join(f.name.encode() + f.read_bytes() for f in (tmp_path / "s").iterdir()))
    for secret in planted: assert secret.encode() not in everything and secret.encode("utf-16-le") not in everything
    for word in (b"label", b"patient", b"report_text", b"StudyInstanceUID"): assert word not in everything


def test_html_is_inert():
    a = random_asset(9, k=2, m=2, d=2, study_id="<img src=x onerror=alert(1)>", concepts=[0, 1], assertions=[0, 2],
                     relations=[], grounding=[], weights=[])
    page = asset_html(a, ["<script>alert(1)</script>", "b\"'"])
    assert "<script" not in page and "<img" not in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_errors_are_neural_errors():
    assert issubclass(AssetError, NeuralError) and check_key("s1") == "s1"


# version 1

def test_a_store_of_version_1_is_read_kept_whole_and_brought_forward(tmp_path):
    for codec, n in (("int8", 6), ("f16", 4)):
        shutil.copytree(FIXTURES / "store-v1" / codec, tmp_path / codec)
        old = AssetStore(tmp_path / codec)
        assets = [random_asset(i, d=8, codec=codec, track="image+report") for i in range(n)]
        assert old.version == 1 and list(old) == assets and old[f"s{n - 1}"] == assets[-1] and old.verify() == []
        with pytest.raises(AssetError, match="neural compact"):
            old.append([random_asset(50, d=8, codec=codec, track="image+report")])
        old.compact()
        new = AssetStore(tmp_path / codec)
        assert new.version == 2 and list(new) == assets and new.verify() == [] and len(new.shards) == 1
        assert sorted(p.name for p in (tmp_path / codec).iterdir()) == [".lock", new.shards[0].name, "store.parquet"]
        new.append([random_asset(50, d=8, codec=codec, track="image+report")])


def test_a_flipped_bit_in_a_store_of_version_1_is_found(tmp_path):
    shutil.copytree(FIXTURES / "store-v1" / "int8", tmp_path / "s")
    path = AssetStore(tmp_path / "s").shards[0]
    good = path.read_bytes()
    for at in np.random.default_rng(0).integers(4, len(good) - 8, 20):
        b = bytearray(good)
        b[at] ^= 4
        path.write_bytes(b)
        assert AssetStore(tmp_path / "s").verify()


def test_the_wire_form_of_version_1_is_read():
    data = (FIXTURES / "store-v1" / "study.asset").read_bytes()
    a = StudyAsset.from_bytes(data)
    assert a == random_asset(5, k=4, m=3, d=8, codec="int8") and len(a.to_bytes()) < len(data)
    for cut in range(len(data)):
        with pytest.raises(AssetError): StudyAsset.from_bytes(data[:cut])
    rng = np.random.default_rng(0)
    for _ in range(300):
        b = bytearray(data[:-8])
        b[rng.integers(6, len(b))] = rng.integers(256)
        try: again = StudyAsset.from_bytes(bytes(b) + asset_module._digest(bytes(b)))
        except AssetError as e:
            assert "\n" not in str(e)
            continue
        assert asset_module._bytes_1(again)[:-8] == bytes(b)


# pictures and codebooks

@pytest.mark.parametrize("codec", FITTED)
def test_an_asset_of_a_fitted_codec_round_trips_with_its_codebook_and_no_other(codec):
    book = book_of(codec)
    for seed in range(20):
        a = random_asset(
            seed, k=5, d=8, codec=codec, book=book, features=np.random.default_rng(seed).normal(size=(5, 8)))
        assert StudyAsset.from_bytes(a.to_bytes(), book) == a and encode(a.features, codec, book).shape == (
            5, check_codec(codec, 8, book))
    other = {"pca": lambda: fit_pca(np.random.default_rng(1).normal(size=(400, 8)), 4),
             "pq": lambda: fit_pq(np.random.default_rng(1).normal(size=(400, 8)), 4)}[codec]()
    for wrong in (None, other, book_of(next(c for c in FITTED if c != codec))):
        with pytest.raises(AssetError): StudyAsset.from_bytes(a.to_bytes(), wrong)


def test_a_store_without_its_codebook_is_refused(tmp_path):
    store_of(tmp_path / "s", n=3, codec="pq")
    as_before(tmp_path / "s")
    path = tmp_path / "s" / "codebook.safetensors"
    good = path.read_bytes()
    for damage in (lambda: path.unlink(), lambda: path.write_bytes(good[:-4] + b"abcd"), lambda: path.write_bytes(b""),
                   lambda: path.write_bytes(b"\xff" * 64)):
        damage()
        with pytest.raises(AssetError, match="codebook"): AssetStore(tmp_path / "s")
    path.write_bytes(good)
    assert AssetStore(tmp_path / "s").verify() == []


def square(side=192, seed=0): return np.random.default_rng(seed).random((1, side, side), np.float32)


def test_thumbnail_and_pixels_come_back_bit_for_bit(tmp_path):
    a = random_asset(8, k=3, m=2, d=4)
    b = random_asset(8, k=3, m=2, d=4, thumbnail=thumbnail(square(96), 900, "webp"),
                     pixels=encode_tiles(square(), a.patches, (12, 12)))
    assert (StudyAsset.from_bytes(b.to_bytes()) == b and b != a
            and len(b.to_bytes()) == len(a.to_bytes()) + len(b.thumbnail) + len(b.pixels))
    store, assets = store_of(
        tmp_path / "s", n=4, shards=1, k=3, thumbnail=b.thumbnail, pixels=encode_tiles(square(), [1, 2, 3], (12, 12)))
    assert list(AssetStore(tmp_path / "s")) == assets and assets[0].thumbnail == b.thumbnail


def bomb(side, form="PNG"):
    out = io.BytesIO()
    Image.new("L", (8, 8)).save(out, form)
    data = bytearray(out.getvalue())
    data[16:24] = side.to_bytes(4, "big") * 2
    return bytes(data)


@pytest.mark.parametrize(
    "over",
    [dict(thumbnail=b"\x89PNG"), dict(thumbnail="text"), dict(thumbnail=b"\0" * 70000), dict(thumbnail=bomb(40000)),
     dict(pixels=bomb(60000)), dict(pixels=b"RIFF"), dict(pixels=b"\x80\x04pickle"), dict(pixels=bomb(8))],
)
def test_pictures_that_are_none_are_refused(over):
    with pytest.raises(AssetError) as e: random_asset(5, k=3, m=0, d=4, **over)
    assert "\n" not in str(e.value)


# keys, writers, disks

def test_keyed_ids_join_and_do_not_tell():
    ids = [f"s{i}" for i in range(500)]
    keyed = [keyed_id(i, b"0123456789abcdef") for i in ids]
    assert len(set(keyed)) == 500 and keyed == [keyed_id(i, b"0123456789abcdef") for i in ids]
    assert not set(keyed) & {keyed_id(i, b"0123456789abcdeX") for i in ids} and all(
        check_key(k) and i not in k for i, k in zip(ids, keyed))


def test_what_is_there_may_be_skipped(tmp_path):
    store, assets = store_of(tmp_path / "s", n=6, shards=1)
    more = [random_asset(i, d=8, codec="int8", track="image+report") for i in range(3, 9)]
    other = AssetStore(tmp_path / "s")
    other.append(more, again="skip")
    assert (store.ids == [f"s{i}" for i in range(9)] and store["s8"] == more[-1]
            and store.append(more, again="skip") == "" and store.verify() == [])


def test_a_store_merged_by_another_process_is_read_on(tmp_path):
    store, assets = store_of(tmp_path / "s", n=40, shards=8)
    assert store["s3"] == assets[3]
    AssetStore(tmp_path / "s").compact(size=15)
    assert store["s39"] == assets[39] and list(store) == assets and len(store.shards) == 3
    store.append([random_asset(90, d=8, codec="int8", track="image+report")])
    assert len(AssetStore(tmp_path / "s")) == 41 and AssetStore(tmp_path / "s").verify() == []


def test_a_merge_that_is_killed_leaves_one_whole_store(tmp_path, monkeypatch):
    store, assets = store_of(tmp_path / "s", n=20, shards=5)
    real, calls = asset_module.publish_bytes, []
    for stop in (0, 1, 2):
        def publish(path, data):
            calls.append(path)
            if len(calls) > stop: raise KeyboardInterrupt
            real(path, data)
        calls.clear()
        monkeypatch.setattr(asset_module, "publish_bytes", publish)
        with pytest.raises(KeyboardInterrupt): store.compact(size=10)
        monkeypatch.undo()
        assert list(AssetStore(tmp_path / "s")) == assets and AssetStore(tmp_path / "s").verify() == []
    assert store.compact(size=10) == (5, 2) and list(store) == assets and store.verify() == []
    assert len([p for p in (tmp_path / "s").iterdir() if p.suffix == ".parquet"]) == 3


def test_a_page_that_claims_to_unfold_far_is_refused_before_it_does(tmp_path):
    store, _ = store_of(tmp_path / "s", n=4, shards=1)
    rows = pq.read_table(store.shards[0]).to_pylist()
    rows[0]["features"] = b"\0" * 300_000_000                                     # a few kilobytes of zstd
    out = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(rows, schema=asset_module.SHARD_SCHEMA), out, compression="zstd", use_dictionary=False)
    assert len(out.getvalue()) < 1_000_000
    name = f"shard-000000-000000-{asset_module._digest(out.getvalue()).hex()}.parquet"
    store.shards[0].unlink()
    (tmp_path / "s" / name).write_bytes(out.getvalue())
    peak = lambda: int(
        next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])
    before = peak()
    with pytest.raises(AssetError, match="claims .* bytes for 4 studies"): list(AssetStore(tmp_path / "s"))
    assert [n for n, _ in AssetStore(tmp_path / "s").verify()] == [name]
    assert peak() - before < 100_000                                               # kilobytes


# certainties of concepts

def sure_asset(seed, m=4, **over):
    rng = np.random.default_rng(seed)
    return random_asset(
        seed, m=m,
        **{"track": "image-only", "certainty": np.where(rng.random(m) < 0.4, 255, rng.integers(0, 255, m)), **over})


def sealed(head, body): return head + body + asset_module._digest(head + body)


def test_an_asset_without_certainties_has_the_bytes_it_always_had(tmp_path):
    whole = b"".join(random_asset(i).to_bytes() for i in range(60))
    assert asset_module._digest(whole).hex() == "80b35dbcd1c7ebae"                   # taken before there were any
    store, _ = store_of(tmp_path / "s", track="image-only")
    assert ("certainty" not in pq.read_schema(store.shards[0]).names + pq.read_schema(store.head).names
            and store.version == 2)
    assert store.compact() == (2, 1) and store.version == 2 and "certainty" not in pq.read_schema(store.shards[0]).names


@pytest.mark.parametrize("seed", range(20))
def test_certainties_survive_bytes_and_graphs(seed):
    a = sure_asset(seed, certainty=np.r_[7, np.random.default_rng(seed).integers(0, 256, 3)])
    b = StudyAsset.from_bytes(a.to_bytes())
    assert (
        a == b and np.array_equal(a.certainty, b.certainty) and b.certainty.dtype == np.uint8 and a.to_bytes()[4] == 3)
    assert np.array_equal(b.graphs()[1].certainty, a.certainty) and np.array_equal(
        b.unified().knowledge.certainty, a.certainty)
    assert (
        len(a.to_bytes())
        == len(StudyAsset(**{**{n: getattr(a, n) for n in a.__dataclass_fields__}, "certainty": ()}).to_bytes()) + 4)


@pytest.mark.parametrize(
    "over,said",
    [(dict(certainty=[1, 2, 3]), "certainty has shape"), (dict(certainty=[1] * 5), "certainty has shape"),
     (dict(certainty=[0, 0, 0, 256]), "0..255"), (dict(certainty=[-1, 0, 0, 0]), "0..255"),
     (dict(certainty=[0.5] * 4), "whole numbers"),
     (dict(track="image+report", certainty=[1] * 4), "only an image-only asset"),
     (dict(m=0, certainty=[1]), "certainty has shape")],
)
def test_certainties_that_do_not_fit_are_refused(over, said):
    with pytest.raises(AssetError, match=said): sure_asset(3, **over)


@pytest.mark.parametrize("certainty", [None, (), [255] * 4])
def test_nothing_known_is_one_spelling_and_the_old_one(certainty):
    assert sure_asset(5, certainty=certainty).to_bytes() == random_asset(5, m=4, track="image-only").to_bytes()


@pytest.mark.parametrize("m", [0, 3, 5, 65_535])
def test_a_count_that_the_bytes_do_not_hold_is_refused_before_memory_is_reserved(m):
    # the number of concepts
    data = bytearray(sure_asset(9).to_bytes()[:-8])
    data[14:16] = m.to_bytes(2, "little")
    with pytest.raises(AssetError, match="header speaks of"):
        StudyAsset.from_bytes(sealed(bytes(data[:6]), bytes(data[6:])))


@pytest.mark.parametrize(
    "wire,said",
    [(lambda a: sealed(a[:4] + b"\2\0", a[6:-8]), "header speaks of"),
     (lambda a: sealed(a[:4] + b"\4\0", a[6:-8]), "schema version 4"),
     (lambda a: sealed(a[:7] + b"\0", a[8:-8]), "only an image-only asset"),
     (lambda a: a[:-9] + a[-8:], "header speaks of"), (lambda a: a[:-20], "header speaks of")],
)
def test_a_forged_version_track_or_length_is_refused(wire, said):
    with pytest.raises(AssetError, match=said):
        StudyAsset.from_bytes(wire(sure_asset(9, certainty=[1, 2, 3, 4]).to_bytes()))


def sure_store(folder, n=12, shards=3):
    store = AssetStore.create(folder, WORDS, dim=8, track="image-only", provenance=PROVENANCE, certainty=True)
    assets = [sure_asset(i, d=8, codec="int8", **({} if i % 3 else {"certainty": ()})) for i in range(n)]
    for part in np.array_split(np.arange(n), shards): store.append([assets[i] for i in part])
    return store, assets


def test_a_store_keeps_certainties_through_every_way(tmp_path):
    store, assets = sure_store(tmp_path / "s")
    assert (list(AssetStore(tmp_path / "s")) == assets and AssetStore(tmp_path / "s")["s4"] == assets[4]
            and store.verify() == [])
    assert (store.compact() == (3, 1) and list(AssetStore(tmp_path / "s")) == assets and store.verify() == []
            and AssetStore(tmp_path / "s").certain)
    found = duckdb.sql(f"select study_id, certainty from '{tmp_path}/s/*.parquet' order by study_id").fetchall()
    assert dict(found) == {a.study_id: a.certainty.tolist() for a in assets}
    assert len(pq.read_table(tmp_path / "s")) == 12


def test_a_store_that_was_begun_without_takes_none(tmp_path):
    store, assets = store_of(tmp_path / "s", track="image-only")
    with pytest.raises(AssetError, match="begun without"): store.append([sure_asset(50, d=8, codec="int8")])
    assert list(AssetStore(tmp_path / "s")) == assets
    with pytest.raises(AssetError, match="only an image-only store"):
        AssetStore.create(tmp_path / "r", WORDS, certainty=True)


@pytest.mark.parametrize(
    "value,said",
    [([1], "certainty has shape"), ([1] * 9, "certainty has shape"), ([255] * 4, "checksum"), ([9] * 4, "checksum"),
     (None, "checksum")],
)
def test_an_edited_certainty_is_named(tmp_path, value, said):
    store, _ = sure_store(tmp_path / "s", shards=1)
    schema, rows = pq.read_schema(store.shards[0]), pq.read_table(store.shards[0]).to_pylist()
    rows[5]["certainty"] = value
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), store.shards[0])
    assert [(n, said in why) for n, why in AssetStore(tmp_path / "s").verify()] == [("s5", True)]


def test_more_certainties_than_studies_can_need_are_refused_unread(tmp_path):
    store, _ = sure_store(tmp_path / "s", n=3, shards=1)
    schema, rows = pq.read_schema(store.shards[0]), pq.read_table(store.shards[0]).to_pylist()
    rows[0]["certainty"] = [1] * 5_000_000
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), out, compression="zstd", use_dictionary=False)
    name = f"shard-000000-000000-{asset_module._digest(out.getvalue()).hex()}.parquet"
    store.shards[0].unlink()
    (tmp_path / "s" / name).write_bytes(out.getvalue())
    with pytest.raises(AssetError, match="claims .* for 3 studies"): list(AssetStore(tmp_path / "s"))
