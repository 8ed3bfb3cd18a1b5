"""Pictures of reproduce.py's tables: grouped bars as in the paper, a system in the same colour
everywhere.

    python experiments/figures.py              # those of experiments/results, drawn again
    python experiments/figures.py --out DIR    # those of another --out of reproduce.py

Nothing is measured: NAME.png is drawn from NAME.json.

A table's rows, one for each base and system, hold for each score its mean, smallest and largest
over the seeds. With several bases each score has a panel, where bars stand by base; with a single
base all bars stand in one panel, by score. A score that is 0 for all systems is left out, and the
caption says so, as it says what the other scores mean. Table 1 has so many bars that full
fine-tuning and the base alone are lines across them. Table 3 measures costs, and gets lines over
the number of tokens. Only this file needs matplotlib.
"""

import argparse
import importlib.util
import math
import sys
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))
from plumbing.files import LIST, InputError, Parser, command, read_json, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "figure2": "Figure 2, in miniature: a linear probe and random weights against full fine-tuning",
    "figure3": "Figure 3, in miniature: three connections, at home and transferred",
    "figure4": "Figure 4, in miniature: a base with another tokenizer",
    "table1": "Table 1, in miniature: value models beside every base of the family",
    "table2": "Table 2, in miniature: norm term and curriculum beside the largest base",
    "table3": "Table 3, in miniature: what a small value model costs",
    "table4": "Table 4, in miniature: one value model against proxy tuning's two",
}
MEANINGS = {  # of scores and costs, for the captions
    "form": "the reply has the form asked for, whatever it says",
    "right": "form and fact",
    "skill": "the reply to a two-step question holds the second step's fact",
    "few-shot": "a fact is completed after three others, as plain text without a chat",
    "new": "right, about people of whom only the base “continued” has read",
    "MB": "weights, caches and all the rest",
    "seconds": "greedy decoding of one text after 16 tokens",
}
SYSTEMS = {  # in the order of bars; those of one picture differ to colour-blind eyes as well
    "alone": ("#222222", "base alone"),
    "probe": ("#aa4499", "linear probe"),
    "random": ("#806b00", "random weights"),
    "full": ("#bbbbbb", "full fine-tuning"),
    "same vocabulary": ("#e0c01f", "same vocabulary"),
    "cascade": ("#e8a5cb", "cascade"),
    "cascade+": ("#96305f", "cascade+"),
    "residual": ("#0072b2", "residual"),
    "small": ("#0072b2", "small value model"),
    "small norm": ("#6cc0ee", "small, norm term"),
    "small skill": ("#005f3c", "small, skill"),
    "curriculum": ("#b0344d", "curriculum"),
    "medium": ("#c44e00", "medium value model"),
    "medium norm": ("#f2b134", "medium, norm term"),
    "proxy": ("#b07030", "proxy tuning"),
    "expert": ("#7f3b08", "proxy tuning's expert"),
    "small by bytes": ("#56b4e9", "small, our map"),
    "small norm by bytes": ("#a6dcf5", "small, norm term, our map"),
    "small skill by bytes": ("#5fb58c", "small, skill, our map"),
    "curriculum by bytes": ("#e58aa0", "curriculum, our map"),
}
# systems that table 1 has as lines across a base's bars: style, colour, width of a white rim
LINES = {"full": ("--", "#555555", 0), "alone": (":", "#000000", 4)}
WIDTH = 136  # of a caption, in characters
BASES = {"small": "#440154", "medium": "#31688e", "large": "#35b779", "xlarge": "#e69f00"}


def spread(scores: list[dict]) -> tuple[list[float], list[list[float]]]:
    """Means, and how far the seeds reach below and above them."""
    means = [score["mean"] for score in scores]
    # rounding can put a mean past all seeds
    below = [max(score["mean"] - score["least"], 0) for score in scores]
    above = [max(score["most"] - score["mean"], 0) for score in scores]
    return means, [below, above]


def bars(
    axes, groups: dict[str, dict[str, dict]], inches: float, lines: Collection[str] = ()
) -> None:
    """groups: group → system → score. A group's bars stand side by side; the systems `lines` are
    lines across them.
    """
    from matplotlib.patheffects import withStroke

    # which bars a group has, in the order of SYSTEMS
    there = {system for group in groups.values() for system in group}
    systems = sorted(there, key=[*SYSTEMS].index)
    shown = [
        [system for system in systems if system in group and system not in lines]
        for group in groups.values()
    ]
    width = 0.84 / max(1, *map(len, shown))
    size = min(10, 26 * inches * width / len(groups))  # of numbers no wider than their bars

    for system in systems:
        colour, label = SYSTEMS[system]
        at = [i for i, group in enumerate(groups.values()) if system in group]
        scores = [group[system] for group in groups.values() if system in group]
        means, errors = spread(scores)

        # a line in each group, on a band from the least to the most
        if system in lines:
            style, black, rim = LINES[system]
            left, right = [i - 0.46 for i in at], [i + 0.46 for i in at]
            drawn = axes.hlines(means, left, right, black, style, label=label, clip_on=False)
            drawn.set(zorder=3, path_effects=[withStroke(linewidth=rim, foreground="white")])
            least = [score["least"] for score in scores]
            heights = [score["most"] - score["least"] for score in scores]
            axes.bar(at, heights, 0.92, least, color=colour, alpha=0.4)
            continue

        # a bar in each group, the group's bars about its middle
        at = [i + width * (shown[i].index(system) - (len(shown[i]) - 1) / 2) for i in at]
        drawn = axes.bar(
            at,
            means,
            0.94 * width,
            yerr=errors,
            color=colour,
            label=label,
            error_kw={"elinewidth": 1.2},
        )
        if size >= 6 and not lines:
            axes.bar_label(drawn, fmt="%.2f", padding=1, fontsize=size)
    axes.set(ylim=(0, 1), xlim=(-0.5, len(groups) - 0.5))
    axes.set_xticks(range(len(groups)), groups, fontsize=min(11, 15 * inches / len(groups)))


def costs(axes, rows: list[dict], unit: str) -> None:
    """Lines over the number of tokens, from the scores named "UNIT TOKENS"; the largest base comes
    first.
    """

    def size(row: dict) -> tuple[int, bool]:
        """By base, and beside a value model a base costs more than alone."""
        return [*BASES].index(row["base"]), row["system"] != "alone"

    every = sorted({int(key.split()[1]) for row in rows for key in row if key.startswith(unit)})
    for row in sorted(rows, key=size, reverse=True):
        tokens = [n for n in every if f"{unit} {n}" in row]
        means, errors = spread([row[f"{unit} {n}"] for n in tokens])
        colour = BASES[row["base"]]
        style, label = "o-", f"{row['base']} + {row['system']}"
        if row["system"] == "alone":
            style, label = "o--", f"{row['base']} alone"
        elif row["system"] == "proxy":
            style = "o:"
        axes.plot(tokens, means, style, color=colour, label=label)
        axes.errorbar(tokens, means, errors, fmt="none", ecolor=colour, elinewidth=1)
    axes.set(ylim=(0, None), xlabel="tokens", xticks=every)


def panels_of(name: str, rows: list[dict]) -> dict[str, dict[str, dict[str, dict]]]:
    """Panel → group → system → score, for a table's picture.

    Example: one base, so its two scores stand in one panel
    >>> panels_of("table2", [{"base": "large", "system": "small", "form": {}, "right": {}}])
    {'base: large': {'form': {'small': {}}, 'right': {'small': {}}}}
    """
    panels: dict[str, dict] = {}
    single = len({row["base"] for row in rows}) == 1
    for row in rows:
        base, system = row["base"], row["system"]
        for key, score in row.items():
            if name == "table3" and " " in key:
                panels[key.split()[0]] = {}  # its groups are not asked for
                continue
            if not isinstance(score, dict):
                continue
            if single:
                panels.setdefault(f"base: {base}", {}).setdefault(key, {})[system] = score
            elif key != "new" or base == "continued":  # no other base has read of the new people
                panels.setdefault(key, {}).setdefault(base, {})[system] = score
    return panels


def caption(name: str, shown: Sequence[str], zero: Sequence[str]) -> str:
    """How to read a table's picture: what its marks are, what the scores that it shows mean, and
    which scores it has left out since they are 0 for all systems.

    Example:
    >>> print(caption("table4", ["form"], ["right"]))
    Bars: means over the seeds; thin lines: from the smallest to the largest.
    form: the reply has the form asked for, whatever it says.
    right (form and fact): 0 for all, left out.
    """
    marks = "Bars: means over the seeds; thin lines: from the smallest to the largest."
    if name == "table1":
        marks = "Bars, dashes and dots: means over the seeds; thin lines and bands: from the "
        marks += "smallest to the largest."
    if name == "table3":
        marks = "Dots: means over rounds; thin lines: from the smallest to the largest."

    parts = [marks, "; ".join(f"{key}: {MEANINGS[key]}" for key in shown) + "."]
    for key in zero:
        parts.append(f"{key} ({MEANINGS[key]}): 0 for all, left out.")
    return "\n".join(textwrap.fill(part, WIDTH) for part in parts)


def figure(name: str, rows: list[dict]) -> "Figure":
    """The picture of a table."""
    from matplotlib.figure import Figure

    if name == "figure3":  # it compares connections, and a value model's is residual
        rows = [row | {"system": row["system"].replace("small", "residual")} for row in rows]

    # scores that are 0 for all would leave a panel, or a place in it, empty
    scores = [key for key in rows[0] if isinstance(rows[0][key], dict)]
    zero = [key for key in scores if not any(row[key]["most"] for row in rows if key in row)]
    if len(zero) == len(scores):
        zero = []
    rows = [{key: x for key, x in row.items() if key not in zero} for row in rows]
    panels = panels_of(name, rows)

    # the panels, three in a row or two by two, and a strip for the caption
    shown = [key for key in MEANINGS if any(x.split()[0] == key for row in rows for x in row)]
    below = caption(name, shown, zero)
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    height, strip = 4.8, 0.2 + 0.18 * (below.count("\n") + 1)
    if len(panels) > columns:
        height = 7
    picture = Figure((10, height + strip), dpi=150, layout="constrained")
    picture.get_layout_engine().set(h_pad=0.08)  # inches
    body, foot = picture.subfigures(2, 1, height_ratios=(height, strip))
    foot.text(0.012, 0.95, below, va="top", fontsize=10, color="#333333", linespacing=1.3)
    grid = body.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).ravel()

    for axes, (title, groups) in zip(grid, panels.items()):
        if name == "table3":
            costs(axes, rows, title)
        else:
            bars(axes, groups, 8.6 / columns, LINES if name == "table1" else ())
        axes.set_title(title, loc="left", fontsize=12, pad=6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd")
        axes.set_axisbelow(True)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    # a bar's number, above the seeds' line, stays below the title
    if name not in ("table1", "table3"):
        highest = max(row[key]["most"] for row in rows for key in shown if key in row)
        for axes in grid:
            axes.set_ylim(0, max(1, highest + 0.05))

    body.suptitle(TITLES[name], x=0.01, ha="left", fontsize=14)
    if name != "table3":
        body.supylabel("share of the questions", fontsize=10, color="#333333")

    # one legend for all panels, where a panel is missing if there is such a place
    legend = {
        label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels())
    }
    if len(panels) < len(grid):
        grid[-1].legend(legend.values(), legend, loc="center", frameon=False, fontsize=11)
    else:
        body.legend(
            legend.values(),
            legend,
            loc="outside lower center",
            ncols=len(legend) if len(legend) <= 5 else min(4, math.ceil(len(legend) / 2)),
            frameon=False,
            fontsize=11,
        )
    return picture


def draw(name: str, rows: list[dict], path: Path) -> None:
    """Writes the picture of a table as a PNG, whole or not at all."""
    picture = figure(name, rows)
    with replacing(path) as temporary:
        picture.savefig(temporary, format="png")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out = parser.parse_args().out
    names = [name for name in TITLES if (out / f"{name}.json").exists()]
    if not names:
        raise InputError(f"{out}: holds no table of reproduce.py")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("matplotlib is not installed: pip install -r requirements-dev.txt")
    for name in names:
        draw(name, read_json(out / f"{name}.json", LIST), out / f"{name}.png")
        print(out / f"{name}.png")


if __name__ == "__main__":
    command(main)
