"""Programs of a language model: what passes, what fails, and what they cannot do to us.

The programs here do no harm where a wall has a hole: they try a little, and tell.
"""

import gzip
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import combinations

import pytest
from conftest import ROOT

from extras import sandbox
from plumbing.files import InputError

if sys.platform == "win32":
    pytest.skip("programs are not run on Windows", allow_module_level=True)
TEST = "assert f(2) == 4"
RIGHT = "def f(x): return 2 * x"


@pytest.fixture(params=sandbox.WALLS)
def wall(request, monkeypatch):
    """Each wall in turn that this machine can build."""
    if sandbox.run_behind(request.param, "", "", 60, sandbox.MEMORY) != "passed":
        pytest.skip(f"this machine refuses the wall {request.param!r}")
    monkeypatch.setattr(sandbox, "wall", lambda: request.param)
    return request.param


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    "program",
    [
        RIGHT,
        "if __name__ == '__main__': raise SystemExit\n" + RIGHT,
        "from dataclasses import dataclass\nfrom typing import List\n@dataclass\nclass A:\n"
        "    x: List[int]\ndef f(x): return A([x, x]).x[0] * 2",
        "memo = {}\ndef f(x):\n    memo[x] = x\n    return sum(2 * m for m in memo)",
        "import tempfile\nwith open('a', 'w') as a: a.write('4')\n"
        "with tempfile.TemporaryFile() as t: t.write(b'4')\ndef f(x): return int(open('a').read())",
        "print('failed')\n" + RIGHT,
    ],
)
def test_right_programs_pass(program):
    assert sandbox.run(program, TEST) == "passed"


@pytest.mark.parametrize(
    "program, verdict",
    [
        ("def f(x): return x", "failed: AssertionError"),
        ("def f(x): return x +", "failed: SyntaxError"),
        ("def f(x): return x\n'''", "failed: SyntaxError"),
        ("def f(x): return x\nif False: \\", "failed: SyntaxError"),
        ("def g(x): return x", "failed: NameError: name 'f' is not defined"),
        ("import os; print('passed'); os._exit(0)", "failed: it ended by itself, with status 0"),
        ("import sys; print('passed'); sys.exit(0)", "failed: SystemExit: 0"),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
        ("class E(Exception):\n  def __str__(self): raise self\nraise E", "failed: it ended"),
        ("raise Exception('a' * 10**6 + 'b')", "failed: Exception: aaa"),
        ("raise Exception('\\x1b[31m\\nred\\n')", "failed: Exception: \\x1b[31m red"),
        ("def f(x): return f(x)", "failed: RecursionError"),
        ("import ctypes; ctypes.string_at(0)", "failed: killed by SIGSEGV"),
        ("x = input()", "failed: EOFError"),
        ("while True: print('passed')", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("x = bytearray(2**32)", "out of memory"),
        ("x = '\ud800'", "failed: UnicodeEncodeError"),
        ("x = '\0'", "failed: "),
        # they would make the tests pass that have not been run
        ("import builtins; builtins.exec = print; builtins.str = print", "failed: NameError"),
        ("import os; os.write = os.getpid = os._exit = print; f = abs", "failed: AssertionError"),
        (
            "import os\nfor fd in range(3, 60):\n  try: os.write(fd, b'passed\\n')\n"
            "  except OSError: pass\nos._exit(0)",
            "failed: it ended by itself, with status 0",
        ),
        ("import os, time; os.closerange(3, 60); time.sleep(60)", "timed out"),
    ],
)
def test_other_programs_do_not(program, verdict):
    began = time.monotonic()
    said = sandbox.run(program, TEST, seconds=1 if verdict == "timed out" else 40)
    assert said.startswith(verdict) and len(said) <= sandbox.LONGEST
    assert time.monotonic() - began < 20


def test_it_passes_by_its_own_process_only(wall):
    """A child that goes on in its place is somebody else."""
    program = "import os\nif os.fork(): os._exit(0)\n" + RIGHT
    assert sandbox.run(program, TEST).startswith("failed: ")


def test_time_begins_with_the_program(monkeypatch):
    """What the interpreter takes to start is not counted."""
    real = sandbox.subprocess.run

    def slow(words, **options):
        if words[0] == sys.executable:
            code = "import runpy, sys, time; time.sleep(2.5); sys.argv = sys.argv[1:]\n"
            words = [sys.executable, "-c", code + "runpy.run_path(sys.argv[0], None, '__main__')"]
            words.append(str(ROOT / "extras/sandbox.py"))
        return real(words, **options)

    sandbox.wall()
    monkeypatch.setattr(sandbox.subprocess, "run", slow)
    assert sandbox.run(RIGHT, TEST, seconds=2) == "passed"


# ---------------------------------------------------------------- what it has and cannot do


def told(program: str, **how):
    """What a program tells: the value of its expression `x`."""
    words = sandbox.run(program + "\nimport json\nraise Exception(json.dumps(x))", **how)
    assert words.startswith("failed: Exception: "), words
    return json.loads(words.removeprefix("failed: Exception: "))


def test_it_has_nothing_of_ours(wall, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert "OPENAI_API_KEY" not in told("import os; x = [*os.environ]")
    folder, inside, home, names = told(
        "import os; x = os.getcwd(), os.listdir(), os.environ['HOME'], [*globals()]"
    )
    assert inside == [] and home == folder and "orders" not in names and "os" in names
    assert not os.path.exists(folder)
    assert str(ROOT / "extras") not in told("import sys; x = sys.path")


def test_its_limits(wall):
    names = "AS CPU FSIZE NOFILE CORE NPROC"
    limits = told(
        f"import resource as r; x = [r.getrlimit(getattr(r, 'RLIMIT_' + n)) for n in "
        f"{names.split()}]",
        seconds=1.5,
        memory=2**28,
    )
    processes = 0 if wall == "none" else sandbox.PROCESSES
    assert limits == [[n, n] for n in (2**28, 3, sandbox.FILES, 64, 0, processes)]


def test_a_file_is_only_so_long(wall):
    program = f"with open('a', 'wb') as file: file.truncate({sandbox.FILES + 1})"
    assert sandbox.run(program).startswith("failed: OSError")


def test_a_folder_without_end_is_removed(wall, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    program = "import os\nfor _ in range(1200): os.mkdir('a' * 200); os.chdir('a' * 200)"
    assert sandbox.run(program, seconds=30) == "passed"
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(not sandbox.LINUX, reason="limits of processes as Linux has them")
def test_processes_are_few(wall):
    """The program calls fork below Python, which without a wall has forgotten it."""
    program = (
        "import ctypes, os, time\nfork, x = ctypes.CDLL(None).fork, 0\n"
        "for _ in range(80):\n  pid = fork()\n  if pid == 0: time.sleep(60)\n  x += pid > 0"
    )
    many = told(program)
    assert many == 0 if wall == "none" else 20 < many < sandbox.PROCESSES


def writer(path) -> str:
    """A program that leaves a child in a session of its own, which goes on writing."""
    return (
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  for i in range(600):\n"
        f"    open({str(path)!r}, 'w').write(str(i)); time.sleep(0.1)\n  os._exit(0)\n"
        "time.sleep(0.5)\n"
    )


def assert_nobody_writes(path) -> None:
    last = path.read_text()
    time.sleep(0.5)
    assert path.read_text() == last


@pytest.mark.parametrize("end", ["", "time.sleep(60)"])
def test_nobody_is_left(wall, tmp_path, monkeypatch, end):
    if wall != "network":
        pytest.skip("there is nowhere to write, or no child")
    path = tmp_path / "lives"
    verdict = sandbox.run(writer(path) + end, seconds=2.5)
    assert verdict == ("timed out" if end else "passed")
    assert_nobody_writes(path)


def test_nobody_is_left_when_we_are_killed(wall, tmp_path):
    path = tmp_path / "lives"
    path.touch()
    program = f"import time\nfor i in range(600): open({str(path)!r}, 'w').write(str(i)); "
    program += "time.sleep(0.1)"
    if wall == "all":
        pytest.skip("there is nowhere to write")
    code = f"from extras import sandbox; sandbox.run_behind({wall!r}, {program!r}, '', 60, 2**30)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # its folder stays
    ours = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 60
    while not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ours.send_signal(signal.SIGKILL)
    ours.wait()
    time.sleep(0.3)
    assert_nobody_writes(path)


def test_who_kills_its_parent_has_not_passed(wall):
    program = "import os; os.kill(os.getppid(), 9)\n"
    verdict = sandbox.run(program, TEST)
    assert verdict.startswith("failed: ")
    if wall != "none":  # a group of processes of its own
        verdict = sandbox.run("import os; os.killpg(0, 9)")
        assert verdict == "failed: killed by SIGKILL"
    else:  # below Python, where the watcher is within reach
        program = "import ctypes, os; ctypes.CDLL(None).kill(os.getppid(), 9)\nimport time\n"
        verdict = sandbox.run(program + "time.sleep(9)")
        assert verdict == "failed: it ended what watched it"


def test_network_and_files_and_processes(wall, tmp_path):
    """What `isolation()` says is so."""
    walled = wall != "none"
    path = tmp_path / "theirs"
    interfaces = told("import socket; x = socket.if_nameindex()")
    if walled:
        assert [name for _, name in interfaces] == ["lo"]
        ids = told("import os; x = os.getpid(), os.getppid()")
        assert ids == [2, 1]
    assert ("without network" in sandbox.isolation()) == walled
    verdict = sandbox.run(f"open({str(path)!r}, 'w')")
    assert path.exists() == (wall != "all") and ("Read-only" in verdict) == (wall == "all")
    assert ("read-only files" in sandbox.isolation()) == (wall == "all")
    if wall == "all":
        assert told("import os; x = os.listdir('/proc') + os.listdir('/run')") == []


@pytest.mark.skipif(not sandbox.LINUX, reason="what Linux calls capabilities")
def test_it_has_no_rights(wall):
    """It can neither open its wall again nor become root by sudo."""
    program = "import ctypes; x = [ctypes.CDLL(None).prctl(39, 0, 0, 0, 0), 0]\n"
    program += "x[1] = ctypes.CDLL(None).umount2(b'/proc', 2), ctypes.CDLL(None).unshare(0x20000)"
    assert told(program) == [1, [-1, -1]]


def test_without_a_wall_it_forgets_how_to_do_harm(wall, tmp_path):
    path = tmp_path / "ours"
    path.touch()
    verdict = sandbox.run(f"import os; os.remove({str(path)!r})")
    assert path.exists() == (wall != "network")
    assert ("NoneType" in verdict) == (wall == "none")
    verdict = sandbox.run("import subprocess; subprocess.run(['true'])")
    assert (verdict == "passed") == (wall != "none")


# ---------------------------------------------------------------- which wall


def test_the_best_wall_that_works_is_taken(monkeypatch):
    tried = []

    def behind(name, *_):
        tried.append(name)
        return "passed" if name == works else "failed: it ended what watched it"

    monkeypatch.setattr(sandbox, "run_behind", behind)
    monkeypatch.setattr(sandbox, "LINUX", True)
    names = [*sandbox.WALLS]
    assert names == ["all", "network", "none"]
    for i, works in enumerate(names):
        tried.clear()
        sandbox.wall.cache_clear()
        assert sandbox.isolation() == sandbox.WALLS[works] == sandbox.isolation()
        assert tried == names[: i + 1]
    sandbox.wall.cache_clear()
    works = None
    with pytest.raises(InputError, match="cannot be started"):
        sandbox.run(RIGHT, TEST)
    monkeypatch.setattr(sandbox, "LINUX", False)
    tried.clear()
    works = "none"
    assert sandbox.wall() == "none" and tried == ["none"]
    sandbox.wall.cache_clear()


def test_windows_is_refused(monkeypatch):
    sandbox.wall.cache_clear()
    monkeypatch.setattr(sandbox.sys, "platform", "win32")
    with pytest.raises(InputError, match="Windows; use Linux"):
        sandbox.CodeEval().compute(references=[TEST], predictions=[[RIGHT]], k=[1])
    sandbox.wall.cache_clear()


# ---------------------------------------------------------------- the score


def test_pass_at_k_is_a_mean_over_draws():
    for n in range(1, 6):
        for passed in range(n + 1):
            for k in range(1, n + 1):
                draws = [*combinations([True] * passed + [False] * (n - passed), k)]
                share = sum(map(any, draws)) / len(draws)
                assert sandbox.pass_at(k, n, passed) == pytest.approx(share)


def test_programs_run_side_by_side_and_keep_their_order(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    wait = "import time; time.sleep({}); raise Exception({})"
    programs = [[wait.format(1.2, 0), wait.format(0, 1)], [RIGHT, wait.format(1.2, 3)]]
    programs += [[wait.format(1.2, 4), wait.format(1.2, 5)]]
    sandbox.wall()
    began = time.monotonic()
    evaluator = sandbox.CodeEval(seconds=20)
    scores, verdicts = evaluator.compute(references=[TEST] * 3, predictions=programs, k=[1, 2])
    assert time.monotonic() - began < 4 * 1.2
    failed = "failed: Exception: {}".format
    assert verdicts == [[failed(0), failed(1)], ["passed", failed(3)], [failed(4), failed(5)]]
    assert scores == {"pass@1": pytest.approx(1 / 6), "pass@2": pytest.approx(1 / 3)}


def test_limits_are_handed_on():
    evaluator = sandbox.CodeEval(seconds=1, memory=2**27)
    programs = ["import time; time.sleep(9)", "x = bytearray(2**28)", "x = bytearray(2**22)"]
    _, verdicts = evaluator.compute(references=[""], predictions=[programs], k=[1])
    assert verdicts == [["timed out", "out of memory", "passed"]]


@pytest.mark.parametrize(
    "tests, programs, k",
    [([TEST] * 2, [[RIGHT]], [1]), ([TEST], [[RIGHT]], [1, 2]), ([TEST], [[]], [1])],
)
def test_too_few_programs_are_refused(tests, programs, k):
    with pytest.raises(InputError, match=f"pass@{max(k)} needs a test and"):
        sandbox.CodeEval().compute(references=tests, predictions=programs, k=k)


def test_the_harness_finds_what_it_calls(monkeypatch):
    """lm-evaluation-harness loads code_eval as it imports its tasks, and tries it."""
    evaluate = pytest.importorskip("evaluate", reason="what the harness loads code_eval with")
    pytest.importorskip("lm_eval", reason="the harness is not installed")
    monkeypatch.setattr(evaluate, "load", lambda name: {"code_eval": sandbox.CodeEval()}[name])
    for name in ("humaneval", "mbpp"):
        monkeypatch.delitem(sys.modules, f"lm_eval.tasks.{name}.utils", raising=False)
    humaneval = importlib.import_module("lm_eval.tasks.humaneval.utils")
    mbpp = importlib.import_module("lm_eval.tasks.mbpp.utils")
    assert humaneval.pass_at_k([TEST], [[RIGHT]], 1) == {"pass@1": 1.0}
    assert mbpp.pass_at_1(TEST, [RIGHT]) == 1.0
    assert mbpp.pass_at_1([TEST], [["f = abs"]]) == 0.0


def test_humaneval(realdata):
    """All that its authors wrote passes, and nothing that does nothing."""
    path = realdata / "benchmarks" / "HumanEval.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        problems = [*map(json.loads, file)]
    tests = [f"{p['test']}\ncheck({p['entry_point']})" for p in problems]
    programs = [[p["prompt"] + p["canonical_solution"], p["prompt"] + "    pass"] for p in problems]
    evaluator = sandbox.CodeEval(seconds=30)
    scores, verdicts = evaluator.compute(references=tests, predictions=programs, k=[1])
    assert len(verdicts) == 164 and [row[0] for row in verdicts] == ["passed"] * 164
    assert all(row[1].startswith("failed: ") for row in verdicts)
    assert scores == {"pass@1": 0.5}
