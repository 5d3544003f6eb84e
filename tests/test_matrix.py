"""Every command against every hazard: the right result or one line, nothing of the user's lost, nothing half-written.

The table `ROWS` says how each command is called and what it reads and writes; the table `HAZARDS` says what may go
wrong around it. Every pair is a test, and each test tries a handful of cases: other files, other moments.
"""
import errno
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import pytest

from hazards import Nursery, can_mount, tree

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the hazards are made by means of Linux")
STAGES = Path(__file__).parent / "fixtures/stages"
LARDER = Path(__file__).parent / "fixtures/larder.py"
ABOUT = "--name phantoms --licence CC0-1.0 --url https://example.org --creator nobody --published 2026-01-01"
STUB = (
    "import pandas, neural.bench; neural.bench.bench_store = lambda **k: {'store': pandas.DataFrame({'s': [1.5, 2]})}")
DRAWS = (
    "import neural.draws as d, pandas; d.bench_draws = lambda keep=None, **k: {'summary': pandas.DataFrame({'value':"
    " [0.5, k['settings']['studies']]})}")
STARTS = """
import neural.starts as s, pandas
from neural.study import Manifest
def stub(manifest, settings, *more):
    Manifest.load(manifest)
    names = "auc", "differences", "trainings"
    tables = {name: pandas.DataFrame({"value": [0.5, settings["epochs"]]}) for name in names}
    more[-1](tables)
    return tables
s.bench_starts = stub
"""
EXPLORE = """
import neural.explorer as e
from neural.build import load_readings
def stub(folder, habit, device):
    found = load_readings(folder, "image+report")
    return {"studies": found, "tested": len(found), "phantoms": True}
e.explored, e.explorer_page = stub, lambda data: e.EXPLORER_MARK + str(data["tested"])
"""
DRAFT = re.compile(r"(^|/)(\.(?!lock$)[^/]*|[^/]*\.(part|tmp))(/|$)")
CARDS = "from neural.export import write_cards; write_cards('in/run')"


# commands

def bytes_of(place) -> dict:
    "What is in a file or a folder, byte for byte."
    if Path(place).is_dir(): return {n: d for n, d in tree(place).items() if not DRAFT.search(n)}
    return Path(place).read_bytes() if Path(place).is_file() else None


def assets_of(place) -> dict:
    "The assets of a store, however they are spread over shards."
    from neural.asset import AssetStore
    return {a.study_id: a.to_bytes() for a in AssetStore(place)}


def sums_of(place) -> dict:
    "What the stages of a run computed; their records also hold times."
    return {n: d for n, d in tree(place).items() if n.endswith(".txt")}


def shape_of(place) -> list:
    "The names of measured tables."
    from neural.yardstick import read_tables
    return sorted(read_tables(place)[1])


@dataclass(frozen=True)
class Row:
    "How a command is called on a desk: what lies there, what it writes, what it may change or leave."
    words: str                                  # as typed, with {out}
    inputs: dict = field(default_factory=dict)  # place on the desk -> place in the larder
    out: str = ""                               # place of its output; "": it writes none
    folder: bool = False                        # the output is a folder
    other: str = ""                             # the same command with other settings
    own: str = "$"                              # inputs that it is asked to change, a pattern
    leaves: str = "$"                           # what it may leave when it is stopped, to go on from, a pattern
    same: Callable = bytes_of                   # what of the output must be the same each time
    first: str = ""                             # Python that is run before it, or instead of it
    free: str = "$"                             # inputs that may be like that, a pattern such as "in/key damaged"
    most: int = 5                               # cases that are tried of each hazard


def index(layout, data, more="") -> Row:
    "A row of `neural index`."
    words = f"index {layout} in/data -o {{out}} --limit 1{more}"
    beside = r"out/(exclusions\.csv|list\.json)$"
    other = words + (" --limit 0.9" if "--allow-no-report" in more else " --allow-no-report")
    return Row(words, {"in/data": data, "in/labels.csv": "labels.csv"}, "out/list.csv", other=other, leaves=beside)


SHARDS = r"(out/store|in/store)/(store\.parquet|_?codebook\.safetensors|shard-[\w-]+\.parquet)$"
BUILD = "build in/list.csv {out} --vlm in/vlm --workers 0 --limit 1 --key-file in/key --codec pq --codebook in/book"
BASELINE = "baseline in/list.csv --vlm in/vlm --workers 0 --limit 1"
MAPS = r"in/vlm/scores\.(json|safetensors)$"
ROWS = {
    "phantom": Row(
        "phantom {out} --studies 3 --size 64", {}, "out/cohort", True, "phantom {out} --studies 3 --size 64 --seed 1"),
    "index mimic-cxr": index("mimic-cxr", "cohort", " --labels in/data/truth/labels.csv"),
    "index chexpert-plus": index("chexpert-plus", "chexpert"),
    "index chexpert": index("chexpert", "films", " --allow-no-report"),
    "index open-i": index("open-i", "openi"),
    "index nih": index("nih", "nih", " --allow-no-report"),
    "index folder": index("folder", "folder", " --labels in/labels.csv --hash"),
    "run": Row(
        "run 10 --stages in/stages --preset in/small.yaml --manifest in/list.csv --run {out}",
        {"in/stages": "stages", "in/small.yaml": "stages/presets/small.yaml", "in/list.csv": "list.csv",
         "in/list.json": "list.json"},
        "out/run",
        True,
        "run 10 --stages in/stages --run {out} -p count=1",
        leaves=r"out/run/[^.]",
        same=sums_of,
        most=2,
        free=r"in/(small\.yaml|list\.csv) (empty|damaged)",
    ),
    "publish": Row("publish in/run --stages in/stages --figures {out}", {"in/run": "run", "in/stages": "stages"},
                   "out/figures", True, "publish in/run --stages in/stages --figures {out} --numbers",
                   own=r"in/stages/\d+_\w+\.ipynb", leaves="out/figures/[^.]"),
    "build": Row(
        BUILD,
        {"in/list.csv": "list.csv", "in/list.json": "list.json", "in/data": "cohort", "in/vlm": "vlm", "in/key": "key",
         "in/book": "book"},
        "out/store",
        True,
        BUILD + " --thumbnail 450",
        leaves=SHARDS,
        same=assets_of,
        most=3,
        free="in/key damaged",
    ),
    "codebook": Row("codebook in/run -o {out} --codec pq --bytes 4", {"in/run": "readings"}, "out/book.safetensors",
                    other="codebook in/run -o {out} --codec pca --bytes 4"),
    "predict": Row("predict in/store --classifier in/gcn -o {out}", {"in/store": "store", "in/gcn": "gcn"},
                   "out/p.csv", other="predict in/store --classifier in/gcn2 -o {out}"),
    "predict-films": Row("predict-films in/net in/films -o {out}", {"in/net": "net", "in/films": "folder"},
                         "out/p.csv", other="predict-films in/net in/films -o {out} --workers 1"),
    "verify": Row("verify in/store", {"in/store": "store"}),
    "compact": Row("compact in/store", {"in/store": "store"}, "in/store", True, "compact in/store --size 2", SHARDS,
                   SHARDS, assets_of),
    "describe": Row(f"describe in/store {ABOUT}", {"in/store": "store"}, "in/store/_croissant.json",
                    other=f"describe in/store {ABOUT} --description more"),
    "bench": Row("bench store --small --out {out}", {}, "out/found.json", other="bench store --studies 9 --out {out}",
                 same=shape_of, first=STUB),
    "bench draws": Row("bench draws --small --out {out}", {}, "out/found.json",
                       other="bench draws --small --studies 90 --out {out}", same=shape_of, first=DRAWS),
    "starts": Row("starts in/list.csv --small --out {out}",
                  {"in/list.csv": "list.csv", "in/list.json": "list.json", "in/data": "cohort"}, "out/found.json",
                  other="starts in/list.csv --small --epochs 2 --out {out}", same=shape_of, first=STARTS),
    "scorers": Row("scorers"),
    "baseline": Row(BASELINE,
                    {"in/list.csv": "list.csv", "in/list.json": "list.json", "in/data": "cohort", "in/vlm": "vlm"},
                    "in/vlm/scores.json", other=BASELINE + " --studies 2", own=MAPS, leaves=MAPS, most=2),
    "inspect": Row("inspect in/store s1", {"in/store": "store"}),
    "inspect --html": Row("inspect in/store s1 --html {out}", {"in/store": "store"}, "out/page.html",
                          other="inspect in/store s2 --html {out}"),
    "explore": Row("explore in/run -o {out}", {"in/run": "readings"}, "out/page.html",
                   other="explore in/run -o {out} --device cpu", first=EXPLORE),
    "cards": Row("", {"in/run": "run"}, "in/run/model_card.md", first=CARDS, own=r"in/run/\w+_card\.md"),
}


def commands() -> set:
    "The commands there are, hidden ones too."
    from neural.cli import app
    return {c.name or c.callback.__name__ for c in app.registered_commands}


def test_every_command_has_a_row():
    from neural.layouts import LAYOUTS
    assert commands() <= {name.split()[0] for name in ROWS}, "a command without a row in this table"
    assert {f"index {layout}" for layout in LAYOUTS} <= set(ROWS), "a layout without a row in this table"


# the desk

@pytest.fixture(scope="module")
def nursery():
    "The process that forks for every case."
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def larder(nursery, tmp_path_factory) -> Path:
    "One of everything a command reads, small, made once."
    place = tmp_path_factory.mktemp("matrix") / "larder"
    place.mkdir()
    shutil.copytree(STAGES, place / "stages")
    made = nursery.run(cwd=place, first=LARDER.read_text(encoding="utf-8"), seconds=120)
    assert made["status"] == 0, made["err"]
    return place


@pytest.fixture(scope="module")
def mounts() -> bool:
    "Whether small and read-only file systems can be made; else their errors are raised at every write."
    return can_mount()


class Desk:
    "A clean folder with the inputs of one command, and what a command did there."
    def __init__(self, name, nursery, larder, mounts):
        self.row, self.nursery, self.larder, self.mounts = ROWS[name], nursery, larder, mounts
        self.place, self.wrong, self.tried = larder.parent / "desk", [], 0
        self.clean = None

    def lay(self):
        "Everything as before the first command."
        shutil.rmtree(self.place, ignore_errors=True)
        (self.place / "out").mkdir(parents=True)
        for to, what in self.row.inputs.items():
            source = self.larder / what
            (self.place / to).parent.mkdir(exist_ok=True)
            shutil.copytree(source, self.place / to) if source.is_dir() else shutil.copy(source, self.place / to)
        return self.place

    def call(self, words=None, out=None, **job) -> dict:
        "The command, once."
        line = (self.row.words if words is None else words).format(out=out or self.row.out)
        return self.nursery.run(*shlex.split(line), cwd=self.place, first=self.row.first, **job)

    def try_out(self, detail, may=(0, 1, 2), reason="", out=None, words=None, **job) -> dict:
        "The command in a case, held against what holds in every case."
        before = tree(self.place)
        answer = self.call(words, out, **job)
        self.tried += 1
        for what in judge(self.row, before, answer, may, reason, out): self.wrong.append(f"{detail}: {what}")
        return answer

    def result(self):
        "What must be the same each time; None where there is nothing, or nothing that can be read."
        try: return self.row.same(self.place / self.row.out) if self.row.out else ""
        except Exception: return None

    def right(self):
        "The result of an undisturbed command."
        if self.clean is None:
            self.lay()
            self.call()
            self.clean = self.result()
        return self.clean

    def expect(self, detail, holds, what):
        "One more thing that holds."
        if not holds: self.wrong.append(f"{detail}: {what}")


def judge(row, before, answer, may, reason="", out=None) -> list:
    "What is wrong with an answer."
    status, said, left, wrong = answer["status"], answer["err"], answer["left"], []
    made = re.compile(rf"{re.escape(out or row.out or '$')}|{row.own}")
    if status not in may:
        wrong.append(
            f"status {status} instead of {' or '.join(map(str, may))}: {(said or answer['out'])[-300:].strip()!r}")
    if status == 0 and said: wrong.append(f"not quiet: {said[:200]!r}")
    if status and status > 0:
        if len(said.strip().splitlines()) != 1: wrong.append(f"not one line: {said[:600]!r}")
        if "unexpected " in said or "Traceback" in said: wrong.append(f"not plain: {said[:300]!r}")
        if reason and reason not in said: wrong.append(f"{reason!r} is not said: {said[:300]!r}")
    for path, content in before.items():
        ours = re.match(row.own, path) or (status == 0 or re.match(row.leaves, path)) and (made.match(path))
        if left.get(path) != content and not path.endswith("/") and not (ours and (path in left or status == 0)):
            wrong.append(f"{path} was {'changed' if path in left else 'lost'}")
    for path in set(left) - set(before):
        if path.endswith("/") or path.endswith("/.lock"): continue
        if DRAFT.search(path): wrong.append(f"{path} is left behind")
        elif status and "is written" not in said and not re.match(row.leaves, path) and not re.match(row.own, path):
            wrong.append(f"{path} is left, though it failed")
        elif not status and not made.match(path) and Path(path).parent != Path(out or row.out).parent:
            wrong.append(f"{path} was not asked for")
    return wrong


def some(items, most) -> list:
    "A few of many, evenly spread, the first and the last among them."
    items = list(items)
    if len(items) <= most: return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)] if most > 1 else items[:1]


def kinds_of(paths, most) -> list:
    "A few files, one of each kind before a second of any."
    seen, turn = {}, {}
    for p in sorted(paths):
        kind = (p.split("/")[1], Path(p).suffix)
        seen[p] = turn[kind] = turn.get(kind, -1) + 1
    return sorted(seen, key=lambda p: seen[p])[:most]


def inner(desk) -> list:
    "Files within the folders that the command reads, one of each kind."
    files = [p for p in tree(desk.place) if p.startswith("in/") and p not in desk.row.inputs and "/." not in p]
    return kinds_of(files, desk.row.most)


# hazards

def undisturbed(desk):
    "Nothing is in the way."
    desk.lay()
    desk.try_out("plainly", may=(0,))
    desk.expect("plainly", not desk.row.out or (desk.place / desk.row.out).exists(), "no output")


def own_input(desk):
    "An input is named as the output: itself, through a link, and what a command writes beside its output."
    if not desk.row.words.count("{out}"): return
    desk.lay()
    folders = sorted({str(Path(p).parent) for p in tree(desk.place) if p.startswith("in/")}
                     | {p for p in desk.row.inputs if (desk.place / p).is_dir()})
    files = [p for p in desk.row.inputs if (desk.place / p).is_file()] + inner(desk)
    for target in [*files, *some(folders, 3)]:
        desk.lay()
        desk.try_out(f"-o {target}", may=(0, 1, 2) if desk.row.folder and target in folders else (1, 2), out=target)
    for target, how in zip(files * 2, (os.link, lambda a, b: os.symlink(a.resolve(), b))):
        desk.lay()
        how(desk.place / target, desk.place / "out/linked")
        desk.try_out(f"-o a link to {target}", may=(1, 2), out="out/linked")
    for target in files[:2]:
        desk.lay()
        desk.try_out(f"-o beside {target}", out=str(Path(target).with_suffix(".out.csv" if "." in target else ".csv")))
        desk.lay()
        desk.try_out(f"-o of the stem of {target}", out=str(Path(target).with_suffix(".other")))


def strangers(desk):
    "Somebody else's files lie where the command would write."
    if not desk.row.out: return
    before = set(tree(desk.lay()))
    desk.call()
    files = kinds_of(
        [p for p in set(tree(desk.place)) - before if not p.endswith(("/", ".lock")) and not re.match(desk.row.own, p)],
        desk.row.most)
    for path in files:
        desk.lay()
        (desk.place / path).parent.mkdir(parents=True, exist_ok=True)
        (desk.place / path).write_text("mine\n")
        desk.try_out(f"{path} of somebody else")
        desk.expect(f"{path} of somebody else", (desk.place / path).read_bytes() == b"mine\n", "was written over")


def _each_input(desk, spoil, word):
    "Each input, and files within it, spoilt in turn."
    desk.lay()
    for path in [*desk.row.inputs, *inner(desk)]:
        desk.lay()
        spoil(desk.place / path)
        needed = path in desk.row.words.split() and not re.match(desk.row.free, f"{path} {word}")
        desk.try_out(f"{path} {word}", may=(1, 2) if needed else (0, 1, 2))


def remove(path):
    "Takes a file or a folder away."
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path):
    "Leaves nothing in a file or a folder."
    remove(path)
    path.mkdir() if "." not in path.name and path.name not in ("key", "book") else path.write_bytes(b"")


def swap(path):
    "A file where a folder is expected, a folder where a file is expected."
    was = path.is_dir()
    remove(path)
    path.write_text("text\n") if was else path.mkdir()


def garbage(path):
    "Bytes that are nothing, or a folder of one such file."
    if path.is_dir():
        remove(path)
        path.mkdir()
        path = path / "x.bin"
    path.write_bytes(bytes(range(256)) * 3)


def missing(desk):
    "An input is not there."
    _each_input(desk, remove, "missing")


def nothing_in_it(desk):
    "An input is empty."
    _each_input(desk, empty, "empty")


def damaged(desk):
    "An input is something else."
    _each_input(desk, garbage, "damaged")


def wrong_kind(desk):
    "A folder instead of a file, and the other way round, for inputs and for the output."
    _each_input(desk, swap, "of the wrong kind")
    if "{out}" not in desk.row.words: return
    desk.lay()
    (desk.place / "out/taken").mkdir() if not desk.row.folder else (desk.place / "out/taken").write_text("mine\n")
    desk.try_out("the output of the wrong kind", may=(1, 2), out="out/taken")
    desk.lay()
    (desk.place / "out/file").write_text("mine\n")
    desk.try_out("the output below a file", may=(1, 2), out="out/file/new")


def read_only(desk):
    "Nothing may be written, or only the output."
    row, closed = desk.row, desk.row.out and not desk.row.own.startswith("in/stages")
    for earlier in (False, True) if row.out else (False,):
        desk.lay()
        if earlier: desk.call()
        how = dict(mounts=[[str(desk.place), "read-only"]]) if desk.mounts else dict(faults=["full", 0, errno.EROFS])
        desk.try_out(f"everything read-only, {'again' if earlier else 'first time'}",
                     may=(0, 1, 2) if earlier else (1, 2) if row.out else (0,), **how)
    if row.inputs and closed and not row.out.startswith("in/") and desk.mounts:
        desk.lay()
        desk.try_out("inputs read-only", may=(0,), mounts=[[str(desk.place / "in"), "read-only"]])


def disk_full(desk):
    "A few pages are left on the disk, or none."
    if not desk.row.out: return
    disk = desk.place / Path(desk.row.out).parts[0]
    for earlier in (False, True):
        for room in (0, 2):
            desk.lay()
            if earlier: desk.call()
            how = (dict(mounts=[[str(disk), "full", room]]) if desk.mounts
                   else dict(faults=["full", room * 3, errno.ENOSPC]))
            detail = f"{room} pages left, {'again' if earlier else 'first time'}"
            answer = desk.try_out(detail, may=(0, 1, 2) if earlier else (0, 1), **how)
            if answer["status"] and not earlier:
                desk.expect(
                    detail, os.strerror(errno.ENOSPC) in answer["err"], f"the reason is not said: {answer['err']!r}")


def no_locks(desk):
    "The file system grants no locks."
    desk.lay()
    answer = desk.try_out("no locks", may=(0, 1), faults=["locks"])
    if answer["status"]:
        desk.expect(
            "no locks", os.strerror(errno.ENOLCK) in answer["err"], f"the reason is not said: {answer['err']!r}")


def acts_of(desk) -> list:
    "What the command does to files, in order."
    desk.lay()
    return desk.call(faults=["count"])["acts"]


def failing_writes(desk):
    "A write fails, early or late."
    acts = acts_of(desk)
    for n, at in enumerate(some(range(len(acts)), 2 * desk.row.most - 2)):
        number = (errno.EIO, errno.EACCES, errno.ENOSPC)[n % 3]
        desk.lay()
        detail = f"{errno.errorcode[number]} at act {at} of {len(acts)}, {acts[at]}"
        desk.try_out(detail, may=(0, 1), reason=os.strerror(number), faults=["fail", at, number])


def second_time(desk):
    "The same command again."
    right = desk.right()
    answer = desk.try_out("again", may=(0, 1, 2))
    desk.expect("again", desk.result() == right, "another result")
    if answer["status"] == 0 and desk.row.out:
        desk.try_out("a third time", may=(0,))


def other_settings(desk):
    "Another command of the same kind, on the output of the first."
    if not desk.row.other: return
    desk.right()
    if "in/gcn2" in desk.row.other: shutil.copytree(desk.larder / "gcn2", desk.place / "in/gcn2")
    desk.try_out("other settings", words=desk.row.other)


def killed(desk):
    "The process is killed in a write; the same command again ends right."
    right, acts = desk.right(), acts_of(desk)
    for at in some(range(len(acts)), desk.row.most):
        desk.lay()
        before, detail = tree(desk.place), f"killed at act {at} of {len(acts)}, {acts[at]}"
        answer = desk.call(faults=["kill", at])
        desk.expect(detail, answer["status"] == -9, f"not killed: {answer['status']}")
        lost = [p for p, c in before.items()
                if not p.endswith("/") and answer["left"].get(p) != c and not re.match(desk.row.own, p)]
        desk.expect(detail, not lost, f"lost {lost}")
        again = desk.call()
        desk.expect(detail, desk.result() == right, f"then another result, status {again['status']}: {again['err']!r}")
        desk.expect(detail, again["status"] == 0 or len(again["err"].splitlines()) == 1,
                    f"then status {again['status']}: {again['err']!r}")
        left = [p for p in again["left"] if re.search(r"\.(part|tmp)$", p) and not Path(p).name.startswith(".")]
        desk.expect(detail, not left, f"then {left} is left behind")


HAZARDS = dict(undisturbed=undisturbed, own_input=own_input, strangers=strangers, missing=missing, empty=nothing_in_it,
               damaged=damaged, wrong_kind=wrong_kind, read_only=read_only, disk_full=disk_full, no_locks=no_locks,
               failing_writes=failing_writes, second_time=second_time, other_settings=other_settings, killed=killed)


@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("name", ROWS)
def test_command_meets_hazard(name, hazard, nursery, larder, mounts):
    desk = Desk(name, nursery, larder, mounts)
    HAZARDS[hazard](desk)
    assert not desk.wrong, f"{name} x {hazard}:\n" + "\n".join(desk.wrong)


# a terminal, and a pipe

BARS = {"phantom": "phantoms", "index folder": "checksums", "run": "10_draw", "build": "image+report",
        "baseline": "train", "predict-films": "films"}


@pytest.mark.parametrize("name", [n for n in ROWS if n != "cards"])
def test_a_terminal_sees_a_bar_and_a_pipe_the_same_lines_without(name, nursery, larder, mounts):
    desk = Desk(name, nursery, larder, mounts)
    desk.lay()
    piped = desk.call()
    desk.lay()
    shown = desk.call(terminal=True)
    assert piped["status"] == shown["status"] == 0 and piped["err"] == ""
    assert "\r" not in piped["out"] and "\x1b" not in piped["out"]
    drawn = shown["out"].replace("\r\n", "\n")
    if name in BARS: assert f"{BARS[name]}: " in drawn and "\r" in drawn, drawn
    else: assert "\r" not in drawn, drawn
    times = re.compile(r"\d+\.\d+ s")
    for line in piped["out"].splitlines(): assert times.sub("", line).strip() in times.sub("", drawn), line


# the harness itself: what it must see

ROW = Row("x {out}", {"in/a": "a"}, "out/x", leaves="out/part")
FINE = dict(status=0, out="", err="", left={"in/a": "1", "out/x": "2"})


@pytest.mark.parametrize(
    "change, word",
    [({}, None), (dict(status=2), "instead of"), (dict(err="a warning\n"), "not quiet"),
     (dict(left={"out/x": "2"}), "in/a was lost"), (dict(left={"in/a": "9"}), "in/a was changed"),
     (dict(left={**FINE["left"], "out/.x.part": ""}), "left behind"),
     (dict(left={**FINE["left"], "in/new": ""}), "not asked for"),
     (dict(status=1, err="one\ntwo\n", left={"in/a": "1"}), "not one line"),
     (dict(status=1, err="unexpected KeyError\n", left={"in/a": "1"}), "not plain"),
     (dict(status=1, err="no\n"), "though it failed"),
     (dict(status=1, err="no\n", left={"in/a": "1", "out/part": "2"}), None),
     (dict(status=-11, left={"in/a": "1"}), "instead of")],
)
def test_the_judge_sees_what_is_wrong(change, word):
    wrong = judge(ROW, {"in/a": "1"}, {**FINE, **change}, (0, 1))
    assert (wrong == []) if word is None else any(word in w for w in wrong), wrong


WRITES = "import os\nwith open('a/x', 'w') as f: f.write('1234567890')\nos.replace('a/x', 'a/y')"


@pytest.mark.parametrize(
    "faults, status, left",
    [(["count"], 0, {"a/y": b"1234567890".hex()}), (["fail", 0, errno.EIO], 1, {}),
     (["full", 1, errno.ENOSPC], 1, {"a/x": ""}), (["fail", 2, errno.EXDEV], 1, {"a/x": b"1234567890".hex()}),
     (["full", 0, errno.EROFS], 1, {}), (["kill", 1], -9, {"a/x": b"12345".hex()}),
     (["kill", 2], -9, {"a/x": b"1234567890".hex()}), (["locks"], 0, {"a/y": b"1234567890".hex()})],
)
def test_a_fault_comes_at_the_act_it_was_asked_for(faults, status, left, nursery, tmp_path):
    (tmp_path / "a").mkdir()
    said = nursery.run(cwd=tmp_path, first=WRITES, faults=faults)
    assert said["status"] == status and {n: d for n, d in said["left"].items() if n != "a/"} == left, said
    if faults[0] == "count": assert said["acts"] == ["open x", "write x", "move y"]


def test_no_lock_is_granted_where_there_are_none(nursery, tmp_path):
    said = nursery.run(
        cwd=tmp_path, first="import fcntl\nfcntl.flock(open('lock', 'w'), fcntl.LOCK_EX)", faults=["locks"])
    assert said["status"] == 1 and os.strerror(errno.ENOLCK) in said["err"]


def test_what_is_mounted_is_read_only_or_full_and_seen_by_nobody_else(nursery, tmp_path, mounts):
    if not mounts: pytest.skip("no file systems may be mounted here: their errors are raised at every write instead")
    closed = nursery.run(cwd=tmp_path, first="open('x', 'w')", mounts=[[str(tmp_path), "read-only"]])
    assert closed["status"] == 1 and os.strerror(errno.EROFS) in closed["err"]
    (tmp_path / "kept").write_text("1")
    full = nursery.run(cwd=tmp_path, first="open('x', 'wb', 0).write(bytes(9000))\nopen('y', 'wb', 0).write(b'1')",
                       mounts=[[str(tmp_path), "full", 2]])
    assert full["status"] == 1 and os.strerror(errno.ENOSPC) in full["err"] and {"kept", "x", "y"} <= set(full["left"])
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
