"""The pictures of trends: what is drawn is what the tables say."""

import json

import pytest
from conftest import assert_refused

from experiments import claims, reproduce, trends

SCORES = ("form", "right", "skill", "few-shot", "new")


@pytest.fixture(autouse=True)
def matplotlib():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")


def write(out, name: str, rows, value) -> None:
    """A table in which value(seed, base, system) is every score."""
    out.mkdir(exist_ok=True)
    table = [
        {
            "base": base,
            "system": system,
            **{key: reproduce.spread([value(s, base, system) for s in (0, 1)]) for key in SCORES},
        }
        for base, system in rows
    ]
    (out / f"{name}.json").write_text(json.dumps(table))


def height(seed: int, base: str, system: str) -> float:
    return (len(base) + 2 * len(system) + seed * len(base)) / 100


def expected(claim: claims.Claim) -> list[float]:
    def look_up(seed):
        return lambda base, system, score: height(seed, base, system)

    return [claim.headline.margin(look_up(seed)) for seed in (0, 1)]


def test_margins_are_of_each_claims_first_direction(tmp_path):
    rows = reproduce.TABLES["headlines"][1]
    write(tmp_path, "headlines", [row for row in rows if row[0] != "other"], height)
    for claim in claims.CLAIMS:
        found = trends.margins(claim, tmp_path)
        if claim.number == 8:  # its base is not there
            assert found is None
        else:
            assert found == pytest.approx(expected(claim))


def test_a_panel_for_each_claim_and_a_dot_for_each_seed(tmp_path):
    rows = reproduce.TABLES["headlines"][1]
    write(tmp_path, "headlines", rows, height)
    for scale in ("0.25", "4"):
        there = [row for row in rows if scale != "4" or row[0] != "other"]
        write(tmp_path / f"scale-{scale}", "headlines", there, height)
    picture = trends.scales(tmp_path)
    panels = picture.subfigs[0].axes
    assert len(panels) == 9
    for axes, claim in zip(panels, claims.CLAIMS):
        assert axes.get_title("left").startswith(f"{claim.number}. ")
        _, *dots, means = axes.lines
        places = 2 if claim.number == 8 else 3
        assert [list(line.get_ydata()) for line in dots] == [
            pytest.approx(expected(claim)) for _ in range(places)
        ]
        mean = sum(expected(claim)) / 2
        assert list(means.get_ydata()) == pytest.approx([mean] * places)
        assert list(means.get_xdata()) == [*range(places)]
        # a direction that does not hold lies in the red area
        bottom, top = axes.get_ylim()
        assert bottom < min(*expected(claim), 0) and top > max(*expected(claim), 0)
    assert [label.get_text() for label in panels[-1].get_xticklabels()] == ["0.25", "1", "4"]


def norm_rows() -> list[dict]:
    keys, rows = reproduce.TABLES["norm"]
    return [
        {
            "base": base,
            "system": system,
            **{key: reproduce.spread([height(s, key, system) for s in (0, 1)]) for key in keys},
        }
        for base, system in rows
    ]


def test_the_trade_has_a_line_for_each_loss_from_zero_on():
    rows = norm_rows()
    parts = {
        system: {"step": [0, 16], "constant": [3.0, 2.0], "left": [1.0, 4.0]}
        for system in reproduce.NORM_STUDY
    }
    picture = trends.norm(rows, parts)
    left, right = picture.axes
    lines = {line.get_label(): line for line in right.lines if line.get_marker() == "o"}
    assert lines.keys() == trends.LOSSES.keys()
    table = {row["system"]: row for row in rows if row["base"] == "xlarge"}
    for loss, line in lines.items():
        systems = ["small", f"{loss} 0.1", f"{loss} 0.3", f"{loss} 1.0"]
        systems = [{"plain 0.3": "small norm"}.get(system, system) for system in systems]
        assert list(line.get_xdata()) == [table[system]["form"]["mean"] for system in systems]
        assert list(line.get_ydata()) == [table[system]["few-shot"]["mean"] for system in systems]
    # the base alone, as a line across
    (dotted,) = [line for line in right.lines if line.get_label() == "base alone"]
    assert set(dotted.get_ydata()) == {table["alone"]["few-shot"]["mean"]}

    # |z_Δ| along the training: what is left as a line, the constant as dashes
    drawn = [(line.get_linestyle(), list(line.get_ydata())) for line in left.lines]
    assert drawn == [("-", [1.0, 4.0]), ("--", [3.0, 2.0])] * len(trends.ALONG)
    assert trends.ALONG.keys() <= set(reproduce.NORM_STUDY)


def test_pictures_are_drawn_of_what_is_there(run, tmp_path):
    assert_refused(run("experiments/trends.py", "--out", tmp_path), "no folder scale-N")
    (tmp_path / "norm.json").write_text(json.dumps(norm_rows()))
    parts = {"step": [0], "constant": [3.0], "left": [1.0]}
    named = dict.fromkeys(reproduce.NORM_STUDY, parts)
    (tmp_path / "norm-parts.json").write_text(json.dumps(named))
    result = run("experiments/trends.py", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "norm.png")]
    assert (tmp_path / "norm.png").read_bytes().startswith(b"\x89PNG")
