"""The notebooks of nbs/paper as a person opens them: a fresh clone, from the top, in order, nothing typed.

This is the use that the project is named for, and the slowest file of the suite: five to seven minutes on two
cores, most of them in `by_hand`, which runs stages 10 to 50 with their defaults once for all tests that look at them.
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

from neural.record import begin, read_record, record, sha256_of

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
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "".join(f"\n{k} = {v!r}" for k, v in settings.items())
    nbclient.NotebookClient(
        nb, kernel_name="python3", timeout=900, resources={"metadata": {"path": str(cwd)}}).execute()
    return nb


def outputs(nb, kind):
    return [o for c in nb.cells if c.cell_type == "code" for o in c.outputs if o.output_type == kind]


def printed(nb):
    return "".join(o.text for o in outputs(nb, "stream") if o.name == "stdout")


# said by other libraries on the way in, of widgets that are not installed and of a tokenizer's folder
KNOWN = re.compile(
    r".*TqdmWarning: IProgress not found.*\n|  from \.autonotebook import .*\n|.*You are using a model of type"
    r" `report-vlm` .*\n|\s+")


def complaints(nb):
    "What went to stderr, without what is known: a bar, a fork that is regretted, a number that overflows."
    return KNOWN.sub("", "".join(o.text for o in outputs(nb, "stream") if o.name == "stderr"))


def pictures(nb):
    return [o for o in outputs(nb, "display_data") if "image/png" in o.data]


# one setup cell after another in one interpreter: the imports are paid once, the lines that are run are the notebooks'
# own
SETUP = '''
import contextlib, io, json, os, sys
import matplotlib; matplotlib.use("agg")
import nbformat
from neural.study import NeuralError
said = []
for path, cwd, typed, more in json.load(sys.stdin):
    os.chdir(cwd)
    names, heard = {"__name__": "__main__"}, io.StringIO()
    parameters, setup, *rest = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    with contextlib.redirect_stdout(heard):
        try:
            for source in (parameters, typed, setup, setup, *rest[:more]): exec(compile(source, path, "exec"), names)
            end = "begun"
        except NeuralError as e: end = str(e)
    said.append([end, heard.getvalue(), os.path.realpath(names.get("run") or names.get("figures") or ".")])
print(json.dumps(said))
'''


def set_up(jobs, library=None, more=0):
    """Run the first two code cells of notebooks, the second twice as people do, and some more: how each ended, what it
    printed, its folder. A job is a notebook, a working directory and what was typed."""
    env = {**os.environ, "PYTHONPATH": str(library or os.environ["PYTHONPATH"])}
    asked = json.dumps([[str(path), str(cwd), typed, more] for path, cwd, typed in jobs])
    done = subprocess.run([sys.executable, "-P", "-c", SETUP], input=asked, env=env, capture_output=True, text=True)
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

NETWORK = [f"vlm/{name}"
           for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "phrases.json")]
LEFT = {
    "10_finetune": ["manifest.csv", "manifest.json", "exclusions.csv", "images/ids.json", *NETWORK, "history.json",
                    "findings.json"],
    "20_prune": ["relevance.parquet", "mentions.parquet", "relations.parquet", "generated.parquet", "head.parquet",
                 "vlm/relevance.json"],
}
ZEROS = {"seeds = 0": "seeds must be 1 or more, got 0", "samples = 0": "samples must be 1 or more, got 0",
         "least = -1": "least must be 1 or more, got -1", "graph_lr = 0.0": "graph_lr must be above 0, got 0.0",
         "seeds = True": "parameter seeds takes int, got True"}
PLACES = {"the clone": "", "the notebook's folder": "nbs/paper", "another folder": ".."}


def partial_run(folder, *stages):
    "A run folder with what some stages leave, as far as a look at the names goes."
    for name in (n for s in stages for n in (*LEFT[s], f"{s}.json")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


@pytest.fixture(scope="module")
def beginnings(clone, tmp_path_factory):
    "Every way to begin that the tests below look at, in one interpreter."
    stage = lambda name: clone / f"nbs/paper/{name}.ipynb"
    runs = tmp_path_factory.mktemp("runs")
    ten, twenty = partial_run(runs / "ten", "10_finetune"), partial_run(runs / "twenty", "10_finetune", "20_prune")
    jobs = {
        ("alone", n): (stage(n), clone / "nbs/paper", f"run = {str(runs / 'empty')!r}") for n in (*FIRST[1:], *AUDIT)}
    jobs |= {(folder.name, n): (stage(n), folder, "run = '.'") for folder in (ten, twenty)
             for n in ("40_classify", "50_figures", "53_controls", "56_tasks", "58_codecs", "59_verdict")}
    jobs |= {("zero", typed): (stage("40_classify"), clone, typed) for typed in ZEROS}
    jobs |= {(place, n): (stage(n), clone / where, "") for place, where in PLACES.items()
             for n in ("10_finetune", "large", "draws", "open-i")}
    said = dict(zip(jobs, set_up(jobs.values())))
    assert not (runs / "empty").exists(), "a stage that refuses to start leaves nothing behind"
    return said


@pytest.mark.parametrize("name", [*FIRST[1:], *AUDIT])
def test_alone_a_stage_says_in_one_line_which_notebook_comes_first(beginnings, name):
    assert re.fullmatch(r"runs\d*/empty has no \S+: run 10_finetune\.ipynb first", beginnings["alone", name][0])


@pytest.mark.parametrize("left, then", [("ten", "20_prune"), ("twenty", "30_fuse")])
def test_what_is_missing_is_named_in_the_order_of_the_stages(beginnings, left, then):
    ends = {n: end for (what, n), (end, _, _) in beginnings.items() if what == left}
    assert len(ends) == 6 and {re.search(r"run (\w+)\.ipynb first$", end)[1] for end in ends.values()} == {then}, ends


@pytest.mark.parametrize("typed", ZEROS)
def test_a_count_of_zero_is_refused_by_its_name(beginnings, typed):
    assert beginnings["zero", typed][0] == ZEROS[typed]


@pytest.mark.parametrize("place", PLACES)
def test_every_notebook_finds_one_folder_from_every_working_directory(clone, beginnings, place):
    for name, where in (("10_finetune", "runs/by-hand"), ("large", "figures/bench"), ("draws", "figures/bench"),
                        ("open-i", "figures/open-i")):
        end, printed, folder = beginnings[place, name]
        assert end == "begun" and Path(folder) == (clone / where).resolve()
        assert bool(re.match(r"run folder: \S*.*runs/by-hand\n", printed)) == (name == "10_finetune")


def test_without_a_checkout_the_run_lies_where_the_notebook_does(clone, tmp_path):
    shutil.copytree(clone / "neural", tmp_path / "site-packages/neural")
    desk = tmp_path / "desk"
    desk.mkdir()
    for name in ("10_finetune", "open-i"): shutil.copyfile(clone / f"nbs/paper/{name}.ipynb", desk / f"{name}.ipynb")
    (end, printed, folder), (refused, _, _) = set_up(
        [(desk / "10_finetune.ipynb", desk, ""), (desk / "open-i.ipynb", desk, "")], tmp_path / "site-packages")
    assert (end, printed, Path(folder)) == ("begun", "run folder: runs/by-hand\n", (desk / "runs/by-hand").resolve())
    assert refused == "no published numbers in figures/open-i: name their folder in the parameters cell"


# a small training, again and with other settings

SMALL = dict(phantom_studies=60, image_size=96, width=32, d_model=32, vocab_size=300, warm_epochs=1, epochs=1.0,
             batch_size=16, recipe=["layers=1"])


def test_the_same_training_again_is_the_same_and_another_is_another(clone, tmp_path):
    small, stage = tmp_path / "small", lambda name: clone / f"nbs/paper/{name}.ipynb"
    def train(**settings):
        run_all(stage("10_finetune"), tmp_path, run="small", **SMALL | settings)
        return read_record(small, "10_finetune")["metrics"], sha256_of(small / "vlm/model.safetensors")

    def heard(*typed):
        return [(end, list(dict.fromkeys(printed.splitlines())))
                for end, printed, _ in set_up([(stage(n), tmp_path, "run = 'small'" + t) for n, t in typed])]

    first = train()
    # what stage 20 leaves, as far as the next ones look before they read it
    (small / "relevance.parquet").touch()
    for name in ("mentions.parquet", "relations.parquet", "generated.parquet", "vlm/relevance.json"):
        (small / name).touch()
    begun = begin(small, "20_prune", {"__annotations__": {"max_tokens": int}, "max_tokens": 96},
                  {"10_finetune": ["manifest.csv", "vlm/model.safetensors"]})[1]
    record("20_prune", small, {"kept patches": 4}, **begun)
    other = train(lr=1e-4)
    assert other[0] != first[0] and other[1] != first[1], "another learning rate trained the same network"
    stale = (
        "stale: 20_prune read another vlm/model.safetensors than there is now; run 20_prune.ipynb again, then this one")
    notes = ["note: max_tokens is 40 here and 96 in 10_finetune", stale,
             "note: max_tokens is 40 here and 96 in 20_prune"]
    assert heard(("30_fuse", ""), ("52_relevance", "; max_tokens = 40")) == [("begun", [stale]), ("begun", notes)]
    assert train() == first, "restart and run all: other numbers"
    assert heard(("30_fuse", "")) == [("begun", [])]
    assert not (small / "checkpoints").exists(), "a finished training leaves a checkpoint that another would go on from"


@pytest.mark.parametrize("known", [False, True])
def test_which_studies_stage_10_takes(clone, phantom_cohort, tmp_path, known):
    """Other settings draw other phantoms; a run that `neural run` began remembers its manifest, and no phantoms are
    drawn."""
    from neural.layouts import index_dataset
    if known:
        index_dataset("mimic-cxr", phantom_cohort, labels="truth/labels.csv")[0].save(tmp_path / "manifest.csv")
        (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "manifest": "manifest.csv"}))
    stage = clone / "nbs/paper/10_finetune.ipynb"
    said = set_up([(stage, tmp_path, f"run = '.'; phantom_studies = {n}; workers = 1") for n in (12, 20)], more=2)
    drawn = [re.search(r"\d+ studies of \d+ patients, layout mimic-cxr", printed)[0] for _, printed, _ in said]
    assert (drawn[0] == drawn[1]) == known and (tmp_path / "phantom").exists() != known


# the five stages with their defaults

def test_the_five_stages_run_in_order_with_nothing_typed(by_hand, run):
    for name, nb in by_hand.items():
        entry = read_record(run, name)
        assert entry["metrics"] and entry["seed"] == 0, name
        assert not complaints(nb), f"{name} complains:\n{complaints(nb)}"
        assert printed(nb).startswith("run folder: ../../runs/by-hand"), name
        assert "stale" not in printed(nb), name
    assert {name: len(pictures(nb)) for name, nb in by_hand.items()} == {
        "10_finetune": 2, "20_prune": 3, "30_fuse": 2, "40_classify": 2, "50_figures": 7}


def test_the_defaults_have_patients_to_spare(run):
    "Stage 40 needs five patients of each class; another seed must not fall below that."
    manifest = pd.read_csv(run / "manifest.csv")
    ill = manifest[(manifest.split == "test") & (manifest.Pneumonia == 1)].patient_id.nunique()
    assert ill >= 12


def test_the_network_of_the_defaults_has_learnt_something(run):
    assert read_record(run, "10_finetune")["metrics"]["mean AUC on validate"] > 0.6
    results = pd.read_csv(run / "results.csv").set_index(["track", "variant"])
    assert (
        results.low["image+report", "typed both"] > 0.5 and results.low["image-only", "label head, all patches"] > 0.5)
    places = read_record(run, "40_classify")["metrics"]["retained patches on test"]["Pneumonia"]
    assert (places["image+report"]["hit rate"] > places["random"]["hit rate"]
            and places["image+report"]["precision"] > places["random"]["precision"])


@pytest.mark.parametrize("name", ["30_fuse", "40_classify", "50_figures"])
def test_again_and_from_elsewhere_the_numbers_are_the_same(clone, run, tmp_path, name):
    first = read_record(run, name)
    nb = run_all(clone / f"nbs/paper/{name}.ipynb", clone if name == "30_fuse" else tmp_path)
    again = read_record(run, name)
    assert (again["metrics"] == first["metrics"] and again["figures"] == first["figures"]
            and again["read"].keys() == first["read"].keys())
    assert not complaints(nb) and "stale" not in printed(nb)
    assert not list(tmp_path.iterdir()), "something was written where the kernel started"
