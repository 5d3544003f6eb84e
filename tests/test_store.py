"""The store under fire: two writers killed at random moments, a full disk, a disk that may only be read, a bit flipped
anywhere."""
import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest

import neural.asset as asset_module
from neural.asset import AssetError, AssetStore, StudyAsset, is_keyed, key_check, keyed_id, vocabulary_hash
from neural.codec import book_bytes, fit_pq

WORDS = ("lung", "pneumonia")
fork = multiprocessing.get_context("fork")


def as_before(folder):
    "A store with the head that stores had before: JSON without settings, and a codebook in a file of its own."
    store = AssetStore(folder)
    Path(folder, "store.json").write_text(
        json.dumps({k: v for k, v in store.meta.items() if k != "settings"}, indent=1))
    if store.book: Path(folder, "codebook.safetensors").write_bytes(book_bytes(store.book))
    Path(folder, "store.parquet").unlink()
    return AssetStore(folder)


PROVENANCE = {"vocabulary_hash": vocabulary_hash(WORDS)}


def an_asset(i, d=8):
    rng = np.random.default_rng(i)
    return StudyAsset(f"s{i}", "image+report", (12, 12), np.sort(rng.choice(144, 3, replace=False)), rng.random(3),
                      rng.normal(size=(3, d)), [0, 1], [0, 2], [[1, 0, 0]], [[1, 2]], [1.0], PROVENANCE)


def write_all(folder, order, size=4):
    "A builder: what is missing, a few at a time, in its own order."
    store = AssetStore(folder)
    todo = [i for i in order if f"s{i}" not in store]
    for start in range(0, len(todo), size):
        store.append([an_asset(i) for i in todo[start : start + size]], again="skip")


def test_two_writers_killed_fifty_times_lose_nothing_and_double_nothing(tmp_path):
    n, rng = 120, np.random.default_rng(0)
    AssetStore.create(tmp_path / "s", WORDS, dim=8)
    orders = [list(range(n)), list(range(n))[::-1]]
    kills = 0
    while kills < 50:
        writers = [fork.Process(target=write_all, args=(tmp_path / "s", o)) for o in orders]
        for w in writers: w.start()
        time.sleep(rng.uniform(0.005, 0.06))
        victim = writers[kills % 2]
        if victim.is_alive(): os.kill(victim.pid, signal.SIGKILL)
        time.sleep(rng.uniform(0, 0.02))
        for w in writers:
            if w.is_alive(): os.kill(w.pid, signal.SIGKILL)
            w.join()
        kills += 1
        if kills % 10 == 0: assert AssetStore(tmp_path / "s").verify() == []
        # all done already: once more from nothing
        if len(AssetStore(tmp_path / "s")) == n:
            shutil.rmtree(tmp_path / "s")
            AssetStore.create(tmp_path / "s", WORDS, dim=8)
    for o in orders: write_all(tmp_path / "s", o)
    store = AssetStore(tmp_path / "s")
    assert sorted(store.ids) == sorted(f"s{i}" for i in range(n)) and store.verify() == []
    assert all(a == an_asset(int(a.study_id[1:])) for a in store)


def test_merging_beside_a_writer_loses_nothing(tmp_path):
    store = AssetStore.create(tmp_path / "s", WORDS, dim=8)
    writer = fork.Process(target=write_all, args=(tmp_path / "s", list(range(120))))
    writer.start()
    while writer.is_alive(): store.compact(size=50)
    writer.join()
    assert writer.exitcode == 0 and sorted(store.ids) == sorted(f"s{i}" for i in range(120)) and store.verify() == []


def filled(folder):
    store = AssetStore.create(folder, WORDS, dim=8)
    store.append([an_asset(i) for i in range(5)])
    return store


def test_a_file_that_may_not_grow_is_one_line_and_no_damage(tmp_path):
    store = filled(tmp_path / "s")
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(AssetError, match=f"{os.strerror(errno.EFBIG)}.*the store is as it was") as e:
            store.append([an_asset(i, d=8) for i in range(100, 180)])
        with pytest.raises(AssetError, match="the store is as it was"): store.compact()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ("\n" not in str(e.value) and {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before
            and AssetStore(tmp_path / "s").verify() == [])


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 256 kB, mounted for one test."
    place = tmp_path / "disk"
    place.mkdir()
    done = (subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, text=True)
            if shutil.which("mount") else None)
    if done is None or done.returncode:
        pytest.skip("no right to mount a small file system; the file size limit above tests the same lines")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_one_line_and_no_damage(small_disk):
    store, count = filled(small_disk / "s"), 5
    with pytest.raises(AssetError, match=os.strerror(errno.ENOSPC)) as e:
        for start in range(5, 20_000, 200):
            store.append([an_asset(i) for i in range(start, start + 200)])
            count = start + 200
    assert "\n" not in str(e.value)
    again = AssetStore(small_disk / "s")
    assert len(again) == count and again.verify() == [] and not list((small_disk / "s").glob(".*.tmp"))
    with pytest.raises(AssetError, match="the store is as it was"): again.compact()
    assert len(AssetStore(small_disk / "s")) == count and again.verify() == []


def test_a_disk_that_may_only_be_read_is_one_line(small_disk):
    store = filled(small_disk / "s")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    again = AssetStore(small_disk / "s")
    assert len(again) == 5 and again.verify() == [] and again["s3"] == an_asset(3)
    for act in (lambda: again.append([an_asset(9)]), lambda: again.compact()):
        with pytest.raises(AssetError, match=os.strerror(errno.EROFS)) as e: act()
        assert "\n" not in str(e.value)


def test_a_bit_flipped_anywhere_is_found_and_costs_its_own_shard_alone(tmp_path):
    """One flipped bit, at every byte of a shard: verify finds it and names nothing else; no wrong asset is read, and
    the other shard is read as before."""
    store = filled(tmp_path / "s")
    store.append([an_asset(i) for i in range(5, 7)])
    assets, path = list(store), store.shards[1]
    good, rng, own = path.read_bytes(), np.random.default_rng(0), {path.name, "s5", "s6"}
    for at in range(len(good)):
        b = bytearray(good)
        b[at] ^= 1 << rng.integers(8)
        path.write_bytes(b)
        found = AssetStore(tmp_path / "s").verify()
        assert found and {n for n, _ in found} <= own, at
        if at % 20: continue                                                       # the rest at every twentieth
        again = AssetStore(tmp_path / "s")
        assert [again[f"s{i}"] for i in range(5)] == assets[:5]
        for act in (lambda: again["s5"], lambda: again["s6"], lambda: list(again), lambda: again.ids):
            with pytest.raises(AssetError, match="run verify") as e: act()
            assert "\n" not in str(e.value)


def test_damage_to_one_shard_leaves_the_others_readable(tmp_path):
    store = filled(tmp_path / "s")
    store.append([an_asset(i) for i in range(5, 10)])
    path = store.shards[1]
    b = bytearray(path.read_bytes())
    b[len(b) // 3] ^= 1
    path.write_bytes(b)
    again = AssetStore(tmp_path / "s")
    assert again.verify() and all(n == path.name or int(n[1:]) >= 5 for n, _ in again.verify())
    assert again["s2"] == an_asset(2)
    for act in (lambda: again["s7"], lambda: again.ids, lambda: again.append([an_asset(50)])):
        with pytest.raises(AssetError, match="run verify"): act()


def test_swapped_shards_and_foreign_names(tmp_path):
    store = filled(tmp_path / "s")
    store.append([an_asset(i) for i in range(5, 10)])
    one, two = store.shards
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    assert {n for n, _ in AssetStore(tmp_path / "s").verify()} == {one.name, two.name}
    one.write_bytes(a)
    two.write_bytes(b)
    for name in ("shard-000000-000002-zz.parquet", "..", "shard-../../x.parquet", "notes.txt"):
        if "/" not in name and name != "..": (tmp_path / "s" / name).write_bytes(b"x")
    assert AssetStore(tmp_path / "s").verify() == [] and len(AssetStore(tmp_path / "s")) == 10


def test_nothing_leads_out_of_a_store(tmp_path):
    store = filled(tmp_path / "s")
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    for name in ("store.parquet", store.shards[0].name, ".lock"):
        path = tmp_path / "s" / name
        kept = path.read_bytes()
        path.unlink()
        for target in (outside, Path("../outside"), Path("/dev/zero")):
            path.symlink_to(target)
            with pytest.raises(AssetError) as e: AssetStore(tmp_path / "s").append([an_asset(50)])
            assert "\n" not in str(e.value)
            path.unlink()
        path.write_bytes(kept)
    shard = store.shards[0]
    kept = shard.read_bytes()
    shard.unlink()
    shard.mkdir()
    with pytest.raises(AssetError, match="is a link or no file"): AssetStore(tmp_path / "s").ids
    shard.rmdir()
    shard.write_bytes(kept)
    assert (outside.read_bytes() == b"mine" and AssetStore(tmp_path / "s").verify() == []
            and sorted(p.name for p in tmp_path.iterdir()) == ["outside", "s"])


def test_a_codebook_that_is_a_link_is_refused(tmp_path):
    AssetStore.create(
        tmp_path / "s", WORDS, dim=8, codec="pq", book=fit_pq(np.random.default_rng(0).normal(size=(20, 8)), 2))
    as_before(tmp_path / "s")
    book = tmp_path / "s" / "codebook.safetensors"
    book.rename(tmp_path / "book")
    book.symlink_to(tmp_path / "book")
    with pytest.raises(AssetError, match="missing or a link"): AssetStore(tmp_path / "s")


def test_a_study_id_is_a_key_and_never_a_path(tmp_path):
    store = filled(tmp_path / "s")
    odd = ["../../x", "/etc/passwd", "..", "a/b", "C:\\x", "s0/../s1", "%2e%2e%2fx", "~"]
    store.append([replace(an_asset(10), study_id=i) for i in odd])
    assert ([store[i].study_id for i in odd] == odd and AssetStore(tmp_path / "s").verify() == []
            and store.compact() == (2, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["s"] and sorted(p.suffix for p in (tmp_path / "s").iterdir()) == [
        "", ".parquet", ".parquet"]


@pytest.mark.parametrize("limit, value", [("MAX_VALUES", 150), ("MAX_UNFOLDED", 220_000)])
def test_what_is_written_can_be_read_whatever_the_limits(tmp_path, monkeypatch, limit, value):
    """A row group never holds more than its reader allows; formerly 256 studies with large pixels made a shard that
    nobody could read."""
    monkeypatch.setattr(asset_module, limit, value)
    store, assets = AssetStore.create(tmp_path / "s", WORDS, dim=8), [an_asset(i) for i in range(40)]
    store.append(assets)
    shard = store._open(store.shards[0])
    assert (len(shard.groups) >= 3 and list(AssetStore(tmp_path / "s")) == assets and store.verify() == []
            and store["s39"] == assets[39])
    monkeypatch.setattr(asset_module, "MAX_UNFOLDED", 200_500)
    with pytest.raises(AssetError, match="study s50 takes .* bytes"): store.append([an_asset(50)])


# what a store remembers

KEY = b"0123456789abcdef"
KNOWN = dict(key=key_check(), keep=3, thumbnail=0, pixels=False, hidden=[0, 11], precision="float32",
             datasets=["folder 0f3a9c11"])


def keyed(i, secret=KEY): return replace(an_asset(i), study_id=keyed_id(f"s{i}", secret))


def remembering(folder, **over):
    return AssetStore.create(
        folder, WORDS, dim=8, provenance={"model_hash": "a" * 16, "fusion": "grounding"}, settings={**KNOWN, **over})


def test_settings_are_kept_through_every_way_of_opening(tmp_path):
    store = remembering(tmp_path / "s")
    store.append([an_asset(i) for i in (1, 2)])
    store.append([an_asset(3)])
    store.compact()
    for again in (store, AssetStore(tmp_path / "s"), pickle_round(store)):
        assert {n: again.settings[n] for n in KNOWN} == KNOWN
        assert (again.settings["network"], again.settings["track"], again.settings["codec"],
                again.settings["vocabulary"]) == ("a" * 16, "image+report", "int8", vocabulary_hash(WORDS))
        # unknown is told apart from none
        assert again.settings["guide"] is None and again.settings["selection"] is None


def pickle_round(store):
    "As a worker process opens a store again."
    make, arguments = store.__reduce__()
    return make(*arguments)


@pytest.mark.parametrize(
    "other, said",
    [(dict(key=key_check(KEY)), f"key none, now {key_check(KEY)}"), (dict(keep=4), "keep 3, now 4"),
     (dict(thumbnail=450), "thumbnail 0, now 450"), (dict(pixels=True), "pixels no, now yes"),
     (dict(hidden=[]), "hidden 0, 11, now none"), (dict(precision="bfloat16"), "precision float32, now bfloat16"),
     (dict(network="b" * 16), f"network {'a' * 16}, now {'b' * 16}"), (dict(track="image-only"), "track"),
     (dict(codec="pq"), "codec int8, now pq"), (dict(codebook="c" * 16), "codebook none, now"),
     (dict(fusion="none"), "fusion grounding, now none"), (dict(vocabulary="d" * 16), "vocabulary")],
)
def test_going_on_with_another_setting_is_refused_by_name(tmp_path, other, said):
    store = remembering(tmp_path / "s")
    before = bytes_of(tmp_path / "s")
    with pytest.raises(AssetError) as e: store.check({**KNOWN, **other})
    assert said in str(e.value) and "\n" not in str(e.value) and bytes_of(tmp_path / "s") == before
    store.check(KNOWN)
    store.check({})


def bytes_of(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_several_differences_are_one_line(tmp_path):
    with pytest.raises(AssetError, match="keep 3, now 4; thumbnail 0, now 9; pixels no, now yes"):
        remembering(tmp_path / "s").check(dict(keep=4, thumbnail=9, pixels=True, precision="float32"))
    with pytest.raises(AssetError, match="no such setting: colour"):
        remembering(tmp_path / "t").check(dict(colour="blue"))


def test_a_keyed_store_takes_no_plain_id_whatever_is_called_on_it(tmp_path):
    store = remembering(tmp_path / "s", key=key_check(KEY))
    store.append([keyed(i) for i in range(3)])
    held = bytes_of(tmp_path / "s")
    wire = StudyAsset.from_bytes(an_asset(7).to_bytes())
    for act in (lambda: store.append([an_asset(7)]), lambda: store.append([keyed(7), an_asset(8)]),
                lambda: store.append([an_asset(7)], again="skip"), lambda: AssetStore(tmp_path / "s").append([wire]),
                lambda: store.append(iter([wire]))):
        with pytest.raises(AssetError, match="holds keyed study ids, and 1 of these") as e: act()
        assert "s7" not in str(e.value) and bytes_of(tmp_path / "s") == held
    store.append([keyed(7)])
    store.compact()
    assert all(is_keyed(i) for i in AssetStore(tmp_path / "s").ids) and store.verify() == []
    everything = b"".join(n.encode() + b for n, b in bytes_of(tmp_path / "s").items())
    assert KEY not in everything and KEY.hex().encode() not in everything


def test_a_plain_store_takes_no_keyed_id(tmp_path):
    store = remembering(tmp_path / "s")
    store.append([an_asset(1)])
    with pytest.raises(AssetError, match="holds plain study ids, and 1 of these 2 is keyed"):
        store.append([an_asset(2), keyed(3)])
    assert store.ids == ["s1"]


@pytest.mark.parametrize("first, second", [(an_asset, keyed), (keyed, an_asset)])
def test_a_store_that_knows_no_key_is_no_mixture_either(tmp_path, first, second):
    "Stores from before, and those made in Python without settings: the ids themselves tell."
    AssetStore.create(tmp_path / "s", WORDS, dim=8).append([first(1)])
    for store in (AssetStore(tmp_path / "s"), as_before(tmp_path / "s")):
        assert store.settings["key"] is None
        with pytest.raises(AssetError, match="study ids"): store.append([second(2)])
    empty = AssetStore.create(tmp_path / "t", WORDS, dim=8)
    with pytest.raises(AssetError, match="1 of these 2"): empty.append([first(1), second(2)])
    assert empty.ids == []


def test_a_mixture_from_before_is_named_by_verify_and_not_merged(tmp_path, monkeypatch):
    store = AssetStore.create(tmp_path / "s", WORDS, dim=8)
    store.append([keyed(1)])
    with monkeypatch.context() as m:
        m.setattr(AssetStore, "_alike", lambda *_: None)
        store.append([an_asset(2)])
    (name, why), = AssetStore(tmp_path / "s").verify()
    assert name == "s" and "1 of its 2 study ids is plain" in why
    with pytest.raises(AssetError, match="study ids"): store.compact()
    assert len(AssetStore(tmp_path / "s").shards) == 2


@pytest.mark.parametrize(
    "wanted, said",
    [(dict(key=key_check(KEY)), "key none, now"), (dict(keep=5), "keep 3, now 5"),
     (dict(thumbnail=450), "thumbnail 0, now 450"), (dict(pixels=True), "pixels no, now yes")],
)
def test_what_an_old_store_does_not_say_its_studies_show(tmp_path, wanted, said):
    filled(tmp_path / "s")
    store = as_before(tmp_path / "s")
    assert all(store.settings[n] is None for n in wanted)
    with pytest.raises(AssetError, match=said): store.check(wanted)
    # the rest it cannot know
    store.check(dict(key="none", keep=3, thumbnail=0, pixels=False, hidden=[5], precision="bfloat16"))
    store.append([an_asset(99)])
    assert len(store) == 6 and store.head.name == "store.json" and store.verify() == []
    store.compact()
    assert (store.head.name == "store.parquet" and not (tmp_path / "s" / "store.json").exists()
            and len(AssetStore(tmp_path / "s")) == 6)


@pytest.mark.parametrize(
    "over, said",
    [
        (
            dict(patches=[1, 2], relevance=[0.1, 0.2], features=np.ones((2, 8))),
            "keep is 2, this store was begun with 3"),
        (dict(patches=[0, 5, 6]), "retains patch 0, which this store hides"),
    ],
)
def test_an_asset_that_does_not_keep_to_the_settings_is_refused(tmp_path, over, said):
    store = remembering(tmp_path / "s")
    bare = replace(an_asset(1), grounding=(), weights=())
    with pytest.raises(AssetError, match=said): store.append([replace(bare, **{"features": bare.features, **over})])
    assert store.ids == []


def test_pictures_are_those_the_store_was_begun_with(tmp_path):
    from neural.picture import thumbnail
    small = thumbnail(np.random.default_rng(0).random((1, 96, 96), np.float32), 450, "webp", 96)
    without, with_them = remembering(tmp_path / "s"), remembering(tmp_path / "t", thumbnail=450)
    with pytest.raises(AssetError, match="thumbnail is [0-9]+, this store was begun with 0"):
        without.append([replace(an_asset(1), thumbnail=small)])
    with pytest.raises(AssetError, match="thumbnail is 0, this store was begun with 450"):
        with_them.append([an_asset(1)])
    with_them.append([replace(an_asset(1), thumbnail=small)])
    assert with_them.verify() == []


@pytest.mark.parametrize("bad", [b"", b"short", "a key of some length", None.__class__])
def test_an_empty_key_is_no_key(bad):
    for act in (lambda: key_check(bad), lambda: keyed_id("s1", bad)):
        with pytest.raises(AssetError, match="at least 16 bytes"): act()


# a folder that other tools open

@pytest.mark.parametrize("codec", ["int8", "pq"])
def test_pandas_arrow_and_duckdb_open_the_folder_by_its_path(tmp_path, codec):
    book = fit_pq(np.random.default_rng(0).normal(size=(300, 8)), 4) if codec == "pq" else None
    store = AssetStore.create(tmp_path / "s", WORDS, dim=8, codec=codec, book=book)
    ids = lambda: (list(pd.read_parquet(tmp_path / "s")["study_id"]),
                   ds.dataset(tmp_path / "s").to_table()["study_id"].to_pylist(),
                   [r[0] for r in duckdb.sql(f"select study_id from '{tmp_path}/s/*.parquet'").fetchall()])
    assert all(found == [] for found in ids())                                    # an empty one, too
    for part in (range(3), range(3, 5)): store.append([replace(an_asset(i), codec=codec, book=book) for i in part])
    assert all(sorted(found) == sorted(store.ids) == [f"s{i}" for i in range(5)] for found in ids())
    store.compact()
    assert all(sorted(found) == sorted(store.ids) for found in ids()) and {
        p.suffix for p in (tmp_path / "s").iterdir() if p.stat().st_size} == {".parquet"}


def test_what_a_killed_writer_left_is_gone_after_the_next_one(tmp_path):
    store = filled(tmp_path / "s")
    shard = store.shards[0]
    (tmp_path / "s" / ".shard-000000-000001-aaaaaaaaaaaaaaaa.parquet.9.tmp").write_bytes(b"PAR1 half")
    (tmp_path / "s" / ".store.parquet.9.tmp").write_bytes(b"PAR1 half")
    # of a merge that did not come to its end
    (tmp_path / "s" / shard.name.replace("shard-000000", "shard-000001")).write_bytes(shard.read_bytes())
    (tmp_path / "s" / "mine.csv").write_text("a,b\n")
    store.append([an_asset(50)])
    assert (sorted(p.name for p in (tmp_path / "s").iterdir())
            == sorted([".lock", "mine.csv", *(p.name for p in store.files)]) and store.verify() == [])


# the system's reasons

class Failing:
    "A system call that fails with one reason, for paths whose name matches."
    def __init__(self, real, number, name): self.real, self.number, self.name = real, number, name
    def __call__(self, path, *args, **kwargs):
        if self.name in str(path): raise OSError(self.number, os.strerror(self.number), str(path))
        return self.real(path, *args, **kwargs)


@pytest.mark.parametrize(
    "number, advice",
    [(errno.ENOLCK, "local disk"), (errno.EIO, "the disk or the network failed"),
     (errno.EOPNOTSUPP, "name another place")],
)
def test_a_disk_without_locks_is_one_line(tmp_path, monkeypatch, number, advice):
    store = filled(tmp_path / "s")
    before = bytes_of(tmp_path / "s")
    def refuse(*_): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(asset_module.fcntl, "flock", refuse)
    for act in (lambda: store.append([an_asset(9)]), lambda: store.compact(),
                lambda: store.add_dataset("folder 0f3a9c11")):
        with pytest.raises(
            AssetError, match=f"s cannot be locked for writing, {re.escape(os.strerror(number))}.*{advice}") as e:
            act()
        assert "\n" not in str(e.value) and bytes_of(tmp_path / "s") == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_every_failing_write_is_one_line_and_no_trace(tmp_path, monkeypatch, number, call):
    store = filled(tmp_path / "s")
    store.append([an_asset(60)])
    before = bytes_of(tmp_path / "s")
    def refuse(*_): raise OSError(number, os.strerror(number))
    for act in (lambda: store.append([an_asset(9)]), lambda: store.compact(),
                lambda: AssetStore.create(tmp_path / "new", WORDS)):
        with monkeypatch.context() as m:
            m.setattr(asset_module.os, call, refuse)
            with pytest.raises(AssetError, match=re.escape(os.strerror(number))) as e: act()
        assert "\n" not in str(e.value) and bytes_of(tmp_path / "s") == before and not (tmp_path / "new").exists()
    assert AssetStore(tmp_path / "s").verify() == []


def test_the_first_reason_is_told_even_if_cleaning_up_fails_too(tmp_path, monkeypatch):
    store = filled(tmp_path / "s")
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    def gone(*_, **__): raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(asset_module.os, "fsync", full)
    monkeypatch.setattr(Path, "unlink", gone)
    with pytest.raises(AssetError, match=os.strerror(errno.ENOSPC)): store.append([an_asset(9)])


def test_a_disk_that_cannot_confirm_a_folder_keeps_what_is_written(tmp_path, monkeypatch):
    "Some network disks know no fsync of a folder; the shard is there all the same. One that fails says that it is."
    store, real = filled(tmp_path / "s"), os.fsync
    for number, refused in ((errno.EINVAL, False), (errno.EIO, True)):
        def fsync(handle):
            if os.path.isdir(f"/proc/self/fd/{handle}"): raise OSError(number, os.strerror(number))
            real(handle)
        monkeypatch.setattr(asset_module.os, "fsync", fsync)
        if refused:
            with pytest.raises(AssetError, match="is written, but the disk did not confirm it, Input/output error"):
                store.append([an_asset(70)])
        else: store.append([an_asset(60)])
        monkeypatch.undo()
    assert {"s60", "s70"} <= set(AssetStore(tmp_path / "s").ids) and AssetStore(tmp_path / "s").verify() == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_shard_that_the_system_does_not_give_is_not_called_damaged(tmp_path, monkeypatch, number):
    store = filled(tmp_path / "s")
    monkeypatch.setattr(asset_module, "open", Failing(open, number, "shard-"), raising=False)
    for act in (lambda: AssetStore(tmp_path / "s").ids, lambda: list(AssetStore(tmp_path / "s")),
                lambda: AssetStore(tmp_path / "s")["s1"]):
        with pytest.raises(AssetError, match=f"cannot be read, {re.escape(os.strerror(number))}") as e: act()
        assert "damaged" not in str(e.value)
    assert [why for _, why in AssetStore(tmp_path / "s").verify() if os.strerror(number) in why]


def test_places_that_are_no_store_are_refused_and_left_as_they_are(tmp_path):
    file, full, link = tmp_path / "file", tmp_path / "full", tmp_path / "link"
    file.write_text("mine")
    full.mkdir()
    (full / "film.png").write_bytes(b"mine")
    link.symlink_to(tmp_path / "nowhere")
    for place in (file, full, link):
        with pytest.raises(AssetError, match="not empty"): AssetStore.create(place, WORDS)
        with pytest.raises(AssetError, match="is not an asset store"): AssetStore(place)
    assert (file.read_text() == "mine" and [p.name for p in full.iterdir()] == ["film.png"]
            and not (tmp_path / "nowhere").exists())
    # of a writer killed while it began
    left = tmp_path / "left"
    left.mkdir()
    (left / ".store.parquet.77.tmp").write_bytes(b"PAR1")
    (left / ".lock").touch()
    AssetStore.create(left, WORDS, dim=8).append([an_asset(1)])
    assert AssetStore(left).verify() == []
