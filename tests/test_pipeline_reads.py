"What a stage says it reads: only that makes it run again, and who opens more is failed by a runner that looks on."
import ctypes
import json
import os
from pathlib import Path

import nbformat
import pytest
from test_pipeline import quick, ran, told  # noqa: F401

from neural import pipeline
from neural.pipeline import find_stages, out_of_date, run_files, run_pipeline
from neural.record import read_record, short_hash, stage_records, write_json
from neural.study import NeuralError

HEAD = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
LINUX = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "inotify_init1"), reason="only Linux tells what is opened")
DRAW = """
(run / 'a.txt').write_text(str(seed))
(run / 'deep').mkdir(exist_ok=True)
(run / 'deep/b.txt').write_text('b')
"""
AUDIT = "for name in ('audit.txt', 'deep/more.txt'): (run / name).write_text(str(factor))"
BOTH = "text = (run / 'a.txt').read_text() + (run / 'deep/b.txt').read_text()"
CACHE = """
p = run / 'cache.txt'
if not p.exists(): p.write_text('dear')
if factor == 0: raise ValueError('stopped')
"""


def write_stage(folder: Path, name: str, body: str, reads="None", parameters="", metrics="{}"):
    "A stage that begins with what it says it reads, does one thing, and records it."
    cells = [f'run: str = "."  # run folder\nseed: int = 0  # of the draw\n{parameters}',
             f'from neural.record import begin, record\nrun, begun = begin(run, "{name}", globals(), {reads})', body,
             f'record("{name}", run, {metrics}, **begun)']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=HEAD)
    nb.cells[0].metadata["tags"] = ["parameters"]
    folder.mkdir(exist_ok=True, parents=True)
    nbformat.write(nb, folder / f"{name}.ipynb")


@pytest.fixture
def four(tmp_path, monkeypatch) -> Path:
    "One stage draws, one audits, one reads the draw alone, one says nothing of what it reads."
    monkeypatch.chdir(tmp_path)
    write_stage(tmp_path / "s", "10_draw", DRAW, "{}", metrics='{"seed": seed}')
    write_stage(tmp_path / "s", "52_audit", AUDIT, '{"10_draw": ["a.txt"]}',
                "factor: int = 1  # of the audit\nslow: float = 0.0  # of nothing", '{"half": factor // 2}')
    write_stage(tmp_path / "s", "60_imitate", BOTH, '{"10_draw": ["a.txt", "deep/b.txt"]}')
    write_stage(tmp_path / "s", "61_all", "pass")
    write_stage(tmp_path / "s", "70_page", "pass", '{"52_audit": ["52_audit.json"]}')
    return tmp_path / "s"


# what makes a stage run again

@LINUX
@pytest.mark.usefixtures("quick")
def test_a_change_in_what_a_stage_does_not_read_leaves_it_alone(four):
    assert len(ran(told(four, "r", strict=True))) == 5 and ran(told(four, "r", strict=True)) == []
    said = [read_record(Path("r"), s.name)["reads"] for s in find_stages(four)]
    assert said == [[], ["a.txt"], ["a.txt", "deep/b.txt"], None, ["52_audit.json"]]
    lines = told(four, "r", ["52"], given={"factor": "2"}, strict=True)
    assert lines[-1] == "out of date now: 61_all, 70_page; run again what you need of it"
    assert out_of_date(four, "r", []) == ["61_all", "70_page"] == ran(told(four, "r", strict=True))
    again = ran(told(four, "r", given={"10.seed": "1"}, strict=True))
    assert again == ["10_draw", "52_audit", "60_imitate", "61_all"]             # 52 found the same, so the page stands


@LINUX
@pytest.mark.usefixtures("quick")
def test_a_record_counts_by_what_it_found(four):
    told(four, "r", strict=True)
    assert ran(told(four, "r", ["52", "70"], force=True, strict=True)) == ["52_audit", "70_page"]
    assert ran(told(four, "r", ["52"], force=True, strict=True)) == ["52_audit"]
    entry = read_record(Path("r"), "52_audit")
    write_json("r/52_audit.json", {**entry, "wall_seconds": 9e9, "cores": 99, "command": "neural run elsewhere"})
    assert ran(told(four, "r", strict=True)) == []
    write_json("r/52_audit.json", {**entry, "metrics": {"half": 7}})
    assert ran(told(four, "r", strict=True)) == ["70_page"]
    assert ran(told(four, "r", given={"slow": "1"}, strict=True)) == ["52_audit", "70_page"]


@pytest.mark.usefixtures("quick")
def test_a_record_of_a_former_version_depends_on_all_before_it(four):
    told(four, "r")
    entry = read_record(Path("r"), "60_imitate")
    everything = short_hash(pipeline.upstream("r", find_stages(four)[2]))
    del entry["reads"]
    write_json("r/60_imitate.json", entry | {"inputs": {**entry["inputs"], "upstream": everything}})
    assert ran(told(four, "r")) == []
    assert ran(told(four, "r", given={"factor": "2"})) == ["52_audit", "60_imitate", "61_all", "70_page"]


@pytest.mark.usefixtures("quick")
def test_what_a_stopped_stage_left_is_its_own(four, monkeypatch):
    "It need not write again what it finds of its own, and what others left there stays theirs."
    write_stage(four, "52_audit", CACHE, "{}", "factor: int = 1  # 0 stops it")
    told(four, "r", ["10"])
    Path("r/mine.csv").write_text("by hand")
    with pytest.raises(ValueError, match="stopped"): told(four, "r", ["52"], given={"factor": "0"})
    entry = read_record(Path("r"), "52_audit")
    assert entry["found"] == ["mine.csv"] and "inputs" not in entry
    told(four, "r", ["52"], given={"factor": "1"})
    entry = read_record(Path("r"), "52_audit")
    assert list(entry["outputs"]) == ["cache.txt"] and "found" not in entry


# a runner that looks on

READERS = {
    "python": "(run / 'deep/b.txt').read_text()",
    "the system": "import os; os.close(os.open('deep/b.txt', os.O_RDONLY))",
    "another process": "import subprocess; subprocess.run(['cat', 'deep/b.txt'], check=True, capture_output=True)",
    "only if it is there": "text = (run / 'deep/b.txt').read_text() if (run / 'deep/b.txt').is_file() else ''",
    "in place": "(run / 'deep/b.txt').open('a').close()",
    "by another name": "import os; os.rename(run / 'deep/b.txt', run / 'mine.txt')",
    "pyarrow": "import pyarrow.parquet as pq; pq.read_table(run / 'deep/table.parquet', memory_map=True)",
    "safetensors": "from safetensors.numpy import load_file; load_file(run / 'deep/weights.safetensors')",
    "numpy": "import numpy as np; np.load(run / 'deep/films.npy', mmap_mode='r')[0]"}
FILES = {"pyarrow": "deep/table.parquet", "safetensors": "deep/weights.safetensors", "numpy": "deep/films.npy"}
NATIVE = """
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from safetensors.numpy import save_file
pq.write_table(pa.table({"k": [1]}), run / "deep/table.parquet")
save_file({"w": np.ones(3)}, run / "deep/weights.safetensors")
np.save(run / "deep/films.npy", np.ones(3))
"""


@LINUX
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", READERS)
def test_a_file_that_is_not_named_is_seen_however_it_is_opened(tmp_path, how):
    name = FILES.get(how, "deep/b.txt")
    write_stage(tmp_path / "s", "10_draw", DRAW + NATIVE, "{}")
    write_stage(tmp_path / "s", "60_late", READERS[how], '{"10_draw": ["a.txt"]}')
    run = tmp_path / "r"
    with pytest.raises(NeuralError) as caught: told(tmp_path / "s", run, strict=True)
    assert str(caught.value) == (f'stage 60_late opened what it does not say it reads: {{"10_draw": ["{name}"]}}; '
                                 "name it in its begin, or leave it alone")
    assert "inputs" in read_record(run, "10_draw") and "inputs" not in read_record(run, "60_late")
    if how == "by another name": return
    for names in ([name], ["deep"]):
        write_stage(tmp_path / "s", "60_late", READERS[how], json.dumps({"10_draw": names}))
        assert ran(told(tmp_path / "s", run, strict=True)) == ["60_late"]


OWN = """
(run / 'run.json').read_text()
(run / 'new.txt').write_text('x')
(run / 'new.txt').read_text()
(run / 'a.txt').read_text()
"""
UNNAMED = [("(run / '10_draw.json').read_text()", '{"10_draw": ["10_draw.json"]}'),
           ("(run / '10_draw.ipynb').read_text()", '{"10_draw": ["10_draw.ipynb"]}'),
           ("(run / '61_all.txt').read_text()", '{"61_all": ["61_all.txt"]}'),
           ("(run / 'mine.csv').read_text()", '{"no stage": ["mine.csv"]}'),
           ("[(run / n).read_text() for n in ('a.txt', 'deep/b.txt', 'mine.csv')]",
            '{"10_draw": ["deep/b.txt"], "no stage": ["mine.csv"]}'),
           (OWN, ""), ("(run / 'mine.csv').exists(); list(run.rglob('*'))", "")]


@LINUX
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("body, said", UNNAMED)
def test_records_of_others_files_of_later_stages_and_files_of_nobody(tmp_path, body, said):
    write_stage(tmp_path / "s", "10_draw", DRAW, "{}")
    write_stage(tmp_path / "s", "60_late", body, '{"10_draw": ["a.txt"]}')
    write_stage(tmp_path / "s", "61_all", "(run / '61_all.txt').write_text('later')", "{}")
    run = tmp_path / "r"
    told(tmp_path / "s", run, ["10", "61"], strict=True)
    (run / "mine.csv").write_text("by hand")
    if not said: assert ran(told(tmp_path / "s", run, strict=True)) == ["60_late"]
    for _ in range(2 if said else 0):                           # and again: it does not become its own by being read
        with pytest.raises(NeuralError) as caught: told(tmp_path / "s", run, ["60"], strict=True)
        assert f"reads: {said}; name it" in str(caught.value)


@LINUX
@pytest.mark.usefixtures("quick")
def test_a_stage_may_open_what_it_made_itself_before(tmp_path):
    body = """
(run / 'own').mkdir(exist_ok=True)
with (run / 'own/log.txt').open('a') as f: f.write('x')
if seed == 3: raise ValueError('stopped')
if seed == 4: (run / 'a.txt').read_text()
"""
    write_stage(tmp_path / "s", "10_draw", DRAW, "{}")
    write_stage(tmp_path / "s", "60_late", body, "{}")
    run = tmp_path / "r"
    go = lambda seed: ran(told(tmp_path / "s", run, given={"60.seed": seed}, strict=True))
    with pytest.raises(ValueError, match="stopped"): go("3")
    assert go("1") == ["60_late"]                               # over what it left half-way
    with pytest.raises(NeuralError, match="a.txt"): go("4")
    assert go("1") == go("2") == ["60_late"] and (run / "own/log.txt").read_text() == "xxxxx"


@LINUX
@pytest.mark.usefixtures("quick")
def test_what_is_changed_in_place_stays_another_s(tmp_path):
    write_stage(tmp_path / "s", "10_draw", DRAW, "{}")
    write_stage(tmp_path / "s", "60_late", "with (run / 'a.txt').open('a') as f: f.write('!')", "{}")
    told(tmp_path / "s", tmp_path / "r")
    assert "a.txt" in read_record(tmp_path / "r", "60_late")["outputs"]
    with pytest.raises(NeuralError, match='reads: {"10_draw": ."a.txt".}'):
        told(tmp_path / "s", tmp_path / "r", ["60"], force=True, strict=True)


@LINUX
@pytest.mark.usefixtures("quick")
def test_being_looked_at_changes_nothing(four):
    told(four, "free"), told(four, "held", strict=True)
    assert run_files("free").keys() == run_files("held").keys() and ran(told(four, "held")) == []
    same = ("metrics", "parameters", "figures")
    stable = lambda run: {n: {k: e[k] for k in same} for n, e in stage_records(run).items()}
    assert stable("free") == stable("held") and not list(Path("held").rglob("*.part"))


@LINUX
@pytest.mark.parametrize(
    "name, said",
    [("60_late", 'opened what it does not say it reads: {"10_draw": ["deep/b.txt"]}'),
     ("61_fails", "stopped in cell 3: ValueError: half a graph")],
)
def test_in_a_kernel_of_its_own(tmp_path, name, said):
    "A failed stage leaves what it wrote and an unfinished record, as without a look, and nothing else."
    write_stage(tmp_path / "s", "10_draw", DRAW, "{}")
    write_stage(tmp_path / "s", "60_late", BOTH, '{"10_draw": ["a.txt"]}')
    write_stage(tmp_path / "s", "61_fails", "(run / 'deep/b.txt').read_text()\nraise ValueError('half a graph')", "{}")
    run = tmp_path / "r"
    with pytest.raises(NeuralError) as caught:
        run_pipeline(tmp_path / "s", run, ["10", name], tell=lambda line: None, strict=True)
    assert said in str(caught.value) and "\n" not in str(caught.value) and "NEURAL_STRICT" not in os.environ
    left = ["run.json", "a.txt", "deep", *(f"{n}.{end}" for n in ("10_draw", name) for end in ("ipynb", "json", "log"))]
    assert sorted(p.name for p in run.iterdir() if p.name != ".lock") == sorted(left)


def test_where_the_system_cannot_tell_nothing_begins(four, monkeypatch):
    monkeypatch.setattr(pipeline.ctypes, "CDLL", lambda *words, **options: object())
    with pytest.raises(NeuralError, match="only Linux tells which files a stage opens; run without --strict"):
        told(four, "r", strict=True)
    assert not Path("r").exists()
