"""The lecture's picture of the norm term (§4.2.1): from which pull on it is a word let go of zero?

    python experiments/pictures.py    # writes pictures/norm.png

One place in the demonstrations, a vocabulary of V words. A word w has probability p there by the
base, and stands there in the share q of the demonstrations; the other words share what is left in
the base's proportions. Let z_Δ be z for w. If the logits may move freely, the loss

    Σ_y p_l(y) CE(z_post, y) + λ ‖z_Δ‖₁

is least where the others rest at exactly zero and w stands where `at_rest` says. That the gradient
of `ivl.loss_sums` vanishes there is a test, tests/test_pictures.py. Drawing needs matplotlib.
"""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

V = 5  # words, as in the lecture's example
P_BASE = 0.25  # the small base's probability of `Oslo`
LAMBDAS = {0.1: "#6cc0ee", 0.25: "#0072b2", 0.5: "#003a63"}
SHARES = {1: "#c44e00", 0.5: "#f2b134", 0.28: "#806b00"}
LAMBDA = 0.25  # whose band the left panel shows


def log_odds(p: float) -> float:
    return math.log(p / (1 - p))


def probability(p_base: float, z: float) -> float:
    """p_post of a word that the base gives p_base and the value model the logit z, the others 0.

    Example: in the lecture's five words, z = 2 log 2 makes ¼ of 4 : 12 into 16 : 12
    >>> round(probability(0.25, 2 * math.log(2)), 4)
    0.5714
    """
    odds = math.exp(log_odds(p_base) + z)
    return odds / (1 + odds)


def at_rest(p_base: float, q: float, pull: float) -> float:
    """The word's z_Δ where the two forces are equal; pull is λ/V.

    The cross-entropy pulls with p_post − q, the norm term with λ/V towards zero. Where at z = 0 the
    first is the weaker one the word stays at 0; else it goes until |p_post − q| = λ/V.

    Example: the demonstrations want ½, the base gives ¼
    >>> round(at_rest(0.25, 0.5, pull=0.0), 4), round(at_rest(0.25, 0.5, pull=0.1), 4)
    (1.0986, 0.6931)
    >>> at_rest(0.25, 0.5, pull=0.25)
    0.0
    """
    if q - p_base > pull:
        target = q - pull
    elif p_base - q > pull:
        target = q + pull
    else:
        return 0.0
    if target == 1:
        return math.inf  # without a norm term nothing stops a word that always stands there
    if target == 0:
        return -math.inf
    return log_odds(target) - log_odds(p_base)


def steps(start: float, end: float, n: int = 401) -> list[float]:
    """n numbers from start to end, evenly."""
    return [start + (end - start) * i / (n - 1) for i in range(n)]


def forces(axes) -> None:
    """The cross-entropy's pull on the word's logit over z_Δ, and the band ±λ/V."""
    pull = LAMBDA / V
    axes.axhspan(-pull, pull, color="#dddddd", label=f"within ±λ/V, λ = {LAMBDA}")
    axes.axhline(0, color="#555555", linewidth=1)
    z = steps(-2, 5)
    for q, colour in SHARES.items():
        axes.plot(z, [probability(P_BASE, x) - q for x in z], color=colour, label=f"q = {q}")
        rest = at_rest(P_BASE, q, pull)
        axes.plot(rest, probability(P_BASE, rest) - q, "o", color=colour, markersize=8)
    axes.set(xlabel=r"$z_\Delta$ of the word", xlim=(-2, 5), ylim=(-1, 0.5))
    title = r"the pull $p_\mathrm{post} - q$; at the dot the word rests"
    axes.set_title(title, loc="left", fontsize=12, pad=12)


def thresholds(axes) -> None:
    """z_Δ with the norm term over z_Δ without it."""
    z = steps(-3, 6)
    axes.plot(z, z, "--", color="#555555", label="λ = 0")
    for lam, colour in LAMBDAS.items():
        rest = [at_rest(P_BASE, probability(P_BASE, x), lam / V) for x in z]
        axes.plot(z, rest, color=colour, label=f"λ = {lam}")
    axes.set(xlabel=r"$z_\Delta$ without a norm term", xlim=(-3, 6), ylim=(-3, 6))
    axes.set_title(r"$z_\Delta$ with a norm term", loc="left", fontsize=12, pad=12)


def norm() -> "Figure":
    """The picture: two forces on one logit, and where they leave it."""
    from matplotlib.figure import Figure

    picture = Figure((10, 4.8), dpi=150, layout="constrained")
    for axes, draw in zip(picture.subplots(1, 2), (forces, thresholds)):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd")
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=11)
    picture.suptitle(
        f"The norm term, for one word of {V}, to which the base gives {P_BASE}",
        x=0.01,
        ha="left",
        fontsize=14,
    )
    return picture


def main() -> None:
    path = ROOT / "pictures" / "norm.png"
    picture = norm()
    with replacing(path) as temporary:
        # no date and no version of matplotlib: the same picture is the same file
        picture.savefig(temporary, format="png", metadata={"Software": None})
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
