"What a chapter cannot show of the pipeline: kills, dead kernels, odd folders, and the command papermill itself."
import contextlib
import errno
import functools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError

from neural import pipeline
from neural.pipeline import (code_hash, explain_failure, find_stages, kernel_environment, lock_run, run_pipeline,
                             shown_record, stage_parameters)
from neural.publish import is_fresh, publish
from neural.record import SCHEMA, read_record, record, run_command, sha256_of, stale, typed_value, write_json
from neural.study import NeuralError

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def no_late_complaints(caplog):
    """What nbclient leaves of a kernel that never was complains when it is swept away; Python 3.11 cannot read code
    meanwhile."""
    caplog.set_level(logging.CRITICAL, logger="asyncio")


@pytest.fixture
def stages(tmp_path) -> Path:
    "A copy of the two small stages that a test may change."
    return Path(shutil.copytree(FIXTURES / "stages", tmp_path / "stages"))


def edit(folder: Path, name: str, old: str, new: str):
    "Replace a piece of code in a stage notebook."
    path = folder / f"{name}.ipynb"
    nb = nbformat.read(path, 4)
    assert any(old in c.source for c in nb.cells)
    for cell in nb.cells: cell.source = cell.source.replace(old, new)
    nbformat.write(nb, path)


def ran(lines: list[str]) -> list[str]:
    "Names of the stages that were not skipped."
    return [line.split()[0] for line in lines if line[:2].isdigit() and "unchanged" not in line]


def test_only_what_changed_runs_again(stages, tmp_path):
    run = tmp_path / "a run with spaces and {braces} ü"
    def go(**given):
        lines = []
        run_pipeline(stages, run, preset="small", given=given, tell=lines.append)
        return ran(lines)
    assert go() == ["10_draw", "20_sum"]
    assert go() == []
    assert go(extra="true") == ["10_draw"]                 # 20_sum reads drawn.txt alone, and that came out the same
    (run / "drawn.txt").write_text("tampered")
    assert go(extra="true") == ["10_draw"]                 # an output that was changed is made again, to the same bytes
    edit(stages, "20_sum", "total = scale", "total = 2 * scale")
    assert go(extra="true") == ["20_sum"]
    assert go(extra="true", seed="1") == ["10_draw", "20_sum"]
    record = read_record(run, "20_sum")
    assert record["parameters"] == {"scale": 10.0, "pause": 0.0} and record["schema"] == SCHEMA
    assert set(record["figures"]) == {"figures/total.txt"} and record["figures"] == {
        k: v["sha256"] for k, v in record["outputs"].items()}
    assert record["wall_seconds"] > 0 and record["peak_rss_mb"] > 1 and record["versions"]["python"].startswith("3.")
    assert shown_record(run / "20_sum.ipynb")["metrics"] == record["metrics"]
    assert read_record(run, "10_draw")["metrics"]["none"] is None and read_record(run, "10_draw")["seed"] == 1


def test_a_killed_run_is_taken_up_where_it_stopped(stages, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", "from neural.cli import main; main()", "run", "--stages", str(stages), "--run",
               str(run), "-p", "pause=120"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout.readline().startswith("10_draw")
    deadline = time.monotonic() + 60
    while not (run / "20_sum.json").is_file() and time.monotonic() < deadline: time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert "inputs" not in read_record(run, "20_sum")      # begun, not finished
    lines = []
    run_pipeline(stages, run, given={"pause": "0"}, tell=lines.append)
    assert ran(lines) == ["20_sum"] and "not finished before" in lines[1]


def failure(name: str, run: Path, **options) -> str:
    with pytest.raises(NeuralError) as caught:
        run_pipeline(FIXTURES / "failing", run, [name], tell=lambda line: None, **options)
    said = str(caught.value)
    assert "\n" not in said
    assert "inputs" not in read_record(
        run, find_stages(FIXTURES / "failing")[["raises", "dies", "silent", "slow"].index(name)].name)
    return said


def test_an_exception_is_told_in_one_line(tmp_path):
    said = failure("raises", tmp_path / "run", given={"why": "half a graph"})
    assert "stage 10_raises stopped in cell 4: ValueError: half a graph (notebook so far: " in said
    partial = Path(said.split("notebook so far: ")[1].rstrip(")"))
    assert any(o.output_type == "error" for c in nbformat.read(partial, 4).cells for o in c.get("outputs", []))


def test_a_dead_kernel_is_told_apart(tmp_path):
    said = failure("dies", tmp_path / "run")
    assert "stage 20_dies stopped in cell 4: the kernel died" in said


def test_a_stage_without_a_record_and_one_that_hangs(tmp_path):
    assert "stage 30_silent ended without a run record" in failure("silent", tmp_path / "run")
    assert "stopped in cell 4: the cell took longer than the time limit" in failure(
        "slow", tmp_path / "run", time_limit=4)


def test_a_relative_manifest_works_and_no_path_of_this_machine_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/manifest.csv").write_text("study_id\ns1\ns2\n")
    with pytest.raises(NeuralError, match="stage 10_reads stopped in cell 4"):
        run_pipeline(FIXTURES / "manifest", "runs/a", tell=lambda line: None)
    entries = run_pipeline(FIXTURES / "manifest", "runs/a", manifest="data/manifest.csv", tell=lambda line: None)
    assert entries["10_reads"]["metrics"] == {"lines": 3} and len(entries["10_reads"]["manifest"]) == 64
    outputs = [c.get("outputs", []) for c in nbformat.read("runs/a/10_reads.ipynb", 4).cells]
    assert str(tmp_path) not in json.dumps(outputs) and "../../data/manifest.csv ." in json.dumps(outputs)
    assert str(tmp_path) not in Path("runs/a/10_reads.json").read_text() + Path("runs/a/run.json").read_text()
    lines = []
    run_pipeline(FIXTURES / "manifest", "runs/a", tell=lines.append)              # the run remembers its manifest
    assert ran(lines) == []
    Path("data/manifest.csv").write_text("study_id\ns1\n")
    run_pipeline(FIXTURES / "manifest", "runs/a", tell=lines.append)
    assert "(manifest)" in lines[-1]


def test_run_folders_of_others_are_left_alone(stages, tmp_path):
    write_json(tmp_path / "old/run.json", {"schema": SCHEMA + 1})
    with pytest.raises(NeuralError, match="run schema"): run_pipeline(stages, tmp_path / "old")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/film.png").write_bytes(b"x")
    with pytest.raises(NeuralError, match="not a run folder"): run_pipeline(stages, tmp_path / "photos")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/run.json").write_text("{")
    with pytest.raises(NeuralError, match="damaged"): run_pipeline(stages, tmp_path / "torn")
    with lock_run(tmp_path / "busy"), pytest.raises(NeuralError, match="another run is working"):
        run_pipeline(stages, tmp_path / "busy")


def test_publishing_leaves_nothing_for_the_cleaner(stages, tmp_path):
    run = tmp_path / "run"
    run_pipeline(stages, run, tell=lambda line: None)
    before = {p.name: code_hash(p) for p in stages.glob("*.ipynb")}
    assert publish(run, stages, tmp_path / "figures") == ["10_draw", "20_sum"]
    shutil.copy(Path(__file__).parents[1] / "settings.ini", tmp_path)
    for path in sorted(stages.glob("*.ipynb")):
        assert is_fresh(path) and code_hash(path) == before[path.name]
        text = path.read_text()
        assert (
            "papermill" not in text.replace("vnd.neural", "").replace(
                '"papermill": "', "")
            and "injected-parameters" not in text
        )
        subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", path], cwd=tmp_path, check=True,
                       capture_output=True)
        assert path.read_text() == text
    assert json.loads((tmp_path / "figures/published.json").read_text())["stages"] == ["10_draw", "20_sum"]
    edit(stages, "20_sum", "total = scale", "total = 3 * scale")
    assert not is_fresh(stages / "20_sum.ipynb")
    with pytest.raises(NeuralError, match="was edited after it ran"): publish(run, stages, tmp_path / "figures")


def test_papermill_reads_the_same_presets(stages, tmp_path):
    done = subprocess.run(
        [Path(sys.executable).parent / "papermill", "-f", stages / "presets/small.yaml", "--no-progress-bar",
         stages / "10_draw.ipynb", tmp_path / "out.ipynb", "-p", "run", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert shown_record(tmp_path / "out.ipynb")["metrics"]["mean"] > 0
    assert len((tmp_path / "drawn.txt").read_text().split()) == 2


@pytest.mark.parametrize(
    "name, text, value", [("seed", "7", 7), ("count", " 12 ", 12), ("extra", "false", False), ("seed", "0x10", 16)])
def test_command_line_values(stages, name, text, value):
    got = typed_value(stage_parameters(stages / "10_draw.ipynb")[name], text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "name, text",
    [("seed", "seven"), ("seed", "1.0"), ("seed", ""), ("seed", "null"), ("extra", "1"), ("count", "[1]"),
     ("count", "!!python/object/apply:os.system [ls]")],
)
def test_command_line_values_refused(stages, name, text):
    with pytest.raises(NeuralError, match=f"parameter {name} .* takes"):
        typed_value(stage_parameters(stages / "10_draw.ipynb")[name], text)


# what a run remembers, and the command that makes it again

@pytest.fixture
def quick(monkeypatch):
    "Stages run in this process, since what is asked here is what the runner writes down, not what a kernel does."
    def execute(stage, run, parameters, **options):
        nb = nbformat.read(stage.path, 4)
        with contextlib.chdir(run), kernel_environment(NEURAL_STAGE=stage.name):
            names = {}
            for cell in [c.source for c in nb.cells if c.cell_type == "code"]:
                exec(cell, names)
                if "run: str" in cell: names.update(parameters)
        nbformat.write(nb, Path(run) / f"{stage.name}.ipynb")
    monkeypatch.setattr(pipeline, "execute_stage", execute)


def told(*words, **options) -> list[str]:
    lines = []
    run_pipeline(*words, tell=lines.append, **options)
    return lines


def tree(folder: Path) -> dict:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != ".lock"}


def metrics(run: Path, *names: str) -> list:
    return [read_record(run, n)["metrics"] for n in names or ("10_draw", "20_sum")]


def test_the_command_of_a_row_makes_it_again_when_it_is_pasted(stages, tmp_path):
    "In a shell, in a folder with a blank, from the words that the stage itself wrote into its table."
    edit(stages, "20_sum", "record(",
         "from neural.record import run_command\n(Path(run)/'table.txt').write_text(run_command(run,"
         " '20_sum'))\nrecord(",)
    (stages / "presets/own values.yaml").write_text("count: 4\nscale: 2\n")
    (tmp_path / "a place").mkdir()
    go = functools.partial(subprocess.run, cwd=tmp_path / "a place", capture_output=True, text=True, check=True,
                           env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    go(["neural", "run", "--preset", "../stages/presets/own values.yaml", "--stages", "../stages", "--run", "one",
        "-p", "seed=3"])
    go(["neural", "run", "sum", "--run", "one/", "-p", "scale=0.5"])
    command = (tmp_path / "a place/one/table.txt").read_text()
    assert (command
            == "neural run 10-20 --preset '../stages/presets/own values.yaml' -p seed=3 -p scale=0.5 --stages ../stages"
            " --run one")
    assert str(tmp_path) not in command and command == read_record(tmp_path / "a place/one", "20_sum")["command"]
    # in its own folder there is nothing to do
    assert "unchanged" in go(command, shell=True).stdout
    go(command.replace("--run one", "--run two"), shell=True)
    assert metrics(tmp_path / "a place/two") == metrics(tmp_path / "a place/one")


@pytest.mark.usefixtures("quick")
def test_a_run_goes_on_with_what_it_was_made_with(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told(stages, "r", preset="small", given={"seed": "7"})
    before = tree(tmp_path / "r")
    lines = told(stages, "r")
    assert lines[0] == "r goes on with what it was made with: --preset small -p seed=7" and ran(lines) == []
    assert tree(tmp_path / "r") == before
    told(stages, "r", ["20"], given={"scale": "3"})                             # one stage apart from the others
    assert ran(told(stages, "r")) == [] and read_record(Path("r"), "20_sum")["parameters"]["scale"] == 3
    assert read_record(Path("r"), "10_draw")["parameters"] == {"seed": 7, "count": 2, "extra": False}
    assert json.loads(Path("r/run.json").read_text())["given"] == {"seed": "7", "scale": "3"}
    # a named preset says all about the stages it runs
    lines = told(stages, "r", preset="small")
    assert (lines[0]
            == "other settings than before, so run again: 10_draw (seed was 7, is 0), 20_sum (scale was 3.0, is 10.0)")
    assert json.loads(Path("r/run.json").read_text())["given"] == {}
    assert (read_record(Path("r"), "20_sum")["command"]
            == f"neural run 10-20 --preset small --stages {os.path.relpath(stages)} --run r")


@pytest.mark.usefixtures("quick")
def test_stages_set_apart_have_a_command_of_two_calls(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit(stages, "20_sum", "pause: float", "seed: int = 0  # of nothing\npause: float")
    told(stages, "r", ["draw"], given={"seed": "1"})
    lines = told(stages, "r", ["sum"], given={"seed": "2"})
    assert lines[-1].startswith("20_sum") and "not run again, so as it was made: 10_draw (seed was 1, is 2)" in lines
    where = f"--stages {os.path.relpath(stages)} --run r"
    assert (read_record(Path("r"), "20_sum")["command"]
            == f"neural run 10 -p seed=1 {where} && neural run 20 -p seed=2 {where}")


@pytest.mark.usefixtures("quick")
def test_another_preset_replaces_finished_stages_only_when_asked(stages, tmp_path):
    (stages / "presets/other.yaml").write_text("count: 6\n")
    run = tmp_path / "r"
    told(stages, run, preset="small")
    before = tree(run)
    with pytest.raises(
        NeuralError, match=r"made with preset small, and preset other differs: 10_draw \(count was 2, is 6\).*--force"):
        told(stages, run, preset="other")
    with pytest.raises(NeuralError, match="20_sum"): told(stages, run, ["20"], preset="other")
    assert tree(run) == before
    told(stages, run, preset="other", force=True)
    assert {json.loads((run / f"{n}.json").read_text())["settings"]["preset"] for n in ("10_draw", "20_sum")} | {
        json.loads((run / "run.json").read_text())["preset"]} == {"other"}


@pytest.mark.usefixtures("quick")
def test_one_run_has_one_cohort(tmp_path):
    for name, rows in [("a", "s1\n"), ("copy", "s1\n"), ("b", "s1\ns2\n")]:
        (tmp_path / f"{name}.csv").write_text(f"study_id\n{rows}")
    run, stages = tmp_path / "r", FIXTURES / "manifest"
    told(stages, run, manifest=tmp_path / "a.csv")
    before = tree(run)
    with pytest.raises(
        NeuralError, match=r"10_reads in .* was made from other studies \(../a.csv\); name a new folder with --run"):
        told(stages, run, manifest=tmp_path / "b.csv")
    assert tree(run) == before
    assert ran(told(stages, run, manifest=tmp_path / "copy.csv")) == []         # the same studies at another place
    told(stages, run, manifest=tmp_path / "b.csv", force=True)
    assert metrics(run, "10_reads") == [{"lines": 3}] and "--manifest b.csv" in read_record(run, "10_reads")["command"]
    with pytest.raises(NeuralError, match="no manifest at .*gone.csv"):
        told(stages, run, manifest=tmp_path / "gone.csv")


@pytest.mark.usefixtures("quick")
def test_a_lost_or_damaged_head_of_a_run_is_written_anew_from_its_records(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told(stages, "runs/r", preset="small", given={"seed": "5"})
    head = Path("runs/r/run.json")
    for torn in ("", "{", "[]", '{"schema": 1, "given": []}'):
        kept = head.read_text()
        head.write_text(torn)
        with pytest.raises(
            NeuralError, match="run.json in r is damaged; move it away and run again: the records hold the same"):
            told(stages, "runs/r")
        head.unlink()
        assert ran(told(stages, "runs/r")) == [] and json.loads(head.read_text()) == json.loads(kept)
    Path("runs/r/10_draw.json").write_text('{"schema": 1, "inputs": 5}')
    with pytest.raises(NeuralError, match="10_draw.json in r is damaged; delete it and run again"):
        told(stages, "runs/r")
    Path("runs/r/10_draw.json").unlink()
    # 20_sum is not lost, and not run again
    assert ran(told(stages, "runs/r")) == ["10_draw"] and metrics(Path("runs/r"), "20_sum")


@pytest.mark.usefixtures("quick")
def test_a_run_is_the_same_by_every_name(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/deep")
    told(stages, "link/r", preset="small")
    for name, where in [("link/r/", "."), ("real/deep/r", "."), (tmp_path / "link/r", "/"), ("deep/../deep/r", "real"),
                        (".", "real/deep/r")]:
        monkeypatch.chdir(tmp_path / where)
        assert ran(told(stages, name)) == []
    monkeypatch.chdir(tmp_path)
    assert read_record(tmp_path / "real/deep/r", "20_sum")["command"].endswith("--run real/deep/r")
    with lock_run("real/deep/r"), pytest.raises(NeuralError, match="another run is working in link/r"):
        told(stages, "link/r")


def test_what_was_run_by_hand_says_so(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record("10_draw", tmp_path, {"mean": 1})
    assert (run_command(tmp_path, "20_sum") == "by hand: 10_draw to 20_sum"
            and read_record(tmp_path, "10_draw")["command"] == "by hand: 10_draw")
    # no runner wrote anything down: still by hand
    monkeypatch.setenv("NEURAL_STAGE", "20_sum")
    assert run_command(tmp_path, "20_sum") == "by hand: 10_draw to 20_sum"


@pytest.mark.usefixtures("quick")
def test_records_of_a_former_version_get_their_command(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told(stages, "r", preset="small", given={"seed": "9"})
    wanted = [read_record(Path("r"), n)["command"] for n in ("10_draw", "20_sum")]
    for name in ("10_draw", "20_sum"):
        write_json(f"r/{name}.json",
                   {k: v for k, v in read_record(Path("r"), name).items() if k not in ("settings", "command")})
    write_json("r/run.json", {"schema": SCHEMA, "preset": "small"})
    assert ran(told(stages, "r", ["sum"])) == []
    assert [read_record(Path("r"), n)["command"] for n in ("10_draw", "20_sum")] == wanted


@pytest.mark.usefixtures("quick")
def test_a_later_stage_that_is_out_of_date_is_named(stages, tmp_path):
    told(stages, tmp_path / "r", preset="small")
    lines = told(stages, tmp_path / "r", ["draw"], given={"seed": "3"})
    assert lines[-1] == "out of date now: 20_sum; run again what you need of it"
    assert "out of date" not in "".join(told(stages, tmp_path / "r"))


# values and picks: zero, empty and not given are three things

@pytest.mark.parametrize(
    "words, said",
    [(["0"], "no stage called 0"), ([""], "no stage called ''"), (0, "no stage called 0"), ("", "no stage called ''"),
     (["20-10"], "20-10 runs backwards; write 10-20"), (["1-9"], "no stage called 1-9"),
     (["10,20"], "no stage called 10,20"), (["-10"], "no stage called -10")],
)
def test_stages_that_are_none_are_refused(stages, tmp_path, words, said):
    with pytest.raises(NeuralError, match=said): told(stages, tmp_path / "r", words)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "text, said",
    [("seed: 1\nseed: 2\n", "seed stands twice"), ("seed:\n", "seed .* takes int, got None"),
     ("stages: []\n", "leave the line out for all stages"), ("stages: 10\n", "must be a list"),
     ("seed: \"1:30\"\n", "takes int, got"), ("extra: 0\n", "takes bool, got 0"), ("- seed\n", "must be a flat list"),
     ("seed: [1\n", "not readable YAML"), ("run: here\n", "set run with --run"),
     ("scale: .nan\n", "takes float, got nan"), ("command: neural run\n", "no stage has a parameter command"),
     ("seed: 1\n" * 200_000, "larger than")],
)
def test_presets_that_do_not_say_what_they_mean(stages, tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(NeuralError, match=said) as caught: told(stages, tmp_path / "r", preset=tmp_path / "mine.yaml")
    assert "\n" not in str(caught.value) and not (tmp_path / "r").exists()


@pytest.mark.parametrize("time_limit", [0, -1, float("nan"), True])
def test_a_time_limit_of_nothing_is_no_time_limit_left_out(stages, tmp_path, time_limit):
    with pytest.raises(NeuralError, match="time_limit must be 1 or more"):
        told(stages, tmp_path / "r", time_limit=time_limit)


@pytest.mark.parametrize("preset", ["", ".", "..", "small.yaml", "presets/small"])
def test_a_preset_that_is_none_is_refused_and_leaves_nothing(stages, tmp_path, preset):
    with pytest.raises(NeuralError, match=f"no preset called '{preset}'; known: small"):
        told(stages, tmp_path / "r", preset=preset)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("value, left", [('["Cardiomegaly"]', ["Cardiomegaly"]), ("[]", []), ("", None), ("{}", None)])
def test_a_list_that_papermill_hands_on_as_text(tmp_path, value, left):
    cells = [
        "run: str = \".\"  # run folder\ntargets_read: list = [\"Edema\"]  # findings\nlr: float = 1e-3  # rate",
        ("from neural.record import begin, record\nrun, began = begin(run, \"10_toy\","
         " globals())\nrecord(\"10_toy\", run, {\"targets\": targets_read, \"lr\": lr})"),
    ]
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, tmp_path / "10_toy.ipynb")
    done = subprocess.run(
        [Path(sys.executable).parent / "papermill", "--no-progress-bar", "10_toy.ipynb", "out.ipynb", "-p",
         "targets_read", value, "-p", "lr", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    if left is None:
        assert done.returncode == 1 and "NeuralError: parameter targets_read takes list" in done.stderr
    else:
        assert done.returncode == 0 and metrics(tmp_path, "10_toy") == [{"targets": left, "lr": 2.0}], done.stderr


# an error is told whatever else is broken

@pytest.mark.parametrize(
    "partial",
    [None, "", "{", "{}", "[]", '{"cells": 3}',
     '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type"', "\x00" * 50, "[" * 50_000],
)
@pytest.mark.parametrize(
    "error, said",
    [(OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
     (ValueError("half a graph"), "ValueError: half a graph"), (DeadKernelError("gone"), "the kernel died")],
)
def test_a_failure_is_told_whatever_became_of_the_notebook(stages, tmp_path, partial, error, said):
    path = tmp_path / "10_draw.ipynb"
    if partial is not None: path.write_text(partial)
    line = str(explain_failure(find_stages(stages)[0], error, path))
    assert said in line and "\n" not in line and line.startswith("stage 10_draw stopped ")
    assert ("notebook so far" in line) == (partial is not None)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("step", ["open", "write", "replace"])
def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, number, step):
    path = write_json(tmp_path / "10_draw.json", {"schema": SCHEMA})
    def fail(*words, **options): raise OSError(number, os.strerror(number), str(path))
    if step == "open": monkeypatch.setattr("tempfile.NamedTemporaryFile", fail)
    if step == "write":
        monkeypatch.setattr(
            "json.dumps", lambda *w, **o: type("Text", (str,), {"__add__": lambda self, other: fail()})())
    if step == "replace": monkeypatch.setattr("os.replace", fail)
    with pytest.raises((NeuralError, OSError), match=re.escape(os.strerror(number))): write_json(path, {"schema": 2})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["10_draw.json"] and json.loads(path.read_text()) == {
        "schema": SCHEMA}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_told_as_that(stages, tmp_path, monkeypatch, number):
    def flock(fd, how): raise OSError(number, os.strerror(number))
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(NeuralError, match=f"r: cannot be locked for this run, {os.strerror(number)}; "):
        told(stages, tmp_path / "r")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_run_folder_that_cannot_be_written(stages, tmp_path, monkeypatch, number):
    really = os.open
    def refuse(path, flags, *more, **options):
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)): raise OSError(number, os.strerror(number), path)
        return really(path, flags, *more, **options)
    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(NeuralError, match=f"{os.strerror(number)}; "): told(stages, tmp_path / "r")


def test_a_run_folder_that_is_a_file(stages, tmp_path):
    (tmp_path / "r").write_text("mine")
    (tmp_path / "nowhere").symlink_to("gone")
    for name in ("r", "r/below", "nowhere"):
        with pytest.raises(NeuralError, match="cannot be made, "): told(stages, tmp_path / name)
    assert (tmp_path / "r").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("full", ["10_draw.ipynb", "10_draw.log"])
def test_a_disk_that_is_full_while_papermill_writes(stages, tmp_path, full):
    edit(stages, "10_draw", "print(drawn)", "print('much ' * 10_000)")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / full).symlink_to("/dev/full")
    write_json(tmp_path / "r/run.json", {"schema": SCHEMA})
    with pytest.raises(NeuralError, match="stage 10_draw stopped .*No space left on device; free some space") as caught:
        told(stages, tmp_path / "r", ["draw"])
    assert "\n" not in str(caught.value) and "inputs" not in read_record(tmp_path / "r", "10_draw")


@pytest.mark.parametrize(
    "where, error, said",
    [
        ("jupyter_client.kernelspec.KernelSpecManager.get_kernel_spec", NoSuchKernel("python3"),
         "there is no kernel called python3; make it with"),
        ("jupyter_client.connect.ConnectionFileMixin.write_connection_file",
         OSError(errno.EROFS, "Read-only file system", "kernel.json"),
         "kernel.json: Read-only file system; this place is read-only"),
        ("jupyter_client.connect.ConnectionFileMixin.write_connection_file",
         PermissionError(errno.EACCES, "Permission denied"), "Permission denied; ask its owner"),
    ],
)
def test_a_kernel_that_cannot_start(stages, tmp_path, monkeypatch, where, error, said):
    def fail(*words, **options): raise error
    monkeypatch.setattr(where, fail)
    with pytest.raises(NeuralError, match=f"stage 10_draw stopped before its first cell: {re.escape(said)}"):
        told(stages, tmp_path / "r", ["draw"])


KILL = """
import os, shutil, sys
from pathlib import Path
import papermill, neural.pipeline as p
from neural.record import record
stages, desk = Path(sys.argv[1]), Path(sys.argv[2])
left, really = [0], os.replace
def end():
    left[0] -= 1
    if not left[0]: os._exit(9)
def replace(*words):
    end()
    really(*words)
    end()
def execute(stage, run, parameters, **options):
    with p.kernel_environment(NEURAL_STAGE=stage.name):
        out = Path(run) / f"{stage.name}.txt"
        drawn = sorted(Path(run).glob("*_draw.txt")) if stage.name != "10_draw" else ()
        text = str(parameters.get("seed", "")) + "".join(f.read_text() for f in drawn)
        out.write_text(text[:1])
        end()
        out.write_text(text)
        record(stage.name, run, {"text": text})
p.execute_stage, os.replace = execute, replace
def go(run, most, seed):
    if not (child := os.fork()):
        left[0] = most
        p.run_pipeline(stages, run, preset="small", given={"seed": seed}, tell=lambda line: None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert go(desk / "whole", 0, "2") == go(desk / "first", 0, "1") == 0
for most in range(1, 100):
    run = Path(shutil.copytree(desk / "first", desk / f"run {most}"))
    code = go(run, most, "2")
    print(code, go(run, 0, "2"), run)
    if code != 9: break
"""


def test_a_kill_at_any_write_is_taken_up_to_the_same_end(stages, tmp_path):
    """Killed before and after every file that appears, and half-way in a stage's own; then run again, over a finished
    run of other values."""
    (tmp_path / "kill.py").write_text(KILL)
    done = subprocess.run([sys.executable, tmp_path / "kill.py", stages, tmp_path], capture_output=True, text=True)
    tries = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert (done.returncode == 0 and len(tries) > 12
            and [t[:2] for t in tries] == [["9", "0"]] * (len(tries) - 1) + [["0", "0"]]), done.stderr
    content = lambda run: {
        n: (read_record(run, n)["metrics"], sorted(read_record(run, n)["outputs"]), read_record(run, n)["settings"])
        for n in ("10_draw", "20_sum")}
    for _, _, run in tries:
        assert content(Path(run)) == content(tmp_path / "whole") and json.loads((Path(run) / "run.json").read_text())[
            "given"] == {"seed": "2"}
        assert not list(Path(run).glob("*.part")) + list(Path(run).glob(".*.part"))


# publishing: only what was published is replaced

@pytest.mark.usefixtures("quick")
def test_publishing_never_takes_what_is_not_ours(stages, tmp_path):
    run, shown = tmp_path / "r", tmp_path / "figures"
    told(stages, run, preset="small")
    publish(run, stages, shown)
    (shown / "bench").mkdir()
    (shown / "bench/mine.json").write_text("{}")
    def refused(why):
        before = tree(tmp_path)
        with pytest.raises(NeuralError, match=why): publish(run, stages, shown)
        assert tree(tmp_path) == before
    told(stages, run, preset="small", given={"scale": "3"})
    (shown / "total.txt").write_text("retouched")
    refused("total.txt in .* was not published from a run, or changed since")
    (shown / "total.txt").unlink()
    (shown / "total.txt").symlink_to(tmp_path / "elsewhere.txt")
    refused("total.txt")
    (shown / "total.txt").unlink()
    (shown / "total.txt").mkdir()
    refused("total.txt")
    (shown / "total.txt").rmdir()
    said = json.loads((shown / "published.json").read_text())
    for name in ("../r/run.json", "/etc/hosts", "a/../../r/run.json"):
        write_json(shown / "published.json", {**said, "files": {**said["files"], name: "0"}})
        refused("leaves the root")
    write_json(shown / "published.json", said)
    assert publish(run, stages, shown) == ["10_draw", "20_sum"] and (shown / "bench/mine.json").read_text() == "{}"
    for inside in (run, run / "figures", tmp_path):
        with pytest.raises(NeuralError, match="lie in each other"): publish(run, stages, inside)


@pytest.mark.usefixtures("quick")
def test_a_publication_that_was_stopped_is_finished_by_the_next(stages, tmp_path, monkeypatch):
    run, shown = tmp_path / "r", tmp_path / "figures"
    told(stages, run, preset="small")
    publish(run, stages, shown)
    told(stages, run, preset="small", given={"scale": "3"})
    really, left = os.replace, [3]
    def replace(a, b):
        left[0] -= 1
        if left[0] < 0: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), b)
        really(a, b)
    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(NeuralError, match="No space left on device"): publish(run, stages, shown)
    monkeypatch.undo()
    told(stages, run, preset="small", given={"scale": "4"})                     # and the run has moved on since
    publish(run, stages, shown)
    assert all(
        sha256_of(shown / n) == s for n, s in json.loads((shown / "published.json").read_text())["files"].items())
    assert not list(shown.rglob("*.part"))


# make

@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_cohorts_have_a_folder_each_and_nothing_is_deleted_that_a_run_reads(tmp_path):
    root = Path(__file__).parents[1]
    for part in ("Makefile", "neural"):
        (shutil.copytree if (root / part).is_dir() else shutil.copy)(root / part, tmp_path / part)
    def make(*words):
        done = subprocess.run(
            ["make", "--no-print-directory", "-o", "install", f"VENV={sys.prefix}", "STUDIES=12", "SIZE=64", *words],
            cwd=tmp_path, capture_output=True, text=True,
            env={k: v for k, v in os.environ.items() if k not in ("RUN", "SEED", "TEST", "PRESET", "MAKEFLAGS")}
            | {"PYTHONPATH": str(tmp_path)},)
        assert done.returncode == 0, done.stderr
        return done.stdout
    first, second = (tmp_path / f"build/phantom-{seed}-12-64-0.38" for seed in (13, 14))
    make("cohort")
    before = tree(first)
    make("cohort", "SEED=14")
    assert tree(first) == before and (second / "manifest.csv").is_file()
    (tmp_path / "build/phantom-13-12-64-0.38.made").write_text("other code")
    make("cohort")
    assert tree(first) == before                                # it came out the same
    (tmp_path / "build/phantom-13-12-64-0.38.made").write_text("other code")
    (first / "truth/more.txt").write_text("as an older version wrote it")
    assert "kept in build/phantom-13-12-64-0.38.before-1" in make("cohort")
    assert tree(first) == before and (tmp_path / "build/phantom-13-12-64-0.38.before-1/truth/more.txt").is_file()
    planned = [
        make("-n", "reproduce", *words).splitlines()[-1] for words in ([], ["SEED=14"], ["STUDIES=1800", "SIZE=320"])]
    assert [re.search(r'--run "(.*)"', line)[1] for line in planned] == [
        "runs/quickstart-13-12-64-0.38", "runs/quickstart-14-12-64-0.38", "runs/quickstart"]
    (tmp_path / "build/store").mkdir()
    write_json(tmp_path / "runs/a/run.json", {"manifest": "../../build/phantom-14-12-64-0.38/manifest.csv"})
    assert "kept: build/phantom-14-12-64-0.38" in make("clean")
    assert sorted(p.name for p in (tmp_path / "build").iterdir()) == [
        "phantom-13-12-64-0.38.before-1", "phantom-14-12-64-0.38", "phantom-14-12-64-0.38.made", "store"]


# a data set that has moved

READS = 'manifest: str = ""  # studies'

def begun_with_films(home: Path) -> tuple[Path, Path]:
    """Three stages: one that leaves a manifest of its own in the run, one that reads all of it, one that reads the CSV
    alone; and a manifest with its films."""
    from neural.study import Manifest, Study, View
    for i in range(4):
        (home / "disk1").mkdir(exist_ok=True)
        (home / f"disk1/{i}.png").write_bytes(b"film")
    Manifest([Study(f"s{i}", f"p{i}", "test", (View(f"{i}.png"),)) for i in range(4)], home / "disk1").save(
        home / "m.csv")
    own = ('studies = Manifest.load(manifest or run + "/manifest.csv"); studies = Manifest(studies.studies[:3],'
           ' studies.root); studies.save(run + "/manifest.csv")')
    for name, parameters, body, reads in (
        ("10_own", f'run: str = "."  # run folder\n{READS}', own, None),
        ("20_all", 'run: str = "."  # run folder', 'studies = Manifest.load(run + "/manifest.csv")', None),
        ("30_rows", 'run: str = "."  # run folder', 'studies = Manifest.load(run + "/manifest.csv")', ["manifest.csv"]),
    ):
        cells = [
            parameters,
            "from neural.record import files_read, record\nfrom neural.study import Manifest",
            body,
            (f'record("{name}", run, {{"studies": len(studies)}}, reads={reads}, read=files_read(run, {{}} if'
             f' "{name}" == "10_own" else {{"10_own": ["manifest.csv", "manifest.json"]}}))'),
        ]
        nb = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(c) for c in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
        nb.cells[0].metadata["tags"] = ["parameters"]
        (home / "stages").mkdir(exist_ok=True)
        nbformat.write(nb, home / f"stages/{name}.ipynb")
    return home / "stages", home / "run"


@pytest.mark.usefixtures("quick")
def test_a_run_is_told_where_its_films_lie_now_and_nothing_runs_again(tmp_path):
    from neural.study import Manifest
    folder, run = begun_with_films(tmp_path)
    assert (ran(told(folder, run, manifest=tmp_path / "m.csv")) == ["10_own", "20_all", "30_rows"]
            and ran(told(folder, run)) == [])
    rows = {p: p.read_bytes() for p in (tmp_path / "m.csv", run / "manifest.csv")}
    (tmp_path / "disk1").rename(tmp_path / "disk2")
    before = tree(tmp_path)
    with pytest.raises(
        NeuralError, match="holds 0 of 4 first radiographs of its studies; not there: 0.png, 1.png, 2.png;"):
        told(folder, run, root=tmp_path / "stages")
    assert tree(tmp_path) == before
    assert ran(told(folder, run, root=tmp_path / "disk2")) == []
    assert {Manifest.load(p).root for p in rows} == {tmp_path / "disk2"} and all(
        p.read_bytes() == b for p, b in rows.items())
    # and it is remembered
    assert ran(told(folder, run)) == [] and pipeline.out_of_date(folder, run, []) == []
    assert not [line for line in stale(run, {"20_all": [], "30_rows": []}, {}) if line.startswith("stale")]
    # which finds its films
    assert ran(told(folder, run, ["20"], force=True)) == ["20_all"]
    (tmp_path / "films").mkdir()
    [p.rename(tmp_path / "films" / p.name) for p in (tmp_path / "disk2").iterdir()]
    assert (ran(told(folder, run, images=tmp_path / "films")) == []
            and Manifest.load(run / "manifest.csv").image_root == tmp_path / "films")


@pytest.mark.usefixtures("quick")
def test_what_was_out_of_date_before_the_move_still_runs(tmp_path):
    folder, run = begun_with_films(tmp_path)
    told(folder, run, manifest=tmp_path / "m.csv")
    old = (run / "20_all.json").read_text()
    entry = json.loads(old)
    entry["inputs"]["upstream"] = "0" * 16
    write_json(run / "20_all.json", entry)
    (tmp_path / "disk1").rename(tmp_path / "disk2")
    assert ran(told(folder, run, ["30"], root=tmp_path / "disk2")) == [] and pipeline.out_of_date(folder, run, []) == [
        "20_all"]
    assert ran(told(folder, run)) == ["20_all"]
    # by hand, so stage 10 is out of date
    (run / "manifest.json").write_text((run / "manifest.json").read_text() + "\n")
    (tmp_path / "disk2").rename(tmp_path / "disk3")
    assert ran(told(folder, run, root=tmp_path / "disk3"))[0] == "10_own"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("writes", range(6))
def test_a_move_that_is_killed_is_finished_by_the_same_call(tmp_path, monkeypatch, writes):
    class Killed(BaseException): pass
    folder, run = begun_with_films(tmp_path)
    told(folder, run, manifest=tmp_path / "m.csv")
    (tmp_path / "disk1").rename(tmp_path / "disk2")
    real, left = os.replace, iter(range(writes))

    def replaced(a, b):
        if next(left, None) is None: raise Killed
        real(a, b)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", replaced)
        with contextlib.suppress(Killed): told(folder, run, root=tmp_path / "disk2")
    assert ran(told(folder, run, root=tmp_path / "disk2")) == [] == ran(told(folder, run))


@pytest.mark.usefixtures("quick")
def test_a_run_without_a_manifest_has_no_data_that_could_have_moved(stages, tmp_path):
    with pytest.raises(
        NeuralError, match="has no manifest, so it has no data that could have moved; name one with --manifest"):
        told(stages, tmp_path / "run", root=tmp_path)
    assert not (tmp_path / "run").exists()
