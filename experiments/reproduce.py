"""The paper's experiments in miniature, on the family of family.py.

    python experiments/reproduce.py figure2    # a probe and random weights against full fine-tuning
    python experiments/reproduce.py figure3    # cascade, cascade+, residual, at home and elsewhere
    python experiments/reproduce.py table1     # value models of two sizes on five bases
    python experiments/reproduce.py table2     # norm term and curriculum on the largest base
    python experiments/reproduce.py table3     # time and memory with and without a value model
    python experiments/reproduce.py table4     # one value model against proxy tuning's two
    python experiments/reproduce.py figure4    # a base with another tokenizer
    python experiments/reproduce.py norm       # ours: the norm term and two others, see norm.py
    python experiments/reproduce.py all        # these, then
    python experiments/reproduce.py findings   # what they say of the paper's claims, see claims.py
    python experiments/reproduce.py headlines  # of each claim the first direction only

The paper's 1.1B, 7B, 13B and 70B are here small, medium, large and xlarge, CodeLlama is
`continued`, Llama-3 `other`. Each seed has a world, bases and trainings of its own, so that the
spread is that of the whole experiment. Everything made is kept in --out, so that a run that was
stopped continues. NAME.json holds mean and spread (smallest and largest) over the seeds, NAME.png
shows them where matplotlib is installed. --scale multiplies people, texts, questions and the bases'
parameters.

Rows of a base "alone", without a value model, say what it knew before anything was trained.

    python experiments/reproduce.py table1 --commands --out DIR > table1.sh    # at full size
    python experiments/reproduce.py table1 --fill --out DIR                    # its last command

With --commands a shell script is printed that makes a table with the paper's models: it trains with
the paper's Table 5, runs the paper's benchmarks, and ends in the table, beside the paper's numbers.
Its head says which models and data it expects in DIR/family, on which GPUs, and how it is told who
judges. With --fill the table is printed as far as it is measured. See full_size.py.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import (
    bench_measure,
    bench_sides,
    claims,
    expert,
    family,
    figures,
    full_size,
    norm,
    toy,
)
from experiments.family import SCORES
from extras.connections import Connected, Probe, connected
from extras.mapped import Mapped
from ivl import generate
from model import Llama, column_major
from plumbing.chats import read_chats
from plumbing.dataset import tokenize
from plumbing.files import (
    LIST,
    SEED,
    TABLE,
    InputError,
    Parser,
    command,
    given,
    number,
    pick_device,
    read_json,
    whole,
    write_text,
)
from plumbing.runs import save_model
from plumbing.tokenizer import Tokenizer
from plumbing.weights import frozen_network, load, read_config, recorded_connection
from train import Curriculum, Settings, split, train
from vocab_map import VocabMap

OUT = Path("out/reproduce")
SEEDS = range(11, 16)  # registered, with claims.py, before anything was run on them


# ---------------------------------------------------------------- what is trained


@dataclass
class Recipe:
    """A model that is trained: from whose weights, beside which bases (none: full fine-tuning), on
    which demonstrations.
    """

    start: str
    beside: Sequence[str] = ()
    data: str = "general"
    settings: dict = field(default_factory=dict)
    random: bool = False
    loss: str = "plain"  # or another of norm.py
    base_dtype: str | None = None  # of the bases, see rounding.py


# chosen on a family from another seed, by what a model scores on the base it was trained beside
VALUE = dict(
    lr=2e-3,
    batch_size=8,
    micro_batch_size=8,
    epochs=3,
    max_length=toy.CONTEXT,
    lam=0.0,
    norm_over="response",
)
FULL_RATES = {
    "xlarge": 5e-4,
    "other": 5e-4,
    "continued": 5e-4,
    "large": 5e-4,
    "medium": 5e-4,
    "small": 1e-3,
}
NORM = dict(lam=0.3)
STRENGTHS = (0.1, 0.3, 1.0)  # λ
HOME = ("small",)
RECIPES = {  # the long ones first
    **{f"{base} full": Recipe(base, settings=dict(lr=rate)) for base, rate in FULL_RATES.items()},
    **{
        f"{base} probe": Recipe(base, (base,), settings=dict(connection="probe"))
        for base in ("large", "medium", "small")
    },
    "medium": Recipe("medium", ("medium",)),
    "medium norm": Recipe("medium", ("medium",), settings=NORM),
    "random": Recipe("medium", HOME, random=True),
    "small": Recipe("small", HOME),
    "small norm": Recipe("small", HOME, settings=NORM),
    "small skill": Recipe("small", HOME, "skill"),
    "small int8": Recipe("small", HOME, base_dtype="int8"),
    "curriculum": Recipe("small", ("small", "medium", "large")),
    "cascade": Recipe("small", HOME, settings=dict(connection="cascade")),
    "cascade+": Recipe("small", HOME, settings=dict(connection="cascade+")),
    "other-small": Recipe("other-small", ("other-small",)),
    "expert": Recipe("small", settings=expert.SETTINGS),
    # the norm term and ours in its place, at other strengths
    **{
        f"{loss} {lam}": Recipe("small", HOME, settings=dict(lam=lam), loss=loss)
        for loss in ("plain", "centred", "warmed")
        for lam in STRENGTHS
        if (loss, lam) != ("plain", NORM["lam"])  # "small norm"
    },
}


def recipe_of(base: str, system: str) -> str:
    """The name of the recipe behind a row of a table. A base alone has a name, "BASE alone", but
    nothing to train.

    Example:
    >>> recipe_of("large", "full"), recipe_of("other", "small by bytes")
    ('large full', 'small')
    """
    if system in ("full", "probe", "alone"):
        return f"{base} {system}"
    system = system.removesuffix(BY_BYTES)
    return {"proxy": "expert", "same vocabulary": "other-small"}.get(system, system)


def map_of(base: str, system: str) -> str | None:
    """The method of the map between base and value model, see `VocabMap.make`; None: they need
    none. The paper's, Algorithm 1, unless the system's name says otherwise.
    """
    if base != "other" or RECIPES[recipe_of(base, system)].start.startswith("other"):
        return None
    return "bytes" if system.endswith(BY_BYTES) else "paper"


def watched_base(value: Connected, load_base: Callable[[], Llama]) -> Llama:
    return value.watched(load_base())


def family_of(out: Path, seed: int) -> Path:
    """The folder of a seed's bases, demonstrations and questions."""
    return out / f"seed{seed}" / "family"


def trained(name: str, seed: int, out: Path, device: torch.device) -> Path:
    """The directory of a trained model, trained first if it is not there."""
    directory = out / f"seed{seed}" / name.replace(" ", "-")
    if (directory / "README.md").exists():  # written last
        return directory
    recipe, bases = RECIPES[name], family_of(out, seed)
    settings = Settings(**{**VALUE, "seed": seed, **recipe.settings})

    # the model as it begins
    tokenizer = Tokenizer(bases / recipe.start)
    if settings.connection == "probe":
        value = Probe(read_config(bases / recipe.beside[0])).init_weights(seed).to(device)
    else:
        value = load(bases / recipe.start, device)
    if recipe.random:
        value.init_weights(1000 + seed)  # not those that the base began with

    # the bases beside it, which a connection has to watch
    network = frozen_network(recipe.base_dtype)
    loads = [partial(load, bases / base, device, network=network) for base in recipe.beside]
    if not loads:
        loads = [lambda: None]
    joined = value
    if settings.connection != "residual":
        joined = Connected(settings.connection, value)
        loads = [partial(watched_base, joined, load_base) for load_base in loads]

    reading = read_chats(bases / f"{recipe.data}.jsonl")
    chats = tokenize(reading, tokenizer, toy.CONTEXT)

    # what is peculiar to proxy tuning's expert, and to the norm term's study
    how = {}
    if name == "expert":
        how["measure"] = partial(expert.form_missed, tokenizer, reading.chats)
    if recipe.loss == "centred":
        how["batch_loss"] = norm.centred
    if recipe.loss == "warmed":
        how["batch_loss"] = norm.Warmed(steps=len(split(chats, settings)[1]))
    if name in NORM_STUDY:
        how["watch"] = norm.Parts(chats)

    train(Curriculum(*loads), joined, chats, settings, directory, name=name, **how)
    save_model(value, tokenizer, directory, ", ".join(recipe.beside) or None, settings)
    return directory


# ---------------------------------------------------------------- tables

SMALL, MEDIUM = ("small", "small norm", "small skill"), ("medium", "medium norm")
ACROSS = (*SMALL, "curriculum")  # value models that are plugged into a base of another vocabulary
BY_BYTES = " by bytes"  # there: through our map, not through Algorithm 1's
NORM_STUDY = (
    *("small", "plain 0.1", "small norm", "plain 1.0"),
    *(f"{loss} {lam}" for loss in ("centred", "warmed") for lam in STRENGTHS),
)
# scores and rows: base, system. A base alone stands where few-shot is asked, the one score that it
# has without having been trained to answer
TABLES = {
    "table1": (
        SCORES,
        [("small", system) for system in ("alone", "full", "small", "small norm")]
        + [
            (base, system)
            for base in ("medium", "large", "xlarge", "continued")
            for system in ("alone", "full", *SMALL, *MEDIUM)
        ],
    ),
    "table2": (
        SCORES[:4],
        [("xlarge", system) for system in ("alone", "small", "small norm", "curriculum")],
    ),
    "table4": (
        SCORES[:4],
        [("small", system) for system in ("alone", "small", "expert")]
        + [("medium", system) for system in ("alone", "small", "proxy")],
    ),
    "figure2": (
        SCORES[:2],
        [(base, system) for base in ("small", "medium", "large") for system in ("probe", "full")]
        + [("small", "random")],
    ),
    "figure3": (
        SCORES[:2],
        [
            (base, system)
            for base in ("small", "medium")
            for system in ("cascade", "cascade+", "small")
        ],
    ),
    "figure4": (
        SCORES[:2],
        [("other", system) for system in ("full", "same vocabulary", *ACROSS)]
        + [("other", system + BY_BYTES) for system in ACROSS],
    ),
    "norm": (
        ("form", "right", "few-shot"),
        [("small", "alone"), ("xlarge", "alone")]
        + [(base, system) for base in ("small", "xlarge") for system in NORM_STUDY],
    ),
}
# each claim's first direction, to be followed over scales; all but what table 3 measures
TABLES["headlines"] = (
    SCORES,
    [*dict.fromkeys(row for claim in claims.CLAIMS for row in claim.headline.rows())],
)
# bases that are made one after the other; the long ones first
GROUPS = (
    ("xlarge",),
    ("other",),
    ("medium", "continued"),
    ("other-small",),
    ("large",),
    ("small",),
)
LENGTHS = (128, 512, 1024)  # of table 3
COSTS = [
    ("small", "alone"),
    *(("medium", system) for system in ("alone", "small", "proxy")),
    *((base, system) for base in ("large", "xlarge") for system in ("alone", "small")),
]


def score(
    base: str, system: str, kinds: Sequence[str], seed: int, out: Path, device: torch.device
) -> dict[str, float]:
    """Scores of one row for one seed, those that seedN/RECIPE/scores.json already has and those
    that it will have then; a base alone keeps its own.
    """
    bases = family_of(out, seed)
    if system == "alone":
        directory = bases / base
    else:
        directory = trained(recipe_of(base, system), seed, out, device)
    kept = directory / "scores.json"
    scores = read_json(kept, TABLE) if kept.exists() else {}
    key = f"{system} on {base}"
    known = scores.get(key, {})
    missing = [kind for kind in kinds if kind not in known]
    if not missing:  # of table 3's row no scores are asked
        return known

    # base and value model, as they are joined
    connection, tokenizer = recorded_connection(directory), Tokenizer(directory)
    value = Probe.load(directory, device) if connection == "probe" else load(directory, device)
    if system in ("full", "alone", "expert"):  # this directory's model answers without another
        model, values = value, []
    else:
        model, value = connected(connection, load(bases / base, device), value)
        values = [value]
    alphas = [1.0]
    if system == "proxy":
        values.append(load(bases / "small", device))
        alphas.append(-1.0)
    method = map_of(base, system)
    if method is not None:
        documents = read_json(bases / "documents.json", LIST)
        mapping = VocabMap.make(Tokenizer(bases / "other"), tokenizer, documents, method)
        model = Mapped(model, mapping)

    scores[key] = known | family.score(
        model, values, tokenizer, bases, missing, alphas=alphas[: len(values)]
    )
    write_text(kept, json.dumps(scores, indent=2) + "\n")
    return scores[key]


def spread(values: list[float]) -> dict:
    """Example:
    >>> spread([0.25, 0.75])
    {'mean': 0.5, 'least': 0.25, 'most': 0.75, 'seeds': [0.25, 0.75]}
    """
    return {
        "mean": sum(values) / len(values),
        "least": min(values),
        "most": max(values),
        "seeds": values,
    }


def show(name: str, rows: list[dict], out: Path) -> None:
    """Prints a table and writes OUT/NAME.json and, where matplotlib is installed, OUT/NAME.png."""
    columns = [key for key in rows[0] if key not in ("base", "system")]

    def line(base: str, system: str, cells: list[str]) -> str:
        return f"{base:<11}{system:<22}" + "".join(f"{cell:<23}" for cell in cells).rstrip()

    print(f"\n{name}: mean (smallest to largest)")
    print(line("base", "system", columns))
    for row in rows:
        cells = ["{mean:.2f} ({least:.2f} to {most:.2f})".format(**row[key]) for key in columns]
        print(line(row["base"], row["system"], cells))
    write_text(out / f"{name}.json", json.dumps(rows, indent=2) + "\n")
    if name not in figures.TITLES:
        return
    try:
        figures.draw(name, rows, out / f"{name}.png")
    except ImportError:
        print(f"(no {name}.png: pip install matplotlib)")


def planned(names: Sequence[str]) -> dict[str, dict[tuple[str, str], list[str]]]:
    """Recipe → rows of these tables → scores; bases alone, for which nothing is trained, come last.
    Table 3 has no scores of its own, but needs a value model and an expert.
    """
    recipes: dict[str, dict[tuple[str, str], list[str]]] = {}
    for name in names:
        keys, rows = TABLES.get(name, ((), [("small", "small"), ("medium", "proxy")]))
        for row in rows:
            wanted = recipes.setdefault(recipe_of(*row), {}).setdefault(row, [])
            wanted += [key for key in keys if key not in wanted]
    alone = sorted(recipes.keys() - RECIPES.keys())
    return {name: recipes[name] for name in (*RECIPES, *alone) if name in recipes}


def scored(name: str, seeds: Sequence[int], out: Path, device: torch.device) -> list[dict]:
    """The rows of all tables but the third."""
    keys, rows = TABLES[name]
    table = []
    for base, system in rows:
        each = [score(base, system, keys, seed, out, device) for seed in seeds]
        spreads = {key: spread([scores[key] for scores in each]) for key in keys}
        table.append({"base": base, "system": system, **spreads})
    return table


def costs(seeds: Sequence[int], out: Path, device: torch.device) -> list[dict]:
    """The rows of table 3: greedy decoding of one sequence after 16 tokens; MB: weights, caches and
    all the rest. The models are those of the first seed; there are as many rounds as seeds.
    """

    def model(directory: Path) -> Llama:
        """Laid out as sample.py does it."""
        loaded = load(directory, device)
        return loaded if device.type == "cuda" else column_major(loaded)

    def decode(base: Llama, values: list[Llama], tokens: int) -> None:
        alphas = [1.0, -1.0][: len(values)]
        for _ in generate(base, values, [list(range(3, 19))], tokens, alphas=alphas):
            pass

    torch.set_num_threads(1)
    bases = {base: model(family_of(out, seeds[0]) / base) for base, _ in COSTS}
    value = model(trained("small", seeds[0], out, device))
    expert = model(trained("expert", seeds[0], out, device))
    beside = {"alone": [], "small": [value], "proxy": [expert, bases["small"]]}
    pairs = [(bases[base], beside[system]) for base, system in COSTS]
    rows: list[dict] = [{"base": base, "system": system} for base, system in COSTS]
    for tokens in tqdm(LENGTHS, desc="table3", unit=" lengths", disable=None):
        runs = [partial(decode, *pair, tokens) for pair in pairs]
        for row, pair, run in zip(rows, pairs, runs):
            loaded = {pair[0], *pair[1]}
            weights = sum(bench_sides.weight_bytes(model) for model in loaded)
            rest = bench_measure.watched(run, device)[0]
            row[f"MB {tokens}"] = spread([(weights + rest) / 1e6])

        # all take turns, since machines vary
        rounds = [[bench_measure.seconds(run, device) for run in runs] for _ in seeds]
        for row, *seconds in zip(rows, *rounds):
            row[f"seconds {tokens}"] = spread(seconds)
    return rows


# ---------------------------------------------------------------- the work, on all cores


def make_bases(
    names: Sequence[str], out: Path, scale: float, seed: int, device: torch.device
) -> None:
    world = family.prepare(out, scale, seed)
    for name in names:
        family.make_base(name, world, out, scale, seed, device)


def score_rows(
    rows: dict[tuple[str, str], list[str]], seed: int, out: Path, device: torch.device
) -> None:
    for (base, system), kinds in rows.items():
        score(base, system, kinds, seed, out, device)


def run(jobs: Sequence[partial], what: str, device: torch.device) -> None:
    """Each job on a core of its own: models this small do not gain from two. A GPU is given one job
    at a time.
    """
    workers = 1 if device.type == "cuda" else torch.get_num_threads()
    with (
        multiprocessing.get_context("spawn").Pool(workers, begin) as pool,
        tqdm(total=len(jobs), desc=what, unit=" jobs", disable=None) as bar,
    ):
        for _ in pool.imap_unordered(call, jobs):
            bar.update()


def begin() -> None:
    # no bars and lines of training: one bar is enough, and errors reach the parent
    sys.stdout = sys.stderr = open(os.devnull, "w")
    # the bars' usual lock is a semaphore, which a worker that is ended leaves behind
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that waits for the jobs


def call(job: partial) -> None:
    job()


def tables(
    names: Sequence[str], scale: float, seeds: Sequence[int], out: Path, device: torch.device
) -> None:
    """Makes all that these tables need, prints and writes them."""
    recipes = planned(names)

    # the bases that are asked about, begun from or trained beside
    needed = {base for rows in recipes.values() for base, _ in rows}
    for name in recipes.keys() & RECIPES.keys():
        needed |= {RECIPES[name].start, *RECIPES[name].beside}
    if "table3" in names:
        needed |= {base for base, _ in COSTS}
    if "continued" in needed:
        needed.add(family.CONTINUED_FROM)
    for seed in seeds:
        family.prepare(family_of(out, seed), scale, seed)
    groups = [[base for base in group if base in needed] for group in GROUPS]
    jobs = [
        partial(make_bases, group, family_of(out, seed), scale, seed, device)
        for group in groups
        if group
        for seed in seeds
    ]
    run(jobs, "bases", device)

    # each model is trained and scored
    jobs = [
        partial(score_rows, rows, seed, out, device) for rows in recipes.values() for seed in seeds
    ]
    run(jobs, "training and scoring", device)

    for name in names:
        if name == "table3":
            rows = costs(seeds, out, device)
        else:
            rows = scored(name, seeds, out, device)
        show(name, rows, out)
        if name == "norm":
            parts = {
                system: norm.mean_parts([trained(system, seed, out, device) for seed in seeds])
                for system in NORM_STUDY
            }
            write_text(out / "norm-parts.json", json.dumps(parts) + "\n")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TABLES, "table3"]
    parser.add_argument("name", choices=[*sorted(names), "all", "findings"])
    parser.add_argument("--out", type=Path, help=f"({OUT}; at full size {full_size.OUT})")
    parser.add_argument(
        "--scale",
        type=number(1e-3, 16),
        help="1 takes two CPU cores less than an hour; larger ones want a GPU (1)",
    )
    parser.add_argument(
        "--seeds",
        type=whole(1, 1000),
        help=f"families, each with trainings of its own ({len(SEEDS)}); with --commands trainings "
        "of each system (1)",
    )
    parser.add_argument(
        "--first_seed", type=SEED, help=f"the others are those that follow it ({SEEDS[0]})"
    )
    at_full_size = parser.add_mutually_exclusive_group()
    at_full_size.add_argument(
        "--commands",
        action="store_true",
        help="print a shell script that trains and evaluates real models and fills the table",
    )
    at_full_size.add_argument(
        "--fill",
        action="store_true",
        help="print what that script has measured so far, beside the paper's numbers",
    )
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps (auto)")
    args = parser.parse_args()
    chosen = [args.name] if args.name in names else []
    if args.name == "all":
        chosen = sorted(name for name in names if name != "headlines")
    if args.commands or args.fill:
        run_at_full_size(args, chosen)
        return
    out = args.out or OUT
    if chosen:
        device = pick_device(args.device or "auto")
        first = SEEDS[0] if args.first_seed is None else args.first_seed
        seeds = range(first, first + (args.seeds or len(SEEDS)))
        tables(chosen, args.scale or 1.0, seeds, out, device)
    if args.name in ("findings", "all"):
        claims.findings(out)


def run_at_full_size(args: argparse.Namespace, chosen: list[str]) -> None:
    """--commands or --fill. Raises InputError for options that are the miniature's."""
    option, others = "commands", ("scale", "device", "first_seed")
    if args.fill:
        option, others = "fill", ("scale", "device", "first_seed", "seeds")
    if not chosen:
        raise InputError(f"--{option}: {args.name} trains nothing; it reads tables")
    chosen = [name for name in chosen if name in full_size.TABLES]
    if not chosen:
        raise InputError(f"--{option}: {args.name} is of the miniature only")
    for other in given(args, *others):
        raise InputError(f"--{other} has no effect with --{option}; leave it out")
    out = args.out or full_size.OUT
    if args.fill:
        full_size.fill(chosen, out)
    else:
        print(*full_size.script(args.name, chosen, args.seeds or 1, out), sep="\n")


if __name__ == "__main__":
    command(main)
