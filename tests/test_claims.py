"""Verdicts: what the paper shows, what ours say of it, and where that is written."""

import json

import pytest

from experiments import claims, reproduce
from experiments.claims import ABOVE, BELOW, FAR_BELOW, LEVEL_WITH, Cell, Direction
from plumbing.files import InputError

COSTS = [f"seconds {n}" for n in reproduce.LENGTHS]
DIRECTIONS = [
    (claim.number, direction) for claim in claims.CLAIMS for direction in claim.directions
]


def test_every_direction_is_about_rows_of_its_tables():
    assert [claim.number for claim in claims.CLAIMS] == [*range(1, 10)]
    for claim in claims.CLAIMS:
        there = {
            (*row, key)
            for name in claim.tables
            for keys, rows in [reproduce.TABLES.get(name, (COSTS, reproduce.COSTS))]
            for row in rows
            for key in keys
        }
        seen = []
        for direction in claim.directions:
            direction.difference(lambda *place: seen.append(place) or 0.5)
        assert seen and set(seen) <= there
        assert claim.headline.main and len(set(claim.directions)) == len(claim.directions)


@pytest.mark.parametrize("number, direction", DIRECTIONS)
def test_the_paper_holds_its_own_directions(number, direction):
    """Those with numbers: the paper's cells, in the place of ours, are as they are said to be."""
    if direction.paper.startswith("“"):
        return
    left, right = (cell.value(claims.paper_number) for cell in (direction.left, direction.right))
    assert direction.paper.endswith(f" {left:.4g} and {right:.4g}")
    apart = abs(left - right) / max(left, right)
    if direction.relation == LEVEL_WITH:
        assert apart <= 0.02
    else:
        assert apart > 0.02 and (left > right) == (direction.relation == ABOVE)


def test_what_is_said_of_codellama_norm_term_and_proxy():
    """The cells that the comparisons were once wrong about, by hand from the paper's tables."""
    directions = {str(each.left): each for number, each in DIRECTIONS if number in (6, 9)}
    assert directions["new of small on continued"].paper == "HumanEval 24 and 11.3"
    assert directions["new of small on continued"].relation == ABOVE
    assert directions["right of small on continued"].paper == "MT-Bench 3.94 and 4.62"
    assert directions["right of small on continued"].relation == BELOW
    assert directions["right of small on medium"].paper == "MT-Bench 4.62 and 4.65"
    assert directions["right of small on medium"].relation == LEVEL_WITH


def holds(relation: str, left: float, right: float) -> bool:
    cells = Cell("small", "full", "form"), Cell("large", "full", "form")
    direction = Direction(cells[0], relation, cells[1], "", True)
    return direction.holds(lambda base, *_: {"small": left, "large": right}[base])


def test_relations_hold():
    assert holds(ABOVE, 0.6, 0.5) and not holds(ABOVE, 0.5, 0.5) and not holds(ABOVE, 0.4, 0.5)
    assert holds(BELOW, 0.4, 0.5) and not holds(BELOW, 0.5, 0.5)
    assert holds(FAR_BELOW, 0.24, 0.5) and not holds(FAR_BELOW, 0.25, 0.5)
    # neither ahead nor behind
    assert holds(LEVEL_WITH, 0.54, 0.5) and holds(LEVEL_WITH, 0.46, 0.5)
    assert not holds(LEVEL_WITH, 0.56, 0.5) and not holds(LEVEL_WITH, 0.44, 0.5)


def test_gains_and_shares():
    scores = {"small norm": 0.7, "small": 0.4}

    def look_up(base, system, score):
        return scores[system]

    gain = Cell("xlarge", "small norm", "few-shot", over="small")
    share = Cell("xlarge", "small", "few-shot", of="small norm")
    assert gain.value(look_up) == pytest.approx(0.3) and str(gain).endswith("over small on xlarge")
    assert share.value(look_up) == pytest.approx(4 / 7)
    scores["small norm"] = 0.0
    assert share.value(look_up) == 0


def row(base: str, system: str, **scores: list[float]) -> dict:
    spreads = {score: reproduce.spread(seeds) for score, seeds in scores.items()}
    return {"base": base, "system": system, **spreads}


def claim_of(*directions: Direction) -> claims.Claim:
    return claims.Claim(1, "text", "§0", ("figure2",), directions)


def test_findings_are_computed_from_the_tables(tmp_path, monkeypatch):
    probe, full = Cell("small", "probe", "right"), Cell("small", "full", "right")
    new = Cell("small", "probe", "form"), Cell("small", "full", "form")
    main = Direction(probe, FAR_BELOW, full, "theirs", True)
    other = Direction(full, BELOW, probe, "theirs", False)
    nothing = Direction(new[0], BELOW, new[1], "theirs", True)
    monkeypatch.setattr(claims, "CLAIMS", [claim_of(main, other, nothing)])
    with pytest.raises(InputError, match="run reproduce.py figure2 first"):
        claims.findings(tmp_path)

    rows = [
        row("small", "full", right=[0.8, 0.9], form=[0.0, 0.01]),
        row("small", "probe", right=[0.1, 0.5], form=[0.0, 0.0]),
    ]
    (tmp_path / "figure2.json").write_text(json.dumps(rows))
    claims.findings(tmp_path)
    (found,) = json.loads((tmp_path / "findings.json").read_text())
    first, second, third = found["directions"]
    assert (found["claim"], found["verdict"]) == (1, "undecided")  # that of its main direction
    assert first["ours"] == pytest.approx([0.3, 0.85]) and first["holds"] == 1
    assert first["differences"] == pytest.approx([-0.7, -0.4]) and first["verdict"] == "undecided"
    assert second["holds"] == 0 and second["verdict"] == "disagrees"
    # nothing above the floor: nothing was compared
    assert third["verdict"] == "untested"


def test_a_score_at_its_floor_in_all_seeds_but_one_was_compared():
    below = Direction(Cell("s", "a", "new"), ABOVE, Cell("s", "b", "new"), "", True)
    rows = {("s", "a"): row("s", "a", new=[0.0, 0.02]), ("s", "b"): row("s", "b", new=[0.0, 0.0])}
    assert claims.weigh(below, rows)["verdict"] == "undecided"
    rows["s", "a"] = row("s", "a", new=[0.0, 0.019])
    assert claims.weigh(below, rows)["verdict"] == "untested"
