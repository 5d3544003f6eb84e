"A value for one stage: who gets it, what a run remembers of it, and the command that says it again."
import json
import shlex
from pathlib import Path

import nbformat
import pytest
import yaml
from test_pipeline import quick, ran, told, tree  # noqa: F401
from typer.testing import CliRunner

from neural.cli import app
from neural.pipeline import find_stages, load_preset, settle_parameters
from neural.record import read_record
from neural.study import NeuralError

ROOT = Path(__file__).parents[1]
HEAD = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
SEED = "seed: int = 0  # of all\n"


def write_stage(folder: Path, name: str, parameters: str):
    "A stage that records what it was told."
    names = [line.split(":")[0] for line in parameters.strip().splitlines()]
    cells = [f'run: str = "."  # run folder\n{parameters}',
             f'from neural.record import begin, record\nrun, begun = begin(run, "{name}", globals())',
             f'record("{name}", run, {{{", ".join(f"{n!r}: {n}" for n in names)}}}, **begun)']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=HEAD)
    nb.cells[0].metadata["tags"] = ["parameters"]
    folder.mkdir(exist_ok=True, parents=True)
    nbformat.write(nb, folder / f"{name}.ipynb")


@pytest.fixture
def three(tmp_path, monkeypatch) -> Path:
    "Three stages: all have a seed, two train for epochs, two mean something of their own by small."
    monkeypatch.chdir(tmp_path)
    write_stage(tmp_path / "s", "10_train", SEED + "epochs: int = 9  # passes")
    write_stage(tmp_path / "s", "57_rate", SEED + 'small: list = ["Fracture"]  # findings')
    write_stage(tmp_path / "s", "60_imitate", SEED + "epochs: int = 2  # passes\nsmall: float = 0.5  # a loss")
    (tmp_path / "s/presets").mkdir()
    return tmp_path / "s"


def found(run="r") -> dict:
    "What the three stages were told, by their own records."
    return {n: read_record(Path(run), n).get("metrics", {}) for n in ("10_train", "57_rate", "60_imitate")}


def remembered(run="r") -> dict:
    "What the run remembers of -p."
    return json.loads((Path(run) / "run.json").read_text())["given"]


def preset(folder: Path, text: str) -> str:
    "The preset p, written anew."
    (folder / "presets/p.yaml").write_text(text)
    return "p"


# who gets it

@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("scope", ["60", "60_imitate", "imitate", "58-69"])
@pytest.mark.parametrize("source", ["-p", "nested", "dotted"])
def test_a_stage_is_named_by_the_words_that_choose_stages(three, scope, source):
    if source == "-p": told(three, "r", given={f"{scope}.epochs": "3"})
    if source == "nested": told(three, "r", preset=preset(three, f"{scope}: {{epochs: 3}}\n"))
    if source == "dotted": told(three, "r", preset=preset(three, f"{scope}.epochs: 3\n"))
    assert [m.get("epochs") for m in found().values()] == [9, None, 3]


BOTH = "seed: 1\n60: {seed: 2}\n"
ORDER = [("seed: 1\n", {}, {}, (1, 1, 1)), (BOTH, {}, {}, (1, 1, 2)), ("60: {seed: 2}\nseed: 1\n", {}, {}, (1, 1, 2)),
         (BOTH, {"seed": "3"}, {}, (3, 3, 3)), (BOTH, {"seed": "3", "60.seed": "4"}, {}, (3, 3, 4)),
         (BOTH, {"57.seed": "3"}, {}, (1, 3, 2)), ("seed: 1\n", {"60.seed": "3"}, {"seed": "4"}, (4, 4, 4)),
         ("seed: 1\n", {"seed": "3"}, {"60.seed": "4"}, (3, 3, 4)),
         ("60: {seed: 2}\n", {"60.seed": "3"}, {"10.seed": "4"}, (4, 0, 3))]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("text, first, then, seeds", ORDER)
def test_what_is_said_later_wins_and_within_one_saying_what_is_said_to_one(three, text, first, then, seeds):
    told(three, "r", preset=preset(three, text), given=first)
    if then: told(three, "r", given=then)
    assert tuple(m["seed"] for m in found().values()) == seeds
    assert ran(told(three, "r")) == []


SMALL = "small is list[str] in 57_rate, float in 60_imitate; say which stage is meant, as in "
PRESETS = [("60: {epoks: 3}\n", "preset: 60_imitate has no parameter epoks; did you mean epochs"),
           ("61: {epochs: 3}\n", "preset: 61.epochs: no stage called 61; there are"),
           ("57: {epochs: 3}\n", "preset: 57_rate has no parameter epochs"),
           ("60: {run: here}\n", "preset: set run with --run"),
           ("60: {epochs: many}\n", "takes int, got 'many'"), ("60: {epochs: 3, epochs: 4}\n", "epochs stands twice"),
           ("60: {epochs: 3}\nimitate: {epochs: 4}\n", "60.epochs and imitate.epochs are the same parameter"),
           ("60: {}\n", "below 60 must stand"), ("60: {epochs: {first: 3}}\n", "below 60 must stand"),
           ("60: {epochs: 3}\n60.epochs: 4\n", "60.epochs stands twice"),
           ("60: {epochs: 3}\n\"60\": {seed: 4}\n", "60 stands twice"),
           ("60: {stages: [10]}\n", "60_imitate has no parameter stages"),
           ("small: 0.1\n", f"preset: {SMALL}`57: {{small: …}}`")]


@pytest.mark.parametrize("text, said", PRESETS)
def test_presets_that_do_not_say_what_they_mean(three, text, said):
    with pytest.raises(NeuralError) as caught: told(three, "r", preset=preset(three, text))
    assert said in str(caught.value) and "\n" not in str(caught.value) and not Path("r").exists()


GIVEN = [((), {"60.epoks": "3"}, "-p: 60_imitate has no parameter epoks; did you mean epochs"),
         ((), {"dose.seed": "3"}, "-p: dose.seed: no stage called dose"),
         ((), {"small": "0.1"}, f"-p: {SMALL}-p 57.small=…"),
         (["10"], {"60.epochs": "3"}, "-p: 60.epochs is for 60_imitate, which does not run now"),
         ((), {"60.manifest": "m"}, "60_imitate has no parameter manifest"),
         ((), {"57-60.small": "0.1"}, "-p: 57-60.small is list[str]"),
         ((), {"57.seed": "1", "rate.seed": "1"}, "57.seed and rate.seed are the same parameter")]


@pytest.mark.parametrize("words, given, said", GIVEN)
def test_values_that_do_not_say_what_they_mean(three, words, given, said):
    with pytest.raises(NeuralError) as caught: told(three, "r", words, given=given)
    assert said in str(caught.value) and "\n" not in str(caught.value) and not Path("r").exists()


def test_the_presets_of_this_companion_say_what_they_mean():
    "Every key is a name that papermill can assign, and no name of two types is in any of them."
    stages = find_stages(ROOT / "nbs/paper")
    for path in sorted((ROOT / "nbs/paper/presets").glob("*.yaml")):
        assert all(isinstance(k, str) and k.isidentifier() for k in yaml.safe_load(path.read_text())), path.name
        values = load_preset(path, ROOT / "nbs/paper")
        values.pop("stages", None)
        settle_parameters(stages, stages, values)               # a name of two types is refused here


# what a run remembers

@pytest.mark.usefixtures("quick")
def test_a_run_goes_on_with_what_was_said_to_one_stage(three):
    told(three, "r", ["10"], preset=preset(three, "seed: 1\n"), given={"10.epochs": "4"})
    told(three, "r", ["imitate"], given={"imitate.epochs": "3", "small": "0.25"})
    assert remembered() == {"10.epochs": "4", "60.epochs": "3", "60.small": "0.25"}
    before = tree(Path("r"))
    lines = told(three, "r", ["60"])
    assert lines[0] == "r goes on with what it was made with: --preset p -p 10.epochs=4 -p 60.small=0.25 -p 60.epochs=3"
    assert ran(lines) == [] and tree(Path("r")) == before
    Path("r/60_imitate.json").unlink()                                          # nothing but run.json knows it now
    assert ran(told(three, "r")) == ["57_rate", "60_imitate"]
    trained, rated, imitated = found().values()
    assert (trained, rated) == ({"seed": 1, "epochs": 4}, {"seed": 1, "small": ["Fracture"]})
    assert imitated == {"seed": 1, "epochs": 3, "small": 0.25}
    lines = told(three, "r", given={"60.epochs": "5"})
    assert lines[0].endswith("-p 10.epochs=4 -p 60.small=0.25") and ran(lines) == ["60_imitate"]
    assert lines[1] == "other settings than before, so run again: 60_imitate (epochs was 3, is 5)"
    told(three, "r", preset="p")                                # a named preset says all about the stages it runs
    assert found()["60_imitate"] == {"seed": 1, "epochs": 2, "small": 0.5} and remembered() == {}


@pytest.mark.usefixtures("quick")
def test_what_is_said_to_all_that_run_replaces_what_was_said_to_them_alone(three):
    told(three, "r", given={"10.seed": "4", "60.seed": "3"})
    told(three, "r", ["10", "57"], given={"seed": "5"})
    assert remembered() == {"60.seed": "3", "seed": "5"}
    assert [m["seed"] for m in found().values()] == [5, 5, 3]


@pytest.mark.usefixtures("quick")
def test_a_head_that_was_lost_is_written_anew_with_what_was_said_to_one_stage(three):
    told(three, "r", preset=preset(three, "seed: 1\n"), given={"60.epochs": "3", "57.small": '["Edema"]', "seed": "2"})
    head = Path("r/run.json")
    kept = json.loads(head.read_text())
    head.unlink()
    assert ran(told(three, "r")) == [] and json.loads(head.read_text()) == kept


@pytest.mark.usefixtures("quick")
def test_a_run_of_a_former_version_remembers_a_name_of_two_types_for_nobody(three):
    told(three, "r", ["57"], given={"small": "Edema"})
    for name in ("run", "57_rate"):
        text = Path(f"r/{name}.json").read_text()
        Path(f"r/{name}.json").write_text(text.replace('"57.small"', '"small"'))
    assert remembered() == {"small": "Edema"}
    told(three, "r")
    assert found()["57_rate"]["small"] == ["Edema"] and found()["60_imitate"]["small"] == 0.5


# the command that makes it again

CALLS = [[((), {"60.epochs": "3"})], [((), {"57.small": "Edema,Fracture", "60.small": "0.25"})],
         [(["57"], {"small": "Edema"}), (["60"], {"small": "0.25"})], [((), {"seed": "1", "60.seed": "2"})],
         [(["10"], {"seed": "1"}), (["57", "60"], {"57.seed": "2"})],
         [((), {"57-60.seed": "7", "imitate.small": "1e-05"})]]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("text", ["", "seed: 3\n60: {epochs: 5, small: 0.75}\n"])
def test_the_command_of_a_record_makes_it_again(three, calls, text):
    "Pasted into another folder, word by word, through the command itself."
    first = preset(three, text) if text else None
    for words, given in calls:
        told(three, "r", words, preset=first, given=given)
        first = None
    done = [n for n, m in found().items() if m]
    command = read_record(Path("r"), done[-1])["command"]
    assert command.startswith("neural run ") and command.endswith("--run r")
    for call in command.replace("--run r", "--run again").split(" && "):
        answer = CliRunner().invoke(app, shlex.split(call)[1:])
        assert answer.exit_code == 0, answer.output
    assert found("again") == found()
    for n in done: assert read_record(Path("again"), n)["parameters"] == read_record(Path("r"), n)["parameters"]
    assert read_record(Path("again"), done[-1])["command"].replace("--run again", "--run r") == command


@pytest.mark.usefixtures("quick")
def test_commands_are_as_short_as_what_was_said(three):
    told(three, "r", given={"imitate.epochs": "3", "57.small": "Edema", "seed": "4"})
    first, last = (read_record(Path("r"), n)["command"] for n in ("10_train", "60_imitate"))
    assert first == "neural run 10 -p seed=4 --stages s --run r"
    assert last == "neural run 10-60 -p seed=4 -p 57.small='[\"Edema\"]' -p 60.epochs=3 --stages s --run r"


def test_the_command_says_how_one_stage_is_told(three):
    answer = CliRunner().invoke(app, ["run", "--help"], terminal_width=400, env={"COLUMNS": "400"})
    said = " ".join(answer.output.split())
    assert "[STAGE.]NAME=VALUE" in said and "60.epochs=3" in said and "--strict" in said


@pytest.mark.parametrize("words", [["-p", "60.epochs"], ["-p", "60.=3"], ["-p", ".epochs=3"], ["-p", "6 0.epochs=3"],
                                   ["-p", "60.epochs=3", "-p", "60.epochs=4"]])
def test_what_is_no_assignment_is_a_usage_error(three, words):
    assert CliRunner().invoke(app, ["run", "--stages", str(three), "--run", "r", *words]).exit_code == 2
    assert not Path("r").exists()
