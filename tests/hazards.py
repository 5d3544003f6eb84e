"""What can go wrong around a command, made on purpose: a full disk, no locks, a kill at any write.

`Nursery` starts one process that imports the library once and forks for every command that is tried; a fork costs a
few hundredths of a second. In the fork, writes under one folder can be made to fail, or to be the last thing that
the process does, and file systems that are full or read-only are mounted where the machine allows it.
"""
import builtins
import ctypes
import errno
import fcntl
import gc
import io
import json
import os
import pty
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import traceback
import weakref
from pathlib import Path

MODULES = ("neural.cli", "neural.bench", "neural.build", "neural.classify", "neural.cluster", "neural.cohort",
           "neural.explorer", "neural.export", "neural.films", "neural.layouts", "neural.pipeline", "neural.publish",
           "neural.race", "neural.viewer", "neural.yardstick", "papermill", "papermill.inspection", "nbclient",
           "nbdev.clean", "execnb.nbio", "pandas", "spacy", "jupyter_client.provisioning",
           "IPython.core.interactiveshell", "sklearn.cluster", "fsspec.implementations.local")
# memory in large pages, Python's own too: what a fork copies are page tables, and this makes them a quarter as long
LARGE_PAGES = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 4096, 16384, 1 << 18
PAGE = 4096


# faults: what a process may meet when it writes

class Faults:
    """Counts what is done to files under a folder, and makes one of those acts fail or be the last.

    kind: "count" only counts; "fail" raises `number` at act `at`; "full" raises it at every write from there on;
    "locks" refuses every lock; "kill" ends the process, a write half done.
    """
    def __init__(self, folder, kind, at=0, number=0, log=-1):
        self.folder, self.kind, self.at, self.number, self.log = os.path.realpath(folder), kind, at, number, log
        self.seen, self.real = 0, (io.open, os.open, os.replace, os.rename, os.mkdir, os.fsync, fcntl.flock,
                                   fcntl.lockf)

    def mine(self, path) -> bool:
        "Whether a path, or an open file, is under the folder."
        if hasattr(path, "fileno"): path = path.fileno()
        if isinstance(path, int): path = os.readlink(f"/proc/self/fd/{path}") if os.path.exists("/proc/self/fd") else ""
        return (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(self.folder + os.sep)

    def act(self, what, path, last=None):
        "One act on a file; `last` is done before the process is killed in it."
        if not self.mine(path): return
        self.seen += 1
        if self.log >= 0: os.write(self.log, f"{what} {os.path.basename(str(path))}\n".encode())
        due = self.seen == self.at + 1 or self.kind == "full" and self.seen > self.at
        if self.kind == "kill" and due:
            if last: last()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind in ("fail", "full") and due: raise OSError(self.number, os.strerror(self.number), str(path))

    def lock(self, real, handle, how, *more):
        "A lock, or why there is none."
        if self.kind == "locks" and how & ~fcntl.LOCK_UN and self.mine(handle):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return real(handle, how, *more)

    def open(self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        "The built-in, its writes watched."
        writes = set(mode) & set("wax+") and not isinstance(file, int) and self.mine(file)
        if not writes: return self.real[0](file, mode, buffering, encoding, errors, newline, closefd, opener)
        if opener is None: self.act("open", file)
        raw = Watched(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        raw.faults = self
        if buffering == 0: return raw
        binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode: return binary
        text = io.TextIOWrapper(binary, encoding, errors, newline, buffering == 1)
        text.mode = mode
        return text

    def install(self):
        "Stands in for the acts of `io`, `os` and `fcntl` in this process."
        real_open, os_open, replace, rename, mkdir, fsync, flock, lockf = self.real
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        def opened(path, flags, *more, **named):
            if flags & writing: self.act("open", path)
            return os_open(path, flags, *more, **named)
        def moved(real):
            def move(source, target, **named):
                self.act("move", target)
                return real(source, target, **named)
            return move
        def made(path, *more, **named):
            self.act("mkdir", path)
            return mkdir(path, *more, **named)
        def synced(handle):
            self.act("sync", handle if isinstance(handle, int) else handle.fileno())
            return fsync(handle)
        builtins.open = io.open = self.open
        os.open, os.replace, os.rename, os.mkdir, os.fsync = opened, moved(replace), moved(rename), made, synced
        fcntl.flock, fcntl.lockf = (lambda *a, real=real: self.lock(real, *a) for real in (flock, lockf))


class Watched(io.FileIO):
    "A file whose writes are acts."
    faults = None
    def write(self, data):
        half = bytes(data)[:len(data) // 2]
        if self.faults: self.faults.act("write", self.name, lambda: io.FileIO.write(self, half))
        return super().write(data)


# places: file systems that refuse

def _system(name, *words):
    "A call of the C library, or the error it gives."
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*words):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount(path, kind, room=0):
    "Makes a folder read-only, or the only `room` pages left on its disk; seen by this process and its children alone."
    path = os.fsencode(path)
    if kind == "read-only":
        _system("mount", path, path, None, MS_BIND | MS_REC, None)
        return _system("mount", path, path, None, MS_BIND | MS_REMOUNT | MS_RDONLY, None)
    content = Path(os.fsdecode(path) + ".before")
    shutil.copytree(os.fsdecode(path), content, symlinks=True)
    _system("mount", b"none", path, b"tmpfs", 0, b"size=64m")
    shutil.copytree(content, os.fsdecode(path), symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(content)
    disk = os.statvfs(path)
    used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    _system("mount", b"none", path, b"tmpfs", MS_REMOUNT, f"size={used + room * PAGE}".encode())


def own_mounts():
    "From here on this process mounts for itself."
    _system("unshare", CLONE_NEWNS)
    _system("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)


def tree(folder) -> dict:
    "Every file under a folder with what is in it, every empty folder, every link."
    found = {}
    for top, folders, files in os.walk(folder):
        place = os.path.relpath(top, folder)
        if not folders and not files and place != ".": found[place + "/"] = ""
        for name in [*files, *(f for f in folders if os.path.islink(os.path.join(top, f)))]:
            path = os.path.join(top, name)
            here = os.path.normpath(os.path.join(place, name))
            if os.path.islink(path): found[here] = "-> " + os.readlink(path)
            elif os.path.isfile(path):
                found[here] = Path(path).read_bytes().hex() if os.path.getsize(path) < 64 else _digest(path)
    return found


def _digest(path):
    import hashlib
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# the process that forks

def serve():
    "Takes one job a line on stdin, answers one line each; the library is imported once."
    import importlib
    for name in LARGE_PAGES: os.environ.pop(name, None)        # for this process alone, not for kernels that jobs start
    for name in MODULES: importlib.import_module(name)
    prepare()
    # what importing leaves to be done at the end
    for farewell in list(weakref.finalize._registry): farewell.atexit = False
    gc.collect()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try: answer = apart(job) if job.get("mounts") else keep(job)
        except BaseException: answer = {"broken": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def prepare():
    "What a process works out once (what reports are read by, where findings lie, typer's commands), for every fork."
    import typer
    from neural.cli import app
    from neural.report import ReportReader, split_sections
    from neural.scores import anatomy
    from neural.study import LABELS
    ReportReader()(split_sections("FINDINGS: Small effusion.")["findings"])
    anatomy(LABELS)
    commands = typer.main.get_command(app)
    typer.main.get_command = lambda _: commands


def apart(job) -> dict:
    "One job, kept by a process of its own, so that what it mounts is seen by nobody else."
    reader, writer = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(reader)
        try: answer = keep(job)
        except BaseException: answer = {"broken": traceback.format_exc()}
        with os.fdopen(writer, "w") as pipe: json.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe: answer = json.load(pipe)
    os.waitpid(keeper, 0)
    return answer


def keep(job) -> dict:
    "Prepares the place of one job, starts it, waits, and says what it left."
    if sys.platform == "linux": _system("prctl", 36, 1, 0, 0, 0)    # what the job leaves running comes to this process
    if job.get("mounts"):
        own_mounts()
        for m in job["mounts"]: mount(*m)
    log_read, log = os.pipe()
    fcntl.fcntl(log_read, fcntl.F_SETPIPE_SZ, 2**20)
    terminal = pty.openpty() if job.get("terminal") else None
    if terminal: fcntl.ioctl(terminal[0], termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
    files = [os.memfd_create(n) for n in ("out", "err")]
    runner = os.fork()
    if runner == 0: start(job, terminal[1:] * 2 if terminal else files, log)
    os.close(log)
    if terminal: os.close(terminal[1])
    status, shown = wait(runner, job.get("seconds", 60), terminal[0] if terminal else None)
    for child in children():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    out, err = (os.pread(f, 2**20, 0).decode(errors="replace") for f in files)
    for f in [*files, *(terminal or ())[:1]]: os.close(f)
    with os.fdopen(log_read) as said: acts = said.read().splitlines()
    return dict(status=status, out=shown or out, err=err, acts=acts, left=tree(job["cwd"]))


def children() -> list:
    "Processes that were started by the job and still run."
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(p) for p in path.read_text().split()] if path.is_file() else []


def wait(runner, seconds, terminal):
    "Exit status of a process (negative: the signal that ended it), and what a terminal showed."
    end, shown, status = time.monotonic() + seconds, b"", None
    while True:
        said = terminal is not None and select.select([terminal], [], [], .01)[0]
        try: shown += os.read(terminal, 65536) if said else b""
        except OSError: said = False                        # the other side is closed, and all is read
        if status is not None and not said: return os.waitstatus_to_exitcode(status), shown.decode(errors="replace")
        done, told = (0, 0) if status is not None else os.waitpid(runner, os.WNOHANG)
        if done: status = told
        elif status is None and time.monotonic() > end: os.kill(runner, signal.SIGKILL)
        if terminal is None and not done: time.sleep(.004)


def start(job, streams, log):
    "Becomes the command of a job; does not come back."
    status = 1
    try:
        os.setsid()
        if len(set(streams)) == 1: fcntl.ioctl(streams[0], termios.TIOCSCTTY, 0)  # this terminal is ours
        os.dup2(os.open(os.devnull, os.O_RDONLY) if len(set(streams)) > 1 else streams[0], 0)
        for stream, to in zip(streams, (1, 2)): os.dup2(stream, to)
        os.chdir(job["cwd"])
        os.environ.update(job.get("env", {}))
        sys.argv = ["neural", *job.get("words", ())]
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, m, buffering=1) for n, m in ((0, "r"), (1, "w"), (2, "w")))
        if job.get("faults"): Faults(job["cwd"], *job["faults"], log=log).install()
        if job.get("largest"): resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"],) * 2)
        if job.get("uid"): os.setuid(job["uid"])
        status = command(job)
    except BaseException: traceback.print_exc()
    finally:
        # temporary folders; the library's own farewells cost more than most commands
        weakref.finalize._exitfunc()
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(status)


def command(job) -> int:
    "Runs the words of a job as the installed command does, or its Python; the exit status."
    from neural.cli import main
    from neural.study import NeuralError
    try:
        exec(job.get("first", ""), {"__name__": "job"})
        if job["words"]: main()
    except NeuralError as e:
        print(e, file=sys.stderr)
        return 1
    except SystemExit as e: return e.code if isinstance(e.code, int) else int(bool(e.code))
    return 0


class Nursery:
    "The process that forks, from outside."
    def __init__(self):
        from neural.cli import QUIET
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **QUIET,
               **LARGE_PAGES}
        env["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).resolve().parents[1]), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line: raise RuntimeError("the process that forks has ended")
        answer = json.loads(line)
        if "broken" in answer: raise RuntimeError(answer["broken"])
        return answer

    def run(self, *words, cwd, **job) -> dict:
        "One command in a folder: status, out, err, acts, and the tree it left."
        print(json.dumps(dict(words=[str(w) for w in words], cwd=str(cwd), **job)), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)


def can_mount() -> bool:
    "Whether this process may mount file systems for its children."
    if os.geteuid() != 0 or not sys.platform.startswith("linux"): return False
    check = "import hazards, tempfile; hazards.own_mounts(); hazards.mount(tempfile.mkdtemp(), 'full', 1)"
    return subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parent, capture_output=True).returncode == 0


if __name__ == "__main__": serve()
