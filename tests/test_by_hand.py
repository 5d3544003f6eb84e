"""The notebooks of nbs/paper as a person opens them: a fresh clone, from the top, in order, nothing typed.

This is the use that the project is named for, and the slowest file of the suite: two to three minutes on two free cores,
most of them in `by_hand`, which runs stages 10 to 50 with their defaults once for all tests that look at them.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pandas as pd
import pytest

from neural.pipeline import read_record, sha256_of

ROOT = Path(__file__).resolve().parents[1]
FIRST = ["10_finetune", "20_prune", "30_fuse", "40_classify", "50_figures"]
AUDIT = [p.stem for p in sorted((ROOT / "nbs/paper").glob("5[1-9]_*.ipynb"))]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "What a fresh clone holds of the project, with a blank in its path, and nothing of an earlier run."
    here = tmp_path_factory.mktemp("fresh clone") / "neural"
    for part in ("neural", "nbs/paper"):
        shutil.copytree(ROOT / part, here / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for part in ("settings.ini", "pyproject.toml", "figures/bench", "figures/open-i"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copyfile
        (here / part).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, here / part)
    return here


@pytest.fixture(scope="module", autouse=True)
def library_of_the_clone(clone):
    "Kernels import the clone's library, and nothing that `neural run` sets for its kernels helps them."
    was = dict(os.environ)
    for name in ("PYTHONHASHSEED", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE"): os.environ.pop(name, None)
    os.environ["PYTHONPATH"] = str(clone)
    yield
    os.environ.clear()
    os.environ.update(was)


def run_all(notebook, cwd, **settings):
    "'Run all' in a fresh kernel that starts in `cwd`; settings are typed into the parameters cell, as a person would."
    nb = nbformat.read(notebook, 4)
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []): cell.source += "".join(f"\n{k} = {v!r}" for k, v in settings.items())
    nbclient.NotebookClient(nb, kernel_name="python3", timeout=900, resources={"metadata": {"path": str(cwd)}}).execute()
    return nb


def outputs(nb, kind):
    return [o for c in nb.cells if c.cell_type == "code" for o in c.outputs if o.output_type == kind]


def printed(nb):
    return "".join(o.text for o in outputs(nb, "stream") if o.name == "stdout")


def complaints(nb):
    return "".join(o.text for o in outputs(nb, "stream") if o.name == "stderr")


def pictures(nb):
    return [o for o in outputs(nb, "display_data") if "image/png" in o.data]


# one setup cell after another in one interpreter: the imports are paid once, the lines that are run are the notebooks' own
SETUP = '''
import contextlib, io, json, os, sys
import matplotlib; matplotlib.use("agg")
import nbformat
from neural.study import NeuralError
said = {}
for path in sys.argv[2:]:
    names, heard = {"__name__": "__main__"}, io.StringIO()
    cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"][:2]
    if sys.argv[1]: cells.insert(1, sys.argv[1])
    with contextlib.redirect_stdout(heard):
        try:
            for source in cells: exec(compile(source, path, "exec"), names)
            end = "begun"
        except NeuralError as e: end = str(e)
    said[os.path.basename(path)[:-6]] = [end, heard.getvalue(), str(names.get("run") or names.get("figures"))]
print(json.dumps(said))
'''


def set_up(notebooks, cwd, typed="", library=None):
    "Run the first two code cells of some notebooks: stage -> how it ended, what it printed, its folder."
    env = {**os.environ, "PYTHONPATH": str(library or os.environ["PYTHONPATH"])}
    done = subprocess.run([sys.executable, "-c", SETUP, typed, *map(str, notebooks)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def by_hand(clone):
    "Stages 10 to 50, opened in JupyterLab one after another: stage -> executed notebook."
    return {name: run_all(clone / f"nbs/paper/{name}.ipynb", clone / "nbs/paper") for name in FIRST}


@pytest.fixture(scope="module")
def run(clone, by_hand):
    return clone / "runs/by-hand"


# before anything has run

def test_alone_a_stage_says_in_one_line_which_notebook_comes_first(clone, tmp_path):
    empty = tmp_path / "runs" / "empty"
    said = set_up([clone / f"nbs/paper/{name}.ipynb" for name in (*FIRST[1:], *AUDIT)], clone / "nbs/paper", f"run = {str(empty)!r}")
    assert sorted(said) == sorted((*FIRST[1:], *AUDIT))
    for name, (end, _, _) in said.items(): assert re.fullmatch(r"runs/empty has no \S+: run 10_finetune\.ipynb first", end), (name, end)
    assert not empty.exists(), "a stage that refuses to start leaves nothing behind"


@pytest.mark.parametrize("left, then", [
    (["manifest.csv", "images/ids.json", "vlm/model.safetensors", "history.json"], "20_prune"),
    (["manifest.csv", "images/ids.json", "vlm/model.safetensors", "history.json", "relevance.parquet", "mentions.parquet", "relations.parquet", "generated.parquet", "head.parquet", "vlm/relevance.json"], "30_fuse"),
])
def test_what_is_missing_is_named_in_the_order_of_the_stages(clone, tmp_path, left, then):
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    said = set_up([clone / f"nbs/paper/{name}.ipynb" for name in ("40_classify", "50_figures", "53_controls", "56_tasks", "58_codecs", "59_verdict")], tmp_path, "run = '.'")
    assert {re.search(r"run (\w+)\.ipynb first", end)[1] for end, _, _ in said.values()} == {then}


@pytest.mark.parametrize("typed, why", [("seeds = 0", "seeds must be 1 or more, got 0"), ("samples = 0", "samples must be 1 or more, got 0"), ("least = -1", "least must be 1 or more, got -1"),
                                        ("graph_lr = 0.0", "graph_lr must be above 0, got 0.0"), ("seeds = True", "seeds must be 1 or more, got True")])
def test_a_count_of_zero_is_refused_by_its_name(clone, typed, why):
    assert set_up([clone / "nbs/paper/40_classify.ipynb"], clone, typed)["40_classify"][0] == why


def test_every_notebook_finds_one_folder_from_every_working_directory(clone, tmp_path):
    pages = [clone / "nbs/paper/large.ipynb", clone / "nbs/paper/open-i.ipynb"]
    for cwd in (clone, clone / "nbs/paper", tmp_path):
        said = set_up([clone / "nbs/paper/10_finetune.ipynb", *pages], cwd)
        assert {end for end, _, _ in said.values()} == {"begun"}
        assert [Path(cwd, said[n][2]).resolve() for n in ("10_finetune", "large", "open-i")] == [(clone / d).resolve() for d in ("runs/by-hand", "figures/bench", "figures/open-i")]
        assert said["10_finetune"][1].startswith("run folder: ")


def test_without_a_checkout_the_run_lies_where_the_notebook_does(clone, tmp_path):
    shutil.copytree(clone / "neural", tmp_path / "site-packages/neural")
    (tmp_path / "desk").mkdir()
    for name in ("10_finetune", "open-i"): shutil.copyfile(clone / f"nbs/paper/{name}.ipynb", tmp_path / f"desk/{name}.ipynb")
    said = set_up(sorted((tmp_path / "desk").glob("*.ipynb")), tmp_path / "desk", library=tmp_path / "site-packages")
    assert said["10_finetune"][:2] == ["begun", "run folder: runs/by-hand\n"]
    assert Path(said["10_finetune"][2]).resolve() == (tmp_path / "desk/runs/by-hand").resolve()
    assert said["open-i"][0] == "no published numbers in figures/open-i: name their folder in the parameters cell"


# a small training, twice and with other settings

SMALL = dict(phantom_studies=60, image_size=96, width=32, d_model=32, layers=1, vocab_size=300, warm_epochs=1, epochs=1.0, batch_size=16)


def test_the_same_training_again_is_the_same_and_another_is_another(clone, tmp_path):
    stage = clone / "nbs/paper/10_finetune.ipynb"
    def train(**settings):
        run_all(stage, tmp_path, run="small", **SMALL | settings)
        return read_record(tmp_path / "small", "10_finetune")["metrics"], sha256_of(tmp_path / "small/vlm/model.safetensors")

    first, again = train(), train()
    assert again == first, "restart and run all: other numbers"
    assert not (tmp_path / "small/checkpoints").exists()
    run_all(clone / "nbs/paper/20_prune.ipynb", tmp_path, run="small")
    downstream = [clone / f"nbs/paper/{n}.ipynb" for n in ("30_fuse", "52_relevance")]
    assert [printed for _, printed, _ in set_up(downstream, tmp_path, "run = 'small'").values()] == ["", ""]
    other = train(lr=1e-4)
    assert other[0] != first[0] and other[1] != first[1], "another learning rate trained the same network"
    for end, printed, _ in set_up(downstream, tmp_path, "run = 'small'").values():
        assert end == "begun" and printed == "stale: 20_prune read another vlm/model.safetensors than there is now; run 20_prune.ipynb again, then this one\n"
    wide = train(phantom_studies=70, seed=1)
    assert wide[0]["studies"] > first[0]["studies"], "the cohort of other settings was taken for this one"
    noted = set_up([downstream[1]], tmp_path, "run = 'small'; max_tokens = 40")["52_relevance"][1]
    assert "note: max_tokens is 40 here and 96 in 10_finetune" in noted and "read another manifest.csv" in noted


# the five stages with their defaults

def test_the_five_stages_run_in_order_with_nothing_typed(by_hand, run):
    for name, nb in by_hand.items():
        entry = read_record(run, name)
        assert entry["metrics"] and entry["seed"] == 0, name
        assert not complaints(nb), f"{name} complains:\n{complaints(nb)}"
        assert printed(nb).startswith("run folder: ../../runs/by-hand"), name
        assert "stale" not in printed(nb), name
    assert {name: len(pictures(nb)) for name, nb in by_hand.items()} == {"10_finetune": 2, "20_prune": 3, "30_fuse": 2, "40_classify": 1, "50_figures": 7}


def test_the_defaults_have_patients_to_spare(run):
    "Stage 40 needs five patients of each class; another seed must not fall below that."
    manifest = pd.read_csv(run / "manifest.csv")
    ill = manifest[(manifest.split == "test") & (manifest.Pneumonia == 1)].patient_id.nunique()
    assert ill >= 12


def test_the_network_of_the_defaults_has_learnt_something(run):
    assert read_record(run, "10_finetune")["metrics"]["mean AUC on validate"] > 0.6
    results = pd.read_csv(run / "results.csv").set_index(["track", "variant"])
    assert results.low["image+report", "typed both"] > 0.5 and results.low["image-only", "label head, all patches"] > 0.5
    places = read_record(run, "40_classify")["metrics"]["retained patches on test"]["Pneumonia"]
    assert places["image+report"]["hit rate"] > places["random"]["hit rate"] and places["image+report"]["precision"] > places["random"]["precision"]


@pytest.mark.parametrize("name", ["30_fuse", "40_classify", "50_figures"])
def test_again_and_from_elsewhere_the_numbers_are_the_same(clone, run, tmp_path, name):
    first = read_record(run, name)
    nb = run_all(clone / f"nbs/paper/{name}.ipynb", clone if name == "30_fuse" else tmp_path)
    again = read_record(run, name)
    assert again["metrics"] == first["metrics"] and again["figures"] == first["figures"] and again["read"].keys() == first["read"].keys()
    assert not complaints(nb) and "stale" not in printed(nb)
    assert not list(tmp_path.iterdir()), "something was written where the kernel started"


def test_a_run_of_the_command_is_read_by_hand_too(clone, run, tmp_path):
    "A run folder that `neural run` began remembers its manifest; stage 10 by hand takes it, not new phantoms."
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "manifest": os.path.relpath(run / "manifest.csv", tmp_path)}))
    nb = nbformat.read(clone / "nbs/paper/10_finetune.ipynb", 4)
    nb.cells = nb.cells[: next(i for i, c in enumerate(nb.cells) if "index_dataset(" in c.source and "write_cohort" in c.source) + 1]
    nbformat.write(nb, tmp_path / "beginning.ipynb")
    text = printed(run_all(tmp_path / "beginning.ipynb", tmp_path, run="."))
    assert f"{len(pd.read_csv(run / 'manifest.csv').study_id.unique())} studies" in text and not (tmp_path / "phantom").exists()
