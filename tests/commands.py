"""The `neural` command in a process of its own with the imports behind it: forked from a server that made them once.

A command that reads films spends most of a small test on importing PyTorch. What a process is to a test stays: its own
working directory, exit status, output and error, nothing shared with the test."""
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = "forkserver" in multiprocessing.get_all_start_methods()
PRELOADED = ["neural.cli", "neural.build", "neural.classify", "neural.explorer", "neural.films"]


def be_neural(words, cwd, env, said):
    "What the forked process does: leave the test's surroundings, then be the command."
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in ((0, os.devnull), (1, said / "stdout"), (2, said / "stderr")):
        file = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))
    sys.argv = ["neural", *words]
    from neural.cli import main
    main()


def neural(*words, cwd) -> subprocess.CompletedProcess:
    "A command as `subprocess.run` would give it."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        words = [*map(str, words)]
        process = context.Process(target=be_neural, args=(words, str(cwd), dict(os.environ), Path(folder)))
        process.start()
        process.join()
        text = [(Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(["neural", *words], process.exitcode, *text)
