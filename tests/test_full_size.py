"""The scripts of full_size.py: what they run, with stand-ins for the programs, and their tables."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, make_directory

import sample
import train
import vocab_map
from experiments import costs, full_size, plan, reproduce
from extras.benchmarks import COLUMNS, paper_costs, paper_rows
from model import Llama
from plumbing.files import Parser
from plumbing.pair import Speaker

NAMES = [*full_size.TABLES]
# what the miniature calls the paper's models
MINIATURE = {
    full_size.TINY: "small",
    full_size.SEVEN: "medium",
    full_size.THIRTEEN: "large",
    full_size.SEVENTY: "xlarge",
    full_size.CODE: "continued",
    full_size.THREE: "other",
    "Full": "full",
    "1.1B": "small",
    "1.1B norm": "small norm",
    "1.1B infinity": "small skill",
    "1.1B curriculum": "curriculum",
    "7B": "medium",
    "7B norm": "medium norm",
    "random 7B": "random",
    "Llama-3.2-1B": "same vocabulary",
}


def lines_of(*names: str, seeds: int = 1, out: Path = Path("o")) -> list[list[str]]:
    """The commands of a script, in words, without what the shell puts before them."""
    lines = [shlex.split(line, comments=True) for line in full_size.commands(names, seeds, out)]
    found = []
    for line in filter(None, lines):
        if line[0] == "once":
            line = line[2:]
        elif line[0] in ("train", "chat", "all"):
            line = line[1:]
        found.append(line)
    return found


def only(lines: list[list[str]], *words: str) -> list[list[str]]:
    return [line for line in lines if set(words) <= set(line)]


def out_of(line: list[str]) -> str:
    return line[line.index("--out") + 1]


# ---------------------------------------------------------------- what is trained and asked


def test_the_tables_are_those_of_the_miniature():
    """But for rows that are ours: other maps, the expert by itself, what proxy tuning costs."""
    for name, of_table in full_size.TABLES.items():
        named = [tuple(MINIATURE.get(word, word) for word in row) for row in of_table[1]]
        rows = reproduce.COSTS if name == "table3" else reproduce.TABLES[name][1]
        ours = {
            "table3": [("medium", "proxy")],
            "table4": [("small", system) for system in ("alone", "small", "expert")],
            "figure4": [
                ("other", "small skill"),
                *(row for row in rows if row[1].endswith(reproduce.BY_BYTES)),
            ],
        }
        assert named == [row for row in rows if row not in ours.get(name, ())], name


def test_all_that_the_paper_reports_is_measured():
    reported = {
        (base, full_size.title_of(system))
        for name in ("table1", "table2", "table4")
        for base, system in full_size.TABLES[name][1]
        if system != "alone"
    }
    assert {(full_size.BASES[base], system) for base, system in reported} == set(paper_rows())
    costs = {(full_size.BASES[base], system) for base, system in full_size.TABLES["table3"][1]}
    assert costs == set(paper_costs())
    columns = {name: full_size.TABLES[name][0] for name in NAMES}
    assert columns["table1"] == columns["table2"] == COLUMNS
    assert set(columns["table4"]) == paper_rows()["Llama-2-7B", "1.1B - 1.1B, proxy tuning"].keys()
    assert columns["figure2"] == columns["figure3"] == columns["figure4"] == ("MT-Bench",)


def test_trainings_have_table_5():
    """Learning rate, chats per step, epochs, length: train.py's defaults. λ: the script says it."""
    lines = only(lines_of(*NAMES), "train.py")
    assert len(lines) == len(full_size.RECIPES)
    for name, recipe in full_size.RECIPES.items():
        with torch.device("meta"):
            model = Llama(plan.SHAPES[recipe.start])
        settings = train.table_5(model, [plan.SHAPES[base] for base in recipe.beside])
        small = recipe.start in (full_size.TINY, full_size.THREE_SMALL)
        assert (settings.lr, settings.batch_size) == ((1e-4, 32) if small else (1e-5, 16))
        tiny = full_size.TINY in (recipe.start, *recipe.beside)
        assert settings.epochs == 3 and settings.max_length == (2048 if tiny else 4096)

        (line,) = [line for line in lines if out_of(line) == f"o/seed0/{name.replace(' ', '-')}"]
        assert not {"--lr", "--batch_size", "--epochs", "--max_length"} & set(line)
        if name.endswith("full"):
            assert "--full" in line and "--lam" not in line and "--value" not in line
        else:
            lam = line[line.index("--lam") + 1]
            assert float(lam) == (1.0 if name.endswith("norm") else 0.0), name


def test_commands_in_full():
    lines = lines_of(*NAMES, seeds=2)

    def line_to(out: str) -> str:
        (line,) = [line for line in lines if out_of(line) == out]
        return " ".join(line)

    assert line_to("o/seed1/1.1B-curriculum") == (
        "python train.py --base o/family/tinyllama-1.1b o/family/llama-2-7b o/family/llama-2-13b "
        "--connection residual --lam 0.0 --value o/family/tinyllama-1.1b "
        "--data o/family/sharegpt --seed 1 --micro_batch_size 4 --out o/seed1/1.1B-curriculum"
    )
    assert line_to("o/seed0/1.1B-infinity").startswith(
        "python train.py --base o/family/tinyllama-1.1b --connection residual --lam 0.0 "
        "--value o/family/tinyllama-1.1b --data o/family/infinity"
    )
    assert line_to("o/scores/seed0/7B-norm/llama-2-70b") == (
        "torchrun --nproc_per_node 4 -m extras.evaluate --base o/family/llama-2-70b "
        "--value o/seed0/7B-norm --data o/family/benchmarks "
        "--out o/scores/seed0/7B-norm/llama-2-70b "
        "--tasks mt-bench ifeval gsm8k arc_challenge hellaswag mmlu truthfulqa_mc2 winogrande"
    )
    assert line_to("o/scores/seed1/Full/codellama-7b") == (
        "python -m extras.evaluate --base o/seed1/codellama-7b-full --value none "
        "--data o/family/benchmarks --out o/scores/seed1/Full/codellama-7b "
        "--tasks mt-bench ifeval gsm8k arc_challenge hellaswag mmlu truthfulqa_mc2 winogrande"
    )
    assert line_to("o/scores/seed0/proxy/llama-2-7b") == (
        "python -m extras.evaluate --base o/family/llama-2-7b "
        "--value o/seed0/tinyllama-1.1b-full o/family/tinyllama-1.1b --alpha 1 -1 "
        "--data o/family/benchmarks --out o/scores/seed0/proxy/llama-2-7b "
        "--tasks mt-bench arc_challenge hellaswag mmlu truthfulqa_mc2 winogrande"
    )
    assert line_to("o/scores/seed0/1.1B-norm/llama-3-8b") == (
        "python -m extras.evaluate --base o/family/llama-3-8b --value o/seed0/1.1B-norm "
        "--map o/family/map.safetensors --data o/family/benchmarks "
        "--out o/scores/seed0/1.1B-norm/llama-3-8b --tasks mt-bench"
    )
    assert line_to("o/scores/alone/llama-2-13b") == (
        "python -m extras.evaluate --base o/family/llama-2-13b --value none "
        "--data o/family/benchmarks --out o/scores/alone/llama-2-13b "
        "--tasks arc_challenge hellaswag mmlu truthfulqa_mc2 winogrande"
    )
    assert line_to("o/costs/llama-2-70b+1.1B.json") == (
        "torchrun --nproc_per_node 4 experiments/costs.py --base o/family/llama-2-70b "
        "--value o/family/tinyllama-1.1b --out o/costs/llama-2-70b+1.1B.json"
    )


def test_every_row_is_asked_once_for_each_seed():
    lines = lines_of(*NAMES, seeds=2)
    asked = [out_of(line) for line in only(lines, "extras.evaluate")]
    rows = {row for name in NAMES if name != "table3" for row in full_size.TABLES[name][1]}
    alone = {row for row in rows if row[1] == "alone"}
    assert len(asked) == len({*asked}) == 2 * len(rows - alone) + len(alone)
    maps = {line[line.index("--value") + 1] for line in only(lines, "--map")}
    values = ("1.1B", "1.1B-norm", "1.1B-curriculum")
    assert maps == {f"o/seed{seed}/{value}" for seed in (0, 1) for value in values}
    assert len(only(lines, "--alpha")) == 2


def test_what_is_too_large_for_a_gpu_has_several_or_comes_last():
    lines = lines_of(*NAMES, seeds=2)
    for line in lines:
        whole_70b = "o/family/llama-2-70b" in line or "llama-2-70b-full" in out_of(line)
        asks_70b = out_of(line).endswith("/llama-2-70b") or "costs/llama-2-70b" in out_of(line)
        assert asks_70b <= (line[:3] == ["torchrun", "--nproc_per_node", "4"]), line
        assert (line[0] == "python") <= (not whole_70b), line
        if line[0] == "torchrun" and "train.py" in line:  # train.py refuses these
            assert "--random" not in line and line[line.index("--base")] == "--base"
            if "--connection" in line:
                assert line[line.index("--connection") + 1] == "residual"

    # memory by plan.py; a 7B that learns needs four GPUs of 80 GB, and fits
    trained = only(lines, "train.py")
    seven = [line for line in trained if out_of(line) == "o/seed0/7B"][0]
    assert seven[:3] == ["torchrun", "--nproc_per_node", "4"] and "--checkpointing" in seven
    large = ["random-7B", "llama-2-70b-full"]
    assert [out_of(line) for line in trained[-4:]] == [
        f"o/seed{seed}/{name}" for seed in (0, 1) for name in large
    ]
    head = "\n".join(full_size.script("all", NAMES, 1, Path("o")))
    assert "training of random 7B: 1 × 105 GiB" in head
    assert "training of llama-2-70b full: 8 × 152 GiB" in head


# ---------------------------------------------------------------- the programs take the commands


def evaluate_parser() -> argparse.ArgumentParser:
    """The command line of extras/evaluate.py."""
    parser = Parser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--value", nargs="+", required=True)
    parser.add_argument("--alpha", nargs="+", type=float)
    parser.add_argument("--map")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=["paper"])
    what.add_argument("--tasks", nargs="+", choices=full_size.TASKS.values())
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--run_code", action="store_true")
    parser.add_argument("--judge_url")
    parser.add_argument("--judge_model")
    parser.add_argument("--toxigen_judge")
    return parser


def parser_of(script) -> argparse.ArgumentParser:
    parsers = []

    class Stop(Exception):
        pass

    def stop(parser, *_, **__):
        parsers.append(parser)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(Parser, "parse_args", stop)
        with pytest.raises(Stop):
            getattr(script, "arguments", script.main)()
    return parsers[0]


def test_evaluate_accepts_its_commands(monkeypatch, base_dir, value_dir, tmp_path):
    evaluate = pytest.importorskip("extras.evaluate")
    models = {"--base": base_dir, "--value": value_dir}
    added = ["mbpp", "humaneval", "toxigen_generation", "--run_code"]
    added += ["--toxigen_judge", str(base_dir), "--judge_url", "http://j", "--judge_model", "m"]
    (tmp_path / "family" / "benchmarks").mkdir(parents=True)
    for line in only(lines_of(*NAMES, out=tmp_path), "extras.evaluate"):
        words = line[line.index("extras.evaluate") :]
        for option in models.keys() & set(words):
            at = words.index(option) + 1
            while not words[at].startswith("--"):
                if words[at] != "none":
                    words[at] = str(models[option])
                at += 1
        monkeypatch.setattr(sys, "argv", words + added * ("ifeval" in words))
        evaluate.arguments()


@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_the_programs_accept_their_commands(name, tmp_path):
    names = NAMES if name == "all" else [name]
    lines = lines_of(*names, seeds=2, out=tmp_path)
    parsers = {
        "train.py": parser_of(train),
        "vocab_map.py": parser_of(vocab_map),
        "experiments/costs.py": parser_of(costs),
        "extras.evaluate": evaluate_parser(),
    }
    for folder in (*full_size.BASES, *full_size.DATA):
        (tmp_path / "family" / folder).mkdir(parents=True)
    for line in lines:
        (program,) = set(line) & parsers.keys()
        args = parsers[program].parse_args(line[line.index(program) + 1 :])
        if program == "train.py":
            train.check(args)
            Path(args.out).mkdir(parents=True)  # models that are made are there later
        if program == "extras.evaluate":
            models = [args.base, *args.value]
            assert all(Path(model).is_dir() for model in models if model != "none")


# ---------------------------------------------------------------- the script runs

# stands for python and torchrun: notes what it is asked for, and leaves behind what is looked for
STAND_IN = """#!{python}
import json, os, sys
from pathlib import Path

words = [Path(sys.argv[0]).name, *sys.argv[1:]]
with open("{log}", "a") as log:
    log.write(json.dumps(words) + "\\n")
if "--fill" in words:
    os.chdir("{root}")
    os.execv(sys.executable, [sys.executable, *words[1:]])
if os.environ.get("FAILS", "nothing") in words:
    sys.exit(1)
if {real} and "extras.evaluate" not in words:
    start = [sys.executable]
    if words[0] == "torchrun":
        start += ["-m", "torch.distributed.run"]
    os.execv(sys.executable, [*start, *words[1:]])
out = Path(words[words.index("--out") + 1])
out.parent.mkdir(parents=True, exist_ok=True)
if "train.py" in words:
    out.mkdir()
    (out / "README.md").touch()
elif "experiments/costs.py" in words:
    row = {{f"{{unit}} {{n}}": n / 100 for unit in ("seconds", "GB") for n in (128, 512, 1024)}}
    out.write_text(json.dumps(row | {{"machine": "a stand-in"}}))
elif "vocab_map.py" in words:
    out.touch()
else:
    needs = {{
        "MT-Bench": "--judge_url",
        "Toxigen↓": "--toxigen_judge",
        "MBPP": "--run_code",
        "HumanEval": "--run_code",
    }}
    row = {{}}
    for i, (column, task) in enumerate({tasks}.items()):
        if task in words:
            row[column] = i + 1 if needs.get(column, "--base") in words else None
    out.mkdir(exist_ok=True)
    (out / "row.json").write_text(json.dumps(row))
"""


class Bench:
    """A folder with all that a script expects, and stand-ins for the programs."""

    def __init__(self, folder: Path, real: bool = False):
        self.out = folder / "it's here"
        self.log = folder / "log"
        self.bin = folder / "bin"
        self.bin.mkdir()
        text = STAND_IN.format(
            python=sys.executable, log=self.log, root=ROOT, tasks=full_size.TASKS, real=real
        )
        for program in ("python", "torchrun"):
            (self.bin / program).write_text(text)
            (self.bin / program).chmod(0o755)

    def lay_out(self, script: list[str]) -> None:
        for path in expected(script):
            path.mkdir(parents=True, exist_ok=True)

    def run(self, script: list[str], **variables: str) -> subprocess.CompletedProcess:
        path = f"{self.bin}:/usr/bin:/bin"
        return subprocess.run(
            ["bash"],
            input="\n".join(script),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PATH": path, **variables},
        )

    def asked(self) -> list[list[str]]:
        """What the programs were asked for since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def table_of(text: str) -> list[list[str]]:
    """The cells of a table that was printed."""
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def place_of(rows: list[list[str]], base: str, system: str) -> int:
    return [row[:2] for row in rows].index([base, system])


def expected(script: list[str]) -> list[Path]:
    """What the head of a script says that it reads."""
    said = [line.removeprefix("#     ") for line in script if line.startswith("#     ")]
    return [Path(line.split(": ")[0]) for line in said if "/family/" in line]


@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_a_script_is_bash_and_says_what_it_reads(name):
    names = NAMES if name == "all" else [name]
    script = [*full_size.script(name, names, 2, Path("o"))]
    result = subprocess.run(["bash", "-n"], input="\n".join(script), text=True, capture_output=True)
    assert result.returncode == 0 and not result.stderr
    words = {word for line in lines_of(*names, seeds=2) for word in line if "/family/" in word}
    assert {str(path) for path in expected(script)} == words - {"o/family/map.safetensors"}
    assert "#" not in "".join(line[0] for line in lines_of(*names))


def test_a_script_ends_in_the_table(bench):
    script = [*full_size.script("table1", ["table1"], 2, bench.out)]
    bench.lay_out(script)
    judge = bench.out / "toxic or not"
    judge.mkdir()
    given = dict(JUDGE_URL="http://j", JUDGE_MODEL="m 1", RUN_CODE="yes", TOXIGEN_JUDGE=str(judge))
    result = bench.run(script, **given)
    assert result.returncode == 0 and not result.stderr, result

    # all commands as they are, with what was given
    asked = bench.asked()
    more = ["mbpp", "humaneval", "toxigen_generation", "--run_code", "--toxigen_judge", str(judge)]
    more += ["--judge_url", "http://j", "--judge_model", "m 1"]
    evaluate_parser().parse_args(asked[-2][asked[-2].index("extras.evaluate") + 1 :])
    lines = lines_of("table1", seeds=2, out=bench.out)
    assert asked[:-1] == [line + more * ("mt-bench" in line) for line in lines]

    # ours, below it the paper's
    rows = table_of(result.stdout)
    assert rows[0] == ["base", "system", "", *COLUMNS]
    at = place_of(rows, "Llama-2-7B", "1.1B norm")
    assert rows[at][2:] == ["ours", *(f"{n} ({n} to {n})" for n in range(1, 12))]
    paper = "4.55 15.3 5.61 62.8 20.4 15.4 48.5 57.9 44.2 31.8 72.5"
    assert rows[at + 1] == ["", "", "paper", *paper.split()]
    alone = place_of(rows, "Llama-2-7B", "alone")
    assert rows[alone][3:] == ["-"] * 6 + ["7", "8", "9", "10", "11"]
    assert rows[alone + 1][2] == "ours"
    assert sum(row[2] == "paper" for row in rows) == 3 + 4 * 6

    # the same in the files
    assert (bench.out / "table1.md").read_text().strip() in result.stdout
    written = json.loads((bench.out / "table1.json").read_text())
    (row,) = [row for row in written if (row["base"], row["system"]) == ("Llama-2-7B", "1.1B")]
    cell = {"seeds": [1, 1], "paper": 4.62, "mean": 1.0, "least": 1, "most": 1}
    assert row["MT-Bench"] == cell


def test_what_is_not_given_stays_empty_and_can_be_given_later(bench):
    script = [*full_size.script("table2", ["table2"], 1, bench.out)]
    bench.lay_out(script)
    result = bench.run(script)
    assert result.returncode == 0 and not result.stderr, result
    assert not any(
        word.startswith(("--judge", "--tox", "--run")) for line in bench.asked() for word in line
    )
    rows = table_of(result.stdout)
    row = rows[place_of(rows, "Llama-2-70B", "1.1B curriculum")]
    assert row[3:] == ["-", "2", "3", "-", "-", "-", "7", "8", "9", "10", "11"]
    for needed in ("give the script JUDGE_URL", "RUN_CODE=yes", "TOXIGEN_JUDGE"):
        assert needed in result.stdout

    # nothing is trained again, all is evaluated again
    result = bench.run(script, JUDGE_URL="http://j", JUDGE_MODEL="m")
    asked = bench.asked()
    assert not only(asked, "train.py") and len(only(asked, "--judge_url")) == 3
    assert "JUDGE_URL" not in result.stdout and "RUN_CODE" in result.stdout


def test_table_3_is_measured_and_filled(bench):
    script = [*full_size.script("table3", ["table3"], 1, bench.out)]
    bench.lay_out(script)
    result = bench.run(script)
    assert result.returncode == 0 and not result.stderr, result
    assert bench.asked()[:-1] == lines_of("table3", out=bench.out)
    rows = table_of(result.stdout)
    at = place_of(rows, "Llama-2-70B", "1.1B")
    assert rows[0][3:] == [f"{unit} {n}" for n in (128, 512, 1024) for unit in ("seconds", "GB")]
    assert rows[at][2:] == ["ours", "1.28", "1.28", "5.12", "5.12", "10.24", "10.24"]
    assert rows[at + 1][2:] == ["paper", "16.12", "33.08", "33.07", "33.31", "75.37", "33.78"]
    assert "Measured on a stand-in; the paper's on H800s" in result.stdout

    # what is measured is not measured again
    (bench.out / "costs" / "llama-2-7b+1.1B.json").unlink()
    assert bench.run(script).stdout == result.stdout
    assert [out_of(line) for line in bench.asked()[:-1]] == [
        str(bench.out / "costs/llama-2-7b+1.1B.json")
    ]


def test_figures_have_ours_only(bench):
    script = [*full_size.script("figure4", ["figure4"], 1, bench.out)]
    bench.lay_out(script)
    result = bench.run(script, JUDGE_URL="http://j", JUDGE_MODEL="m")
    assert result.returncode == 0 and not result.stderr, result
    assert result.stdout.count("| ours |") == 5 and "| paper |" not in result.stdout
    assert "in a picture" in result.stdout
    asked = bench.asked()
    assert asked[0][1] == "vocab_map.py" and len(only(asked, "--map")) == 3
    bench.run(script)
    assert not only(bench.asked(), "vocab_map.py")


def test_nothing_begins_before_all_is_there(bench):
    script = [*full_size.script("all", NAMES, 1, bench.out)]
    needed = expected(script)
    assert len(needed) == len(full_size.BASES) + len(full_size.DATA)
    for path in needed:
        result = bench.run(script)
        assert_refused(result, f"{path} is not there")
        path.mkdir(parents=True)
    for given, words in (
        ({"JUDGE_URL": "http://j"}, "without JUDGE_MODEL"),
        ({"RUN_CODE": "1"}, "RUN_CODE is 1; it must be yes"),
        ({"TOXIGEN_JUDGE": "nowhere"}, "TOXIGEN_JUDGE is nowhere"),
    ):
        assert_refused(bench.run(script, **given), words)
    (bench.bin / "torchrun").unlink()
    assert_refused(bench.run(script), "there is no torchrun")
    assert not bench.asked()


def test_a_command_that_fails_is_the_last_and_what_was_stopped_goes_on(bench):
    script = [*full_size.script("figure3", ["figure3"], 1, bench.out)]
    bench.lay_out(script)
    second = str(bench.out / "seed0" / "cascade")
    result = bench.run(script, FAILS=second)
    assert result.returncode == 1 and not result.stdout, result
    asked = bench.asked()
    assert out_of(asked[-1]) == second and "--resume" not in asked[-1]

    # it has left a checkpoint
    (bench.out / "seed0" / "cascade").mkdir()
    (bench.out / "seed0" / "cascade" / "checkpoint.safetensors").touch()
    bench.run(script, FAILS=second)
    asked = bench.asked()
    assert only(asked, "train.py") == [asked[-1]] and asked[-1][-1] == "--resume"


# ---------------------------------------------------------------- the table


def note(out: Path, place: str, row: dict) -> None:
    (out / "scores" / place).mkdir(parents=True)
    (out / "scores" / place / "row.json").write_text(json.dumps(row))


def test_a_table_has_mean_and_spread_of_what_there_is(run, tmp_path):
    note(tmp_path, "seed0/1.1B/llama-2-7b", {"MT-Bench": 4.5, "ARC": None})
    note(tmp_path, "seed1/1.1B/llama-2-7b", {"MT-Bench": 4.75})
    note(tmp_path, "seed0/1.1B/llama-2-13b", {"MT-Bench": 9})  # of another table
    result = run("experiments/reproduce.py", "table4", "--fill", "--out", tmp_path)
    assert result.returncode == 0 and not result.stderr
    rows = table_of(result.stdout)
    at = place_of(rows, "Llama-2-7B", "1.1B")
    assert rows[at][2:5] == ["ours", "4.62 (4.5 to 4.75)", "-"]
    assert rows[at + 1][2:5] == ["paper", "4.62", "42.7"]
    assert rows[at + 3][2:5] == ["paper", "4.65", "40"]
    assert "mean (smallest to largest)" in result.stdout

    # of several tables those that there are
    result = run("experiments/reproduce.py", "all", "--fill", "--out", tmp_path)
    assert result.returncode == 0 and "# table4" in result.stdout
    (line,) = [
        line for line in result.stdout.splitlines() if line.startswith("nothing is measured")
    ]
    assert line == "nothing is measured yet of figure2, figure4, table2, table3"


def test_what_cannot_be_filled_is_refused(run, tmp_path):
    for name in (*NAMES, "all"):
        result = run("experiments/reproduce.py", name, "--fill", "--out", tmp_path)
        assert_refused(result, "is measured there yet", "--commands")
    assert not any(tmp_path.iterdir())
    note(tmp_path, "seed0/1.1B/llama-2-7b", {"MT-Bench": None})  # nothing either
    result = run("experiments/reproduce.py", "table4", "--fill", "--out", tmp_path)
    assert_refused(result, "is measured there yet")
    note(tmp_path, "seed1/1.1B/llama-2-7b", {"MT-Bench": "good"})
    result = run("experiments/reproduce.py", "table4", "--fill", "--out", tmp_path)
    assert_refused(result, "row.json", "MT-Bench = 'good'")


def test_options_without_effect_are_refused(run, tmp_path):
    for option in (("--scale", 2), ("--device", "cpu")):
        for way in ("--commands", "--fill"):
            result = run("experiments/reproduce.py", "figure3", way, *option)
            assert_refused(result, f"{option[0]} has no effect with {way}")
    result = run("experiments/reproduce.py", "figure3", "--fill", "--seeds", 2)
    assert_refused(result, "--seeds has no effect with --fill")
    assert_refused(
        run("experiments/reproduce.py", "figure3", "--fill", "--commands"), "not allowed"
    )
    for way in ("--commands", "--fill"):
        assert_refused(run("experiments/reproduce.py", "findings", way), "trains nothing")
        assert_refused(run("experiments/reproduce.py", "norm", way), "of the miniature only")
    result = run("experiments/reproduce.py", "table2", "--commands", "--out", tmp_path)
    expected = full_size.script("table2", ["table2"], 1, tmp_path)
    assert result.stdout.splitlines() == "\n".join(expected).splitlines()


# ---------------------------------------------------------------- costs.py


def test_costs_of_exactly_so_many_tokens(run, monkeypatch, value_dir, tmp_path):
    """Of a model that says nothing but its end."""
    base = make_directory(tmp_path / "base", seed=1)
    settings = {"bos_token": "<s>", "eos_token": "<unk>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    speaker = Speaker(sample.arguments(["--base", str(base), "--value", "none"]))
    for weight in speaker.base.parameters():
        weight.data.zero_()
    assert len([*speaker.replies([[1, 2]])]) == 1  # as sample.py has it
    steps = []

    def counted(prompts, tokens):
        for ids in generate(prompts, tokens):
            steps.append(ids[0])
            yield ids

    generate, speaker.generate = speaker.generate, counted
    seconds, _ = costs.measure(speaker, 20, 3)
    assert len(seconds) == 3 and steps == [0] * 20 * 4

    # the whole program; GB as in the paper
    monkeypatch.setattr(costs, "peak_memory", lambda device: 3 * 2**30 / 1e9)
    args = ("--base", base, "--value", value_dir, "--tokens", 9, 5, "--device", "cpu")
    result = run("experiments/costs.py", *args, "--out", tmp_path / "row.json")
    assert result.returncode == 0, result.stderr
    row = json.loads((tmp_path / "row.json").read_text())
    assert row.keys() == {"machine", "seconds 5", "GB 5", "seconds 9", "GB 9"}
    assert row["GB 5"] == pytest.approx(3) and row["seconds 9"] > 0
    result = run("experiments/costs.py", *args[:5], 300, "--out", tmp_path / "other.json")
    assert_refused(result, "--tokens 300", "256 tokens is full")
    assert not (tmp_path / "other.json").exists()


@pytest.mark.slow
def test_scripts_run_with_the_real_programs(monkeypatch, tmp_path):
    """All but the evaluation, with small models under the large ones' names; of table 3 two rows,
    on one process and on four.
    """
    columns, rows = full_size.TABLES["table3"]
    monkeypatch.setitem(full_size.TABLES, "table3", (columns, [rows[0], rows[-1]]))
    bench = Bench(tmp_path, real=True)
    names = ["figure4", "table3", "table4"]
    script = [*full_size.script("all", names, 1, bench.out)]
    for path in expected(script):
        if path.name in full_size.BASES:
            other = path.name in (full_size.THREE, full_size.THREE_SMALL)
            make_directory(path, seed=1, bytelevel=other, max_position_embeddings=2048)
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Where is the cat {i}?"},
                {"role": "assistant", "content": "On the mat." * (1 + i % 3)},
            ]
        }
        for i in range(24)
    ]
    family = bench.out / "family"
    for folder in ("sharegpt", "benchmarks"):
        (family / folder).mkdir()
    (family / "sharegpt" / "chats.json").write_text(json.dumps(chats))
    texts = ["The cat sat on the mat, and the dog is in the garden."] * 20
    (family / "documents.json").write_text(json.dumps(texts))
    result = bench.run(script, JUDGE_URL="http://j", JUDGE_MODEL="m")
    assert result.returncode == 0, result.stderr
    assert "| 4.65 " in result.stdout
    for name in names:
        filled = json.loads((bench.out / f"{name}.json").read_text())
        rows = table_of((bench.out / f"{name}.md").read_text())
        for base, system in full_size.TABLES[name][1]:
            row = rows[place_of(rows, full_size.BASES[base], full_size.title_of(system))]
            assert "-" not in row[4 if system == "alone" and name == "table4" else 3 :], row
        assert len(filled) == sum(row[2] == "ours" for row in rows)


def test_a_name_that_would_end_a_line_is_refused(run, tmp_path):
    done = run("experiments/reproduce.py", "table4", "--commands", "--out", f"{tmp_path}\ntouch x")
    assert_refused(done, "--out", "no line of a script")


def test_a_row_of_some_questions_is_no_row(run, tmp_path):
    folder = full_size.place("llama-2-7b", "1.1B", 0, tmp_path)
    folder.mkdir(parents=True)
    (folder / "row.json").write_text('{"MT-Bench": 4.5, "limit": 50}')
    done = run("experiments/reproduce.py", "table4", "--fill", "--out", tmp_path)
    assert_refused(done, "row.json", "first 50 questions", "without --limit")
