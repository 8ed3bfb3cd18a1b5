"""The programs under stress: killed, given damaged files, on a full disk, for long.

    python experiments/stress.py kills         # trainings that are killed, and gone on with
    python experiments/stress.py mutations     # damaged files and hostile options
    python experiments/stress.py disk          # each kind of writing on a full disk
    python experiments/stress.py memory        # long runs, whose memory must not grow
    python experiments/stress.py all --json stress.json
    python experiments/stress.py mutations --seed 3 --only 417        # one trial once more

train.py, sample.py and vocab_map.py are seen from outside. What must hold in every trial:

kills      However often a training is killed: the same command, with --resume once there is a
           checkpoint, ends in the same bytes and leaves nothing else behind. A training that gets
           Ctrl-C or SIGTERM leaves a checkpoint, and tells on stderr how to go on.
mutations  Exit status 0 with a sound result, or 2 with one line on stderr, "error: ..." (lines of
           INFORMATION may stand before it). No traceback, no hang, no gigabytes, and no file
           changed but in --out and in the cache.
disk       What was there stays, nothing half-written is left, and the error is one line.
memory     At the end the resident memory is about that after the first tenth.

A trial depends on --seed and its number only, and the moment of a kill on the clock. The models are
tiny. All happens in a temporary folder, in forked copies of this process, which have imported
everything; trainings with two ranks are started by torchrun. Linux only.
"""

import argparse
import json
import os
import random
import re
import reprlib
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked process has lost its threads

import torch._dynamo  # noqa: F401  which the optimizer would import in each copy, for a second
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import make_directory

import sample
import train
import vocab_map
from plumbing import dataset, files, weights
from plumbing.chats import read_prompts
from plumbing.files import InputError, write_text
from plumbing.tokenizer import TEMPLATES
from plumbing.weights import load

HANG = 10  # seconds for a command of a mutation
PATIENCE = 120  # seconds for a training
MEMORY = 2 * 10**9  # bytes for a command of a mutation
FUSE = 16 * 2**30  # bytes of addresses more: then allocations fail, and the machine is spared
GROWTH = 4 * 10**6  # bytes by which a long run may grow
STATM = Path("/proc/self/statm")  # pages: of addresses, resident, ...
INFORMATION = re.compile(r"^(\(|\d+ (tokens|replies)[,:])")  # of a reply: its speed, who said it


# ---------------------------------------------------------------- one run of a program


class Ended(NamedTuple):
    """What a run has left behind."""

    status: int | None  # below 0: the signal that ended it; None: its time was over
    output: str
    errors: str
    memory: int  # bytes, resident at the peak

    def fault(self, most: int = FUSE) -> str:
        """What is wrong with how it ended, "" for nothing. most: bytes of memory."""
        lines = [line for line in self.errors.splitlines() if line.strip()]
        end = f"; stderr ends with {lines[-1][:300]!r}" if lines else ""
        if self.status is None:
            return "it hangs" + end
        if "Traceback" in self.errors:
            return "a traceback" + end
        if self.memory > most:
            return f"{self.memory / 1e9:.1f} GB of memory" + end
        told = [line for line in lines if not INFORMATION.search(line)]
        if self.status == 2 and (len(told) != 1 or not told[0].startswith("error: ")):
            return f"exit status 2, {len(told)} lines on stderr" + end
        if self.status not in (0, 2):
            return f"exit status {self.status}" + end
        return ""


class Child:
    """A script's `main`, run in a forked copy of this process, in a folder."""

    def __init__(self, main: Callable, argv: list[str], folder: Path, stdin=b"", cache=None):
        self.streams = [tempfile.TemporaryFile() for _ in range(3)]  # stdin, stdout, stderr
        self.streams[0].write(stdin)
        self.streams[0].seek(0)
        self.start = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            self.become(main, argv, folder, cache or folder / "cache")
        self.handle = os.pidfd_open(self.pid)

    def become(self, main: Callable, argv: list[str], folder: Path, cache: Path) -> None:
        """Turns this process, the copy, into a run of `main`; does not come back."""
        status = 1
        try:
            # what a process has to itself; its peak memory is counted from here on
            os.setsid()
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            addresses = FUSE + resource.getpagesize() * int(STATM.read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
            Path("/proc/self/clear_refs").write_text("5")
            for number, stream in enumerate(self.streams):
                os.dup2(stream.fileno(), number)
            sys.stdin = sys.__stdin__ = open(0, encoding="utf-8")
            sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8")
            sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace")

            dataset.CACHE = cache
            sys.argv = [f"{main.__module__}.py", *argv]
            files.command(main)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else end.code is not None
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        return wait_for(self.handle, seconds)

    def kill(self) -> None:
        """SIGKILL for it and all that it has started; they are gone then."""
        os.kill(self.pid, signal.SIGSTOP)  # so that it starts no more
        family = descendants(self.pid)
        handles = [os.pidfd_open(pid) for pid in family]
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        for handle in handles:
            wait_for(handle, PATIENCE)
            os.close(handle)

    def ended(self, limit: float) -> Ended:
        """What it leaves behind. It is killed if it has not ended after so many seconds."""
        in_time = self.wait(limit)
        if not in_time:
            self.kill()
        _, status, usage = os.wait4(self.pid, 0)
        os.close(self.handle)
        texts = []
        for stream in self.streams:
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
            stream.close()
        status = os.waitstatus_to_exitcode(status) if in_time else None
        return Ended(status, *texts[1:], 1024 * usage.ru_maxrss)


def wait_for(handle: int, seconds: float) -> bool:
    """Whether the process of a pidfd ends within so many seconds."""
    return bool(select.select([handle], [], [], max(0, seconds))[0])


def descendants(pid: int) -> list[int]:
    """A process, what it has started, what they have started."""
    family = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            family += descendants(int(child))
    return family


# ---------------------------------------------------------------- what the programs are given


PAIR, MAPPED = "--base base --value value", "--base base --value other --map map.safetensors"
# 23 of 24 chats are trained on: 6 steps an epoch
CHATS = "--data chats.json --epochs 1 --batch_size 4 --micro_batch_size 2 --device cpu"
SHORT = "--max_new_tokens 8 --device cpu"
MAKE_MAP = "--base base --value other --text texts.txt chats.json"
# each has stdin.txt on stdin, for `chat`
COMMANDS = {
    "train": (train.main, f"{PAIR} {CHATS} --out out"),
    "fine-tune": (train.main, f"--base base {CHATS} --full --out out"),
    "curriculum": (train.main, f"--base base value --value value {CHATS} --out out"),
    "prefer": (train.main, f"{PAIR} {CHATS.replace('chats.json', 'pairs.jsonl')} --out out"),
    "distil": (train.main, f"{PAIR} {CHATS} --teacher base --out out"),
    "cascade": (train.main, f"{PAIR} {CHATS} --connection cascade+ --out out"),
    "resume": (train.main, f"{PAIR} {CHATS} --out stopped --resume"),
    "evaluate": (train.main, f"{PAIR} --data worse.jsonl --evaluate --device cpu"),
    "ask": (sample.main, f"{PAIR} {SHORT} Hello"),
    "explain": (sample.main, f"{PAIR} {SHORT} --html page.html Hello"),
    "go on": (sample.main, f"{PAIR} {SHORT} --raw Hello"),
    "mapped": (sample.main, f"{MAPPED} {SHORT} Hello"),
    "chats": (sample.main, f"{PAIR} {SHORT} --prompts prompts.jsonl --out replies.jsonl"),
    "lines": (sample.main, f"{PAIR} {SHORT} --prompts prompts.txt --out replies.jsonl"),
    "chat": (sample.main, f"{PAIR} {SHORT}"),
    "make a map": (vocab_map.main, f"{MAKE_MAP} --out made.safetensors --json report.json"),
}


def make_world(folder: Path) -> None:
    """Tiny models, chats and texts, and what the programs have made of them: a map, a training that
    was stopped, a cache.
    """
    # a base in several files, a value model in one, and one with another tokenizer
    weights.SHARD_BYTES, shard_bytes = 40_000, weights.SHARD_BYTES
    make_directory(folder / "base", seed=1)
    weights.SHARD_BYTES = shard_bytes
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    make_directory(folder / "value", seed=2, **small)
    make_directory(folder / "other", seed=3, bytelevel=True, **small)
    write_text(folder / "value" / "chat_template.jinja", TEMPLATES["plain"])
    write_text(folder / "value" / "generation_config.json", '{"eos_token_id": [2]}')

    chats, worse, pairs, prompts = [], [], [], []
    for i in range(24):
        question = {"role": "user", "content": f"Where is the cat {i}?"}
        reply = {"role": "assistant", "content": "On the mat. " * (1 + i % 3)}
        chats.append({"messages": [question, reply]})
        worse.append(json.dumps({"instruction": question["content"], "output": "Good morning!"}))
        pair = {"chosen": reply, "rejected": {**reply, "content": "Good morning!"}}
        pairs.append(json.dumps({"messages": [question], **pair}))
        prompts.append(json.dumps({"messages": [question]}))
    write_text(folder / "chats.json", json.dumps(chats))
    write_text(folder / "worse.jsonl", "\n".join(worse))
    write_text(folder / "pairs.jsonl", "\n".join(pairs))
    write_text(folder / "prompts.jsonl", "\n".join(prompts[:5]))
    write_text(folder / "prompts.txt", "Where is the cat?\nWhere is the dog?\nWho says that?\n")
    write_text(folder / "stdin.txt", "Where is the cat?\nAnd the dog?\n/clear\nHello you\n/exit\n")
    write_text(folder / "texts.txt", "The dog is in the garden, and it rains.\n\n" * 20)

    def stopped() -> None:
        """A training that ends when its first checkpoint is written."""
        write = train.OneDevice.write_tensors

        def write_and_end(*args) -> None:
            write(*args)
            os._exit(0)

        train.OneDevice.write_tensors = write_and_end
        train.main()

    for main, argv in (
        (stopped, f"{PAIR} {CHATS} --out stopped --save_every 2"),
        (vocab_map.main, f"{MAKE_MAP} --out map.safetensors"),
    ):
        ended = Child(main, argv.split(), folder).ended(PATIENCE)
        if ended.status != 0:
            raise InputError(f"what the trials need could not be made: {ended.errors[-500:]}")


# ---------------------------------------------------------------- what is on the disk


def contents(folder: Path) -> dict[str, object]:
    """What is below a folder: of files the bytes, of links where they lead, else the type."""
    found = {}
    for path in folder.rglob("*"):
        about: object = path.lstat().st_mode
        if path.is_symlink():
            about = os.readlink(path)
        elif path.is_file() and os.access(path, os.R_OK):
            about = path.read_bytes()
        found[str(path.relative_to(folder))] = about
    return found


def differences(there: dict[str, object], expected: dict[str, object]) -> dict[str, str]:
    """Name → in which way it is not as expected."""
    words = {name: f"{name} is missing" for name in expected.keys() - there.keys()}
    words |= {name: f"{name} is left over" for name in there.keys() - expected.keys()}
    for name in expected.keys() & there.keys():
        if there[name] != expected[name]:
            words[name] = f"{name} differs"
    return dict(sorted(words.items()))


def stray(folder: Path, before: dict[str, object], argv: list[str]) -> str:
    """What has changed in a folder, but for the cache and what `argv` says is to be written; and
    what was left half-written. "" for nothing.
    """
    allowed = [folder / "cache"]
    for option, value in zip(argv, argv[1:]):
        if option in ("--out", "--html", "--json"):
            allowed.append(Path(os.path.normpath(folder / value)))
    words = []
    for name, change in differences(contents(folder), before).items():
        path = folder / name
        meant = any(place in (path, *path.parents) or path in place.parents for place in allowed)
        if path.suffix == ".tmp" or not meant:
            words.append(change)
    return ", ".join(words)


# ---------------------------------------------------------------- kills


class Outcome(NamedTuple):
    """Of a trial."""

    what: str  # was done
    seen: str  # that is wrong; "" for nothing
    kinds: list[str]  # what it counts as in the table


class Skipped(Exception):
    """A part cannot be tried on this machine."""


class Alone(NamedTuple):
    """A training that nobody kills."""

    begin: float  # seconds until there is a folder
    end: float
    out: dict[str, object]
    cache: dict[str, object]


def two_ranks() -> None:
    """Becomes torchrun, with two ranks of the train.py in the folder "program"."""
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 program/train.py".split()
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv[1:]])


class Kills:
    trials = 120

    def __init__(self, work: Path, steps: int):
        self.work = work
        make_world(work / "world")
        self.alone: dict[Callable, Alone] = {}

        # torchrun starts a copy of the program, so that it has a cache of its own
        for folder in ("plumbing", "extras"):
            shutil.copytree(ROOT / folder, work / "program" / folder)
        for file in ROOT.glob("*.py"):
            shutil.copy(file, work / "program")
        self.cache = work / "program" / "out" / "cache"

    def folder(self, name: str) -> Path:
        """A new folder, and no cache."""
        folder = self.work / name
        folder.mkdir()
        (folder / "program").symlink_to(self.work / "program")
        shutil.rmtree(self.cache, ignore_errors=True)
        return folder

    def start(self, main: Callable, folder: Path) -> Child:
        """The training, or the rest of it if there is a checkpoint."""
        world = self.work / "world"
        argv = f"--base {world}/base --value {world}/value {CHATS} --data {world}/chats.json"
        argv += " --epochs 6 --save_every 2 --keep best --out out"
        if (folder / "out" / "checkpoint.safetensors").exists():
            argv += " --resume"
        return Child(main, argv.split(), folder, cache=self.cache)

    def leave_alone(self, main: Callable) -> None:
        folder = self.folder(f"alone, {main.__name__}")
        child = self.start(main, folder)
        while not (folder / "out").exists() and not child.wait(0.005):
            pass
        begin = time.perf_counter() - child.start
        child.wait(PATIENCE)
        end = time.perf_counter() - child.start
        ended = child.ended(0)
        if ended.status != 0:
            raise InputError(f"a training that nobody kills fails: {ended.errors[-500:]}")
        self.alone[main] = Alone(begin, end, contents(folder / "out"), contents(self.cache))

    def trial(self, number: int, rng: random.Random) -> Outcome:
        # of six trials one has two ranks, and one is told to stop
        main = two_ranks if number % 6 == 4 else train.main
        signals = [signal.SIGKILL] * rng.choice([1, 1, 2] if main is two_ranks else [1, 1, 2, 3])
        if number % 6 == 5:
            signals = [rng.choice([signal.SIGINT, signal.SIGTERM])]
        if main not in self.alone:
            self.leave_alone(main)
        alone = self.alone[main]
        folder = self.folder(str(number))

        # a run for each signal, and one more. torchrun's first seconds are imports, and the model
        # is saved in the last moments, which else few signals would fall on
        first = 0.9 * alone.begin if main is two_ranks else 0
        name = "two ranks" if main is two_ranks else "one process"
        what, faults, kinds = [name], [], [name]
        for sent in [*signals, None]:
            child = self.start(main, folder)
            moment = rng.uniform(rng.choice([first, first, 0.9 * alone.end]), alone.end)
            if child.wait(moment if sent else PATIENCE):
                fault = child.ended(0).fault()
                faults += [f"run {len(what)}: {fault}"] if fault else []
                break
            if sent == signal.SIGKILL or not sent:
                child.kill()
                child.ended(PATIENCE)
            else:
                os.kill(child.pid, sent)
                faults += badly_stopped(child.ended(PATIENCE), folder / "out")
            place = self.reached(folder)
            what.append(f"{sent.name if sent else 'hang'} after {place}")
            kinds.append(f"{what[-1]}")

        # all must be as if nothing had been
        faults += differences(contents(folder / "out"), alone.out).values()
        faults += differences(contents(self.cache), alone.cache).values()
        return Outcome("; ".join(what), "; ".join(faults), kinds)

    def reached(self, folder: Path) -> str:
        """How far a training has come, by what is on the disk."""
        out = folder / "out"
        if list(self.cache.glob("*.tmp")):
            return "a part of the cache"
        for temporary in out.glob("*.tmp"):
            return f"a part of {temporary.name[1:].rsplit('.', 2)[0]}"  # .NAME.PROCESS.tmp
        for name, words in (
            ("README.md", "the whole model"),
            ("model.safetensors", "some files of the model"),
            ("checkpoint.safetensors", "a checkpoint"),
            ("log.jsonl", "the log"),
        ):
            if (out / name).exists():
                return words
        return "the cache" if self.cache.exists() else "nothing"


def badly_stopped(ended: Ended, out: Path) -> list[str]:
    """What is wrong with a training that was told to stop."""
    if ended.status == 0:
        return []  # it was done; its files are compared later
    faults = []
    if ended.status is None or "Traceback" in ended.errors:
        faults.append(ended.fault())
    there = (out / "checkpoint.safetensors").exists()
    log = out / "log.jsonl"
    begun = log.exists() and '"loss"' in log.read_text() and not (out / "README.md").exists()
    if begun and not there:
        faults.append("it has begun, but there is no checkpoint")
    last = " ".join(ended.errors.splitlines()[-3:])
    if there and "--resume" not in last:
        faults.append(f"stderr does not tell how to go on: {last[-300:]!r}")
    return faults


# ---------------------------------------------------------------- mutations

LONG = "a" * 1_000_000
HOSTILE_JSON = (
    r'null true false -1 0 1 0.5 1e-300 1e999 -1e999 NaN 18446744073709551616 "" "abc" "\ud800" '
    r'"a\u0000b" "\u001b[31m" "F16" "I64" "llama-2" [] {} [null] [1,"a"] {"a":1}'
).split() + ["1" + "0" * 4999, f'"{LONG}"', "[" * 10_000 + "]" * 10_000]
HOSTILE_TEXT = [LONG, "a\n\n" * 1000, "\0", "\x1b[31m", "\ufeff", "\u202e", "é" * 300, "<s></s>"]
HOSTILE_OPTIONS = (
    "nan inf -inf -1 0 1 1e999 1e-320 3.5 . .. abc none auto -- base chats.json /dev/null "
    "no/such/place cuda:99 map.safetensors"
).split() + ["", " ", "a\nb", "\udcff", str(2**64), "9" * 5000, "x" * 5000]
HOSTILE_TEMPLATES = r"""
{{ 'a' * 10**9 }}
{{ 10**(10**8) }}
{% for i in range(99999) %}{% for j in range(99999) %}{{ i * j }}{% endfor %}{% endfor %}
{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}
{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}
{% include 'x' %}
{% import 'x' as y %}
{{ 1 / 0 }}
{{ nothing }}
{{ nothing.at.all }}
{{ ''.__class__.__mro__ }}
{{ 'a'|center(10**9) }}
{{ '%1000000000d' % 1 }}
{{ '{:>1000000000}'.format(1) }}
{{ messages + 1 }}
{{ 'a'.encode('nonsense') }}
{{ messages.append(1) }}
{{ messages | sort | first }}
{{ messages | tojson(indent=10**9) }}
{{ raise_exception(7) }}
{{ range(10**9) | list }}
{{ lipsum(n=99999) }}
{{ dict(1, 2) }}
{% for m in messages %}{{ m.content }}
{{ '\ud800' }}
{{ '<s></s>' * 300 }}""".split("\n")
NOT_TRIED = "--compile"  # it takes minutes
# what the programs write for themselves: damage there must not change a result
OWN = ("cache", "log.jsonl", "checkpoint.safetensors")


def damage_bytes(text: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A piece of a file is changed; and what was done to it."""
    start = rng.randrange(len(text) + 1)
    end = min(len(text), start + rng.choice([1, 2, 8, 1000]))
    front, piece, rest = text[:start], text[start:end], text[end:]
    kind, text = rng.choice(
        [
            ("flip", front + bytes(byte ^ rng.randrange(1, 256) for byte in piece) + rest),
            ("delete", front + rest),
            ("insert", front + rng.randbytes(10) + piece + rest),
            ("duplicate", front + piece + piece + rest),
            ("truncate", front),
            ("empty", b""),
        ]
    )
    return text, f"{kind} bytes {start} to {end}"


def damage_json(text: str, rng: random.Random) -> tuple[str, str]:
    """A value of a JSON text becomes hostile; and what was done to it."""
    # from the top down to a random value, often a large one
    parent, keys = {"": json.loads(text)}, [""]
    whole = parent
    while rng.random() < 0.8 and isinstance(parent[keys[-1]], (dict, list)) and parent[keys[-1]]:
        parent = parent[keys[-1]]
        keys.append(rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent))))

    # words stand for what json.dumps would not write
    key, hostile = keys[-1], rng.choice(HOSTILE_JSON)
    kind = rng.choice(["replace", "replace", "replace", "delete", "twice", "add"])
    if kind == "replace" or parent is whole:
        parent[key] = "HOSTILE"
    elif kind == "delete":
        del parent[key]
    elif isinstance(parent, list):
        parent.insert(key, "HOSTILE")
    else:
        parent["TWICE" if kind == "twice" else "added"] = "HOSTILE"
    text = json.dumps(whole[""]).replace('"HOSTILE"', hostile).replace('"TWICE"', json.dumps(key))
    return text, f"{kind} {'/'.join(map(str, keys[1:]))}, {reprlib.repr(hostile)}"


def damage_tensors(text: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A value in the header of a safetensors file becomes hostile, or a float32 in the rest."""
    size = 8 + int.from_bytes(text[:8], "little")
    if rng.random() < 0.6:
        header, what = damage_json(text[8:size].decode(), rng)
        return struct.pack("<Q", len(header)) + header.encode() + text[size:], what
    place = rng.randrange(size, len(text) - 4, 4)
    number = rng.choice([float("nan"), float("inf"), -3e38])
    return text[:place] + struct.pack("<f", number) + text[place + 4 :], f"{number} at {place}"


def damage_file(path: Path, rng: random.Random) -> str:
    """Makes of a file something that nobody expects; says what."""
    ways = {
        ".json": ["json", "json", "template" if path.name == "tokenizer_config.json" else "json"],
        ".jsonl": ["line", "line", "line"],
        ".safetensors": ["tensors", "tensors", "tensors"],
        ".jinja": ["template", "template", "template"],
        ".txt": ["text"],
    }
    way = rng.choice(["bytes", "no file", *ways[path.suffix]])
    text = path.read_bytes()
    if way == "no file":
        return replace_file(path, rng)
    if way == "bytes":
        text, what = damage_bytes(text, rng)
    elif way == "tensors":
        text, what = damage_tensors(text, rng)
    elif way == "text":
        place, hostile = rng.randrange(len(text)), rng.choice(HOSTILE_TEXT)
        text, what = text[:place] + hostile.encode() + text[place:], reprlib.repr(hostile)
    elif way == "template":
        template = rng.choice(HOSTILE_TEMPLATES)
        what = f"template {template[:90]}"
        if path.suffix == ".json":
            # a chat_template.jinja would be used instead
            path.with_name("chat_template.jinja").unlink(missing_ok=True)
            template = json.dumps(json.loads(text) | {"chat_template": template})
        text = template.encode()
    else:
        # one JSON text, or one of many
        lines = text.decode().split("\n") if way == "line" else [text.decode()]
        i = rng.randrange(len(lines) - (lines[-1] == ""))
        lines[i], what = damage_json(lines[i], rng)
        text = "\n".join(lines).encode()
    path.write_bytes(text)
    return what


def replace_file(path: Path, rng: random.Random) -> str:
    """Something else takes a file's place."""
    kinds = ["nothing", "a folder", "a pipe", "a link to nowhere", "a link to itself"]
    kinds += ["a file of others"] if os.geteuid() else []  # root may read everything
    kind = rng.choice(kinds)
    if kind == "a file of others":
        path.chmod(0)
        return kind
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to(path.name if kind == "a link to itself" else "nowhere")
    return kind


def no_work() -> None:
    """For the memory that a process has before it does anything."""


class Mutations:
    trials = 2000

    def __init__(self, work: Path, steps: int):
        self.work, self.world = work, work / "world"
        make_world(self.world)
        self.most = MEMORY + Child(no_work, [], work).ended(HANG).memory

        # file → the commands that read it, all by name; each command must end well by itself
        self.readers: dict[Path, list[str]] = {}
        self.resumed = None
        for name, (_, argv) in COMMANDS.items():
            for file in self.read_by(name):
                self.readers.setdefault(file.relative_to(self.world), []).append(name)
            folder = self.folder(name)
            fault = self.run(name, argv.split(), folder, Path())
            if fault:
                raise InputError(f"{name} fails without any damage: {fault}")
            if name == "resume":
                self.resumed = (folder / "stopped" / "model.safetensors").read_bytes()

        # script → its options, as --help has them: `  --name VALUE  meaning` or `  --name  meaning`
        self.options = {}
        for script in (train, sample, vocab_map):
            listed = Child(script.main, ["--help"], work).ended(HANG).output
            self.options[script.main] = re.findall(r"^  (--\w+)(?: ?)(\S?)", listed, re.MULTILINE)

    def folder(self, name: str) -> Path:
        folder = self.work / f"trial {name}"
        shutil.copytree(self.world, folder)
        return folder

    def read_by(self, name: str) -> list[Path]:
        """The files that a command's words name, or that are in the folders that they name."""
        main, argv = COMMANDS[name]
        words = set(argv.split())
        if main is train.main:
            words.add("cache")
        elif name == "chat":
            words.add("stdin.txt")
        places = [self.world / word for word in sorted(words) if (self.world / word).exists()]
        inside = [file for place in places if place.is_dir() for file in sorted(place.iterdir())]
        return [place for place in places if place.is_file()] + inside

    def trial(self, number: int, rng: random.Random) -> Outcome:
        folder = self.folder(str(number))
        damaged = Path()
        if rng.random() < 0.25:
            # one more option
            name = rng.choice([*COMMANDS])
            main, argv = COMMANDS[name]
            option, value = rng.choice(self.options[main])
            added = [option, rng.choice(HOSTILE_OPTIONS)] if value else [option]
            added = [] if option == NOT_TRIED else added
            argv = argv.split() + added
            what, kind = " ".join(map(reprlib.repr, added)), "options"
        else:
            # a file, and a command that reads it
            damaged = rng.choice([*self.readers])
            name = rng.choice(self.readers[damaged])
            argv = COMMANDS[name][1].split()
            what = f"{damaged}: {damage_file(folder / damaged, rng)}"
            kind = "data cache" if damaged.parts[0] == "cache" else damaged.name
        seen = self.run(name, argv, folder, damaged)
        shutil.rmtree(folder)
        return Outcome(f"{name}, {what}", seen, [kind])

    def run(self, name: str, argv: list[str], folder: Path, damaged: Path) -> str:
        """Runs a command; what is wrong with what it does, "" for nothing."""
        main, _ = COMMANDS[name]
        stdin = folder / "stdin.txt"
        typed = stdin.read_bytes() if stdin.is_file() else b""
        typed = b"\n".join(typed.split(b"\n")[:40])  # a longer chat would only take longer
        before = contents(folder)
        ended = Child(main, argv, folder, typed).ended(HANG)
        fault = ended.fault(self.most) or stray(folder, before, argv)
        if fault or ended.status != 0 or "--out" not in argv or "--dry_run" in argv:
            return fault

        # a sound result: a model of numbers, the same one as without the damage, or all replies
        out = folder / argv[len(argv) - argv[::-1].index("--out")]
        if main is train.main:
            try:
                trained = load(out)
            except InputError as error:
                return f"what was saved cannot be loaded: {error}"
            if not all(p.isfinite().all() for p in trained.parameters()):
                return "what was saved is not finite"
        if name == "resume" and {damaged.name, *damaged.parts} & {*OWN}:
            if (out / "model.safetensors").read_bytes() != self.resumed:
                return "the model is another one than without the damage"
        if "--prompts" in argv:
            prompts = read_prompts(str(folder / argv[argv.index("--prompts") + 1]))
            replies = [json.loads(line)["prompt"] for line in out.read_text().split("\n")[:-1]]
            if replies != [chat[-1]["content"] for chat in prompts]:
                return f"{len(replies)} replies to {len(prompts)} prompts, or in another order"
        return ""


# ---------------------------------------------------------------- full disks


# main, options, the file in question, pages of 4096 bytes that are left for what comes before it
INTO = f"{PAIR} {CHATS} --out disk/out"
MANY = f"{PAIR} {SHORT} --prompts prompts.txt"
WRITINGS = {
    "checkpoint": (train.main, f"{INTO} --save_every 2 --resume", "out/checkpoint.safetensors", 3),
    "model": (train.main, INTO, "out/model.safetensors", 3),
    "log, at the start": (train.main, INTO, "out/log.jsonl", 0),
    "log, later": (train.main, f"{INTO} --epochs 20", "out/log.jsonl", 3),
    "data cache": (train.main, f"{PAIR} {CHATS} --out out", "any", 0),
    "map": (vocab_map.main, f"{MAKE_MAP} --out disk/map", "map", 0),
    "report": (vocab_map.main, f"{MAKE_MAP} --json disk/report", "report", 0),
    "replies": (sample.main, f"{MANY} --out disk/replies", "replies", 0),
    "page": (sample.main, f"{PAIR} {SHORT} --html disk/page Hello", "page", 0),
}


class Disk:
    trials = len(WRITINGS)

    def __init__(self, work: Path, steps: int):
        self.work = work
        make_world(work / "world")
        (work / "disk").mkdir()

        # a small disk, there for a shell in a namespace of its own, and gone with it
        mount = f"mount -t tmpfs -o size=2m none '{work}/disk' && echo mounted && read line"
        shell = ["unshare", "-rm", "sh", "-c", mount]
        try:
            self.shell = subprocess.Popen(
                shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            said = self.shell.stdout.readline().decode()
        except OSError as error:
            said = str(error)
        if said != "mounted\n":
            raise Skipped(f"no small disk can be made here: {said.strip()}")
        self.disk = Path(f"/proc/{self.shell.pid}/root{work}/disk")  # as the shell sees it

    def trial(self, number: int, rng: random.Random) -> Outcome:
        name, (main, argv, place, pages) = [*WRITINGS.items()][number % len(WRITINGS)]
        folder = self.work / str(number)
        shutil.copytree(self.work / "world", folder)
        shutil.rmtree(folder / "cache")
        (folder / "disk").symlink_to(self.disk)

        # on the disk: the stopped training, or what another one has logged; the file; and all full
        shutil.rmtree(self.disk / "out", ignore_errors=True)
        for file in self.disk.iterdir():
            file.unlink()
        shutil.copytree(folder / "stopped", self.disk / "out")
        if "--resume" not in argv:
            (self.disk / "out" / "checkpoint.safetensors").unlink()
            (self.disk / "out" / "log.jsonl").write_text('{"run": "other", "step": 0}\n')
        file = self.disk / place
        if not file.exists():
            file.write_text("what was there before\n")
        old = file.read_bytes()
        if name == "model":  # a checkpoint of the last step comes before it
            pages += (folder / "stopped" / "checkpoint.safetensors").stat().st_size // 4096
        about = os.statvfs(self.disk)
        (self.disk / "full").write_bytes(bytes((about.f_bavail - pages) * about.f_frsize))

        cache = self.disk if name == "data cache" else None
        ended = Child(main, argv.split(), folder, cache=cache).ended(PATIENCE)

        # one line, nothing half-written, and what was there stands; a log may have grown
        faults = [ended.fault()] if ended.fault() else []
        if ended.status == 0:
            faults.append("exit status 0")
        faults += [f"{left.name} is left over" for left in self.disk.rglob("*.tmp")]
        now = file.read_bytes() if file.exists() else b""
        if now != old and not (name == "log, later" and now.startswith(old)):
            faults.append(f"the old {name} is gone")
        what = f"{name}, {pages} pages left: {ended.errors.strip()[-200:]!r}"
        return Outcome(what, "; ".join(faults), [name])


# ---------------------------------------------------------------- long runs


class Memory:
    trials = 2

    def __init__(self, work: Path, steps: int):
        self.work, self.steps = work, steps
        make_world(work / "world")

    def trial(self, number: int, rng: random.Random) -> Outcome:
        if number % 2 == 0:
            # chats in one process; a random model's replies hardly ever stop by themselves
            chats = b"Hello\n/clear\n" * (self.steps // 200)
            argv = f"{PAIR} --device cpu --max_new_tokens 200"
            child = Child(sample.main, argv.split(), self.work / "world", chats)
        else:
            argv = f"{PAIR} {CHATS} --out out --epochs {self.steps // 4 // 6}"
            child = Child(train.main, argv.split(), self.work / "world")

        # bytes, ten times a second, until the model stands: a library of pictures comes after that
        resident = []
        while not child.wait(0.1):
            if (self.work / "world" / "out" / "README.md").exists():
                continue
            pages = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1])
            resident.append(pages * resource.getpagesize())
        ended = child.ended(0)

        if number % 2 == 0:
            kind, steps = "decoding", sum(map(int, re.findall(r"(\d+) tokens,", ended.errors)))
        else:
            log = (self.work / "world" / "out" / "log.jsonl").read_text()
            kind, steps = "training", log.count('"loss"')
        early, late = resident[len(resident) // 10], resident[-1]
        what = f"{steps} steps of {kind}: {early / 1e6:.1f} MB, at the end {late / 1e6:.1f} MB"
        fault = ended.fault() or (ended.errors if ended.status else "")
        if late - early > GROWTH:
            fault = fault or f"it has grown by {(late - early) / 1e6:.1f} MB"
        return Outcome(what, fault, [what])


# ---------------------------------------------------------------- command line

PARTS = {"kills": Kills, "mutations": Mutations, "disk": Disk, "memory": Memory}


def run_part(name: str, args: argparse.Namespace) -> dict:
    """The trials of a part, and a table of them."""
    start = time.perf_counter()
    report = {"part": name, "seed": args.seed, "trials": 0, "failed": []}
    counts, bad = Counter(), Counter()
    with tempfile.TemporaryDirectory(prefix="stress-") as work:
        try:
            part = PARTS[name](Path(work).resolve(), args.steps)
        except Skipped as reason:
            print(f"{name}: skipped, {reason}")
            return report | {"skipped": str(reason)}
        numbers = range(args.trials or part.trials) if args.only is None else [args.only]
        for number in tqdm(numbers, name, unit=" trials", disable=None):
            what, seen, kinds = part.trial(number, random.Random(f"{args.seed} {number}"))
            counts.update(kinds)
            if seen:
                bad.update(kinds)
                report["failed"].append({"trial": number, "what": what, "seen": seen})
                tqdm.write(f"{name}, trial {number}: {what}\n    {seen}")
            elif args.only is not None:
                print(f"{name}, trial {number}: {what}")

    report |= {"trials": len(numbers), "seconds": time.perf_counter() - start}
    report |= {"kinds": counts, "failed of them": bad}
    print(f"\n{name:50}  trials  failed")
    for kind, count in sorted(counts.items()):
        print(f"{kind:50}{count:8}{bad[kind]:8}")
    failed = [failure["trial"] for failure in report["failed"]]
    print(f"{'in all':50}{len(numbers):8}{len(failed):8}    {report['seconds']:.0f} s")
    if failed:
        print(f"failed: {failed}; one again: stress.py {name} --seed {args.seed} --only K")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "all"])
    add = parser.add_argument
    add("--trials", type=int, help="how many (kills 120, mutations 2000, disk 9, memory 2)")
    add("--seed", type=int, default=0)
    add("--only", type=int, metavar="K", help="trial K alone")
    add("--steps", type=int, default=20_000, help="of decoding in `memory`; of training a fourth")
    add("--json", metavar="FILE", help="where the figures go")
    args = parser.parse_args()
    if args.part == "all" and (args.trials is not None or args.only is not None):
        raise InputError("--trials and --only are for one part; leave out all")

    # a child that is killed while it holds a lock of tqdm's must not hold up the others, nor may
    # a thread of tqdm's be in the midst of something when a copy is made
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0

    reports = [run_part(name, args) for name in (PARTS if args.part == "all" else [args.part])]
    if args.json:
        write_text(args.json, json.dumps(reports, indent=2) + "\n")
    if any(report["failed"] for report in reports):
        sys.exit(1)


if __name__ == "__main__":
    files.command(main)
