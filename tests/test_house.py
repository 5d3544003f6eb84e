"The house in order: notebooks and modules belong together, nothing forbidden, nothing of one machine, one environment."
import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import yaml

from neural.pipeline import code_cells, find_stages, imported_modules, parameters_cell, pick_stages, stage_parameters
from neural.publish import is_fresh, machine_paths
from neural.record import sha256_of

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "nbs/api").glob("*.ipynb"))
STAGES = sorted((ROOT / "nbs/paper").glob("[0-9]*.ipynb"))
PAGES = sorted((ROOT / "nbs/paper").glob("[!0-9]*.ipynb")) + sorted((ROOT / "nbs").glob("*.ipynb"))
NOTEBOOKS = CHAPTERS + STAGES + PAGES
MODULES = sorted(p for p in (ROOT / "neural").glob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
by_name = pytest.mark.parametrize


def names(path): return path.name


def options(source: str) -> str:
    "The directive lines of a cell."
    return "\n".join(line for line in source.splitlines() if line.startswith("#|"))


def bare(source: str) -> str:
    "A cell without lines only a notebook understands."
    return re.sub(r"(?m)^\s*[%!].*$", "", source)


# notebooks and modules

@pytest.fixture(scope="session")
def fresh_export(tmp_path_factory) -> Path:
    "The library exported, and the notebooks cleaned, once more from scratch in another folder."
    out = tmp_path_factory.mktemp("export")
    shutil.copytree(ROOT / "nbs", out / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", out)
    (out / "neural").mkdir()
    shutil.copy(ROOT / "neural/__init__.py", out / "neural")
    for tool in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([Path(sys.executable).parent / tool], cwd=out, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return out


def test_modules_are_what_the_notebooks_export(fresh_export):
    made, kept = ({p.name: p.read_text() for p in folder.glob("*.py") if p.name != "__init__.py"}
                  for folder in (fresh_export / "neural", ROOT / "neural"))
    assert sorted(made) == sorted(kept), "a module without a notebook, or a notebook not exported: run nbdev_export"
    assert [n for n in made if made[n] != kept[n]] == [], "modules and notebooks have drifted apart: run nbdev_export"


def test_notebooks_are_clean(fresh_export):
    dirty = [p.relative_to(ROOT).as_posix() for p in NOTEBOOKS
             if (fresh_export / p.relative_to(ROOT)).read_text() != p.read_text()]
    assert dirty == [], "run nbdev_clean"


def place(path) -> tuple:
    "Module and place of a chapter: 30 stands before 30b, and 30b before 31."
    number, letter, module = re.fullmatch(r"(\d+)([a-z]?)_(\w+)", path.stem).groups()
    return module, (int(number), letter)


def test_imports_only_run_upward():
    number = dict(map(place, CHAPTERS))
    assert len(set(number.values())) == len(CHAPTERS), "two chapters carry the same number"
    wrong = [f"{p.stem} imports {m}" for p in CHAPTERS for source in code_cells(p) for m in imported_modules(source)
             if m in number and number[m] > place(p)[1]]
    assert wrong == []


@by_name("path", NOTEBOOKS, ids=names)
def test_notebook_is_fit_to_be_committed(path):
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    assert path.stat().st_size <= 400_000, "larger than 400 KB: smaller pictures"
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    text = "\n".join(c.source for c in nb.cells) + json.dumps(
        [{k: v for k, v in o.get("data", {}).items() if k != "image/png"} or o.get("text") for o in outputs])
    assert machine_paths(text) == [], "a path of this machine"
    assert re.findall(r"(?<![\w.])/(?:home|root|Users|tmp|work)/[\w./-]+", text) == [], "a path of some machine"
    assert not [c for c in nb.cells if re.search(r"eval:\s*false|skip_exec", options(c.source))], "every cell runs"


@by_name("path", NOTEBOOKS, ids=names)
def test_first_visible_code_seeds(path):
    if path.name in ("index.ipynb", "glossary.ipynb"): pytest.skip("a page that runs nothing")
    cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"
             and not re.search(r"#\|\s*(export|default_exp|hide)", options(c.source))
             and "parameters" not in c.metadata.get("tags", [])]
    assert cells and re.search(r"seed|default_rng|Random\(", cells[0]), "the first visible code cell seeds the notebook"


@by_name("path", NOTEBOOKS, ids=names)
def test_figures_have_label_caption_and_words(path):
    labels = []
    for cell in nbformat.read(path, 4).cells:
        pictures = any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))
        lines = options(cell.source)
        if pictures:
            assert all(
                f"{need}: " in lines for need in ("label", "fig-cap", "fig-alt")
            ), f"a picture without label, caption or alt text:\n{cell.source[:200]}"
        labels += re.findall(r"label:\s*(\S+)", lines)
    assert len(set(labels)) == len(labels), "two figures with one label"


@by_name("path", CHAPTERS, ids=names)
def test_export_cells_are_small(path):
    cells = [c for c in nbformat.read(path, 4).cells
             if c.cell_type == "code" and re.search(r"#\|\s*export[si]?\b", options(c.source))]
    sizes = [len([l for l in c.source.splitlines() if l.strip() and not l.startswith("#|")]) for c in cells]
    assert max(sizes) <= 40, f"an export cell of {max(sizes)} lines"


def defines(source: str) -> bool:
    "Whether a code cell defines something that the library exports: imports alone do not count."
    exports = re.search(r"#\|\s*export[si]?\b", options(source)) is not None
    return exports and not all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(bare(source)).body)


def shown(sources: list[str]) -> list[bool]:
    "For each cell that defines something: is one of the next two code cells of another kind?"
    kinds = [re.search(r"#\|\s*export[si]?\b", options(s)) is not None for s in sources]
    return [not all(kinds[i + 1:i + 3]) for i, s in enumerate(sources) if defines(s)]


def test_the_measure_of_what_is_shown_looks_two_cells_ahead():
    define, use = "#| export\ndef f(): return 1", "f()"
    assert shown(["#| export\nimport os", define, use]) == [True]
    assert shown([define, define, define, use]) == [False, True, True]


def test_what_is_defined_is_shown_or_tested_within_two_cells():
    shares = {p.stem: shown(code_cells(p)) for p in CHAPTERS}
    worst = sorted((round(sum(s) / len(s), 2), name) for name, s in shares.items() if s)[:5]
    everything = [one for s in shares.values() for one in s]
    assert sum(everything) / len(everything) >= 0.80, f"show or test each definition where it stands, as in {worst}"


def test_half_of_all_definitions_are_short():
    cells = [s for p in CHAPTERS for s in code_cells(p) if defines(s)]
    lines = [len([l for l in s.splitlines() if l.strip() and not l.startswith("#|")]) for s in cells]
    assert statistics.median(lines) <= 12, f"half of all export cells have more than {statistics.median(lines)} lines"


def test_what_only_its_own_chapter_uses_is_internal():
    public = {p.stem: next((ast.literal_eval(n.value) for n in ast.parse(p.read_text()).body
                            if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), []) for p in MODULES}
    assert 200 < sum(map(len, public.values())) <= 450
    homes = {name: [m for m, names in public.items() if name in names] for names in public.values() for name in names}
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}, "one name, two meanings"


RUFF = [Path(sys.executable).parent / "ruff", "check", "--no-cache", "--output-format", "concise"]


def test_lines_fit_a_page_and_hold_one_statement():
    done = subprocess.run([*RUFF, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_linter_reads_notebooks(tmp_path):
    cell = nbformat.v4.new_code_cell("first = 1; second = 2\nlong = [" + "1, " * 60 + "]")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "wide.ipynb")
    done = subprocess.run([*RUFF, "--config", ROOT / "pyproject.toml", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "E702" in done.stdout and "E501" in done.stdout


# stages

@by_name("path", STAGES, ids=names)
def test_stage_form(path):
    declared = stage_parameters(path)                       # exactly one parameters cell, all typed, all readable
    assert {"run", "seed"} <= set(declared) and all(p.help for p in declared.values()), "every parameter has a comment"
    assert "#| export" not in parameters_cell(path)
    sources = code_cells(path)
    assert not [s for s in sources if re.search(r"#\|\s*export", options(s))], "a stage exports nothing"
    assert re.search(rf'record\(\s*[\'"]{path.stem}[\'"]', sources[-1]), "the last code cell records the stage"


@by_name("path", STAGES, ids=names)
def test_stage_outputs_belong_to_its_code(path):
    assert is_fresh(
        path), "the code changed since its outputs were made: run the quickstart preset and `neural publish` it"


def test_presets_speak_to_some_stage():
    known = {n: p for path in STAGES for n, p in stage_parameters(path).items()}
    found = sorted((ROOT / "nbs/paper/presets").glob("*.yaml"))
    assert [p.stem for p in found] == ["described", "open-i-warm", "open-i", "paper", "quickstart", "smoke"]
    for preset in found:
        values = yaml.safe_load(preset.read_text())
        pick_stages(find_stages(ROOT / "nbs/paper"), values.pop("stages", ()))
        scoped = {n: values.pop(n) for n in [n for n, v in values.items() if isinstance(v, dict)]}
        assert set(values) <= set(known), f"{preset.name}: {set(values) - set(known)}"
        for name, inner in scoped.items():
            own = set(stage_parameters(next(p for p in STAGES if p.stem.partition("_")[2] == name)))
            assert set(inner) <= own, f"{preset.name}, stage {name}: {set(inner) - own}"


def test_published_figures_are_those_of_the_run():
    published = ROOT / "figures/published.json"
    if not published.is_file(): pytest.skip("no run has been published yet")
    files = json.loads(published.read_text())["files"]
    assert [n for n, digest in files.items()
            if not (ROOT / "figures" / n).is_file() or sha256_of(ROOT / "figures" / n) != digest] == []


# forbidden things

FORBIDDEN = {"pickle.load", "pickle.loads", "torch.load", "joblib.load", "np.load(allow_pickle=True)", "eval", "exec",
             "os.system", "yaml.load", "shelve.open", "marshal.loads"}


def calls(source: str) -> set[str]:
    "Names of everything a piece of code calls."
    found = set()
    for node in ast.walk(ast.parse(bare(source))):
        if not isinstance(node, ast.Call): continue
        only_tensors = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
        found.add(ast.unparse(node.func) + "(weights_only=True)" * only_tensors)
        if ast.unparse(node.func).endswith(".load") and any(
            k.arg == "allow_pickle" and getattr(k.value, "value", None) for k in node.keywords):
            found.add("np.load(allow_pickle=True)")
        if any(k.arg == "shell" and getattr(k.value, "value", None) for k in node.keywords): found.add("shell=True")
    return found


@by_name("path", STAGES, ids=names)
def test_a_page_begins_with_the_answers_of_its_published_run(path):
    published = ROOT / "figures/records" / f"{path.stem}.json"
    said = json.loads(published.read_text()).get("answers", []) if published.is_file() else []
    cells = enumerate(nbformat.read(path, 4).cells)
    boxes = [(n, c.source) for n, c in cells if "answers" in c.metadata.get("tags", [])]
    assert [n for n, _ in boxes] == ([1] if said else [])
    assert not said or re.findall(r"(?m)^> - (.*)", boxes[0][1]) == said


@by_name("path", MODULES, ids=names)
def test_no_module_runs_what_it_reads(path):
    assert calls(path.read_text()) & (FORBIDDEN | {"shell=True"}) == set()
    assert (
        "torch.load(weights_only=True)" not in calls(path.read_text()) or path.name == "warmstart.py"
    ), "one module opens one file of known hash so"


def test_the_check_for_forbidden_calls_works():
    assert calls("import torch\ntorch.load(f); np.load(f, allow_pickle=True); subprocess.run(c, shell=True)") >= {
        "torch.load", "np.load(allow_pickle=True)", "shell=True"}
    assert calls("torch.load(f, weights_only=False)") == {"torch.load"} and calls(
        "torch.load(f, weights_only=True)") == {"torch.load(weights_only=True)"}


def test_nothing_is_left_unsaid():
    texts = [*NOTEBOOKS, *MODULES, *(ROOT / "tests").glob("*.py"), ROOT / "Makefile", ROOT / "settings.ini",
             ROOT / "pyproject.toml", *ROOT.glob("*.md"), *(ROOT / "data_manifests").glob("*")]
    words = "TO" + "DO", "FIX" + "ME", "XX" + "X:"
    assert [(p.name, w) for p in texts if p.is_file() for w in words
            if re.search(rf"\b{w}\b", p.read_text(errors="replace"))] == []


# environment

def pins(text: str) -> list[str]:
    "The `name==version` lines of a lock, comments left aside."
    return [line.split("#")[0].strip() for line in text.splitlines() if line.split("#")[0].strip()]


LOCK = (ROOT / "requirements.lock").read_text()


def normal(name: str) -> str: return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_pins_everything_once():
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", p) for p in pins(LOCK)), "exact pins only, no local versions"
    assert len({normal(p.split("==")[0]) for p in pins(LOCK)}) == len(pins(LOCK))


def test_environment_yml_equals_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"][:2] == ["python=3.11", "pip"]
    assert sorted(environment["dependencies"][2]["pip"]) == sorted(pins(LOCK))


def test_this_environment_is_the_lock():
    wrong = []
    for name, version in (p.split("==") for p in pins(LOCK)):
        try: here = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError: here = "missing"
        if here != version: wrong.append(f"{name}: {here}, lock {version}")
    assert wrong == [], "make install"


def test_what_is_imported_is_named_as_a_direct_dependency():
    direct = {normal(p.split("==")[0]) for p in pins(LOCK.split("# what those pull in")[0])}
    homes = metadata.packages_distributions()
    sources = [p.read_text() for p in MODULES + sorted((ROOT / "tests").glob("*.py"))] + [
        s for p in CHAPTERS + STAGES for s in code_cells(p)]
    wanted = set()
    for source in sources:
        for node in ast.walk(ast.parse(bare(source))):
            if isinstance(node, ast.Import):wanted |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level: wanted.add(node.module.split(".")[0])
    foreign = {m for m in wanted
               if m not in sys.stdlib_module_names and m != "neural" and not (ROOT / f"tests/{m}.py").is_file()}
    assert {
        m for m in foreign if not {normal(d) for d in homes.get(m, [m])} & direct
    } == set(), "add it to requirements.lock with its reason"


# papers and pages

def test_citation_parses():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cff["cff-version"] == "1.2.0" and cff["title"] and cff["message"] and cff["authors"]
            and cff["license"] == "Apache-2.0")
    from neural import __version__
    assert cff["version"] == __version__
    assert all(r["type"] and r["title"] and r["authors"] for r in cff["references"])


def test_licence_and_continuous_integration():
    assert "Apache License" in (ROOT / "LICENSE").read_text() and len((ROOT / "LICENSE").read_text()) > 11_000
    assert os.access(ROOT / ".ci/run", os.X_OK) and "make test" in (ROOT / ".ci/run").read_text()


def test_readme_is_the_home_page():
    from neural.docs import readme_text
    assert (ROOT / "README.md").read_text() == readme_text(ROOT / "nbs/index.ipynb"), "python -m neural.docs --readme"
    assert [
        m for m in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / "README.md").read_text()) if not (ROOT / m).exists()
    ] == [], "a link of README.md leads nowhere"
