"""Pictures of reproduce.py's tables: grouped bars as in the paper, a system in the same colour everywhere.

A table's rows, one for each base and system, hold for each score its mean, smallest and largest over the seeds. With
several bases each score has a panel, where bars stand by base; with a single base all bars stand in one panel, by
score. Table 3 measures costs, and gets lines over the number of tokens. Only this file needs matplotlib.
"""

import math
from pathlib import Path

from files import replacing

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
    "probe": ("#aa4499", "linear probe"), "random": ("#806b00", "random weights"),
    "full": ("#bbbbbb", "full fine-tuning"), "same vocabulary": ("#e0c01f", "same vocabulary"),
    "cascade": ("#e8a5cb", "cascade"), "cascade+": ("#96305f", "cascade+"), "residual": ("#0072b2", "residual"),
    "small": ("#0072b2", "small value model"), "small norm": ("#6cc0ee", "small, norm term"),
    "small skill": ("#005f3c", "small, skill"), "curriculum": ("#b0344d", "curriculum"),
    "medium": ("#c44e00", "medium value model"), "medium norm": ("#f2b134", "medium, norm term"),
    "proxy": ("#b07030", "proxy tuning"),
}
BASES = {"small": "#440154", "medium": "#31688e", "large": "#35b779", "xlarge": "#e69f00"}


def spread(scores: list[dict]) -> tuple[list[float], list[list[float]]]:
    """Means, and how far the seeds reach below and above them."""
    return ([score["mean"] for score in scores],
            [[max(score["mean"] - score["least"], 0) for score in scores],  # rounding can put a mean past all seeds
             [max(score["most"] - score["mean"], 0) for score in scores]])


def bars(axes, groups: dict[str, dict[str, dict]], inches: float, line: str = "") -> None:
    """groups: group → system → score. A group's bars stand side by side; the system `line` is dashed across them."""
    systems = sorted({system for group in groups.values() for system in group}, key=[*SYSTEMS].index)
    shown = [[system for system in systems if system in group and system != line] for group in groups.values()]
    width = 0.84 / max(1, *map(len, shown))
    size = min(10, 26 * inches * width / len(groups))  # of numbers that are no wider than their bars
    for system in systems:
        colour, label = SYSTEMS[system]
        at = [i for i, group in enumerate(groups.values()) if system in group]
        scores = [group[system] for group in groups.values() if system in group]
        means, errors = spread(scores)
        if system == line:
            axes.hlines(means, [i - 0.46 for i in at], [i + 0.46 for i in at], "#555555", "--", label=label, clip_on=False)
            axes.bar(at, [score["most"] - score["least"] for score in scores], 0.92, [score["least"] for score in scores],
                     color=colour, alpha=0.4)
        else:
            at = [i + width * (shown[i].index(system) - (len(shown[i]) - 1) / 2) for i in at]
            drawn = axes.bar(at, means, 0.94 * width, yerr=errors, color=colour, label=label, error_kw={"elinewidth": 1.2})
            if size >= 6 and not line:
                axes.bar_label(drawn, fmt="%.2f", padding=1, fontsize=size)
    axes.set(ylim=(0, 1), xlim=(-0.5, len(groups) - 0.5))
    axes.set_xticks(range(len(groups)), groups, fontsize=min(11, 15 * inches / len(groups)))


def costs(axes, rows: list[dict], unit: str) -> None:
    """Lines over the number of tokens, from the scores named "UNIT TOKENS"; the largest base comes first."""
    every = sorted({int(key.split()[1]) for row in rows for key in row if key.startswith(unit)})
    for row in sorted(rows, key=lambda row: ([*BASES].index(row["base"]), row["system"] != "alone"), reverse=True):
        tokens = [n for n in every if f"{unit} {n}" in row]
        means, errors = spread([row[f"{unit} {n}"] for n in tokens])
        alone, colour = row["system"] == "alone", BASES[row["base"]]
        axes.plot(tokens, means, "o--" if alone else "o-", color=colour,
                  label=f"{row['base']} alone" if alone else f"{row['base']} + {row['system']}")
        axes.errorbar(tokens, means, errors, fmt="none", ecolor=colour, elinewidth=1)
    axes.set(ylim=(0, None), xlabel="tokens", xticks=every)


def figure(name: str, rows: list[dict]) -> "Figure":
    """The picture of a table."""
    from matplotlib.figure import Figure

    if name == "figure3":  # it compares connections, and a value model's is residual
        rows = [row | {"system": row["system"].replace("small", "residual")} for row in rows]
    single, panels = len({row["base"] for row in rows}) == 1, {}
    for row in rows:
        for key, score in row.items():
            if name == "table3" and " " in key:
                panels[key.split()[0]] = {}  # its groups are not asked for
            elif isinstance(score, dict) and (key != "new" or single or row["base"] == "continued"):  # no other has read it
                panel, group = (f"base: {row['base']}", key) if single else (key, row["base"])
                panels.setdefault(panel, {}).setdefault(group, {})[row["system"]] = score
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
    picture.suptitle(TITLES[name], x=0.01, ha="left", fontsize=14)
    picture.supylabel("mean, and range over the seeds", fontsize=9, color="#555555")
    legend = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels())}
    for axes in grid[len(panels):]:
        axes.set_axis_off()
    if len(panels) < len(grid):
        grid[-1].legend(legend.values(), legend, loc="center", frameon=False, fontsize=11)
    else:
        picture.legend(legend.values(), legend, loc="outside lower center", ncols=4 if len(legend) > 5 else 5,
                       frameon=False, fontsize=11)
    return picture


def draw(name: str, rows: list[dict], path: Path) -> None:
    """Writes the picture of a table as a PNG, whole or not at all."""
    picture = figure(name, rows)
    with replacing(path) as temporary:
        picture.savefig(temporary, format="png")
