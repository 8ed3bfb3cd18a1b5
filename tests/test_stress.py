"""That stress.py sees what it is to see; and, marked slow, a short run of each of its parts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import in_a_process

from plumbing.files import InputError

if sys.platform != "linux":
    pytest.skip("stress.py asks Linux about its children", allow_module_level=True)
from experiments import stress

EVERYTHING = 2**60  # bytes


def ended(main, folder: Path, limit: float = 60) -> stress.Ended:
    return stress.Child(main, [], folder).ended(limit)


def raises() -> None:
    raise ValueError("what nobody has thought of")


def refuses() -> None:
    raise InputError("this cannot be used")


def refuses_at_length() -> None:
    print("a word more", file=sys.stderr)
    refuses()


def refuses_a_reply() -> None:
    print("8 tokens, 99.9 tok/s", file=sys.stderr)
    refuses()


def hangs() -> None:
    time.sleep(1000)


def hangs_with_a_child() -> None:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(1000)"])


def takes_memory() -> None:
    bytes(range(256)) * 2**20


def gives_up() -> None:
    sys.exit(1)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "main, limit, fault",
    [
        (stress.no_work, 60, ""),
        (refuses, 60, ""),
        (refuses_a_reply, 60, ""),
        (refuses_at_length, 60, "exit status 2, 2 lines"),
        (raises, 60, "a traceback; stderr ends with 'ValueError: what nobody has thought of'"),
        (gives_up, 60, "exit status 1"),
        (hangs, 0.2, "it hangs"),
        (is_killed, 60, "exit status -9"),
    ],
)
def test_how_a_run_ends(main, limit, fault, tmp_path):
    seen = ended(main, tmp_path, limit).fault(EVERYTHING)
    assert seen.startswith(fault) and bool(seen) == bool(fault)


def test_memory_is_that_of_the_run_alone(tmp_path):
    takes_memory()  # a peak of this process, before
    most = ended(stress.no_work, tmp_path).memory + 100 * 10**6
    assert not ended(stress.no_work, tmp_path).fault(most)
    assert "GB of memory" in ended(takes_memory, tmp_path).fault(most)


def test_a_kill_ends_the_children_too(tmp_path):
    child = stress.Child(hangs_with_a_child, [], tmp_path)
    while len(stress.descendants(child.pid)) < 2:
        time.sleep(0.01)
    _, grandchild = stress.descendants(child.pid)
    assert child.ended(0).status is None
    about = Path(f"/proc/{grandchild}/stat")
    assert not about.exists() or about.read_text().split()[2] == "Z"


def test_files_where_none_belong(tmp_path):
    (tmp_path / "chats.json").write_text("[]")
    (tmp_path / "base").mkdir()
    before = stress.contents(tmp_path)

    def writes() -> None:
        for name in ("out", "cache"):
            Path(name).mkdir()
            Path(name, "file").write_text("meant")
        Path("page.html").write_text("meant")
        Path("chats.json").write_text("[0]")
        Path("base", "notes").write_text("not meant")
        Path("out", ".model.1.tmp").write_text("half")

    argv = ["--out", "out", "--html", "page.html"]
    ended(writes, tmp_path)
    assert stress.stray(tmp_path, before, argv).split(", ") == [
        "base/notes is left over",
        "chats.json differs",
        "out/.model.1.tmp is left over",
    ]
    (tmp_path / "chats.json").unlink()
    assert "chats.json is missing" in stress.stray(tmp_path, before, argv)


def test_a_trial_is_the_same_again(tmp_path):
    for name in ("a.json", "b.jsonl", "c.txt", "tokenizer_config.json"):
        done = []
        for turn in range(2):
            rng = stress.random.Random(5)
            for i in range(20):
                folder = tmp_path / name / f"{turn} {i}"
                folder.mkdir(parents=True)
                (folder / name).write_text('{"a": [1, {"b": "c"}], "d": null}')
                done.append((stress.damage_file(folder / name, rng), stress.contents(folder)))
        assert done[:20] == done[20:]
        assert len({what for what, _ in done}) > 5


def test_the_failed_trials_are_told(tmp_path, monkeypatch, capfd):
    class Part:
        trials = 3

        def __init__(self, work: Path, steps: int):
            pass

        def trial(self, number: int, rng) -> stress.Outcome:
            seen = "a traceback" if number == 1 else ""
            return stress.Outcome(f"what {number}", seen, ["kind"])

    monkeypatch.setitem(stress.PARTS, "kills", Part)
    argv = ["stress.py", "kills", "--seed", "7", "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        stress.main()
    assert end.value.code == 1
    printed = capfd.readouterr().out
    assert "kills, trial 1: what 1\n    a traceback" in printed
    assert "stress.py kills --seed 7 --only K" in printed
    (report,) = json.loads((tmp_path / "figures.json").read_text())
    assert report["failed"] == [{"trial": 1, "what": "what 1", "seen": "a traceback"}]
    assert report["kinds"] == {"kind": 3}

    monkeypatch.setattr(sys, "argv", [*argv, "--only", "2"])
    stress.main()
    assert "kills, trial 2: what 2" in capfd.readouterr().out


# ---------------------------------------------------------------- short runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, options",
    [
        ("kills", ["--trials", 6]),
        ("mutations", ["--trials", 120]),
        ("disk", []),
        ("memory", ["--steps", 2000]),
    ],
)
def test_stress(part, options, tmp_path):
    file = tmp_path / "figures.json"
    result = in_a_process("experiments/stress.py", part, *options, "--json", file)
    assert result.returncode == 0, result.stdout + result.stderr
    (report,) = json.loads(file.read_text())
    if "skipped" in report:
        pytest.skip(report["skipped"])
    assert report["trials"] > 1 and report["failed"] == []
