"The store under fire: two writers killed at random moments, a full disk, a disk that may only be read, a bit flipped anywhere."
import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import neural.asset as asset_module
from neural.codec import book_bytes
from neural.asset import AssetError, AssetStore, StudyAsset, vocabulary_hash

WORDS = ("lung", "pneumonia")
fork = multiprocessing.get_context("fork")


def as_before(folder):
    "A store with the head that stores had before: JSON without settings, and a codebook in a file of its own."
    store = AssetStore(folder)
    Path(folder, "store.json").write_text(json.dumps({k: v for k, v in store.meta.items() if k != "settings"}, indent=1))
    if store.book: Path(folder, "codebook.safetensors").write_bytes(book_bytes(store.book))
    Path(folder, "store.parquet").unlink()
    return AssetStore(folder)


PROVENANCE = {"vocabulary_hash": vocabulary_hash(WORDS)}


def an_asset(i, d=8):
    rng = np.random.default_rng(i)
    return StudyAsset(f"s{i}", "image+report", (12, 12), np.sort(rng.choice(144, 3, replace=False)), rng.random(3), rng.normal(size=(3, d)), [0, 1], [0, 2], [[1, 0, 0]], [[1, 2]], [1.0], PROVENANCE)


def write_all(folder, order, size=4):
    "A builder: what is missing, a few at a time, in its own order."
    store = AssetStore(folder)
    todo = [i for i in order if f"s{i}" not in store]
    for start in range(0, len(todo), size): store.append([an_asset(i) for i in todo[start : start + size]], again="skip")


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
        if len(AssetStore(tmp_path / "s")) == n: shutil.rmtree(tmp_path / "s"); AssetStore.create(tmp_path / "s", WORDS, dim=8)      # all done already: once more from nothing
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
        with pytest.raises(AssetError, match=f"{os.strerror(errno.EFBIG)}.*the store is as it was") as e: store.append([an_asset(i, d=8) for i in range(100, 180)])
        with pytest.raises(AssetError, match="the store is as it was"): store.compact()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(e.value) and {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before and AssetStore(tmp_path / "s").verify() == []


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 256 kB, mounted for one test."
    place = tmp_path / "disk"; place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode: pytest.skip("no right to mount a small file system; the file size limit above tests the same lines")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_one_line_and_no_damage(small_disk):
    store, count = filled(small_disk / "s"), 5
    with pytest.raises(AssetError, match=os.strerror(errno.ENOSPC)) as e:
        for start in range(5, 20_000, 200): store.append([an_asset(i) for i in range(start, start + 200)]); count = start + 200
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
    "One flipped bit, at every byte of a shard: verify finds it and names nothing else; no wrong asset is read, and the other shard is read as before."
    store = filled(tmp_path / "s")
    store.append([an_asset(i) for i in range(5, 7)])
    assets, path = list(store), store.shards[1]
    good, rng, own = path.read_bytes(), np.random.default_rng(0), {path.name, "s5", "s6"}
    for at in range(len(good)):
        b = bytearray(good); b[at] ^= 1 << rng.integers(8); path.write_bytes(b)
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
    b = bytearray(path.read_bytes()); b[len(b) // 3] ^= 1; path.write_bytes(b)
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
    one.write_bytes(b); two.write_bytes(a)
    assert {n for n, _ in AssetStore(tmp_path / "s").verify()} == {one.name, two.name}
    one.write_bytes(a); two.write_bytes(b)
    for name in ("shard-000000-000002-zz.parquet", "..", "shard-../../x.parquet", "notes.txt"):
        if "/" not in name and name != "..": (tmp_path / "s" / name).write_bytes(b"x")
    assert AssetStore(tmp_path / "s").verify() == [] and len(AssetStore(tmp_path / "s")) == 10


def test_nothing_leads_out_of_a_store(tmp_path):
    store = filled(tmp_path / "s")
    outside = tmp_path / "outside"; outside.write_bytes(b"mine")
    for name in ("store.parquet", store.shards[0].name, ".lock"):
        path = tmp_path / "s" / name; kept = path.read_bytes(); path.unlink()
        for target in (outside, Path("../outside"), Path("/dev/zero")):
            path.symlink_to(target)
            with pytest.raises(AssetError) as e: AssetStore(tmp_path / "s").append([an_asset(50)])
            assert "\n" not in str(e.value)
            path.unlink()
        path.write_bytes(kept)
    shard = store.shards[0]; kept = shard.read_bytes(); shard.unlink(); shard.mkdir()
    with pytest.raises(AssetError, match="is a link or no file"): AssetStore(tmp_path / "s").ids
    shard.rmdir(); shard.write_bytes(kept)
    assert outside.read_bytes() == b"mine" and AssetStore(tmp_path / "s").verify() == [] and sorted(p.name for p in tmp_path.iterdir()) == ["outside", "s"]


def test_a_codebook_that_is_a_link_is_refused(tmp_path):
    from neural.codec import fit_pq
    AssetStore.create(tmp_path / "s", WORDS, dim=8, codec="pq", book=fit_pq(np.random.default_rng(0).normal(size=(20, 8)), 2))
    as_before(tmp_path / "s"); book = tmp_path / "s" / "codebook.safetensors"; book.rename(tmp_path / "book"); book.symlink_to(tmp_path / "book")
    with pytest.raises(AssetError, match="missing or a link"): AssetStore(tmp_path / "s")


def test_a_study_id_is_a_key_and_never_a_path(tmp_path):
    store = filled(tmp_path / "s")
    odd = ["../../x", "/etc/passwd", "..", "a/b", "C:\\x", "s0/../s1", "%2e%2e%2fx", "~"]
    store.append([replace(an_asset(10), study_id=i) for i in odd])
    assert [store[i].study_id for i in odd] == odd and AssetStore(tmp_path / "s").verify() == [] and store.compact() == (2, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["s"] and sorted(p.suffix for p in (tmp_path / "s").iterdir()) == ["", ".parquet", ".parquet"]


@pytest.mark.parametrize("limit, value", [("MAX_VALUES", 150), ("MAX_UNFOLDED", 220_000)])
def test_what_is_written_can_be_read_whatever_the_limits(tmp_path, monkeypatch, limit, value):
    "A row group never holds more than its reader allows; formerly 256 studies with large pixels made a shard that nobody could read."
    monkeypatch.setattr(asset_module, limit, value)
    store, assets = AssetStore.create(tmp_path / "s", WORDS, dim=8), [an_asset(i) for i in range(40)]
    store.append(assets)
    shard = store._open(store.shards[0])
    assert len(shard.groups) >= 3 and list(AssetStore(tmp_path / "s")) == assets and store.verify() == [] and store["s39"] == assets[39]
    monkeypatch.setattr(asset_module, "MAX_UNFOLDED", 200_500)
    with pytest.raises(AssetError, match="study s50 takes .* bytes"): store.append([an_asset(50)])
