"""The same library wherever it is started: a terminal or none, another language, clock, umask or home, a path with
blanks, Ctrl-C ignored."""
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from neural.study import Manifest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p.stem for p in (ROOT / "neural").glob("*.py") if not p.stem.startswith("_"))
NOWHERE = {"HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent/cache", "XDG_CONFIG_HOME": "/nonexistent/config"}
# name: variables of the environment, permission bits that new files do not get, signals that are ignored
SURROUNDINGS = {
    "as usual": ({}, 0o022, ()),
    "in the background": ({}, 0o022, (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)),
    "ASCII and a far clock": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Pacific/Chatham"},
                              0o022, ()),
    "for everybody, in eleven columns": ({"COLUMNS": "11", "LINES": "3", "TERM": "dumb", "PYTHONHASHSEED": "7"}, 0o000,
                                         ()),
    "all at once": (
        {**NOWHERE, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Pacific/Chatham",
         "COLUMNS": "11"},
        0o077,
        (signal.SIGINT, signal.SIGHUP),
    ),
}


def start(name, words, cwd, **options):
    "A Python process in some surroundings: no terminal, a session of its own, the library by its path."
    variables, mask, ignored = SURROUNDINGS[name]
    (cwd / "t m p").mkdir(exist_ok=True)
    kept = {k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV") if k in os.environ}
    env = {**kept, "HOME": str(cwd), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1",
           "OMP_NUM_THREADS": "1", "TMPDIR": str(cwd / "t m p"), **variables}
    def before():
        os.umask(mask)
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                          start_new_session=True, preexec_fn=before, **options)


COHORT = (
    "import sys\nfrom neural.cli import main\nfor words in (['phantom', 'k o h o r t', '--studies', '24', '--size',"
    " '64', '--seed', '5'], ['index', 'mimic-cxr', 'k o h o r t', '-o', 'm a n.csv']):\n    sys.argv = ['neural',"
    " *words]\n    try: main()\n    except SystemExit as end:\n        if end.code: raise\n")


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    "What is written as usual: path in the folder -> bytes."
    return written("as usual", tmp_path_factory.mktemp("as usual"))


def written(name, folder, code=COHORT) -> dict:
    "A cohort and its manifest, drawn in some surroundings, in a folder whose name has blanks."
    done = start(name, ["-c", code], folder)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and "t m p" not in p.parts}


@pytest.mark.parametrize("name", [n for n in SURROUNDINGS if n != "as usual"])
def test_a_cohort_is_the_same_in_all_surroundings(tmp_path, usual, name):
    folder = tmp_path / "b l a n k s"
    folder.mkdir()
    found = written(name, folder)
    assert set(found) == set(usual)
    machine = {"m a n.json"}                                                              # says where it is
    assert [p for p in found if found[p] != usual[p] and p not in machine] == []
    manifest = Manifest.load(folder / "m a n.csv")
    assert len(manifest) == 24 and all(manifest.image_path(s.frontal).is_file() for s in manifest)
    assert json.loads(found["m a n.json"])["root"] == str((folder / "k o h o r t").resolve())
    forbidden = SURROUNDINGS[name][1]
    modes = {
        p.relative_to(folder).as_posix(): stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.name != "t m p"
    }
    assert {p: oct(m) for p, m in modes.items() if m & forbidden or m & 0o600 != 0o600} == {}
    assert not [p for p in (folder / "t m p").iterdir()], "something is left in the folder of temporary files"


def test_every_module_can_be_imported_in_odd_surroundings(tmp_path):
    """Nothing on the way asks for a home, a terminal, a name of the user or a letter that ASCII lacks; the signals stay
    as they were."""
    code = (
        f"import signal\nimport {', '.join('neural.' + m for m in MODULES)}\nassert signal.getsignal(signal.SIGINT) is"
        " signal.SIG_IGN\nprint('all')")
    done = start("all at once", ["-c", code], tmp_path)
    assert done.returncode == 0 and done.stdout == b"all\n", done.stderr.decode(errors="replace")
    assert done.stderr == b""


def test_the_chapter_of_films_runs_in_the_background_without_a_home(tmp_path):
    "A shell hands Ctrl-C down as ignored to what it starts in the background."
    done = start(
        "all at once",
        [str(Path(sys.executable).with_name("nbdev_test")), "--path", str(ROOT / "nbs/api/02_radiograph.ipynb"),
         "--n_workers", "0"],
        tmp_path,
    )
    assert done.returncode == 0, (
        done.stdout.decode(errors="replace")[-3000:] + done.stderr.decode(errors="replace")[-3000:])


@pytest.mark.parametrize("cores", (1, 64))
def test_the_number_of_cores_is_asked_and_not_believed(tmp_path, usual, cores):
    "One core, or a machine that speaks of many more than it has: the same cohort."
    code = (
        f"import os; os.cpu_count = lambda: {cores}\n"
        + (f"os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})\n"
           if cores == 1 and hasattr(os, "sched_setaffinity") else "")
        + COHORT
    )
    assert {p: d for p, d in written("as usual", tmp_path, code).items() if p != "m a n.json"} == {
        p: d for p, d in usual.items() if p != "m a n.json"}


def test_a_copy_without_history_says_so_in_no_word_of_git(tmp_path):
    "A tarball has no commit: that is an empty word, not an error, and not the commit of a checkout around it."
    from neural.record import git_commit
    assert git_commit(tmp_path) == ""


@pytest.mark.parametrize("buffered", ("", "1"))
def test_a_full_disk_behind_the_output_is_told_once(tmp_path, buffered):
    "With Python's buffer or without (PYTHONUNBUFFERED): one line and status 1."
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}, "PYTHONPATH": str(ROOT),
           **({"PYTHONUNBUFFERED": "1"} if buffered else {})}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", "from neural.cli import main; main()", "--version"], env=env,
                              cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "No space left on device" in done.stderr
