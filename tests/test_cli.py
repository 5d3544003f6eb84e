"The `neural` command from a real shell: exit status, one line per error, quiet in a pipe."
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"
COMMAND = [sys.executable, "-c", "from neural.cli import main; main()"]


def alone(*words, cwd, **env) -> subprocess.CompletedProcess:
    "The command from nothing, with all its imports."
    return subprocess.run(
        [*COMMAND, *map(str, words)], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})


@pytest.fixture(scope="module")
def neural():
    "The command in a process of its own, forked from one that has imported (Linux); elsewhere from nothing."
    if sys.platform != "linux":
        yield alone
        return
    from hazards import Nursery
    nursery = Nursery()
    def run(*words, cwd):
        said = nursery.run(*words, cwd=cwd, seconds=600)
        return subprocess.CompletedProcess(["neural", *words], said["status"], said["out"], said["err"])
    yield run
    nursery.close()


def test_help_names_every_command(tmp_path):
    said = alone("--help", cwd=tmp_path)
    assert said.returncode == 0 and said.stderr == ""
    for name in ("phantom", "index", "run", "build", "scorers", "baseline", "codebook", "predict", "verify", "compact",
                 "inspect", "explore", "describe", "bench"):
        assert f"\n  {name} " in said.stdout, f"`neural {name}` is missing"


def test_every_command_explains_itself():
    from typer.testing import CliRunner
    from neural.cli import app
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        said = CliRunner().invoke(app, [name, "--help"], prog_name="neural")
        assert said.exit_code == 0 and said.stderr == "" and f"Usage: neural {name} " in said.stdout, name


@pytest.mark.parametrize(
    "words",
    [["run", "--preset", ""], ["run", "--preset="], ["run", "--run", ""], ["run", "--root", ""],
     ["run", "--images", ""], ["run", ""], ["index", "folder", ""], ["index", "folder", ".", "-o", ""],
     ["phantom", ""], ["build", "", "store", "--vlm", "."], ["predict", ".", "--classifier", ""],
     ["bench", "read", "--out", ""], ["inspect", ".", "s1", "--html="], ["publish", ".", "--figures", ""]],
)
def test_an_empty_word_is_not_a_word_left_out(tmp_path, monkeypatch, words):
    from typer.testing import CliRunner
    from neural.cli import app
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, words, prog_name="neural")
    assert (said.exit_code == 2 and said.stdout == "" and len(said.stderr.splitlines()) == 1
            and "variable is not set" in said.stderr), said.stderr
    assert list(tmp_path.iterdir()) == []


def chained(error, cause):
    "An error that a library made of another."
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/x.csv"),
         "a/x.csv: No space left on device; free some space"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "draft", None, "x.csv"),
         "x.csv: Invalid cross-device link; "),
        (PermissionError(errno.EACCES, "Permission denied", b"x.csv"), "x.csv: Permission denied; ask its owner"),
        (OSError(errno.ENOLCK, "No locks available"), "No locks available; this file system grants no locks"),
        (OSError("With tag (7FE0,0010) got exception: [Errno 28] No space left on device\nTraceback"),
         "No space left on device; free some space"),
        (RuntimeError("Error while serializing: I/O error: Read-only file system (os error 30)"),
         "Read-only file system; "),
        (chained(ValueError("write failed"), OSError(errno.EIO, "Input/output error", "x.parquet")),
         "x.parquet: Input/output error; "),
        (MemoryError(), "memory ran out; "),
        (RecursionError("maximum recursion depth exceeded"), "something that was read is nested too deeply"),
        (ModuleNotFoundError("No module named 'ray'", name="ray"), "ray is not installed; "),
        (json.JSONDecodeError("Expecting value", "", 0), "a file that was read is damaged"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid continuation byte"), "a file that was read is damaged"),
    ],
)
def test_what_comes_from_outside_is_one_plain_line(error, line, capsys, monkeypatch):
    import typer
    from neural.cli import one_line
    monkeypatch.delenv("NEURAL_DEBUG", raising=False)
    with pytest.raises(typer.Exit) as left, one_line(): raise error
    said = capsys.readouterr()
    assert (left.value.exit_code == 1 and said.out == "" and said.err.startswith(f"neural: {line}")
            and len(said.err.splitlines()) == 1), said.err
    assert "unexpected" not in said.err and "Traceback" not in said.err


def test_libraries_errors_are_told_by_what_they_are(tmp_path):
    import pyarrow.parquet
    import safetensors
    import yaml
    from filelock import FileLock, Timeout
    from neural.cli import plain_line
    (tmp_path / "x").write_bytes(b"not what it seems")
    def of(call):
        with pytest.raises(Exception) as raised: call()
        return plain_line(raised.value)
    assert "damaged" in of(lambda: pyarrow.parquet.read_table(tmp_path / "x"))
    assert "damaged" in of(lambda: safetensors.safe_open(tmp_path / "x", "numpy"))
    assert "damaged" in of(lambda: yaml.safe_load("a: [1"))
    assert "Is a directory" in of(lambda: open(tmp_path)) and str(tmp_path) in of(lambda: open(tmp_path))
    with FileLock(tmp_path / "lock"):
        assert "another process holds the lock" in plain_line(Timeout(str(tmp_path / "lock")))


INTERRUPTED = (
    "import neural.cohort\ndef stop(*a, **k): raise KeyboardInterrupt\nneural.cohort.write_cohort = stop\nfrom"
    " neural.cli import main; main()")


def test_ctrl_c_is_quiet(tmp_path):
    said = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "phantom", "cohort"], cwd=tmp_path, capture_output=True, text=True)
    assert (said.returncode, said.stdout, said.stderr) == (130, "", "")


def test_a_reader_that_has_gone_is_no_error_of_ours(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    said = subprocess.run([*COMMAND, "--version"], cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert said.returncode == 1 and said.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        said = subprocess.run([*COMMAND, "--version"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (said.returncode == 1 and said.stderr.startswith("neural: No space left on device; ")
            and len(said.stderr.splitlines()) == 1)


@pytest.mark.parametrize(
    "words",
    [["--bogus"], ["frobnicate"], ["phantom"], ["phantom", "out", "--studies", "none"],
     ["phantom", "out", "--studies", "0"], ["index", "dicomdir", "."], ["index", "folder", "not-here"],
     ["run", "-p", "nothing"], ["verify", "not-here"], ["inspect", "."]],
)
def test_a_wrong_call_is_status_2_and_one_line(neural, tmp_path, words):
    said = neural(*words, cwd=tmp_path)
    assert (said.returncode == 2 and said.stdout == "" and len(said.stderr.strip().splitlines()) == 1
            and "--help" in said.stderr), said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words, why", [
    (["run", "--preset", "huge"], "no preset called 'huge'"), (["run", "nowhere"], "no stage called nowhere"),
    (["run", "-p", "cuont=3"], "did you mean count?"), (["run", "--manifest", "gone.csv"], "no manifest at gone.csv"),
    (["run", "--run", "taken"], "not a run folder"), (["verify", "taken"], "not an asset store"),
    (["inspect", "taken", "s1"], "not an asset store"), (["index", "mimic-cxr", "taken"], "")])
def test_a_refusal_is_status_1_and_one_line(neural, tmp_path, words, why):
    shutil.copytree(FIXTURES / "stages", tmp_path / "nbs/paper")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/film.png").write_bytes(b"x")
    said = neural(*words, cwd=tmp_path)
    assert (said.returncode == 1 and said.stdout == "" and len(said.stderr.strip().splitlines()) == 1
            and why in said.stderr and said.stderr.startswith("neural: ")), said


def test_an_unforeseen_error_is_one_line_unless_asked_for_more(tmp_path):
    broken = (
        "import sys, neural.pipeline; neural.pipeline.run_pipeline = lambda *a, **k: {}['key']; from neural.cli import"
        " main; sys.argv = ['neural', 'run']; main()")
    short = subprocess.run([sys.executable, "-c", broken], cwd=tmp_path, capture_output=True, text=True)
    assert (short.returncode == 1
            and short.stderr == "neural: unexpected KeyError: 'key' (set NEURAL_DEBUG=1 to see where)\n")
    long = subprocess.run([sys.executable, "-c", broken], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "NEURAL_DEBUG": "1"})
    assert long.returncode == 1 and "Traceback" in long.stderr


def test_in_a_pipe_a_run_is_one_line_per_stage(neural, tmp_path):
    words = ["run", "--stages", FIXTURES / "stages", "--preset", "small", "--run", "runs/a"]
    first = neural(*words, cwd=tmp_path)
    assert first.returncode == 0 and first.stderr == "", first.stderr
    assert [line.split()[0] for line in first.stdout.splitlines()] == ["10_draw", "20_sum", "run:"]
    assert json.loads((tmp_path / "runs/a/20_sum.json").read_text())["parameters"]["scale"] == 10.0
    assert alone(*words, cwd=tmp_path, PYTHONIOENCODING="ascii").stdout.count("unchanged") == 2
    failing = alone("run", "raises", "--stages", FIXTURES / "failing", "--run", "runs/b", "-p",
                    "why=ünknown – finding", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (failing.returncode == 1 and len(failing.stderr.splitlines()) == 1
            and "stopped in cell 4: ValueError" in failing.stderr)


def test_phantom_to_manifest(neural, tmp_path):
    made = neural("phantom", "cohort", "--studies", 12, "--size", 96, "--seed", 1, cwd=tmp_path)
    assert made.returncode == 0 and made.stderr == "", made.stderr
    assert neural("phantom", "cohort", cwd=tmp_path).returncode == 2                     # never over an existing cohort
    said = neural(
        "index", "mimic-cxr", "cohort", "-o", "lists/manifest.csv", "--labels", "cohort/truth/labels.csv", cwd=tmp_path)
    assert said.returncode == 0 and said.stderr == "", said.stderr
    assert "train" in said.stdout and "test" in said.stdout
    assert (tmp_path / "lists/manifest.csv").is_file() and (tmp_path / "lists/exclusions.csv").is_file()
    assert str(tmp_path) not in said.stdout


def test_a_store_is_checked_and_shown(neural, tmp_path):
    from neural.asset import AssetStore, StudyAsset
    store = AssetStore.create(tmp_path / "store", ["<script>alert(1)</script>", "lung"], dim=3, grid=(4, 4))
    store.append(
        [StudyAsset("<b>s1</b>", "image+report", (4, 4), [5], [0.6], [[1.0, 2, 3]], concepts=[0], assertions=[2])])
    assert neural("verify", "store", cwd=tmp_path).stdout.startswith("assets: 1, all whole\n")
    assert "absent" in neural("inspect", "store", "<b>s1</b>", cwd=tmp_path).stdout
    assert neural("inspect", "store", "s2", cwd=tmp_path).returncode == 1
    assert neural("inspect", "store", "<b>s1</b>", "--html", "page.html", cwd=tmp_path).returncode == 0
    page = (tmp_path / "page.html").read_text()
    assert ("<script>alert" not in page and "<b>s1" not in page and "&lt;script&gt;" in page
            and "Content-Security-Policy" in page
            and page.replace("http-equiv", "").count("http") == page.count("http://www.w3.org/2000/svg"))
    shard = next((tmp_path / "store").glob("shard-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-30] + bytes(30))
    said = neural("verify", "store", cwd=tmp_path)
    assert said.returncode == 1 and "damaged" in said.stderr


def test_build_then_predict(neural, tmp_path, phantom_cohort):
    "A network and a classifier, saved, read a cohort they have never seen: build, kill-free rebuild, verify, predict."
    import numpy as np
    import torch
    from neural.asset import AssetStore
    from neural.build import Aggregation, save_aggregation
    from neural.classify import save_classifier, train_classifier
    from neural.report import train_tokenizer
    from neural.vlm import ReportVLM, small_config
    torch.manual_seed(0)
    tokenizer = train_tokenizer(
        ["No focal consolidation. Small left pleural effusion. The heart is enlarged."] * 9, vocab_size=80)
    ReportVLM(small_config(len(tokenizer), 96, width=32, d_model=32, layers=1)).save_pretrained(tmp_path / "vlm")
    tokenizer.save_pretrained(tmp_path / "vlm")
    save_aggregation(tmp_path / "vlm", Aggregation(lift=False), None, 4, 40)
    assert (
        neural("index", "mimic-cxr", str(phantom_cohort), "-o", "m.csv", "--limit", "0.5", cwd=tmp_path).returncode == 0
    )
    built = neural("build", "m.csv", "store", "--vlm", "vlm", "--limit", "0.5", cwd=tmp_path)
    assert built.returncode == 0 and built.stderr == "", built.stderr
    again = neural("build", "m.csv", "store", "--vlm", "vlm", "--limit", "0.5", cwd=tmp_path)
    store = AssetStore(tmp_path / "store")
    assert again.returncode == 0 and len(store) >= 50 and len(set(store.ids)) == len(store)
    lower = neural("build", "m.csv", "lower", "--vlm", "vlm", "--limit", "0.5", "--precision", "bfloat16", cwd=tmp_path)
    assert lower.returncode == 0 and {a.study_id: list(a.patches) for a in AssetStore(tmp_path / "lower")} == {
        a.study_id: list(a.patches) for a in store}
    if not torch.cuda.is_available():
        refused = neural("build", "m.csv", "gpu", "--vlm", "vlm", "--device", "cuda", cwd=tmp_path)
        assert refused.returncode == 2 and "no GPU" in refused.stderr and not (tmp_path / "gpu").exists()
    assets = list(store)
    y = np.arange(len(assets)) % 2
    model, _ = train_classifier(assets, y, assets, y, vocabulary_size=len(store.vocabulary), epochs=1)
    save_classifier(model, tmp_path / "gcn")
    assert alone("verify", "store", cwd=tmp_path).returncode == 0
    told = alone("predict", "store", "--classifier", "gcn", "-o", "p.csv", cwd=tmp_path)
    assert told.returncode == 0 and len((tmp_path / "p.csv").read_text().splitlines()) == len(store) + 1


@pytest.mark.parametrize(
    "what, names",
    [("read", ["read"]), ("index", ["index"]), ("bytes", ["bytes", "growth"]),
     ("build", ["growth", "roofline", "ways"]), ("boxes", ["boxes", "students"]),
     ("imitate", ["imitate"])],
)
def test_what_the_bench_measures_is_kept(neural, tmp_path, what, names):
    from neural.yardstick import machine, read_tables
    said = neural("bench", what, "--small", "--out", "found.json", cwd=tmp_path)
    assert said.returncode == 0 and said.stdout.endswith(machine() + "\n"), said.stderr
    about, tables = read_tables(tmp_path / "found.json")
    assert about == {"command": f"neural bench {what} --small", "machine": machine()} and sorted(tables) == names
    for name, table in tables.items():
        rows = table.select_dtypes("number").fillna(1)
        # a difference: less where memory was handed back meanwhile
        grown = rows.pop("MB more") if "MB more" in rows else None
        assert len(table) and rows.size and (rows >= 0).all(axis=None), name
        assert grown is None or (grown.abs() < 100_000).all(), name
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]


def test_the_bench_of_a_gpu_is_tried_on_a_cpu(neural, tmp_path):
    from neural.yardstick import machine, read_tables
    said = neural(
        "bench", "gpu", "--small", "--device", "cpu", "--minutes", 30, "--out", "found/gpu.json", cwd=tmp_path)
    assert said.returncode == 0 and said.stdout.endswith(machine() + "\n"), said.stderr
    about, tables = read_tables(tmp_path / "found/gpu.json")
    assert about == {"command": "neural bench gpu --small --device cpu --minutes 30", "machine": machine()} and sorted(
        tables) == ["gpu", "settings"]
    assert tables["settings"]["minutes taken"][0] <= tables["settings"]["minutes allowed"][0] == 30 and [
        p.name for p in tmp_path.iterdir()] == ["found"]


def test_a_bench_of_a_gpu_without_one_is_refused_in_a_line(neural, tmp_path):
    from torch import cuda
    if cuda.is_available(): pytest.skip("a GPU is here")
    said = neural("bench", "gpu", "--out", "found/gpu.json", cwd=tmp_path)
    assert (said.returncode == 1 and said.stderr.count("\n") == 1
            and "no GPU that PyTorch can use; --device cpu --small" in said.stderr and list(tmp_path.iterdir()) == [])


@pytest.mark.parametrize("option", [("--device", "cpu"), ("--minutes", 3)])
def test_what_belongs_to_the_bench_of_a_gpu_is_refused_elsewhere(neural, tmp_path, option):
    said = neural("bench", "read", "--small", *option, "--out", "found/read.json", cwd=tmp_path)
    assert said.returncode == 2 and "are of `neural bench gpu`" in said.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option",
    [("--cohorts", "7"), ("--seeds", "4"), ("--check", "104"), ("--epochs", 2), ("--size", 96), ("--workers", 1),
     ("--work", "there")],
)
def test_what_belongs_to_the_bench_of_draws_is_refused_elsewhere(tmp_path, option):
    from typer.testing import CliRunner
    from neural.cli import app
    said = CliRunner().invoke(
        app, ["bench", "read", "--small", *map(str, option), "--out", str(tmp_path / "read.json")])
    assert (said.exit_code == 2 and f"{option[0]} is of `neural bench draws`" in said.output
            and list(tmp_path.iterdir()) == [])


def test_draws_are_measured_gone_on_with_and_refused_when_made_otherwise(tmp_path, monkeypatch):
    from typer.testing import CliRunner
    from neural.cli import app
    from neural.yardstick import read_tables
    monkeypatch.chdir(tmp_path)
    words = (
        "bench draws --small --studies 80 --size 64 --seeds 0 --workers 1 --cohorts {} --out found/draws.json".format)
    call = lambda line: CliRunner().invoke(app, line.split())
    lines = lambda said: [x.split(",")[0] for x in said.output.splitlines() if ": mean AUC on test: " in x]
    first, more = call(words("7")), call(words("7,8") + " --force")
    assert (first.exit_code, lines(first)) == (0, ["cohort 7"]), first.output
    assert (more.exit_code, lines(more)) == (0, ["cohort 8"]), "the first draw is made again"
    about, tables = read_tables(tmp_path / "found/draws.json")
    assert (about["command"] == "neural bench draws --studies 80 --small --cohorts 7,8 --seeds 0 --size 64 --workers 1"
            and set(tables["numbers"].cohort) == {7, 8} and tables["settings"].film_epochs[0] == 1)
    other = call(words("7").replace("found", "other") + " --epochs 2")
    refused = ("neural: 7-0.json: was made otherwise (warm_epochs 1 there, 2 here); make it again with --force,"
               " or name another folder with --work\n")
    assert other.exit_code == 1 and refused in other.output
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("typed", ["x", "1;2", "-1", "1.5", "99999999999"])
def test_seeds_that_are_no_numbers_are_refused(tmp_path, typed):
    from typer.testing import CliRunner
    from neural.cli import app
    said = CliRunner().invoke(app, ["bench", "draws", "--small", f"--cohorts={typed}", "--work", str(tmp_path / "w")])
    assert (said.exit_code == 2 and "--cohorts takes whole numbers with commas between them" in said.output
            and list(tmp_path.iterdir()) == [])


def test_a_bench_that_fails_writes_nothing(neural, tmp_path):
    said = neural("bench", "finetune", "--studies", 9, "--out", "found.json", cwd=tmp_path)
    assert said.returncode == 2 and list(tmp_path.iterdir()) == []


def test_a_moved_data_set_is_told_to_a_run_by_an_option(neural, tmp_path, monkeypatch):
    from typer.testing import CliRunner
    from neural import pipeline
    from neural.cli import app
    from neural.study import Manifest, Study, View
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "run_stage", lambda stage, *a, **k: ({"metrics": {}}, []))
    for name in ("new", "films", "other"): Path(name).mkdir()
    Path("new/a.png").write_bytes(b"film")
    Path("films/a.png").write_bytes(b"film")
    Path("old").mkdir()
    Manifest([Study("s1", "p1", "test", (View("a.png"),))], "old").save("m.csv")
    shutil.rmtree("old")
    words = ["run", "--stages", str(FIXTURES / "manifest"), "--run", "r", "--manifest", "m.csv"]
    said = CliRunner().invoke(app, [*words, "--root", "new"])
    assert said.exit_code == 0 and Manifest.load("m.csv").root == tmp_path / "new", said.output
    said = CliRunner().invoke(app, [*words, "--images", "films"])
    assert said.exit_code == 0 and Manifest.load("m.csv").image_root == tmp_path / "films", said.output
    said = CliRunner().invoke(app, [*words, "--root", "gone"])
    assert said.exit_code == 2
    done = neural(*words, "--images", "other", cwd=tmp_path)
    assert (done.returncode == 1 and len(done.stderr.splitlines()) == 1
            and "'other' holds 0 of 1 first radiographs of its studies; not there: a.png" in done.stderr), done.stderr
