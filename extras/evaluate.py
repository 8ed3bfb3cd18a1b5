"""The paper's benchmarks for a base and its value model, by EleutherAI's lm-evaluation-harness.

    pip install -r requirements-evaluate.txt
    python -m extras.evaluate --base DIR --value DIR --tasks gsm8k mmlu --out OUT
    python -m extras.evaluate --base DIR --value none --tasks arc_challenge --out OUT
    python -m extras.evaluate --base DIR --value DIR --tasks gsm8k --data FILES --limit 9 --out OUT
    python -m extras.evaluate --base DIR --value DIR --suite paper --data FILES --out OUT \\
        --run_code --toxigen_judge DIR --judge_url URL --judge_model gpt-4     # a row of Table 1

The paper's tasks are mt-bench, ifeval, gsm8k, toxigen_generation, mbpp, humaneval, arc_challenge
(25 examples), hellaswag (10), mmlu (5), truthfulqa_mc2 and winogrande (5). A model that answers
gets the first six as chats, in its template; the others go on from plain text. Any other name is
the harness's own, asked as a plain text, with as many examples as the harness gives it. (One of
these is toxigen, where the model is to classify texts; the paper's column is what it writes.)

--data: nothing is downloaded. Either the folders are copies of the Hub's (a message says which), or
the files are those of the authors: gsm8k-test.jsonl, HumanEval.jsonl.gz, ifeval.jsonl, mbpp.jsonl,
truthfulqa.csv, mmlu/SUBJECT_dev.csv and _test.csv, toxigen/hate_GROUP.txt; for mt-bench those of
FastChat, see extras/mt_bench.py.

Through a --map the answers are made of the value model's tokens. Their log-likelihoods sum to what
the pair says of the text, so answers to one question can be compared; but their number of tokens
is the value model's, and the base's probabilities are those that the map hands on.

The options of sample.py that choose and place models hold here too: --base, --value,
--map, --alpha, --template, --device, ... The same command goes on where it was stopped. In OUT
answers.jsonl has what the models said, results_TASK.json and samples_TASK.jsonl what the harness
makes of it, row.json the scores by the paper's columns.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import sample
from extras import mt_bench, sandbox
from extras.benchmarks import BENCHMARKS, COLUMNS, MT_BENCH, Benchmark, beside
from extras.likelihood import Likelihood, Question, log_likelihoods
from model import Llama
from plumbing.files import (
    TABLE,
    InputError,
    Parser,
    command,
    given,
    main_process,
    model_directory,
    own_folder,
    pick_device,
    pick_dtype,
    read_json,
    refuse_part_of_model,
    torchrun,
    whole,
    write_text,
)
from plumbing.pair import Speaker
from plumbing.tokenizer import Tokenizer
from plumbing.weights import fingerprint, read_config, recorded_connection

try:
    from extras import harness
except ImportError as missing:  # of a library that only this needs
    harness, MISSING = None, missing.name

PAPER = (*BENCHMARKS, MT_BENCH)
TOXIC = "toxigen_generation"
MARKS = ("answers.jsonl", "row.json", "mt_bench")
KEY = "OPENAI_API_KEY"  # the judge's key, from the environment
# of sample.py's options: what belongs to one reply, and what the benchmarks decide
NOT_OURS = "explain html compare raw prompts system stop".split()
NOT_OURS += "temperature top_k top_p seed".split()


# ---------------------------------------------------------------- the command line


def arguments() -> tuple[argparse.Namespace, argparse.Namespace]:
    """Ours, and sample.py's, each checked. Raises InputError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", required=True, help="a folder for the results, and for what is known already")
    add("--suite", choices=["paper"], help="all tasks of the paper, as a row of its Table 1")
    add("--tasks", nargs="+", metavar="NAME", help="some tasks")
    add("--data", metavar="DIR", help="local files, for all tasks; nothing is downloaded then")
    add("--limit", type=whole(1, 10**9), help="only the first so many questions of each task")
    add("--shots", type=whole(0, 1000), help="examples, instead of the task's own number")
    add("--batch_size", type=whole(1, 10**6), default=16, help="texts at a time (16)")
    add(
        "--run_code",
        action="store_true",
        help="allow mbpp and humaneval to run what the model has written, see extras/sandbox.py",
    )
    add(
        "--judge_url",
        metavar="URL",
        help=f"mt-bench: an address that speaks OpenAI's API; its key is read from {KEY}",
    )
    add("--judge_model", metavar="NAME", help="mt-bench: who judges there (the paper: gpt-4)")
    add(
        "--toxigen_judge",
        metavar="DIR",
        type=model_directory,
        help="toxigen_generation: the classifier, tomh/toxigen_roberta",
    )
    ours, rest = parser.parse_known_args()
    check(ours)

    # where no limit of new tokens is given it is the task's, not sample.py's default
    parsed = sample.parsed(rest)
    if parsed.question is not None:
        raise InputError(f"{parsed.question}: what is this? Names of tasks follow --tasks")
    for name in given(parsed, *NOT_OURS):
        raise InputError(f"--{name}: a benchmark decides that itself; leave it out")
    if parsed.draft:
        raise InputError("--draft: most benchmarks ask for no new tokens; leave it out")
    args = sample.arguments(rest)
    args.most = parsed.max_new_tokens
    refuse_part_of_model("out", ours.out, args.base, *args.value)
    return ours, args


def check(ours: argparse.Namespace) -> None:
    """Fills in the tasks. Raises InputError for options that cannot take effect."""
    if ours.suite and ours.tasks:
        raise InputError("--suite and --tasks do not go together; leave one out")
    ours.tasks = list(dict.fromkeys(ours.tasks or (PAPER if ours.suite else ())))
    if not ours.tasks:
        raise InputError("say what to measure: --suite paper, or --tasks and names")
    if ours.data and not Path(ours.data).is_dir():
        raise InputError(f"--data {ours.data}: is no folder")
    # a judge that fails comes last
    ours.tasks.sort(key=lambda name: name == MT_BENCH)

    judges = [("judge_url", MT_BENCH), ("judge_model", MT_BENCH), ("toxigen_judge", TOXIC)]
    for name, task in judges:
        if given(ours, name) and task not in ours.tasks:
            raise InputError(f"--{name} has no effect without {task}; leave it out")
    if bool(ours.judge_url) != bool(ours.judge_model):
        raise InputError("--judge_url and --judge_model go together: where the judge is, and who")
    if ours.judge_url:
        mt_bench.check_judge(ours.judge_url, os.environ.get(KEY))
    if ours.shots is not None and {*ours.tasks} <= {MT_BENCH, TOXIC}:
        raise InputError(f"--shots has no effect on {ours.tasks[0]}; leave it out")
    for name in ours.tasks:
        if name in BENCHMARKS and BENCHMARKS[name].runs_code and not ours.run_code:
            raise InputError(ALLOW.format(name))


ALLOW = "{}: runs what the model has written; allow it with --run_code, or name other --tasks"


# ---------------------------------------------------------------- one task after the other


class Examinee(Speaker):
    """The models that are asked; under torchrun rank 0 asks, and all ranks answer."""

    def likelihoods(
        self, questions: Sequence[Question], batch_size: int
    ) -> Iterator[dict[int, Likelihood]]:
        """See `log_likelihoods`."""
        # the recorded replies' caches take the memory of these
        self.rounds = self.pick_rounds()
        self.generate = self.decoder(self.base, self.values)
        yield from log_likelihoods(
            self.base,
            self.values,
            questions,
            batch_size,
            alphas=self.alphas,
            vocabulary=self.vocabulary,
            differing=self.differing,
        )


class Evaluation:
    """A pair, the tasks that it is asked, and the folder where the results lie."""

    def __init__(self, ours: argparse.Namespace, args: argparse.Namespace):
        self.ours = ours
        self.args = args
        self.out = Path(ours.out)
        self.data = Path(ours.data) if ours.data else None
        # were the models taught to answer? A value model was; a base alone if it has a template
        alone = not args.value
        self.chats = not alone or Tokenizer(args.base, args.template).has_template
        self.pair = pair_identity(args)
        self.files = fingerprint_of_files(self.data, self.out)

    def run(self) -> None:
        """Loads tasks and models, asks, and writes what comes of each task as it is known."""
        # what is there must be this pair's; the tasks before the models: what is missing is told
        answers = harness.Answers(self.out / "answers.jsonl", self.pair)
        left = [name for name in self.ours.tasks if self.results(name) is None]
        tasks = self.load_all(left)
        if self.ours.run_code and left == self.ours.tasks:
            if not any(harness.runs_code(tasks[name]) for name in left if name != MT_BENCH):
                raise InputError("--run_code has no effect on these tasks; leave it out")
        if torchrun():
            from extras.sharding import from_rank_0

            from_rank_0(bool(left))  # whether the other ranks are needed
        if left:
            self.ask_all(tasks, answers)
        for name in self.ours.tasks:
            if name not in left:
                tell(f"{name}: known already")
                self.print_scores(name)
        self.print_row()

    def ask_all(self, tasks: dict[str, object], answers: "harness.Answers") -> None:
        """Asks the models all tasks that are not known."""
        speaker = load_models(self.args)
        if torchrun():
            from extras.sharding import from_rank_0, lead

            lead(speaker, ("likelihoods", "whole_replies"))
        pair = harness.Pair(speaker, answers, self.ours.batch_size, self.args.most)
        for name, task in tasks.items():
            start = time.perf_counter()
            tell(name + ", as chats" * self.as_chats(name))
            if name == MT_BENCH:
                self.ask_mt_bench(speaker, task)
            else:
                self.ask(pair, name, task)
            self.print_scores(name)
            tell(f"  {time.perf_counter() - start:.0f} s")
        if torchrun():
            from_rank_0(None)

    # ------------------------------------------------------------ what is asked

    def as_chats(self, name: str) -> bool:
        """Whether a task's questions come as chats."""
        if name == MT_BENCH:
            return True
        benchmark = benchmark_of(name)
        return self.chats and benchmark is not None and benchmark.chat_task is not None

    def conditions(self, name: str) -> dict:
        """On what a task's results depend, besides the pair: noted with them."""
        ours = self.ours
        found = {"pair": self.pair, "data": self.files, "limit": ours.limit}
        found |= {"as chats": self.as_chats(name)}
        if name not in (MT_BENCH, TOXIC):
            found |= {"shots": ours.shots, "harness": harness.VERSION}
        if self.as_chats(name) or benchmark_of(name) is None:
            found |= {"max_new_tokens": self.args.most}
        if name == MT_BENCH and ours.judge_url:
            found |= {"judge": ours.judge_model}
        if name == TOXIC:
            found |= {"judge": ours.toxigen_judge}
        return found

    def load_all(self, names: Sequence[str]) -> dict[str, object]:
        """Tasks by name. Raises InputError, which says all that is missing."""
        tasks, problems = {}, []
        for name in names:
            try:
                tasks[name] = self.load(name)
            except InputError as problem:
                problems.append(str(problem))
        if problems:
            raise InputError(" -- ".join(problems))
        return tasks

    def load(self, name: str) -> dict | Path:
        """A task of the harness with its data; of MT-Bench the questions. Raises InputError."""
        if name == MT_BENCH:
            return self.find_mt_bench()
        if name == TOXIC:
            return harness.toxigen_task(self.data, self.ours.toxigen_judge, self.as_chats(name))
        benchmark = benchmark_of(name)
        task, shots = name, self.ours.shots
        if benchmark is not None:
            task = benchmark.chat_task if self.as_chats(name) else benchmark.task
            shots = benchmark.shots if shots is None else shots
        loaded = harness.load_task(task, shots, self.data)
        if harness.runs_code(loaded):
            if not self.ours.run_code:
                raise InputError(ALLOW.format(name))
            tell(f"{name}: {sandbox.isolation()}")
        if name == "humaneval" and not self.as_chats(name):
            tell(
                "humaneval: asked as plain text. Where a tokenizer drops a text's first space, as "
                "Llama-2's does, the harness loses the first line's indentation, and so does this"
            )
        return loaded

    def find_mt_bench(self) -> Path:
        """Its questions. Raises InputError if they are missing, or what a judge needs is."""
        if self.data is None:
            raise InputError(f"{MT_BENCH}: its files must lie in a folder; give --data")
        if self.ours.judge_url:
            mt_bench.find(self.data, "prompts")
            mt_bench.find(self.data, "references")
        return mt_bench.find(self.data, "questions")

    # ------------------------------------------------------------ asking

    def ask(self, pair: "harness.Pair", name: str, task: dict) -> None:
        """Answers a task of the harness, and writes its results."""
        cut = pair.cut
        results = harness.evaluate_task(
            pair, task, self.ours.limit, self.as_chats(name), self.ours.run_code
        )
        results["cut"] = {"texts": pair.cut - cut, "context": pair.speaker.context}
        samples = results.pop("samples")
        lines = [harness.as_json(row) + "\n" for rows in samples.values() for row in rows]
        write_text(self.out / f"samples_{name}.jsonl", "".join(lines))
        self.write(name, results)

    def ask_mt_bench(self, speaker: Examinee, questions: Path) -> None:
        """Answers MT-Bench; a judge rates the answers, if there is one."""
        ours = self.ours
        most = self.args.most or mt_bench.MOST
        file = mt_bench.answers(
            speaker, questions, ours.out, ours.batch_size, ours.limit, max_new_tokens=most
        )
        results: dict = {"answers": str(file), "scores": {}}
        if ours.judge_url:
            judge = ours.judge_url, ours.judge_model, os.environ.get(KEY)
            results["scores"] = mt_bench.judge(file, questions, ours.out, *judge, ours.limit)
        self.write(MT_BENCH, results)

    # ------------------------------------------------------------ results

    def write(self, name: str, results: dict) -> None:
        results["conditions"] = self.conditions(name)
        text = harness.as_json(results, indent=2) + "\n"
        write_text(self.out / f"results_{name}.json", text)
        limits = [noted["conditions"]["limit"] for noted in map(self.noted, PAPER) if noted]
        limit = min((n for n in limits if n is not None), default=None)
        row = self.row() | ({"limit": limit} if limit else {})
        write_text(self.out / "row.json", json.dumps(row, indent=2) + "\n")

    def noted(self, name: str) -> dict | None:
        """A task's results in OUT, of this pair, of whatever other conditions."""
        file = self.out / f"results_{name}.json"
        if not file.exists():
            return None
        results = read_json(file, TABLE)
        told = results.get("scores" if name == MT_BENCH else "results")
        if results.get("conditions") not in TABLE or told not in TABLE:
            raise InputError(f"{file}: is none of ours, or damaged; remove it")
        return results if results["conditions"].get("pair") == self.pair else None

    def results(self, name: str) -> dict | None:
        """A task's results, if they are of what is asked now; who has judged already need not be
        named again.
        """
        results = self.noted(name)
        if results is None or not self.conditions(name).items() <= results["conditions"].items():
            return None
        return results

    def print_scores(self, name: str) -> None:
        results = self.results(name)
        if name == MT_BENCH:
            print(f"  answers: {results['answers']}")
            scores = results["scores"]
            if not scores:
                print("  not judged, since there is no --judge_url", flush=True)
                return
            means = {key: scores[key] for key in ("MT-Bench", "turn 1", "turn 2")}
            for key, mean in (means | scores["by category"]).items():
                print(f"  {key} " + ("not rated" if mean is None else f"{mean:.2f}"), flush=True)
            return
        for line in harness.lines(results):
            print(f"  {line}", flush=True)
        if results["cut"]["texts"]:
            print(
                f"  texts longer than the context of {results['cut']['context']} tokens, which "
                f"lost their beginning: {results['cut']['texts']}",
                flush=True,
            )

    def row(self) -> dict[str, float | None]:
        """The scores in OUT, by the paper's columns; None: answered, not judged."""
        row = {}
        for name in PAPER:
            results, benchmark = self.noted(name), benchmark_of(name)
            if results is None:
                continue
            if name == MT_BENCH:
                row["MT-Bench"] = results["scores"].get("MT-Bench")
                continue
            metric = benchmark.metric
            if results["conditions"]["as chats"]:
                metric = benchmark.chat_metric or metric
            row[benchmark.column] = 100 * harness.score(results, metric)
        return row

    def print_row(self) -> None:
        """The scores as a row of the paper's Table 1, beside its own for models of this size."""
        ours = self.row()
        if not ours:
            return
        args = self.args
        rows = {"this pair" if args.value else "this model": ours}
        sizes = [parameters(args.base)]
        sizes += [parameters(directory) for directory in args.value[:1]]
        if self.chats and None not in sizes:
            found = beside(*sizes, proxy=len(args.value) > 1)
            rows |= {f"paper: {name}": row for name, row in found.items()}

        width = max(map(len, rows))
        print("\n" + " " * width + "".join(f"{name:>11}" for name in COLUMNS))
        for name, row in rows.items():
            cells = [row.get(column) for column in COLUMNS]
            shown = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
            print(f"{name:<{width}}" + "".join(f"{cell:>11}" for cell in shown))
        for note in self.notes():
            print(f"({note})")

    def notes(self) -> Iterator[str]:
        """In what the row is not the paper's."""
        yield "prompts and metrics are the harness's, see extras/benchmarks.py"
        changed = [f"--map {self.args.map}"] if self.args.map else []
        if self.args.alpha not in ([], [1], [1, -1]):
            changed.append(f"--alpha {strengths(self.args)}")
        if changed:
            yield "with " + ", ".join(changed)
        for name in PAPER:
            results = self.noted(name)
            if results is None:
                continue
            found = results["conditions"]
            words = [
                f"{key} {found[key]}"
                for key in ("limit", "shots", "max_new_tokens", "judge")
                if found.get(key) is not None
            ]
            if results.get("cut", {}).get("texts"):
                words.append(f"texts that lost their beginning {results['cut']['texts']}")
            if words:
                yield f"{name}: {', '.join(words)}"


# ---------------------------------------------------------------- what is asked, and who


def benchmark_of(name: str) -> Benchmark | None:
    """The paper's way to ask a task; a subject of MMLU is asked likewise, and has no column."""
    if name in harness.subjects():
        return BENCHMARKS["mmlu"]._replace(task=name, column="")
    return BENCHMARKS.get(name)


def load_models(args: argparse.Namespace) -> Examinee:
    tell("loading " + " and ".join(map(str, [args.base, *args.value])))
    if args.map:
        tell("(through the map: log-likelihoods are of the value model's tokens)")
    return Examinee(args, all_logits=True)


def strengths(args: argparse.Namespace) -> str:
    """The value models' α as the command line has them."""
    return " ".join(f"{alpha:g}" for alpha in args.alpha)


def pair_identity(args: argparse.Namespace) -> dict[str, str]:
    """On what answers depend, besides the question."""
    tokenizer = Tokenizer((args.value or [args.base])[0], args.template)
    identity = {
        "--alpha": strengths(args),
        "--dtype": str(pick_dtype(args.dtype, pick_device(args.device))),
        "--template": hashlib.sha256(tokenizer.template.encode()).hexdigest(),
    }
    if args.base_dtype:
        identity["--base_dtype"] = args.base_dtype
    for i, directory in enumerate([args.base, *args.value]):
        source = hashlib.sha256(Tokenizer(directory).source.encode()).hexdigest()
        identity[f"--value {i}" if i else "--base"] = fingerprint(directory) + source
    if args.map:
        identity["--map"] = hashlib.sha256(Path(args.map).read_bytes()).hexdigest()
    return identity


def fingerprint_of_files(folder: Path | None, out: Path) -> str | None:
    """What changes when a file of a folder does, but for those in `out`: names, sizes and times."""
    if folder is None:
        return None
    told = []
    for file in sorted(folder.rglob("*")):
        if file.is_file() and out.resolve() not in file.resolve().parents:
            stat = file.stat()
            told.append((str(file.relative_to(folder)), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(told).encode()).hexdigest()


def parameters(directory: str | Path) -> int | None:
    """How many numbers a Llama has, by its config; None: it is none."""
    if recorded_connection(directory) == "probe":
        return None
    with torch.device("meta"):
        return Llama(read_config(directory)).size()


def tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    ours, args = arguments()
    if harness is None:
        raise InputError(f"{MISSING} is missing; pip install -r requirements-evaluate.txt")
    if not main_process():
        from extras.sharding import follow, from_rank_0

        # rank 0 asks; here is a slice of the models, which answers with the others
        if from_rank_0(None):
            follow(load_models(args))
        return
    with own_folder(ours.out, MARKS):
        Evaluation(ours, args).run()


if __name__ == "__main__":
    command(main)
