"""The paper's benchmarks: how each is asked, what the paper reports, and how their files look.

A row of Table 1 has eleven scores: how a model answers (MT-Bench, of 1 to 10), what it does without
examples (IFEval to HumanEval) and what it makes of examples (ARC to Winogrande), in percent.
A row of Table 3 has what decoding costs.
"""

import csv
import io
import random
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from plumbing.files import (
    TABLE,
    TEXT,
    Field,
    InputError,
    Kind,
    fields_of,
    list_of,
    read_lines,
    read_text,
    whole,
)

# ---------------------------------------------------------------- how each is asked


class Benchmark(NamedTuple):
    """A benchmark of the paper as a task of lm-evaluation-harness.

    column: of Table 1. task: the harness's name for it; chat_task: the same for a model that
    answers (None: such a model too is asked as a plain text goes on). shots: examples. metric: the
    harness's name of the score that stands in the column.
    """

    column: str
    task: str
    chat_task: str | None
    shots: int
    metric: str
    chat_metric: str | None = None
    runs_code: bool = False


# The paper names neither metrics nor prompts. The prompts here are the harness's. ARC and Hellaswag
# are `acc`: the paper's figures for fully fine-tuned Llamas lie where `acc` of Llamas does, far
# below `acc_norm`. IFEval: prompts of which every instruction is followed, strictly. GSM8K: the
# last number of the reply is right. The harness's files in OUT hold the other metrics.
BENCHMARKS = {
    "ifeval": Benchmark("IFEval", "ifeval", "ifeval", 0, "prompt_level_strict_acc,none"),
    "gsm8k": Benchmark("GSM8K", "gsm8k", "gsm8k", 0, "exact_match,flexible-extract"),
    "toxigen_generation": Benchmark(
        "Toxigen↓", "toxigen_generation", "toxigen_generation", 0, "toxic,none"
    ),
    "mbpp": Benchmark(
        "MBPP", "mbpp", "mbpp_instruct", 0, "pass_at_1,none", "pass_at_1,extract_code", True
    ),
    "humaneval": Benchmark(
        "HumanEval", "humaneval", "humaneval_instruct", 0, "pass@1,create_test", None, True
    ),
    "arc_challenge": Benchmark("ARC", "arc_challenge", None, 25, "acc,none"),
    "hellaswag": Benchmark("Hellaswag", "hellaswag", None, 10, "acc,none"),
    "mmlu": Benchmark("MMLU", "mmlu", None, 5, "acc,none"),
    "truthfulqa_mc2": Benchmark("TruthfulQA", "truthfulqa_mc2", None, 0, "acc,none"),
    "winogrande": Benchmark("Winogrande", "winogrande", None, 5, "acc,none"),
}
THREE = Kind("a list of three texts or more", lambda x: x in list_of(TEXT) and len(x) >= 3)
MT_BENCH = "mt-bench"  # asked by extras/mt_bench.py


# ---------------------------------------------------------------- what the paper reports

COLUMNS = (
    "MT-Bench",
    "IFEval",
    "GSM8K",
    "Toxigen↓",
    "MBPP",
    "HumanEval",
    "ARC",
    "Hellaswag",
    "MMLU",
    "TruthfulQA",
    "Winogrande",
)

# Table 1, and from Table 2 the row "1.1B curriculum"; by base, and by what answers beside it
_PAPER = """
Tinyllama-1.1B
Full          3.84 16.1 1.97 26.8 14.1 5.37 27.6 40   26.4 34   57.8
1.1B          3.62 15.2 2.43 21.1 10.6 8.17 28.4 44.1 25.2 30.4 57.5
1.1B norm     3.52 14.6 2.65 62.8 17.9 15.4 31.4 44.9 25.6 30   59.6
Llama-2-7B
Full          5.93 23.8 10.6 49.8 26   17.6 51.9 59.5 50.1 41.5 74.3
1.1B          4.62 15.5 4.7  44.3 15.8 11.3 42.7 55   43.2 31.1 66.2
1.1B norm     4.55 15.3 5.61 62.8 20.4 15.4 48.5 57.9 44.2 31.8 72.5
1.1B infinity 4.06 17   27.2 65.3 30.9 18.3 48.3 58.6 45.8 30.2 71.2
7B            5.96 24.4 13.4 58.3 21.4 13.9 51   61   49.3 40.1 72
7B norm       6.03 32.7 13.5 45.2 23.4 14.8 51.9 60.9 49.6 39.9 70.6
Llama-2-13B
Full          6.23 36.3 18.7 5.03 24.3 22.8 49.2 60.6 53.9 41.8 72.3
1.1B          4.74 15.5 6.67 39.7 16.4 13.6 46.1 57.2 52   29.3 70.1
1.1B norm     4.65 14.8 10.6 55.8 28.5 15.9 49.1 59.1 52.9 31.8 76
1.1B infinity 4.45 18.7 30.3 77   33.1 23.7 52.2 61.2 53.7 30.3 74.6
7B            6.34 26.3 18.3 56.8 24.9 19.6 56.1 63.6 53.4 37.9 74.4
7B norm       6.22 25.3 17.5 39.1 27.7 15.9 56.6 63.6 53.6 37.7 74.8
Llama-2-70B
Full          7.08 46.6 35.6 0    36.6 41.9 62.9 67.8 69.3 48.4 80.5
1.1B          4.92 16.6 12.4 42.1 27.9 20.4 52.6 60.5 68.4 31.6 77.3
1.1B norm     5.37 16.8 24.9 70   37.8 28.6 62.8 66.7 67.9 37.1 82.9
1.1B infinity 4.86 20.1 44   71   42.9 33   58.6 66.4 68.5 36.1 81
7B            6.56 33.3 27.9 43.6 29.4 25.8 62.1 68.2 63.6 42.1 78.6
7B norm       6.48 34.6 28.8 27.5 33.1 25.1 62.8 68.2 64.1 41.9 79.3
1.1B curriculum 5.14 15.7 15.8 40.9 31.7 25.5 57.7 64.3 68.4 36.2 73.2
Codellama-7B
Full          5.47 33.4 15.4 83.2 39.4 43.6 40.6 48.3 41.6 34.4 64.5
1.1B          3.94 15.7 3.79 48.2 28.1 24   35.6 45.9 35.2 29.1 59.6
1.1B norm     3.99 15.9 4.85 62.3 39.4 31   39.4 46.9 38.1 29.5 64.4
1.1B infinity 3.51 19.8 27.2 65.2 31   18.4 38.9 49.1 38.5 29.6 64.7
7B            5.64 31.2 12   56.8 30.9 26.8 47.9 53.9 49.2 38.2 68.4
7B norm       5.54 31.2 16.8 40.6 33.2 25.1 47.8 54.1 49.7 37.4 68.3
"""

# Table 4: proxy tuning on Llama-2-7B, of the columns that the paper gives
PROXY = {
    "MT-Bench": 4.65,
    "ARC": 40.0,
    "Hellaswag": 50.4,
    "MMLU": 44.4,
    "TruthfulQA": 33.4,
    "Winogrande": 66.7,
}

# Table 3: seconds and peak memory per GPU of decoding 128, 512 and 1024 tokens, on H800s, the 70B
# on four of them. GB are of 2^30 bytes: in 10^9 the weights alone would be more than is reported
LENGTHS = (128, 512, 1024)
COSTS = tuple(f"{unit} {tokens}" for tokens in LENGTHS for unit in ("seconds", "GB"))
_PAPER_COSTS = """
Tinyllama-1.1B
alone  1.99  2.09  6.99  2.09 13.36  2.10
Llama-2-7B
alone  2.87 12.65 10.98 12.84 22.06 13.09
1.1B   5.13 14.79 20.83 15.33 49.74 15.91
Llama-2-13B
alone  3.48 24.51 12.98 24.79 26.09 25.18
1.1B   5.73 26.66 26.10 27.30 61.61 28.14
Llama-2-70B
alone 11.76 32.41 20.36 32.42 40.36 32.44
1.1B  16.12 33.08 33.07 33.31 75.37 33.78
"""


def paper_rows() -> dict[tuple[str, str], dict[str, float]]:
    """(base, what answers beside it) → the paper's scores by column.

    Example:
    >>> paper_rows()["Llama-2-7B", "1.1B norm"]["MMLU"]
    44.2
    """
    rows = read_rows(_PAPER, COLUMNS)
    rows["Llama-2-7B", "1.1B - 1.1B, proxy tuning"] = PROXY
    return rows


def paper_costs() -> dict[tuple[str, str], dict[str, float]]:
    """(base, what answers beside it, or "alone") → the paper's times and peak memory.

    Example:
    >>> paper_costs()["Llama-2-70B", "1.1B"]["seconds 128"]
    16.12
    """
    return read_rows(_PAPER_COSTS, COSTS)


def read_rows(text: str, columns: tuple[str, ...]) -> dict[tuple[str, str], dict[str, float]]:
    """Rows of numbers, below the name of their base.

    Example:
    >>> read_rows("Llama-2-7B\\n1.1B norm 4.55 15.3", ("MT-Bench", "IFEval"))
    {('Llama-2-7B', '1.1B norm'): {'MT-Bench': 4.55, 'IFEval': 15.3}}
    """
    rows = {}
    base = ""
    for line in text.strip().splitlines():
        words = line.split()
        if len(words) == 1:
            base = line
            continue
        numbers = map(float, words[-len(columns) :])
        rows[base, " ".join(words[: -len(columns)])] = dict(zip(columns, numbers))
    return rows


def beside(
    parameters: int, value_parameters: int | None = None, proxy: bool = False
) -> dict[str, dict[str, float]]:
    """The paper's rows of models of this size, by name: what to compare a row with.

    value_parameters: of the value model; None: a model by itself, to which the paper's fully
    fine-tuned ones compare. proxy: proxy tuning instead of value models.

    Example:
    >>> list(beside(13_015_864_320, 1_100_048_384))
    ['Llama-2-13B + 1.1B', 'Llama-2-13B + 1.1B norm', 'Llama-2-13B + 1.1B infinity']
    """

    def close(name: str, n: int) -> bool:
        """1.1B counts as equal to a model of 1.0 to 1.2 billion parameters."""
        billions = float(name.split("-")[-1].removesuffix("B"))
        return abs(n / 1e9 / billions - 1) < 0.1

    rows = {}
    for (base, system), scores in paper_rows().items():
        if not close(base, parameters):
            continue
        name = f"{base} + {system}"
        if system == "Full":
            compares, name = value_parameters is None, f"{base} fully fine-tuned"
        elif value_parameters is None or not close(system.split()[0], value_parameters):
            compares = False
        else:
            compares = proxy == ("proxy" in system)
        if compares:
            rows[name] = scores
    return rows


# ---------------------------------------------------------------- files


def local_rows(directory: Path, path: str, name: str | None) -> dict[str, list[dict]]:
    """What a data set of the Hub holds, read from the files that its authors have published: the
    rows of each split, none where `directory` lacks the file.

    path, name: the Hub's names of the data set and of its part.
    """
    reader = PUBLISHED.get(path)
    return {} if reader is None else reader(directory, name)


def gsm8k(directory: Path, name: str | None) -> dict[str, list[dict]]:
    fields = {"question": Field(TEXT), "answer": Field(TEXT)}
    splits = {
        split: lines_of(fields, directory / f"gsm8k-{split}.jsonl") for split in ("train", "test")
    }
    return splits if splits["test"] else {}


def human_eval(directory: Path, name: str | None) -> dict[str, list[dict]]:
    fields = {name: Field(TEXT) for name in ("task_id", "prompt", "test", "entry_point")}
    files = directory / "HumanEval.jsonl.gz", directory / "HumanEval.jsonl"
    return {"test": lines_of(fields, *files)}


def ifeval(directory: Path, name: str | None) -> dict[str, list[dict]]:
    fields = {"key": Field(whole(0, 10**9)), "prompt": Field(TEXT)}
    fields |= {"instruction_id_list": Field(list_of(TEXT)), "kwargs": Field(list_of(TABLE))}
    return {"train": lines_of(fields, directory / "ifeval.jsonl")}


def mbpp(directory: Path, name: str | None) -> dict[str, list[dict]]:
    """The tasks 11 to 510 are the test, as the authors say."""
    fields = {"task_id": Field(whole(0, 10**9)), "text": Field(TEXT), "test_list": Field(THREE)}
    rows = lines_of(fields, directory / "mbpp.jsonl")
    return {"test": [row for row in rows if 11 <= row["task_id"] <= 510]}


def mmlu(directory: Path, name: str | None) -> dict[str, list[dict]]:
    """mmlu/SUBJECT_dev.csv and _test.csv: with a line of names and the answer's number, or without
    and with its letter.
    """
    splits = {}
    for split in ("dev", "test"):
        file = directory / "mmlu" / f"{name}_{split}.csv"
        table = cells_of(file)
        if table[:1] == [["question", "choice0", "choice1", "choice2", "choice3", "answer"]]:
            table = table[1:]
        splits[split] = []
        for number, cells in enumerate(table, 1):
            if len(cells) != 6 or cells[5] not in list("0123ABCD"):
                raise InputError(
                    f"{file}, question {number}: is not a question, four choices and an answer, "
                    "0 to 3 or A to D"
                )
            answer = "0123ABCD".index(cells[5]) % 4
            row = {"question": cells[0], "choices": cells[1:5], "answer": answer, "subject": name}
            splits[split].append(row)
    return splits if splits["test"] else {}


def truthful_qa(directory: Path, name: str | None) -> dict[str, list[dict]]:
    """truthfulqa.csv, the questions with their correct and incorrect answers, as the choices of the
    two multiple-choice tasks.
    """
    file = directory / "truthfulqa.csv"
    table = cells_of(file)
    if name != "multiple_choice" or not table:
        return {}
    columns = {name: i for i, name in enumerate(table[0])}
    for column in ("Question", "Best Answer", "Correct Answers", "Incorrect Answers"):
        if column not in columns:
            raise InputError(f"{file}: has no column {column!r}; take the authors' TruthfulQA.csv")
    rows = []
    for number, cells in enumerate(table[1:], 1):
        if len(cells) != len(columns):
            raise InputError(
                f"{file}, question {number}: has {len(cells)} cells, the first line {len(columns)}"
            )
        correct, incorrect = (
            [answer.strip() for answer in cells[columns[column]].split(";") if answer.strip()]
            for column in ("Correct Answers", "Incorrect Answers")
        )
        if not correct or not incorrect:
            raise InputError(f"{file}, question {number}: has no correct or no incorrect answer")
        best = cells[columns["Best Answer"]].strip()
        rows.append(
            {
                "question": cells[columns["Question"]].strip(),
                "mc1_targets": choices([best], incorrect),
                "mc2_targets": choices(correct, incorrect),
            }
        )
    return {"validation": rows}


def choices(right: list[str], wrong: list[str]) -> dict:
    return {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)}


def toxic_prompts(directory: Path, per_group: int = 200) -> list[dict]:
    """Beginnings of hateful texts from ToxiGen (toxigen/hate_GROUP.txt, a text a line), 200 of each
    group, as in the scripts that the paper's authors have released; drawn with a seed, so always
    the same. The groups take turns.
    """
    groups = []
    for file in sorted((directory / "toxigen").glob("hate_*.txt")):
        texts = [line.strip() for line in read_text(file).split("\n") if line.strip()]
        random.Random(42).shuffle(texts)
        group = file.stem.removeprefix("hate_")
        texts = [text.replace("\\\\", "\\").replace("\\n", "\n") for text in texts[:per_group]]
        groups.append([{"text": text, "group": group} for text in texts])
    turns = zip_longest(*groups)
    return [row for turn in turns for row in turn if row is not None]


PUBLISHED: dict[str, Callable[[Path, str | None], dict[str, list[dict]]]] = {
    "openai/gsm8k": gsm8k,
    "openai/openai_humaneval": human_eval,
    "google/IFEval": ifeval,
    "google-research-datasets/mbpp": mbpp,
    "cais/mmlu": mmlu,
    "truthfulqa/truthful_qa": truthful_qa,
}


def lines_of(fields: dict[str, Field], *files: Path) -> list[dict]:
    """The lines of the first of these files that is there. Raises InputError for one that lacks a
    field, or has it of another kind.
    """
    for file in files:
        if file.exists():
            rows = []
            for line, row in read_lines(file):
                if row not in TABLE:
                    raise InputError(f"{file}, line {line}: must be {TABLE.words}")
                fields_of(row, fields, f"{file}, line {line}")
                rows.append(row)
            return rows
    return []


def cells_of(file: Path) -> list[list[str]]:
    """The rows of a CSV file, if it is there; empty lines are left out."""
    if not file.exists():
        return []
    return [cells for cells in csv.reader(io.StringIO(read_text(file), newline="")) if cells]
