"""Pictures of what changes along an axis: a claim over scale, the norm term over its strength.

    python experiments/trends.py               # those of experiments/results, drawn again
    python experiments/trends.py --out DIR     # those of another --out of reproduce.py

scales.png: of each claim the first direction's margin, by how much it holds, over the scale of the
family. The folder's own tables are scale 1; a folder scale-N in it holds those of another, all of
them or reproduce.py's `headlines`. norm.png: |z_Δ| along the training, and what each norm term
keeps and costs; see norm.py. Only drawing needs matplotlib.
"""

import argparse
import importlib.util
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import claims
from plumbing.files import LIST, TABLE, InputError, Parser, command, read_json, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ---------------------------------------------------------------- claims over scale


def margins(claim: claims.Claim, out: Path) -> list[float] | None:
    """Of a claim's headline, one number a seed; None where the folder's tables lack one of its
    rows.
    """
    names = [name for name in (*claim.tables, "headlines") if (out / f"{name}.json").exists()]
    rows = claims.read_rows(names, out)
    cells = claim.headline.left, claim.headline.right
    if not all(rows.keys() >= {(cell.base, cell.system)} for cell in cells):
        return None

    def look_up(seed: int, base: str, system: str, score: str) -> float:
        return rows[base, system][score]["seeds"][seed]

    first = rows[cells[0].base, cells[0].system][cells[0].score]
    seeds = range(len(first["seeds"]))
    return [claim.headline.margin(partial(look_up, seed)) for seed in seeds]


def folders(out: Path) -> dict[float, Path]:
    """Scale → the folder of its tables, from the smallest on."""
    found = {1.0: out}
    for folder in out.glob("scale-*"):
        found[float(folder.name.removeprefix("scale-"))] = folder
    return dict(sorted(found.items()))


def scales(out: Path) -> "Figure":
    """Nine panels, one for each claim."""
    from matplotlib.figure import Figure

    there = folders(out)
    picture = Figure((10, 9.2), dpi=150, layout="constrained")
    body, foot = picture.subfigures(2, 1, height_ratios=(8.8, 0.4))
    grid = body.subplots(3, 3, sharex=True).ravel()
    for axes, claim in zip(grid, claims.CLAIMS):
        axes.axhspan(-1, 0, color="#f3e3e3", zorder=0)
        axes.axhline(0, color="#888888", linewidth=1)
        points = []
        for place, folder in enumerate(there.values()):
            seeds = margins(claim, folder)
            if seeds is None:
                continue
            axes.plot([place] * len(seeds), seeds, "o", color="#0072b2", alpha=0.35, markersize=5)
            points.append((place, sum(seeds) / len(seeds)))
        axes.plot(*zip(*points), "-", color="#0072b2", linewidth=2)

        direction = claim.headline
        words = f"{claim.number}. {direction.left} {direction.relation} {direction.right}"
        axes.set_title(textwrap.fill(words, 38), loc="left", fontsize=9)
        axes.set_xticks(range(len(there)), [f"{scale:g}" for scale in there])
        axes.set_xlim(-0.4, len(there) - 0.6)
        low = min(y for line in axes.lines[1:] for y in line.get_ydata())
        high = max(y for line in axes.lines[1:] for y in line.get_ydata())
        room = 0.1 * max(high - low, 0.1)
        axes.set_ylim(min(low, 0) - room, max(high, 0) + room)
        axes.spines[["top", "right"]].set_visible(False)
    body.suptitle("Each claim's first direction over the scale of the family", x=0.01, ha="left")
    body.supxlabel("scale", fontsize=10)
    body.supylabel("margin: by how much it holds, in shares of the questions", fontsize=10)
    foot.text(
        0.012,
        0.5,
        "Dots: seeds, each a family of its own; lines: means. In the red area a direction does not "
        "hold. Level means within 0.05, far below less than half.",
        va="center",
        fontsize=8.5,
        color="#333333",
    )
    return picture


# ---------------------------------------------------------------- the norm term over λ

# colour, and where a point's λ stands beside it
LOSSES = {
    "plain": ("#0072b2", (6, 6)),
    "centred": ("#c44e00", (8, -4)),
    "warmed": ("#3f8f3f", (-24, -8)),
}
# of |z_Δ| along the training: which trainings, and their colours
ALONG = {"small": ("#888888", "λ = 0"), "small norm": ("#0072b2", "plain, λ = 0.3")}
ALONG |= {"centred 0.3": ("#c44e00", "centred, λ = 0.3")}
ALONG |= {"warmed 0.3": ("#3f8f3f", "warmed, λ = 0.3")}


def strength_of(system: str) -> tuple[str, float] | None:
    """Loss and λ of a row; None of a base alone.

    Example:
    >>> strength_of("small"), strength_of("small norm"), strength_of("centred 0.1")
    (('plain', 0.0), ('plain', 0.3), ('centred', 0.1))
    """
    if system == "alone":
        return None
    named = {"small": ("plain", 0.0), "small norm": ("plain", 0.3)}
    if system in named:
        return named[system]
    loss, lam = system.split()
    return loss, float(lam)


def trade(axes, rows: list[dict]) -> None:
    """Knowledge over form on the largest base: a line for each loss, from λ = 0 on."""
    here = [row for row in rows if row["base"] == "xlarge"]
    (alone,) = [row for row in here if row["system"] == "alone"]
    known = alone["few-shot"]["mean"]
    axes.axhline(known, color="#000000", linestyle=":", label="base alone")
    for loss, (colour, beside) in LOSSES.items():
        points = []
        for row in here:
            of_row = strength_of(row["system"])
            if of_row is None or (of_row[0] != loss and of_row[1] > 0):
                continue
            axes.plot(row["form"]["seeds"], row["few-shot"]["seeds"], ".", color=colour, alpha=0.3)
            points.append((of_row[1], row["form"]["mean"], row["few-shot"]["mean"]))
        points.sort()
        _, form, few_shot = zip(*points)
        axes.plot(form, few_shot, "o-", color=colour, label=loss)
        for lam, x, y in points[1:]:
            axes.annotate(f"{lam:g}", (x, y), beside, textcoords="offset points", color=colour)
    axes.set(xlabel="form on the largest base", ylabel="few-shot on the largest base")
    axes.set_title("what each λ keeps, and costs", loc="left", fontsize=12)


def along(axes, parts: dict[str, dict[str, list[float]]]) -> None:
    """The constant in z_Δ, and what is left, while a value model is being trained."""
    for system, (colour, label) in ALONG.items():
        steps = parts[system]["step"]
        axes.plot(steps, parts[system]["left"], "-", color=colour, label=label)
        axes.plot(steps, parts[system]["constant"], "--", color=colour)
    axes.set(xlabel="steps", ylabel="nats", ylim=(0, None))
    title = r"$|z_\Delta - \mathrm{median}|$ (lines) and |median| (dashes), means"
    axes.set_title(title, loc="left", fontsize=12)


def norm(rows: list[dict], parts: dict[str, dict[str, list[float]]]) -> "Figure":
    """Two panels: |z_Δ| along the training, and knowledge over form."""
    from matplotlib.figure import Figure

    picture = Figure((10, 4.8), dpi=150, layout="constrained")
    left, right = picture.subplots(1, 2)
    along(left, parts)
    trade(right, rows)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd")
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=10)
    picture.suptitle("The norm term, and two others in its place", x=0.01, ha="left", fontsize=14)
    return picture


def draw(out: Path) -> list[Path]:
    """Draws what the folder has tables for, each picture whole or not at all."""
    made = []
    if (out / "norm.json").exists():
        rows = read_json(out / "norm.json", LIST)
        made.append((norm(rows, read_json(out / "norm-parts.json", TABLE)), out / "norm.png"))
    if len(folders(out)) > 1:
        made.append((scales(out), out / "scales.png"))
    for picture, path in made:
        with replacing(path) as temporary:
            picture.savefig(temporary, format="png", metadata={"Software": None})
    return [path for _, path in made]


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out = parser.parse_args().out
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("matplotlib is not installed: pip install -r requirements-dev.txt")
    paths = draw(out)
    if not paths:
        raise InputError(f"{out}: holds no table of `reproduce.py norm`, and no folder scale-N")
    print(*paths, sep="\n")


if __name__ == "__main__":
    command(main)
