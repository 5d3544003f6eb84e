"Ray's workers build what one process builds, byte for byte, and a worker that is killed costs nothing."
import contextlib
import os
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

import neural.cluster as cluster_module
from neural.asset import is_keyed, keyed_id
from neural.build import Aggregation, Packing, build_store, save_aggregation
from neural.cluster import build_on_cluster
from neural.cohort import write_cohort
from neural.layouts import index_dataset
from neural.report import train_tokenizer
from neural.study import Manifest, NeuralError, report_text
from neural.vlm import ReportVLM, small_config

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    "Two dozen studies, one of them without its film, and an untaught network."
    home = tmp_path_factory.mktemp("cluster")
    write_cohort(home / "data", studies=24, size=64, seed=4, workers=0)
    manifest, _ = index_dataset("mimic-cxr", home / "data", labels="truth/labels.csv")
    torch.manual_seed(0)
    tokenizer = train_tokenizer([report_text(manifest, s) for s in manifest], 300)
    for part in (ReportVLM(small_config(len(tokenizer), 96, width=64, d_model=64, layers=1)), tokenizer):
        part.save_pretrained(home / "vlm")
    save_aggregation(home / "vlm", Aggregation(lift=False), None, 4, 40)
    manifest.image_path(list(manifest)[5].frontal).write_bytes(b"no film")
    return home, manifest


def files(store): return {p.name: p.read_bytes() for p in store.folder.iterdir() if not p.name.startswith(".")}


def workers():
    "The workers that Ray runs below this process."
    named = lambda p: (p.cmdline() or [""])[0].startswith("ray::MapWorker")
    found = []
    for p in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess): found += [p] if named(p) else []
    return found


def test_a_store_begun_here_is_finished_there_though_a_worker_is_killed(cohort, tmp_path):
    home, manifest = cohort
    packing = Packing(thumbnail=300, secret=b"sixteen bytes or more")
    alone, missing = build_store(manifest, tmp_path / "alone", home / "vlm", "image-only", batch_size=2, workers=0,
                                 packing=packing)
    together, killed, built = tmp_path / "together", [], threading.Event()
    together.mkdir()
    begun = ["store.parquet", *[n for n in sorted(files(alone)) if n.startswith("shard")][:2]]
    for name in begun: (together / name).write_bytes((alone.folder / name).read_bytes())

    def kill():
        "The first worker there is, once the store has begun to grow, however long Ray takes to start."
        while not built.wait(0.01):
            if len(list(together.glob("shard-*.parquet"))) >= len(begun) and (found := workers()):
                found[0].kill()
                return killed.append(found[0].pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try: store, left_out = build_on_cluster(manifest, together, home / "vlm", "image-only", batch_size=2, workers=2,
                                            packing=packing)
    finally: built.set()
    thread.join()
    assert killed, "no worker was there to be killed: the test tested nothing"
    assert files(store) == files(alone) and list(left_out) == list(missing) and len(left_out) >= 1
    assert store.verify() == [] and len(store) + len(left_out) == len(manifest)


def test_without_ray_one_line_says_what_to_do(cohort, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NeuralError, match="pip install"): build_on_cluster(cohort[1], tmp_path / "s", cohort[0] / "vlm")


# a home folder that nobody can write

BUILD = """
import sys
from neural.cluster import build_on_cluster
from neural.study import Manifest
manifest, folder, vlm = Manifest.load(sys.argv[1]), sys.argv[2], sys.argv[3]
store, left = build_on_cluster(manifest, folder, vlm, "image-only", batch_size=2, workers=1)
print(len(store), len(left))
"""


def test_ray_needs_no_home_folder(cohort, tmp_path):
    home, manifest = cohort
    (tmp_path / "file").write_text("no folder")
    Manifest(list(manifest)[:4], manifest.root, manifest.layout).save(tmp_path / "m.csv")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", BUILD, "m.csv", "s", str(home / "vlm")], cwd=tmp_path,
                          env=clean | {"HOME": str(tmp_path / "file/home")}, capture_output=True, text=True,
                          timeout=240)
    assert (done.returncode, done.stdout.strip()) == (0, "4 0"), done.stderr[-2000:]


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    "A home folder without a token, and none in a variable; the session that Ray is asked for, and its token."
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: asked.append(os.environ.get("RAY_AUTH_TOKEN")))
    monkeypatch.setattr("ray.init", lambda **options: asked.append((os.environ.get("RAY_AUTH_TOKEN"), options)))
    return asked


def test_a_session_of_our_own_has_a_token_that_lies_in_no_file(nobody, tmp_path):
    # the second session of a process talks to Ray by the same token
    for _ in range(2):
        with cluster_module.ray_session(3): pass
    (first, options), last, (second, _), _ = nobody
    assert (first == last == second and len(first) == 64 and options["num_cpus"] == 3
            and "RAY_AUTH_TOKEN" not in os.environ and list(tmp_path.iterdir()) == [])


@pytest.mark.parametrize("where", ["variable", "path", "file"])
def test_a_token_of_the_user_is_used_as_it_is(nobody, monkeypatch, tmp_path, where):
    if where == "variable": monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    if where == "path": monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "t"))
    if where == "file":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("mine")
    before = dict(os.environ)
    with cluster_module.ray_session(1): pass
    assert nobody[0][0] == ("mine" if where == "variable" else None) and {
        k: v for k, v in os.environ.items() if "AUTH" in k} == {k: v for k, v in before.items() if "AUTH" in k}


def test_a_cluster_that_is_named_keeps_its_own_rules(nobody, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with cluster_module.ray_session(1): pass
    assert nobody[0][0] is None and "num_cpus" not in nobody[0][1]


# the driver, its workers in this process

class Here:
    "As much of Ray as the driver asks for, without another process."
    def __init__(self): self.data, self.context = self, SimpleNamespace(execution_options=SimpleNamespace())
    def ActorPoolStrategy(self, size): return size
    def range(self, n, override_num_blocks):
        self.n = n
        return self
    def flat_map(self, worker, fn_constructor_args, **_):
        self.worker = worker(*fn_constructor_args)
        return self
    def iter_rows(self): return (row for n in range(self.n) for row in self.worker({"id": n}))


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(cluster_module, "ray_session", lambda workers: contextlib.nullcontext(Here()))


def test_a_store_is_gone_on_with_elsewhere_as_it_was_begun_or_not_at_all(cohort, tmp_path, here):
    home, manifest = cohort
    packing = Packing(secret=b"sixteen bytes or more", never=(0, 11))
    first, _ = build_store(Manifest(list(manifest)[:4], manifest.root, manifest.layout), tmp_path / "s", home / "vlm",
                           packing=packing, workers=0)
    before = files(first)
    for other, said in ((dict(), "key [0-9a-f]{16}, now none; hidden 0, 11, now none"),
                        (dict(packing=replace(packing, thumbnail=300)), "thumbnail 0, now 300"),
                        (dict(packing=packing, keep=0.2), "keep [0-9]+, now 29"),
                        (dict(packing=packing, keep=0), "keep ratio"),
                        (dict(packing=packing, precision="bfloat16"), "precision float32, now bfloat16"),
                        (dict(packing=packing, workers=0), "at least one process"),
                        (dict(packing=packing, batch_size=0), "one study per pass")):
        with pytest.raises(NeuralError, match=said): build_on_cluster(manifest, tmp_path / "s", home / "vlm", **other)
        assert files(first) == before
    store, _ = build_on_cluster(manifest, tmp_path / "s", home / "vlm", packing=packing)
    whole, _ = build_store(manifest, tmp_path / "whole", home / "vlm", packing=packing, workers=0)
    assert (sorted(store.ids) == sorted(whole.ids) and all(is_keyed(i) for i in store.ids)
            and all(store[i] == whole[i] for i in whole.ids) and store.settings == whole.settings)


def test_what_cannot_be_read_elsewhere_is_left_out_by_the_name_it_would_have_had(cohort, tmp_path, here):
    home, manifest = cohort
    key = b"sixteen bytes or more"
    studies = [replace(s, views=(replace(s.frontal, image=s.frontal.image + ".gone"),)) if i < 2 else s
               for i, s in enumerate(manifest)]
    _, plain = build_on_cluster(Manifest(studies, manifest.root, manifest.layout), tmp_path / "s", home / "vlm")
    _, keyed = build_on_cluster(
        Manifest(studies, manifest.root, manifest.layout), tmp_path / "t", home / "vlm", packing=Packing(secret=key))
    gone, lost = [*studies[:2], studies[5]], lambda left: [r for r in left if r[1] == "film not readable"]
    assert {i for i, *_ in lost(plain)} == {s.study_id for s in gone} and {i for i, *_ in lost(keyed)} == {
        keyed_id(s.study_id, key) for s in gone}
    assert sum(".gone" in d for *_, d in lost(plain)) == 2 and not any(
        ".gone" in d or i in d for *_, d in lost(keyed) for i in [s.study_id for s in studies])
