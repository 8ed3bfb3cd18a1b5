"""The paper's claims, put to the tables of reproduce.py, direction by direction.

Registered: this file was written before anything was run on the seeds that it is put to
(`reproduce.SEEDS`), and before their families existed.

A claim is a list of directions. Each compares two cells, and what it expects is not ours to choose:

- Where the paper's tables have both cells, their numbers decide. `EQUAL` says how the cells
  correspond. Numbers within TIE of each other are *level*, else the left one is *above* or *below*.
- Where the paper has only bars or a sentence, the sentence is quoted, and we say what it asks:
  *above*, *below*, or *far below*, which is less than half.

A direction *holds* in a seed if our left cell is above, below, far below our right one, or, for
level, within LEVEL of it: to be ahead is not to be level. It *agrees* if it holds in every seed,
*disagrees* if it holds in none, and is *undecided* otherwise. Where both cells are below FLOOR in
every seed nothing was there to be compared, and it is *untested*. A direction may also compare
gains, differences between two systems (`over`), or shares of what a system scores (`of`).

The first directions of a claim, its `main` ones, are its sentence in the paper; the others are what
else the paper's numbers show about it. Its verdict is that of its main directions: it agrees if all
that were tested agree, disagrees if one disagrees, and is undecided otherwise.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from extras.benchmarks import COLUMNS, paper_rows
from plumbing.files import LIST, InputError, read_json, write_text

TIE = 0.02  # of the larger number: 4.62 and 4.65 of MT-Bench are level, 4.74 is above 4.62
LEVEL = 0.05  # of all questions: 15 of 300
FLOOR = 0.02
FAR = 0.5
ABOVE, BELOW, FAR_BELOW, LEVEL_WITH = "above", "below", "far below", "level with"
VERDICTS = ("agrees", "undecided", "disagrees", "untested")

# ours → the paper's. The few-shot columns are taken together, as the paper's heading does
EQUAL = {
    "small": "Tinyllama-1.1B",
    "medium": "Llama-2-7B",
    "large": "Llama-2-13B",
    "xlarge": "Llama-2-70B",
    "continued": "Codellama-7B",
}
EQUAL_SYSTEMS = {
    "full": "Full",
    "small": "1.1B",
    "small norm": "1.1B norm",
    "small skill": "1.1B infinity",
    "curriculum": "1.1B curriculum",
    "medium": "7B",
    "medium norm": "7B norm",
    "proxy": "1.1B - 1.1B, proxy tuning",
}
EQUAL_SCORES = {
    "right": COLUMNS[:1],  # MT-Bench
    "form": COLUMNS[1:2],  # IFEval
    "skill": COLUMNS[2:3],  # GSM8K
    "new": ("HumanEval",),
    "few-shot": COLUMNS[-5:],
}


@dataclass(frozen=True)
class Cell:
    """A score of a system on a base. over: less that of this system, on the same base; of: as a
    share of that of this system.
    """

    base: str
    system: str
    score: str
    over: str | None = None
    of: str | None = None

    def value(self, look_up) -> float:
        """look_up: (base, system, score) → number."""
        x = look_up(self.base, self.system, self.score)
        if self.over is not None:
            x -= look_up(self.base, self.over, self.score)
        if self.of is not None:
            whole = look_up(self.base, self.of, self.score)
            x = x / whole if whole else 0.0
        return x

    def __str__(self) -> str:
        """Example:
        >>> str(Cell("xlarge", "small norm", "few-shot", over="small"))
        'few-shot of small norm over small on xlarge'
        """
        over = f" over {self.over}" if self.over else ""
        of = f" as a share of {self.of}" if self.of else ""
        return f"{self.score} of {self.system}{over}{of} on {self.base}"


@dataclass(frozen=True)
class Direction:
    """left is `relation` right. paper: the two numbers, or the sentence, that say so."""

    left: Cell
    relation: str
    right: Cell
    paper: str
    main: bool

    def rows(self) -> list[tuple[str, str]]:
        """(base, system) of all that it looks at."""
        return [
            (cell.base, system)
            for cell in (self.left, self.right)
            for system in (cell.system, cell.over, cell.of)
            if system is not None
        ]

    def difference(self, look_up) -> float:
        return self.left.value(look_up) - self.right.value(look_up)

    def margin(self, look_up) -> float:
        """By how much it holds, in one seed; below zero it does not."""
        left, right = self.left.value(look_up), self.right.value(look_up)
        if self.relation == LEVEL_WITH:
            return LEVEL - abs(left - right)
        if self.relation == FAR_BELOW:
            return FAR * right - left
        return left - right if self.relation == ABOVE else right - left

    def holds(self, look_up) -> bool:
        """In one seed: equal is neither above nor below, but level."""
        margin = self.margin(look_up)
        return margin >= 0 if self.relation == LEVEL_WITH else margin > 0


@dataclass(frozen=True)
class Claim:
    number: int
    text: str
    where: str  # in the paper
    tables: tuple[str, ...]  # of reproduce.py
    directions: tuple[Direction, ...]

    @property
    def headline(self) -> Direction:
        """Of the main directions the one that is followed over scales, see figures.py."""
        return self.directions[0]


# ---------------------------------------------------------------- what the paper says


@cache
def reported() -> dict[tuple[str, str], dict[str, float]]:
    return paper_rows()


def paper_number(base: str, system: str, score: str) -> float:
    """What the paper's tables have in the place of one of our cells: a mean of its columns.

    Example:
    >>> paper_number("medium", "small", "right"), paper_number("medium", "small", "few-shot")
    (4.62, 47.64)
    """
    row = reported()[EQUAL[base], EQUAL_SYSTEMS[system]]
    columns = EQUAL_SCORES[score]
    return round(sum(row[column] for column in columns) / len(columns), 2)


def as_reported(left: Cell, right: Cell, main: bool = False) -> Direction:
    """The direction that the paper's numbers show.

    Gains are never level: TIE is a share of a score, and a gain is none.

    Example:
    >>> up = as_reported(Cell("large", "small", "right"), Cell("medium", "small", "right"))
    >>> up.relation, up.paper
    ('above', 'MT-Bench 4.74 and 4.62')
    """
    ours, theirs = left.value(paper_number), right.value(paper_number)
    relation = ABOVE if ours > theirs else BELOW
    if left.over is None and abs(ours - theirs) <= TIE * max(ours, theirs):
        relation = LEVEL_WITH
    columns = EQUAL_SCORES[left.score]
    name = columns[0] if len(columns) == 1 else "few-shot"
    return Direction(left, relation, right, f"{name} {ours:.4g} and {theirs:.4g}", main)


def as_said(left: Cell, relation: str, right: Cell, quote: str, main: bool = False) -> Direction:
    """A direction that is read off a sentence."""
    return Direction(left, relation, right, f"“{quote}”", main)


# ---------------------------------------------------------------- the claims


def versus(
    score: str, first: tuple[str, str], second: tuple[str, str], main: bool = False
) -> Direction:
    """Two systems by one score, each with its base: (base, system)."""
    return as_reported(Cell(*first, score), Cell(*second, score), main)


def on(bases: Sequence[str], first: str, second: str, score: str, main: bool = False):
    """Two systems by one score, on each of these bases."""
    return tuple(versus(score, (base, first), (base, second), main) for base in bases)


TRANSFER = ("medium", "large", "xlarge")  # bases that no small value model was trained beside
ALL = ("small", *TRANSFER, "continued")

# the probe
DROP = "more than a 3-point drop in MT-Bench scores"
STYLE = "successfully mimics the assistant's conversational style, it fails to effectively apply"
RANDOM = "marginally outperforms the shallow linear probe in instruction-following capabilities"
UNDER = "it still significantly underperforms compared to full fine-tuning"
# connections
TOKENS = "the token embedding serve as essential input features"
AT_HOME = "integrating logits from the base model slightly improves performance on the training"
MOVED = "when transferring to a larger backbone, there is a decrease in performance"
# vocabularies
ONLY = "only the curriculum-trained value model yielded acceptable generation ability"
STILL = "it still underperformed compared to same-vocabulary value models and full fine-tuning"
# costs
THIRD = "it does not require an additional 1B reference model during inference"

CLAIMS = [
    Claim(
        1,
        "A linear probe, and a value model from random weights, fall far short of full "
        "fine-tuning.",
        "§3.2, Figure 2",
        ("figure2",),
        (
            *(
                as_said(
                    Cell(base, "probe", "right"), FAR_BELOW, Cell(base, "full", "right"), DROP, True
                )
                for base in ("large", "medium", "small")
            ),
            as_said(
                Cell("small", "random", "right"), BELOW, Cell("small", "full", "right"), UNDER, True
            ),
            as_said(Cell("small", "random", "form"), ABOVE, Cell("small", "probe", "form"), RANDOM),
            *(
                as_said(
                    Cell(base, "probe", "form", of="full"),
                    ABOVE,
                    Cell(base, "probe", "right", of="full"),
                    STYLE,
                )
                for base in ("large", "medium", "small")
            ),
        ),
    ),
    Claim(
        2,
        "Cascade without text is much worse than cascade+, which is better than residual at home "
        "and worse after transfer.",
        "§5.4, Figure 3b",
        ("figure3",),
        (
            as_said(
                Cell("medium", "cascade+", "right"),
                BELOW,
                Cell("medium", "small", "right"),
                MOVED,
                True,
            ),
            *(
                as_said(
                    Cell(base, "cascade", "right"),
                    FAR_BELOW,
                    Cell(base, "cascade+", "right"),
                    TOKENS,
                    True,
                )
                for base in ("small", "medium")
            ),
            as_said(
                Cell("small", "cascade+", "right"), ABOVE, Cell("small", "small", "right"), AT_HOME
            ),
        ),
    ),
    Claim(
        3,
        "A value model carries over to larger bases; a larger one carries more; medium on large "
        "matches full fine-tuning.",
        "§5.4, Table 1",
        ("table1",),
        (
            versus("right", ("xlarge", "small"), ("small", "small"), True),
            versus("right", ("medium", "small"), ("small", "small"), True),
            versus("right", ("large", "small"), ("medium", "small"), True),
            versus("right", ("xlarge", "small"), ("large", "small"), True),
            *on(TRANSFER, "medium", "small", "right", True),
            *on(("large",), "medium", "full", "right", True),
            versus("right", ("large", "medium"), ("medium", "medium")),
            versus("right", ("xlarge", "medium"), ("large", "medium")),
            *on(("medium", "xlarge"), "medium", "full", "right"),
            *on(("small", *TRANSFER), "small", "full", "right"),
        ),
    ),
    Claim(
        4,
        "The norm term keeps more of a larger base's knowledge, most where the gap in size is "
        "widest, at a small cost in form.",
        "§5.4, Table 1",
        ("table1",),
        (
            *on(("xlarge", "large", "medium"), "small norm", "small", "few-shot", True),
            *(
                as_reported(
                    Cell("xlarge", "small norm", "few-shot", over="small"),
                    Cell(base, "small norm", "few-shot", over="small"),
                    True,
                )
                for base in ("medium", "large")
            ),
            *on(TRANSFER, "small norm", "small", "right", True),
            *on(("small", "continued"), "small norm", "small", "few-shot"),
            *on(("small", "continued"), "small norm", "small", "right"),
            *on(ALL, "small norm", "small", "form"),
            *on(TRANSFER, "small norm", "small", "skill"),
            *on(TRANSFER, "medium norm", "medium", "few-shot"),
            *on(TRANSFER, "medium norm", "medium", "right"),
        ),
    ),
    Claim(
        5,
        "A skill-heavy demonstration set lifts skill on bases that it was not trained on.",
        "§5.4, Table 1",
        ("table1",),
        (
            *on(("xlarge", "large", "medium"), "small skill", "small", "skill", True),
            *on(("xlarge", "large", "medium"), "small skill", "full", "skill", True),
            versus("skill", ("large", "small skill"), ("medium", "small skill")),
            versus("skill", ("xlarge", "small skill"), ("large", "small skill")),
            *on(("continued",), "small skill", "small", "skill"),
            *on(("continued",), "small skill", "full", "skill"),
            *on((*TRANSFER, "continued"), "small skill", "small", "right"),
            *on((*TRANSFER, "continued"), "small skill", "small", "few-shot"),
        ),
    ),
    Claim(
        6,
        "A continually pre-trained base keeps its new knowledge: ahead of its origin on its own "
        "skill, behind it on the rest.",
        "§5.4, Table 1",
        ("table1",),
        (
            versus("new", ("continued", "small"), ("medium", "small"), True),
            versus("right", ("continued", "small"), ("medium", "small"), True),
            *(
                versus("new", ("continued", system), ("medium", system))
                for system in ("small norm", "medium", "medium norm", "full")
            ),
            *(
                versus("right", ("continued", system), ("medium", system))
                for system in ("small norm", "medium", "medium norm", "full")
            ),
            *(
                versus("few-shot", ("continued", system), ("medium", system))
                for system in ("small", "small norm", "medium", "medium norm", "full")
            ),
        ),
    ),
    Claim(
        7,
        "A curriculum over bases helps as the norm term does, and not more.",
        "§6, Table 2",
        ("table2",),
        (
            *on(("xlarge",), "curriculum", "small", "few-shot", True),
            *on(("xlarge",), "curriculum", "small", "right", True),
            *on(("xlarge",), "small norm", "small", "few-shot", True),
            *on(("xlarge",), "curriculum", "small norm", "few-shot", True),
            *on(("xlarge",), "curriculum", "small norm", "right"),
            *on(("xlarge",), "curriculum", "small", "form"),
            *on(("xlarge",), "curriculum", "small norm", "form"),
            *on(("xlarge",), "curriculum", "small", "skill"),
            *on(("xlarge",), "curriculum", "small norm", "skill"),
        ),
    ),
    Claim(
        8,
        "Across vocabularies, through Algorithm 1, only the curriculum's value model works, below "
        "same-vocabulary ones.",
        "§6, Figure 4",
        ("figure4",),
        (
            *(
                as_said(
                    Cell("other", system, "form"),
                    FAR_BELOW,
                    Cell("other", "curriculum", "form"),
                    ONLY,
                    True,
                )
                for system in ("small", "small norm", "small skill")
            ),
            *(
                as_said(
                    Cell("other", "curriculum", "right"),
                    BELOW,
                    Cell("other", system, "right"),
                    STILL,
                    True,
                )
                for system in ("same vocabulary", "full")
            ),
            *(
                as_said(
                    Cell("other", "curriculum", "form"), BELOW, Cell("other", system, "form"), STILL
                )
                for system in ("same vocabulary", "full")
            ),
        ),
    ),
    Claim(
        9,
        "Level with proxy tuning, at two models instead of three.",
        "Appendix D, Table 4",
        ("table4", "table3"),
        (
            *on(("medium",), "small", "proxy", "right", True),
            *on(("medium",), "small", "proxy", "few-shot", True),
            as_said(
                Cell("medium", "small", "seconds 1024"),
                BELOW,
                Cell("medium", "proxy", "seconds 1024"),
                THIRD,
                True,
            ),
        ),
    ),
]


# ---------------------------------------------------------------- what ours say


def verdict(held: Sequence[bool]) -> str:
    """Of a direction. held: whether it holds, in each seed.

    Example:
    >>> verdict([True, True]), verdict([True, False]), verdict([False, False])
    ('agrees', 'undecided', 'disagrees')
    """
    if all(held):
        return "agrees"
    return "undecided" if any(held) else "disagrees"


def together(verdicts: Sequence[str]) -> str:
    """Of a claim, from its main directions'.

    Example:
    >>> together(["agrees", "untested"]), together(["agrees", "undecided"]), together(["untested"])
    ('agrees', 'undecided', 'untested')
    >>> together(["agrees", "disagrees", "undecided"])
    'disagrees'
    """
    tested = {verdict for verdict in verdicts if verdict != "untested"}
    if not tested:
        return "untested"
    if tested == {"agrees"}:
        return "agrees"
    return "disagrees" if "disagrees" in tested else "undecided"


def weigh(direction: Direction, rows: dict[tuple[str, str], dict]) -> dict:
    """What our rows say of a direction: our two means, in how many seeds it holds, its verdict.

    rows: (base, system) → score → spread, see `reproduce.spread`.
    """
    cells = direction.left, direction.right
    used = [
        rows[cell.base, system][cell.score]
        for cell in cells
        for system in (cell.system, cell.over, cell.of)
        if system is not None
    ]
    seeds = len(used[0]["seeds"])

    def seed(number: int):
        return lambda base, system, score: rows[base, system][score]["seeds"][number]

    held = [direction.holds(seed(number)) for number in range(seeds)]
    left, right = (
        sum(cell.value(seed(number)) for number in range(seeds)) / seeds for cell in cells
    )
    found = verdict(held)
    if all(spread["most"] < FLOOR for spread in used):
        found = "untested"
    return {
        "left": str(direction.left),
        "relation": direction.relation,
        "right": str(direction.right),
        "paper": direction.paper,
        "main": direction.main,
        "ours": [left, right],
        "differences": [direction.difference(seed(number)) for number in range(seeds)],
        "holds": sum(held),
        "seeds": seeds,
        "verdict": found,
    }


def read_rows(names: Sequence[str], out: Path) -> dict[tuple[str, str], dict]:
    """The rows of tables together, by base and system. Raises InputError."""
    rows: dict[tuple[str, str], dict] = {}
    for name in names:
        path = out / f"{name}.json"
        if not path.exists():
            raise InputError(f"{path}: is not there; run reproduce.py {name} first")
        for row in read_json(path, LIST):
            rows.setdefault((row["base"], row["system"]), {}).update(row)
    return rows


def findings(out: Path) -> None:
    """Prints the claims and writes OUT/findings.json, from the tables that are there."""
    results = []
    for claim in CLAIMS:
        rows = read_rows(claim.tables, out)
        weighed = [weigh(direction, rows) for direction in claim.directions]
        found = together([each["verdict"] for each in weighed if each["main"]])
        results.append(
            {
                "claim": claim.number,
                "text": claim.text,
                "where": claim.where,
                "verdict": found,
                "directions": weighed,
            }
        )

        print(f"{claim.number}. {claim.text} ({claim.where}): {found}")
        for each in weighed:
            mark = "*" if each["main"] else " "
            left, right = each["ours"]
            print(
                f" {mark} {each['left']} {each['relation']} {each['right']}\n"
                f"     paper: {each['paper']}; ours: {left:.2f} and {right:.2f}, holds in "
                f"{each['holds']} of {each['seeds']} seeds: {each['verdict']}"
            )
        print()
    write_text(out / "findings.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
