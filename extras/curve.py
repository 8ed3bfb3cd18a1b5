"""A training as a picture, from its log: OUT/curve.png. It needs matplotlib.

Above the losses: what each step had to learn from, its mean over the neighbours, and the loss of
the chats that are held out, with the value model and by the base alone. Below the norm term. A run
of the toy has a third panel, the scores of its held-out questions.
"""

from pathlib import Path

from matplotlib.figure import Figure

from plumbing.files import replacing

BASE, VALUE, GREY = "#0072b2", "#c44e00", "#999999"  # told apart by colour-blind eyes as well
SCORES = {"form": "#005f3c", "right": "#96305f"}


def draw(entries: list[dict], picture: Path, unit: str) -> None:
    """Writes the picture of a run as a PNG, whole or not at all. entries: of its log."""
    steps = [entry for entry in entries if "loss" in entry]
    looks = [entry for entry in entries if "held_out_loss" in entry]
    scores = {}
    for entry in entries:
        done = entry.get("done", entry["step"] + 1)
        for name, share in entry.items():
            if name.split(",")[0] in SCORES:
                scores.setdefault(name, []).append((done, share))

    figure = Figure((8, 7.5 if scores else 5.4), dpi=110, layout="constrained")
    heights = [3, 1.3, 2] if scores else [3, 1.3]
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    figure.suptitle(f"{picture.resolve().parent.name}: {len(steps)} steps", x=0.01, ha="left")
    draw_losses(panels[0], steps, looks, unit)
    panels[1].plot([entry["step"] + 1 for entry in steps], mean([e["norm"] for e in steps]), c=GREY)
    panels[1].set(ylim=(0, None), ylabel="mean |z_Δ|")
    if scores:
        draw_scores(panels[2], scores)
    panels[-1].set_xlabel("steps")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd")
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png")


def draw_losses(axes, steps: list[dict], looks: list[dict], unit: str) -> None:
    done = [entry["step"] + 1 for entry in steps]
    losses = [entry["loss"] for entry in steps]
    axes.plot(done, losses, color=GREY, linewidth=0.5, alpha=0.6)
    axes.plot(done, mean(losses), color=GREY, label="training")

    at = [entry["done"] for entry in looks]
    axes.plot(at, [entry["held_out_loss"] for entry in looks], "o:", color=VALUE, label="held out")
    alone = [(entry["done"], entry["base_alone"]) for entry in looks if "base_alone" in entry]
    if alone:
        axes.plot(*zip(*alone), "--", color=BASE, label="held out, the base alone")
    axes.set(ylim=(0, None), ylabel=unit)
    axes.legend(frameon=False)


def draw_scores(axes, scores: dict[str, list[tuple[int, float]]]) -> None:
    for name, points in scores.items():
        key, _, base = name.partition(", ")
        style = "o--" if base == "small" else "o-"
        axes.plot(*zip(*points), style, color=SCORES[key], label=name, markersize=4)
    axes.set(ylim=(-0.03, 1.03), ylabel="share of questions")
    axes.legend(frameon=False, fontsize=9)


def mean(losses: list[float]) -> list[float]:
    """The mean of each and its neighbours, a hundredth of the run on both sides.

    Example: in a run of 100 steps, one of which is an outlier
    >>> mean([1.0] * 98 + [4.0, 1.0])[95:]
    [1.0, 1.0, 2.0, 2.0, 2.5]
    """
    reach = len(losses) // 100
    windows = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
    return [sum(window) / len(window) for window in windows]
