"""Pictures of reproduce.py's tables: grouped bars as in the paper, a system in the same colour
everywhere.

A table's rows, one for each base and system, hold for each score its mean, smallest and largest
over the seeds. With several bases each score has a panel, where bars stand by base; with a single
base all bars stand in one panel, by score. Table 3 measures costs, and gets lines over the number
of tokens. Only this file needs matplotlib.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from files import replacing

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
SYSTEMS = {  # in the order of bars; those of one picture differ to colour-blind eyes as well
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
}
BASES = {"small": "#440154", "medium": "#31688e", "large": "#35b779", "xlarge": "#e69f00"}


def spread(scores: list[dict]) -> tuple[list[float], list[list[float]]]:
    """Means, and how far the seeds reach below and above them."""
    means = [score["mean"] for score in scores]
    # rounding can put a mean past all seeds
    below = [max(score["mean"] - score["least"], 0) for score in scores]
    above = [max(score["most"] - score["mean"], 0) for score in scores]
    return means, [below, above]


def bars(axes, groups: dict[str, dict[str, dict]], inches: float, line: str = "") -> None:
    """groups: group → system → score. A group's bars stand side by side; the system `line` is
    dashed across them.
    """
    # which bars a group has, in the order of SYSTEMS
    there = {system for group in groups.values() for system in group}
    systems = sorted(there, key=[*SYSTEMS].index)
    shown = [
        [system for system in systems if system in group and system != line]
        for group in groups.values()
    ]
    width = 0.84 / max(1, *map(len, shown))
    size = min(10, 26 * inches * width / len(groups))  # of numbers no wider than their bars

    for system in systems:
        colour, label = SYSTEMS[system]
        at = [i for i, group in enumerate(groups.values()) if system in group]
        scores = [group[system] for group in groups.values() if system in group]
        means, errors = spread(scores)

        # a dashed line in each group, on a band from the least to the most
        if system == line:
            left, right = [i - 0.46 for i in at], [i + 0.46 for i in at]
            axes.hlines(means, left, right, "#555555", "--", label=label, clip_on=False)
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
        if size >= 6 and not line:
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


def figure(name: str, rows: list[dict]) -> "Figure":
    """The picture of a table."""
    from matplotlib.figure import Figure

    if name == "figure3":  # it compares connections, and a value model's is residual
        rows = [row | {"system": row["system"].replace("small", "residual")} for row in rows]

    # the panels, three in a row
    panels = panels_of(name, rows)
    columns = min(len(panels), 3)
    picture = Figure((10, 4.8 if len(panels) <= columns else 7), dpi=150, layout="constrained")
    grid = picture.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).ravel()
    for axes, (title, groups) in zip(grid, panels.items()):
        if name == "table3":
            costs(axes, rows, title)
        else:
            bars(axes, groups, 8.6 / columns, "full" if name == "table1" else "")
        axes.set_title(title, loc="left", fontsize=12, pad=20)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd")
        axes.set_axisbelow(True)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    picture.suptitle(TITLES[name], x=0.01, ha="left", fontsize=14)
    picture.supylabel("mean, and range over the seeds", fontsize=9, color="#555555")

    # one legend for all panels, where a panel is missing if there is such a place
    legend = {
        label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels())
    }
    if len(panels) < len(grid):
        grid[-1].legend(legend.values(), legend, loc="center", frameon=False, fontsize=11)
    else:
        picture.legend(
            legend.values(),
            legend,
            loc="outside lower center",
            ncols=4 if len(legend) > 5 else 5,
            frameon=False,
            fontsize=11,
        )
    return picture


def draw(name: str, rows: list[dict], path: Path) -> None:
    """Writes the picture of a table as a PNG, whole or not at all."""
    picture = figure(name, rows)
    with replacing(path) as temporary:
        picture.savefig(temporary, format="png")
