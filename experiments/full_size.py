"""The paper's tables with the paper's models: a shell script that trains and measures all that is
in a table, and the table beside the paper's numbers.

    python experiments/reproduce.py table1 --commands --out DIR > table1.sh
    bash table1.sh        # its head says what it needs; its last command is
    python experiments/reproduce.py table1 --fill --out DIR

The models' directories are named as in plan.py's SHAPES. Trainings have the paper's Table 5, which
is train.py's default for models of these sizes; λ is 1 in the rows with "norm", else 0. Rows
"alone" are not in the paper: what a base makes of examples, before anything was trained. What is
measured lies in DIR/scores and DIR/costs, and is never measured twice.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from experiments import plan
from extras import benchmarks
from extras.benchmarks import BENCHMARKS, COLUMNS, MT_BENCH
from plumbing.files import TABLE, TEXT, Field, InputError, fields_of, number, read_json, write_text

OUT = Path("out/full_size")

# ---------------------------------------------------------------- what is trained

TINY, SEVEN, THIRTEEN, SEVENTY = "tinyllama-1.1b", "llama-2-7b", "llama-2-13b", "llama-2-70b"
CODE, THREE, THREE_SMALL = "codellama-7b", "llama-3-8b", "llama-3.2-1b"
# directories in DIR/family, by the paper's names; the bases, not the chat models
BASES = {
    TINY: "Tinyllama-1.1B",
    SEVEN: "Llama-2-7B",
    THIRTEEN: "Llama-2-13B",
    SEVENTY: "Llama-2-70B",
    CODE: "Codellama-7B",
    THREE: "Llama-3-8B",
    THREE_SMALL: "Llama-3.2-1B",
}
DATA = {
    "sharegpt": "ShareGPT, about 86,000 chats: a folder of files in the forms of chats.py",
    "infinity": "InfinityInstruct-7M, chats about code and mathematics, likewise",
    "documents.json": "a list of texts, in which vocab_map.py counts which tokens go together",
    "benchmarks": "the benchmarks' questions, as the head of extras/evaluate.py says",
}


@dataclass(frozen=True)
class Recipe:
    """A model that is trained: from whose weights, beside which bases (none: full fine-tuning)."""

    start: str
    beside: tuple[str, ...] = ()
    data: str = "sharegpt"
    lam: float = 0.0
    connection: str = "residual"
    random: bool = False


RECIPES = {
    # of Tables 1 and 2
    "1.1B": Recipe(TINY, (TINY,)),
    "1.1B norm": Recipe(TINY, (TINY,), lam=1.0),
    "1.1B infinity": Recipe(TINY, (TINY,), data="infinity"),
    "1.1B curriculum": Recipe(TINY, (TINY, SEVEN, THIRTEEN)),
    "7B": Recipe(SEVEN, (SEVEN,)),
    "7B norm": Recipe(SEVEN, (SEVEN,), lam=1.0),
    # of the figures
    "cascade": Recipe(TINY, (TINY,), connection="cascade"),
    "cascade+": Recipe(TINY, (TINY,), connection="cascade+"),
    "random 7B": Recipe(SEVEN, (TINY,), random=True),
    "Llama-3.2-1B": Recipe(THREE_SMALL, (THREE_SMALL,)),
    **{
        f"{base} probe": Recipe(base, (base,), connection="probe")
        for base in (TINY, SEVEN, THIRTEEN)
    },
    # of both
    **{f"{base} full": Recipe(base) for base in (TINY, SEVEN, CODE, THREE, THIRTEEN, SEVENTY)},
}


def recipe_of(base: str, system: str) -> str:
    """The name of the recipe behind a row; proxy tuning's expert is TinyLlama, fully fine-tuned.

    Example:
    >>> recipe_of("llama-2-7b", "Full"), recipe_of("llama-2-7b", "7B norm")
    ('llama-2-7b full', '7B norm')
    """
    if system in ("Full", "probe"):
        return f"{base} {system.lower()}"
    return f"{TINY} full" if system == "proxy" else system


# ---------------------------------------------------------------- the tables

FEW_SHOT = COLUMNS[-5:]
CHAT = COLUMNS[:1]
SYSTEMS = ("alone", "Full", "1.1B", "1.1B norm", "1.1B infinity", "7B", "7B norm")
# columns, and rows: base, system
TABLES: dict[str, tuple[tuple[str, ...], list[tuple[str, str]]]] = {
    "table1": (
        COLUMNS,
        [(TINY, system) for system in SYSTEMS[:4]]
        + [(base, system) for base in (SEVEN, THIRTEEN, SEVENTY, CODE) for system in SYSTEMS],
    ),
    "table2": (
        COLUMNS,
        [(SEVENTY, system) for system in ("alone", "1.1B", "1.1B norm", "1.1B curriculum")],
    ),
    "table3": (
        benchmarks.COSTS,
        [(TINY, "alone")]
        + [(base, system) for base in (SEVEN, THIRTEEN, SEVENTY) for system in ("alone", "1.1B")],
    ),
    "table4": (CHAT + FEW_SHOT, [(SEVEN, system) for system in ("alone", "1.1B", "proxy")]),
    "figure2": (
        CHAT,
        [(base, system) for base in (TINY, SEVEN, THIRTEEN) for system in ("probe", "Full")]
        + [(TINY, "random 7B")],
    ),
    "figure3": (
        CHAT,
        [(base, system) for base in (TINY, SEVEN) for system in ("cascade", "cascade+", "1.1B")],
    ),
    "figure4": (
        CHAT,
        [
            (THREE, system)
            for system in ("Full", "Llama-3.2-1B", "1.1B", "1.1B norm", "1.1B curriculum")
        ],
    ),
}
# what extras/evaluate.py calls the columns
TASKS = {"MT-Bench": MT_BENCH}
TASKS |= {benchmark.column: name for name, benchmark in BENCHMARKS.items()}
# what the script of --commands has to be given for a column
GIVEN = {
    "MT-Bench": "JUDGE_URL and JUDGE_MODEL",
    "Toxigen↓": "TOXIGEN_JUDGE",
    "MBPP": "RUN_CODE=yes",
    "HumanEval": "RUN_CODE=yes",
}


ADDED = ("MBPP", "HumanEval", "Toxigen↓")  # columns that it otherwise does not ask for


def wanted(names: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Rows of these tables → all columns that any of them asks of a row. A base alone is asked
    few-shot only: it has not been trained to answer.
    """
    rows: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if name == "table3":  # has no scores
            continue
        columns, of_table = TABLES[name]
        for row in of_table:
            asked = set(rows.get(row, [])) | set(columns)
            if row[1] == "alone":
                asked &= set(FEW_SHOT)
            rows[row] = [column for column in COLUMNS if column in asked]
    return rows


def place(base: str, system: str, seed: object, out: Path) -> Path:
    """Where the scores of a row lie; a base alone has no seeds."""
    folder = "alone" if system == "alone" else f"seed{seed}/{slug(system)}"
    return out / "scores" / folder / base


def cost_file(base: str, system: str, out: Path) -> Path:
    return out / "costs" / f"{base}+{system}.json"


def slug(name: str) -> str:
    """A name as a folder's."""
    return name.replace(" ", "-")


# ---------------------------------------------------------------- on how many GPUs

SLICES = 4  # processes that share a 70B when it decodes, as in the paper's Table 3
MEMORY = 80  # of a GPU, in GiB
ROOM = (1 - plan.FREE) * MEMORY
# GPUs, micro-batch and checkpointing; the first in which a training fits is taken, else the last
WAYS = ((1, 4, False), (1, 1, True), (4, 4, True), (4, 1, True), (8, 1, True))


@cache
def way_to_train(recipe: Recipe) -> tuple[tuple[int, int, bool], float]:
    """How a recipe is trained, of WAYS, and GiB per GPU by the arithmetic of plan.py.

    Probes are small beside their bases, and train.py has other than residual connections, and
    random weights, on one GPU only.
    """
    value = plan.SHAPES[recipe.start]
    bases = [plan.SHAPES[base] for base in recipe.beside]
    contexts = [config.max_position_embeddings for config in (value, *bases)]
    tokens = min(4096, *contexts)
    largest = max(bases, key=plan.size, default=None)
    if recipe.connection == "probe":
        return WAYS[0], plan.size(largest) * 2 / plan.GIB
    single = recipe.random or recipe.connection != "residual"
    for way in WAYS:
        if single and way[0] > 1:
            break
        needed = sum(plan.training(largest, value, way[0], tokens, *way[1:]).values()) / plan.GIB
        taken = way, needed
        if needed <= ROOM:
            break
    return taken


def program(gpus: int, *words: str) -> list[str]:
    """A Python program, started in one process or in several.

    Example:
    >>> program(1, "train.py"), program(4, "-m", "extras.evaluate")[:3]
    (['python', 'train.py'], ['torchrun', '--nproc_per_node', '4'])
    """
    start = ["python"] if gpus == 1 else ["torchrun", "--nproc_per_node", str(gpus)]
    return [*start, *words]


# ---------------------------------------------------------------- the script

# what can be given to the script, and is passed on by its functions
JUDGE = """\
# The judge behind JUDGE_URL scores MT-Bench (the paper's is GPT-4). Without it the answers are
# written, and their column stays empty; give it later, and start again.
: "${JUDGE_URL:=}" "${JUDGE_MODEL:=}"
if [ -n "$JUDGE_URL" ] && [ -z "$JUDGE_MODEL" ]; then
    refuse "JUDGE_URL is given without JUDGE_MODEL"
fi
"""
CODE_AND_TOXIGEN = """\
# The model in TOXIGEN_JUDGE tells which texts are toxic. MBPP and HumanEval run the programs that
# the models write: RUN_CODE=yes is for you to say. Without them these columns stay empty, likewise.
: "${RUN_CODE:=}" "${TOXIGEN_JUDGE:=}"
case "$RUN_CODE" in
    "" | yes) ;;
    *) refuse "RUN_CODE is $RUN_CODE; it must be yes, or left out" ;;
esac
if [ -n "$TOXIGEN_JUDGE" ] && [ ! -d "$TOXIGEN_JUDGE" ]; then
    refuse "TOXIGEN_JUDGE is $TOXIGEN_JUDGE, which is no directory"
fi
"""
FUNCTIONS = {
    "once": """\
# once FILE COMMAND...: unless the file is there
once() {
    if [ ! -e "$1" ]; then
        shift
        "$@"
    fi
}
""",
    "train": """\
# train COMMAND... --out DIR: a training that was stopped goes on, a finished one is left as it is
train() {
    for last; do :; done
    if [ -e "$last/checkpoint.safetensors" ]; then
        "$@" --resume
    elif [ ! -e "$last/README.md" ]; then
        "$@"
    fi
}
""",
    "chat": """\
# chat COMMAND...: an evaluation that MT-Bench is a part of
chat() {
    "$@" ${JUDGE_URL:+--judge_url "$JUDGE_URL" --judge_model "$JUDGE_MODEL"}
}
""",
    "all": """\
# all COMMAND... --tasks NAME...: likewise, of all that the paper measures
all() {
    chat "$@" ${RUN_CODE:+mbpp humaneval} ${TOXIGEN_JUDGE:+toxigen_generation} \\
        ${RUN_CODE:+--run_code} ${TOXIGEN_JUDGE:+--toxigen_judge "$TOXIGEN_JUDGE"}
}
""",
}


def line(*words: object) -> str:
    """A command of the shell."""
    return shlex.join(map(str, words))


def script(what: str, names: Sequence[str], seeds: int, out: Path) -> Iterator[str]:
    """The lines of a shell script that fills these tables. what: their name on the command line."""
    if not str(out).isprintable():
        raise InputError(f"--out {str(out)!r}: has what no line of a script can hold")
    body = [*commands(names, seeds, out)]
    used = {command.split()[0] for command in body if command}
    if "all" in used:
        used.add("chat")

    # the head: how it is started, on what machine, and what it reads
    yield "#!/usr/bin/env bash"
    yield f"# Of the paper: {', '.join(names)}. This script trains the paper's models,"
    yield "# measures them, and ends in the table. Started again, it goes on where it was stopped."
    yield "# To be run in the root of the repository, with or without what stands before bash:"
    given = "JUDGE_URL=... JUDGE_MODEL=... " * ("chat" in used)
    given += "RUN_CODE=yes TOXIGEN_JUDGE=DIR " * ("all" in used)
    yield f"#     {given}bash FILE"
    yield "#"
    yield from machines(names)
    yield "#"
    yield "# Expected are the bases, not the chat models, as Hugging Face has them (config, weights"
    yield "# and tokenizer in a directory), and the data:"
    needed = parts(body, out)
    for part in needed:
        yield f"#     {out / 'family' / part}: {DATA.get(part) or BASES[part]}"
    yield "set -eu"
    yield ""

    # nothing begins before all of it is there
    yield "refuse() {"
    yield '    echo "error: $1" >&2'
    yield "    exit 2"
    yield "}"
    if "chat" in used:
        yield from JUDGE.splitlines()
    if "all" in used:
        yield from CODE_AND_TOXIGEN.splitlines()
    for program_name in ("python", "torchrun"):
        if any(program_name in command.split() for command in body):
            problem = f"there is no {program_name} on the PATH"
            yield f'command -v {program_name} > /dev/null || refuse "{problem}"'
    yield "for needed in \\"
    files = ["experiments/reproduce.py", *(out / "family" / part for part in needed)]
    yield " \\\n".join("    " + line(file) for file in files)
    yield "do"
    yield '    [ -e "$needed" ] || refuse "$needed is not there; the head of this script says more"'
    yield "done"
    yield ""

    # the work, and the table
    for name, function in FUNCTIONS.items():
        if name in used:
            yield from function.splitlines()
    yield from body
    yield ""
    yield line("python", "experiments/reproduce.py", what, "--fill", "--out", out)


def parts(body: Sequence[str], out: Path) -> list[str]:
    """What these commands read of OUT/family, and do not make themselves."""
    words = {word for command in body for word in shlex.split(command, comments=True)}
    return [part for part in (*BASES, *DATA) if str(out / "family" / part) in words]


def machines(names: Sequence[str]) -> Iterator[str]:
    """What the script says of the GPUs that it takes."""
    rows = [row for name in names for row in TABLES[name][1]]
    trained = [name for name in RECIPES if name in {recipe_of(*row) for row in wanted(names)}]
    gpus = {way_to_train(RECIPES[name])[0][0] for name in trained if fits(name)}
    if any(base == SEVENTY for base, _ in rows):
        gpus.add(SLICES)
    yield f"# By the arithmetic of experiments/plan.py it takes up to {max(gpus, default=1)} GPUs"
    yield f"# of {MEMORY} GB; a command without torchrun takes one."
    large = [name for name in trained if not fits(name)]
    if large:
        yield "# These take more, come last, and can be removed; the table is then filled without:"
    for name in large:
        (number_of_gpus, *_), needed = way_to_train(RECIPES[name])
        yield f"#     the training of {name}: {number_of_gpus} × {needed:.0f} GiB"
    if trained:
        yield "# Trainings have Table 5's settings, train.py's defaults: 1e-4 and 32 chats per step"
        yield "# for 1.1B, 1e-5 and 16 for larger models. Chats are cut at 4096 tokens; where"
        yield "# TinyLlama takes part, at 2048, which is its context."


def fits(name: str) -> bool:
    """Whether a recipe can be trained on GPUs of MEMORY."""
    return way_to_train(RECIPES[name])[1] <= ROOM


def commands(names: Sequence[str], seeds: int, out: Path) -> Iterator[str]:
    """The commands of the script, with a comment before those that belong together."""
    family = out / "family"
    rows = wanted(names)
    if "figure4" in names:
        yield ""
        yield "# which tokens of Llama-3 are which of Llama-2"
        how = ["--base", family / THREE, "--value", family / TINY]
        how += ["--text", family / "documents.json", "--out", map_file(out)]
        yield line("once", map_file(out), "python", "vocab_map.py", *how)
    if "table3" in names:
        yield ""
        yield "# time and memory: what the value model has learnt does not matter"
        for row in TABLES["table3"][1]:
            yield cost_command(*row, out)

    # the bases alone
    alone = [row for row in rows if row[1] == "alone"]
    if alone:
        yield ""
        yield "# what the bases make of examples, alone"
    for row in alone:
        yield evaluate_command(*row, rows[row], 0, out)

    # each recipe with its rows; what is too large for most machines comes last
    systems: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        if row[1] != "alone":
            systems.setdefault(recipe_of(*row), []).append(row)
    jobs = [(seed, name) for seed in range(seeds) for name in RECIPES if name in systems]
    for seed, name in sorted(jobs, key=lambda job: not fits(job[1])):
        yield ""
        yield f"# {name}" + f", seed {seed}" * (seeds > 1)
        yield train_command(name, seed, out)
        for row in systems[name]:
            yield evaluate_command(*row, rows[row], seed, out)


def map_file(out: Path) -> Path:
    """From Llama-3's vocabulary to Llama-2's."""
    return out / "family" / "map.safetensors"


def cost_command(base: str, system: str, out: Path) -> str:
    family = out / "family"
    value = "none" if system == "alone" else family / TINY
    how = ["--base", family / base, "--value", value, "--out", cost_file(base, system, out)]
    start = program(SLICES if base == SEVENTY else 1, "experiments/costs.py")
    return line("once", cost_file(base, system, out), *start, *how)


def train_command(name: str, seed: int, out: Path) -> str:
    """λ is said, since train.py's default is 1; the rest of Table 5 is its default."""
    recipe = RECIPES[name]
    family = out / "family"
    (gpus, micro_batch_size, checkpointing), _ = way_to_train(recipe)

    # what is trained
    if recipe.beside:
        how = ["--base", *(family / base for base in recipe.beside)]
        how += ["--connection", recipe.connection, "--lam", recipe.lam]
        if recipe.connection != "probe":
            how += ["--value", family / recipe.start]
        if recipe.random:
            how += ["--random"]
    else:
        how = ["--base", family / recipe.start, "--full"]

    # on what, and where it goes
    how += ["--data", family / recipe.data, "--seed", seed]
    how += ["--micro_batch_size", micro_batch_size]
    if checkpointing:
        how += ["--checkpointing"]
    how += ["--out", trained_to(name, seed, out)]
    return line("train", *program(gpus, "train.py"), *how)


def trained_to(name: str, seed: int, out: Path) -> Path:
    return out / f"seed{seed}" / slug(name)


def evaluate_command(base: str, system: str, columns: Sequence[str], seed: int, out: Path) -> str:
    family = out / "family"
    trained = trained_to(recipe_of(base, system), seed, out)

    # who answers
    if system == "alone":
        how = ["--base", family / base, "--value", "none"]
    elif system == "Full":
        how = ["--base", trained, "--value", "none"]
    else:
        how = ["--base", family / base, "--value", trained]
    if system == "proxy":
        how += [family / TINY, "--alpha", 1, -1]
    if base == THREE and system.startswith("1.1B"):
        how += ["--map", map_file(out)]

    # what is asked; what has to be allowed or judged is added by the script's functions
    kind = []
    if "MT-Bench" in columns:
        kind = ["all"] if set(ADDED) <= set(columns) else ["chat"]
    how += ["--data", family / "benchmarks", "--out", place(base, system, seed, out)]
    how += ["--tasks", *(TASKS[column] for column in columns if column not in ADDED)]
    start = program(SLICES if base == SEVENTY else 1, "-m", "extras.evaluate")
    return line(*kind, *start, *how)


# ---------------------------------------------------------------- the table


def fill(names: Sequence[str], out: Path) -> None:
    """Prints these tables and writes OUT/NAME.json and OUT/NAME.md, as far as they are measured.
    Raises InputError if nothing is.
    """
    empty = []
    for name in names:
        rows = filled_rows(name, out)
        columns = TABLES[name][0]
        if not any(row[column]["seeds"] for row in rows for column in columns):
            empty.append(name)
            continue
        text = f"# {name}\n\n{markdown(name, rows)}\n"
        for note in notes(name, rows, out):
            text += f"\n{note}\n"
        print(text)
        write_text(out / f"{name}.json", json.dumps(rows, indent=2) + "\n")
        write_text(out / f"{name}.md", text)
    if len(empty) == len(names):
        raise InputError(
            f"{out}: nothing of {', '.join(names)} is measured there yet; run the script that "
            "--commands prints"
        )
    if empty:
        print(f"nothing is measured yet of {', '.join(empty)}")


def filled_rows(name: str, out: Path) -> list[dict]:
    """The rows of a table: base, system, and of each column what we have measured, a number for
    each seed, and what the paper reports.
    """
    reported = {}  # figures have no numbers to read
    if name == "table3":
        reported = benchmarks.paper_costs()
    elif name.startswith("table"):
        reported = benchmarks.paper_rows()
    columns, of_table = TABLES[name]
    rows = []
    for base, system in of_table:
        title = title_of(system)
        paper = reported.get((BASES[base], title), {})
        ours = measured(name, base, system, out)
        row: dict = {"base": BASES[base], "system": title}
        for column in columns:
            seeds = [scores[column] for scores in ours if scores[column] is not None]
            row[column] = {"seeds": seeds, "paper": paper.get(column)}
            if seeds:
                row[column]["mean"] = sum(seeds) / len(seeds)
                row[column]["least"] = min(seeds)
                row[column]["most"] = max(seeds)
        rows.append(row)
    return rows


def title_of(system: str) -> str:
    """A system as benchmarks.py calls it."""
    return "1.1B - 1.1B, proxy tuning" if system == "proxy" else system


def measured(name: str, base: str, system: str, out: Path) -> list[dict]:
    """What a row's files hold, one for each seed; None for a column that was not measured."""
    if name == "table3":
        files = [cost_file(base, system, out)]
    else:
        folder = place(base, system, "*", out)
        files = sorted(out.glob(f"{folder.relative_to(out)}/row.json"))
    table = {column: Field(number(0, 1e9), None) for column in TABLES[name][0]}
    found = []
    for file in filter(Path.exists, files):
        raw = read_json(file, TABLE)
        if raw.get("limit") is not None:
            raise InputError(
                f"{file}: is of the first {raw['limit']} questions of each task; measure it again "
                "without --limit"
            )
        found.append(fields_of(raw, table, file))
    return found


def markdown(name: str, rows: list[dict]) -> str:
    """A table of which each row is ours, and below it the paper's, if there is one.

    Example:
    >>> row = {"base": "Llama-2-7B", "system": "1.1B"}
    >>> row["MT-Bench"] = {"seeds": [4, 5], "mean": 4.5, "least": 4, "most": 5, "paper": 4.62}
    >>> print(markdown("figure3", [row]))
    | base       | system |       | MT-Bench     |
    | ---------- | ------ | ----- | ------------ |
    | Llama-2-7B | 1.1B   | ours  | 4.5 (4 to 5) |
    |            |        | paper | 4.62         |
    """
    digits = 4 if name == "table3" else 3
    columns = TABLES[name][0]

    def ours(cell: dict) -> str:
        if not cell["seeds"]:
            return "-"
        mean, least, most = (f"{cell[key]:.{digits}g}" for key in ("mean", "least", "most"))
        return f"{mean} ({least} to {most})" if len(cell["seeds"]) > 1 else mean

    def paper(cell: dict) -> str:
        return "-" if cell["paper"] is None else f"{cell['paper']:g}"

    # a line for each
    lines = [["base", "system", "", *columns]]
    for row in rows:
        cells = [row[column] for column in columns]
        lines.append([row["base"], row["system"], "ours", *map(ours, cells)])
        if any(cell["paper"] is not None for cell in cells):
            lines.append(["", "", "paper", *map(paper, cells)])

    # all of them equally wide
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[word.ljust(width) for word, width in zip(words, widths)] for words in lines]
    return "\n".join("| " + " | ".join(words) + " |" for words in padded)


def notes(name: str, rows: list[dict], out: Path) -> Iterator[str]:
    """What is to be known of a table besides."""
    columns, of_table = TABLES[name]
    if any(len(row[column]["seeds"]) > 1 for row in rows for column in columns):
        yield "Ours: mean (smallest to largest) over the seeds."
    if name.startswith("figure"):
        yield "The paper has these scores in a picture, without numbers."

    # columns that stand empty, and what would fill them
    empty = [c for c in columns if not any(row[c]["seeds"] for row in rows)]
    for column in empty:
        if column in GIVEN:
            yield f"{column} is not measured: give the script {GIVEN[column]}, and start it again."

    # of Table 3, on what
    if name == "table3":
        files = [cost_file(*row, out) for row in of_table]
        found = [read_json(file, TABLE) for file in files if file.exists()]
        field = {"machine": Field(TEXT, "unknown")}
        used = {fields_of(row, field, out)["machine"] for row in found}
        yield f"Measured on {'; '.join(sorted(used))}; the paper's on H800s. GB: 2^30 bytes."
