"""Runs programs that a language model wrote, apart from all else, and counts those that pass.

    CodeEval().compute(references=[test], predictions=[[program, ...]], k=[1])

stands where Hugging Face's `code_eval` does in HumanEval and MBPP. Whoever calls it has asked the
user before: this file asks nobody. Each program is run in a fresh interpreter, in an empty folder,
without our environment, under limits of time, memory, files and processes. Where Linux allows it,
there is a wall too: no network, nothing to write but that folder, nobody else's processes in sight.
`isolation()` says in a sentence what holds on this machine.

A program passes if its tests ran to their end: who leaves early, or prints "passed", has failed.
Not covered: a program may look through the interpreter for what reports its verdict, return
something that equals everything, read this user's files, or use what holes the kernel has.

    ours ── keeper: builds the wall ── watcher: first process behind it ── the program

This file is also what the keeper runs: at its top it imports the standard library and no more.
"""

import ctypes
import functools
import json
import math
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

SECONDS = 3.0  # of a program, as in Chen et al. 2021
MEMORY = 2**30  # bytes of a process
FILES = 2**26  # bytes of a file, and behind the wall of the whole folder
PROCESSES = 64  # and threads, behind the wall; without it none can be started
LONGEST = 300  # characters of a verdict

# what can be had, the best first; the first that works here is taken
LIMITS = "limits of time, memory and processes"
WALLS = {
    "all": "programs run without network, behind read-only files, with " + LIMITS,
    "network": f"programs run without network, with {LIMITS}; this user's files are open to them",
    "none": f"programs run with {LIMITS} only; the network and this user's files are open to them",
}
LINUX = sys.platform == "linux"


# ---------------------------------------------------------------- the score


class CodeEval:
    """`evaluate.load("code_eval")`, behind a wall.

    Example:
    >>> tests, programs = ["assert f(2) == 4"], [["def f(x): return x * x", "def f(x): return 2"]]
    >>> scores, verdicts = CodeEval().compute(references=tests, predictions=programs, k=[1, 2])
    >>> scores, verdicts
    ({'pass@1': 0.5, 'pass@2': 1.0}, [['passed', 'failed: AssertionError']])
    """

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY):
        self.seconds = seconds
        self.memory = memory

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], list[list[str]]]:
        """The mean pass@k over problems, and the verdict on each program of each.

        `references` has a test for each problem, `predictions` its programs. Raises InputError
        where a problem has fewer programs than the largest k.
        """
        from plumbing.files import InputError

        fewest = min((len(programs) for programs in predictions), default=0)
        if len(references) != len(predictions) or fewest < max(k):
            raise InputError(
                f"pass@{max(k)} needs a test and {max(k)} programs of each problem; there are "
                f"{len(references)} tests, {len(predictions)} problems, one of {fewest} programs"
            )

        # all programs side by side, then back to their problems
        jobs = [
            (program, test)
            for test, programs in zip(references, predictions)
            for program in programs
        ]
        flat = iter(run_all(jobs, self.seconds, self.memory))
        verdicts = [[next(flat) for _ in programs] for programs in predictions]

        scores = {}
        for count in k:
            of_each = [pass_at(count, len(row), row.count("passed")) for row in verdicts]
            scores[f"pass@{count}"] = sum(of_each) / len(of_each)
        return scores, verdicts


def pass_at(k: int, n: int, passed: int) -> float:
    """The chance that of k programs, drawn from n of which some passed, at least one did:
    1 - C(n - passed, k) / C(n, k), the unbiased estimate of Chen et al. 2021.

    Example:
    >>> pass_at(1, 4, 1), pass_at(2, 4, 1), pass_at(2, 4, 3)
    (0.25, 0.5, 1.0)
    """
    return 1 - math.comb(n - passed, k) / math.comb(n, k)


# ---------------------------------------------------------------- outside: start and read


def run_all(jobs: Sequence[tuple[str, str]], seconds: float, memory: int) -> list[str]:
    """The verdicts on programs with their tests, in order; as many at once as there are cores."""
    from tqdm import tqdm

    wall()  # tried out once, before there are threads
    cores = len(os.sched_getaffinity(0)) if LINUX else os.cpu_count() or 1
    pool = ThreadPoolExecutor(cores)
    try:
        verdicts = pool.map(lambda job: run(*job, seconds, memory), jobs)
        quiet = True if len(jobs) == 1 else None  # None: quiet where there is no terminal
        return [*tqdm(verdicts, "programs", len(jobs), disable=quiet)]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C ends it after the programs that run now


def run(program: str, test: str = "", seconds: float = SECONDS, memory: int = MEMORY) -> str:
    """The verdict on a program, then a test of what it defines: "passed", "timed out", "out of
    memory" or "failed: " and why. Raises InputError where nothing can be run.

    Example:
    >>> run("def double(x): return x + 2", "assert double(2) == 4")
    'passed'
    >>> run("def double(x): return x + 2", "assert double(3) == 6, 'of 3'")
    'failed: AssertionError: of 3'
    >>> run("while True: pass", seconds=0.2)
    'timed out'
    """
    return run_behind(wall(), program, test, seconds, memory)


def isolation() -> str:
    """One sentence: what a program can and cannot do on this machine."""
    return WALLS[wall()]


@functools.cache
def wall() -> str:
    """The best of WALLS that this machine allows, tried out. Raises InputError if none does."""
    from plumbing.files import InputError

    if sys.platform == "win32":
        raise InputError("programs cannot be run apart on Windows; use Linux (WSL) or macOS")
    for name in WALLS if LINUX else ["none"]:
        if run_behind(name, "import fractions", "", 60, MEMORY) == "passed":
            return name
    raise InputError(f"{sys.executable}: cannot be started with an environment of its own")


def run_behind(wall: str, program: str, test: str, seconds: float, memory: int) -> str:
    """`run`, with a wall of that name."""
    from plumbing.files import visible

    orders = dict(wall=wall, program=program, test=test, seconds=seconds, memory=memory)
    folder = tempfile.mkdtemp(prefix="ivl-")
    environment = {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
    for name in ("PATH", "LD_LIBRARY_PATH"):  # by which the interpreter finds itself: no secrets
        if name in os.environ:
            environment[name] = os.environ[name]
    try:
        # the watcher keeps the time; a keeper that takes much longer is itself in trouble
        done = subprocess.run(
            [sys.executable, "-I", os.path.abspath(__file__)],
            input=json.dumps(orders).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
            timeout=seconds + 60,
        )
        verdict = visible(" ".join(done.stdout.decode(errors="replace").split()))
    except subprocess.TimeoutExpired:
        verdict = "timed out"
    finally:
        # shutil.rmtree gives up on folders in folders without end
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)
    return verdict or "failed: it ended what watched it"


# ---------------------------------------------------------------- keeper and watcher


def keep() -> None:
    """What the fresh interpreter does: builds the wall, lets the watcher report on stdout."""
    orders = json.loads(sys.stdin.buffer.read())
    die_with_parent()
    if orders["wall"] != "none":
        unshare()
        if orders["wall"] == "all":
            protect_files()

        # whoever is forked now is the first behind the wall: with it all others there end
        watcher = os.fork()
        if watcher:
            os.waitpid(watcher, 0)
            return
        die_with_parent()
    print(watch(orders))


def watch(orders: dict) -> str:
    """The verdict on the program, which a child of this process runs."""
    token = secrets.token_bytes(16)  # shows that a verdict is ours and not the program's
    reader, writer = os.pipe()
    end = time.monotonic() + orders["seconds"]
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            give_verdict(orders, writer, token)
        finally:
            os._exit(1)
    os.close(writer)

    # without a verdict of ours its status tells, if it ends in time; else it is ended here
    said = listen(reader, end)
    ours = said is not None and said.startswith(token)
    status = None if said is None or ours else wait(child, end)
    if status is None:
        kill(child)
    return said.removeprefix(token).decode() if ours else why(status)


def listen(reader: int, end: float) -> bytes | None:
    """What comes from a pipe until a line or the pipe ends; None if neither does in time."""
    said = b""
    while not said.endswith(b"\n") and len(said) < 10 * LONGEST:
        ready, _, _ = select.select([reader], [], [], max(0, end - time.monotonic()))
        if not ready:
            return None
        piece = os.read(reader, 4096)
        if not piece:
            break
        said += piece
    return said


def wait(child: int, end: float) -> int | None:
    """The status a child ends with; None if it does not in time."""
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.01)
    return None


def kill(child: int) -> None:
    """Ends a child and its process group. Behind a wall all others end with the watcher."""
    os.kill(child, signal.SIGKILL)
    with suppress(ProcessLookupError, PermissionError):  # it may not have its group yet
        os.killpg(child, signal.SIGKILL)


def why(status: int | None) -> str:
    """In words, how a program ended that gave no verdict.

    Example:
    >>> why(0), why(signal.SIGSEGV), why(None)
    ('failed: it ended by itself, with status 0', 'failed: killed by SIGSEGV', 'timed out')
    """
    if status is None:
        return "timed out"
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        return "timed out"
    if code < 0:
        return f"failed: killed by {signal.Signals(-code).name}"
    return f"failed: it ended by itself, with status {code}"


# ---------------------------------------------------------------- the program's own process


def give_verdict(orders: dict, writer: int, token: bytes) -> None:
    """Runs the program under its limits, and writes its verdict to a pipe."""
    # what the program could exchange for something else is fetched before
    write, leave, getpid, encode = os.write, os._exit, os.getpid, str.encode
    mine = getpid()
    confine(orders)
    verdict = judge(orders["program"], orders["test"])
    if getpid() == mine:  # no fork of the program
        write(writer, token + encode(verdict[:LONGEST], "utf-8", "replace") + b"\n")
    leave(0)


def judge(program: str, test: str) -> str:
    """Runs a program, then its test, in names of their own.

    Both are compiled before either runs, and each by itself: no open bracket or quotation mark
    of the program, and no line that goes on, reaches into the test.
    """
    execute, name_of, words_of = exec, type, str  # a program can exchange them
    names: dict = {}
    try:
        codes = tuple(
            compile(source, place, "exec", dont_inherit=True)
            for source, place in ((program, "<program>"), (test, "<test>"))
        )
        for code in codes:
            execute(code, names)
    except MemoryError:
        return "out of memory"
    except BaseException as error:  # SystemExit too: the tests have not been run
        verdict = f"failed: {name_of(error).__name__}"
        words = " ".join(words_of(error).split())
        return f"{verdict}: {words}" if words else verdict
    return "passed"


def confine(orders: dict) -> None:
    """Takes from this process what a program does not need."""
    import resource

    os.setsid()
    os.chdir(os.getcwd())  # the folder may have become another one by the same name
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)

    walled = orders["wall"] != "none"
    limits = {
        "RLIMIT_AS": orders["memory"],
        "RLIMIT_CPU": math.ceil(orders["seconds"]) + 1,
        "RLIMIT_FSIZE": FILES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": PROCESSES if walled else 0,
    }
    for name, most in limits.items():
        with suppress(ValueError, OSError):  # macOS lacks some
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            if hard != resource.RLIM_INFINITY:
                most = min(most, hard)
            resource.setrlimit(kind, (most, most))
    if LINUX:
        give_up_rights()
        die_with_parent()
    if not walled:
        forget_dangerous_names()


def forget_dangerous_names() -> None:
    """Without a wall a program that errs could end or delete what is ours: Python no longer knows
    how (Chen et al.'s reliability_guard). This stops accidents, not intent.
    """
    import posix

    names = "kill killpg fork forkpty system posix_spawn posix_spawnp putenv setuid chroot fchdir "
    names += "remove unlink rmdir removedirs rename renames replace truncate chmod chown lchown"
    for name in names.split():
        for module in (os, posix):
            if hasattr(module, name):
                setattr(module, name, None)
    subprocess.Popen = None
    shutil.rmtree = shutil.move = shutil.chown = None


# ---------------------------------------------------------------- Linux

# from the kernel's headers
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
CAPABILITY_VERSION = 0x20080522
NOBODY = 65534


def call(name: str, *args) -> None:
    """A function of the C library that returns 0, or there is an OSError."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    if function(*words) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)


def die_with_parent() -> None:
    """This process is killed when the one that started it ends, however that happens."""
    if LINUX:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def unshare() -> None:
    """A network, processes and mounts of our own. Who is not root must also become a user of an
    own kind, and stays under the number that it had.
    """
    user, group = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if user != 0:
        flags |= CLONE_NEWUSER
    call("unshare", flags)
    if user != 0:
        maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, line in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)


def protect_files() -> None:
    """All files become read-only. The folder, whose contents vanish with us, can be written;
    other processes' places, where they tell their environment or can be spoken to, are empty.
    """
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)  # set, clear, and two others
    how = (AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/", *how)
    for place in (os.getcwd(), "/proc", "/run"):
        if os.path.isdir(place):
            options = f"mode=700,size={FILES},nr_inodes=4096".encode()
            call("mount", b"tmpfs", os.fsencode(place), b"tmpfs", 0, options)


def give_up_rights() -> None:
    """No capability, and none to be had by starting a program (sudo). Root stays root to files,
    but is counted as nobody, for the limit of processes does not bind root.
    """
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.geteuid() == 0:
        with suppress(OSError):  # a container may not know nobody
            os.setresuid(NOBODY, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    nothing = (ctypes.c_uint32 * 6)()
    call("capset", header, nothing)


if __name__ == "__main__":
    keep()
