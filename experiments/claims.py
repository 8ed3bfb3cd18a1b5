"""The paper's claims, put to the tables of reproduce.py.

A claim is a list of comparisons. It *agrees* if each holds in every seed, *disagrees* if one of
them holds in no seed, and is *undecided* otherwise. "far" or "much" less is less than half, "level"
or "small cost" a difference of at most 0.05.
"""

import json
from functools import partial
from pathlib import Path

from experiments.family import SCORES
from files import LIST, InputError, read_json, write_text

FAR, LEVEL = 0.5, 0.05
# number, text, the paper's numbers, tables, comparisons; v(base, system, score) is one seed's
CLAIMS = [
    (
        1,
        "A linear probe, and a value model from random weights, fall far short of full "
        "fine-tuning.",
        "Figure 2: more than 3 points of MT-Bench",
        ["figure2"],
        [
            lambda v: v("small", "probe", "right") < FAR * v("small", "full", "right"),
            lambda v: v("medium", "probe", "right") < FAR * v("medium", "full", "right"),
            lambda v: v("large", "probe", "right") < FAR * v("large", "full", "right"),
            lambda v: v("small", "random", "right") < FAR * v("small", "full", "right"),
        ],
    ),
    (
        2,
        "Cascade without text is much worse than cascade+; cascade+ is no better than residual "
        "after transfer.",
        "Figure 3, bars of MT-Bench",
        ["figure3"],
        [
            lambda v: v("small", "cascade", "right") < FAR * v("small", "cascade+", "right"),
            lambda v: v("large", "cascade", "right") < FAR * v("large", "cascade+", "right"),
            lambda v: v("large", "small", "right") - v("large", "cascade+", "right") > -LEVEL,
        ],
    ),
    (
        3,
        "A value model carries over to larger bases; a larger one carries more; medium on large "
        "matches full fine-tuning.",
        "Table 1, MT-Bench: 1.1B on 7B, 13B, 70B 4.62, 4.74, 4.92 (on 1.1B 3.62); 7B on 13B 6.34, "
        "full 6.23",
        ["table1"],
        [
            lambda v: v("medium", "small", "right") > v("small", "small", "right"),
            lambda v: v("large", "small", "right") > v("medium", "small", "right"),
            lambda v: v("xlarge", "small", "right") > v("large", "small", "right"),
            lambda v: v("large", "medium", "right") > v("large", "small", "right"),
            lambda v: v("xlarge", "medium", "right") > v("xlarge", "small", "right"),
            lambda v: v("large", "medium", "right") - v("large", "full", "right") > -LEVEL,
        ],
    ),
    (
        4,
        "The norm term keeps more of a larger base's knowledge, most where the gap in size is "
        "widest, at a small cost in form.",
        "Table 1, ARC of 1.1B on 7B 42.7 → 48.5, on 70B 52.6 → 62.8; MT-Bench 4.62 → 4.55, "
        "4.92 → 5.37",
        ["table1"],
        [
            lambda v: v("medium", "small norm", "few-shot") > v("medium", "small", "few-shot"),
            lambda v: v("xlarge", "small norm", "few-shot") > v("xlarge", "small", "few-shot"),
            lambda v: (
                v("xlarge", "small norm", "few-shot") - v("xlarge", "small", "few-shot")
                > v("medium", "small norm", "few-shot") - v("medium", "small", "few-shot")
            ),
            lambda v: v("xlarge", "small norm", "form") - v("xlarge", "small", "form") > -LEVEL,
        ],
    ),
    (
        5,
        "A skill-heavy demonstration set lifts skill on bases that it was not trained on.",
        "Table 1, GSM8K of 1.1B infinity on 7B, 13B, 70B: 27.2, 30.3, 44 (general set 4.7, 6.67, "
        "12.4; full 10.6, 18.7, 35.6)",
        ["table1"],
        [
            lambda v: v("medium", "small skill", "skill") > v("medium", "small", "skill"),
            lambda v: v("large", "small skill", "skill") > v("large", "small", "skill"),
            lambda v: v("xlarge", "small skill", "skill") > v("xlarge", "small", "skill"),
            lambda v: v("xlarge", "small skill", "skill") > v("xlarge", "full", "skill"),
        ],
    ),
    (
        6,
        "On a continually pre-trained base its own new knowledge survives and answers in the "
        "demonstrated form.",
        "Table 1, CodeLlama with 1.1B: HumanEval 24 (on Llama-2-7B 11.3), MT-Bench 3.94 (4.62)",
        ["table1"],
        [
            lambda v: v("large", "small", "new") < FAR * v("continued", "small", "new"),
            lambda v: v("continued", "small", "new") - v("continued", "small", "right") > -LEVEL,
            lambda v: v("continued", "small", "form") - v("large", "small", "form") > -LEVEL,
        ],
    ),
    (
        7,
        "A curriculum over bases helps as the norm term does.",
        "Table 2, 70B: ARC 52.6, norm 62.8, curriculum 57.7; MT-Bench 4.92, 5.37, 5.14",
        ["table2"],
        [
            lambda v: v("xlarge", "small norm", "few-shot") > v("xlarge", "small", "few-shot"),
            lambda v: v("xlarge", "curriculum", "few-shot") > v("xlarge", "small", "few-shot"),
            lambda v: v("xlarge", "curriculum", "right") > v("xlarge", "small", "right"),
        ],
    ),
    (
        8,
        "Across vocabularies it works, below same-vocabulary value models.",
        "Figure 4, bars of MT-Bench; only the curriculum's value model worked",
        ["figure4"],
        [
            lambda v: (
                v("other", "curriculum", "form") > FAR * v("other", "same vocabulary", "form")
            ),
            lambda v: (
                v("other", "curriculum", "right") > FAR * v("other", "same vocabulary", "right")
            ),
            lambda v: v("other", "same vocabulary", "right") > v("other", "curriculum", "right"),
        ],
    ),
    (
        9,
        "Level with proxy tuning, at two models instead of three; the pair costs at most what the "
        "paper's does.",
        "Table 4, 7B: MT-Bench 4.62 against 4.65, ARC 42.7 against 40; Table 3: 1024 tokens in "
        "2.25 of the base's time alone",
        ["table4", "table3"],
        [
            lambda v: abs(v("medium", "small", "right") - v("medium", "proxy", "right")) <= LEVEL,
            lambda v: (
                abs(v("medium", "small", "few-shot") - v("medium", "proxy", "few-shot")) <= LEVEL
            ),
            lambda v: (
                v("medium", "small", "seconds 1024") <= 2.25 * v("medium", "alone", "seconds 1024")
            ),
        ],
    ),
]


def verdict(held: list[list[bool]]) -> str:
    """Of a claim, by the rule above. held: for each comparison, whether it holds in each seed.

    Example: two comparisons, two seeds; the second holds in one of them
    >>> verdict([[True, True], [False, True]])
    'undecided'
    """
    if all(map(all, held)):
        return "agrees"
    if all(map(any, held)):
        return "undecided"
    return "disagrees"


def findings(out: Path) -> None:
    """Prints the claims and writes OUT/findings.json, from the tables that are there."""
    results = []
    for number, text, paper, names, comparisons in CLAIMS:
        # the rows of all its tables, by base and system
        rows: dict[tuple[str, str], dict] = {}
        for name in names:
            path = out / f"{name}.json"
            if not path.exists():
                raise InputError(f"{path}: is not there; run reproduce.py {name} first")
            for row in read_json(path, LIST):
                rows.setdefault((row["base"], row["system"]), {}).update(row)
        seeds = min(
            len(score["seeds"])
            for row in rows.values()
            for key, score in row.items()
            if key in SCORES
        )

        # each comparison in each seed; what they look at is noted, in their order
        read = {}

        def value(seed: int, base: str, system: str, key: str) -> float:
            score = rows[base, system][key]
            read[base, system, key] = score["mean"]
            return score["seeds"][seed]

        held = []
        for comparison in comparisons:
            held.append([bool(comparison(partial(value, seed))) for seed in range(seeds)])

        # in words
        numbers = [f"{system} on {base}: {key} {x:.2f}" for (base, system, key), x in read.items()]
        counts = ", ".join(str(sum(each)) for each in held)
        ours = f"{'; '.join(numbers)}. The comparisons hold in {counts} of {seeds} seeds"
        results.append(
            {"claim": number, "text": text, "paper": paper, "ours": ours, "verdict": verdict(held)}
        )
        print(f"{number}. {text}\n   paper: {paper}\n   ours:  {ours}\n   {verdict(held)}\n")
    write_text(out / "findings.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
