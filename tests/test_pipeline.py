"What a chapter cannot show of the pipeline: kills, dead kernels, odd folders, and the command papermill itself."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from neural.pipeline import (SCHEMA, code_hash, find_stages, is_fresh, lock_run, publish, read_record, run_pipeline, shown_record, stage_parameters,
                             typed_value, write_json)
from neural.study import NeuralError

FIXTURES = Path(__file__).parent / "fixtures"


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
    assert set(record["figures"]) == {"figures/total.txt"} and record["figures"] == {k: v["sha256"] for k, v in record["outputs"].items()}
    assert record["wall_seconds"] > 0 and record["peak_rss_mb"] > 1 and record["versions"]["python"].startswith("3.")
    assert shown_record(run / "20_sum.ipynb")["metrics"] == record["metrics"]
    assert read_record(run, "10_draw")["metrics"]["none"] is None and read_record(run, "10_draw")["seed"] == 1


def test_a_killed_run_is_taken_up_where_it_stopped(stages, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", "from neural.cli import main; main()", "run", "--stages", str(stages), "--run", str(run), "-p", "pause=120"]
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
    with pytest.raises(NeuralError) as caught: run_pipeline(FIXTURES / "failing", run, [name], tell=lambda line: None, **options)
    said = str(caught.value)
    assert "\n" not in said
    assert "inputs" not in read_record(run, find_stages(FIXTURES / "failing")[["raises", "dies", "silent", "slow"].index(name)].name)
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
    assert "stopped in cell 4: the cell took longer than the time limit" in failure("slow", tmp_path / "run", time_limit=4)


def test_a_relative_manifest_works_and_no_path_of_this_machine_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir(); Path("data/manifest.csv").write_text("study_id\ns1\ns2\n")
    with pytest.raises(NeuralError, match="stage 10_reads stopped in cell 4"): run_pipeline(FIXTURES / "manifest", "runs/a", tell=lambda line: None)
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
    (tmp_path / "photos").mkdir(); (tmp_path / "photos/film.png").write_bytes(b"x")
    with pytest.raises(NeuralError, match="not a run folder"): run_pipeline(stages, tmp_path / "photos")
    (tmp_path / "torn").mkdir(); (tmp_path / "torn/run.json").write_text("{")
    with pytest.raises(NeuralError, match="damaged"): run_pipeline(stages, tmp_path / "torn")
    with lock_run(tmp_path / "busy"), pytest.raises(NeuralError, match="another run is working"): run_pipeline(stages, tmp_path / "busy")


def test_publishing_leaves_nothing_for_the_cleaner(stages, tmp_path):
    run = tmp_path / "run"
    run_pipeline(stages, run, tell=lambda line: None)
    before = {p.name: code_hash(p) for p in stages.glob("*.ipynb")}
    assert publish(run, stages, tmp_path / "figures") == ["10_draw", "20_sum"]
    shutil.copy(Path(__file__).parents[1] / "settings.ini", tmp_path)
    for path in sorted(stages.glob("*.ipynb")):
        assert is_fresh(path) and code_hash(path) == before[path.name]
        text = path.read_text()
        assert "papermill" not in text.replace("neural.pipeline", "").replace("vnd.neural", "").replace('"papermill": "', "") and "injected-parameters" not in text
        subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", path], cwd=tmp_path, check=True, capture_output=True)
        assert path.read_text() == text
    assert json.loads((tmp_path / "figures/published.json").read_text())["stages"] == ["10_draw", "20_sum"]
    edit(stages, "20_sum", "total = scale", "total = 3 * scale")
    assert not is_fresh(stages / "20_sum.ipynb")
    with pytest.raises(NeuralError, match="was edited after it ran"): publish(run, stages, tmp_path / "figures")


def test_papermill_reads_the_same_presets(stages, tmp_path):
    done = subprocess.run([Path(sys.executable).parent / "papermill", "-f", stages / "presets/small.yaml", "--no-progress-bar", stages / "10_draw.ipynb", tmp_path / "out.ipynb", "-p", "run", "."],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shown_record(tmp_path / "out.ipynb")["metrics"]["mean"] > 0
    assert len((tmp_path / "drawn.txt").read_text().split()) == 2


@pytest.mark.parametrize("name, text, value", [("seed", "7", 7), ("count", " 12 ", 12), ("extra", "false", False), ("seed", "0x10", 16)])
def test_command_line_values(stages, name, text, value):
    got = typed_value(stage_parameters(stages / "10_draw.ipynb")[name], text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("name, text", [("seed", "seven"), ("seed", "1.0"), ("seed", ""), ("seed", "null"), ("extra", "1"), ("count", "[1]"), ("count", "!!python/object/apply:os.system [ls]")])
def test_command_line_values_refused(stages, name, text):
    with pytest.raises(NeuralError, match=f"parameter {name} .* takes"): typed_value(stage_parameters(stages / "10_draw.ipynb")[name], text)
