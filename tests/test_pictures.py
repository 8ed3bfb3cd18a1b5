"""The lecture's pictures say what is so: what is drawn is optimal, and bars can be added up."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from conftest import ROOT
from torch import Tensor

from experiments import pictures
from ivl import combine, loss_sums

SVG = "{http://www.w3.org/2000/svg}"
DRAWN = ["method", "gradient", "speculative"]

# the lecture's logits, in multiples of log 2: Oslo, Rome, Lima, Sorry, Who
SMALL, LARGE, VALUE = [2, 1, 0, 3, 0], [0, 3, 1, 4, 0], [1, 1, 1, -3, 0]


# ---------------------------------------------------------------- the norm term's picture


def problem(p_base: float, q: float) -> tuple[Tensor, Tensor]:
    """z_base and the demonstrations' shares p_l, (V,) each, of `experiments/pictures.py`."""
    others = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    base = torch.cat((torch.tensor([p_base]), (1 - p_base) * others))
    labels = torch.cat((torch.tensor([q]), (1 - q) * others))
    return base.log(), labels


def pulls(z_base: Tensor, labels: Tensor, z_delta: Tensor) -> Tensor:
    """The gradient of the demonstrations' cross-entropy by z_Δ, (V,), from `ivl.loss_sums`."""
    z = z_delta.clone().requires_grad_()
    none = torch.zeros(1, 1, dtype=torch.bool)
    total = 0.0
    for word, share in enumerate(labels):
        target = torch.tensor([[word]])
        total = total + share * loss_sums(z_base[None, None], z[None, None], target, none)[0]
    return torch.autograd.grad(total, z)[0]


@pytest.mark.parametrize("lam", pictures.LAMBDAS)
@pytest.mark.parametrize("q", [0.0, 0.01, 0.1, 0.2, 0.24, 0.28, 0.33, 0.5, 0.9, 1.0])
def test_where_a_word_rests_the_two_forces_are_equal(lam, q):
    pull = lam / pictures.V
    z_base, labels = problem(pictures.P_BASE, q)
    z = torch.zeros(pictures.V, dtype=torch.float64)
    z[0] = pictures.at_rest(pictures.P_BASE, q, pull)
    force = pulls(z_base, labels, z)
    for logit, f in zip(z.tolist(), force.tolist()):
        if logit == 0:  # the norm term can hold it
            assert abs(f) <= pull + 1e-6
        else:
            assert f == pytest.approx(math.copysign(pull, -logit), abs=1e-6)


@pytest.mark.parametrize("lam, q", [(0.25, 0.5), (0.25, 0.28), (0.5, 0.0), (0.5, 1.0)])
def test_descent_comes_to_the_same_place(lam, q):
    pull = lam / pictures.V
    z_base, labels = problem(pictures.P_BASE, q)
    z = torch.linspace(-1, 1, pictures.V, dtype=torch.float64)
    for _ in range(300):  # a step of size 2 down the cross-entropy, then the norm term's
        z = torch.nn.functional.softshrink(z - 2 * pulls(z_base, labels, z), 2 * pull)
    rest = pictures.at_rest(pictures.P_BASE, q, pull)
    assert z.tolist() == pytest.approx([rest, 0, 0, 0, 0], abs=1e-3)


def test_without_a_norm_term_a_word_goes_all_the_way():
    assert pictures.at_rest(0.25, 1.0, 0.0) == float("inf")
    assert pictures.at_rest(0.25, 0.0, 0.0) == -float("inf")
    z = pictures.at_rest(0.25, 0.9, 0.0)
    assert pictures.probability(0.25, z) == pytest.approx(0.9)


def test_the_curves_are_what_is_proved():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    forces, thresholds = pictures.norm().axes

    # left: probabilities of the pair, less the share; the dots are at rest
    lines = {line.get_label(): line for line in forces.lines}
    for q, colour in pictures.SHARES.items():
        z_base, labels = problem(pictures.P_BASE, q)
        x, y = lines[f"q = {q}"].get_data()
        for z, force in list(zip(x, y))[::50]:
            alone = torch.tensor([z, 0, 0, 0, 0], dtype=torch.float64)
            p = combine(z_base, alone).softmax(-1)[0]
            assert force == pytest.approx(p.item() - q, abs=1e-6)
        (dot,) = [
            line for line in forces.lines if line.get_marker() == "o" and line.get_color() == colour
        ]
        assert dot.get_xdata() == pictures.at_rest(pictures.P_BASE, q, pictures.LAMBDA / pictures.V)

    # right: at rest with the norm term, where without it x would be
    lines = {line.get_label(): line for line in thresholds.lines}
    assert list(lines["λ = 0"].get_xdata()) == list(lines["λ = 0"].get_ydata())
    for lam in pictures.LAMBDAS:
        for x, y in list(zip(*lines[f"λ = {lam}"].get_data()))[::50]:
            q = pictures.probability(pictures.P_BASE, x)
            assert y == pictures.at_rest(pictures.P_BASE, q, lam / pictures.V)


def test_the_same_picture_is_the_same_file(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    made = []
    for _ in range(2):
        pictures.main()
        made.append((tmp_path / "pictures" / "norm.png").read_bytes())
    assert made[0] == made[1] and made[0].startswith(b"\x89PNG\r\n\x1a\n")
    assert (ROOT / "pictures" / "norm.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# ---------------------------------------------------------------- drawn by hand


@pytest.mark.parametrize("name", DRAWN)
def test_a_drawing_stands_by_itself(name):
    text = (ROOT / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    root = ET.fromstring(text)
    for part in ("title", "desc"):
        (found,) = root.iter(SVG + part)
        assert found.text.strip() and found.get("id") in root.get("aria-labelledby").split()
    # dark and light; nothing is loaded from elsewhere, no script
    assert "prefers-color-scheme: dark" in text and "system-ui" in text
    assert not re.search(r"@import|href|<script|<image|@font-face", text)
    assert re.findall(r"https?://\S+?\"", text) == ['http://www.w3.org/2000/svg"']


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_reaches_over_the_edge(name):
    root = ET.parse(ROOT / "pictures" / f"{name}.svg").getroot()
    _, _, width, height = map(float, root.get("viewBox").split())
    for rect in root.iter(SVG + "rect"):
        x, y, w, h = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
    for text in root.iter(SVG + "text"):
        assert 0 < float(text.get("x")) < width and 0 < float(text.get("y")) < height


@pytest.mark.parametrize("panel, base", [("train", SMALL), ("plug", LARGE)])
def test_the_bars_are_the_example(panel, base):
    root = ET.parse(ROOT / "pictures" / "method.svg").getroot()
    (group,) = [g for g in root.iter(SVG + "g") if g.get("id") == panel]
    unit = 16  # of height for each log 2
    expected = {
        "bar-base": base,
        "bar-value": VALUE,
        "bar-sum": [a + b for a, b in zip(base, VALUE)],
    }
    for kind, logits in expected.items():
        (bars,) = [g for g in group.iter(SVG + "g") if g.get("class") == kind]
        rects = bars.findall(SVG + "rect")
        heights = [float(rect.get("height")) for rect in rects]
        assert heights == [abs(z) * unit for z in logits]
        # those above zero end at the axis, the others begin there
        tops = [float(rect.get("y")) for rect in rects]
        axis = {y + h if z > 0 else y for y, h, z in zip(tops, heights, logits)}
        assert len(axis) == 1
