"""All that is to be measured on a GPU, by one command in less than nine minutes.

    python experiments/bench.py gpu                        # on a GPU: everything
    python experiments/bench.py gpu --parts loss step      # some of it
    python experiments/bench.py gpu --device cpu --shape toy-large toy-small --tokens 8 16
                                                           # a rehearsal, anywhere

`ROWS` says what there is to measure, against whom, and with which goal. The rows come in parts, and
each part is a process of its own: one that fails or takes too long costs the others nothing. A row
is printed and written as soon as it is measured, to a JSON file and to a table in Markdown beside
it. What could not be measured has a row that says why.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from experiments import plan
from experiments.bench_measure import (
    by_time,
    copy_bandwidth,
    idle,
    in_turns,
    machine,
    measure,
)
from experiments.bench_sides import (
    PROMPT,
    bytes_per_token,
    check_pair,
    config_of,
    decode_variants,
    decoder,
    loss_variants,
    ours,
    peak_rate,
    profiled,
    random_llama,
    random_pair,
    step_flop,
    step_variants,
    weight_bytes,
)
from experiments.bench_speculative import coin
from extras.int8 import rounded
from extras.speculative import Drafts
from model import Llama, column_major
from plumbing.files import (
    TABLE,
    InputError,
    command,
    pick_device,
    pick_dtype,
    read_json,
    write_text,
)

MINUTES = 8.8  # for all parts together
TESTS = ("tests/test_graphs.py", "tests/test_ivl.py")
STEPS = 20  # of decoding, that are profiled
DRAFTED = 4  # tokens in a round of speculative decoding
LAYERS = 8  # of models whose decoding is compiled: it takes long, and all layers are alike


# ---------------------------------------------------------------- what there is to measure


@dataclass(frozen=True)
class Row:
    """One comparison. Its ratio is ours / peer, in `unit`, and what a goal like "≤ 1.20" is for."""

    key: str
    part: str
    what: str
    peer: str
    unit: str
    goal: str = ""
    only_cuda: bool = False


ROWS = [
    Row("tests", "tests", "tests that pass", "all that ran", "tests", "≥ 100 %", True),
    # decoding
    Row("pair", "decode", "base + value: time", "our base alone (the paper: 2.25)", "s", "≤ 1.20"),
    Row("bandwidth", "decode", "base + value: weights read", "copy bandwidth", "GB/s", "≥ 80 %"),
    Row("length", "decode", "base + value: time per token", "the short text", "ms", "≤ 1.05"),
    Row("int8-memory", "decode", "int8 base: memory", "base in bf16", "MB", "≤ 0.53"),
    Row("int8", "decode", "int8 base + value: pace", "base in bf16", "tokens/s", "≥ 1.5"),
    # the loss
    Row("loss-memory", "loss", "loss: peak memory", "eager", "MB", "≤ 1/15"),
    Row("loss-beyond", "loss", "loss: beyond dh and dW", "eager, likewise", "MB", "≤ 1/40"),
    Row("loss-time", "loss", "loss: time", "eager", "ms", "≤ 0.80"),
    # the training step
    Row("step", "step", "training step: model FLOP", "dense peak", "TFLOP/s", "≥ 45 %"),
    Row("step-cudnn", "step", "training step: no cuDNN attention", "as it is", "ms", "", True),
    Row("step-compiled", "step", "training step: blocks compiled", "as it is", "ms", "", True),
    Row("step-best", "step", "training step: the best", "dense peak", "TFLOP/s", "≥ 45 %", True),
    # where the time of decoding goes
    Row("kernels", "profile", "base + value: kernels per token", "our base alone", "kernels"),
    Row("gaps", "profile", "base + value: no kernel runs", "a step", "ms", "", True),
    Row("profiled", "profile", "base + value: weights read", "copy bandwidth", "GB/s", "", True),
    # speculative decoding
    Row("round", "speculative", "a round of 4 drafted tokens", "its weights, copied", "ms"),
    Row("round-steps", "speculative", "a round of 4 drafted tokens", "a step of the pair", "ms"),
    # transformers
    Row(
        "transformers",
        "transformers",
        "base + value: time",
        "transformers' base alone, static cache, compiled",
        "s",
        "< 1",
    ),
    # the switches of decoding
    Row("compiled", "switches", "a step: compiled", "as it is", "ms", "", True),
    Row("descent", "switches", "a step: compiled, coordinate descent", "as it is", "ms", "", True),
    Row("best", "switches", "a step: best of these", "as it is", "ms", "", True),
]


@dataclass(frozen=True)
class Figures:
    """What was measured for a row: both sides, and what else is to be said."""

    key: str
    ours: float
    peer: float
    shape: str
    note: str = ""


@dataclass
class Job:
    """What the parts are to measure, on what."""

    device: str
    decode: tuple[str, str] = ("llama-2-7b", "tinyllama-1.1b")
    draft: str = "tinyllama-1.1b"
    lengths: tuple[int, int] = (128, 1024)
    loss: tuple[str, str] = ("tinyllama-1.1b", "tinyllama-1.1b")
    loss_tokens: int = 16384
    step: tuple[str, str] = ("tinyllama-1.1b", "tinyllama-1.1b")
    step_tokens: int = 4096

    def target(self) -> torch.device:
        return pick_device(self.device)


def verdict(goal: str, ratio: float) -> bool | None:
    """Whether a ratio meets a goal.

    Example:
    >>> verdict("≤ 1/15", 1 / 17), verdict("≥ 80 %", 0.64), verdict("< 1", 1.0), verdict("", 3.0)
    (True, False, False, None)
    """
    if not goal:
        return None
    sign, text = goal.split(" ", 1)
    if text.endswith(" %"):
        bound = float(text[:-2]) / 100
    elif text.startswith("1/"):
        bound = 1 / float(text[2:])
    else:
        bound = float(text)
    if sign == "≥":
        return ratio >= bound
    return ratio < bound if sign == "<" else ratio <= bound


def written(goal: str, ratio: float) -> str:
    """A ratio in the form of its goal.

    Example:
    >>> written("≤ 1/15", 1 / 17), written("≥ 80 %", 0.642), written("≤ 1.20", 1.157)
    ('1/17.0', '64 %', '1.16')
    """
    if "1/" in goal:
        return f"1/{1 / ratio:.1f}"
    if "%" in goal:
        return f"{100 * ratio:.0f} %"
    return f"{ratio:.2f}"


# ---------------------------------------------------------------- the parts


def tests(job: Job) -> Iterator[Figures]:
    """The tests of what runs on CUDA only."""
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(ended.stdout, ended.stderr, file=sys.stderr)
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|error)", ended.stdout)}
    if not counts:
        raise RuntimeError((ended.stderr or ended.stdout).strip().splitlines()[-1])
    failed = re.findall(r"^(?:FAILED|ERROR) \S*::(\S+)", ended.stdout, re.MULTILINE)
    note = f"failed: {', '.join(failed)}" if failed else ""
    yield Figures("tests", counts.get("passed", 0), sum(counts.values()), ", ".join(TESTS), note)


def decode(job: Job) -> Iterator[Figures]:
    """The pair against the base alone, against the bus, over the length of the text, and with the
    base in eight bits; a row as soon as it is measured.
    """
    device = job.target()
    short, long = job.lengths
    pair = random_pair(job.decode, device, set())
    bandwidth = copy_bandwidth(device)
    of_both, of_base = decoder(pair.base, pair.value), decoder(pair.base)
    names = " + ".join(job.decode)
    shape = f"{names}, {long} tokens"

    variants = {
        "both": lambda: ours(of_both, PROMPT, long),
        "base": lambda: ours(of_base, PROMPT, long),
    }
    got = in_turns(variants, 1, device)
    both, base = got["both"], got["base"]
    speed = f"{long / both:.1f} against {long / base:.1f} tokens/s"
    yield Figures("pair", both, base, shape, speed)
    read = bytes_per_token(pair.base, pair.value) * long / both
    alone = bytes_per_token(pair.base) * long / base / bandwidth
    note = f"our base alone: {alone:.0%}"
    yield Figures("bandwidth", read / 1e9, bandwidth / 1e9, shape, note)

    got = in_turns({"short": lambda: ours(of_both, PROMPT, short)}, 3, device)
    lengths = f"{names}, {long} against {short} tokens"
    yield Figures("length", 1e3 * both / long, 1e3 * got["short"] / short, lengths)

    eight_bits = rounded(pair.base)
    sizes = weight_bytes(eight_bits) / 1e6, weight_bytes(pair.base) / 1e6
    yield Figures("int8-memory", *sizes, job.decode[0])
    of_int8 = decoder(eight_bits, pair.value)
    got = in_turns({"int8": lambda: ours(of_int8, PROMPT, long)}, 1, device)
    yield Figures("int8", long / got["int8"], long / both, shape)


def transformers(job: Job) -> Iterator[Figures]:
    """The pair against transformers' base alone, at its best."""
    device = job.target()
    tokens = job.lengths[1]
    pair = random_pair(job.decode, device, {"their base"})
    got = in_turns(decode_variants(pair, tokens, {"both", "their base"}), 1, device)
    shape = f"{' + '.join(job.decode)}, {tokens} tokens"
    yield Figures("transformers", got["both"], got["their base"], shape)


def profile(job: Job) -> Iterator[Figures]:
    """Some steps of decoding, kernel by kernel."""
    device = job.target()
    pair = random_pair(job.decode, device, set())
    of_base = profiled(decoder(pair.base), STEPS, device)
    of_both = profiled(decoder(pair.base, pair.value), STEPS, device)
    shape = f"{' + '.join(job.decode)}, {STEPS} steps"
    total = sum(kernel.end - kernel.start for kernel in of_both)
    slowest = []
    for name, number, spent in by_time(of_both, 8):
        slowest.append(f"{name[:60]} {spent / total:.0%} ({number / STEPS:.0f})")
    yield Figures("kernels", len(of_both) / STEPS, len(of_base) / STEPS, shape, "; ".join(slowest))
    if device.type != "cuda":
        return
    span, gaps = idle(of_both)
    base_span, base_gaps = idle(of_base)
    note = f"our base alone: {base_gaps / base_span:.0%}"
    yield Figures("gaps", gaps / STEPS / 1e6, span / STEPS / 1e6, shape, note)
    read = bytes_per_token(pair.base, pair.value) * STEPS / span  # bytes per nanosecond
    yield Figures("profiled", read, copy_bandwidth(device) / 1e9, shape)


def speculative(job: Job) -> Iterator[Figures]:
    """A round of speculative decoding in which all drafted tokens stand: against what reading its
    weights takes, and against a step of plain decoding. That ratio is the number of tokens that a
    round has to give before it pays.
    """
    device = job.target()
    pair = random_pair(job.decode, device, set())
    draft = random_llama(job.draft, device, pick_dtype("auto", device), 2)
    if device.type == "cpu":
        column_major(draft)
    rounds = max(1, job.lengths[0] // (DRAFTED + 1))
    tokens = 1 + rounds * (DRAFTED + 1)  # the prompt gives the first
    of_pair = decoder(pair.base, pair.value)

    of_drafts = decoder(pair.base, pair.value, rounds=Drafts(draft, DRAFTED).rounds)
    with coin(1.0):
        variants = {
            "drafted": lambda: ours(of_drafts, PROMPT, tokens),
            "plain": lambda: ours(of_pair, PROMPT, tokens),
        }
        got = in_turns(variants, 3, device)
    a_round = 1e3 * got["drafted"] / rounds
    a_step = 1e3 * got["plain"] / tokens

    # small base and value model are read once for each drafted token, and the value model once more
    read = DRAFTED * bytes_per_token(draft, pair.value) + bytes_per_token(pair.base, pair.value)
    least = 1e3 * read / copy_bandwidth(device)
    shape = f"{' + '.join(job.decode)}, draft {job.draft}"
    note = f"{tokens / got['drafted']:.1f} tokens/s if all stand"
    yield Figures("round", a_round, least, shape, note)
    note = f"pays from {a_round / a_step:.2f} tokens a round, of {DRAFTED + 1}"
    yield Figures("round-steps", a_round, a_step, shape, note)


def loss(job: Job) -> Iterator[Figures]:
    """The two-headed loss against the plain formula."""
    device = job.target()
    configs = [config_of(name) for name in job.loss]
    variants = loss_variants(*configs, job.loss_tokens, device, {"two-headed", "eager"})
    got = dict(measure(variants, 5, device))
    mine, peer = got["two-headed"], got["eager"]
    shape = f"{' + '.join(job.loss)}, {job.loss_tokens} tokens × {configs[0].vocab_size}"

    model = plan.loss(*configs, job.loss_tokens, device.type)
    gradients = model["dh"] + model["dW"]
    expected = sum(model.values())
    note = f"by the model: {expected / 1e6:.0f} MB"
    yield Figures("loss-memory", mine.bytes / 1e6, peer.bytes / 1e6, shape, note)
    parts = [f"{name} {size / 1e6:.0f}" for name, size in model.items() if name not in ("dh", "dW")]
    note = f"by the model: {(expected - gradients) / 1e6:.0f} MB, of which {', '.join(parts)}"
    beyond = [(side.bytes - gradients) / 1e6 for side in (mine, peer)]
    yield Figures("loss-beyond", *beyond, shape, note)
    yield Figures("loss-time", 1e3 * mine.seconds, 1e3 * peer.seconds, shape)


def step(job: Job) -> Iterator[Figures]:
    """One step of training: how much of the GPU's arithmetic it uses, and what switches change."""
    device = job.target()
    tokens = job.step_tokens
    base = random_llama(job.step[0], device, pick_dtype("auto", device), 0).requires_grad_(False)
    value = random_llama(job.step[1], device, torch.float32, 1)
    rate, limit = peak_rate(device)
    work = step_flop(base, value, tokens)
    shape = f"{' + '.join(job.step)}, {tokens} tokens"

    plain = step_variants(base, value, tokens, {"ours"})["ours"]
    measured = dict(measure({"plain": plain}, 5, device))["plain"].seconds
    note = f"{1e3 * measured:.1f} ms; {limit}"
    yield Figures("step", work / measured / 1e12, rate / 1e12, shape, note)
    if device.type != "cuda":
        return

    # each switch takes turns with the step as it is, and is judged by its share of that time
    tried = {"as it is": 1.0}

    def against(key: str, name: str, switched: Callable[[], object]) -> Figures:
        got = dict(measure({"plain": plain, "switched": switched}, 5, device))
        switched_time, plain_time = 1e3 * got["switched"].seconds, 1e3 * got["plain"].seconds
        tried[name] = switched_time / plain_time
        return Figures(key, switched_time, plain_time, shape)

    yield against("step-cudnn", "no cuDNN attention", without_cudnn(plain))
    compiled = step_variants(base, value, tokens, {"compiled"})["compiled"]
    yield against("step-compiled", "blocks compiled", compiled)
    name = min(tried, key=tried.get)
    best = tried[name] * measured
    note = f"{name}: {1e3 * best:.1f} ms, {tried[name]:.2f} of the time"
    yield Figures("step-best", work / best / 1e12, rate / 1e12, shape, note)


def switches(job: Job) -> Iterator[Figures]:
    """Decoding with the switches that there are, on the first layers of both models."""
    from torch._inductor import config as inductor

    device = job.target()
    tokens = job.lengths[0]
    dtype = pick_dtype("auto", device)
    models = []
    for seed, name in enumerate(job.decode):
        config = config_of(name)
        layers = min(LAYERS, config.num_hidden_layers)
        models.append(random_llama(replace(config, num_hidden_layers=layers), device, dtype, seed))
    shape = f"the first {LAYERS} layers of {' + '.join(job.decode)}, {tokens} tokens"

    def decoding() -> Callable[[], object]:
        """A decoder that is recorded when it is first run."""
        decode = decoder(*models)
        return lambda: ours(decode, PROMPT, tokens)

    plain = decoding()
    as_it_is = 1e3 * in_turns({"plain": plain}, 3, device)["plain"] / tokens
    tried = {"as it is": 1.0}

    def against(key: str, name: str) -> Figures:
        # what is recorded keeps its network: so `plain` stays what it is when that is compiled
        got = in_turns({"plain": plain, "switched": decoding()}, 3, device)
        tried[name] = got["switched"] / got["plain"]
        return Figures(key, 1e3 * got["switched"] / tokens, 1e3 * got["plain"] / tokens, shape)

    compile_steps(models)
    yield against("compiled", "compiled")
    torch._dynamo.reset()
    inductor.coordinate_descent_tuning = True
    compile_steps(models)
    yield against("descent", "compiled with coordinate descent")
    name = min(tried, key=tried.get)
    yield Figures("best", tried[name] * as_it_is, as_it_is, shape, name)


def without_cudnn(run: Callable[[], object]) -> Callable[[], object]:
    """The same run, in which cuDNN's attention is not chosen."""

    def switched() -> object:
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            return run()
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)

    return switched


def compile_steps(models: list[Llama]) -> None:
    """Compiles the reading of one token; prompts, which are read once, are read as they are."""
    for model in models:
        model.__dict__.pop("hidden", None)
        plain, compiled = model.hidden, torch.compile(model.hidden, dynamic=True)

        def hidden(x, positions=None, cache=None, end=None, plain=plain, compiled=compiled):
            read = plain if positions is None else compiled
            return read(x, positions, cache, end)

        model.hidden = hidden


@dataclass(frozen=True)
class Part:
    run: Callable[[Job], Iterator[Figures]]
    least: int  # seconds: with fewer left it is not begun
    most: int  # seconds: then it is ended


PARTS = {  # in this order
    "tests": Part(tests, 30, 110),
    "decode": Part(decode, 40, 100),
    "loss": Part(loss, 20, 60),
    "step": Part(step, 30, 130),
    "profile": Part(profile, 30, 60),
    "speculative": Part(speculative, 20, 60),
    "transformers": Part(transformers, 60, 170),
    "switches": Part(switches, 50, 150),
}


# ---------------------------------------------------------------- the report


class Report:
    """The rows so far, in a JSON file and, as a table, in a Markdown file beside it. All that is
    known is in the file: the process of a part goes on with it."""

    def __init__(self, path: Path):
        self.path = path

    def begin(self, on: str) -> None:
        print(on)
        self.write({"machine": on, "rows": []})

    def rows(self) -> list[dict]:
        return read_json(self.path, TABLE)["rows"]

    def measured(self, figures: Figures) -> None:
        row = next(row for row in ROWS if row.key == figures.key)
        ratio = figures.ours / figures.peer
        self.add(
            asdict(row)
            | {"shape": figures.shape, "ours": figures.ours, "peer_figure": figures.peer}
            | {"ratio": ratio, "met": verdict(row.goal, ratio), "note": figures.note}
        )

    def missing(self, row: Row, why: str, more: str = "") -> None:
        """A row without figures, and why it has none; more: for the JSON file only."""
        self.add(asdict(row) | {"ratio": None, "met": None, "note": why, "more": more})

    def add(self, entry: dict) -> None:
        whole = read_json(self.path, TABLE)
        whole["rows"].append(entry)
        self.write(whole)
        print(" | ".join(filter(None, cells(entry))), flush=True)

    def write(self, whole: dict) -> None:
        write_text(self.path, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        titles = ["what", "against", "ours", "peer", "ratio", "goal", "shape", "note"]
        lines = [whole["machine"], "", row_of(titles), row_of(["---"] * len(titles))]
        for entry in whole["rows"]:
            lines.append(row_of(cells(entry)))
        write_text(self.path.with_suffix(".md"), "\n".join(lines) + "\n")


def row_of(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |"


def cells(entry: dict) -> list[str]:
    """The columns of a row of the table."""
    ours = peer = ratio = goal = shape = ""
    if entry["ratio"] is not None:
        ours = f"{entry['ours']:.4g} {entry['unit']}"
        peer = f"{entry['peer_figure']:.4g} {entry['unit']}"
        ratio = written(entry["goal"], entry["ratio"])
        shape = entry["shape"]
    if entry["goal"]:
        goal = entry["goal"]
    if entry["met"] is not None:
        goal += ": met" if entry["met"] else ": not met"
    note = entry["note"].replace("|", "/")  # kernels are called anything
    return [entry["what"], entry["peer"], ours, peer, ratio, goal, shape, note]


# ---------------------------------------------------------------- running the parts


def in_process(command: list[str], limit: float) -> tuple[int | None, str]:
    """Runs a command of its own session for at most so many seconds: its exit status, None where it
    was ended, and what it said on stderr."""
    with TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stderr=errors, cwd=ROOT, start_new_session=True)
        status = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                end = getattr(os, "killpg", os.kill)  # with all that it has started
                end(process.pid, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
                process.wait()
        errors.seek(0)
        return status, errors.read()


def run_part(name: str, job: Job, report: Report, left: float) -> None:
    """Measures the rows of a part; those that it does not come to have a row that says why."""
    rows = [row for row in ROWS if row.part == name]
    on_cpu = job.target().type == "cpu"
    part = PARTS[name]
    limit = min(part.most, left)
    errors = ""
    why = f"skipped: begun too late, with {left:.0f} s left"
    if on_cpu and all(row.only_cuda for row in rows):
        why = "skipped: needs CUDA"
    elif left >= part.least:
        command = [sys.executable, __file__, name, str(report.path), json.dumps(asdict(job))]
        status, errors = in_process(command, limit)
        print(errors, end="", file=sys.stderr, flush=True)
        why = f"failed: {(errors.strip().splitlines() or ['gave no figures'])[-1]}"
        if status is None:
            why = f"skipped: not done after {limit:.0f} s"
    done = {entry["key"] for entry in report.rows()}
    for row in rows:
        if row.key not in done:
            needed = on_cpu and row.only_cuda
            report.missing(row, "skipped: needs CUDA" if needed else why, errors[-3000:])


def gpu(args: argparse.Namespace) -> None:
    """Measures all parts, or those that --parts names."""
    until = time.monotonic() + 60 * MINUTES
    if args.device is None and not torch.cuda.is_available():
        raise InputError(
            "there is no GPU here to be measured; rehearse it with --device cpu --shape toy-large "
            "toy-small --tokens 8 16"
        )
    device = pick_device(args.device or "cuda")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: only cpu and cuda can be measured")
    if device.type == "cpu" and not (args.shape and args.tokens):
        raise InputError("--device cpu is for a rehearsal; give --shape and --tokens, small ones")

    # another pair and other lengths are for all parts
    job = Job(str(device))
    if args.shape:
        check_pair(*args.shape)
        job.decode = job.loss = job.step = tuple(args.shape)
        job.draft = args.shape[1]
    if args.tokens:
        if min(args.tokens) < 1:
            raise InputError("--tokens must be at least 1")
        job.lengths = tuple(args.tokens)
        job.loss_tokens = job.step_tokens = max(args.tokens)

    report = Report(Path(args.json).absolute())
    report.begin(machine(device))
    for name in PARTS:
        if not args.parts or name in args.parts:
            run_part(name, job, report, until - time.monotonic())
    print(f"\n{report.path} and {report.path.with_suffix('.md').name} hold these rows")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, help="only these (default: all, in this order)")
    # machines that are lent give back the folder that OUT names
    file = Path(os.environ.get("OUT", "out"), "bench_gpu.json")
    add("--json", default=str(file), help="file for the rows; beside it a table, .md")
    add("--device", help="cuda:1; cpu, to rehearse it (default: cuda)")
    add("--shape", nargs=2, metavar=("BASE", "VALUE"), help="other models, for all parts")
    add("--tokens", nargs=2, type=int, metavar=("SHORT", "LONG"), help="other lengths, likewise")


def main() -> None:
    """One part, in this process."""
    name, file, job = sys.argv[1:]
    report = Report(Path(file))
    for figures in PARTS[name].run(Job(**json.loads(job))):
        report.measured(figures)


if __name__ == "__main__":
    command(main)
